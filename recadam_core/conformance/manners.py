"""What a backend owes beside the formula: copies that are copies, arguments left alone, arrays kept apart."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..arrays import NumpyArray
from ..backends import Backend
from ..errors import RecAdamError
from ..optimizer import Functional, RecAdam, stepper_of
from ..variants import Variant
from .cases import Case
from .replay import Recording, check_same, read

__all__ = ["MANNERS"]

Arrays = dict[str, Any]
STEPS = 6


def _recording(dtype: str) -> Recording:
    return Case("decoupled", "sigmoid", arrays="few", dtype=dtype, steps=STEPS).recording()


class _Run:
    """One variant over the arrays of a case, with what it was given at hand."""

    def __init__(self, backend: Backend, variant: Variant, dtype: str, names: tuple[str, ...] = ()) -> None:
        self.backend, self.dtype = backend, dtype
        self.recording = _recording(dtype)
        self.group = self.recording.groups[0]
        self.names = names or tuple(self.group.theta0)
        self.anchors = self.place({n: x for n, x in self.group.anchors.items() if n in self.names})
        params = self.place({n: self.group.theta0[n] for n in self.names})
        self.stepper = stepper_of(backend, variant, params, dict(self.anchors), self.group.hp)

    def gradients(self, t: int) -> Arrays:
        return self.place({name: self.group.grads[name][t - 1] for name in self.names})

    def step(self, t: int, grads: Arrays | None = None) -> Arrays:
        lr = float(self.recording.lr[t - 1])
        return self.stepper(self.gradients(t) if grads is None else grads, lr)

    def walk(self) -> Arrays:
        params: Arrays = {}
        for t in range(1, STEPS + 1):
            params = self.step(t)
        return read(self.backend, params)

    def place(self, arrays: Arrays) -> Arrays:
        return {name: self.backend.from_numpy(x, self.dtype) for name, x in arrays.items()}


def copies(backend: Backend, variant: Variant, dtype: str) -> None:
    """What `from_numpy`, `to_numpy` and `copy` return shares no memory with what they were given."""
    numbers = np.arange(1.0, 5.0, dtype="float32" if dtype == "bfloat16" else dtype)
    array = backend.from_numpy(numbers, dtype)
    before = np.array(backend.to_numpy(array), copy=True)
    numbers[:] = 0
    if not np.array_equal(backend.to_numpy(array), before):
        raise RecAdamError("from_numpy shares memory with what it was given; copy there")
    told = backend.to_numpy(array)
    if told.flags.writeable:
        told[:] = 0
    if not np.array_equal(backend.to_numpy(array), before):
        raise RecAdamError("to_numpy shares memory with the array; copy there")
    twin = backend.copy(array)
    if twin is array or any(np.shares_memory(x, y) for x in _views(array) for y in _views(twin)):
        raise RecAdamError("copy shares memory with the array; copy there")


def _views(array: Any) -> Iterator[NumpyArray]:
    """The array's own memory, where NumPy can look at it."""
    try:
        yield np.from_dlpack(array)
    except Exception:  # another device, a dtype that NumPy lacks, no DLPack at all
        return


def owns(backend: Backend, variant: Variant, dtype: str) -> None:
    """`owns` accepts the backend's arrays and nobody else's."""
    if not backend.owns(backend.from_numpy(np.ones(2), dtype)):
        raise RecAdamError("owns refuses an array that the backend made; mend owns")
    others: list[Any] = [1.0, [1.0], None, object()]
    if backend.name != "numpy":
        others.append(np.ones(2))
    if backend.name != "torch" and "torch" in sys.modules:
        others.append(sys.modules["torch"].ones(2))
    for other in others:
        if backend.owns(other):
            raise RecAdamError(f"owns accepts a {type(other).__module__}.{type(other).__name__}; mend owns")


