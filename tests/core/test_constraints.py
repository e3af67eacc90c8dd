"""The tested versions, and the same with hashes."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSION = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[\w,]+\])?==([^\s;\\]+)", re.M)


def versions(file: str) -> dict[str, str]:
    found = VERSION.findall((ROOT / file).read_text())
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_both_files_name_the_same_versions():
    plain, hashed = versions("constraints.txt"), versions("constraints-hashes.txt")
    shared = plain.keys() & hashed.keys()
    assert len(shared) > 100
    assert {name for name in shared if plain[name] != hashed[name]} == set()
    # What selfray itself imports is in both.
    for name in ("torch", "torchvision", "timm", "ray", "mlflow", "pyarrow", "numba", "tyro"):
        assert name in shared


def test_each_package_has_hashes_and_no_address():
    text = (ROOT / "constraints-hashes.txt").read_text()
    entries = re.split(r"\n(?=[A-Za-z0-9])", text.partition("\n")[2])
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in text
    assert "--index" not in text
