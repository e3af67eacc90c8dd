"""Seeded mutations of what a user writes: configs, flags, names of files and folders.

Each is read as what it says or refused in one line. FUZZ_MUTATIONS says how many of each kind; the
first mutations are always the same ones.
"""

import copy
import json
import os
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from selfray import config
from selfray.cluster.mlflow_store import artifact_root, database_file, sqlite_uri
from selfray.commands import early
from selfray.commands.config_file import read_config
from selfray.console import printable
from selfray.data.layout import SPLITS, TEST, VALIDATION, understand
from selfray.recipes import NAMES, every
from selfray.storage import Location

MUTATIONS = int(os.environ.get("FUZZ_MUTATIONS", "500"))
# fmt: off
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, 2**31, 2**40, 10**400, float("nan"),
    float("inf"), -float("inf"), "", " ", "x", "../x", "1e-3", "nan", "\x1b[2J", "\u202e", "名", [],
    [[]], {}, {"type": "selfray.views:View"}, {"type": "os:system"}, {"a": 1}, [1, 2], ["a"],
)
WORDS = (
    "train", "val", "test", "dev", "unlabeled", "images", "masks", "a", "b", "1", "10", "class1",
    "fold2", "label=a", "label=b%20", "split=val", "x-train", "x-test", ".", " ", "%", "?#", "é",
    "\udcff", "\n", "'\"", "=", "train2017", "名",
)
# fmt: on
LONGEST_LINE = 2000


def is_refused(action: Callable[[], object], *errors: type[Exception]) -> bool:
    """Whether the action raises one of the errors; its message must be one line that can be
    shown."""
    try:
        action()
    except errors as error:
        line = printable(str(error))
        assert line.strip()
        assert len(line) < LONGEST_LINE
        assert len(line.splitlines()) == 1, line
        return True
    return False


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all entries of a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in inside:
        found.append((*path, key))
        if isinstance(item, dict | list):
            found += places(item, (*path, key))
    return found


def changed(value: Any, rng: np.random.Generator) -> Any:
    """A JSON value with one to three entries replaced, removed, renamed or put elsewhere."""
    value = json.loads(json.dumps(value))
    for _ in range(int(rng.integers(1, 4))):
        found = places(value)
        path = found[int(rng.integers(len(found)))]
        above = value
        for key in path[:-1]:
            above = above[key]
        key = path[-1]
        match int(rng.integers(8)):
            case 0:
                del above[key]
            case 1 if isinstance(above, dict):
                above[f"{key}x"] = above.pop(key)
            case 2:
                other: Any = value
                for part in found[int(rng.integers(len(found)))]:
                    other = other[part]
                above[key] = json.loads(json.dumps(other))
            case _:
                above[key] = copy.deepcopy(ODD[int(rng.integers(len(ODD)))])
        if not places(value):
            break
    return value


@lru_cache
def recipes() -> dict[str, Any]:
    return dict(every())


@pytest.mark.long
def test_a_damaged_config_is_an_experiment_or_one_line(tmp_path: Path) -> None:
    names, file = sorted(recipes()), tmp_path / "config.json"
    written = [config.to_json(recipes()[name]) for name in names]
    refused = 0
    for number in range(MUTATIONS):
        rng = np.random.default_rng((3, number))
        content: Any = changed(written[number % len(written)], rng)
        if number % 3 == 0:  # a part of one, on top of a recipe
            content = {"recipe": names[number % len(names)]} | {
                key: item for key, item in content.items() if rng.random() < 0.2 and key != "type"
            }
        try:
            file.write_text(yaml.safe_dump(content) if number % 8 == 1 else json.dumps(content))
            refused += is_refused(
                lambda: read_config(str(file), None, recipes()), ValueError, FileNotFoundError
            )
        except BaseException as error:
            error.add_note(f"config {number}: {content}")
            raise
    assert MUTATIONS // 5 < refused < MUTATIONS


@pytest.mark.long
def test_damaged_flags_are_accepted_or_one_line() -> None:
    refused = 0
    for number in range(MUTATIONS):
        rng = np.random.default_rng((4, number))
        recipe = sorted(NAMES)[int(rng.integers(len(NAMES)))]
        known = sorted(early.flags_of(recipe) or ())
        words = [recipe]
        for _ in range(int(rng.integers(1, 5))):
            flag = known[int(rng.integers(len(known)))]
            value = ODD[int(rng.integers(len(ODD)))]
            text = value if isinstance(value, str) else str(value)[:60]
            at = int(rng.integers(len(flag)))
            match int(rng.integers(6)):
                case 0:
                    words.append(f"{flag}={text}")
                case 1:
                    words += [flag[:at] + flag[at + 1 :], text]
                case 2:
                    words += [text, flag]
                case 3:
                    words += [flag]
                case _:
                    words += [flag, text]
        try:
            refused += is_refused(
                partial(early.refuse, words, NAMES, "selfray pretrain"),
                ValueError,
                FileNotFoundError,
            )
        except BaseException as error:
            error.add_note(f"flags {number}: {words}")
            raise
    assert MUTATIONS // 5 < refused < MUTATIONS


def a_name(rng: np.random.Generator) -> str:
    words = [WORDS[i] for i in rng.integers(0, len(WORDS), int(rng.integers(1, 3)))]
    if rng.random() < 0.1:
        words.append("".join(map(chr, rng.integers(1, 0x2FF, 3).tolist())).replace("/", ""))
    return "".join(words)


def test_any_names_of_files_are_understood() -> None:
    """Each file gets one meaning, and none in a folder of test images is trained on."""
    for number in range(MUTATIONS):
        rng = np.random.default_rng((5, number))
        kind = ("images", "tar", "parquet")[number % 3]
        ending = {"images": "png", "tar": "tar", "parquet": "parquet"}[kind]
        names = sorted(
            {
                "/".join([*(a_name(rng) for _ in range(rng.integers(0, 4))), f"{i}.{ending}"])
                for i in range(int(rng.integers(1, 12)))
            }
        )
        try:
            found = understand(names, kind)  # type: ignore[arg-type]
            assert len(found.splits) == len(found.labels) == len(names)
            assert set(found.splits) <= {*SPLITS, None}
            known = set(found.classes or ())
            assert {label for label in found.labels if label is not None} == known
            for name, split in zip(names, found.splits, strict=True):
                if name.startswith(("val/", "test/")) and kind != "images":
                    assert split in (VALIDATION, TEST)
        except BaseException as error:
            error.add_note(f"names {number}: {names}")
            raise


def test_any_name_of_a_folder_is_itself_in_every_form(tmp_path: Path) -> None:
    for number in range(MUTATIONS):
        rng = np.random.default_rng((6, number))
        name = a_name(rng).replace("/", "").replace("\0", "") or "x"
        folder = f"{tmp_path}/{'sub' if name.strip('.') == '' else name}"
        assert Location.of(folder).path == folder
        assert (Location.of(folder) / "x").parent.path == folder
        assert database_file(sqlite_uri(f"{folder}/mlflow.db")) == f"{folder}/mlflow.db"
        assert artifact_root(sqlite_uri(f"{folder}/mlflow.db"), folder)
        assert len(printable(name, keep="").splitlines()) <= 1
