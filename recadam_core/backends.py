"""Backends: what one is, and how they are found.

A backend serves one array library. It is announced by an entry point in the group
`recadam_core.backends` whose name is the import name of that library:

    [project.entry-points."recadam_core.backends"]
    torch = "recadam_torch:backend"

so that a backend is loaded only when its library already is, or when it is asked for by name.
Importing recadam_core imports no framework.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from .arrays import Array, NumpyArray, kind_of, library, not_plain
from .coefficients import Coefficients
from .errors import RecAdamError, unknown
from .interrupts import deferred
from .update import Moments, apply, pull, update
from .variants import Capabilities, Variant, installed

__all__ = [
    "GROUP",
    "Backend",
    "Shared",
    "Specification",
    "available_backends",
    "backend_for",
    "get_backend",
    "pulled",
]

GROUP = "recadam_core.backends"
"""The entry-point group in which backends are announced."""


class Shared(NamedTuple):
    """Arrays that share the coefficients of a step; lists of equal length.

    Example:
        >>> w, c = np.ones(1), Coefficients(0.9, 0.99, step=0.5, eps=0.0, pull=0.0, decay=0.0)
        >>> group = Shared(["w"], [w], [w], [Moments.zeros_like(w)], None, c)
        >>> Specification(np).step(*group[1:])[0]
        [array([0.5])]
    """

    names: Sequence[Any]  # of the parameters, for messages
    params: Sequence[Array]
    grads: Sequence[Array]
    moments: Sequence[Moments]
    anchors: Sequence[Array] | None  # None where nothing is pulled
    c: Coefficients
    importances: Sequence[Array] | None = None  # None where the pull is not weighed


@runtime_checkable
class Backend(Protocol):
    """The kernel of one array library, and its manners.

    One whose `step` writes into what it is given has a method `step_groups`, too, which `RecAdam` calls
    instead: of a list of `Shared` it returns a list of what `step` returns, and refuses what it cannot step
    before it writes anything. One that takes the pull alone, as `Specification` does, has a method `pull`.

    Example:
        >>> isinstance(get_backend("numpy"), Backend)
        True
    """

    name: str  # import name of the array library
    capabilities: Capabilities

    def owns(self, array: Array) -> bool:
        """Whether `array` belongs to this backend's library."""
        ...

    def step(
        self,
        params: Sequence[Array],
        grads: Sequence[Array],
        moments: Sequence[Moments],
        anchors: Sequence[Array] | None,
        c: Coefficients,
        importances: Sequence[Array] | None = None,
    ) -> tuple[list[Array], list[Moments]]:
        """One step for arrays that share their coefficients: new parameters, new moments.

        Changes none of its arguments. `anchors` is None where nothing is pulled; `importances`, by which the
        pulls are multiplied, where each is 1.
        """
        ...

    def from_numpy(self, array: NumpyArray, dtype: str | None = None) -> Array:
        """A copy of a NumPy array in this library, on its default device."""
        ...

    def to_numpy(self, array: Array) -> NumpyArray:
        """A copy of this library's array in NumPy."""
        ...

    def copy(self, array: Array) -> Array:
        """A copy that shares nothing with the array, its memory and its gradient tape included."""
        ...

    def precision(self, dtype: str) -> contextlib.AbstractContextManager[Any]:
        """A context in which arrays of this dtype can be made (float64 is off by default in JAX)."""
        ...


def pulled(
    params: Sequence[Array],
    anchors: Sequence[Array],
    recall: float,
    importances: Sequence[Array] | None = None,
) -> list[Array]:
    """`recadam_core.pull` and `apply`, array by array: the new parameters.

    Example:
        >>> pulled([np.ones(1)], [np.zeros(1)], 1.0)
        [array([0.5])]
    """
    weights = [None] * len(params) if importances is None else importances
    return [
        apply(theta, pull(theta, anchor, recall, importance))
        for theta, anchor, importance in zip(params, anchors, weights, strict=True)
    ]


class Specification:
    """The spec itself as a backend, for any array library that follows the array API standard.

    Example:
        >>> Specification(np).name
        'numpy'
    """

    capabilities = Capabilities(variants=(Variant("functional", pull=pulled),))

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.name: str = library(xp)

    def owns(self, array: Array) -> bool:
        """Whether the array's namespace is this one."""
        xp, _ = kind_of(array)
        return xp is not None and library(xp) == library(self.xp)

    def step(
        self,
        params: Sequence[Array],
        grads: Sequence[Array],
        moments: Sequence[Moments],
        anchors: Sequence[Array] | None,
        c: Coefficients,
        importances: Sequence[Array] | None = None,
    ) -> tuple[list[Array], list[Moments]]:
        """`update` and `apply`, array by array."""
        stars, weights = ([None] * len(params) if xs is None else xs for xs in (anchors, importances))
        new = [
            update(theta, grad, state, anchor, c, importance)
            for theta, grad, state, anchor, importance in zip(
                params, grads, moments, stars, weights, strict=True
            )
        ]
        return [apply(theta, delta) for theta, (delta, _) in zip(params, new, strict=True)], [
            s for _, s in new
        ]

    def pull(
        self,
        params: Sequence[Array],
        anchors: Sequence[Array],
        recall: float,
        importances: Sequence[Array] | None = None,
    ) -> list[Array]:
        """The pull alone: new parameters."""
        return pulled(params, anchors, recall, importances)

    def from_numpy(self, array: NumpyArray, dtype: str | None = None) -> Array:
        """A copy of a NumPy array in this namespace."""
        return self.xp.asarray(array, dtype=getattr(self.xp, dtype or array.dtype.name), copy=True)

    def to_numpy(self, array: Array) -> NumpyArray:
        """A copy in NumPy, through DLPack or the buffer protocol; bfloat16, which NumPy lacks, as float32."""
        if str(array.dtype).endswith("bfloat16"):
            array = self.xp.astype(array, self.xp.float32)
        try:
            return np.array(np.from_dlpack(array))
        except (AttributeError, TypeError, ValueError, RuntimeError, BufferError):
            return np.array(array)

    def copy(self, array: Array) -> Array:
        """A copy in new memory."""
        return self.xp.asarray(array, copy=True)

    def precision(self, dtype: str) -> contextlib.AbstractContextManager[Any]:
        """Nothing to switch."""
        return contextlib.nullcontext()


def _announced() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


@cache
def _load(name: str) -> Backend:
    point = _announced()[name]
    ours = point.dist is not None and point.dist.name == "recadam-core"
    try:
        # What is raised while a library sets itself up comes out as another error, or not at all.
        with deferred():
            loaded = point.load()
    except ImportError as error:
        # A part that is not there, of a library that is: another version of it than we know.
        if not ours or error.name is None or installed(error.name.partition(".")[0]):
            raise _broken(name, point, f"{type(error).__name__}: {error}") from error
        raise RecAdamError(
            f"backend {name!r} needs {error.name!r}, which is not installed; "
            f"pip install 'recadam-core[{name}]'"
        ) from error
    except Exception as error:
        raise _broken(name, point, f"{type(error).__name__}: {error}") from error
    if isinstance(loaded, type):
        raise _broken(name, point, "it is a class; announce an instance")
    if not isinstance(loaded, Backend):
        raise _broken(name, point, "it lacks members of recadam_core.Backend; add them")
    if loaded.name != name:
        raise _broken(name, point, f"its name is {loaded.name!r}; give it the entry point's")
    return loaded


def _broken(name: str, point: EntryPoint, what: str) -> RecAdamError:
    where = f" of {point.dist.name}" if point.dist else ""
    return RecAdamError(f"backend {name!r} ({point.value}{where}) does not load: {what}".replace("\n", " "))


def available_backends() -> list[str]:
    """Names of the announced backends whose array library is installed, without importing it.

    Returns:
        Names for `get_backend`, sorted.

    Example:
        >>> "numpy" in available_backends()
        True
    """
    return sorted(name for name in _announced() if installed(name))


def is_missing(name: str) -> bool:
    """Whether a backend has this name and its array library is not installed."""
    return name in _announced() and not installed(name)


def get_backend(name: str) -> Backend:
    """The backend of this name; imports its array library.

    A library without a backend of its own is served by the specification if its arrays follow the array API
    standard.

    Args:
        name: import name of an array library, as "torch", or of the module that makes its arrays, as
            "dask.array" or "jax.numpy".

    Returns:
        The backend.

    Raises:
        RecAdamError: when no backend has that name, or its library is not installed or does not load.

    Example:
        >>> get_backend("numpy").name
        'numpy'
    """
    announced = _announced()
    if not isinstance(name, str):
        raise unknown("backend", name, announced)
    if name in announced:
        return _load(name)
    if not all(part.isidentifier() for part in name.split(".")):
        raise unknown("backend", name, announced)
    try:
        module: Any = importlib.import_module(name) if installed(name) else None
        if hasattr(module, "asarray"):
            return backend_for(module.asarray(0.0))
    except Exception as error:  # whatever a stranger's code raises
        kind = "" if isinstance(error, RecAdamError) else f"{type(error).__name__}: "
        told = " ".join(f"{kind}{error}".split())
        raise RecAdamError(
            f"backend {name!r}: what is installed makes no array of use here: {told}"
        ) from error
    raise unknown("backend", name, announced)


_serving: dict[type, Backend] = {}


def backend_for(array: Array) -> Backend:
    """The backend that serves this array; the specification itself for other array API libraries.

    Args:
        array: an array of any library that follows the array API standard.

    Returns:
        The backend, which is looked for once for each type of array.

    Raises:
        RecAdamError: when the object is no array.

    Example:
        >>> backend_for(np.ones(3)).name
        'numpy'
    """
    if (known := _serving.get(type(array))) is not None:
        return known
    if wrong := not_plain(array):
        raise RecAdamError(f"no backend serves this: it {wrong}")
    chosen: Backend = Specification(kind_of(array)[0])
    for name in _announced():
        # An array of a library exists only where that library is loaded.
        if name not in sys.modules:
            continue
        try:
            backend = _load(name)
        except RecAdamError as error:  # a stranger's, which must not keep other libraries from theirs
            warnings.warn(str(error), stacklevel=2)
            continue
        if backend.owns(array):
            chosen = backend
            break
    _serving[type(array)] = chosen
    return chosen
