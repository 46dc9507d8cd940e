"""What docs/versions.md says was tried is what pyproject.toml declares."""

from __future__ import annotations

import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LISTS = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
DECLARED = [r for r in map(Requirement, chain.from_iterable(LISTS)) if r.specifier]

pytestmark = pytest.mark.tree  # the table is written after this ran elsewhere


def rows():
    lines = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8").splitlines()
    head, _, *rest = [[cell.strip() for cell in x.strip("|").split("|")] for x in lines if x.startswith("|")]
    return [dict(zip(head, cells, strict=True)) for cells in rest]


def tried(row):
    """Versions by requirement, of those that the row names."""
    return [(r, Version(row[r.name])) for r in DECLARED if row.get(r.name, "–") != "–"]


def test_every_python_of_the_classifiers_was_tried():
    declared = [x.split(" :: ")[2] for x in PROJECT["classifiers"] if x.startswith("Programming Language ::")]
    newest = [row["Python"].rpartition(".")[0] for row in rows() if row["versions"] == "newest"]
    assert newest == [x for x in declared if "." in x]
    assert all(int(row["passed"]) > 800 for row in rows())


def test_no_version_is_below_its_bound_and_the_lowest_are_the_bounds():
    for row in rows():
        assert len(tried(row)) >= 5
        assert [(r, v) for r, v in tried(row) if v not in r.specifier] == []
    (lowest,) = (row for row in rows() if row["versions"] == "lowest")
    assert lowest["Python"].startswith(PROJECT["requires-python"].removeprefix(">="))
    assert [r for r, v in tried(lowest) if r.name != "torch" and Version(str(r.specifier)[2:]) != v] == []


def test_a_dependency_has_one_bound_wherever_it_is_declared():
    bounds = {(r.name, str(r.specifier)) for r in DECLARED}
    assert len(bounds) == len({name for name, _ in bounds})
    assert all(bound.startswith(">=") and "," not in bound for _, bound in bounds)
