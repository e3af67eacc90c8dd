"""Chooses the MLflow store, opens it quietly, and asks it questions that are answered, or fail with
a cause, within seconds."""

import fcntl
import json
import logging
import os
import posixpath
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from selfray.cluster.runtime import NO_TELEMETRY
from selfray.masking import masked, masked_json
from selfray.storage import Location

if TYPE_CHECKING:  # MLflow takes seconds to import
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

QUIET_AND_QUICK = {
    **NO_TELEMETRY,
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The shipper retries by itself; MLflow's own seven retries would block for minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}

log = logging.getLogger(__name__)


def tracking_uri(output: Location | str, explicit: str | None = None) -> str:
    """The tracking URI: `explicit`, else MLFLOW_TRACKING_URI, else a SQLite file in `output`.

    SQLite needs a local disk: for an output in an object store the file lies in ./runs instead.
    """
    uri = explicit or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        place = Location.of(output)
        folder = place.path if place.is_local else local_runs()
        return sqlite_uri(os.path.join(folder, "mlflow.db"))
    database = database_file(uri)
    # Absolute, because other processes with other working directories read the recorded URI.
    return uri if database is None else sqlite_uri(os.path.abspath(database))


def experiment_name() -> str:
    """The MLflow experiment of runs: MLFLOW_EXPERIMENT_NAME, else selfray."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or "selfray"


def named_store(
    record: Mapping[str, Any], tracking: str | None, output: Location | str = "runs"
) -> str:
    """The MLflow store for a run, if the user names the same one as the run's folder.

    A folder is data and may come from a stranger. So a store that only the folder names is neither
    contacted (with credentials meant for another) nor written to.

    Args:
        record: the content of the folder's mlflow.json.
        tracking: the user's flag; if given, the record does not matter.
        output: the folder whose store is taken without flag and MLFLOW_TRACKING_URI.

    Raises:
        ValueError: the folder names a different store; says how to name it.
    """
    uri = tracking_uri(output, tracking)
    recorded = masked(str(record.get("tracking_uri") or ""))
    if tracking is None and recorded not in ("", masked(uri)):
        raise ValueError(
            f"the run's folder names the MLflow store {recorded}, but a store is used only if you "
            "name it: give --tracking, or MLFLOW_TRACKING_URI, if you trust it"
        )
    return uri


def mlflow_tags(uri: str, run_id: str) -> dict[str, str]:
    """The tags of an MLflow run. Raises ValueError if there is no such run, ConnectionError if
    there is no answer."""
    with asking_mlflow(uri) as (client, where):
        from mlflow.exceptions import MlflowException

        try:
            return client.get_run(run_id).data.tags
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
    raise ValueError(
        f"there is no MLflow run {run_id} in {where}: name the store that has it with --tracking "
        "or MLFLOW_TRACKING_URI"
    )


def count_mlflow_experiments(uri: str) -> tuple[str, int]:
    """(the store without its password, number of its experiments, counted up to 1000). Raises
    ConnectionError if there is no answer."""
    with asking_mlflow(uri) as (client, where):
        return where, len(client.search_experiments(max_results=1000))


@contextmanager
def asking_mlflow(uri: str) -> "Iterator[tuple[MlflowClient, str]]":
    """An MLflow client that asks once and does not wait for minutes, and the store without its
    password. Errors of MLflow inside become one-line ConnectionErrors."""
    for name, value in QUIET_AND_QUICK.items():
        os.environ.setdefault(name, value)
    where = masked(uri)
    database = database_file(uri)
    if database is not None and not Path(database).exists():  # MLflow would create an empty one
        raise ConnectionError(
            f"there is no MLflow store at {database}: name one with --tracking or "
            "MLFLOW_TRACKING_URI"
        )
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield MlflowClient(tracking_uri=uri), where
    except (MlflowException, SQLAlchemyError) as error:
        log.exception("MLflow")
        text = masked(str(error))
        refused = re.search(r"Caused by .*: (.*?)[\"')]*$", text)
        cause = refused[1] if refused else textwrap.shorten(text, 160, placeholder=" ...")
        raise ConnectionError(
            f"the MLflow store {where} cannot be used ({cause}): start or repair it, or name "
            "another with --tracking or MLFLOW_TRACKING_URI"
        ) from None


def quiet_logs() -> None:
    """Silence MLflow's loggers, in case it was imported before the environment was set."""
    if os.environ["MLFLOW_LOGGING_LEVEL"] == QUIET_AND_QUICK["MLFLOW_LOGGING_LEVEL"]:
        for name in ("mlflow", "alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def locked(database: str | None) -> Iterator[None]:
    """Let only one process at a time into a SQLite file; other stores lock by themselves."""
    if database is None:
        yield
        return
    Path(database).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def database_file(uri: str) -> str | None:
    """The file of a sqlite URI; None for any other."""
    match = re.fullmatch(r"sqlite:///([^?]+?)(\?.*)?", uri)
    return None if match is None or match[1] == ":memory:" else unquote(match[1])


def sqlite_uri(path: str) -> str:
    """The URI of a SQLite file, with the characters encoded that mean something in URIs."""
    return "sqlite:///" + re.sub("[%?#]", lambda match: quote(match[0]), path)


def remove_stray_folder(uri: str) -> None:
    """Remove the empty folder that MLflow 3.17 creates under the encoded name of a SQLite file's
    folder."""
    path = uri.removeprefix("sqlite:///")
    if database_file(uri) not in (None, path):
        with suppress(OSError):  # it is not there, or not empty
            os.removedirs(os.path.dirname(path))


def artifact_root(uri: str, run: str) -> str | None:
    """The folder for MLflow's files; None for a server, which decides itself. For a database,
    MLflow would use ./mlruns.

    Args:
        uri: the MLflow store.
        run: the folder of a run.
    """
    if not uri.startswith(("sqlite:", "postgresql", "mysql", "mssql")):
        return None
    database = database_file(uri)
    folder = posixpath.dirname(run) if database is None else os.path.dirname(database)
    root = posixpath.join(folder, "mlartifacts")
    # MLflow decodes plain paths as well.
    is_odd = "://" not in root and re.search("[%?#]", root)
    return Path(root).absolute().as_uri() if is_odd else root


def local_runs() -> str:
    return os.path.abspath("runs")


@dataclass(frozen=True)
class DataSetInput:
    """The data set of a run, as MLflow shows it."""

    name: str
    digest: str
    """At most 36 characters that identify the images."""
    source: str
    """A path or URI."""
    profile: Mapping[str, Any]
    """Such as {"images": 1200}."""


def as_input(found: DataSetInput) -> "DatasetInput":
    """Convert a data set to MLflow's own type."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data_set = Dataset(
        name=found.name,
        digest=found.digest[:36],
        source_type="s3" if found.source.startswith("s3://") else "local",
        source=json.dumps({"uri": masked(found.source)}),
        profile=json.dumps(masked_json(found.profile)),
    )
    return DatasetInput(data_set, [InputTag("mlflow.data.context", "training")])
