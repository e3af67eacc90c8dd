"""The command `selfray`, as a person types it: what it prints, writes and returns."""

import fcntl
import io
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import ray
import safetensors
import timm
import torch
from PIL import Image

from helpers import MAE, RESNET, SIMCLR, VIT, experiment, start, train_for, write
from selfray import config
from selfray.cluster import build, logged_model
from selfray.cluster.tracking import Tracker
from selfray.commands import main, probe, script, shards
from selfray.commands.doctor import exposure
from selfray.commands.flags import BadSetting
from selfray.config import override
from selfray.console import Console
from selfray.data import writer
from selfray.data.data_sets import remember
from selfray.data.shard_set import open_shards
from selfray.experiment import DataConfig, ProbeConfig
from selfray.pixels import codecs
from selfray.probes.features import ProbeResult, embed
from selfray.runs import checkpoint
from selfray.runs.checkpoint import Checkpoint
from selfray.runs.spool import SpoolReader
from selfray.schedules import Ramp
from selfray.storage import Location

SELFRAY = str(Path(sys.executable).with_name("selfray"))
DEAD = "127.0.0.1:1"
"""No server answers here."""


class Said(NamedTuple):
    code: int
    text: str
    """What the console shows."""

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


Type = Callable[..., Said]


@pytest.fixture
def typed(tmp_path, monkeypatch, capfd) -> Type:
    """Runs a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["selfray", *map(str, arguments)])
        capfd.readouterr()
        try:
            # Not standard error: pytest's own sys.stderr passes by the descriptor that the command
            # turns to its log. What a process really shows is tested with `shell`.
            return Said(main.main(), capfd.readouterr().out)
        except SystemExit as end:  # tyro's own: help, or a flag that it does not know
            return Said(int(end.code or 0), "".join(capfd.readouterr()))

    return run


@pytest.fixture
def typed_without_ray(typed, monkeypatch) -> Type:
    """The same, where any attempt to use Ray would be told as an error."""
    if not ray.is_initialized():
        monkeypatch.setenv("RAY_ADDRESS", "nonsense://")
    return typed


@pytest.fixture
def ray_address(ray_session) -> str:
    """The Ray of all fast tests, for commands that join it: quicker than one of their own."""
    return ray.get_runtime_context().gcs_address


def shell(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """The installed command in a process of its own."""
    return subprocess.run(
        [SELFRAY, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def picture(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    file = io.BytesIO()
    pixels = random.Random(seed).randbytes(size[0] * size[1] * 3)
    Image.frombytes("RGB", size, pixels).save(file, "PNG")
    return file.getvalue()


def labelled_pictures(count: int) -> tuple[list[bytes], list[int]]:
    """Images of class 0 are bright on the left, of class 1 on the right: any probe sees that."""
    rng, encoded = np.random.default_rng(0), []
    for index in range(count):
        pixels = rng.integers(0, 60, (16, 16, 3))
        pixels[:, 8 * (index % 2) :][:, :8] += 180
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        encoded.append(file.getvalue())
    return encoded, [index % 2 for index in range(count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """An output folder with labelled data and two tiny runs of two checkpoints each."""
    output = tmp_path_factory.mktemp("trained") / "runs"
    encoded, labels = labelled_pictures(60)
    for part, chosen in (("train", slice(0, 40)), ("test", slice(40, 60))):
        writer.write_arrays(output / "data" / part, encoded[chosen], labels[chosen])
    data = DataConfig(path=str(output / "data"))
    for name, method, encoder in (("mae", MAE, VIT), ("simclr", SIMCLR, RESNET)):
        wanted = experiment(method, encoder, data=data, probe=ProbeConfig(train_limit=100))
        state = start(wanted, steps=2)
        for _ in range(2):
            train_for(state, wanted, 1)
            checkpoint.save(state, wanted, Location.of(output / name), loss=1.0)
    return output


@pytest.fixture
def run_folder(trained, tmp_path) -> Path:
    """A copy of the MAE run that a test may damage."""
    return Path(shutil.copytree(trained / "mae", tmp_path / "runs" / "mae"))


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


# help


def test_help_is_shown_without_importing_torch_ray_timm_or_mlflow():
    script = (
        "import sys\nfrom selfray.commands import main\nsys.argv = ['selfray', '--help']\n"
        "try:\n    main.main()\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'ray', 'timm', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_making_shards_does_not_wait_for_torch(tmp_path):
    script = (
        "import sys\nfrom selfray.commands import main\n"
        "sys.argv = ['selfray', 'shards', 'build', 'a', 'b']\n"
        "assert main.main() == 2\n"
        "print([name for name in ('torch', 'timm', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "",
        "pretrain",
        "tokenizer",
        "sweep",
        "shards",
        "shards build",
        "shards check",
        "shards show",
        "shards dedup",
        "evaluate",
        "embed",
        "export",
        "probe",
        "compare",
        "doctor",
    ],
)
def test_every_help_text_has_an_example_to_type(typed, words):
    said = typed(*words.split(), "--help")
    assert said.code == 0
    assert f"$ selfray {words}" in " ".join(said.text.split())


def test_the_command_alone_shows_its_help(typed):
    said = typed()
    assert said.code == 0
    assert "usage: selfray" in said.text


def test_the_help_names_the_true_limit_of_pixels(typed):
    words = " ".join(typed("shards", "build", "--help").text.replace("│", "").split())
    assert f"(default: {codecs.MAX_PIXELS // 10**6} million)" in words


@pytest.mark.parametrize("method", [SIMCLR, MAE], ids=lambda method: method.name)
def test_every_flag_of_a_recipe_says_what_it_is_in_lines_as_long_as_fit(
    method, monkeypatch, capsys
):
    width = 90
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        script.parse({"recipe": experiment(method)}, ["recipe", "--help"], "", "pretrain")
    said = capsys.readouterr().out
    assert "Weight decay over the run. It applies to the" in said
    lines = [line[2:-2] for line in said.splitlines()]  # without the boxes' sides
    indent = " " * 6
    for line, following in itertools.pairwise(lines):
        if re.match("--[a-z]", line):
            assert re.match(indent + "[^( ]", following), f"{line.strip()} does not say what it is"
        elif line.startswith(indent) and following.startswith(indent) and following.strip():
            words = f"{line.rstrip()} {following.split()[0]}"
            assert len(words) > width - 4, f"broken too early: {line.strip()}"


def test_a_schedules_numbers_are_flags_and_its_kind_is_the_recipes():
    wanted = override(experiment(MAE), **{"optimizer.weight_decay": Ramp(0.0, 0.1)})
    flags = ["--optimizer.weight-decay.end", "0.2", "--method.view.flip", "0.25"]
    changes = {"name": "recipe", "optimizer.weight_decay.end": 0.2, "method.view.flip": 0.25}
    assert script.parse({"recipe": wanted}, ["recipe", *flags], "", "pretrain") == override(
        wanted, **changes
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method.mask-ratio", "1.2"], "mask_ratio must lie in (0, 1), got 1.2"),
        (["--encoder.patch-size", "5"], "patch_size 5 does not divide encoder.image_size"),
        (["--epochs", "0"], "epochs must be positive, got 0"),
        (["--epochs", "ten"], "--epochs: invalid literal"),
        (
            ["--method.mask-ration", "0.5"],
            "is not a flag of pretrain recipe; did you mean --method.",
        ),
        (["--precision", "fp8"], "--precision must be one of float32, tf32, bf16, got fp8"),
    ],
)
def test_an_impossible_value_ends_in_one_line_and_exit_code_2(
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipes = {"recipe": experiment(MAE)}

    def main() -> int:
        script.parse(recipes, ["recipe", *flags], "", "pretrain")
        return 0

    assert script.one_line_errors(main) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_log_folder_that_cannot_be_made_names_the_output_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"--output: .*file/logs cannot be made"):
        script.with_console(tmp_path / "file" / "logs", lambda console: 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "export somewhere --to elsewhere",
            "--to must be one of timm, huggingface, onnx, mlflow, got elsewhere",
        ),
        ("probe", "CHECKPOINT is missing: see selfray probe --help"),
        ("probe run --datta x", "--datta is not a flag of selfray probe; did you mean --data?"),
        ("prob run", "selfray has no prob; did you mean probe?"),
        ("shards bild a b", "selfray shards has no bild; did you mean build?"),
    ],
)
def test_a_wrong_word_is_named_with_the_right_ones(words, message):
    with pytest.raises((BadSetting, ValueError), match=re.escape(message)):
        main.parse(words.split())


# shards: bad input, told without starting Ray


def assert_one_line_error(said: Said, *parts: str) -> None:
    assert said.code == 2, said.text
    assert len(said.lines) == 1, said.text
    assert said.text.startswith("error: ")
    for part in parts:
        assert part in said.text


def test_a_missing_source_is_one_line(typed_without_ray):
    said = typed_without_ray("shards", "build", "nothing", "out")
    assert_one_line_error(said, "nothing does not exist", "give a folder of images")


def test_an_empty_source_is_one_line(typed_without_ray, tmp_path):
    (tmp_path / "empty").mkdir()
    said = typed_without_ray("shards", "build", "empty", "out")
    assert_one_line_error(said, "empty is empty", "holds images")
    assert not (tmp_path / "out").exists()


def test_a_destination_that_holds_something_else_is_left_alone(typed_without_ray, tmp_path):
    write(tmp_path, {"in/a.png": picture(1), "out/thesis.txt": b"precious"})
    said = typed_without_ray("shards", "build", "in", "out")
    assert_one_line_error(said, "holds other files (thesis.txt)", "new folder")
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


def test_a_destination_that_cannot_be_written_is_one_line(typed_without_ray, tmp_path):
    write(tmp_path, {"in/a.png": picture(1), "file": b""})
    said = typed_without_ray("shards", "build", "in", "file/out")
    assert_one_line_error(said, "file/out cannot be")


@pytest.mark.parametrize("flags", [("--shard-mib", 0), ("--max-side", -1), ("--max-pixels", 0)])
def test_a_size_that_makes_no_sense_is_one_line(typed_without_ray, tmp_path, flags):
    write(tmp_path, {"in/a.png": picture(1)})
    said = typed_without_ray("shards", "build", "in", "out", *flags)
    assert_one_line_error(said, "must be positive", f"got {flags[1]}")


def test_checking_a_missing_folder_is_one_line(typed_without_ray):
    assert_one_line_error(typed_without_ray("shards", "check", "nothing"), "nothing does not exist")


def test_checking_a_folder_without_manifest_is_a_problem(typed_without_ray, tmp_path):
    (tmp_path / "other").mkdir()
    said = typed_without_ray("shards", "check", "other")
    assert said.code == 1
    assert "there is no manifest" in said.lines[0]


# shards: what is done


def test_a_build_ends_with_a_summary_and_the_next_command(ray_address, tmp_path):
    names = {f"in/{kind}/{i}.png": picture(i) for i in range(15) for kind in ("cat", "dog")}
    write(tmp_path, {**names, "in/cat/broken.png": b"no image", "in/dog/empty.png": b""})
    done = shell(
        tmp_path, "shards", "build", "in", "out", "--shard-mib", 0.004, RAY_ADDRESS=ray_address
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    understood, *progress = lines[:-8]
    summary, sizes, channels, aspects, duplicates, labels, quarantined, after = lines[-8:]
    assert channels.startswith("channels: 3 (RGB); mean 0.")
    assert aspects == "aspect ratio (min / median / max): 1.25 / 1.25 / 1.25"
    assert duplicates.startswith("duplicates: ")
    assert understood == "32 train images of 2 classes (cat, dog)"
    manifest = build.Manifest.load(tmp_path / "out")
    assert len(manifest.shards) > 5
    # On a slow machine a line every 30 s is added.
    assert 1 <= len(progress) <= 2 * shards.LINES_WITHOUT_TERMINAL
    assert all(re.match(r"\d+ of 32 images  .*images/s .*MB/s .*quarantined", p) for p in progress)
    assert f"out: 30 images in {len(manifest.shards)} shards, " in summary
    assert sizes == "pixels (min / median / max): width 20 / 20 / 20, height 16 / 16 / 16"
    assert labels == "labels: 2 classes of 15 images"
    assert (
        quarantined == f"quarantined: 1 empty, 1 not an image; see {tmp_path}/out/quarantine.jsonl"
    )
    out = f"{tmp_path}/out"
    assert after == (
        f"next: selfray shards show {out}, and selfray pretrain auto --data.path {out}"
    )


def test_a_finished_build_says_that_there_is_nothing_to_do(ray_address, typed, tmp_path):
    write(tmp_path, {f"in/{i}.png": picture(i) for i in range(4)})
    assert typed("shards", "build", "in", "out").code == 0
    said = typed("shards", "build", "in", "out")
    assert said.lines[0] == f"{tmp_path}/out is complete: nothing to do"
    assert "labels: none, so the encoder cannot be probed on these images" in said.lines


def test_a_folder_without_any_image_is_one_line(ray_address, typed, tmp_path):
    write(tmp_path, {"in/notes.txt": b"hello", "in/more.txt": b"world"})
    said = typed("shards", "build", "in", "out")
    assert said.code == 2
    assert said.lines[-1].startswith(f"error: {tmp_path}/in holds no readable image: all 2 files")


def test_check_passes_sound_shards_and_names_a_damaged_one(ray_address, typed, tmp_path):
    encoded, labels = labelled_pictures(8)
    writer.write_arrays(tmp_path / "out", encoded, labels, rows_per_shard=4)
    said = typed("shards", "check", "out", "--deep")
    assert said.code == 0
    assert re.fullmatch(
        rf"{tmp_path}/out: 8 images in 2 shards, [\d.]+ kB: no problems; \d+ s\n", said.text
    )
    flip_a_byte(tmp_path / "out" / "shard-00001.parquet")
    said = typed("shards", "check", "out")
    assert said.code == 1
    assert said.lines[0].startswith(f"problem: {tmp_path}/out/shard-00001.parquet: its sha256")
    assert said.lines[1].startswith(f"{tmp_path}/out: 8 images in 2 shards, ")
    assert ": 1 problem; " in said.lines[1]


# export


def printed_code(said: Said) -> str:
    """The Python lines that an export prints, between two empty lines."""
    return said.text.split("\n\nimport", 1)[1].join(["import", ""]).split("\n\nimages: ")[0]


@pytest.mark.parametrize("name", ["mae", "simclr"])
def test_the_printed_lines_load_the_exported_encoder(typed, trained, tmp_path, name):
    said = typed("export", trained / name, "--to", "timm", "--output", "encoder")
    assert said.code == 0, said.text
    assert said.lines[0].startswith(f"{tmp_path}/encoder: ")
    assert said.lines[1].startswith("verified: timm opens it, also with num_classes=10, and comp")
    scope: dict[str, torch.nn.Module] = {}
    exec(printed_code(said), scope)
    batch = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = Checkpoint.open(trained / name).encoder()(batch).cls
        torch.testing.assert_close(scope["model"](batch), expected, rtol=1e-3, atol=1e-4)
    assert sorted(os.listdir(tmp_path / "encoder")) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path / "runs") == ["logs"]


def test_the_exported_weights_say_where_they_come_from(typed, trained, tmp_path):
    typed("export", trained / "mae", "--to", "timm", "--output", "encoder")
    with safetensors.safe_open(tmp_path / "encoder" / "model.safetensors", "pt") as file:
        header = file.metadata()
    wanted = Checkpoint.open(trained / "mae").experiment()
    assert header["method"] == "mae"
    assert config.loads(header["encoder_config"]) == wanted.encoder
    assert (header["image_size"], header["step"], header["images_seen"]) == ("16", "2", "16")
    assert tuple(json.loads(header["mean"])) == wanted.data.mean
    assert tuple(json.loads(header["std"])) == wanted.data.std
    assert header["selfray_version"]


def test_an_export_keeps_the_classes_of_the_run_s_images(typed, run_folder, tmp_path):
    encoded, labels = labelled_pictures(4)
    writer.write_arrays(tmp_path / "birds", encoded, labels, label_names=("owl", "tit"))
    uri = str(next((tmp_path / "birds").glob("*.parquet")))
    remember(open_shards([uri], uri), Location.of(run_folder))
    said = typed("export", run_folder, "--to", "timm", "--output", "encoder")
    assert said.code == 0, said.text
    timms = json.loads((tmp_path / "encoder" / "config.json").read_text())["pretrained_cfg"]
    assert timms["label_names"] == ["owl", "tit"]
    with safetensors.safe_open(tmp_path / "encoder" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["label_names"]) == ["owl", "tit"]
    model: Any = timm.create_model(f"local-dir:{tmp_path}/encoder", pretrained=True)
    assert model.pretrained_cfg["label_names"] == ["owl", "tit"]


def test_an_export_for_hugging_face_has_a_model_card(typed, trained, tmp_path):
    said = typed("export", trained / "mae", "--to", "huggingface", "--output", "encoder")
    assert said.code == 0, said.text
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "pretrained without labels by mae" in card
    assert f"| images | {trained}/data |" in card
    assert "AutoModel.from_pretrained" in said.text
    assert "AutoModel.from_pretrained('PATH_OF_THIS_FOLDER')" in card


@pytest.mark.parametrize("name", ["mae", "simclr"])
def test_an_export_for_onnx_gives_the_same_features(typed, trained, tmp_path, name):
    import onnxruntime

    said = typed("export", trained / name, "--to", "onnx", "--output", "encoder.onnx")
    assert said.code == 0, said.text
    assert "verified: onnxruntime gives torch's features of 8 images of its own data" in said.text
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    batch = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        expected = Checkpoint.open(trained / name).encoder()(batch)
    found = session.run(None, {"images": batch.numpy()})
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-3, atol=1e-3)


def test_an_export_for_onnx_of_any_size_resizes_positions_as_torch_does(typed, trained, tmp_path):
    import onnxruntime

    words = ("export", trained / "mae", "--to", "onnx", "--any-size", "--output", "e.onnx")
    said = typed(*words)
    assert said.code == 0, said.text
    assert "dynamic batch and size" in said.text
    session = onnxruntime.InferenceSession(tmp_path / "e.onnx")
    encoder = Checkpoint.open(trained / "mae").encoder()
    for shape in ((1, 3, 8, 24), (3, 3, 32, 20)):
        batch = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = encoder(batch)
        found = session.run(None, {"images": batch.numpy()})
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-3, atol=1e-3)


def test_an_export_is_named_after_its_run_and_step(typed, trained, tmp_path):
    first = trained / "mae" / "checkpoints" / "step-00000001"
    assert typed("export", first, "--to", "timm").code == 0
    assert (tmp_path / "mae-step-00000001" / "config.json").exists()


def test_an_existing_folder_is_overwritten_only_with_force(typed, trained, tmp_path):
    file = write(tmp_path, {"e/mine.txt": b"mine"}) / "e" / "mine.txt"
    said = typed("export", trained / "mae", "--to", "timm", "--output", "e")
    assert_one_line_error(said, f"{tmp_path}/e exists", "--force")
    assert file.read_bytes() == b"mine"
    assert typed("export", trained / "mae", "--to", "timm", "--output", "e", "--force").code == 0
    assert sorted(os.listdir(tmp_path / "e")) == ["config.json", "model.safetensors"]


def test_an_output_that_cannot_be_written_is_one_line_and_leaves_nothing(typed, trained, tmp_path):
    write(tmp_path, {"file": b""})
    said = typed("export", trained / "mae", "--to", "timm", "--output", "file/e")
    assert_one_line_error(said, "file/e cannot be written", "--output")
    assert sorted(os.listdir(tmp_path)) == ["file", "runs"]


@pytest.mark.parametrize(
    ("to", "output", "reason"),
    [
        ("timm", "encoder.safetensors", "must be a folder"),
        ("timm", "encoder.onnx", "must be a folder"),
        ("onnx", "encoder", "must be a file .onnx"),
        ("timm", "s3://b/e", "must be local"),
    ],
)
def test_an_output_of_another_kind_is_refused(typed, trained, to, output, reason):
    said = typed("export", trained / "mae", "--to", to, "--output", output)
    assert_one_line_error(said, reason, output)


def test_what_is_no_checkpoint_is_one_line(typed, tmp_path):
    write(tmp_path, {"folder/a.txt": b"", "weights.pth": b"x"})
    assert_one_line_error(typed("export", "nowhere", "--to", "timm"), "there is no checkpoint at")
    for name in ("folder", "weights.pth"):
        said = typed("export", name, "--to", "timm")
        assert_one_line_error(said, f"{name} is not a checkpoint", "give a run's folder")


def test_a_damaged_checkpoint_is_refused_by_the_file_that_is_damaged(typed, run_folder, tmp_path):
    damaged = run_folder / "checkpoints" / "step-00000002"
    flip_a_byte(damaged / "encoder.safetensors")
    said = typed("export", damaged, "--to", "timm", "--output", "e")
    assert_one_line_error(said, "encoder.safetensors is damaged", "earlier checkpoint")
    assert not (tmp_path / "e").exists()


def test_a_run_whose_newest_checkpoint_is_damaged_gives_the_one_before(typed, run_folder):
    flip_a_byte(run_folder / "checkpoints" / "step-00000002" / "encoder.safetensors")
    said = typed("export", run_folder, "--to", "timm")
    assert said.code == 0
    assert "step-00000002 is damaged: using an earlier one, step 1" in said.lines[0]
    assert "step 1" in said.lines[1]


# MLflow


@pytest.fixture(scope="module")
def store(trained) -> tuple[str, str, str]:
    """(a tracking URI, the id of the MLflow run of the MAE run, the id of a stranger's)."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{trained}/mlflow.db"
    run = Location.of(trained / "mae")
    tracker = Tracker(uri, "selfray", "mae", run, {}, {"run.folder": run.uri}, say=lambda _: None)
    tracker.start()
    assert tracker.finish("FAILED", seconds=120)
    assert tracker.run_id is not None
    client = MlflowClient(tracking_uri=uri)
    stranger = client.create_run(client.create_experiment("other"))
    return uri, tracker.run_id, stranger.info.run_id


def test_an_mlflow_run_is_exported_from_its_folder(typed, store, tmp_path):
    uri, run_id, _ = store
    said = typed("export", f"mlruns:/{run_id}", "--to", "timm", "--tracking", uri)
    assert said.code == 0, said.text
    assert (tmp_path / "mae-step-00000002").is_dir()


def test_a_logged_model_gives_the_probes_features_and_is_registered_once(
    typed, trained, store, monkeypatch
):
    import mlflow
    from mlflow import MlflowClient

    uri, run_id, _ = store
    words = ("--to", "mlflow", "--tracking", uri, "--register", "horses")
    for _ in range(2):
        said = typed("export", trained / "mae", *words)
        assert said.code == 0, said.text
        assert said.lines[-1] == "registered as horses, version 1"
    client = MlflowClient(tracking_uri=uri)
    (logged,) = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    assert logged.source_run_id == run_id
    assert f"models:/{logged.model_id}" in said.lines[-2]

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    names = (f"models:/{logged.model_id}", "models:/horses/1")
    model, registered = (mlflow.pyfunc.load_model(name) for name in names)
    signature = model.metadata.signature
    assert signature is not None
    assert signature.inputs.inputs[0].shape == (-1, 3, 16, 16)
    encoder = Checkpoint.open(f"{trained}/mae").encoder()
    views = np.random.default_rng(1).integers(0, 256, (1, 3, 16, 16), np.uint8)
    data = Checkpoint.open(f"{trained}/mae").experiment().data
    ours = embed(encoder, views, data.mean, data.std)
    for loaded in (model, registered):
        theirs = loaded.predict(views.astype(np.float32) / 255)
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_be_logged_is_one_line_after_a_run_that_ended_well(
    trained, store, monkeypatch
):
    uri, _, _ = store

    def fail(*_):
        raise TypeError("an operator that torch cannot export")

    monkeypatch.setattr(logged_model, "_log", fail)
    monkeypatch.setattr(logged_model, "MODEL", "no model was logged yet")
    written = io.StringIO()
    console = Console(written, None)
    assert not logged_model.log_encoder(Location.of(trained / "mae"), console, uri)
    assert written.getvalue() == (
        "the encoder is not logged to MLflow: an operator that torch cannot export\n"
    )


def test_a_registry_is_for_mlflow_alone(typed, trained):
    said = typed("export", trained / "mae", "--to", "timm", "--register", "horses")
    assert_one_line_error(said, "--register needs --to mlflow")


def test_an_mlflow_run_that_leads_nowhere_is_one_line(typed, store, trained):
    uri, run_id, stranger = store

    def export(reference: str, uri: str) -> Said:
        return typed("export", reference, "--to", "timm", "--tracking", uri)

    assert_one_line_error(export("mlruns:/abc", uri), "no MLflow run abc", "--tracking")
    assert_one_line_error(export(f"mlruns:/{stranger}", uri), "no tag run.folder")
    assert_one_line_error(export("mlruns:/", uri), "needs the id of a run")
    dead = export(f"mlruns:/{run_id}", f"http://{DEAD}")
    assert_one_line_error(dead, f"MLflow store http://{DEAD} cannot be used", "start or repair it")
    Path("junk.db").write_text("junk")
    broken = export(f"mlruns:/{run_id}", "sqlite:///junk.db")
    assert_one_line_error(broken, "cannot be used", "file is not a database")
    missing = export(f"mlruns:/{run_id}", "sqlite:///nothing.db")
    assert_one_line_error(missing, "no MLflow store at", "nothing.db")
    assert not Path("nothing.db").exists()


# probe


def test_unlabelled_data_cannot_be_probed(typed_without_ray, trained, tmp_path):
    writer.write_arrays(tmp_path / "plain", [picture(i) for i in range(4)])
    said = typed_without_ray("probe", trained / "mae", "--data", tmp_path / "plain")
    assert_one_line_error(said, f"{tmp_path}/plain has no labels", "--data", "class folders")
    said = typed_without_ray("probe", trained / "mae", "--test", tmp_path / "plain")
    assert_one_line_error(said, f"{tmp_path}/plain has no labels")


def test_train_and_test_images_of_other_classes_cannot_be_compared(
    typed_without_ray, trained, tmp_path
):
    encoded, labels = labelled_pictures(8)
    for name, classes in (("a", ["cat", "dog"]), ("b", ["lion", "wolf"])):
        writer.write_arrays(tmp_path / name, encoded, labels, label_names=classes)
    flags = ("--data", tmp_path / "a", "--test", tmp_path / "b")
    said = typed_without_ray("probe", trained / "mae", *flags)
    assert_one_line_error(said, "no class of the test images", "(cat, dog)")


def test_missing_data_is_told_by_the_flag_of_this_command(typed_without_ray, trained):
    said = typed_without_ray("probe", trained / "mae", "--data", "nothing")
    assert_one_line_error(said, "--data nothing does not exist")
    said = typed_without_ray("probe", trained / "mae", "--train-limit", 0)
    assert_one_line_error(said, "--train-limit must be positive, got 0")


def test_more_gpus_than_the_cluster_has_are_refused(ray_address, typed, trained):
    said = typed("probe", trained / "mae", "--device-gpus", 99)
    assert said.code == 2
    assert said.lines[-1].startswith("error: --device-gpus must be between 0 and")
    assert "give less" in said.lines[-1]


def test_a_probe_prints_a_table_and_logs_to_the_run_of_the_checkpoint(
    ray_address, trained, store, tmp_path
):
    uri, run_id, _ = store
    done = shell(tmp_path, "probe", trained / "mae", "--json", "p.json", RAY_ADDRESS=ray_address)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    understood, *lines = done.stdout.splitlines()
    assert understood == "40 train images of 2 classes (0, 1), 20 test images from test/"
    # Before the table, a slow machine says every 30 s how far it is.
    lines = lines[lines.index("mae-step-00000002: mae, vit_tiny_patch16_224 at 16 x 16") :]
    assert lines[1] == f"40 train and 20 test images of {trained}/data"
    assert re.fullmatch(r" +kNN  linear  RankMe  seconds", lines[3])
    rows = [
        re.fullmatch(r"(.*?) +([\d.]+)% +([\d.]+)% +[\d.]+ +[\d.]+", line) for line in lines[4:7]
    ]
    found = {row[1]: (float(row[2]), float(row[3])) for row in rows if row}
    assert list(found) == ["step 2", "untrained encoder", "raw pixels at 16 x 16"]
    assert found["raw pixels at 16 x 16"] == (100.0, 100.0)
    assert lines[8].startswith("knn-v1 (k 20")
    assert lines[9].startswith("linear-v1 (")
    assert lines[10].startswith("labelfree-v2 (")
    assert len(lines) == 14

    written = json.loads((tmp_path / "p.json").read_text())
    assert written["step"] == 2
    results = written["results"]
    assert list(results) == ["checkpoint", "untrained", "pixels"]
    assert round(100 * results["checkpoint"]["knn"], 1) == found["step 2"][0]

    from mlflow import MlflowClient

    run = MlflowClient(tracking_uri=uri).get_run(run_id)
    figures = ("knn", "linear", "rankme", "uniformity", "alignment")
    places = {"probe/": "checkpoint", "probe/untrained/": "untrained", "probe/pixels/": "pixels"}
    assert run.data.metrics == {
        prefix + figure: pytest.approx(results[key][figure])
        for prefix, key in places.items()
        for figure in figures
        if (key, figure) != ("pixels", "alignment")  # pixels are not encoded, so neither are crops
    }
    assert results["checkpoint"]["rankme"] >= 1
    assert run.data.tags["probe.knn.protocol"] == lines[8]
    assert run.info.status == "FAILED", "a number that is logged later does not change the outcome"


def test_numbers_of_other_data_do_not_continue_the_curve_of_the_run(
    ray_address, typed, trained, store, tmp_path
):
    encoded, labels = labelled_pictures(30)
    writer.write_arrays(tmp_path / "clinic", encoded, labels)
    said = typed(
        "probe", trained / "mae", "--data", tmp_path / "clinic", "--no-baselines",
        "--tracking", store[0],
    )  # fmt: skip
    assert said.code == 0, said.text
    assert said.lines[0] == "30 train images of 2 classes (0, 1)"
    assert any("24 train and 6 test images" in line for line in said.lines)
    assert said.lines[-2].startswith("logged as probe/clinic/knn, probe/clinic/linear, probe/clin")


def kept_in(run_folder: Path) -> list[dict[str, float]]:
    """The metrics of a run folder's spool, in order."""
    records, _ = SpoolReader(Location.of(run_folder) / "spool").read({})
    return [record["values"] for record in records if record["kind"] == "metrics"]


def logged(run: Path, tracking: str | None = None) -> str:
    """The last line of what the console shows where numbers of a run's checkpoint are logged."""
    found = ProbeResult(0.5, 0.6, 40, 20, {"knn": "knn-v1", "linear": "linear-v1"}, rankme=3.0)
    judged = [probe.Judged("checkpoint", "step 2", found, 1.0)]
    text = io.StringIO()
    probe._track(judged, "probe/", Checkpoint.open(str(run)), tracking, Console(text, None))
    return text.getvalue().splitlines()[-1]


def test_numbers_wait_in_the_run_folder_where_mlflow_does_not_answer(store, run_folder):
    told = logged(run_folder, f"http://{DEAD}")
    assert told.startswith(f"not logged, but kept in {run_folder}/spool: the MLflow")
    assert "(Connection refused)" in told.replace("[Errno 111] ", "")
    assert kept_in(run_folder)[-1] == {"probe/knn": 0.5, "probe/linear": 0.6, "probe/rankme": 3.0}


def test_a_run_that_still_trains_sends_the_numbers_by_itself(store, run_folder):
    before = (run_folder / "shipped.json").read_bytes()
    with open(run_folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = logged(run_folder)
    assert told.startswith("the run is still training: it sends these numbers")
    assert "probe/knn" in kept_in(run_folder)[-1]
    assert (run_folder / "shipped.json").read_bytes() == before


def test_nothing_is_logged_for_a_checkpoint_that_no_mlflow_run_made(trained):
    told = logged(trained / "simclr")
    assert told == "not logged: no MLflow run belongs to this checkpoint"
    assert not (trained / "simclr" / "spool").exists()


# evaluate and embed


def test_an_evaluation_makes_one_table_of_several_encoders_and_repeats_nothing(
    ray_address, typed, trained, store, tmp_path
):
    uri, run_id, _ = store
    typed("export", trained / "simclr", "--to", "timm", "--output", "taken-home")
    command = ("evaluate", trained / "mae", "untrained", "taken-home/model.safetensors")
    command = (*command, "--labels", 4, "--json", "e.json", "--pictures", "shown")
    said = typed(*command, "--tracking", uri)
    assert said.code == 0, said.text
    name = trained.parent.name
    assert f"{name}: 40 train and 20 test images, 2 classes" in said.lines
    # A wide table is printed in blocks.
    heads = [head for line in said.lines if line.startswith("  ") for head in line.split()]
    assert heads == ["knn", "linear", "logistic", "retrieval", "mAP", "labels-4", "seconds"]
    written = json.loads((tmp_path / "e.json").read_text())["data"][0]
    assert written["classes"] == ["0", "1"]
    assert list(written["encoders"]) == ["mae", "untrained", "model.safetensors"]
    for found in written["encoders"].values():
        knn = found["protocols"]["knn"]
        assert knn["low"] <= knn["value"] <= knn["high"]
        assert knn["protocol"].startswith("knn-v2 (ks (10, 20, 100, 200)")
    from mlflow import MlflowClient

    run = MlflowClient(tracking_uri=uri).get_run(run_id)
    value = written["encoders"]["mae"]["protocols"]["logistic"]["value"]
    assert run.data.metrics[f"eval/{name}/logistic"] == pytest.approx(value)
    assert f"eval/{name}/retrieval/recall_at_5" in run.data.metrics
    assert run.data.tags[f"eval.{name}.knn.protocol"].startswith("knn-v2 (")

    features = sorted((trained / "mae" / "features").glob("*/part-*"))
    times = [file.stat().st_mtime_ns for file in features]
    again = typed(*command, "--no-track")
    assert again.code == 0, again.text
    assert [file.stat().st_mtime_ns for file in features] == times
    repeated = json.loads((tmp_path / "e.json").read_text())["data"][0]
    for title, found in written["encoders"].items():
        assert repeated["encoders"][title]["protocols"] == found["protocols"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("untrained",), "name a run as well"),
        (("timm:no_such_model",), "timm has no model no_such_model"),
        (("nowhere.safetensors",), "there is no file"),
        (("RUN", "--image-size", 18), "--image-size 18 is not a multiple of the 4 pixels"),
        (("RUN", "--shares", 2), "--shares must lie in (0, 1), got 2.0"),
        (("RUN", "RUN"), "is named twice"),
        (("RUN", "--data", "a", "--data", "b", "--test", "c"), "--test takes one --data"),
    ],
)
def test_an_evaluation_that_cannot_be_is_one_line(typed_without_ray, trained, arguments, reason):
    words = [trained / "mae" if word == "RUN" else word for word in arguments]
    assert_one_line_error(typed_without_ray("evaluate", *words), reason)


