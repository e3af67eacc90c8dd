"""The rules that hold the house together (DESIGN.md, Layout)."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import selfray
from helpers import MAE, SIMCLR, experiment

PACKAGE = Path(selfray.__file__).parent
SOURCE_ROOT = PACKAGE.parent
CLUSTER = ("cluster", "commands")
"""What may import ray and mlflow: the folder, and the command line over it."""

FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.relative_to(PACKAGE).parts
)
CORE = [path for path in FILES if path.relative_to(PACKAGE).parts[0] not in CLUSTER]
DOORS = PACKAGE / "__init__.py"
"""`selfray.pretrain` and its kin, which import their module when they are called."""


def inner_name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imported(path: Path) -> set[str]:
    """The full names of all modules that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{inner_name(path)} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def belongs_to(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def run_python(code: str, path: list[Path], **environment: str) -> str:
    """The output of some Python in a process of its own. The test fails with its error."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": os.pathsep.join(map(str, path)), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_init_file_makes_a_package_of_the_source_root():
    assert SOURCE_ROOT.name == "platform"
    assert not (SOURCE_ROOT / "__init__.py").exists()


def test_the_standard_librarys_platform_is_not_shadowed():
    code = "import platform; print(platform.system())"
    assert run_python(code, [SOURCE_ROOT.parent]) == os.uname().sysname


def test_the_files_of_the_core_are_found():
    assert {"train.py", "data/plan.py", "methods/mae.py"} <= {inner_name(path) for path in CORE}
    assert not any("cluster" in inner_name(path) for path in CORE)


@pytest.mark.parametrize("path", [p for p in CORE if p != DOORS], ids=inner_name)
def test_the_core_imports_neither_ray_nor_mlflow_nor_the_cluster(path):
    names = imported(path)
    assert not [
        n for n in names if belongs_to(n, ("ray", "mlflow", "selfray.cluster", "selfray.commands"))
    ]


PRIVATE_PARTS = ("_private", "_internal")


@pytest.mark.parametrize("path", FILES, ids=inner_name)
def test_only_one_file_knows_rays_private_modules(path):
    if inner_name(path) == "cluster/ray_internals.py":
        return
    private = [
        name
        for name in imported(path)
        if belongs_to(name, ("ray",)) and any(part in name.split(".") for part in PRIVATE_PARTS)
    ]
    assert private == []


METHODS = [path for path in FILES if inner_name(path).startswith("methods/")]


@pytest.mark.parametrize("path", METHODS, ids=inner_name)
def test_no_method_imports_another_method(path):
    assert not [name for name in imported(path) if belongs_to(name, ("selfray.methods",))]


CORE_WITHOUT_THE_CLUSTER = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "mlflow"):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Refuse())
import selfray

for info in pkgutil.walk_packages(selfray.__path__, "selfray."):
    if info.name.split(".")[1] not in ("cluster", "commands"):
        importlib.import_module(info.name)

from helpers import all_methods, experiment, start, train_for

for method in all_methods():
    wanted = experiment(method)
    steps = train_for(start(wanted), wanted, 2)
    print(method.name, len(steps), wanted.identity)
assert not {"ray", "mlflow"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def trained_without_the_cluster() -> list[list[str]]:
    """For every method its name, how many steps it trained, and its experiment's identity."""
    path = [SOURCE_ROOT, Path(__file__).parents[1]]
    out = run_python(CORE_WITHOUT_THE_CLUSTER, path, OMP_NUM_THREADS="1", PYTHONHASHSEED="1")
    return [line.split() for line in out.splitlines()]


def test_the_core_imports_and_trains_every_method_without_ray_and_mlflow(
    trained_without_the_cluster,
):
    assert {"simclr", "mae"} <= {name for name, _, _ in trained_without_the_cluster}
    assert {steps for _, steps, _ in trained_without_the_cluster} == {"2"}


def test_an_experiment_has_the_same_identity_in_every_process(trained_without_the_cluster):
    identities = {name: identity for name, _, identity in trained_without_the_cluster}
    # all_methods makes its heads as small as these; only the projector's hidden layer differs.
    assert identities["mae"] == experiment(MAE).identity
    assert identities["simclr"] != experiment(SIMCLR).identity


STARTS = """
import sys

def loaded(*names):
    return [name for name in names if name in sys.modules]

import selfray.data.source
assert not loaded("torch", "ray"), "a data task"
import selfray.cluster.worker
assert not loaded("torch"), "Ray Train's controller, and a worker before it has its task"
import selfray.cluster.launch, selfray.cluster.training, selfray.recipes
assert selfray.recipes.every()
# timm builds encoders, which workers and probes do; its torchvision loads torch's compiler, and
# sympy comes with what shares weights out among ranks.
print(loaded("timm", "torchvision", "torch._dynamo", "sympy", "matplotlib", "mlflow"))
"""


def test_no_process_of_a_run_imports_what_it_does_not_use():
    """Each of these takes a second or more."""
    assert run_python(STARTS, [SOURCE_ROOT], OMP_NUM_THREADS="1") == "[]"
