"""A method in a user's own package: believed where it is named, checked, and trained through Ray.

The package is the one that docs/your-method.md builds.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from selfray import config, contract, plugins
from selfray.commands.main import parse
from selfray.models.encoder import Encoder, EncoderConfig
from selfray.probes.classifier import Gallery
from selfray.probes.suite import Suite, judge
from selfray.runs.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """my_package/barlow.py in the current folder, named nowhere."""
    page = (ROOT / "docs" / "your-method.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "barlow.py").write_text(code[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv(plugins.VARIABLE, "")
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def selfray(*words: str, **more: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != plugins.VARIABLE} | more
    command = [sys.executable, "-m", "selfray.commands.main", *words]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_the_method_of_the_guide_is_one_file_of_at_most_sixty_lines(package):
    lines = (package / "my_package" / "barlow.py").read_text().splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 100


def test_a_file_alone_makes_nobody_import_a_module(package):
    text = '{"type": "my_package.barlow:BarlowConfig"}'
    with pytest.raises(ValueError, match=r"only name types of selfray, .* name it with --plugin"):
        config.loads(text)
    assert "my_package.barlow" not in sys.modules
    plugins.load("my_package.barlow")
    method = config.loads(text)
    assert method.name == "barlow"
    assert config.loads(config.dumps(method)) == method
    with pytest.raises(ValueError, match=r"only name types of selfray, got my_package.other"):
        config.loads('{"type": "my_package.other:BarlowConfig"}')
    with pytest.raises(ValueError, match=r"my_package.barlow has no my_package.barlow:Gone"):
        config.loads('{"type": "my_package.barlow:Gone"}')


def test_a_plugin_is_named_in_flags_once_for_all_processes(package):
    words = plugins.take(["mydata", "--plugin=my_package.barlow", "--epochs", "3"])
    assert words == ["mydata", "--epochs", "3"]
    assert plugins.named() == ("my_package.barlow",)
    assert str(package) in os.environ["PYTHONPATH"].split(os.pathsep)
    assert set(plugins.recipes()) == {"mydata"}
    with pytest.raises(ValueError, match=r"--plugin my_package.gone cannot be imported \(No mod"):
        plugins.take(["--plugin", "my_package.gone"])
    with pytest.raises(ValueError, match=r"--plugin takes a module of your own"):
        plugins.take(["--plugin"])


def test_an_installed_package_registers_its_plugins(package, monkeypatch):
    metadata = package / "my_package-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[selfray.plugins]\nbarlow = my_package.barlow\n")
    sys.path.append(str(package))
    plugins.installed.cache_clear()
    try:
        assert config.loads('{"type": "my_package.barlow:BarlowConfig"}').name == "barlow"
    finally:
        plugins.installed.cache_clear()


class Said:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def live(self, line: str) -> None:
        pass


def test_check_method_passes_the_guides_method_and_says_what_a_broken_one_owes(
    package, monkeypatch
):
    monkeypatch.setattr(contract, "CHECKS", contract.CHECKS[:4])  # the drill makes all of them
    said = Said()
    assert parse(["check-method", "my_package.barlow"]).run(said) == 0
    assert said.lines[-1] == "my_package.barlow: all 4 checks passed"
    code = (package / "my_package" / "barlow.py").read_text()
    broken = code.replace(
        "self.projector =", "self.unused = nn.Linear(3, 3)\n        self.projector ="
    )
    (package / "my_package" / "broken.py").write_text(broken)
    said = Said()
    assert parse(["check-method", "my_package.broken"]).run(said) == 1
    assert any("an unused parameter breaks DDP: unused.weight" in line for line in said.lines)
    (package / "my_package" / "empty.py").touch()
    with pytest.raises(ValueError, match=r"must define one subclass of selfray.method.Met"):
        parse(["check-method", "my_package.empty"]).run(Said())


@pytest.mark.long
def test_the_guides_method_is_certified_trained_through_ray_and_exported(package):
    flags = "--data.path embedded:digits --epochs 1 --batch-size 128 --encoder.image-size 16"
    small = "--encoder.layers 1 1 1 1 --encoder.channels 8 16 16 16 --method.projector-width 32"
    words = ["pretrain", "mydata", *flags.split(), *small.split(), "--probe.times", "1"]
    refused = selfray(*words)
    assert refused.returncode == 2
    assert "there is no recipe mydata" in refused.stderr
    checked = selfray("check-method", "my_package.barlow")
    assert "my_package.barlow: all 10 checks passed" in checked.stdout, checked.stdout
    done = selfray(*words, "--plugin", "my_package.barlow", "--output", "runs")
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (package / "runs").glob("mydata-*")
    assert Checkpoint.open(str(run)).manifest["method"] == "barlow"
    export = ["export", str(run), "--to", "timm", "--output", "encoder"]
    refused = selfray(*export)
    assert refused.returncode == 2
    assert "name it with --plugin my_package.barlow" in refused.stdout + refused.stderr
    done = selfray(*export, SELFRAY_PLUGINS="my_package.barlow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified" in done.stdout


def test_an_encoder_of_a_plugin_is_known_in_each_process_that_has_its_name(package, monkeypatch):
    page = (ROOT / "docs" / "your-method.md").read_text()
    code = next(c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "my_net" in c)
    (package / "my_package" / "nets.py").write_text(code)
    sys.path.append(str(package))
    with pytest.raises(ValueError, match="my_net"):
        EncoderConfig("my_net", image_size=32)
    # As in a worker, which has only the environment.
    monkeypatch.setenv(plugins.VARIABLE, "my_package.nets")
    encoder = Encoder(EncoderConfig("my_net", image_size=32))
    assert encoder(torch.zeros(2, 3, 32, 32)).cls.shape == (2, 128)


def test_a_protocol_of_a_plugin_is_chosen_by_its_name_and_judges(package, monkeypatch):
    page = (ROOT / "docs" / "your-method.md").read_text()
    code = next(c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "PROTOCOLS" in c)
    (package / "my_package" / "centroids.py").write_text(code)
    plugins.load("my_package.centroids")
    own = plugins.protocols()
    protocol = Suite(own=own).tasks(("knn", "centroids"))["centroids"]
    assert str(protocol) == "centroids-v1 (normalize True)"
    points = torch.tensor([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [1.0, 0.1]])
    train = Gallery(points, torch.tensor([0, 0, 1, 1]), np.arange(4, dtype=np.uint64), 2)
    found = judge("centroids", protocol, train, train)
    assert found.scores.mean() == 1
    with pytest.raises(ValueError, match="got centroid; did you mean centroids"):
        parse(["evaluate", "run", "--by", "centroid"]).run(Said())
    with pytest.raises(ValueError, match="PROTOCOLS of a plugin holds knn, which must be"):
        Suite(own={"knn": own["centroids"]})