def test_embeddings_are_the_same_bytes_after_an_interruption(
    ray_address, typed, trained, tmp_path, monkeypatch
):
    import pyarrow.parquet as pq

    from selfray.commands import embed

    monkeypatch.setattr(embed, "BLOCK", 16)
    command = ("embed", trained / "mae", "--data", trained / "data", "--to")
    said = typed(*command, "one")
    assert said.code == 0, said.text
    assert said.lines[-1] == f"{tmp_path}/one: 60 embeddings in 4 files"
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "part-000001.parquet").unlink()
    said = typed(*command, "two")
    assert said.lines[-1] == f"{tmp_path}/two: 60 embeddings in 4 files, 3 of them written earlier"
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    table = pq.read_table(tmp_path / "one")
    assert table.column_names == ["path", "label", "embedding"]
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[32]"
    assert sorted(set(table["label"].to_pylist())) == [0, 1]
    another = typed(*command, "one", "--normalize")
    assert another.code == 2
    assert f"{tmp_path}/one holds embeddings of something else (different contents)" in another.text
    foreign = typed(*command, trained)
    assert foreign.code == 2
    assert f"{trained} is not empty and holds no embeddings" in foreign.text


def test_patch_tokens_are_written_where_they_are_asked_for(ray_address, typed, trained, tmp_path):
    import pyarrow.parquet as pq

    flags = ("--patches", "--normalize", "--dtype", "float16")
    said = typed("embed", trained / "mae", "--data", trained / "data", "--to", "out", *flags)
    assert said.code == 0, said.text
    table = pq.read_table(tmp_path / "out")
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: halffloat>[32]"
    assert table.schema.field("patches").type.list_size == 16 * 32
    lengths = np.linalg.norm(np.array(table["embedding"].to_pylist(), np.float32), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=2e-3)


