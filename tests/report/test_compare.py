"""Runs side by side: what is read of them, how they are ranked, and the page that shows them."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from test_cli import DEAD, Type, assert_one_line_error, typed  # noqa: F401 - a fixture

from helpers import MAE, SIMCLR, experiment, start
from selfray import config
from selfray.cluster.after_run import log_to_run
from selfray.cluster.mlflow_runs import log_page, read_runs
from selfray.cluster.tracking import Tracker
from selfray.console import Console
from selfray.experiment import Experiment
from selfray.report import live_map
from selfray.report.page import thinned, write_page
from selfray.runs import checkpoint, ranking
from selfray.runs import record as run_record
from selfray.runs.folder import LOCK, RUN_FILE, SPOOL, is_training
from selfray.runs.ranking import ComparedRun, cautions, differences, ranked
from selfray.runs.reading import read_run
from selfray.runs.spool import SpoolWriter
from selfray.storage import Location

SOURCE_ROOT = Path(ranking.__file__).parents[2]
NOWHERE = f"http://{DEAD}"


# Runs made small, by the writers that real runs have


def make_run(
    output: Path,
    wanted: Experiment,
    status: Any = "finished",
    knn: float | None = 0.8,
    linear: float | None = 0.9,
    pictures: tuple[str, ...] = ("views", "embedding"),
    **record: Any,
) -> str:
    """A run's folder as `launch` leaves it: its record, its spool and its pictures."""
    folder = Location.of(output) / wanted.run_name
    folder.make_folder()
    run_record.write(folder, wanted, status, **record)
    writer = SpoolWriter(folder / SPOOL, "train-0")
    for step in range(1, 6):
        values = {"loss": 5 / step, "throughput/images_per_second": 100.0 * step}
        writer.metrics(8 * step, values)
    probes = {"probe/knn": knn, "probe/linear": linear, "probe/rankme": 12.5}
    if knn is not None:
        writer.metrics(0, {"probe/knn": 0.3, "probe/linear": 0.4})
        writer.metrics(40, {name: value for name, value in probes.items() if value is not None})
        writer.tags({"probe.knn.protocol": "knn-v1", "probe.linear.protocol": "linear-v1"})
    writer.close()
    for name in pictures:
        place = folder / "artifacts" / "pictures"
        place.make_folder()
        Image.new("RGB", (6, 4), (200, 30, 30)).save(Path(place.path) / f"{name}.png")
    return folder.uri


def temperatures(output: Path, *values: float, **more: Any) -> list[str]:
    """A run of SimCLR for each temperature, kNN rising with it."""
    return [
        make_run(output, with_temperature(value), knn=0.5 + value / 2, **more) for value in values
    ]


def with_temperature(value: float, seed: int = 0) -> Experiment:
    return config.override(experiment(SIMCLR), **{"method.temperature": value, "seed": seed})


def made(name: str, **fields: Any) -> ComparedRun:
    return ComparedRun(name, f"/runs/{name}", **{"status": "finished", **fields})


def probed(name: str, knn: float, linear: float, judged_by: str = "knn") -> ComparedRun:
    curves = {"probe/knn": [(0, 0.1), (8, knn)], "probe/linear": [(0, 0.1), (8, linear)]}
    method = {"knn": "simclr", "linear": "mae"}[judged_by]
    return made(name, curves=curves, judged_by=judged_by, method=method, recipe=method)


class Page(HTMLParser):
    """A page taken apart: elements with their attributes, texts, and what is embedded."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self._open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in self.raw:
            self._open.append(tag)
            self.raw[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == self._open[-1]:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.raw[self._open[-1]][-1] += data
        elif data.strip():
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        """What the charts are drawn from, parsed as strictly as a browser does."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        return json.loads(self.raw["script"][0], parse_constant=refuse)


# Reading


def test_a_run_is_read_whole_from_its_folder(tmp_path: Path) -> None:
    wanted = with_temperature(0.3)
    run = read_run(Location.of(make_run(tmp_path, wanted)))
    assert run.name == wanted.run_name
    assert (run.status, run.method, run.judged_by, run.recipe) == (
        "finished", "simclr", "knn", "test",
    )  # fmt: skip
    assert run.parameters["method.temperature"] == 0.3
    assert run.curves["loss"] == [(8 * step, 5 / step) for step in range(1, 6)]
    assert run.score == 0.8
    assert run.untrained("probe/knn") == 0.3
    assert run.images_seen == 40
    assert run.images_per_second == 300
    assert run.protocols == {"knn": "knn-v1", "linear": "linear-v1"}
    assert set(run.pictures) == {"views", "embedding"}


