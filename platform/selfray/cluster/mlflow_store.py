"""Asking an MLflow store a question, with an answer or a cause within seconds."""

import logging
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # MLflow takes seconds to import
    from mlflow import MlflowClient

log = logging.getLogger(__name__)


def mlflow_tags(uri: str, run_id: str) -> dict[str, str]:
    """The tags of an MLflow run. ValueError where there is no such run, ConnectionError where
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
    """(the store without its password, how many experiments it has at most 1000). ConnectionError
    where there is no answer."""
    with asking_mlflow(uri) as (client, where):
        return where, len(client.search_experiments(max_results=1000))


@contextmanager
def asking_mlflow(uri: str) -> "Iterator[tuple[MlflowClient, str]]":
    """A client that asks once and does not wait for minutes."""
    from selfray.cluster.tracking import QUIET_AND_QUICK, database_file, without_password

    for name, value in QUIET_AND_QUICK.items():
        os.environ.setdefault(name, value)
    where = without_password(uri)
    database = database_file(uri)
    if database is not None and not Path(database).exists():  # MLflow would make an empty one
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
        text = str(error).replace(uri, where)
        refused = re.search(r"Caused by .*: (.*?)[\"')]*$", text)
        cause = refused[1] if refused else textwrap.shorten(text, 160, placeholder=" ...")
        raise ConnectionError(
            f"the MLflow store {where} cannot be used ({cause}): start or mend it, or name another "
            "with --tracking or MLFLOW_TRACKING_URI"
        ) from None
