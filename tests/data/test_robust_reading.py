"""Shards that are lost or damaged while a run reads them."""

import random
from pathlib import Path

import numpy as np
import pytest
from test_source import data_set, numbers, source

from selfray import storage
from selfray.data.broken import BrokenTally, too_many
from selfray.data.reader import read_chosen
from selfray.data.row_cache import RowGroupCache, UnreadableShard
from selfray.data.source import BROKEN, REASON
from selfray.pixels.codecs import BrokenImage
from selfray.storage import Location, Retry, patiently


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch):
    monkeypatch.setattr("selfray.data.reader.read_chosen.__defaults__", (RowGroupCache(2**20),))


def lose(path: Path) -> str:
    path.unlink()
    return "the file is gone"


def truncate(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:100])
    return "magic bytes"


def replace(path: Path) -> str:
    data_set(path.parent.parent / "other")
    path.write_bytes((path.parent.parent / "other" / "0.parquet").read_bytes()[:-1] + b"X")
    return "magic bytes"


@pytest.mark.parametrize("damage", [lose, truncate, replace])
def test_a_shard_that_is_lost_in_mid_run_costs_its_own_rows_and_is_named_once(tmp_path, damage):
    (tmp_path / "other").mkdir()
    (tmp_path / "data").mkdir()
    wanted = source(data_set(tmp_path / "data"), batch_size=24)
    reason = damage(tmp_path / "data" / "1.parquet")
    arrays = wanted.draw(0, 24)
    assert arrays[BROKEN].sum() == 12
    assert set(numbers(arrays)) == set(range(12)), "neighbours stand in"
    told = BrokenTally(limit=0.9).see(arrays[BROKEN], arrays[REASON])
    assert len(told) == 1
    assert told[0].startswith(f"{tmp_path}/data/1.parquet")
    assert reason in told[0]


def test_a_micro_batch_that_lies_in_a_lost_shard_takes_an_image_from_elsewhere(tmp_path):
    wanted = source(data_set(tmp_path), batch_size=24)
    (tmp_path / "1.parquet").unlink()
    for start in range(24):
        arrays = wanted.draw(start, 1)
        assert numbers(arrays)[0] < 12


def test_when_nothing_at_all_can_be_read_the_error_names_a_shard(tmp_path):
    wanted = source(data_set(tmp_path))
    for part in range(2):
        (tmp_path / f"{part}.parquet").unlink()
    with pytest.raises(BrokenImage, match=r"no readable image: .*\.parquet row"):
        wanted.draw(0, 8)


def test_a_broken_image_is_named_with_its_row_and_its_reason(tmp_path):
    arrays = source(data_set(tmp_path, broken={5: b"junk", 17: b""}), batch_size=24).draw(0, 24)
    reasons = sorted(arrays[REASON][arrays[BROKEN]])
    assert reasons[0].startswith(f"{tmp_path}/0.parquet row 5: not an image")
    assert reasons[1].startswith(f"{tmp_path}/1.parquet row 5: empty")
    assert set(arrays[REASON][~arrays[BROKEN]]) == {""}


def test_a_lost_shard_is_not_asked_for_again_for_a_while(tmp_path):
    shards, cache = data_set(tmp_path), RowGroupCache(2**20)
    path = tmp_path / "1.parquet"
    kept = path.read_bytes()
    path.unlink()
    groups, rows = np.array([3]), np.array([0])
    first = read_chosen(shards, groups, rows, cache).unreadable[0]
    path.write_bytes(kept)
    assert read_chosen(shards, groups, rows, cache).unreadable[0] is first
    assert isinstance(first, UnreadableShard)
    cache.FORGET_SECONDS = 0.0
    cache._unreadable.clear()
    assert read_chosen(shards, groups, rows, cache).unreadable == {}


# How many are too many


def test_a_run_ends_only_when_more_than_the_stated_share_is_broken():
    rng = np.random.default_rng(0)
    for share, ends in ((0.04, False), (0.08, True)):
        tally = BrokenTally(limit=0.05)
        marks = rng.random((200, 64)) < share
        stream = [(m, np.where(m, "a", "").astype(object)) for m in marks]
        if ends:
            with pytest.raises(ValueError, match=r"more than data.max_broken_fraction 0\.05"):
                [tally.see(*batch) for batch in stream]
        else:
            [tally.see(*batch) for batch in stream]
    assert not too_many(10, 10, 0.0)
    assert too_many(11, 1000, 0.0)


def test_a_fault_is_told_once_over_all_epochs():
    tally = BrokenTally(limit=1.0)
    reasons = np.array(["x", "", "x", "y"], dtype=object)
    assert tally.see(reasons != "", reasons) == ["x", "y"]
    assert tally.see(reasons != "", reasons) == []
    assert (tally.seen, tally.broken) == (8, 6)


# A store that fails for a while


class _Away:
    """An action that fails some times before it succeeds."""

    def __init__(self, times: int, error: OSError) -> None:
        self.left, self.error = times, error

    def __call__(self) -> str:
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return "read"


QUICK = Retry(attempts=4, first_seconds=0.001)
STALE = OSError(116, "Stale file handle")


def test_a_store_that_fails_for_a_while_is_waited_for():
    assert patiently(_Away(3, STALE), Location.of("/x"), QUICK) == "read"


def test_after_the_last_attempt_the_error_says_how_often_and_what_was_last():
    with pytest.raises(OSError, match=r"/x did not answer in 4 attempts .*Stale file handle"):
        patiently(_Away(4, STALE), Location.of("/x"), QUICK)


def test_what_waiting_cannot_mend_is_not_tried_again():
    for error in (FileNotFoundError(2, "gone"), PermissionError(13, "no"), OSError(28, "full")):
        action = _Away(1, error)
        with pytest.raises(type(error)):
            patiently(action, Location.of("/x"), QUICK)
        assert action.left == 0
    assert not storage.is_transient(OSError("AWS Error ACCESS_DENIED"), is_local=False)
    assert storage.is_transient(OSError("AWS Error NETWORK_CONNECTION"), is_local=False)


def test_pauses_double_up_to_a_bound_and_differ_between_readers():
    pauses = list(Retry(6, 1.0, 4.0).pauses(random.Random(1)))
    for pause, longest in zip(pauses, (1, 2, 4, 4, 4), strict=True):
        assert longest / 2 <= pause <= longest
    assert pauses != list(Retry(6, 1.0, 4.0).pauses(random.Random(2)))