def test_a_run_without_a_record_is_read_from_its_checkpoint(tmp_path: Path) -> None:
    wanted = experiment(MAE)
    state = start(wanted)
    checkpoint.save(state, wanted, Location.of(tmp_path / "mae"), loss=1.0)
    (run,) = read_runs([str(tmp_path / "mae")])
    assert (run.name, run.method, run.judged_by) == ("mae", "mae", "linear")
    assert run.parameters["method.mask_ratio"] == 0.75
    assert (run.status, run.score, run.images_seen) == ("interrupted", None, None)


def test_a_repeated_step_is_one_point_and_a_value_that_is_not_finite_is_kept_out_of_scores(
    tmp_path: Path,
) -> None:
    folder = make_run(tmp_path, experiment(), knn=None)
    writer = SpoolWriter(Location.of(folder) / SPOOL, "train-1")
    writer.metrics(40, {"loss": 7.0, "probe/knn": math.nan})
    writer.close()
    (run,) = read_runs([folder])
    assert run.curves["loss"][-1] == (40, 7.0)
    assert len(run.curves["loss"]) == 5
    assert run.score is None
    Page(write_page([run], "page")).data  # noqa: B018 - raises where NaN is in it


@pytest.mark.parametrize("status", ["running", "failed"])
def test_a_run_that_did_not_end_well_says_so(tmp_path: Path, status: str) -> None:
    cause: dict[str, Any] = {"failure": "the loss is not finite"} if status == "failed" else {}
    folder = make_run(tmp_path, experiment(), status, knn=None, pictures=(), **cause)
    (run,) = read_runs([folder])
    # Its record says running, and no command holds its lock: its command was killed.
    assert run.status == {"running": "interrupted", "failed": "failed"}[status]
    text = " ".join(Page(write_page([run], "page")).texts)
    assert run.status in text
    assert "None of these runs has pictures" in text
    assert cause.get("failure", "") in text


def test_a_run_whose_lock_is_held_is_running(tmp_path: Path) -> None:
    folder = make_run(tmp_path, experiment(), "running")
    with run_record.alone(Location.of(folder)):
        assert is_training(Location.of(folder))
        assert read_runs([folder])[0].status == "running"
    assert (Path(folder) / LOCK).exists()
    assert read_runs([folder])[0].status == "interrupted"


def test_a_damaged_run_hides_no_other(tmp_path: Path) -> None:
    good, bad = temperatures(tmp_path, 0.1, 0.2)
    (Path(bad) / RUN_FILE).write_text('{"status": "finished", "experiment": 7}')
    (Path(bad) / "artifacts/pictures/views.png").write_bytes(b"no picture")
    runs = {run.folder: run for run in read_runs([str(tmp_path)])}
    assert runs[good].status == "finished"
    assert runs[bad].score == 0.6
    assert runs[bad].note == "its run.json holds no experiment"
    (Path(bad) / RUN_FILE).write_text("{")
    runs = {run.folder: run for run in read_runs([str(tmp_path)])}
    assert runs[bad].score == 0.6
    page = Page(write_page(list(runs.values()), "page"))
    assert any("views.png cannot be read" in text for text in page.texts)


# What a reference names


def test_an_output_folder_names_its_runs_and_a_run_named_twice_is_one(tmp_path: Path) -> None:
    one, two = temperatures(tmp_path / "runs", 0.1, 0.2)
    (tmp_path / "runs/logs").mkdir()
    (tmp_path / "runs/mlflow.db.lock").write_text("")
    runs = read_runs([two, str(tmp_path / "runs"), f"{one}/"])
    assert [run.folder for run in runs] == [two, one]


def write_trials(sweep: Path, trials: Sequence[Mapping[str, Any]]) -> None:
    (sweep / "trials").mkdir(parents=True)
    for number, trial in enumerate(trials):
        (sweep / "trials" / f"{number:04d}.json").write_text(json.dumps(trial))
    (sweep / "outcomes.json").write_text("{}")


def test_a_sweep_is_compared_in_its_own_words_also_after_it_was_moved(tmp_path: Path) -> None:
    one, two = temperatures(tmp_path / "runs", 0.1, 0.2)
    trials = [
        {"label": "temperature 0.1", "seed": 0, "run": one, "failure": None},
        {"label": "temperature 0.2", "seed": 0, "run": two, "failure": None},
        {"label": "temperature 9", "seed": 0, "run": None, "failure": "temperature is too high"},
    ]
    write_trials(tmp_path / "runs/sweeps/sweep-t-1a2b3c4d", trials)
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    runs = ranked(read_runs([str(tmp_path / "elsewhere/sweeps/sweep-t-1a2b3c4d")]))
    titles = ["temperature 0.2, seed 0", "temperature 0.1, seed 0", "temperature 9, seed 0"]
    assert [run.title for run in runs] == titles
    assert (runs[2].status, runs[2].note) == ("failed", "temperature is too high")
    assert list(differences(runs).varied) == ["method.temperature"]
    assert len(read_runs([str(tmp_path / "elsewhere/sweeps")])) == 3


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("nothing", ("nothing", "neither a folder", "--tracking")),
        ("nothing/at/all", ("nothing/at/all does not exist",)),
        ("empty", ("empty holds no run", "give a run's folder")),
        ("sweep", ("no trial of the sweep", "has ended")),
        ("mlruns:/", ("mlruns:/RUN_ID needs the id",)),
        ("mlruns:/0123", ("there is no MLflow run 0123",)),
        ("", ("name of a run is empty",)),
    ],
)
def test_what_names_no_run_is_told_in_one_line(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch, reference: str, parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "sweep/trials").mkdir(parents=True)
    with pytest.raises((ValueError, OSError)) as raised:
        read_runs([reference], store)
    assert len(str(raised.value).splitlines()) == 1
    for part in parts:
        assert part in str(raised.value)


