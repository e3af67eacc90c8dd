import errno
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from helpers import (
    MAE,
    RESNET,
    SIMCLR,
    VIT,
    differing,
    experiment,
    forge,
    start,
    train_for,
    weights,
)
from selfray import config
from selfray.commands.export import _best_of
from selfray.console import Console
from selfray.experiment import Experiment
from selfray.optim import OptimizerConfig
from selfray.runs import checkpoint
from selfray.runs.checkpoint import (
    MANIFEST,
    Checkpoint,
    all_of,
    latest,
    mark_best,
    retain,
)
from selfray.runs.folder import CHECKPOINTS
from selfray.schedules import Progress
from selfray.storage import Location
from selfray.train import TrainState

FILES = ["encoder.safetensors", "state.safetensors", "state.json", "experiment.json"]
WANTED = experiment(MAE)


@pytest.fixture(scope="module")
def trained() -> TrainState:
    state = start(WANTED)
    train_for(state, WANTED, 1)
    return state


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return Location.of(tmp_path / "run")


def save(state: TrainState, run: Location, step: int = 1, loss: float = 1.0) -> Checkpoint:
    """A checkpoint of these weights that says it is of some step."""
    state.progress = Progress(step * 8, 800, step)
    return checkpoint.save(state, WANTED, run, loss)


def path_of(found: Checkpoint, name: str) -> Path:
    return Path(found.location.path) / name


# Round trips


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("method", [SIMCLR, MAE])
def test_a_state_comes_back_bit_for_bit_with_its_optimizers(method, optimizer, run):
    wanted = experiment(method, optimizer=OptimizerConfig(optimizer, base_learning_rate=0.01))
    state = start(wanted)
    train_for(state, wanted, 2)
    checkpoint.save(state, wanted, run, loss=0.5)

    loaded = start(wanted)
    loaded.load_state_dict(Checkpoint.open(run).state())
    assert differing(weights(loaded), weights(state)) == []
    assert loaded.progress == state.progress
    ours, theirs = loaded.optimizer.state_dict(), state.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys() != set()
    for index, entries in theirs["state"].items():
        assert differing(ours["state"][index], entries) == []


def test_a_checkpoint_says_what_it_is_of(trained, run):
    save(trained, run, step=7, loss=0.25)
    found = Checkpoint.open(run)
    assert (found.step, found.images_seen, found.manifest["loss"]) == (7, 56, 0.25)
    assert found.manifest["method"] == "mae"
    assert found.location.name == "step-00000007"
    assert sorted(found.manifest["files"]) == sorted(FILES)
    assert found.experiment() == WANTED


def test_the_encoder_comes_back_in_eval_mode_with_its_features(trained, run):
    found = save(trained, run)
    images = torch.randn(2, 3, 16, 16)
    expected = trained.method.encoder.eval()(images).cls
    for path in (run, found.location, found.location.uri):
        encoder = Checkpoint.open(path).encoder()
        assert not encoder.training
        assert torch.equal(encoder(images).cls, expected)


def test_a_loss_that_is_not_a_number_does_not_prevent_a_checkpoint(trained, run):
    save(trained, run, loss=float("nan"))
    assert latest(run) is not None


def test_nested_states_of_all_kinds_come_back_as_they_were():
    state = {
        1: (torch.tensor([2**62 + 1]), [None, True, 2, 2.5, "text"]),
        "empty": {},
        "deep": {"a": {"b": torch.zeros(0)}, "c": ()},
    }
    tensors: dict[str, torch.Tensor] = {}
    skeleton = json.loads(json.dumps(checkpoint._split(state, "", tensors)))
    again = checkpoint._join(skeleton, tensors)
    assert again.keys() == state.keys()
    assert again[1][0].tolist() == [2**62 + 1]
    assert again[1][1] == state[1][1]
    assert (again["empty"], again["deep"]["c"]) == ({}, ())
    assert again["deep"]["a"]["b"].shape == (0,)


def test_a_state_of_an_unknown_kind_is_refused_with_its_place():
    with pytest.raises(TypeError, match="/optimizer/extra of the state is a set"):
        checkpoint._split({"optimizer": {"extra": {1}}}, "", {})


# What is not whole is no checkpoint


