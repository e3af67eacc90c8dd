"""Attention and patches of many images: files of blocks, read one at a time."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import experiment, start
from selfray.cluster import segmentation
from selfray.cluster.segmentation import Looking, Seen, _classified, _jaccards, _see
from selfray.commands.evaluate import Evaluate
from selfray.console import Console
from selfray.contract import VIT
from selfray.methods.mae import MAEConfig
from selfray.probes.encoders import EncoderRef
from selfray.probes.logistic import Logistic
from selfray.probes.segmentation import Patches, classes_of, pairs_of
from selfray.runs import checkpoint
from selfray.storage import Location

MAE = MAEConfig(decoder_width=32, decoder_depth=1, decoder_heads=2)


def write(folder: Path, count: int) -> None:
    """Images with a bright square on noise, and their masks."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for number in range(count):
        rng = np.random.default_rng(number)
        pixels, mask = rng.integers(0, 80, (16, 16, 3)), np.zeros((16, 16), np.uint8)
        top, left = rng.integers(0, 3, 2) * 4
        pixels[top : top + 8, left : left + 8] += 150
        mask[top : top + 8, left : left + 8] = 255
        for kind, values in (("images", pixels.astype(np.uint8)), ("masks", mask)):
            file = io.BytesIO()
            Image.fromarray(values).save(file, "PNG")
            (folder / kind / f"{number:03d}.png").write_bytes(file.getvalue())


def seen_by(job: Looking, folder: Location) -> Seen:
    found = [_see((job, folder.uri), block) for block in range(job.blocks)]
    values = sorted({value for each in found for value in each.values})
    keys = np.array([key for each in found for key in each.keys], np.uint64)
    counts = tuple(len(each.keys) for each in found)
    heads, width = found[0].heads, found[0].width
    return Seen(folder, job.size, heads, width, counts, keys, classes_of(values))


def test_blocks_of_images_are_written_once_and_judged_as_all_of_them_at_a_time(
    tmp_path, monkeypatch
):
    write(tmp_path, 20)
    pairs = pairs_of(Location.of(tmp_path / "images"), Location.of(tmp_path / "masks"))
    ref = EncoderRef.untrained(experiment(MAE, VIT))
    found = []
    for size in (7, 100):
        monkeypatch.setattr(segmentation, "BLOCK", size)
        folder = Location.of(tmp_path / f"by-{size}")
        folder.make_folder()
        job = Looking(ref, tuple(pairs), 16)
        seen = seen_by(job, folder)
        assert len(seen.counts) == job.blocks == -(-20 // size)
        overlaps = np.concatenate([_jaccards(seen, block) for block in range(job.blocks)])
        found.append((seen, overlaps, _classified(seen, Patches(), Logistic(iterations=20))))
    (parts, by_head, patches), (whole, by_head_of_all, patches_of_all) = found
    assert parts.keys.tolist() == whole.keys.tolist()
    assert np.array_equal(by_head, by_head_of_all)
    assert patches.scores.shape == (10, 2, 2)
    # The order of the sums differs, so a patch at the border may be of the other class.
    assert np.abs(patches.scores - patches_of_all.scores).max() <= 16
    assert patches.interval.value > 0.8

    for file in (tmp_path / "images").iterdir():
        file.unlink()
    again = _see((job, folder.uri), 0)  # from the file alone
    assert again.keys == whole.keys.tolist()


def test_files_of_blocks_are_known_by_what_they_were_made_of(tmp_path):
    write(tmp_path, 2)
    pairs = tuple(pairs_of(Location.of(tmp_path / "images"), Location.of(tmp_path / "masks")))
    ref = EncoderRef.untrained(experiment(MAE, VIT))
    keys = {Looking(ref, pairs, 16).key(), Looking(ref, pairs, 32).key()}
    keys.add(Looking(EncoderRef.untrained(experiment(MAE, VIT, seed=5)), pairs, 16).key())
    keys.add(Looking(ref, pairs[:1], 16).key())
    with (tmp_path / "masks" / "001.png").open("ab") as file:
        file.write(b"changed")
    keys.add(Looking(ref, pairs, 16).key())
    assert len(keys) == 5


@pytest.mark.long
def test_segmentation_prints_a_table_and_reuses_what_it_saw(tmp_path, ray_session):
    write(tmp_path / "squares", 40)
    wanted = experiment(MAE, VIT)
    state = start(wanted, steps=2)
    checkpoint.save(state, wanted, Location.of(tmp_path / "mae"), loss=1.0)
    squares = tmp_path / "squares"
    command = Evaluate(
        (str(tmp_path / "mae"), "untrained"),
        (f"{squares}/images",),
        masks=f"{squares}/masks",
        by=("segmentation",),
        json=str(tmp_path / "found.json"),
        pictures=str(tmp_path / "pictures"),
        no_track=True,
    )
    said = io.StringIO()
    assert command.run(Console(said, None)) == 0
    assert said.getvalue().startswith("squares: 40 images with masks, 2 classes")
    first = Location.of(tmp_path / "found.json").read_json()
    assert list(first["encoders"]) == ["mae", "untrained"]
    assert first["encoders"]["mae"]["patches"]["value"] > 0.8
    parts = sorted((tmp_path / "mae" / "features").glob("*/part-*"))
    times = [part.stat().st_mtime_ns for part in parts]
    assert len(parts) == 4
    assert command.run(Console(io.StringIO(), None)) == 0
    assert [part.stat().st_mtime_ns for part in parts] == times
    assert Location.of(tmp_path / "found.json").read_json() == first
