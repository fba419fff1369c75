"""Imports run one way: a package may import only from those above it in this list, and modules never in a circle."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import distil_rank

ORDER = [
    "errors",
    "artefact",
    "options",
    "origin",
    "lowrank",
    "measure",
    "embedding",
    "tracking",
    "data",
    "evaluation",
    "training",
    "compression",
    "codes",
    "recommendation",
    "report",
    "commands",
    "cli",
    "__main__",
]
PACKAGE = Path(distil_rank.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
}
# Whose import takes seconds or brings what a user of the library may not want, and the packages that may know it.
HEAVY = {
    "mlflow": {"tracking"},
    "lightning": {"data", "embedding", "tracking", "training", "commands", "cli", "codes"},
    "esm": {"embedding"},
    "matplotlib": {"report"},
    "sklearn": {"evaluation"},
    "faiss": {"codes"},
    "obstore": {"embedding"},
    "ray": {"embedding"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


OURS = {
    module: {name.removeprefix("distil_rank.") for name in imports(path)} & MODULES.keys()
    for module, path in MODULES.items()
}


def test_every_package_has_its_place():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages | {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(ORDER)


def test_packages_import_only_from_those_before_them():
    place = {package: index for index, package in enumerate(ORDER)}
    edges = [(module.split(".")[0], name.split(".")[0]) for module, names in OURS.items() for name in names]
    assert len(edges) > 100
    assert not [f"{package} imports {other}" for package, other in edges if place[other] > place[package]]


def test_no_module_imports_itself_in_a_circle():
    assert len(list(TopologicalSorter(OURS).static_order())) == len(MODULES)


def test_heavy_dependencies_stay_in_their_rooms():
    for module, path in MODULES.items():
        for name in {name.split(".")[0] for name in imports(path)} & HEAVY.keys():
            assert module.split(".")[0] in HEAVY[name], f"{module} imports {name}"


SMALL_INSTALL = """
import importlib.abc, sys
from importlib.metadata import packages_distributions

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"{name} is not part of the small install", name=name)

PRESENT = {"distil_rank", "torch", "torchgen", "functorch", "numpy", "safetensors"}
PRESENT |= {"filelock", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec"}  # torch's
ABSENT = packages_distributions().keys() - PRESENT
assert {"lightning", "mlflow", "scipy", "pyarrow", "sklearn", "esm"} <= ABSENT
sys.meta_path.insert(0, Absent())

import torch
import distil_rank as dr
from distil_rank import *

model = torch.nn.Sequential(torch.nn.Linear(12, 12))
dr.compress(model, {"0": 3}, data=torch.randn(200, 12) @ torch.randn(12, 12))
dr.save(model[0], sys.argv[1])
x = torch.randn(4, 12)
assert torch.equal(dr.load(sys.argv[1])(x), model[0](x))

from distil_rank.lowrank.predictor import Predictor

dr.save(Predictor(dr.LowRankLinear(12, 12, 2), "classification", "abc", "tanh", calibration=1), sys.argv[1])
result = dr.load(sys.argv[1]).predict(x.numpy())
assert len(result.predicted) == len(result.sets) == 4 and result.probabilities.shape == (4, 3)
"""


def test_the_public_names_a_student_and_a_predictor_need_torch_numpy_and_safetensors_alone(tmp_path):
    subprocess.run([sys.executable, "-c", SMALL_INSTALL, str(tmp_path / "student")], check=True)
