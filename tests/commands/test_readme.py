"""The README's commands are commands that exist, with flags that exist."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from ray.scripts.scripts import cli as ray_commands

from selfray.commands import early, main, script, sweeps
from selfray.commands.flags import read
from selfray.recipes import NAMES, every

ROOT = Path(__file__).parents[2]
RECIPES = every()


def commands() -> list[str]:
    """Every line of the README's code blocks, without comments; continued lines are joined."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    text = "".join(blocks).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in text.splitlines() if line.strip()]


def words_after(prefix: str) -> list[list[str]]:
    found = [line.partition(prefix)[2] for line in commands() if prefix in line]
    assert found, f"the README shows no {prefix}"
    return [shlex.split(rest) for rest in found]


def test_every_command_of_the_readme_is_of_a_kind_that_is_tested_here():
    kinds = ("make ", "selfray ", "ray ", "export ", COMPARE, *SCRIPTS, *SWEEPS)
    assert [line for line in commands() if not any(kind in line for kind in kinds)] == []


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("ray ")])
def test_a_command_of_rays_in_the_readme_has_flags_that_ray_knows(line):
    words = shlex.split(line.partition(" -- ")[0])[1:]
    known = ray_commands
    while isinstance(known, click.Group):
        known = known.commands[words.pop(0)]
    flags = {flag for parameter in known.params for flag in parameter.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= flags


@pytest.mark.parametrize("target", [words[0] for words in words_after("make ")])
def test_a_make_target_of_the_readme_exists(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


OF_RECIPES = ("pretrain", "tokenizer", "sweep")
"""Sub-commands whose flags depend on a recipe."""


@pytest.mark.parametrize(
    "words",
    [words for words in words_after("selfray ") if words[0] not in OF_RECIPES],
    ids=" ".join,
)
def test_a_selfray_command_of_the_readme_is_understood(words):
    assert main.parse(words)


SWEPT = ("mae", "temperature", "momentum", "augmentation")
COMPARE = "python experiments/compare_methods.py"
SCRIPTS = ("selfray pretrain ", "selfray tokenizer ")


SWEEPS = {f"python experiments/sweep_{name}.py": name for name in SWEPT if name != "mae"} | {
    "selfray sweep mask-ratio": "mae",
    "python experiments/sweep_mae.py": "mae",
}
SWEEP_KINDS = {"mae": sweeps.SweepMAE} | {n: sweeps.SWEEPS[n] for n in SWEPT if n != "mae"}


@pytest.mark.parametrize(
    ("name", "words"),
    [(name, words) for script, name in SWEEPS.items() for words in words_after(script)],
)
def test_a_sweep_of_the_readme_is_understood(name, words):
    kind = SWEEP_KINDS[name]
    assert read(kind, words, f"sweep_{name}.py").recipe in RECIPES


@pytest.mark.parametrize(
    "words",
    [words for script in SCRIPTS for words in words_after(script) if words[0] != "auto"],
    ids=" ".join,
)
def test_a_pretraining_command_of_the_readme_is_understood(words):
    early.refuse([w for w in words if w != "scans/" and w != "--data.path"], NAMES, "pretrain")
    if "--init-from" in words:  # a file that is not here
        place = words.index("--init-from")
        words = words[:place] + words[place + 2 :]
    assert script.parse(RECIPES, words, "", "pretrain.py").name == words[0]


def test_the_readmes_proposal_is_asked_for_as_it_is_understood():
    (words,) = [words for words in words_after("selfray pretrain ") if words[0] == "auto"]
    assert dict(early.given_flags(words[1:])) == {"--data.path": ["scans/"]}


def test_the_readme_names_files_that_exist():
    links = re.findall(r"\]\(([\w/.]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_tests_that_the_reliability_page_names_exist():
    named = re.findall(r"\btest_\w+(?:\.py)?", (ROOT / "docs" / "reliability.md").read_text())
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    tests = set(re.findall(r"^def (test_\w+)", "\n".join(files.values()), re.M))
    assert len(named) > 30
    assert [n for n in named if n not in tests and n not in files] == []
