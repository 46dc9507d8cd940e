from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import array_api_strict
import numpy as np
import pytest

pytest.importorskip("mpmath")

from recadam_core import (
    Backend,
    Coefficients,
    Moments,
    RecAdam,
    RecAdamError,
    apply,
    available_backends,
    backend_for,
    get_backend,
    importance_from,
    update,
)
from recadam_core import backends as registry
from recadam_core.backends import Specification
from recadam_core.conformance import Case
from recadam_core.conformance.claims import Claim, check


def python(code, *flags):
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False)


def test_importing_recadam_core_imports_no_framework():
    code = "import recadam_core, sys; assert not {'torch','jax'} & set(sys.modules)"
    assert python(code).returncode == 0
    code = (
        "import recadam_core as rc, numpy as np, sys; o = rc.RecAdam(); p = {'w': np.ones(2)};"
        "o.step(p, p, o.init(p, p)); rc.available_backends();"
        "import recadam_harness, recadam_core.conformance;"
        "assert not {'torch', 'jax', 'matplotlib', 'sklearn', 'tokenizers'} & set(sys.modules)"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.needs("torch", "jax")
def test_one_backend_loads_one_framework():
    assert python("import recadam_torch, sys; assert 'jax' not in sys.modules").returncode == 0
    assert python("import recadam_jax, sys; assert 'torch' not in sys.modules").returncode == 0


@pytest.mark.needs("torch", "jax")
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
    with pytest.raises(RecAdamError, match=r"no backend serves this: it is list; give an array"):
        backend_for([1.0])


class Elsewhere:
    """The entry point of a stranger's backend."""

    value = "mylib_recadam:backend"

    def __init__(self, found, of="mylib-recadam"):
        self.found, self.dist = found, SimpleNamespace(name=of)

    def load(self):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_a_backend_whose_library_is_missing_says_what_to_install(monkeypatch):
    missing = ModuleNotFoundError("No module named 'no_such_library'", name="no_such_library")
    monkeypatch.setattr(registry, "_announced", lambda: {"nolib": Elsewhere(missing, "recadam-core")})
    with pytest.raises(
        RecAdamError, match=r"backend 'nolib' needs 'no_such_library'.*pip install 'recadam-core\[nolib\]'"
    ):
        get_backend("nolib")
    assert available_backends() == []


def test_a_library_of_the_standard_is_served_by_the_specification():
    backend = get_backend("array_api_strict")
    assert backend.name == "array_api_strict"
    assert backend.from_numpy(np.ones(2, dtype=np.float32)).dtype == backend.xp.float32
    with pytest.raises(RecAdamError, match="unknown backend 'json'"):
        get_backend("json")  # a module, and no array library


@pytest.mark.parametrize(
    ("name", "serves"),
    [
        ("jax.numpy", "jax"),
        ("array_api_compat.numpy", "numpy"),
        ("array_api_compat.torch", "torch"),
        pytest.param("dask.array", "dask.array", marks=pytest.mark.needs("dask")),
    ],
)
def test_a_module_that_makes_arrays_stands_for_what_serves_them(name, serves):
    backend = get_backend(name)
    assert backend.name == serves
    assert backend.owns(backend.from_numpy(np.ones(2, np.float32)))
    assert get_backend(backend.name).name == serves


@pytest.mark.parametrize(
    "name", ["", None, 3, [], "a..b", ".x", "no such", "__main__", "numpy.linalg", "dask"]
)
def test_a_name_that_makes_no_arrays_is_unknown(name):
    with pytest.raises(
        RecAdamError, match=rf"^unknown backend {re.escape(repr(name))}: .*\(jax, numpy, torch\)$"
    ):
        get_backend(name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raise RuntimeError('no\\ndriver')", "RuntimeError: no driver"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def asarray(x):\n    return [x]", "no backend serves this: it is list; give an array"),
        ("from numpy.ma import asarray", "no backend serves this: it is MaskedArray"),
    ],
)
def test_a_library_that_does_not_load_says_why_in_one_line(monkeypatch, tmp_path, text, says):
    (tmp_path / "strangelib").mkdir()
    (tmp_path / "strangelib" / "core.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecAdamError) as caught:
        get_backend("strangelib.core")
    for name in ("strangelib", "strangelib.core"):
        sys.modules.pop(name, None)
    told = "backend 'strangelib.core': what is installed makes no array of use here: "
    assert str(caught.value).startswith(told + says)
    assert "\n" not in str(caught.value)


def test_the_backend_of_a_type_is_looked_for_once(monkeypatch):
    monkeypatch.setattr(registry, "_serving", {})
    looked = []
    monkeypatch.setattr(
        registry, "entry_points", lambda group: looked.append(group) or entry_points(group=group)
    )
    params = {name: np.ones(2) for name in "abc"}
    optimizer = RecAdam()
    state = optimizer.init(params, params)
    for _ in range(3):
        params, state = optimizer.step(params, params, state)
    assert len(looked) == 1


def test_a_library_whose_astype_knows_no_copy_walks_the_same_bits(monkeypatch):
    """As MLX's."""
    astype = array_api_strict.astype
    monkeypatch.setattr(array_api_strict, "astype", lambda x, dtype, /: astype(x, dtype))
    monkeypatch.delattr(array_api_strict, "clip")
    backend = get_backend("array_api_strict")
    claim = Claim("exact", "exact", "float32", (Case(arrays="mixed", dtype="float32", steps=8).name,))
    assert check(backend, backend.capabilities.variants[0], claim).verdict == "yes"
    xp = array_api_strict
    found = importance_from({"w": xp.asarray([1.0, 4.0, 0.0])})["w"]
    np.testing.assert_array_equal(np.asarray(found), importance_from({"w": np.array([1.0, 4.0, 0.0])})["w"])
    theta = xp.asarray([1.0], dtype=xp.float32)
    state = Moments(xp.asarray([0.0]), xp.asarray([0.0]))  # in more bits
    delta, new = update(theta, theta, state, None, Coefficients(0.5, 0.5, 0.5, 1.0, 0.0, 0.0))
    assert (delta.dtype, new.m.dtype, apply(theta, delta).dtype) == (xp.float64, xp.float64, xp.float32)


@pytest.mark.needs("jax")
def test_jax_refuses_to_make_float64_into_float32():
    with pytest.raises(RecAdamError, match="float64 into float32; set JAX_ENABLE_X64=1"):
        get_backend("jax").from_numpy(np.ones(1))


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (AttributeError("no 'backend'"), "AttributeError: no 'backend'"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "ModuleNotFoundError: No module named 'x'"),
        (Specification, "it is a class; announce an instance"),
        (object(), "it lacks members of recadam_core.Backend; add them"),
        (Specification(np), "its name is 'numpy'; give it the entry point's"),
    ],
)
def test_a_broken_backend_is_named_and_keeps_no_array_from_its_own(monkeypatch, found, says):
    announced = {"mylib": Elsewhere(found), **registry._announced()}
    monkeypatch.setattr(registry, "_announced", lambda: announced)
    monkeypatch.setitem(sys.modules, "mylib", ModuleType("mylib"))
    monkeypatch.setattr(registry, "_serving", {})
    where = "backend 'mylib' (mylib_recadam:backend of mylib-recadam) does not load: "
    with pytest.raises(RecAdamError) as caught:
        get_backend("mylib")
    assert str(caught.value) == where + says
    with pytest.warns(UserWarning, match="does not load"):
        assert backend_for(np.ones(2)).name == "numpy"
