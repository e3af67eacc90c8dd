"""`selfray shards dedup`: which images are alike, which of them stay, and what is written."""

import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_sample_images
from test_data_layouts import build_here, opened

from helpers import SIMCLR, experiment, write
from selfray.cluster.dedup import By, dedup
from selfray.cluster.embedding_tasks import Devices
from selfray.cluster.evaluation import Subject
from selfray.cluster.parallel import Progress
from selfray.data import duplicates
from selfray.data.duplicates import (
    BYTES,
    NEAR,
    NO_LINKS,
    PIXELS,
    Links,
    Printing,
    Prints,
    bands,
    cosine_links,
    decide,
    equal_hashes,
    equal_links,
    groups_of,
    most_bits,
    near_links,
    perceptual_hash,
)
from selfray.data.manifest import BUILD_FOLDER, Manifest
from selfray.data.options import BuildOptions
from selfray.pixels.codecs import decode, encode_jpeg, encode_png
from selfray.probes.encoders import EncoderRef
from selfray.storage import Location

SIDE = 160
MOST = most_bits(0.95)


def photographs() -> list[np.ndarray]:
    """Fifteen different parts of two photographs that come with scikit-learn."""
    parts = [
        image[top : top + SIDE, left : left + SIDE]
        for image in load_sample_images().images
        for top in (0, 200)
        for left in range(0, 640, SIDE)
    ]
    return [part for part in parts if part.mean(2).std() > 5]  # one is of sky alone


def smaller(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def hash_of(image: np.ndarray) -> int:
    found = perceptual_hash(image)
    assert found is not None
    return found


def printed(images: list[tuple[bytes, int, bool]]) -> Prints:
    """The prints of (encoded image, label, whether it is a test image)."""
    printing = Printing()
    for row, (data, label, is_test) in enumerate(images):
        printing.add(f"row {row}", f"{row}.jpg", data, decode(data), label, is_test)
    return printing.result()


def linked(prints: Prints, most: int = MOST) -> np.ndarray:
    equal, firsts = equal_hashes(prints)
    links = [near_links(prints.hashes, firsts, band, most) for band in bands(most)]
    exact = [equal_links(prints.of_bytes), equal_links(prints.of_pixels), equal]
    return groups_of(len(prints), np.concatenate([*exact, *links]))


def same_group(links: Links, count: int) -> set[tuple[int, int]]:
    groups = groups_of(count, links)
    return {(i, j) for i, j in itertools.combinations(range(count), 2) if groups[i] == groups[j]}


# Which images are alike


def test_copies_of_photographs_are_alike_and_different_photographs_are_not():
    images = photographs()
    hashes = [hash_of(image) for image in images]
    between = [(a ^ b).bit_count() for a, b in itertools.combinations(hashes, 2)]
    assert min(between) > most_bits(0.9)
    for image, own in zip(images, hashes, strict=True):
        for copy in (
            decode(encode_jpeg(image, 60)),
            decode(encode_jpeg(smaller(image, 0.5), 85)),
            smaller(image, 0.75),
            np.clip(image.astype(int) + 8, 0, 255).astype(np.uint8),
        ):
            assert (hash_of(copy) ^ own).bit_count() <= MOST


def test_an_image_of_one_colour_is_alike_only_to_its_copies():
    flat = [np.full((20, 20, 3), level, np.uint8) for level in (10, 10, 11)]
    assert [perceptual_hash(image) for image in flat] == [None] * 3
    groups = linked(printed([(encode_png(image), -1, False) for image in flat]))
    assert groups[0] == groups[1] != groups[2]


@pytest.mark.parametrize("most", [0, 3, 6, 10])
def test_the_parts_of_hashes_find_each_pair_that_comparing_all_finds(most):
    rng = np.random.default_rng(most)
    hashes = rng.integers(0, 2**63, 300, np.uint64)
    for row in range(100):  # up to 12 flipped bits
        flips = rng.choice(64, row % 13, replace=False).astype(np.uint64)
        hashes[200 + row] = hashes[row] ^ np.bitwise_or.reduce(
            np.uint64(1) << flips, initial=np.uint64(0)
        )
    chosen = np.arange(300) % 50 != 0
    found = np.concatenate(
        [NO_LINKS, *(near_links(hashes, chosen, band, most) for band in bands(most))]
    )
    near = [
        (i, j)
        for i, j in itertools.combinations(range(300), 2)
        if chosen[i] and chosen[j] and int(hashes[i] ^ hashes[j]).bit_count() <= most
    ]
    assert near
    assert same_group(found, 300) == same_group(np.array(near), 300)
    assert sum(bits for _, bits in bands(most)) == 64


def test_many_equal_images_give_one_link_for_each(monkeypatch):
    monkeypatch.setattr(duplicates, "PAIRS_AT_ONCE", 100)
    monkeypatch.setattr(duplicates, "STRIP", 16)
    hashes = np.full(60, 5, np.uint64)
    links = near_links(hashes, np.ones(60, bool), bands(3)[0], 3)
    assert len(links) == 59
    assert len(set(groups_of(60, links))) == 1


def test_features_of_a_high_cosine_are_linked_within_and_across_tiles():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 16)).astype(np.float32)
    rows[30:] = rows[:10] + 0.01 * rows[10:20]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    tiles = [(rows[:20], 0), (rows[20:], 20)]
    pairs = itertools.combinations_with_replacement(tiles, 2)
    found = np.concatenate([cosine_links(a, b, i, j, 0.95) for (a, i), (b, j) in pairs])
    assert same_group(found, 40) == {(row, row + 30) for row in range(10)}