def test_the_newest_checkpoint_is_the_latest(trained, run):
    for step in (99_999_999, 100_000_000, 20):
        save(trained, run, step)
    found = latest(run)
    assert found is not None
    assert found.step == 100_000_000
    assert [c.step for c in all_of(run)] == [20, 99_999_999, 100_000_000]


def test_a_run_without_checkpoints_has_none(run):
    assert latest(run) is None
    assert all_of(run) == []


def _flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "flipped at its start": lambda path: _flip(path, 0.0),
    "flipped in its middle": lambda path: _flip(path, 0.5),
    "flipped at its end": lambda path: _flip(path, 1.0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_latest_falls_back_to_the_one_before_a_damaged_one(name, damage, trained, run):
    save(trained, run, 1)
    torn = save(trained, run, 2)
    DAMAGE[damage](path_of(torn, name))
    found = latest(run)
    assert found is not None
    assert found.step == 1
    assert Checkpoint.open(run).step == 1


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped at its start"])
def test_latest_falls_back_where_the_manifest_is_torn(damage, trained, run):
    save(trained, run, 1)
    DAMAGE[damage](path_of(save(trained, run, 2), MANIFEST))
    found = latest(run)
    assert found is not None
    assert found.step == 1


def test_no_flipped_bit_of_a_manifest_stops_a_run_or_passes_for_another_step(trained, run):
    save(trained, run, 1)
    manifest = path_of(save(trained, run, 2), MANIFEST)
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= (1, 4, 128)[place % 3]
        manifest.write_bytes(data)
        found = latest(run)
        assert found is not None, place
        assert found.location.name == f"step-{found.step:08d}", place
        assert found.step in (1, 2), place


def test_a_checkpoint_that_is_all_torn_gives_none(trained, run):
    DAMAGE["truncated"](path_of(save(trained, run), "state.json"))
    assert latest(run) is None


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_opening_a_damaged_checkpoint_says_which_file_and_what_to_do(name, trained, run):
    found = save(trained, run)
    DAMAGE["flipped in its middle"](path_of(found, name))
    with pytest.raises(ValueError, match=rf"step-00000001/{name} is damaged.*earlier checkpoint"):
        Checkpoint.open(found.location).state()


def test_opening_a_checkpoint_that_lacks_a_file_says_which(trained, run):
    found = save(trained, run)
    path_of(found, "state.safetensors").unlink()
    with pytest.raises(ValueError, match=r"state\.safetensors is missing from the checkpoint"):
        Checkpoint.open(found.location).state()


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"there is no checkpoint at {tmp_path}/gone"):
        Checkpoint.open(str(tmp_path / "gone"))


def test_a_folder_that_is_no_checkpoint_is_named_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"is not a checkpoint: it has no MANIFEST.json.*step-\*"):
        Checkpoint.open(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": "something"}', "is not the manifest of a checkpoint"),
        (b"[1, 2]", "is not the manifest of a checkpoint"),
        (b"{", "is not the manifest of a checkpoint"),
        (b"\xff\xfe\xfa", "is not the manifest of a checkpoint"),
        (b'{"format": "selfray-checkpoint", "version": 1}', "is not the manifest of a checkpoint"),
        (
            b'{"format": "selfray-checkpoint", "version": 2}',
            "written by a newer version of selfray",
        ),
    ],
)
def test_a_manifest_of_something_else_is_refused(content, message, trained, run):
    found = save(trained, run)
    (found.location / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Checkpoint.open(found.location)


def test_folders_of_other_names_are_passed_over(trained, run):
    found = save(trained, run)
    for name in ("step-2", "step-00000009.old", "best"):
        shutil.copytree(found.location.path, f"{run.path}/{CHECKPOINTS}/{name}")
    assert [c.step for c in all_of(run)] == [1]


def test_a_torn_checkpoint_of_the_same_step_is_written_anew(trained, run):
    torn = save(trained, run)
    DAMAGE["missing"](path_of(torn, MANIFEST))
    path_of(torn, "left over").write_bytes(b"x")
    save(trained, run)
    assert latest(run) is not None
    assert sorted(os.listdir(torn.location.path)) == sorted([*FILES, MANIFEST])


# Full disks and crashes


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file of this process may become larger than this: a write beyond it fails, for real."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def largest_file(run: Location) -> int:
    """Bytes of state.safetensors, which holds the encoder's weights and more."""
    found = latest(run)
    assert found is not None
    return found.manifest["files"]["state.safetensors"]["bytes"]


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999], ids=["encoder", "state", "last bytes"])
def test_a_full_disk_leaves_nothing_of_a_checkpoint_and_the_earlier_ones_whole(share, trained, run):
    save(trained, run, 1)
    with disk_of(int(largest_file(run) * share)), pytest.raises(OSError, match="too large"):
        save(trained, run, 2)
    assert os.listdir(f"{run.path}/{CHECKPOINTS}") == ["step-00000001"]
    found = latest(run)
    assert found is not None
    assert found.step == 1
    save(trained, run, 2)  # and when there is room again, it goes on
    assert [c.step for c in all_of(run)] == [1, 2]


