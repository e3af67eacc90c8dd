"""The quickstart as a new user meets it: one command, its console and what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

ROOT = Path(__file__).parents[2]
MOST_LINES = 60


@pytest.mark.long
def test_the_quickstart_beats_untrained_encoders_and_its_runs_are_compared_without_training(
    tmp_path,
):
    output, lines = quickstart(tmp_path)
    # A slow machine says more often how far it is.
    assert len([line for line in lines if not line.endswith(" left")]) < MOST_LINES
    assert not [line for line in lines if "warning" in line.lower() or "INFO" in line]

    table = json.loads((output / "quickstart" / "table.json").read_text())
    rows = {row["method"]: row for row in table}
    assert list(rows) == ["raw-pixels", "untrained", "simclr", "mae"]
    for name, row in rows.items():
        trained = name in ("simclr", "mae")
        assert (row["images_per_second"] is not None) == trained
        assert (row["seconds"] is not None) == trained
    assert rows["simclr"]["knn"] >= rows["untrained"]["knn"] + 0.12
    assert rows["simclr"]["knn"] >= rows["raw-pixels"]["knn"]
    assert rows["simclr"]["linear"] > rows["untrained"]["linear"]
    assert rows["mae"]["linear"] > rows["untrained"]["linear"]

    Image.open(output / "quickstart" / "curves.png").verify()
    client = MlflowClient(f"sqlite:///{output}/mlflow.db")
    experiment = client.get_experiment_by_name("selfray")
    assert experiment is not None
    pictures = {
        run.data.tags["method"]: {
            Path(file.path).name for file in client.list_artifacts(run.info.run_id, "pictures")
        }
        for run in client.search_runs([experiment.experiment_id])
    }
    common = {"views.png", "neighbours.png", "embedding.png", "curves.png"}
    common |= {"embedding.json", "thumbnails.png"}
    assert pictures == {"simclr": common, "mae": common | {"reconstructions.png"}}

    command = [sys.executable, "experiments/compare_methods.py", "--output", str(output)]
    command += ["--only", "simclr-digits", "mae-digits"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.count("this run is complete") == 2
    compared = json.loads((output / "compare" / "table.json").read_text())
    assert [line["method"] for line in compared["methods"]] == ["simclr", "mae"]
    for line in compared["methods"]:
        assert len(line["runs"]) == 1
        assert line["pretrained"]["linear"] == rows[line["method"]]["linear"]


def quickstart(tmp_path: Path) -> tuple[Path, list[str]]:
    """Its output and what it wrote on the console. Run here unless QUICKSTART_RUNS names the output
    of `make quickstart`, with what that wrote in console.txt and errors.txt."""
    ready = os.environ.get("QUICKSTART_RUNS")
    output = Path(ready) if ready else tmp_path
    if not ready:
        command = [sys.executable, "experiments/quickstart.py", "--output", str(output)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        (output / "console.txt").write_text(done.stdout)
        (output / "errors.txt").write_text(done.stderr)
    assert (output / "errors.txt").read_text() == ""
    return output, (output / "console.txt").read_text().splitlines()
