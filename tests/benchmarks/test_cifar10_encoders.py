"""The subset of CIFAR-10 that small encoders are compared on."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cifar10_encoders

pytestmark = pytest.mark.bench


def test_a_subset_is_chosen_by_the_seed_from_all_files_and_keeps_their_order(tmp_path):
    for part in range(2):
        table = pa.table({"label": list(range(100 * part, 100 * part + 100))})
        pq.write_table(table, tmp_path / f"train-{part}.parquet")

    def chosen(seed: int, name: str) -> list[int]:
        file = tmp_path / name / "train.parquet"
        cifar10_encoders.write_subset(tmp_path, file, "train", 50, seed)
        return pq.read_table(file)["label"].to_pylist()

    first = chosen(0, "a")
    assert first == sorted(first)
    assert len(set(first)) == 50
    assert max(first) >= 100 > min(first)
    assert chosen(0, "b") == first
    assert chosen(1, "c") != first
    assert chosen(1, "a") == first  # an existing subset is kept
