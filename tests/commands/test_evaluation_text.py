"""The words of `selfray evaluate`: names of data sets and encoders, tables and logged names."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from helpers import experiment, start
from selfray.cluster.evaluation import Judged, Labelled, Subject
from selfray.cluster.finetuning import Labels
from selfray.commands.evaluation_text import metrics_of, report, tags_of
from selfray.commands.finetune_flags import FineTuneFlags, with_finetuning
from selfray.commands.labelled import data_name, data_names
from selfray.commands.model_card import model_card
from selfray.commands.subjects import open_subjects
from selfray.console import Console
from selfray.contract import RESNET, VIT
from selfray.data.writer import write_arrays
from selfray.probes.examine import examine
from selfray.probes.judgement import Judgement
from selfray.runs import checkpoint
from selfray.runs.checkpoint import Checkpoint
from selfray.runs.spool import SpoolWriter
from selfray.storage import Location

NOWHERE = Console(io.StringIO(), None)
HERE = Location.of(".")
LABELS = np.arange(20) % 2


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def judged(title: str, *judgements: Judgement) -> Judged:
    keys = np.arange(40, dtype=np.uint64)
    examined = examine("flowers", LABELS, LABELS, keys[:20], keys[20:])
    subject = Subject(title, None, HERE, 16)
    data = Labelled("flowers", None, None)  # type: ignore[arg-type]
    return Judged(subject, data, examined, keys[20:], 0, judgements, 1.0, ())  # type: ignore[arg-type]


def accuracy(key: str, protocol: str = "v1", **more: float) -> Judgement:
    return Judgement(key, protocol, "accuracy", np.ones((1, 20)), more=more)


# Names


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/nuclei/images", "nuclei"),
        ("flowers.parquet", "flowers"),
        ("/data/cifar10/test-00000-of-00001.parquet", "cifar10"),
        ("embedded:digits", "digits"),
        ("labelled/", "labelled"),
        ("../images", "images"),
    ],
)
def test_a_data_set_is_named_by_the_part_of_its_path_that_tells(path, name):
    assert data_name(path) == name


def test_shards_without_a_telling_name_take_that_of_their_source(tmp_path):
    images = [png(number) for number in range(2)]
    write_arrays(tmp_path / "shards", images, source="/scans/lungs/images")
    assert data_name(str(tmp_path / "shards")) == "lungs"


def test_equal_names_are_numbered():
    assert data_names(["a/lungs", "b/lungs/images", "c"]) == ["lungs", "lungs-2", "c"]


def test_each_network_has_its_untrained_encoder_and_a_run_s_newest_checkpoint_its_name(tmp_path):
    for name, encoder in (("vit", VIT), ("twin", VIT), ("resnet", RESNET)):
        wanted = experiment(encoder=encoder)
        state = start(wanted, steps=2)
        checkpoint.save(state, wanted, Location.of(tmp_path / name), loss=1.0)
    asked = [str(tmp_path / name) for name in ("vit", "twin", "resnet")]
    found = open_subjects([*asked, "untrained"], None, None, NOWHERE)
    titles = [named.subject.title for named in found]
    assert titles == ["vit", "twin", "resnet", "untrained", "untrained, as resnet"]
    sizes = [named.subject.encoder.encoder_config for named in found]  # type: ignore[union-attr]
    assert sizes[3:] == [VIT, RESNET]
    (one,) = open_subjects([f"{tmp_path}/vit/checkpoints/step-00000000"], None, None, NOWHERE)
    assert one.subject.title == "vit-step-00000000"


@pytest.mark.parametrize(
    ("typed", "meant"), [("vitt", "vit"), ("untraned", "untrained"), ("timm:resnt50", "resnet50")]
)
def test_a_mistyped_encoder_is_told_the_nearest_name(typed, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit").mkdir()
    with pytest.raises((ValueError, OSError), match=rf"did you mean .*{meant}"):
        open_subjects([typed], None, None, NOWHERE)


# Numbers


def test_from_scratch_is_logged_beside_the_encoder():
    tuned = judged("mae", accuracy("finetune"), accuracy("knn"))
    scratch = judged("from scratch", accuracy("low-shot-1%-finetune"), accuracy("finetune", "v2"))
    values = metrics_of(tuned, scratch)
    prefix = "eval/flowers/"
    mains = {name.removeprefix(prefix) for name in values if name.count("/") == 2}
    of_scratch = {"low-shot-1pct-finetune-from-scratch", "finetune-from-scratch"}
    assert mains == {"finetune", "knn"} | of_scratch
    assert {f"{prefix}finetune-from-scratch/{end}" for end in ("low", "high")} <= set(values)
    tags = tags_of(tuned, scratch)
    assert tags["eval.flowers.finetune-from-scratch.protocol"] == "v2"
    assert tags["eval.flowers.finetune.protocol"] == "v1"


def test_encoders_of_one_network_share_a_row_from_scratch_and_untrained_ones_are_not_fine_tuned(
    tmp_path, monkeypatch
):
    asked = []
    for name, encoder in (("vit", VIT), ("twin", VIT), ("resnet", RESNET)):
        wanted = experiment(encoder=encoder)
        checkpoint.save(start(wanted, steps=2), wanted, Location.of(tmp_path / name), loss=1.0)
        asked.append(str(tmp_path / name))
    subjects = [n.subject for n in open_subjects([*asked, "untrained"], None, None, NOWHERE)]
    pixels = Subject("pixels", None, HERE, 16)
    results = [[replace(judged(s.title), subject=s)] for s in [*subjects, pixels]]

    def fine_tuned(judged, encoder, protocol, labels, how):
        return accuracy(labels.key, f"from_scratch {protocol.from_scratch}")

    monkeypatch.setattr("selfray.cluster.finetuning.fine_tuned", fine_tuned)
    found = with_finetuning(results, FineTuneFlags(), [Labels()], None)  # type: ignore[arg-type]
    protocols = {
        row[0].subject.title: [j.protocol for j in row[0].judgements] for row in found.results
    }
    assert protocols == {
        **{key: ["from_scratch False"] for key in ("vit", "twin", "resnet")},
        "untrained": [],
        "untrained, as resnet": [],
        "pixels": [],
        **{key: ["from_scratch True"] for key in ("from scratch", "from scratch, as resnet")},
    }
    rows = [None if row is None else row[0].subject.title for row in found.scratch]
    first, second = "from scratch", "from scratch, as resnet"
    assert rows == [first, first, second, first, second, None]

    alone = with_finetuning(results, FineTuneFlags(no_scratch=True), [Labels()], None)  # type: ignore[arg-type]
    assert len(alone.results) == len(results)
    assert alone.scratch == [None] * len(results)
    assert [j.protocol for j in alone.results[3][0].judgements] == ["from_scratch False"]


def test_a_wide_table_is_printed_in_blocks_that_leave_out_empty_rows():
    keys = [f"low-shot-{share}%" for share in range(1, 9)]
    whole = judged("an-encoder-with-a-long-name", *map(accuracy, keys))
    few = judged("another", accuracy(keys[0]))
    lines = list(report([[whole], [few]], [whole.data]))
    table = [line for line in lines if line.startswith(("an-encoder", "another"))]
    assert max(map(len, table)) <= 110
    assert sum(line.startswith("an-encoder") for line in table) == 3
    assert sum(line.startswith("another") for line in table) == 2  # its figure, and its seconds
    heads = " ".join(line for line in lines if line.startswith(" "))
    assert [key for key in keys if key not in heads] == []


def test_more_labels_than_there_are_is_said():
    found = judged("mae", accuracy("labels-10", labels=10), accuracy("labels-50", labels=20))
    lines = list(report([[found]], [found.data]))
    assert "--labels 50: only 20 train images have labels, and all were used" in lines


def test_a_model_card_has_a_row_for_each_figure_and_the_line_that_a_small_stem_needs(tmp_path):
    wanted = experiment(encoder=RESNET)
    checkpoint.save(start(wanted, steps=2), wanted, Location.of(tmp_path / "run"), loss=1.0)
    writer = SpoolWriter(Location.of(tmp_path / "run" / "spool"), "probe-1")
    figures = {"": 0.931, "/low": 0.92, "/high": 0.95, "/balanced": 0.9}
    writer.metrics(16, {f"eval/lungs/knn{end}": value for end, value in figures.items()})
    writer.close()
    card = model_card(Checkpoint.open(tmp_path / "run"), wanted)
    assert "| lungs: kNN accuracy, k chosen | 93.1% [92.0, 95.0] |" in card
    assert "balanced" not in card
    assert RESNET.small_stem
    for model in ("model", "model.timm_model"):
        assert f"\n{model}.conv1.stride, {model}.maxpool = (1, 1), torch.nn.Identity()" in card
