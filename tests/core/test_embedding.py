"""Embeddings as files, without Ray: what a task writes and what is read back."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from helpers import RESNET, VIT, experiment
from selfray.data.shard_set import open_shards
from selfray.data.writer import write_arrays
from selfray.models.encoder import encode_uint8
from selfray.pixels.codecs import encode_channels, encode_png
from selfray.probes.embedding import Contents, Embedding, Rows, embedded, part_name
from selfray.probes.encoders import EncoderRef
from selfray.probes.feature_files import FeatureFiles
from selfray.probes.subsets import image_digest
from selfray.storage import Location

MEMMAP = np.memmap


def images(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [encode_png(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(count)]


@pytest.fixture
def rows(tmp_path) -> Rows:
    folder = tmp_path / "shards"
    names = [f"scans/{i}.png" for i in range(10)]
    write_arrays(folder, images(10), [i % 2 for i in range(10)], names, rows_per_shard=4)
    files = sorted(str(file) for file in folder.glob("*.parquet"))
    return Rows.all_of(open_shards(files, str(folder)))


def write(job: Embedding, folder: Location) -> FeatureFiles:
    folder.make_folder()
    for block in range(job.blocks):
        job.write(block, folder)
    return FeatureFiles(folder, job.blocks)


def test_features_labels_and_keys_come_back_in_the_order_of_the_rows(rows, tmp_path):
    ref = EncoderRef.untrained(experiment(encoder=VIT))
    job = Embedding(rows, ref, 16, Contents(key=True, patch_mean=True), block_rows=3)
    files = write(job, Location.of(tmp_path / "out"))
    labels, keys = files.labels_and_keys()
    assert labels.tolist() == [i % 2 for i in range(10)]
    assert keys.tolist() == [image_digest(data) for data in images(10)]
    features = files.features()
    assert features.shape == (10, 64)
    kept = labels == 1
    torch.testing.assert_close(files.features(kept=kept), features[torch.from_numpy(kept)])


def test_raw_pixels_of_multispectral_images_have_all_their_channels(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 13), np.uint8)
    write_arrays(tmp_path / "bands", [encode_channels(image) for image in values])
    files = [str(file) for file in (tmp_path / "bands").glob("*.parquet")]
    rows = Rows.all_of(open_shards(files, str(tmp_path / "bands")))
    job = Embedding(rows, None, 8, Contents(key=True), channels=13)
    found = write(job, Location.of(tmp_path / "out")).features()
    wanted = torch.from_numpy(values.transpose(0, 3, 1, 2).reshape(5, -1)).float() / 255
    torch.testing.assert_close(found, wanted)
    # Features of three channels that earlier versions wrote are still found.
    assert "channels" not in Embedding(rows, None, 8, Contents()).plan()


def test_features_larger_than_memory_are_mapped_from_a_file(rows, tmp_path, monkeypatch):
    job = Embedding(rows, None, 16, Contents(key=True), block_rows=4)
    files = write(job, Location.of(tmp_path / "out"))
    whole = files.features()
    monkeypatch.setattr("selfray.probes.feature_files.IN_MEMORY", 100)
    mapped = []
    monkeypatch.setattr(np, "memmap", lambda *a, **k: mapped.append(k["shape"]) or MEMMAP(*a, **k))
    torch.testing.assert_close(files.features(), whole)
    assert mapped == [(10, 768)]


def test_a_file_holds_paths_and_is_the_same_bytes_every_time(rows, tmp_path):
    ref = EncoderRef.untrained(experiment(encoder=VIT))
    job = Embedding(rows, ref, 16, Contents(path=True, normalize=True), block_rows=4)
    for name in ("one", "two"):
        write(job, Location.of(tmp_path / name))
    for block in range(3):
        one, two = ((tmp_path / name / part_name(block)).read_bytes() for name in ("one", "two"))
        assert one == two
    table = pq.read_table(tmp_path / "one")
    assert table["path"].to_pylist() == [f"scans/{i}.png" for i in range(10)]
    lengths = np.linalg.norm(np.stack(table["embedding"].to_numpy()), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)


def test_the_plan_tells_other_rows_weights_and_settings_apart(rows):
    def key(**changes) -> str:
        given = {"rows": rows, "encoder": EncoderRef.untrained(experiment(encoder=VIT))}
        given |= {"size": 16, "contents": Contents()} | changes
        return Embedding.key(Embedding(**given).plan())

    fewer = Rows(rows.shards, rows.groups[:5], rows.rows[:5])
    other = EncoderRef.untrained(experiment(encoder=VIT, seed=7))
    keys = [key(), key(rows=fewer), key(encoder=other), key(size=32)]
    keys.append(key(contents=Contents(normalize=True)))
    assert len(set(keys)) == 5
    assert key() == keys[0]


def test_columns_are_what_the_encoder_gives():
    torch.manual_seed(0)
    encoder = VIT.build().eval()
    views = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), np.uint8)
    mean, std = (0.5,) * 3, (0.2,) * 3
    wanted = Contents(patch_mean=True, patches=True)
    found = embedded(encoder, views, mean, std, wanted)
    features = encode_uint8(encoder, torch.from_numpy(views), mean, std)
    np.testing.assert_allclose(found["embedding"], features.cls, atol=1e-5)
    np.testing.assert_allclose(found["patch_mean"], features.patches.mean(1), atol=1e-5)
    assert found["patches"].shape == (3, 16 * 32)
    assert found["patches"].dtype == np.float16


def test_a_resnet_has_no_class_tokens_of_earlier_blocks():
    views = np.zeros((1, 3, 16, 16), np.uint8)
    with pytest.raises(ValueError, match="resnet18 has no class tokens of earlier blocks"):
        embedded(RESNET.build(), views, (0.5,) * 3, (0.2,) * 3, Contents(earlier_layers=True))


def test_a_block_of_unreadable_images_is_empty_and_keeps_its_columns(rows, monkeypatch):
    monkeypatch.setattr(
        "selfray.probes.embedding.read_rows",
        lambda shards, groups, inner: ([b"broken"] * len(inner), np.zeros(len(inner), np.int64)),
    )
    ref = EncoderRef.untrained(experiment(encoder=VIT))
    table = Embedding(rows, ref, 16, Contents(patch_mean=True)).table(0)
    assert table.num_rows == 0
    assert table.column_names == ["label", "embedding", "patch_mean"]
