"""What is refused before torch is imported, and experiments as files."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib import resources

import pytest

from helpers import MAE, RESNET, SIMCLR, experiment
from selfray import config
from selfray.commands import early, script
from selfray.commands.subjects import _subject
from selfray.models.encoder import EncoderConfig
from selfray.probes.encoders import EncoderRef
from selfray.recipes import NAMES, every
from selfray.storage import Location
from selfray.sweeps.possible import refuse_impossible
from selfray.sweeps.question import Axis, Question

RECIPES = {"recipe": experiment(MAE)}


def test_the_table_of_flags_is_that_of_the_recipes():
    text = resources.files("selfray.commands").joinpath(early.TABLE).read_text()
    assert json.loads(text) == early.table(every()), "a config has changed: run `make flags`"


def test_the_names_of_the_recipes_are_known_without_them():
    assert set(NAMES) == set(every())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("mae-imagnet", "there is no recipe mae-imagnet; did you mean mae-imagenet?"),
        ("zebra", "there is no recipe zebra$"),
        ("--epochs 3", "--epochs: the recipe comes first"),
        ("mae-imagenet --bath-size 3", "is not a flag of mae-imagenet; did you mean --batch-size?"),
        ("mae-imagenet --method.temperatur 1", "--method.temperatur is not a flag of mae-imagenet"),
        ("mae-imagenet --epochs ten", "--epochs takes a whole number, got ten"),
        ("mae-imagenet --epochs", "--epochs takes one number, got none"),
        ("mae-imagenet --data.max-broken-fraction=x", "takes a number, got x"),
        ("mae-imagenet --precision fp8", "must be one of float32, tf32, bf16, got fp8"),
        ("mae-imagenet 3", "3: a flag such as --epochs is missing before it"),
        ("mae-imagenet --data.path nowhere/at-all", "--data.path nowhere/at-all does not exist"),
        ("mae-digits --data.test-path nowhere", "--data.test-path nowhere does not exist"),
    ],
)
def test_what_cannot_be_meant_is_one_line(words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("?", "[?]")):
        early.refuse(words.split(), NAMES, "pretrain")


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--help",
        "mae-imagenet --help",
        "mae-imagenet --data.path s3://bucket/x --epochs=3 --method.mask_ratio 0.5",
        "mae-imagenet --encoder.layers 1 2 3 --encoder.no-small-stem --gpus-per-worker None",
        "--config some.yaml --epochs 3",
        "mae-digits --config some.yaml",
        "mine --plugin my_package.mine --anything 3",
    ],
)
def test_what_may_be_meant_passes(words):
    early.refuse(words.split(), NAMES, "pretrain")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("MLFLOW_RUN_ID", "unset it"), ("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")],
)
def test_an_id_of_mlflow_is_refused_with_the_way_out(monkeypatch, capsys, name, remedy):
    monkeypatch.setenv(name, "12")
    assert script.run_pretrain(["mae-digits"], "", "pretrain", 0.0) == 2
    assert remedy in capsys.readouterr().err


def test_a_typo_costs_no_import_of_torch_or_ray():
    code = (
        "import sys; sys.argv = ['selfray', 'pretrain', 'mae-imagnet']\n"
        "from selfray.commands.main import main\n"
        "code = main()\n"
        "print(code, [m for m in ('torch', 'ray', 'mlflow', 'timm', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "2 []", done.stderr
    assert done.stderr == "error: there is no recipe mae-imagnet; did you mean mae-imagenet?\n"


# Experiments as files


def parse(*words: str):
    return script.parse(RECIPES, words, "", "pretrain")


CONVNEXT = EncoderConfig("convnext_atto", 64)


def test_an_encoder_that_cannot_be_used_is_refused_when_flags_are_read():
    recipes = {"recipe": experiment(SIMCLR, RESNET)}
    with pytest.raises(ValueError, match=r"with encoder.*layers 1 1 1, .*layer4"):
        script.parse(recipes, ["recipe", "--encoder.layers", "1", "1", "1"], "", "pretrain")


def test_a_sweep_whose_encoder_cannot_be_used_is_refused():
    base = experiment(SIMCLR, RESNET)
    wrong = replace(base, encoder=replace(RESNET, layers=(1, 1, 1)))
    question = Question("t", (Axis.over("temperature", "method.temperature", (0.1, 0.2)),))
    refuse_impossible(base, question)
    with pytest.raises(ValueError, match=r"encoder.layers 1 1 1"):
        refuse_impossible(wrong, question)


def test_an_encoder_is_not_judged_on_images_that_it_cannot_take():
    ref = EncoderRef.untrained(experiment(SIMCLR, CONVNEXT))
    assert _subject("mine", ref, Location.of("runs"), None).size == 64
    with pytest.raises(ValueError, match=r"^mine: --image-size 8: encoder.name convnext_atto take"):
        _subject("mine", ref, Location.of("runs"), 8)


def test_a_printed_config_is_read_as_the_same_experiment(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        parse("recipe", "--epochs", "7", "--method.mask-ratio", "0.5", "--print-config")
    assert ended.value.code == 0
    file = tmp_path / "mine.yaml"
    file.write_text(capsys.readouterr().out)
    expected = config.override(RECIPES["recipe"], name="recipe", epochs=7)
    expected = config.override(expected, **{"method.mask_ratio": 0.5})
    assert parse("--config", str(file)) == expected
    assert parse("--config", str(file), "--epochs", "9").epochs == 9, "flags win"


def test_a_run_s_own_json_is_a_config(tmp_path):
    file = tmp_path / "experiment.json"
    file.write_text(config.dumps(RECIPES["recipe"]))
    assert parse(f"--config={file}") == RECIPES["recipe"]


def test_a_short_file_changes_a_recipe(tmp_path):
    file = tmp_path / "short.yaml"
    file.write_text(
        "recipe: recipe\nepochs: 5\nmethod: {mask-ratio: 0.5}\n"
        "optimizer: {base_learning_rate: 1e-3, schedule: {warmup_fraction: 0}}\n"
    )
    found = parse("--config", str(file))
    read = config.flatten(config.to_json(found))
    assert (read["epochs"], read["method.mask_ratio"]) == (5, 0.5)
    assert found.optimizer.base_learning_rate == 1e-3, "YAML reads 1e-3 as text"
    assert isinstance(read["optimizer.schedule.warmup_fraction"], float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3", "it needs a line such as `recipe: mae-imagenet`"),
        ("recipe: recipes", "there is no recipe recipes; did you mean recipe?"),
        ("recipe: recipe\nbath_size: 3", "there is no field bath_size; did you mean batch_size?"),
        ("recipe: recipe\nmethod: {mask: 1}", "there is no field method.mask"),
        ("recipe: recipe\nepochs: many", "epochs must be a whole number, got many"),
        ("recipe: recipe\nepochs: true", "epochs must not be a boolean, got True"),
        ("recipe: recipe\nmethod: 3", "method must be a mapping of fields, got 3"),
        ("recipe: recipe\nepochs: {a: 1}", "epochs is a single value, got a mapping"),
        ("recipe: recipe\nepochs: 0", "epochs must be positive, got 0"),
        ("type: os:system", "a config may only name types of selfray"),
        ("type: selfray.views:View", "its type is not Experiment"),
        ("[1, 2]", "must hold fields such as epochs: 50"),
        ("a: [", "is neither YAML nor JSON"),
    ],
)
def test_a_file_that_cannot_be_meant_is_named_with_what_is_wrong(text, message, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"--config .*bad\.yaml") as refused:
        parse("--config", str(file))
    assert message in str(refused.value)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"--config nowhere\.yaml does not exist"):
        parse("--config", "nowhere.yaml")


def test_the_yaml_of_an_experiment_holds_its_types():
    assert "type: selfray.methods.mae:MAEConfig" in config.to_yaml(RECIPES["recipe"])
