"""Imports run one way: a module may import only from the levels below its own."""

import ast
from pathlib import Path

import distil_rank

LEVELS = [
    {"errors", "compact_map"},
    {
        "sequences",
        "moments",
        "metrics",
        "latency",
        "bootstrap",
        "digests",
        "guard",
        "interrupts",
        "provenance",
        "run_store",
    },
    {"esm2", "store", "splits", "solvers", "own_layer", "streaming", "capture"},
    {"fidelity", "agreement"},
    {"low_rank"},
    {"backbones", "formats", "store_writer", "teacher", "int8", "allocate"},
    {"embedder"},
    {"extraction"},
    {"multi_device"},
    {"embed"},
    {"data"},
    {"distil", "tracking"},
    {"callbacks"},
    {"tune", "run_logger", "registry", "ui"},
    {"evaluate", "compression", "artefact", "export"},
    {"report", "figures"},
    {"experiment", "deploy"},
    {"pipeline"},
    {"cli"},
    {"__main__"},
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}
PACKAGE = Path(distil_rank.__file__).parent


def imported_modules(path: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "distil_rank":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distil_rank."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("distil_rank.")}
    return found & LEVEL.keys()


def test_every_module_has_a_level():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} <= LEVEL.keys()


def test_imports_run_from_lower_levels_to_higher_ones():
    wrong = [
        f"{path.stem} imports {name}"
        for path in sorted(PACKAGE.glob("*.py"))
        if path.stem != "__init__"
        for name in sorted(imported_modules(path))
        if LEVEL[name] > LEVEL[path.stem] or (LEVEL[name] == LEVEL[path.stem] and name != path.stem)
    ]
    assert not wrong
