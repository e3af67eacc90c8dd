"""Seeded mutations of a run's folder: its record, its spool and what names its MLflow run.

A comparison reads what is sound and says what is not; it never ends by a damaged file.
FUZZ_MUTATIONS says how many of each kind; the first mutations are always the same ones.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_fuzz_data import mutated
from test_fuzz_words import ODD, changed

from helpers import experiment
from selfray.runs import reading, record
from selfray.runs.folder import RUN_FILE, RUN_RECORD, SPOOL
from selfray.runs.ranking import ComparedRun
from selfray.runs.spool import SpoolWriter
from selfray.storage import Location

SPOOLED = "spool/train-0.jsonl"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = Location.of(tmp_path / "run")
    folder.make_folder()
    record.write(folder, experiment(), "finished", result={"seconds": 3.0, "images_seen": 40})
    (folder / RUN_RECORD).write_json({"tracking_uri": "sqlite:////x/mlflow.db", "run_id": "ab"})
    writer = SpoolWriter(folder / SPOOL, "train-0")
    for step in range(1, 4):
        writer.metrics(8 * step, {"loss": 5 / step, "probe/knn": step / 5})
    writer.tags({"probe.knn.protocol": "knn-v1"})
    writer.close()
    return tmp_path / "run"


def is_sound(run: ComparedRun) -> None:
    """What a page and a table need of a run, whatever its folder holds."""
    json.dumps([run.name, run.status, run.note, run.method, run.score])
    for points in run.curves.values():
        assert all(isinstance(number, int | float) for point in points for number in point)


@pytest.mark.long
@pytest.mark.parametrize("name", [RUN_FILE, SPOOLED, RUN_RECORD])
def test_a_damaged_file_of_a_run_is_left_out(run: Path, name: str) -> None:
    content = (run / name).read_bytes()
    lines = [json.loads(line) for line in content.decode().splitlines()] if name == SPOOLED else []
    known = len(reading.read_run(Location.of(run)).curves)
    for number, data in enumerate(mutated(content, name)):
        if number % 2:  # sound JSON of another shape
            rng = np.random.default_rng((7, number))
            odd: Any = changed(lines or json.loads(content), rng)
            odd = ODD[number % len(ODD)] if number % 20 == 1 else odd
            if lines:
                text = "\n".join(map(json.dumps, odd if isinstance(odd, list) else [odd]))
            else:
                text = json.dumps(odd)
            data = text.encode()
        (run / name).write_bytes(data)
        try:
            found = reading.read_run(Location.of(run))
            is_sound(found)
            assert name == SPOOLED or len(found.curves) == known
        except BaseException as error:
            error.add_note(f"mutation {number}: {data!r}")
            raise