def arguments(backend: Backend, variant: Variant, dtype: str) -> None:
    """No step changes gradients or anchors, nor, where it is pure, parameters, moments or older results."""
    run = _Run(backend, variant, dtype)
    pure = isinstance(run.stepper, Functional)
    before: list[tuple[str, Arrays, dict[str, NumpyArray]]] = []

    def hold(what: str, arrays: Arrays) -> None:
        before.append((what, dict(arrays), read(backend, arrays)))

    hold("anchor", run.anchors)
    for t in range(1, STEPS + 1):
        grads = run.gradients(t)
        hold(f"gradient of step {t},", grads)
        params = run.step(t, grads)
        if pure:
            hold(f"parameter of step {t},", params)
            for i, letter in enumerate("mv"):
                hold(f"{letter} of step {t},", {n: x[i] for n, x in run.stepper.moments().items()})
        for what, arrays, values in before:
            check_same(values, read(backend, arrays), f"step {t} changed the {what}", "; copy before writing")


def names(backend: Backend, variant: Variant, dtype: str) -> None:
    """Gradients go to their parameters by name, in whatever order they come."""
    expected, run = _Run(backend, variant, dtype).walk(), _Run(backend, variant, dtype)
    params: Arrays = {}
    for t in range(1, STEPS + 1):
        params = run.step(t, dict(reversed(run.gradients(t).items())))
    what = "gradients in another order change"
    check_same(expected, read(backend, params), what, "; match parameters by name")


def apart(backend: Backend, variant: Variant, dtype: str) -> None:
    """Two optimizers that take turns go where each goes alone."""
    expected = _Run(backend, variant, dtype).walk()
    one, other = (_Run(backend, variant, dtype) for _ in range(2))
    first: Arrays = {}
    for t in range(1, STEPS + 1):
        first = one.step(t)
        if t > 2:
            other.step(t - 2)
    check_same(expected, read(backend, first), "a second optimizer changes", "; keep no state between them")


def not_finite(backend: Backend, variant: Variant, dtype: str) -> None:
    """A gradient that is no number makes that one parameter none, and no other."""
    run, clean = (_Run(backend, variant, dtype, ("vector",)) for _ in range(2))
    grads = {"vector": np.array(run.group.grads["vector"][0])}
    grads["vector"][:2] = np.nan, np.inf
    params = run.step(1, run.place(grads))
    got, expected = read(backend, params)["vector"], read(backend, clean.step(1))["vector"]
    if np.isfinite(got[:2]).any():
        raise RecAdamError("a gradient of NaN or infinity leaves its parameter finite; do not hide it")
    what = "NaN in one gradient changes"
    check_same({"vector": expected[2:]}, {"vector": got[2:]}, what, "; keep them apart")


def mixed_dtypes(backend: Backend, variant: Variant, dtype: str) -> None:
    """Parameters of several dtypes in one optimizer keep them."""
    dtypes, stepper = backend.capabilities.dtypes, _Run(backend, variant, dtype).stepper
    if not isinstance(stepper, Functional) or len(dtypes) < 2:
        return
    group = _recording("float32").groups[0]
    with backend.precision("float64"):
        params = {d: backend.from_numpy(group.theta0["vector"], d) for d in dtypes}
        grads = {d: backend.from_numpy(group.grads["vector"][0], d) for d in dtypes}
        optimizer = RecAdam(group.hp, stepper.backend)
        new, _ = optimizer.step(params, grads, optimizer.init(params, {}))
    for d, x in new.items():
        if x.dtype != params[d].dtype:
            raise RecAdamError(f"beside others a {d} parameter came back as {x.dtype}; keep each its dtype")


MANNERS: dict[str, Callable[[Backend, Variant, str], None]] = {
    "copies": copies,
    "owns": owns,
    "arguments": arguments,
    "names": names,
    "apart": apart,
    "nan": not_finite,
    "dtypes": mixed_dtypes,
}
"""What is looked at, by name; each raises what it finds."""
