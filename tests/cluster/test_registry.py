"""A tokenizer's way on a real Ray and a real MLflow store: trained, versioned, used by BEiT."""

from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from test_launch import Screen, experiment, shards  # noqa: F401 - a fixture

from helpers import BEIT, VIT, tiny
from selfray.cluster.launch import launch
from selfray.cluster.registry import register_tokenizer
from selfray.methods.beit import BEiTConfig
from selfray.methods.vqvae import VQVAEConfig
from selfray.tokenizer import TokenizerFile

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.mark.long
def test_a_tokenizer_is_trained_versioned_and_named_by_the_run_that_uses_it(
    shards: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    tokenizer = replace(
        experiment(shards, tmp_path), name="tokens", method=tiny(VQVAEConfig), encoder=VIT
    )
    trained = launch(tokenizer, Screen())
    screen = Screen()
    register_tokenizer(tokenizer, trained, screen)
    register_tokenizer(tokenizer, trained, screen)
    assert [line for line in screen.lines if "MLflow" in line] == [
        "MLflow: model tokens, version 1"
    ] * 2
    (version,) = client.search_model_versions("name = 'tokens'")
    assert version.tags["run.folder"] == trained.folder
    assert {"encoder.safetensors", "MANIFEST.json"} <= {
        p.name for p in Path(str(version.source)).iterdir()
    }
    # What MLflow keeps is a tokenizer itself, for where the run's folder is not seen.
    kept = TokenizerFile.open(str(version.source), BEIT)
    assert kept.digest == version.tags["sha256"]
    assert (Path(trained.folder) / "artifacts" / "pictures" / "tokens.png").exists()

    beit = replace(
        experiment(shards, tmp_path),
        name="beit",
        method=replace(tiny(BEiTConfig), tokenizer=trained.folder),
        encoder=BEIT,
    )
    launch(beit, Screen())
    tracked = client.get_experiment_by_name("selfray")
    assert tracked is not None
    runs = {
        run.data.tags["method"]: run.data for run in client.search_runs([tracked.experiment_id])
    }
    assert runs["vqvae"].metrics.keys() >= {"codebook_use", "codebook_perplexity", "pixel_error"}
    assert runs["beit"].metrics.keys() >= {"token_accuracy", "loss"}
    assert runs["beit"].tags["tokenizer.version"] == "tokens 1"
    assert runs["beit"].tags["tokenizer.sha256"] == version.tags["sha256"]
    assert runs["beit"].params["method.tokenizer"] == trained.folder

    # A store that is gone costs the version, and not the tokenizer.
    (tmp_path / "mlflow.db").unlink()
    screen = Screen()
    register_tokenizer(tokenizer, trained, screen)
    assert screen.lines[0] == f"use it with --method.tokenizer {trained.folder}"
    assert "not registered in MLflow (there is no MLflow store" in screen.lines[1]
    assert "start the same command again" in screen.lines[1]
