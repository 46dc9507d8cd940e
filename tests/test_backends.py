from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from recadam_core import Backend, RecAdamError, available_backends, backend_for, get_backend
from recadam_core import backends as registry


def python(code, *flags):
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False)


def test_importing_recadam_core_imports_no_framework():
    code = "import recadam_core, sys; assert not {'torch','jax'} & set(sys.modules)"
    assert python(code).returncode == 0
    code = (
        "import recadam_core as rc, numpy as np, sys; o = rc.RecAdam(); p = {'w': np.ones(2)};"
        "o.step(p, p, o.init(p, p)); rc.available_backends();"
        "import recadam_core.finetuning, recadam_core.conformance;"
        "assert not {'torch', 'jax', 'matplotlib', 'sklearn', 'tokenizers'} & set(sys.modules)"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_one_backend_loads_one_framework():
    assert python("import recadam_torch, sys; assert 'jax' not in sys.modules").returncode == 0
    assert python("import recadam_jax, sys; assert 'torch' not in sys.modules").returncode == 0


def test_the_three_are_found_by_name_and_by_array():
    import jax.numpy as jnp
    import torch

    assert available_backends() == ["jax", "numpy", "torch"]
    for array, name in ((np.ones(1), "numpy"), (torch.ones(1), "torch"), (jnp.ones(1), "jax")):
        assert backend_for(array).name == name
        assert isinstance(get_backend(name), Backend)


def test_an_unknown_name_and_a_thing_that_is_no_array():
    with pytest.raises(RecAdamError, match=r"unknown backend 'pytorch': did you mean 'torch'?"):
        get_backend("pytorch")
    with pytest.raises(RecAdamError, match=r"builtins\.list is no array"):
        backend_for([1.0])


def test_a_backend_whose_library_is_missing_says_what_to_install(monkeypatch):
    point = SimpleNamespace(name="nolib", value="nolib:backend", load=lambda: __import__("no_such_library"))
    monkeypatch.setattr(registry, "_announced", lambda: {"nolib": point})
    with pytest.raises(
        RecAdamError, match=r"backend 'nolib' needs 'no_such_library'.*pip install 'recadam-core\[nolib\]'"
    ):
        get_backend("nolib")
    assert available_backends() == []


def test_an_incomplete_backend_is_refused(monkeypatch):
    point = SimpleNamespace(name="half", value="half:backend", load=lambda: SimpleNamespace(name="half"))
    monkeypatch.setattr(registry, "_announced", lambda: {"half": point})
    with pytest.raises(RecAdamError, match="half:backend lacks members"):
        get_backend("half")


def test_a_library_of_the_standard_is_served_by_the_specification():
    backend = get_backend("array_api_strict")
    assert backend.name == "array_api_strict"
    assert backend.from_numpy(np.ones(2, dtype=np.float32)).dtype == backend.xp.float32
    with pytest.raises(RecAdamError, match="unknown backend 'json'"):
        get_backend("json")  # a module, and no array library


def test_jax_refuses_to_make_float64_into_float32():
    with pytest.raises(RecAdamError, match="float64 into float32; set JAX_ENABLE_X64=1"):
        get_backend("jax").from_numpy(np.ones(1))
