"""The suite that asv runs skips what cannot be measured in `setup`; `make asv-quick` runs all of it."""

from __future__ import annotations

import ast
import importlib
import itertools
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "asv_benchmarks"

pytestmark = [pytest.mark.tree, pytest.mark.needs("torch", "jax", "asv")]


@pytest.fixture
def suite(monkeypatch):
    """Modules of the suite by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_growth_skips_in_setup_what_has_more_tensors_than_numbers(suite):
    benchmark = suite("step").Growth()
    with pytest.raises(NotImplementedError, match="10000 bytes are less than 10000 float32 tensors"):
        benchmark.setup(10_000, 10_000)
    for size, count in itertools.product(*benchmark.params):
        if size >= 4 * count:
            benchmark.setup(size, count)
    assert benchmark.track_step(10_000, 1) > 0


@pytest.mark.parametrize("path", sorted(FOLDER.glob("benchmarks/*.py")), ids=lambda path: path.stem)
def test_no_benchmark_skips_outside_of_its_setup(path):
    """asv counts it as a failure there. `wanted` is for setups."""
    functions = [x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.FunctionDef)]
    raising = {
        function.name
        for function in functions
        for x in ast.walk(function)
        if isinstance(x, ast.Name) and x.id == "NotImplementedError"
    }
    calling = {
        function.name
        for function in functions
        for x in ast.walk(function)
        if isinstance(x, ast.Call) and isinstance(x.func, ast.Name) and x.func.id == "wanted"
    }
    assert raising <= {"setup", "wanted"}
    assert calling <= {"setup"}


def test_every_contender_is_to_be_had_where_its_needs_are(suite, monkeypatch):
    contenders = suite("contenders")
    for name in (*contenders.TORCH, *contenders.NUMPY, *contenders.JAX):
        if "pytorch_optimizer" not in name:  # of the extra `bench` alone
            contenders.wanted(name)
    lacking = contenders.TORCH["loop"]._replace(needs=("no_such_module",))
    monkeypatch.setitem(contenders.TORCH, "loop", lacking)
    with pytest.raises(NotImplementedError, match="loop needs no_such_module"):
        suite("step").BesideTorch().setup("loop", *suite("common").MODEL)


def test_every_benchmark_has_a_name_for_people_and_no_two_sizes_share_a_graph(suite):
    sizes = suite("common").MODEL
    for module in ("step", "variants"):
        for benchmark in vars(suite(module)).values():
            if not isinstance(benchmark, type) or benchmark.__module__ != f"benchmarks.{module}":
                continue
            tracked = [getattr(benchmark, name) for name in vars(benchmark) if name.startswith("track_")]
            assert all(function.pretty_name for function in tracked)
            assert benchmark.unit not in ("unit", "ratio")
            if benchmark.__name__ not in ("Growth", "Start"):  # which have their own, or none
                assert benchmark.params[-1] == sizes


def test_turns_give_every_contender_as_many_rounds(suite):
    common = suite("common")
    seconds = common.turns({"a": lambda: None, "b": lambda: None}, rounds=3)
    assert len(seconds["a"]) == len(seconds["b"]) == 60  # twenty times, since they are short
    assert common.best({"a": [2.0, 30.0], "b": [1.0, 9.0]}, "a", "b") == 2.0