class Store(LocalFileSystem):
    """A store that takes so many bytes, then fails like a full one, or kills the process."""

    cachable = False

    def __init__(self, room: int, at_the_end: str) -> None:
        super().__init__()
        self.room, self.at_the_end = room, at_the_end

    def _open(self, path, mode="rb", block_size=None, **kwargs):
        return StoreFile(path, mode, fs=self, **kwargs)

    def rm(self, path, recursive=False, maxdepth=None):
        if self.room <= 0 and self.at_the_end == "fails for good":
            raise OSError(errno.EIO, "the store is gone")
        super().rm(path, recursive, maxdepth)


class StoreFile(LocalFileOpener):
    fs: Store
    f: BinaryIO

    def write(self, data):
        room = self.fs.room
        self.fs.room -= len(data)
        if self.fs.room > 0:
            return super().write(data)
        super().write(bytes(data)[: max(0, room)])
        self.f.flush()
        if self.fs.at_the_end == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, "No space left on device")


def store(run: Location, room: int, at_the_end: str = "fails") -> Location:
    """The same folder, seen as an object store."""
    filesystem = PyFileSystem(FSSpecHandler(Store(room, at_the_end)))
    return Location(filesystem, run.path, f"store://{run.path}")


def sizes(run: Location) -> list[int]:
    """How many bytes are written before each file of a checkpoint, and after the last."""
    found = latest(run)
    assert found is not None
    written = [0]
    for entry in found.manifest["files"].values():
        written.append(written[-1] + entry["bytes"])
    return written


@pytest.mark.parametrize("at_the_end", ["fails", "fails for good"])
@pytest.mark.parametrize("file", range(5))
def test_a_full_store_leaves_nothing_that_looks_whole(file, at_the_end, trained, run):
    save(trained, run, 1)
    room = sizes(run)[file] + 60  # in the midst of each file, the manifest being the last
    with pytest.raises(OSError, match="No space left"):
        save(trained, store(run, room, at_the_end), 2)
    found = latest(run)
    assert found is not None
    assert found.step == 1
    assert [c.step for c in all_of(run)] == [1], "it has a manifest, so it looks whole"
    if at_the_end == "fails":
        assert os.listdir(f"{run.path}/{CHECKPOINTS}") == ["step-00000001"]
    save(trained, run, 2)
    assert [c.step for c in all_of(run)] == [1, 2]