# Which of them stay


def test_test_images_stay_and_a_labelled_larger_train_image_stays_before_others():
    one, two, three, four = photographs()[:4]
    images = [
        (encode_png(one), 0, False),
        (encode_jpeg(one, 70), 0, True),  # 0 and 2 go, because this is a test image
        (encode_jpeg(smaller(one, 0.5)), 0, False),
        (encode_jpeg(smaller(two, 0.5)), 1, False),
        (encode_png(two), 2, False),  # larger than 3, and of another class
        (encode_png(two), -1, False),  # a copy of 4 without label
        (encode_png(three), 0, True),
        (encode_png(three), 0, True),  # both are test images
        (encode_png(four), 0, False),
    ]
    prints = printed(images)
    decision = decide(prints, linked(prints))
    gone = {removal.row: (removal.stays, removal.kind) for removal in decision.removals}
    assert gone == {0: (1, NEAR), 2: (1, NEAR), 3: (4, NEAR), 5: (4, BYTES)}
    assert (decision.test_in_test, decision.several_classes) == (2, 1)
    # Equal pixels in other bytes.
    again = printed([(encode_png(one), -1, False), (encode_png(one) + b"more", -1, False)])
    assert decide(again, linked(again)).removals[0].kind == PIXELS


def test_who_stays_does_not_depend_on_the_order_of_images():
    images = []
    for row, image in enumerate(photographs()):
        images += [(encode_jpeg(image, 90 - row), row, row % 5 == 0)]
        images += [(encode_jpeg(smaller(image, f)), row, False) for f in (0.5, 0.5, 1)[: row % 4]]
    mixed = [images[place] for place in np.random.default_rng(0).permutation(len(images))]
    kept = []
    for chosen in (images, mixed):
        prints = printed(chosen)
        gone = {removal.row for removal in decide(prints, linked(prints)).removals}
        assert gone
        assert not prints.is_test[list(gone)].any()
        kept.append(sorted(c for row, c in enumerate(chosen) if row not in gone))
    assert kept[0] == kept[1]


def test_prints_are_the_same_from_their_file():
    prints = printed([(encode_png(image), 3, True) for image in photographs()[:3]])
    again = Prints.unpacked(prints.packed())
    assert (again.names, again.paths) == (prints.names, prints.paths)
    assert np.array_equal(again.hashes, prints.hashes)
    assert np.array_equal(again.is_test, prints.is_test)


# By Ray


