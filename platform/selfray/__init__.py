"""selfray: self-supervised pretraining of vision encoders, from a laptop to a Ray cluster.

The core imports neither ray nor mlflow; everything that does lives in `selfray.cluster`. From
Python: `selfray.pretrain(experiment)`, `selfray.load(run).embed(images)`, `selfray.evaluate(run)`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfray.commands.library import evaluate as evaluate
    from selfray.commands.library import load as load
    from selfray.commands.library import pretrain as pretrain

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("pretrain", "load", "evaluate"):
        from selfray.commands import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
