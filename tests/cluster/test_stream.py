"""The stream through real Ray Data: the plan's micro-batches, in order, without a copy."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.data import DataContext

from helpers import experiment, wait_for
from selfray.cluster import stream as stream_module
from selfray.cluster.gate import Gate, GateClosed
from selfray.cluster.stream import (
    CHUNK_BYTES,
    CHUNKS_PER_CPU,
    MOST_STEPS_PER_CHUNK,
    Stream,
    chunk_room,
)
from selfray.cluster.training import _checked
from selfray.data.plan import ReadPlan, Share
from selfray.data.shard_set import open_shards
from selfray.data.source import LABEL, POSITION, REASON, Arrays, Source
from selfray.experiment import DataConfig
from selfray.pixels.augment import BROKEN
from selfray.pixels.codecs import encode_png
from selfray.runs.recorder import Recorder
from selfray.runs.spool import SpoolReader
from selfray.storage import Location
from selfray.views import RandomMask, View, Views

VIEWS: Views = {
    "global": (View(size=8, crop_scale=(0.2, 1.0), mask=RandomMask(0.5), grid=2),) * 2,
    "local": (View(size=4, crop_scale=(0.1, 0.4)),) * 3,
}
ARRAYS = {"global", "global_mask", "local", POSITION, LABEL, BROKEN, REASON}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """48 images, four of them none, over 3 epochs of 6 batches of 8."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    images = [encode_png(rng.integers(0, 256, (12, 12, 3), np.uint8)) for _ in range(48)]
    images[17] = images[23] = images[31] = images[40] = b"no image"
    table = pa.table({"image": images, "label": [i % 5 for i in range(48)]})
    pq.write_table(table, folder / "0.parquet", row_group_size=8)
    shards = open_shards([str(folder / "0.parquet")], str(folder))
    return Source(shards, ReadPlan(shards.group_rows, 8, 3, seed=3), VIEWS)


def test_a_stream_gives_what_the_function_draws_on_every_rank_to_the_bit(ray_session, source):
    share = Share(1, 2, accumulate=2)
    batches = list(Stream(source, share, 4, cpus=1))
    starts = [start for step in range(4, 18) for start in share.starts(source.plan, step)]
    assert len(batches) == len(starts) == 28
    broken = 0
    for start, batch in zip(starts, batches, strict=True):
        expected = source.draw(start, 2)
        assert set(batch) == ARRAYS
        for name, values in batch.items():
            assert values.dtype == expected[name].dtype, name
            assert np.array_equal(values, expected[name]), name
        broken += int(batch[BROKEN].sum())
    assert broken > 0


def test_views_lie_in_the_object_store_and_are_no_copy(ray_session, source):
    batch = next(iter(Stream(source, Share(0, 1), 0, cpus=1)))
    assert not batch["global"].flags.owndata
    assert not batch["global"].flags.writeable


def test_a_stream_ends_at_the_step_that_it_is_to_reach(ray_session, source):
    stream = Stream(source, Share(0, 1), 2, cpus=1, until_step=5)
    positions = np.concatenate([batch[POSITION] for batch in stream])
    assert positions.tolist() == list(range(16, 40))


def test_what_a_task_raises_reaches_the_trainer(ray_session, source):
    gone = replace(source, shards=replace(source.shards, image_column="absent"))
    with pytest.raises(Exception, match="absent"):
        list(Stream(gone, Share(0, 1), 0, cpus=1))


def test_broken_images_are_named_in_the_spool_and_too_many_end_the_run(source, tmp_path):
    wanted = replace(experiment(), data=DataConfig("x", max_broken_fraction=0.02))
    recorder = Recorder(wanted, Location.of(tmp_path), (100,), writes=False)
    arrays = [source.draw(start, 48) for start in (0, 48, 96)]  # the same four in each epoch
    checked = _checked(arrays, wanted, recorder)  # type: ignore[arg-type]
    next(checked)
    next(checked)
    with pytest.raises(ValueError, match=r"12 of the first 144 .*data\.max_broken_fraction 0\.02"):
        next(checked)
    (told,) = SpoolReader(Location.of(tmp_path) / "spool").read({})[0]
    assert told["kind"] == "broken_images"
    assert told["names"].count("0.parquet row") == told["total"] == 4