@pytest.fixture
def shards(tmp_path) -> Path:
    """Shards of photographs with copies, some of them of test images."""
    images = photographs()
    files = {f"in/train/{'ab'[i % 2]}/{i}.png": encode_png(image) for i, image in enumerate(images)}
    files |= {f"in/train/a/half-{i}.jpg": encode_jpeg(smaller(images[i], 0.5)) for i in (2, 4)}
    files |= {f"in/test/b/{i}.jpg": encode_jpeg(images[i], 80) for i in (1, 4)}
    write(tmp_path, files)
    source, built = Location.of(tmp_path / "in"), Location.of(tmp_path / "shards")
    build_here(source, built, BuildOptions(shard_bytes=150_000))
    return tmp_path / "shards"


def test_shards_without_duplicates_are_written_named_and_shown(ray_session, shards, tmp_path):
    manifest = dedup(shards, tmp_path / "once")
    found = [json.loads(line) for line in (tmp_path / "once/duplicates.jsonl").open()]
    assert {(f["removed"], f["stays"], f["stays_in"], f["alike_by"]) for f in found} == {
        ("train/b/1.png", "test/b/1.jpg", "test", "near"),
        ("train/a/4.png", "test/b/4.jpg", "test", "near"),
        ("train/a/half-4.jpg", "test/b/4.jpg", "test", "near"),
        ("train/a/half-2.jpg", "train/a/2.png", "train", "near"),
    }
    assert all(61 <= f["equal_bits"] <= 64 for f in found)
    assert (tmp_path / "once/duplicates.html").exists()
    assert manifest == Manifest.load(tmp_path / "once")
    assert manifest.images == 15
    done = manifest.dedup
    assert done is not None
    assert (done["images_before"], done["removed"], done["removed_as_alike_to_test"]) == (19, 4, 3)
    said: list[str] = []
    opened(tmp_path / "once", tmp_path / "runs", said)
    assert said == ["13 train images of 2 classes (a, b), 2 test images from test"]
    # Again: there is nothing to do, and another similarity is refused.
    heard: list[str] = []
    assert dedup(shards, tmp_path / "once", on_progress=lambda p: heard.append(p.note)) == manifest
    assert heard == [f"{tmp_path}/once is complete: nothing to do"]
    with pytest.raises(ValueError, match="holds a complete build of something else"):
        dedup(shards, tmp_path / "once", similarity=0.9)


def test_an_interrupted_dedup_goes_on_and_gives_the_same_shards(ray_session, shards, tmp_path):
    whole = dedup(shards, tmp_path / "whole")

    def interrupt(progress: Progress) -> None:
        if progress.note.startswith("writing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dedup(shards, tmp_path / "again", on_progress=interrupt)
    prints = list((tmp_path / "again" / BUILD_FOLDER).glob("prints-*.npz"))
    assert prints
    written = [file.stat().st_mtime_ns for file in prints]
    heard: list[str] = []

    def keep(progress: Progress) -> None:
        heard.append(progress.note)
        assert [file.stat().st_mtime_ns for file in prints if file.exists()] == written

    again = dedup(shards, tmp_path / "again", on_progress=keep)
    assert again.shards == whole.shards
    assert not (tmp_path / "again" / BUILD_FOLDER).exists()


@pytest.mark.long
def test_alike_images_are_found_by_an_encoders_features(ray_session, shards, tmp_path):
    encoder = EncoderRef.untrained(experiment(SIMCLR))
    subject = Subject(
        "untrained", encoder, Location.of(tmp_path), encoder.encoder_config.image_size
    )
    manifest = dedup(shards, tmp_path / "once", 0.9999, By(subject, Devices()))
    assert manifest.dedup is not None
    assert manifest.dedup["encoder"] == encoder.digest
    found = [json.loads(line) for line in (tmp_path / "once/duplicates.jsonl").open()]
    assert {"train/b/1.png", "train/a/4.png"} <= {f["removed"] for f in found}
    assert not any(f["removed"].startswith("test/") for f in found)


def test_bad_input_to_dedup_is_one_line(shards, tmp_path):
    with pytest.raises(ValueError, match=r"similarity must lie in \[0.84, 1\] for hashes, got 0.5"):
        dedup(shards, tmp_path / "once", similarity=0.5)
    with pytest.raises(
        FileNotFoundError, match=r"in/manifest\.json does not exist: give a folder in"
    ):
        dedup(tmp_path / "in", tmp_path / "once")
    with pytest.raises(ValueError, match="lies inside the source"):
        dedup(shards, shards / "once")
