"""Shards, streams and checkpoints on an S3-compatible store: a real moto server on this machine."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs
from test_source import png, source

from helpers import experiment, start, train_for, weights
from selfray import storage
from selfray.data.destination import finish
from selfray.data.files import parquet_files
from selfray.data.listing import make_plan
from selfray.data.manifest import BUILD_FOLDER, PLAN, Manifest
from selfray.data.options import BuildOptions
from selfray.data.shard_set import open_shards
from selfray.data.writer import Job, build_item
from selfray.runs import checkpoint
from selfray.storage import Location, Retry

pytest.importorskip("moto.server", reason="moto[server] of the dev extra is not installed")


class Gateway:
    """Forwards connections to the store; while it is down it refuses them and cuts open ones."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.is_down = False
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def go_down(self) -> None:
        self.is_down = True
        for one in self._open:
            one.close()
        self._open.clear()

    def come_back(self) -> None:
        self.is_down = False

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self.is_down:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.target))
            self._open += [client, server]
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        for one in (source, sink):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    before = dict(os.environ)
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert server.poll() is None, "the moto server has died"
                time.sleep(0.1)
        gateway = Gateway(port)
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{gateway.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        direct = fs.S3FileSystem(
            endpoint_override=f"127.0.0.1:{gateway.port}",
            scheme="http",
            access_key="test",
            secret_key="test",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        direct.create_dir("bucket")
        yield gateway
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def shards_uri(gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 images in four shards, built by the tasks' own function."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(24):
        (folder / f"{i:02}.png").write_bytes(png(i))
    destination = Location.of("s3://bucket/shards")
    plan = make_plan(Location.of(folder), BuildOptions(shard_bytes=400))
    (destination / BUILD_FOLDER / PLAN).write_json(plan.identity())
    job = Job(plan.source, destination, plan.layout, plan.options)
    finish(destination, plan, [r for i in plan.items for r in build_item(job, i, frozenset())])
    return destination.uri


def test_shards_that_were_built_on_s3_stream_from_there(shards_uri):
    manifest = Manifest.load(shards_uri)
    assert manifest.images == 24
    assert len(manifest.shards) > 2
    wanted = source(open_shards(parquet_files(shards_uri), shards_uri))
    drawn = [wanted.draw(start, 8) for start in (0, 8, 16)]
    seen = [int(v) // 10 for a in drawn for v in a["global"][:, 0, 0, 0, 0]]
    assert sorted(seen) == list(range(24))


def test_a_run_checkpoints_to_s3_and_comes_back_from_there(gateway):
    wanted = experiment()
    state = start(wanted)
    train_for(state, wanted, 2)
    run = Location.of("s3://bucket/runs/a")
    checkpoint.save(state, wanted, run, loss=1.0)
    found = checkpoint.latest(run)
    assert found is not None
    again = start(wanted)
    again.load_state_dict(found.state())
    for name, value in weights(state).items():
        assert np.array_equal(weights(again)[name].numpy(), value.numpy()), name


def test_a_store_that_is_away_for_some_seconds_only_delays_a_read(gateway, shards_uri):
    from selfray.data.reader import read_chosen
    from selfray.data.row_cache import RowGroupCache

    shards = open_shards(parquet_files(shards_uri), shards_uri)
    groups, rows = np.zeros(4, np.int64), np.arange(4)
    gateway.go_down()
    is_back = threading.Event()

    def come_back() -> None:
        is_back.set()
        gateway.come_back()

    timer = threading.Timer(2.0, come_back)
    timer.start()
    try:
        # A cache of its own: other tests have read these images.
        chosen = read_chosen(shards, groups, rows, RowGroupCache(2**20))
        assert is_back.is_set(), "it did wait for the store"
    finally:
        timer.join()
    assert chosen.unreadable == {}, "an outage is no reason to replace images"


def test_a_store_that_stays_away_ends_the_read_with_the_last_error(
    gateway, shards_uri, monkeypatch
):
    # One attempt: pyarrow makes several of its own in it, which take seconds.
    monkeypatch.setattr(storage, "RETRY", Retry(attempts=1, first_seconds=0.01))
    gateway.go_down()
    try:
        with pytest.raises(OSError, match=r"did not answer in 1 attempts .*the last error"):
            Location.of(shards_uri + "/manifest.json").read_bytes()
    finally:
        gateway.come_back()


def test_a_shard_that_is_deleted_from_s3_costs_its_rows(gateway, shards_uri, tmp_path):
    shards = open_shards(parquet_files(shards_uri), shards_uri)
    lost = Location.of(shards.files[1].uri)
    kept = lost.read_bytes()
    lost.filesystem.delete_file(lost.path)
    try:
        from selfray.data.reader import read_chosen
        from selfray.data.row_cache import RowGroupCache

        groups = np.repeat(np.arange(len(shards.group_rows)), shards.group_rows)
        rows = np.concatenate([np.arange(n) for n in shards.group_rows])
        chosen = read_chosen(shards, groups, rows, RowGroupCache(2**20))
        assert len(chosen.unreadable) == shards.files[1].rows
        assert {e.name for e in chosen.unreadable.values()} == {lost.uri}
    finally:
        lost.write_bytes(kept)


def test_images_of_a_set_larger_than_the_cache_come_from_s3_one_by_one(gateway, shards_uri):
    from selfray.data.reader import read_chosen
    from selfray.data.row_cache import RowGroupCache

    shards = open_shards(parquet_files(shards_uri), shards_uri)
    groups = np.repeat(np.arange(len(shards.group_rows)), shards.group_rows)
    rows = np.concatenate([np.arange(n) for n in shards.group_rows])
    whole, single = RowGroupCache(2**20), RowGroupCache(1)
    expected = read_chosen(shards, groups, rows, whole)
    assert all(expected.images)
    for _ in range(2):
        chosen = read_chosen(shards, groups, rows, single)
        assert chosen.images == expected.images
        assert np.array_equal(chosen.labels, expected.labels)
    assert len(single._places) == len(shards.group_rows) - 1, "all but one"

    # The row group in memory is the one whose thread came last.
    held = {uri for uri, *_ in single._tables}
    gone = next(file for file in shards.files if file.uri not in held)
    lost = Location.of(gone.uri)
    kept = lost.read_bytes()
    lost.filesystem.delete_file(lost.path)
    try:
        for _ in range(2):  # with the object open, and not even that
            chosen = read_chosen(shards, groups, rows, single)
            assert len(chosen.unreadable) == gone.rows
            assert all(e.name.startswith(lost.uri) for e in chosen.unreadable.values())
            single._files.clear()
            single._unreadable.clear()
    finally:
        lost.write_bytes(kept)


def test_an_object_that_is_replaced_while_it_is_open_is_read_anew(gateway, shards_uri, monkeypatch):
    from selfray.data import row_cache as reading
    from selfray.data.reader import read_chosen
    from selfray.data.row_cache import RowGroupCache

    first, second = (
        pa.table({"image": [letter * (length + i) for i in range(20)]})
        for letter, length in ((b"a", 3_000), (b"b", 3_100))
    )
    place = Location.of("s3://bucket/changing/0.parquet")

    def store(table: pa.Table, group_rows: int = 10) -> None:
        with place.filesystem.open_output_stream(place.path) as stream:
            pq.write_table(table, stream, group_rows, compression="none", use_dictionary=False)

    store(first)
    shards = open_shards([place.uri], place.parent.uri)
    groups, rows = np.repeat([0, 1], 10), np.tile(np.arange(10), 2)
    cache = RowGroupCache(1)
    read_chosen(shards, groups[:10], rows[:10], cache)  # held whole; the other one by its places
    for _ in range(2):
        assert read_chosen(shards, groups, rows, cache).images == first["image"].to_pylist()
    with monkeypatch.context() as patch:
        patch.setattr(reading, "_stamp_of", lambda _: pytest.fail("a request for each read"))
        assert read_chosen(shards, groups, rows, cache).images == first["image"].to_pylist()
    time.sleep(1.1)  # the store tells the time in seconds
    store(second)
    cache.ASK_SECONDS = 0.0
    assert read_chosen(shards, groups, rows, cache).images[10:] == second["image"].to_pylist()[10:]
    time.sleep(1.1)
    store(second, 20)
    chosen = read_chosen(shards, groups, rows, cache)
    assert sorted(chosen.unreadable) == list(range(10, 20))
    assert all("have changed since the start" in str(error) for error in chosen.unreadable.values())


def test_settings_behind_a_question_mark_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="AWS_ENDPOINT_URL"):
        Location.of("s3://bucket/x?endpoint_override=localhost:5000")


def test_no_file_is_left_out_of_a_folder_on_s3(shards_uri):
    assert len(parquet_files(shards_uri)) == len(Manifest.load(shards_uri).shards)
