"""selfray: self-supervised pretraining of vision encoders, from a laptop to a Ray cluster.

The core imports neither ray nor mlflow; everything that does lives in `selfray.cluster`.
"""

__version__ = "0.1.0"