# Order, differences and what must not be compared


def test_runs_judged_by_different_probes_are_ranked_apart(tmp_path: Path) -> None:
    runs = [
        probed("mae", 0.2, 0.99, "linear"),
        probed("low", 0.6, 0.9),
        made("unprobed"),
        made("broken", status="failed"),
        probed("high", 0.7, 0.8),
    ]
    order = ranked(runs)
    assert [run.name for run in order] == ["high", "low", "mae", "unprobed", "broken"]
    assert ranking.featured(order) == [0, 2, 1, 3, 4]
    told = cautions(order)
    assert "kNN ranks simclr; linear ranks mae" in told["judges"]
    assert "Best: high, kNN 70.0%; mae, linear 99.0%." in Page(write_page(runs, "page")).texts[2]


def test_only_chosen_parameters_differ_and_what_a_recipe_sets_stands_apart(tmp_path: Path) -> None:
    more = {"workers": 2, "output": "s3://elsewhere"}
    folders = [
        make_run(tmp_path, with_temperature(0.1)),
        make_run(tmp_path, config.override(with_temperature(0.2), **more)),
        make_run(tmp_path, config.override(experiment(MAE), name="other", batch_size=16)),
    ]
    found = differences(read_runs(folders))
    assert found.varied == {"method.temperature": [0.1, 0.2, None]}
    assert found.of_recipes["batch_size"] == [8, 8, 16]
    assert found.of_recipes["method.mask_ratio"] == [None, None, 0.75]
    assert not {"workers", "output", "name"} & {*found.varied, *found.of_recipes}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method.temperature": 0.7}, "method.temperature differs"),
        ({"batch_size": 4}, "batch_size differs"),
        ({"seed": 1}, None),
        ({"optimizer.base_learning_rate": 0.5}, None),
    ],
)
def test_losses_of_another_quantity_are_not_compared(
    tmp_path: Path, changes: dict[str, Any], named: str | None
) -> None:
    folders = [
        make_run(tmp_path, experiment()),
        make_run(tmp_path, config.override(experiment(), **changes)),
    ]
    told = cautions(read_runs(folders))
    assert (named in told["loss"]) if named else ("loss" not in told)


def test_probes_of_other_images_or_by_another_protocol_are_not_compared(tmp_path: Path) -> None:
    other = config.override(experiment(), **{"data.path": "elsewhere"})
    folders = [make_run(tmp_path, experiment()), make_run(tmp_path, other)]
    assert "data.path differs" in cautions(read_runs(folders))["probes"]
    writer = SpoolWriter(Location.of(folders[0]) / SPOOL, "probes-1")
    writer.tags({"probe.knn.protocol": "knn-v2"})
    writer.close()
    assert "the protocol of the kNN probe" in cautions(read_runs(folders))["probes"]


def test_the_table_has_a_line_for_each_run_and_marks_the_probe_that_judges(tmp_path: Path) -> None:
    runs = ranked(read_runs(temperatures(tmp_path, 0.1, 0.4)))
    head, *lines = ranking.table(runs)
    assert head.split() == [
        "run", "status", "kNN", "linear", "RankMe", "images", "images/s", "method.temperature",
    ]  # fmt: skip
    assert lines[0].split()[2:] == ["finished", "70.0%*", "90.0%", "12.5", "40", "300", "0.4"]
    many = ranking.table([made(f"run-{n}") for n in range(500)])
    assert len(many) == 1 + ranking.MOST_LINES + 1
    assert many[-1] == "... and 460 more"


# The page


HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"'&{{DATA}}"


