from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfray.data.plan import ReadPlan, Share
from selfray.data.shard_set import ShardSet, open_shards
from selfray.data.source import (
    BROKEN,
    LABEL,
    POSITION,
    REASON,
    VIEWS,
    Arrays,
    Sample,
    Segment,
    Source,
    evaluation_views,
)
from selfray.pixels.augment import augment_batch
from selfray.pixels.codecs import BrokenImage, encode_png
from selfray.views import BlockMask, RandomMask, View, Views

ROWS = 24
PLAIN: Views = {"global": (View(size=8, flip=0.0),)}
RANDOM: Views = {
    "global": (View(size=8, crop_scale=(0.2, 1.0), mask=RandomMask(0.5), grid=2),) * 2,
    "local": (View(size=4, crop_scale=(0.1, 0.4)),) * 3,
}


def png(i: int) -> bytes:
    """A picture in which every pixel is i * 10, so a view tells which image it is of."""
    return encode_png(np.full((8, 8, 3), i * 10, dtype=np.uint8))


def data_set(folder: Path, broken: dict[int, bytes] | None = None) -> ShardSet:
    """24 images in two files of three row groups; image i has the label i % 5."""
    uris = []
    for part in range(2):
        numbers = range(part * 12, part * 12 + 12)
        images = [(broken or {}).get(i, png(i)) for i in numbers]
        table = pa.table({"image": images, "label": [i % 5 for i in numbers]})
        uris.append(str(folder / f"{part}.parquet"))
        pq.write_table(table, uris[-1], row_group_size=4)
    return open_shards(uris, str(folder))


def source(shards: ShardSet, views: Views = PLAIN, batch_size: int = 8) -> Source:
    return Source(shards, ReadPlan(shards.group_rows, batch_size, 2, seed=3, window_rows=10), views)


