"""The import graph of the packages, read from the sources; as a script it draws docs/images/floors.svg.

python docs/floors.py
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    ("recadam_core",),
    ("recadam_numpy", "recadam_torch", "recadam_jax"),
    ("recadam_harness",),
)
FOLDERS = {
    "recadam_core": ROOT / "recadam_core",
    "recadam_harness": ROOT / "recadam_harness",
    **{name: ROOT / "backends" / name for name in FLOORS[1]},
}


def modules() -> dict[str, Path]:
    """Every module by its name."""
    found = {}
    for name, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = (name, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a module imports, at its top or later."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            parts = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {part if part in known else origin for part in parts}
    return {target for target in found if target in known and target != name}


def graph() -> dict[str, set[str]]:
    """What each module imports."""
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def floor(module: str) -> int:
    """The floor that a module is on: 0 is the lowest."""
    package = module.split(".")[0]
    return next(i for i, names in enumerate(FLOORS) if package in names)


SHARED = {("recadam_torch", "recadam_numpy")}
"""The one step aside: PyTorch's tensors on the CPU are stepped by NumPy's loop, over the same memory."""


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports that lead up, or from one backend into another."""
    wrong = []
    for module, targets in edges.items():
        for target in targets:
            packages = module.split(".")[0], target.split(".")[0]
            beside = floor(module) == floor(target) and len(set(packages)) > 1 and packages not in SHARED
            if floor(target) > floor(module) or beside:
                wrong.append(f"{module} -> {target}")
    return sorted(wrong)


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle of imports; empty where there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []
