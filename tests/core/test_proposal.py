"""What `selfray pretrain auto` proposes: commands that are understood, for any facts."""

import io
import itertools
from typing import Any

import pytest

from selfray.commands import early, script
from selfray.commands.auto import Opened
from selfray.console import Console
from selfray.experiment import DataConfig
from selfray.recipes import NAMES, every
from selfray.recipes.proposal import Facts, propose

RECIPES = every()


@pytest.mark.parametrize(
    ("images", "side", "gpus"),
    itertools.product((2, 30, 900, 2_081, 60_000, 5_000_000), (28, 64, 480), (0, 1, 8)),
)
def test_a_proposal_is_a_command_that_is_understood(images, side, gpus):
    found = propose(Facts(images, side, cpus=2, gpus=gpus))
    words = [*found.words, "--data.path", "embedded:digits"]
    early.refuse(words, NAMES, "pretrain")
    wanted = script.parse(RECIPES, words, "", "pretrain")
    assert wanted.batch_size <= max(images, wanted.max_workers)
    assert 10 <= wanted.epochs <= 800
    assert wanted.max_workers == max(1, gpus)
    assert len(found.reasons) >= 3


def test_the_number_and_size_of_images_decide():
    assert propose(Facts(2_000, 480, 2, gpus=0)).recipe == "simclr-cifar10"
    assert propose(Facts(50_000, 32, 8, gpus=1)).recipe == "simclr-cifar10"
    assert propose(Facts(2_000, 480, 8, gpus=1)).recipe == "simclr-imagenet"
    assert propose(Facts(200_000, 480, 8, gpus=4)).recipe == "dino-imagenet"


def test_few_images_are_told_where_the_gain_is():
    assert "public weights" in propose(Facts(300, 480, 2, 0)).reasons[-1]
    with pytest.raises(ValueError, match="holds 1 images"):
        propose(Facts(1, 480, 2, 0))


def test_flags_that_the_user_gives_are_not_proposed():
    words = propose(Facts(2_000, 480, 2, 0)).without({"--epochs", "--encoder.layers"}).words
    assert "--epochs" not in words
    assert "--encoder.layers" not in words
    assert "--batch-size" in words


def test_the_proposed_run_takes_the_data_that_is_open_unless_its_flags_read_it_otherwise():
    sets: Any = object()
    opened = Opened(DataConfig("embedded:digits", label_column="label"), sets)
    words = [*propose(Facts(1_200, 8, 2, gpus=0)).words, "--data.path", "embedded:digits"]
    labelled = [*words, "--data.label-column", "label"]
    assert opened.for_run(script.parse(RECIPES, labelled, "", "pretrain")) is sets
    assert opened.for_run(script.parse(RECIPES, words, "", "pretrain")) is None
    grouped = [*labelled, "--data.group-by", "patient"]
    assert opened.for_run(script.parse(RECIPES, grouped, "", "pretrain")) is None


def test_groups_are_understood_before_the_proposal(tmp_path):
    given = {"--data.path": "embedded:digits", "--data.group-by": "([0-9]+)"}
    console = Console(io.StringIO(), None)
    opened = Opened.of(given, str(tmp_path), console)
    assert opened.settings.group_by == "([0-9]+)"
    assert "groups" in opened.sets.group_notes[0]
