"""The only folder that imports ray or mlflow: the core runs without it (tests/test_layout.py)."""