def numbers(arrays: Arrays) -> list[int]:
    return (arrays["global"][:, 0, 0, 0, 0] // 10).tolist()


def test_an_epoch_draws_every_image_once_with_its_own_label(tmp_path):
    drawn = [source(data_set(tmp_path)).draw(start, 8) for start in (0, 8, 16)]
    seen = [n for arrays in drawn for n in numbers(arrays)]
    assert sorted(seen) == list(range(ROWS))
    assert seen != sorted(seen)
    assert [label for arrays in drawn for label in arrays[LABEL]] == [n % 5 for n in seen]


def test_views_and_masks_have_the_declared_shapes_and_types(tmp_path):
    arrays = source(data_set(tmp_path), RANDOM).draw(0, 8)
    shapes = {name: (values.shape, values.dtype.name) for name, values in arrays.items()}
    assert shapes == {
        "global": ((8, 2, 3, 8, 8), "uint8"),
        "global_mask": ((8, 2, 4), "bool"),
        "local": ((8, 3, 3, 4, 4), "uint8"),
        POSITION: ((8,), "int64"),
        LABEL: ((8,), "int64"),
        BROKEN: ((8,), "bool"),
        REASON: ((8,), "object"),
    }
    assert (arrays["global_mask"].sum(-1) == 2).all()


def test_an_image_looks_the_same_in_an_epoch_however_the_batch_is_cut(tmp_path):
    wanted = source(data_set(tmp_path), RANDOM)
    whole = wanted.draw(8, 8)
    parts = [wanted.draw(start, 2) for start in (12, 8, 14, 10)]
    for name, values in whole.items():
        cut = np.concatenate([parts[i][name] for i in (1, 3, 0, 2)])
        assert np.array_equal(cut, values), name


def test_block_masks_are_spread_evenly_over_each_global_batch(tmp_path):
    mask = BlockMask((0.1, 0.5), share=0.5, smallest=4)
    views: Views = {"global": (View(size=8, mask=mask, grid=10),) * 2}
    wanted = source(data_set(tmp_path), views)
    for step in range(3):
        parts = [wanted.draw(8 * step + first, 2)["global_mask"] for first in range(0, 8, 2)]
        hidden = np.sort(np.concatenate(parts).reshape(16, 100).sum(1))
        assert (hidden[:8] == 0).all(), "8 of the 16 views hide nothing"
        bins = 100 * np.linspace(0.1, 0.5, 9)
        assert (np.abs(hidden[8:] - (bins[:-1] + bins[1:]) / 2) <= 5 / 2 + 0.5).all(), hidden


def test_an_image_looks_different_in_the_next_epoch(tmp_path):
    wanted = source(data_set(tmp_path), RANDOM, batch_size=24)
    first, second = wanted.draw(0, 24), wanted.draw(24, 24)
    order = [np.argsort(a["global"].astype(int).mean((1, 2, 3, 4))) for a in (first, second)]
    masks = [a["global_mask"][o] for a, o in zip((first, second), order, strict=True)]
    assert not np.array_equal(masks[0], masks[1])


def test_views_are_those_of_the_seed_the_epoch_and_the_images_bytes(tmp_path):
    arrays = source(data_set(tmp_path), RANDOM).draw(24, 8)
    seen = numbers(source(data_set(tmp_path)).draw(24, 8))
    expected = augment_batch([png(n) for n in seen], RANDOM, seed=3, epoch=1).arrays
    assert np.array_equal(arrays["local"], expected["local"])


def test_a_broken_image_is_marked_and_a_neighbour_stands_in_its_place(tmp_path):
    wanted = source(data_set(tmp_path, broken={5: b"no image", 17: b""}), batch_size=24)
    arrays = wanted.draw(0, 24)
    assert arrays[BROKEN].sum() == 2
    assert set(numbers(arrays)) == set(range(ROWS)) - {5, 17}
    assert len(arrays["global"]) == 24


def test_the_name_of_a_position_is_its_file_and_its_row(tmp_path):
    wanted = source(data_set(tmp_path), batch_size=24)
    for position, number in enumerate(numbers(wanted.draw(0, 24))):
        file, row = divmod(number, 12)
        assert wanted.name_of(position) == f"{tmp_path}/{file}.parquet row {row}"


@pytest.mark.parametrize(
    ("ranks", "accumulate", "bounds"),
    [(1, 1, (1, 2, 3, 4, 5, 6)), (2, 1, (1, 3, 5, 6)), (2, 2, (1, 5, 6))],
)
def test_the_chunks_of_all_ranks_together_are_the_plan(tmp_path, ranks, accumulate, bounds):
    wanted = source(data_set(tmp_path))
    seen = []
    for rank in range(ranks):
        share = Share(rank, ranks, accumulate)
        segment = Segment(wanted, share, bounds)
        chunks = list(segment.draw({"id": np.arange(segment.chunks)}))
        assert len(chunks) == segment.chunks == len(bounds) - 1
        for number, chunk in enumerate(chunks):
            starts = list(segment.starts(number))
            parts = list(segment.micro_batches(chunk))
            assert [int(p[POSITION][0]) for p in parts] == starts
            assert len(starts) == accumulate * (bounds[number + 1] - bounds[number])
            seen += [position for part in parts for position in part[POSITION].tolist()]
        assert segment.batches == 5 * accumulate
    assert sorted(seen) == list(range(8, 48))


def test_a_chunk_is_its_micro_batches_end_to_end_and_can_be_taken_apart(tmp_path):
    wanted = source(data_set(tmp_path, broken={9: b"no image"}), RANDOM)
    segment = Segment(wanted, Share(1, 2), (0, 1, 4))
    (chunk,) = segment.draw({"id": np.array([1])})
    parts = list(segment.micro_batches(chunk))
    assert len(parts) == 3
    for start, part in zip(segment.starts(1), parts, strict=True):
        expected = wanted.draw(start, 4)
        assert set(part) == set(expected)
        for name, values in part.items():
            assert values.dtype == expected[name].dtype, name
            assert np.array_equal(values, expected[name]), name
            assert np.shares_memory(values, chunk[name]), name
    assert chunk[BROKEN].sum() == 1


def test_chunks_can_be_drawn_one_by_one_in_any_order(tmp_path):
    segment = Segment(source(data_set(tmp_path)), Share(0, 1), (0, 2, 4, 6))
    together = list(segment.draw({"id": np.arange(3)}))
    alone = [next(segment.draw({"id": np.array([chunk])})) for chunk in (2, 0, 1)]
    for one, other in zip(together, [alone[1], alone[2], alone[0]], strict=True):
        assert np.array_equal(one["global"], other["global"])


def test_a_batch_without_a_readable_image_lies_where_it_is_to_lie_too(tmp_path):
    wanted = source(data_set(tmp_path, broken=dict.fromkeys(range(12), b"junk")), RANDOM)
    unreadable = next(p for p in range(24) if wanted.draw(p, 1)[BROKEN].all())
    out = wanted.allocate(1)
    for values in out.values():
        values[:] = 0
    drawn = wanted.draw(unreadable, 1, out)
    expected = wanted.draw(unreadable, 1)
    for name, values in out.items():
        assert drawn[name] is values
        assert values.any(), name
        assert np.array_equal(values, expected[name]), name


def test_a_sample_gives_the_chosen_rows_in_blocks_without_the_broken_ones(tmp_path):
    shards = data_set(tmp_path, broken={9: b"no image"})
    groups, rows = np.array([0, 2, 5, 1]), np.array([3, 1, 0, 2])  # images 3, 9, 20 and 6
    sample = Sample(shards, groups, rows, size=8, block_rows=3)
    assert sample.blocks == 2
    first, second = sample.read(0), sample.read(1)
    assert (first[VIEWS][:, 0, 0, 0] // 10).tolist() == [3, 20]
    assert first[LABEL].tolist() == [3, 0]
    assert (second[VIEWS][:, 0, 0, 0] // 10).tolist() == [6]


def test_evaluation_views_say_which_images_could_be_read():
    views, readable = evaluation_views([png(1), b"junk", png(2)], size=8)
    assert views.shape == (3, 3, 8, 8)
    assert readable.tolist() == [True, False, True]
    assert not views[1].any()


def test_a_batch_without_a_readable_image_is_an_error(tmp_path):
    shards = data_set(tmp_path, broken=dict.fromkeys(range(ROWS), b"junk"))
    with pytest.raises(BrokenImage, match="no readable image"):
        source(shards).draw(0, 8)
