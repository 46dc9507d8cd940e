"""Every small change to a kernel is noticed by the conformance kit; the list is in `mutants`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("mutants", HERE / "mutants.py")
mutants = importlib.util.module_from_spec(spec)
sys.modules["mutants"] = mutants
spec.loader.exec_module(mutants)


def show(group):
    command = [sys.executable, str(HERE / "mutants.py"), group]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.tree
@pytest.mark.heavy
@pytest.mark.parametrize("group", mutants.GROUPS)
def test_every_mutation_is_caught(group):
    results = show(group)
    unchanged = [r for r in results if r["what"] == "nothing"]
    changed = [r for r in results if r["what"] != "nothing"]
    assert unchanged
    assert [r for r in unchanged if r["caught by"]] == []
    assert len(changed) == sum(mutation.group == group for mutation in mutants.MUTATIONS)
    assert [r for r in changed if r["caught by"] in ("", "failed")] == []


def test_every_kernel_is_mutated():
    modules = {mutation.module for mutation in mutants.MUTATIONS}
    assert {
        "recadam_core.update",
        "recadam_core.coefficients",
        "recadam_core.annealing",
        "recadam_numpy.kernel",
        "recadam_numpy.one_pass",
        "recadam_torch.plan",
        "recadam_torch.kernels.lists",
        "recadam_torch.kernels.compiled",
        "recadam_torch.kernels.numba",
        "recadam_torch.kernels.triton",
        "recadam_torch.memory",
        "recadam_jax.coefficients",
        "recadam_jax.transformation",
        "recadam_jax.backend",
    } <= modules
    assert len(mutants.MUTATIONS) == len({(m.module, m.variants, m.what) for m in mutants.MUTATIONS}) == 82


@pytest.mark.tree
def test_every_mutation_finds_its_text_once():
    root = HERE.parents[1]
    for mutation in mutants.MUTATIONS:
        path = mutation.module.replace(".", "/") + ".py"
        (source,) = (file for file in (root / path, root / "backends" / path) if file.exists())
        assert source.read_text(encoding="utf-8").count(mutation.old) == 1, mutation