def test_what_a_run_is_called_is_text_and_never_markup(tmp_path: Path) -> None:
    plain = read_run(Location.of(make_run(tmp_path, experiment())))
    fields = {**vars(plain), "name": HOSTILE, "label": HOSTILE, "note": HOSTILE, "recipe": HOSTILE}
    fields |= {"method": HOSTILE, "folder": HOSTILE, "parameters": {HOSTILE: HOSTILE}}
    fields |= {"curves": {**plain.curves, HOSTILE: [(8, 1.0)]}}
    fields["pictures"] = {HOSTILE: plain.pictures["views"]}
    other = ComparedRun(**{**fields, "parameters": {HOSTILE: 1}})
    page = Page(write_page([plain, ComparedRun(**fields), other], HOSTILE))
    expected = Page(write_page([plain, plain, plain], "title"))
    assert len(page.raw["script"]) == len(expected.raw["script"]) == 2
    assert page.raw["script"][1] == expected.raw["script"][1]
    assert not any("onerror" in attributes for _, attributes in page.elements)
    sources = [image["src"] for image in page.all("img") if "src" in image]
    assert all((source or "").startswith("data:image/") for source in sources)
    assert HOSTILE in {run["title"] for run in page.data["runs"]}
    assert HOSTILE in page.data["varied"]
    assert HOSTILE in page.texts


def test_the_page_has_every_run_its_pictures_and_its_curves_in_one_file(tmp_path: Path) -> None:
    runs = read_runs(temperatures(tmp_path, 0.1, 0.2, 0.3))
    text = write_page(runs, "Which temperature?")
    page = Page(text)
    rows = [attributes for attributes in page.all("tr") if "data-run" in attributes]
    assert len(rows) == 3
    assert "Which temperature?" in page.texts
    assert page.data["varied"] == {"method.temperature": [0.3, 0.2, 0.1]}
    assert page.data["runs"][0]["curves"]["probe/knn"] == [[0, 40], [0.3, 0.65]]
    assert len(page.all("figure")) == 6
    assert all(image["alt"] for image in page.all("img") if "src" in image)
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    # Nothing to load: the one address is a name of a namespace.
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not [
        a for _, a in page.elements if "href" in a or (a.get("src") or "data:")[:5] != "data:"
    ]
    assert "{{" not in re.sub(r"<script.*</script>", "", text, flags=re.DOTALL)


def test_pictures_are_of_the_best_runs_and_the_page_says_so(tmp_path: Path) -> None:
    runs = read_runs(temperatures(tmp_path, 0.1, 0.2, 0.3))
    page = Page(write_page(runs, "page", most_pictures=2))
    assert {figure["data-run"] for figure in page.all("figure")} == {"0", "1"}
    assert any("best 2 of 3 runs" in text for text in page.texts)
    assert not Page(write_page(runs, "page", most_pictures=0)).all("figure")


def test_a_picture_that_is_none_is_said_in_its_place(tmp_path: Path) -> None:
    folder = Path(make_run(tmp_path, experiment()))
    place = folder / "artifacts/pictures"
    huge = b"P6 60000 60000 255 "  # as many pixels as a header can say
    png = (place / "views.png").read_bytes()
    for name, data in {"a": b"", "b": b"no", "c": huge, "d": png[:40], "e": png[:30] * 9}.items():
        (place / f"{name}.png").write_bytes(data)
    page = Page(write_page([read_run(Location.of(folder))], "page"))
    for name in "abcde":
        assert any(f"{name}.png cannot be read" in text for text in page.texts), name
    assert len(page.all("img")) == 3  # two pictures, and the one that is shown large


def with_map(folder: str, points: np.ndarray, labels: np.ndarray) -> None:
    """Beside a run's pictures, what the page draws a map from."""
    place = Path(folder) / "artifacts/pictures"
    images = np.zeros((len(labels), 3, 8, 8), np.uint8)
    images[:, 0] = 20 * labels[:, None, None]
    maps = {"untrained": points[::-1], "after": points}
    (place / "embedding.json").write_text(json.dumps(live_map.as_json(maps, labels, ["a", "b"])))
    live_map.thumbnails(images).save(place / "thumbnails.png")


