"""The floors: recadam_core below the backends, these below the harness, and no circle anywhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tree
DEFINED = re.compile(r"^def (test_\w+)", re.M)
SCRIPT = Path(__file__).parents[2] / "docs" / "floors.py"


@pytest.fixture(scope="module")
def floors():
    spec = importlib.util.spec_from_file_location("floors", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_test_that_is_called_light_is_there():
    tests = Path(__file__).parents[1]
    listed = re.findall(r'^    "(test_\w+)": \d+,$', (tests / "conftest.py").read_text("utf-8"), re.M)
    there = {name for path in tests.rglob("test_*.py") for name in DEFINED.findall(path.read_text("utf-8"))}
    assert len(listed) > 30
    assert set(listed) <= there


def test_no_import_leads_up(floors):
    assert floors.upward(floors.graph()) == []


def test_there_is_no_circle(floors):
    assert floors.circle(floors.graph()) == []


def test_what_leads_up_and_round_is_found(floors):
    edges = {
        "recadam_core.a": {"recadam_torch.b"},
        "recadam_torch.b": {"recadam_core.c", "recadam_jax.d", "recadam_harness.e"},
        "recadam_core.c": {"recadam_core.a"},
        "recadam_harness.e": {"recadam_torch.b"},
        "recadam_jax.d": set(),
    }
    assert floors.upward(edges) == [
        "recadam_core.a -> recadam_torch.b",
        "recadam_torch.b -> recadam_harness.e",
        "recadam_torch.b -> recadam_jax.d",
    ]
    assert len(floors.circle(edges)) > 2


def test_every_module_is_on_a_floor(floors):
    names = floors.modules()
    assert {"recadam_core.update", "recadam_torch", "recadam_jax.backend", "recadam_harness.run"} <= set(
        names
    )
    assert sorted({floors.floor(name) for name in names}) == [0, 1, 2]


@pytest.mark.parametrize("package", ["recadam_core", "recadam_harness"])
def test_it_is_imported_without_a_framework(package):
    code = f"import sys, {package}; print(*{{'torch', 'jax', 'numba', 'matplotlib'}} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == []


def test_the_picture_of_the_documentation_is_that_of_the_sources(floors):
    assert floors.PICTURE.read_text(encoding="utf-8") == floors.picture(floors.graph())