# doctor


def test_doctor_looks_at_everything_and_starts_ray_by_itself(tmp_path):
    done = shell(tmp_path, "doctor", RAY_ADDRESS="", MLFLOW_TRACKING_URI=f"http://{DEAD}")
    assert done.stderr == ""
    found = {}
    for line in done.stdout.splitlines():
        status, name, text = line.split(maxsplit=2)
        assert status in ("ok", "warn", "fail")
        found[name] = (status, text)
    assert list(found) == [
        "Python",
        "packages",
        "CPUs",
        "memory",
        "disk",
        "S3",
        "GPUs",
        "Ray",
        "MLflow",
    ]
    assert found["Python"][0] == "ok"
    assert found["Ray"][0] in ("ok", "warn")
    assert re.match(r"starts on this machine in [\d.]+ s: \d+ CPUs, 0 GPUs", found["Ray"][1])
    assert found["Ray"][1].endswith("; reachable from this machine alone, with its token")
    assert found["MLflow"][0] == "fail"
    assert "start or repair it" in found["MLflow"][1]
    assert done.returncode == 1


def test_doctor_says_who_can_reach_a_cluster():
    def status_and_text(*asked):
        found = exposure(*asked)
        return found.status, found.text

    local, open_to_all = ["127.0.0.1"], ["10.0.0.3", "10.0.0.4"]
    assert status_and_text(local, True) == (
        "ok",
        "reachable from this machine alone, with its token",
    )
    assert status_and_text(open_to_all, True) == (
        "ok",
        "reachable at 10.0.0.3, 10.0.0.4, with its token",
    )
    for addresses, what in ((local, "every user of this machine"), (open_to_all, "10.0.0.3")):
        status, text = status_and_text(addresses, False)
        assert status == "warn"
        assert what in text
        assert "RAY_AUTH_MODE=token" in text
