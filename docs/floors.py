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


WIDTH, HEIGHT, GAP = 210, 62, 58
ROLES = {
    "recadam_core": "specification and conformance kit; needs no framework",
    "recadam_numpy": "NumPy, and numba's loop",
    "recadam_torch": "torch.optim.Optimizer",
    "recadam_jax": "optax transformation",
    "recadam_harness": "trains, measures, compares, reports",
}


def picture(edges: dict[str, set[str]]) -> str:
    """The floors as an SVG: the packages, and an arrow wherever one imports another."""
    between = {(a.split(".")[0], b.split(".")[0]) for a, targets in edges.items() for b in targets}
    total = 3 * WIDTH + 2 * GAP
    boxes = {}
    for level, names in enumerate(FLOORS):
        width = WIDTH if len(names) > 1 else total
        top = 20 + (len(FLOORS) - 1 - level) * (HEIGHT + GAP)
        boxes.update({name: (20 + i * (WIDTH + GAP), top, width) for i, name in enumerate(names)})
    height = 3 * HEIGHT + 2 * GAP + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total + 40} {height}" ',
        'font-family="sans-serif"><defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" ',
        'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
        f'<rect width="{total + 40}" height="{height}" fill="#fff"/>',
    ]
    for name, (x, y, width) in boxes.items():
        box, centred = (
            f'x="{x}" y="{y}" width="{width}" height="{HEIGHT}"',
            f'text-anchor="middle" x="{x + width / 2}"',
        )
        lines += [
            f'<rect {box} rx="6" fill="#eef4f7" stroke="#0b6e99"/>',
            f'<text {centred} y="{y + 27}" font-size="15" font-weight="bold">{name}</text>',
            f'<text {centred} y="{y + 47}" font-size="11">{ROLES[name]}</text>',
        ]

    def arrow(one: str, other: str, x: float) -> None:
        """Down from one package to another; beside it where they are on one floor."""
        if one == other or (one, other) not in between:
            return
        ends = x, boxes[one][1] + HEIGHT, x, boxes[other][1] - 2
        if floor(one) == floor(other):
            y = boxes[one][1] + HEIGHT / 2
            ends = boxes[one][0], y, boxes[other][0] + WIDTH + 2, y
        places = " ".join(f'{name}="{at}"' for name, at in zip(("x1", "y1", "x2", "y2"), ends, strict=True))
        lines.append(f'<line {places} stroke="#555" marker-end="url(#a)"/>')

    (low,), backends, (high,) = FLOORS
    for name in backends:
        x = boxes[name][0] + WIDTH / 2
        arrow(name, low, x)
        arrow(high, name, x)
        for other in backends:
            arrow(name, other, 0.0)
    arrow(high, low, boxes[backends[-1]][0] - GAP / 2)
    return "\n".join([*lines, "</svg>"]) + "\n"


PICTURE = ROOT / "docs" / "images" / "floors.svg"

if __name__ == "__main__":
    PICTURE.write_text(picture(graph()), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
