"""docs/your-images.md: its commands and flags exist."""

import re
import shlex
from pathlib import Path

import pytest

from selfray.commands import early, main, script
from selfray.recipes import NAMES, every

PAGE = (Path(__file__).parents[2] / "docs" / "your-images.md").read_text()
BLOCKS = "".join(re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S)).replace("\\\n", " ")
COMMANDS = [
    shlex.split(line.split(" #")[0].removeprefix("$ "))[1:]
    for line in BLOCKS.splitlines()
    if line.removeprefix("$ ").startswith("selfray ")
]
FRAGMENTS = re.findall(r"`(--(?:method|data|encoder)\.[^`]+)`", PAGE)
"""Flags of a recipe that the text names with their values."""


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_guide_is_understood(words):
    if words[0] != "pretrain":
        assert main.parse(words)
    elif words[1] == "auto":
        assert dict(early.given_flags(words[2:])) == {"--data.path": ["once"]}
    else:
        rest = words[1:]
        if "--init-from" in rest:  # a file that is not here
            place = rest.index("--init-from")
            rest = rest[:place] + rest[place + 2 :]
        early.refuse([word for word in rest if word not in ("once", "--data.path")], NAMES, "")
        assert script.parse(every(), rest, "", "pretrain").name == rest[0]


def test_the_flags_that_the_guide_advises_exist():
    assert len(FRAGMENTS) > 5
    for fragment in FRAGMENTS:
        words = [word for word in shlex.split(fragment) if word != "..."]
        assert script.parse(every(), ["simclr-cifar10", *words], "", "pretrain")


def test_the_guide_names_files_that_exist():
    links = re.findall(r"\]\(([\w/.-]+)\)", PAGE)
    docs = Path(__file__).parents[2] / "docs"
    assert links
    assert [link for link in links if not (docs / link).exists()] == []
    assert re.findall(r"docs/([\w-]+\.md)", PAGE)
    assert [n for n in re.findall(r"docs/([\w-]+\.md)", PAGE) if not (docs / n).exists()] == []
