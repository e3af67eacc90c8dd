"""Logs the encoder of a run as a model in MLflow, with its signature and an example.

The model is a torch exported program (.pt2): loading it needs torch and mlflow, but neither timm
nor selfray, and unpickles nothing.
"""

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from selfray.cluster.mlflow_store import asking_mlflow, mlflow_tags, tracking_uri
from selfray.console import Console
from selfray.models.encoder import Encoder
from selfray.probes.features import of_linear
from selfray.runs import checkpoint
from selfray.runs.checkpoint import Checkpoint
from selfray.runs.folder import RUN_RECORD
from selfray.storage import Location, last_line, read_object

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

NAME = "encoder"
DIGEST = "selfray.encoder.sha256"
"""Tag of the run with the digest of the weights that were logged."""
MODEL = "selfray.encoder.model"
"""Tag of the run and of registered versions with the logged model's id."""


class FromPixels(nn.Module):
    """The logged module: an encoder that normalises its images."""

    def __init__(self, encoder: Encoder, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Features of float32 images [n, C, H, W] in 0..1: [n, D]; for a ViT [n, 2D], the class
        token and the mean of the patch tokens, which are the inputs of the linear probe."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return of_linear(self.encoder, self.encoder((images - mean) / std))


def log_encoder(
    run: Location, console: Console, tracking: str | None = None, register: str | None = None
) -> bool:
    """Log the encoder with the best probe to the MLflow run that trained it, once.

    A failure is reported in one line and does not affect the run. Returns whether the model is in
    MLflow.

    Args:
        run: the run's folder.
        console: where the model or the failure is reported.
        tracking: the MLflow store; None takes the one that the run's command uses.
        register: the name of a registered model that gets a new version; None registers nothing.
    """
    record = read_object(run / RUN_RECORD)
    if "run_id" not in record:
        console.say("the encoder is not logged: no MLflow run belongs to this folder")
        return False
    uri = tracking_uri(run.parent, tracking)
    console.live("logging the encoder to MLflow")
    try:
        known = mlflow_tags(uri, record["run_id"])
        found = checkpoint.best(run) or Checkpoint.open(run.uri)
        with asking_mlflow(uri) as (client, _):
            if known.get(DIGEST) == found.digest and MODEL in known:
                model_id = known[MODEL]
            else:
                model_id = _log(client, record["run_id"], found)
            console.say(f"model: mlflow.pyfunc.load_model('models:/{model_id}'), step {found.step}")
            if register is not None:
                version = _register(client, record["run_id"], model_id, register)
                console.say(f"registered as {register}, version {version}")
    except Exception as error:  # exporting may raise anything, and the run has ended well
        log.exception("logging the encoder failed")
        console.say(f"the encoder is not logged to MLflow: {last_line(error)}")
        return False
    return True


def _log(client: "MlflowClient", run_id: str, found: Checkpoint) -> str:
    """Log a checkpoint's encoder as a model of its run. Returns the model's id."""
    from mlflow.entities import LoggedModelOutput

    experiment = found.experiment()
    info = client.get_run(run_id).info
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / NAME
        save(FromPixels(found.encoder(), *experiment.data.normalization), folder)
        params = {
            "method": experiment.method.name,
            "encoder": experiment.encoder.name,
            "image_size": str(experiment.encoder.image_size),
            "step": str(found.step),
        }
        model = client.create_logged_model(
            info.experiment_id, NAME, run_id, params=params, model_type="feature extractor"
        )
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, found.images_seen)])
    client.set_tag(run_id, DIGEST, found.digest)
    client.set_tag(run_id, MODEL, model.model_id)
    return model.model_id


@torch.no_grad()
def save(model: FromPixels, folder: Path) -> None:
    """Write a model in MLflow's format: the exported program, its signature and an example."""
    import mlflow.pytorch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    config = model.encoder.config
    side = config.image_size
    shape = (2, config.in_channels, side, side)
    example = np.random.default_rng(0).random(shape, np.float32)
    width = model(torch.from_numpy(example)).shape[1]
    kind = np.dtype("float32")
    mlflow.pytorch.save_model(
        model.eval(),
        str(folder),
        signature=ModelSignature(
            Schema([TensorSpec(kind, (-1, *shape[1:]))]),
            Schema([TensorSpec(kind, (-1, width))]),
        ),
        input_example=example,
        pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
        serialization_format="pt2",
    )


def _register(client: "MlflowClient", run_id: str, model_id: str, name: str) -> str:
    """Register a logged model as a version of `name`, unless done before. Returns its number."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}'")
    same = [version for version in versions if version.tags.get(MODEL) == model_id]
    if not same:
        # The location of its files, since MLflow would look up models:/ID in the default store.
        source = client.get_logged_model(model_id).artifact_location
        tags = {MODEL: model_id}
        same = [client.create_model_version(name, source, run_id, tags, model_id=model_id)]
    return str(same[0].version)