def test_maps_of_the_same_images_are_turned_onto_each_other(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(30, 2)), np.arange(30) % 3
    turned = points @ np.array([[0.0, 1.0], [1.0, 0.0]]) * 7 + 3  # mirrored, too
    folders = temperatures(tmp_path, 0.1, 0.2)
    for folder, drawn in zip(folders, (points, turned), strict=True):
        with_map(folder, drawn, labels)
    page = Page(write_page(read_runs(folders), "page"))
    one, two = page.data["maps"]["0"], page.data["maps"]["1"]
    np.testing.assert_allclose(one["maps"]["after"], two["maps"]["after"], atol=5e-3)
    assert (one["labels"], one["names"]) == (labels.tolist(), ["a", "b"])
    assert one["sheet"].startswith("data:image/webp;base64,")
    assert (one["across"], one["side"]) == (6, live_map.SIDE)
    # The sheet is no picture of its own.
    assert {option["value"] for option in page.all("option")} == {"views", "embedding"}


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": ["x"]}, {"labels": 7}, {"names": None}, {"maps": []}, {"maps": {}},
        {"maps": {"after": [[0, math.inf]] * 30}}, {"maps": {"after": [[0, 1]]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_map_of_another_shape_is_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    (folder,) = temperatures(tmp_path, 0.1)
    with_map(folder, np.zeros((30, 2)), np.arange(30) % 3)
    place = Path(folder) / "artifacts/pictures"
    assert live_map.read(Location.of(place)) is not None
    found = json.loads((place / "embedding.json").read_text())
    (place / "embedding.json").write_text(json.dumps({**found, **changes}))
    assert live_map.read(Location.of(place)) is None
    assert Page(write_page(read_runs([folder]), "page")).data["maps"] == {}


def test_what_was_set_by_flag_differs_even_between_runs_of_different_recipes() -> None:
    plain = {"epochs": 10, "batch_size": 8, "workers": 1}
    other = {"epochs": 20, "batch_size": 16, "workers": 2}
    runs = [made("one", parameters=plain, recipe="a"), made("two", parameters=other, recipe="b")]
    assert differences(runs).varied == {}
    given = frozenset({"epochs", "workers"})
    runs[1] = made("two", parameters=other, recipe="b", given=given)
    found = differences(runs)
    assert found.varied == {"epochs": [10, 20]}
    assert found.of_recipes == {"batch_size": [8, 16]}


def test_a_run_s_date_duration_encoder_and_page_are_in_the_table(tmp_path: Path) -> None:
    folder = make_run(tmp_path, experiment(), result={"seconds": 3725.0})
    record = {"tracking_uri": "https://me:SECRET@host/ml", "experiment_id": "7", "run_id": "abc"}
    (Path(folder) / "mlflow.json").write_text(json.dumps(record))
    text = write_page(read_runs([folder]), "page")
    page = Page(text)
    assert {"encoder", "epochs", "duration", "started", "1:02:05"} <= set(page.texts)
    assert "SECRET" not in text
    (link,) = page.all("a")
    assert link["href"] == "https://host/ml/#/experiments/7/runs/abc?workflowType=machine_learning"
    for hostile in ("javascript:alert(1)", "data:text/html,x", 'http://x"><script>'):
        (Path(folder) / "mlflow.json").write_text(json.dumps({**record, "tracking_uri": hostile}))
        assert not Page(write_page(read_runs([folder]), "page")).all("a")


def test_a_page_of_many_runs_stays_small() -> None:
    curve = [(step, 1 / step) for step in range(1, 5000)]
    names = [f"health/{n}" for n in range(12)]
    runs = [
        made(f"run-{n}", parameters={"seed": n}, curves=dict.fromkeys(names, curve))
        for n in range(60)
    ]
    assert len(write_page(runs, "page")) < 6e6


def test_a_thinned_curve_keeps_its_ends_and_its_extremes() -> None:
    curve = [(step, math.sin(step / 50)) for step in range(10_000)]
    curve[4321] = (4321, 17.0)
    curve[777] = (777, -3.0)
    curve[5000] = (5000, math.nan)
    found = thinned(curve, 100)
    assert len(found) <= 100
    assert {curve[0], curve[-1], curve[4321], curve[777]} <= set(found)
    assert found == sorted(found)
    assert thinned(curve[:100], 100) == curve[:100]


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG defines it."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_texts_and_lines_stand_out_in_light_and_in_dark() -> None:
    (style,) = Page(write_page([made("run")], "page")).raw["style"]
    light, dark = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    for theme in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", theme))
        pairs = [(name, "page", 3.0) for name in colours if re.fullmatch(r"c\d|rest", name)]
        pairs += [(name, "page", 4.5) for name in ("ink", "muted", "good", "bad", "warn")]
        pairs += [("ink", "panel", 4.5), ("muted", "panel", 4.5), ("warn", "warn-panel", 4.5)]
        for front, back, least in pairs:
            high, low = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= least, (front, back)


def test_every_control_has_a_name() -> None:
    text = write_page([made("run")], "page")
    for control in re.findall(r"<(?:select|input)[^>]*>", text):
        before = text[: text.index(control)]
        assert before.rindex("<label>") > before.rfind("</label>"), control


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node to check scripts with")
def test_the_script_is_well_formed(tmp_path: Path) -> None:
    script = tmp_path / "page.js"
    script.write_text(Page(write_page([made("run")], "page")).raw["script"][1])
    done = subprocess.run(["node", "--check", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# MLflow


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A store with a sweep of two trials and one run beside it: its uri, and run ids and folders
    by name."""
    output = tmp_path_factory.mktemp("tracked") / "runs"
    output.mkdir()
    uri = f"sqlite:///{output}/mlflow.db"
    found = {"uri": uri, "output": str(output)}

    def track(name: str, folder: str, tags: dict[str, str], parent: str | None, **params: str):
        place = Location.of(folder)
        shown = {**config.flatten(json.loads((Path(folder) / RUN_FILE).read_text())["experiment"])}
        params |= {key: str(value) for key, value in shown.items() if value is not None}
        tags = {"run.folder": folder, "method": "simclr", "recipe": "test", **tags}
        tracker = Tracker(uri, "selfray", place.name, place, params, tags, parent, lambda _: None)
        tracker.start()
        assert tracker.finish("FINISHED", seconds=300)
        found[name], found[f"{name}-folder"] = str(tracker.run_id), folder

    sweep = output / "sweeps/sweep-t-1a2b3c4d"
    (sweep / "trials").mkdir(parents=True)
    (sweep / RUN_FILE).write_text('{"experiment": {}}')
    track("sweep", str(sweep), {"sweep.question": "Which?"}, None)
    (sweep / RUN_FILE).unlink()
    for number, value in enumerate((0.1, 0.2)):
        (folder,) = temperatures(output, value)
        track(f"trial-{number}", folder, {}, found["sweep"], **{"sweep.temperature": f"{value}"})
        outcome = {"label": f"temperature {value}", "seed": 0, "run": folder, "failure": None}
        if number == 0:  # the other one is under way
            (sweep / f"trials/{number:04d}.json").write_text(json.dumps(outcome))
    track("alone", make_run(output, with_temperature(0.9)), {}, None)
    return found


@pytest.fixture
def store(tracked: dict[str, str]) -> str:
    return tracked["uri"]


def test_an_experiment_names_its_runs_but_not_the_sweep_s_own(
    tracked: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = read_runs(["selfray"], tracked["uri"])
    expected = {tracked[f"{name}-folder"] for name in ("trial-0", "trial-1", "alone")}
    assert {run.folder for run in runs} == expected


def test_a_run_s_id_names_it_and_a_sweep_s_id_its_trials(tracked: dict[str, str]) -> None:
    (run,) = read_runs([f"mlruns:/{tracked['alone']}"], tracked["uri"])
    assert run.folder == tracked["alone-folder"]
    trials = ranked(read_runs([f"mlruns:/{tracked['sweep']}"], tracked["uri"]))
    assert [run.title for run in trials] == ["temperature 0.2, seed 0", "temperature 0.1, seed 0"]


def test_a_sweep_under_way_shows_the_trials_that_only_mlflow_knows_of(
    tracked: dict[str, str],
) -> None:
    sweep = f"{tracked['output']}/sweeps/sweep-t-1a2b3c4d"
    assert len(read_runs([sweep], tracked["uri"])) == 2
    said: list[str] = []
    assert len(read_runs([sweep], NOWHERE, said.append)) == 1
    assert len(said) == 1
    assert "running trials are not shown" in said[0]


def test_a_run_whose_folder_is_out_of_sight_is_shown_from_mlflow(
    tracked: dict[str, str], tmp_path: Path
) -> None:
    there = read_run(Location.of(tracked["alone-folder"]))
    shutil.move(tracked["alone-folder"], tmp_path / "away")
    try:
        (run,) = read_runs([f"mlruns:/{tracked['alone']}"], tracked["uri"])
    finally:
        shutil.move(tmp_path / "away", tracked["alone-folder"])
    assert "its folder is not visible here" in run.note
    assert (run.status, run.method, run.judged_by) == ("finished", "simclr", "knn")
    assert run.score == there.score
    assert run.curves["loss"] == there.curves["loss"]
    assert not differences([run, there]).varied
    assert not differences([run, there]).of_recipes


def artifact(uri: str, run_id: str, folder: Path) -> str:
    found = MlflowClient(uri).download_artifacts(run_id, "comparison.html", str(folder))
    return Path(found).read_text()


def test_the_page_of_a_sweep_is_an_artifact_of_its_run(
    tracked: dict[str, str], tmp_path: Path
) -> None:
    uri = tracked["uri"]
    for references in (
        [f"{tracked['output']}/sweeps/sweep-t-1a2b3c4d"],
        [tracked["trial-0-folder"], tracked["trial-1-folder"]],
    ):
        told = log_page(" ".join(references), read_runs(references, uri), uri)
        assert "comparison.html of the sweep" in told
        assert artifact(uri, tracked["sweep"], tmp_path) == " ".join(references)
    assert "of the run" in log_page("one", read_runs([tracked["alone-folder"]]), uri)
    assert artifact(uri, tracked["alone"], tmp_path) == "one"


def test_the_page_of_any_other_choice_adds_nothing_to_mlflow(tracked: dict[str, str]) -> None:
    uri, client = tracked["uri"], MlflowClient(tracked["uri"])
    runs = read_runs([tracked["trial-0-folder"], tracked["alone-folder"]])
    experiment_id = client.get_run(tracked["alone"]).info.experiment_id
    before = len(client.search_runs([experiment_id]))
    assert "do not form one sweep" in log_page("page", runs, uri)
    assert len(client.search_runs([experiment_id])) == before


# A stranger's folder


class Listener(BaseHTTPRequestHandler):
    requests: ClassVar[list[str]] = []

    def answer(self) -> None:
        self.requests.append(f"{self.command} {self.path} {self.headers.get('Authorization')}")
        self.send_response(404)
        self.end_headers()

    do_GET = do_POST = do_PUT = do_PATCH = answer  # noqa: N815 - as http.server calls them

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A run's folder that names a server of its own, and the server's address."""
    Listener.requests.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    folder = make_run(tmp_path / "strangers", experiment())
    record = {"tracking_uri": address, "experiment_id": "1", "run_id": "abc"}
    (Path(folder) / "mlflow.json").write_text(json.dumps(record))
    yield folder, address
    server.shutdown()


def test_a_store_that_only_a_run_s_folder_names_is_not_contacted(
    stranger: tuple[str, str],
    typed: Type,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, address = stranger
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "SECRETTOKEN")
    for own in (NOWHERE, None):
        if own is None:
            monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        else:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
        said = typed("compare", folder)
        assert said.code == 0
        assert f"names the MLflow store {address}" in said.lines[-1]
        assert "give --tracking" in said.lines[-1]
    assert Listener.requests == []
    assert "not logged" in typed("compare", folder, "--tracking", address).lines[-1]
    assert Listener.requests  # the user named it


def test_a_sweep_under_way_asks_no_store_that_only_its_folder_names(
    stranger: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = stranger
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    sweep = tmp_path / "sweep"
    trial = {"label": "t 1", "seed": 0, "run": folder, "failure": None}
    write_trials(sweep, [trial])
    (sweep / "outcomes.json").unlink()
    (sweep / "mlflow.json").write_text(json.dumps({"tracking_uri": address, "run_id": "abc"}))
    said: list[str] = []
    assert len(read_runs([str(sweep)], None, said.append)) == 1
    assert address in said[0]
    assert Listener.requests == []


def test_numbers_go_to_no_store_that_only_a_run_s_folder_names(
    stranger: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `selfray probe` and `selfray evaluate` log them."""
    folder, address = stranger
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "SECRETTOKEN")
    written = io.StringIO()

    def log(tracking: str | None) -> bool:
        console = Console(written, None)
        return log_to_run(Location.of(folder), 64, {"probe/knn": 0.5}, {}, tracking, console)

    for own in (NOWHERE, None):
        if own is None:
            monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        else:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
        assert not log(None)
        assert f"names the MLflow store {address}" in written.getvalue().splitlines()[-1]
    assert Listener.requests == []
    assert not log(address)
    assert Listener.requests  # the user named it


@pytest.mark.parametrize("record", ["[]", "{}", '{"tracking_uri": 7}', '{"run_id": null}'])
def test_a_damaged_record_of_mlflow_costs_the_logging_alone(
    stranger: tuple[str, str], record: str
) -> None:
    folder, _ = stranger
    (Path(folder) / "mlflow.json").write_text(record)
    written = io.StringIO()
    console = Console(written, None)
    assert not log_to_run(Location.of(folder), 64, {"probe/knn": 0.5}, {}, None, console)
    assert written.getvalue().startswith("not logged")


ANYTHING: tuple[Any, ...] = (
    None, True, 0, -1, 10**400, 0.5, math.inf, math.nan, "", "text", "\x1b[31m", "caf\udce9",
    [], [[]], {}, {"type": 7}, {"a": {"b": [math.inf]}}, "s3://KEY:SECRET@bucket/x",
)  # fmt: skip


@pytest.mark.parametrize("value", ANYTHING, ids=ascii)
def test_json_of_another_shape_ends_no_comparison(
    typed: Type,  # noqa: F811
    tmp_path: Path,
    value: Any,
) -> None:
    good = make_run(tmp_path / "runs", experiment())
    fields = ("status", "name", "judged_by", "failure", "experiment", "result")
    odd: dict[str, list[Any]] = {
        "run.json": [{**dict.fromkeys(fields, "x"), field: value} for field in fields],
        "mlflow.json": [{"tracking_uri": value, "run_id": value}],
    }
    odd["run.json"] += [value, {"experiment": {"name": value, "method": value, "seed": value}}]
    for name, contents in odd.items():
        for number, content in enumerate(contents):
            bad = tmp_path / f"runs/{name}-{number}"
            (bad / "spool").mkdir(parents=True)
            (bad / "run.json").write_text("{}")
            (bad / name).write_text(json.dumps(content))
            records = [
                {"time": value, "kind": "metrics", "images_seen": 1, "values": {"loss": 1.0}},
                {"time": 1, "kind": "metrics", "images_seen": value, "values": {"loss": 1.0}},
                {"time": 1, "kind": "metrics", "images_seen": 1, "values": value},
                {"time": 1, "kind": "metrics", "images_seen": 1, "values": {"loss": value}},
                {"time": 1, "kind": "tags", "values": value},
                {"time": 1, "kind": value},
                value,
            ]
            lines = "\n".join(map(json.dumps, records))
            (bad / "spool/w.jsonl").write_text(lines + "\n")
    said = typed("compare", tmp_path / "runs", "--no-track", "--json", "numbers.json")
    assert said.code == 0, said.text
    assert "Traceback" not in said.text
    assert "SECRET" not in said.text
    numbers = json.loads(Path("numbers.json").read_text())["runs"]
    assert len(numbers) == 1 + sum(map(len, odd.values()))
    assert [run["score"] for run in numbers if run["folder"] == good] == [0.8]
    page = (tmp_path / "runs/comparison.html").read_text()
    assert "SECRET" not in page
    assert Page(page).data["runs"]


@pytest.mark.parametrize(
    "data",
    [b"\xff\xfe{}", b"{", b"[" * 100_000, b"", b"\0" * 10, b'"text"', b'{"status": "\xe9"}'],
    ids=["not UTF-8", "cut", "deep", "empty", "zeros", "no object", "Latin-1"],
)
def test_a_damaged_record_counts_as_none_and_is_said(tmp_path: Path, data: bytes) -> None:
    folder = Path(make_run(tmp_path, experiment()))
    (folder / "run.json").write_bytes(data)
    with open(folder / "spool/train-0.jsonl", "ab") as file:
        file.write(data + b"\n")
    (run,) = read_runs([str(folder)])
    assert run.score == 0.8
    assert "its run.json is damaged" in run.note
    assert ("1 damaged lines of its spool" in run.note) == bool(data)
    assert run.status == "interrupted"


# The command


def test_the_command_prints_a_table_and_writes_page_and_numbers(
    typed: Type,  # noqa: F811
    tracked: dict[str, str],
) -> None:
    sweep = f"{tracked['output']}/sweeps/sweep-t-1a2b3c4d"
    said = typed("compare", sweep, "--json", "numbers.json", "--tracking", tracked["uri"])
    assert said.code == 0
    assert said.lines[1].split()[:6] == ["1", "temperature", "0.2,", "seed", "0", "finished"]
    assert "method.temperature differs" in said.text
    assert f"page: {sweep}/comparison.html" in said.text
    assert "comparison.html of the sweep sweep-t-1a2b3c4d" in said.lines[-1]
    assert "sweep-t-1a2b3c4d" in Page(Path(sweep, "comparison.html").read_text()).texts
    numbers = json.loads(Path("numbers.json").read_text())
    assert [run["score"] for run in numbers["runs"]] == [0.6, 0.55]
    assert numbers["varied"] == ["method.temperature"]


def test_a_dead_server_costs_one_line_and_the_page_is_written(
    typed: Type,  # noqa: F811
    tmp_path: Path,
    tracked: dict[str, str],
) -> None:
    folders = [tracked["alone-folder"], tracked["trial-0-folder"]]
    said = typed("compare", *folders, "--tracking", NOWHERE)
    assert said.code == 0
    assert said.lines[-1].startswith("not logged: the MLflow store http://127.0.0.1:1 cannot be")
    assert (tmp_path / "comparison.html").exists()
    again = typed("compare", *folders, "--no-track", "--title", "My runs", "--page", "my.html")
    assert again.lines[-1] == f"page: {tmp_path}/my.html"
    assert "My runs" in Page((tmp_path / "my.html").read_text()).texts


def test_another_s_file_is_not_written_over(typed: Type, tmp_path: Path) -> None:  # noqa: F811
    (folder,) = temperatures(tmp_path / "runs", 0.1)
    (tmp_path / "thesis.html").write_text("<p>precious")
    said = typed("compare", folder, "--page", "thesis.html")
    assert_one_line_error(said, "thesis.html exists and is not a page that selfray wrote")
    assert (tmp_path / "thesis.html").read_text() == "<p>precious"
    assert typed("compare", folder, "--no-track").code == 0
    assert typed("compare", folder, "--no-track").code == 0


def test_comparing_nothing_is_told_in_one_line(typed: Type) -> None:  # noqa: F811
    assert_one_line_error(typed("compare"), "nothing to compare: give run folders")
    assert_one_line_error(typed("compare", "x", "--pictures", -1), "--pictures must be at least 0")


def test_runs_are_compared_without_ray_or_torch(tmp_path: Path) -> None:
    temperatures(tmp_path / "runs", 0.1, 0.2)
    script = (
        "import sys\nfrom selfray.commands import main as cli\n"
        "sys.argv = ['selfray', 'compare', 'runs', '--no-track']\nassert cli.main() == 0\n"
        "print([name for name in ('torch', 'ray', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