def _in_another_process(work: Callable[[], None]) -> int:
    """Its exit code: minus the number of the signal that ended it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize("file", range(5))
def test_a_process_killed_while_it_writes_a_checkpoint_leaves_the_one_before(file, trained, run):
    save(trained, run, 1)
    room = sizes(run)[file] + 60

    def killed_by_itself() -> None:
        save(trained, store(run, room, "kills"), 2)

    assert _in_another_process(killed_by_itself) == -signal.SIGKILL
    assert len(os.listdir(f"{run.path}/{CHECKPOINTS}")) == 2, "it was not killed in the midst"
    assert [c.step for c in all_of(run)] == [1], "it has a manifest, so it looks whole"
    found = latest(run)
    assert found is not None
    assert found.step == 1
    save(trained, run, 2)
    assert [c.step for c in all_of(run)] == [1, 2]


def test_a_process_killed_in_the_midst_of_a_local_file_leaves_the_one_before(trained, run):
    save(trained, run, 1)
    size = largest_file(run) // 2

    def killed_by_the_kernel() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        with disk_of(size):
            save(trained, run, 2)

    assert _in_another_process(killed_by_the_kernel) == -signal.SIGXFSZ
    torn = os.listdir(f"{run.path}/{CHECKPOINTS}/step-00000002")
    assert any(name.endswith(".tmp") for name in torn), "it was not killed in the midst"
    found = latest(run)
    assert found is not None
    assert found.step == 1
    save(trained, run, 2)
    assert latest(run) is not None


# What is kept


def steps_of(run: Location) -> list[int]:
    return [c.step for c in all_of(run)]


def test_the_last_few_the_best_and_the_needed_ones_stay(trained, run):
    for step in range(1, 8):
        save(trained, run, step)
    assert retain(run, keep=2, best_step=3, needed={1, 99}) == [2, 4, 5]
    assert steps_of(run) == [1, 3, 6, 7]
    assert sorted(os.listdir(f"{run.path}/{CHECKPOINTS}")) == [
        f"step-{s:08d}" for s in (1, 3, 6, 7)
    ]


def test_the_best_one_is_exported_unless_another_is_named(trained, run):
    for step in (1, 2, 3):
        save(trained, run, step)
    stream = io.StringIO()
    console = Console(stream, None)
    newest = Checkpoint.open(run)
    assert _best_of(newest, run.uri, console) is newest  # none is marked
    mark_best(run, 2)
    assert _best_of(newest, run.uri, console).step == 2
    said = stream.getvalue()
    assert said.startswith("taking step 2, which has the best probe; to export the last one, give")
    assert _best_of(newest, newest.location.uri, console).step == 3


def test_without_a_best_one_the_last_few_stay(trained, run):
    for step in (1, 2, 3):
        save(trained, run, step)
    assert retain(run, keep=1, best_step=None, needed=set()) == [1, 2]
    assert retain(run, keep=1, best_step=None, needed=set()) == []
    assert steps_of(run) == [3]


def test_a_damaged_checkpoint_does_not_push_out_the_last_whole_one(trained, run):
    save(trained, run, 1)
    DAMAGE["truncated"](path_of(save(trained, run, 2), "state.safetensors"))
    retain(run, keep=1, best_step=None, needed=set())
    found = latest(run)
    assert found is not None
    assert found.step == 1


# Files from strangers


def test_nothing_is_unpickled(trained, run, monkeypatch):
    save(trained, run)

    def refuse(*arguments, **keywords):
        raise AssertionError("something was unpickled")

    for module, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(module, name, refuse)
    found = Checkpoint.open(run)
    start(WANTED).load_state_dict(found.state())
    assert found.encoder() is not None
    assert found.experiment() == WANTED


@pytest.mark.parametrize("kind", ["os:system", "builtins:eval", "subprocess:Popen", "pickle:loads"])
def test_a_checkpoint_can_name_no_code_outside_selfray(kind, trained, run):
    found = save(trained, run)
    value = config.to_json(WANTED)
    value["encoder"] = {"type": kind, "name": "true"}
    forge(found, "experiment.json", json.dumps(value).encode())
    with pytest.raises(ValueError, match="a config may only name types of selfray"):
        Checkpoint.open(run).encoder()


def test_a_config_that_is_no_experiment_is_refused(trained, run):
    forge(save(trained, run), "experiment.json", config.dumps(MAE).encode())
    with pytest.raises(ValueError, match=r"experiment\.json holds no Experiment"):
        Checkpoint.open(run).experiment()


def test_tensors_that_are_none_are_refused_by_the_files_name(trained, run):
    forge(save(trained, run), "encoder.safetensors", b"\x80\x04pickle, perhaps")
    with pytest.raises(ValueError, match=r"encoder\.safetensors is not readable"):
        Checkpoint.open(run).encoder()


@pytest.mark.parametrize(
    "other", [experiment(SIMCLR, RESNET), experiment(MAE, replace(VIT, width=64))]
)
def test_the_encoder_of_another_experiment_is_refused(other: Experiment, trained, run):
    forge(save(trained, run), "experiment.json", config.dumps(other).encode())
    with pytest.raises(ValueError, match=f"these weights are not of encoder {other.encoder.name}"):
        Checkpoint.open(run).encoder()