def sized(source: Source, size: int, batch_size: int, epochs: int = 2000) -> Source:
    plan = ReadPlan((batch_size,), batch_size, epochs, 0)
    return replace(source, plan=plan, views={"global": (View(size=size),) * 2})


def test_chunks_begin_with_one_step_and_grow_up_to_their_size(source):
    stream = Stream(sized(source, 32, 64), Share(0, 1), 7, cpus=1)
    bounds = list(stream.bounds())
    sizes = np.diff(bounds).tolist()
    assert sizes[:10] == [1] * 3 + [4] * 3 + [16] * 3 + [64]
    # The first of each execution is small, for it lies in memory to its end.
    firsts = [segment.bounds[1] - segment.bounds[0] for segment in stream.segments()]
    assert firsts == [1] * len(firsts)
    assert max(sizes) == MOST_STEPS_PER_CHUNK
    assert (bounds[0], bounds[-1]) == (7, 2000)
    assert all(sizes)


def test_a_chunk_is_no_larger_than_its_room_and_no_smaller_than_it_must_be(source):
    step = 64 * 2 * 3 * 224**2
    for room, steps in ((1, 1), (step, 1), (2.5 * step, 2), (10**12, CHUNK_BYTES // step)):
        stream = Stream(sized(source, 224, 64), Share(0, 1), 0, 2, room=room)
        assert stream.most_steps_per_chunk == steps


def test_executions_follow_one_another_without_a_gap(ray_session, source, monkeypatch):
    monkeypatch.setattr(stream_module, "CHUNKS_PER_EXECUTION", 3)
    monkeypatch.setattr(stream_module, "MOST_STEPS_PER_CHUNK", 2)
    monkeypatch.setattr(Stream, "window", 1)
    stream = Stream(source, Share(0, 1), 1, cpus=1)
    bounds = [segment.bounds for segment in stream.segments()]
    assert len(bounds) > 2
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(bounds))
    positions = np.concatenate([batch[POSITION] for batch in stream])
    assert positions.tolist() == list(range(8, 144))


def test_a_stream_without_a_step_left_is_empty(ray_session, source):
    assert list(Stream(source, Share(0, 1), 18, cpus=1)) == []
    assert list(Stream(source, Share(0, 1), 5, cpus=1, until_step=5)) == []


def test_a_window_has_chunks_in_proportion_to_its_cpus(source):
    # Else the streams of a sweep, with half a CPU each, would hold twice what they have room for.
    assert [Stream(source, Share(0, 1), 0, c).window for c in (0.25, 0.5, 1, 2)] == [2, 2, 3, 6]


def test_the_streams_that_end_on_a_node_fit_into_a_third_of_its_object_store(ray_session):
    (node,) = ray.nodes()
    store, cpus = node["Resources"]["object_store_memory"], node["Resources"]["CPU"]
    # However many runs share the CPUs, alone or as parts of a larger run with ranks elsewhere.
    assert CHUNKS_PER_CPU * cpus * chunk_room(1, 1) == pytest.approx(store / 3)
    assert CHUNKS_PER_CPU * cpus / 4 * chunk_room(2, 8) == pytest.approx(store / 3)


# How far a stream runs ahead


def told(source: Source, folder: Path, waits_from: int = 10**9) -> Source:
    """Of many steps, each of which leaves a file when it is drawn; some wait for another file."""

    @dataclass(frozen=True)
    class Told(Source):
        def draw(self, start: int, count: int, out: Arrays | None = None) -> Arrays:
            (folder / str(start // count)).touch()
            while start // count >= waits_from and not (folder / "go").exists():
                time.sleep(0.1)
            return super().draw(start, count, out)

    plan = replace(source.plan, epochs=100)
    return Told(source.shards, plan, source.views)


def settled(folder: Path) -> int:
    """How many steps were drawn, once there come no more. On a slow machine it may answer early,
    with fewer: it can miss one that should not have been drawn, and never counts too many."""
    count = -1
    while count != (count := len(list(folder.iterdir()))):
        time.sleep(1)
    return count


def test_what_is_drawn_ahead_of_a_slow_consumer_is_a_window_of_chunks(
    ray_session, source, tmp_path
):
    stream = Stream(told(source, tmp_path), Share(0, 1), 0, cpus=1)
    bounds = list(stream.bounds())
    batches = iter(stream)
    for step in range(7):
        next(batches)
        (chunk,) = [i for i, (a, b) in enumerate(itertools.pairwise(bounds)) if a <= step < b]
        if step in (0, 2, 6):
            ahead = bounds[chunk + stream.window]
            wait_for("a window of chunks", lambda n=ahead: len(list(tmp_path.iterdir())) >= n)
            assert settled(tmp_path) == ahead


def test_a_consumer_may_pause_for_longer_than_an_execution_may_stand_still(
    ray_session, source, monkeypatch
):
    # Probes and checkpoints take their time. A first task waits for a process to start, too.
    list(Stream(source, Share(0, 1), 16, cpus=1))
    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 4.0)
    batches = iter(Stream(source, Share(0, 1), 0, cpus=1))
    seen = [next(batches)[POSITION]]
    time.sleep(6)
    seen += [batch[POSITION] for batch in batches]
    assert np.concatenate(seen).tolist() == list(range(144))


def threads() -> set[threading.Thread]:
    names = ("stream", "StreamingExecutor")
    return {t for t in threading.enumerate() if t.name.startswith(names)}


def test_an_execution_ends_with_its_consumer(ray_session, source, tmp_path, capfd):
    before = threads()
    list(Stream(source, Share(0, 1), 16, cpus=1))
    assert threads() == before
    batches = iter(Stream(told(source, tmp_path), Share(0, 1), 0, cpus=1))
    next(batches)
    assert threads() > before
    del batches
    assert threads() == before
    drawn = settled(tmp_path)
    assert drawn < 20
    assert "GateClosed" not in "".join(capfd.readouterr())


def test_so_does_one_whose_tasks_were_all_submitted_before(ray_session, source, tmp_path):
    before = threads()
    stream = Stream(told(source, tmp_path, waits_from=1), Share(0, 1), 0, cpus=1, until_step=3)
    batches = iter(stream)
    next(batches)
    wait_for("the second step to begin", (tmp_path / "1").exists)
    del batches
    assert threads() == before
    (tmp_path / "go").touch()


def test_an_autoscaler_is_asked_for_no_more_than_the_streams_cpus(ray_session, source, monkeypatch):
    limits = []
    carry_out = ray.data.Dataset.iter_internal_ref_bundles

    def watched(self: ray.data.Dataset):
        limits.append(self.context.execution_options.resource_limits.cpu)
        return carry_out(self)

    monkeypatch.setattr(ray.data.Dataset, "iter_internal_ref_bundles", watched)
    list(Stream(source, Share(0, 1), 16, cpus=1))
    list(Stream(source, Share(0, 1), 16, cpus=0.5))
    assert limits == [1, 0.5]


def test_a_gate_lets_tasks_through_in_order_and_only_so_many_at_once():
    gate = Gate(tasks=10, tasks_at_once=2)
    gate.open_to(3)
    assert [gate.admits(submitted, active=1) for submitted in range(5)] == [True] * 3 + [False] * 2
    assert not gate.admits(0, active=2)
    gate.open_to(5)
    assert gate.admits(4, active=1)
    gate.open_to(12)
    assert gate.admits(10, active=0), "nothing is left to wait for"


def test_where_nothing_runs_and_nothing_may_a_gate_is_waited_for():
    gate = Gate(tasks=10, tasks_at_once=2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(gate.admits, 0, 0)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)
        gate.open_to(1)
        assert waiting.result(timeout=10)
        waiting = pool.submit(gate.admits, 1, 0)
        gate.close()
        with pytest.raises(GateClosed):
            waiting.result(timeout=10)
    with pytest.raises(GateClosed):
        gate.admits(1, active=1)
