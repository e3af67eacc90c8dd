"""benchmarks/digits_study.py: the same runs on several checkouts, and one of them may fail."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.bench

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "digits_study.py"


@pytest.fixture(scope="module")
def study() -> Any:
    spec = importlib.util.spec_from_file_location("digits_study", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits_study"] = module
    spec.loader.exec_module(module)
    return module


def result(source: str, seed: int, knn: float, **changes: Any) -> dict[str, Any]:
    untrained = {"knn": 0.5, "linear": 0.6}
    found = {"study": "digits", "source": source, "method": "mae", "arm": "", "seed": seed}
    return found | {
        "knn": knn,
        "linear": 0.9,
        "untrained": untrained,
        "loss": 1.0,
        "failure": None,
        **changes,
    }


def test_the_table_shows_the_mean_and_the_range_over_seeds_and_what_failed(study):
    runs = [result("before", 0, 0.8), result("before", 1, 0.9), result("after", 0, 0.95)]
    failed = {"study": "digits", "source": "after", "method": "dino", "arm": "", "failure": "Boom"}
    lines = study.table([*runs, failed]).splitlines()
    assert "| digits | mae | before | 2 |" in lines[2]
    assert "85.0 (80.0 to 90.0)" in lines[2]
    assert "| after | 1 | 50.0 | 95.0 |" in lines[3]
    assert lines[4].endswith("| 0 | 1 failed: Boom |")


def test_a_run_and_one_that_fails_are_both_written(tmp_path):
    broken = tmp_path / "broken"
    (broken / "platform" / "selfray").mkdir(parents=True)
    (broken / "platform" / "selfray" / "__init__.py").write_text("")
    command = [sys.executable, str(SCRIPT), "--source", f"here={ROOT}", f"broken={broken}"]
    command += ["--methods", "mocov1", "--seeds", "1", "--epochs", "1", "--jobs", "2"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "study")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    by_source = {result["source"]: result for result in results}
    assert 0.1 < by_source["here"]["knn"] <= 1
    assert by_source["here"]["points"][-1]["step"] == by_source["here"]["steps"]
    assert "ImportError" in by_source["broken"]["failure"]
    assert "mocov1" in (tmp_path / "study" / "table.md").read_text()
