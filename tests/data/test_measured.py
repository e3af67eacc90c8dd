"""Deep, multispectral and several-paged files through a build, and what it measures of them."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from helpers import write
from selfray.cluster.build import BuildOptions, Manifest, build, check
from selfray.data.manifest import ShardRecord
from selfray.data.measured import Measured, Measuring, channels_of, kind_of_most, summed
from selfray.data.reader import read_rows
from selfray.data.shard_set import open_shards
from selfray.data.writer import write_arrays
from selfray.pixels.codecs import decode, encode_channels, encode_jpeg, encode_png
from selfray.pixels.deep import ValueCounts


def noise(seed: int, channels: int = 3, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)


def tiff(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="minisblack", **options)
    return file.getvalue()


def deep_png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(file, "PNG")
    return file.getvalue()


def stored(folder: Path, channels: int) -> dict[str, np.ndarray]:
    """The pixels of each image, by its path."""
    uris = [str(folder / shard.name) for shard in Manifest.load(folder).shards]
    shards = open_shards(uris, str(folder), None, None, {})
    found = {}
    for group, rows in enumerate(shards.group_rows):
        images, _ = read_rows(shards, np.full(rows, group), np.arange(rows))
        paths = _paths(uris[0], group)
        found |= {p: decode(d, channels=channels) for p, d in zip(paths, images, strict=True)}
    return found


def _paths(file: str, group: int) -> list[str]:
    import pyarrow.parquet as pq

    column = pq.ParquetFile(file).read_row_group(group, columns=["image"]).column(0)
    return [row["path"] for row in column.to_pylist()]


# By a build


@pytest.mark.usefixtures("ray_session")
def test_pages_windows_and_channels_of_a_folder_are_taken_or_quarantined_by_name(tmp_path):
    ramp = np.linspace(0, 2702, 12 * 16).reshape(12, 16)
    pages = np.stack([ramp * 3, np.full((12, 16), 7.0), ramp]).astype(np.uint16)
    source = write(
        tmp_path / "scans",
        {
            "depth.png": deep_png(ramp),
            "stack.tif": tiff(pages),
            "photo.jpg": encode_jpeg(noise(0)),
            "satellite.tif": tiff(noise(1, 8), planarconfig="contig"),
        },
    )
    manifest = build(source, tmp_path / "out")
    images = stored(tmp_path / "out", 1)
    assert sorted(images) == ["depth.png", "photo.jpg", "stack.tif#page 0", "stack.tif#page 2"]
    for name in ("depth.png", "stack.tif#page 0", "stack.tif#page 2"):
        assert (images[name].min(), images[name].max()) == (0, 255)
    refused = [json.loads(x) for x in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert {entry["file"]: entry["reason"] for entry in refused} == {
        "stack.tif#page 1": "empty window",
        "satellite.tif": "channels",
    }
    found = manifest.statistics
    assert found is not None
    assert dict(found.channels) == {"1": 3, "3": 1}
    assert dict(found.converted) == {
        "uint16 x 1 -> 8 bits, window of percentiles 0.5 99.5": 3,
    }
    assert check(tmp_path / "out", deep=True).ok
    assert build(source, tmp_path / "out") == manifest  # nothing to do

    satellite = build(source, tmp_path / "bands", BuildOptions(channels=8))
    assert np.array_equal(stored(tmp_path / "bands", 8)["satellite.tif"], noise(1, 8))
    assert satellite.statistics is not None
    assert satellite.statistics.kind == 8


@pytest.mark.usefixtures("ray_session")
def test_one_window_for_all_images_keeps_their_differences_and_the_depth(tmp_path):
    dark, bright = np.linspace(0, 1000, 192), np.linspace(1000, 4000, 192)
    files = {
        name: deep_png(values.reshape(12, 16))
        for name, values in (("dark.png", dark), ("bright.png", bright))
    }
    source = write(tmp_path / "scans", files)
    options = BuildOptions(window=(0, 100), window_of="set", keep_depth=True)
    manifest = build(source, tmp_path / "out", options)
    assert manifest.statistics is not None
    assert manifest.statistics.window == (0, 4000)
    images = stored(tmp_path / "out", 1)
    assert abs(int(images["dark.png"].max()) - 255 / 4) <= 1
    assert abs(int(images["bright.png"].min()) - 255 / 4) <= 1
    # A lost shard comes back by the same window.
    shard = tmp_path / "out" / manifest.shards[0].name
    before = shard.read_bytes()
    shard.unlink()
    assert build(source, tmp_path / "out", options) == manifest
    assert shard.read_bytes() == before


@pytest.mark.usefixtures("ray_session")
def test_images_of_train_that_are_in_the_test_are_counted_whatever_their_file(tmp_path):
    same = noise(0)
    files = {
        "train/a.png": encode_png(same),
        "train/b.png": encode_png(noise(1)),
        "train/c.png": encode_png(noise(1)) + b"more",
        "test/d.bmp": encode_png(same),
    }
    manifest = build(write(tmp_path / "set", files), tmp_path / "out")
    assert manifest.statistics is not None
    assert (manifest.statistics.duplicates, manifest.statistics.of_test) == (2, 1)


# Without Ray


def test_mean_and_deviation_are_those_of_all_values_each_image_weighing_the_same(tmp_path):
    images = [noise(0), noise(1, size=(40, 8)) // 2, noise(2) // 3 + 100]
    manifest = write_arrays(tmp_path / "out", [encode_png(image) for image in images])
    found = manifest.statistics
    assert found is not None
    assert Manifest.load(tmp_path / "out") == manifest
    scaled = [image.reshape(-1, 3) / 255 for image in images]
    mean = np.mean([s.mean(0) for s in scaled], axis=0)
    std = np.sqrt(np.mean([(s**2).mean(0) for s in scaled], axis=0) - mean**2)
    wanted = found.normalization(3)
    assert wanted is not None
    assert np.allclose(wanted, [mean, std], atol=1e-5)
    gray = found.normalization(1)
    assert gray is not None
    assert abs(gray[0][0] - mean @ [0.299, 0.587, 0.114]) < 0.01
    assert found.normalization(13) is None
    assert found.aspect_ratio == (0.2, 1.33, 1.33)
    assert found.kind == 3


def test_gray_in_three_channels_is_gray_and_one_pixel_of_colour_is_not():
    gray = np.repeat(noise(0, 1, (33, 40)), 3, axis=2)
    assert channels_of(gray) == 1
    gray[17, 23, 2] ^= 1
    assert channels_of(gray) == 3
    assert channels_of(noise(0, 13)) == 13
    assert kind_of_most({"1": 3, "3": 2, "8": 4}) == 3
    assert kind_of_most({"1": 3, "8": 3}) == 1
    assert kind_of_most({"1": 3, "8": 4}) == 8


def test_shards_add_up_to_the_same_statistics_whoever_measured_them():
    images = [noise(seed, 5) for seed in range(6)]

    def measured(some: list[np.ndarray]) -> Measured:
        measuring = Measuring()
        for image in some:
            measuring.add(image, 5, "float32 x 5")
        return Measured.from_json(json.loads(json.dumps(dataclasses.asdict(measuring.result()))))

    whole = summed([(False, measured(images))])
    parts = summed([(False, measured(images[:2])), (False, measured(images[2:]))])
    assert whole == parts
    assert summed([(False, measured(images)), (True, measured(images[4:]))]).of_test == 2


def test_a_record_with_impossible_measurements_is_no_record(tmp_path):
    measuring = Measuring()
    measuring.add(noise(0), 3)
    good = dataclasses.asdict(measuring.result())
    assert Measured.from_json(dict(good)) == measuring.result()
    for name, value in (("keys", "AAAA"), ("moments", {"x": {}}), ("channels", {"3": 7})):
        with pytest.raises((ValueError, TypeError, KeyError)):
            Measured.from_json(good | {name: value})
    with pytest.raises(KeyError):
        ShardRecord.from_json({"row_groups": [], "quarantined": []})


def test_percentiles_over_images_are_those_of_all_their_values():
    values = np.random.default_rng(0).normal(-300, 700, 30_000).astype(np.float32)
    counts = ValueCounts()
    for part in np.split(values.reshape(300, 100, 1), 3):
        counts.add(part)
    counts.add(noise(0))  # 8 bits need no window
    found = counts.window((0.5, 99.5))
    assert found is not None
    assert np.allclose(found, np.percentile(values, (0.5, 99.5)), rtol=5e-3)
    whole = ValueCounts()
    whole.add(np.arange(-1000, 1001, dtype=np.int16).reshape(1, -1, 1))
    assert whole.window((0, 100)) == (-1000, 1000)
    assert ValueCounts().window((0, 100)) is None


def test_a_build_of_shards_of_deep_images_takes_them_as_they_are():
    deep = (noise(0, 13).astype(np.uint16) * 257).astype(np.uint16)
    assert np.array_equal(decode(encode_channels(deep), channels=13), noise(0, 13))
