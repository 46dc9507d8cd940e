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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

import numpy as np
from array_api_compat import array_namespace, is_array_api_obj

from .coefficients import Coefficients
from .errors import RecAdamError, unknown
from .hyperparameters import Hyperparameters
from .update import Moments, apply, update

__all__ = [
    "GROUP",
    "Backend",
    "Capabilities",
    "Specification",
    "Stepper",
    "available_backends",
    "backend_for",
    "functional_stepper",
    "get_backend",
]

GROUP = "recadam_core.backends"
"""The entry-point group in which backends are announced."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do, declared once.

    Args:
        dtypes: parameter dtypes, by name.
        devices: kinds of device.
        variants: names that `Backend.stepper` takes; "functional" is `RecAdam` over this backend.
        finetunes: model kinds that the backend's engine can train in the harness.

    Example:
        >>> Capabilities(dtypes=("float64",)).devices
        ('cpu',)
    """

    dtypes: tuple[str, ...] = ("float32", "float64")
    devices: tuple[str, ...] = ("cpu",)
    variants: tuple[str, ...] = ("functional",)
    finetunes: tuple[str, ...] = ()


Stepper = Callable[[dict[str, Any], float], dict[str, Any]]
"""(gradients by name, learning rate) -> parameters by name, one step further."""


@runtime_checkable
class Backend(Protocol):
    """The kernel of one array library, and its manners.

    Example:
        >>> isinstance(get_backend("numpy"), Backend)
        True
    """

    name: str  # import name of the array library
    capabilities: Capabilities

    def owns(self, array: Any) -> bool:
        """Whether `array` belongs to this backend's library."""
        ...

    def step(
        self,
        params: Sequence[Any],
        grads: Sequence[Any],
        moments: Sequence[Moments],
        anchors: Sequence[Any] | None,
        c: Coefficients,
    ) -> tuple[list[Any], list[Moments]]:
        """One step for arrays that share their coefficients: new parameters, new moments.

        Changes none of its arguments. `anchors` is None where nothing is pulled.
        """
        ...

    def stepper(
        self, variant: str, params: dict[str, Any], anchors: dict[str, Any], hp: Hyperparameters
    ) -> Stepper:
        """An optimizer of one of the backend's variants, as users meet it.

        Returns a function of (gradients by name, learning rate) that takes the next step and returns
        the parameters by name. "functional" is `functional_stepper`.
        """
        ...

    def from_numpy(self, array: np.ndarray[Any, Any], dtype: str | None = None) -> Any:
        """A copy of a NumPy array in this library, on its default device."""
        ...

    def to_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        """A copy of this library's array in NumPy."""
        ...

    def copy(self, array: Any) -> Any:
        """A copy that shares nothing with the array, its memory and its gradient tape included."""
        ...

    def precision(self, dtype: str) -> contextlib.AbstractContextManager[Any]:
        """A context in which arrays of this dtype can be made (float64 is off by default in JAX)."""
        ...


class Specification:
    """The spec itself as a backend, for any array library that follows the array API standard.

    Example:
        >>> Specification(np).name
        'numpy'
    """

    capabilities = Capabilities()

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.name: str = xp.__name__.removeprefix("array_api_compat.")

    def owns(self, array: Any) -> bool:
        """Whether the array's namespace is this one."""
        return is_array_api_obj(array) and array_namespace(array) is self.xp

    def step(
        self,
        params: Sequence[Any],
        grads: Sequence[Any],
        moments: Sequence[Moments],
        anchors: Sequence[Any] | None,
        c: Coefficients,
    ) -> tuple[list[Any], list[Moments]]:
        """`update` and `apply`, array by array."""
        stars = [None] * len(params) if anchors is None else anchors
        new = [
            update(theta, grad, state, anchor, c)
            for theta, grad, state, anchor in zip(params, grads, moments, stars, strict=True)
        ]
        return [apply(theta, delta) for theta, (delta, _) in zip(params, new, strict=True)], [
            s for _, s in new
        ]

    def stepper(
        self, variant: str, params: dict[str, Any], anchors: dict[str, Any], hp: Hyperparameters
    ) -> Stepper:
        """The only variant there is."""
        return functional_stepper(self, params, anchors, hp)

    def from_numpy(self, array: np.ndarray[Any, Any], dtype: str | None = None) -> Any:
        """A copy of a NumPy array in this namespace."""
        return self.xp.asarray(array, dtype=getattr(self.xp, dtype or array.dtype.name), copy=True)

    def to_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        """A copy in NumPy, through DLPack or the buffer protocol."""
        try:
            return np.array(np.from_dlpack(array))
        except (AttributeError, TypeError, ValueError, RuntimeError, BufferError):
            return np.array(array)

    def copy(self, array: Any) -> Any:
        """A copy in new memory."""
        return self.xp.asarray(array, copy=True)

    def precision(self, dtype: str) -> contextlib.AbstractContextManager[Any]:
        """Nothing to switch."""
        return contextlib.nullcontext()


def functional_stepper(
    backend: Backend, params: dict[str, Any], anchors: dict[str, Any], hp: Hyperparameters
) -> Stepper:
    """`recadam_core.RecAdam` over a backend, as a function that remembers parameters and state.

    Args:
        backend: the backend.
        params: starting values by name.
        anchors: pretrained values by name.
        hp: the settings.

    Returns:
        The stepper.

    Example:
        >>> step = functional_stepper(get_backend("numpy"), {"w": np.ones(1)}, {}, Hyperparameters(lr=0.5))
        >>> step({"w": np.ones(1)}, 0.25)["w"]
        array([0.75])
    """
    from .optimizer import RecAdam

    optimizer = RecAdam(hp, backend)
    state = optimizer.init(params, anchors)

    def step(grads: dict[str, Any], lr: float) -> dict[str, Any]:
        nonlocal params, state
        params, state = optimizer.step(params, grads, state, lr)
        return params

    return step


def _announced() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


@cache
def _load(name: str) -> Backend:
    point = _announced()[name]
    try:
        loaded = point.load()
    except ImportError as error:
        missing = error.name or name
        raise RecAdamError(
            f"backend {name!r} needs {missing!r}, which is not installed; pip install 'recadam-core[{name}]'"
        ) from error
    if not isinstance(loaded, Backend):
        raise RecAdamError(f"backend {name!r}: {point.value} lacks members of recadam_core.Backend; add them")
    return loaded


def available_backends() -> list[str]:
    """Names of the announced backends whose array library is installed, without importing it.

    Returns:
        Names for `get_backend`, sorted.

    Example:
        >>> "numpy" in available_backends()
        True
    """
    return sorted(name for name in _announced() if name in sys.modules or importlib.util.find_spec(name))


def get_backend(name: str) -> Backend:
    """The backend of this name; imports its array library.

    Args:
        name: import name of an array library, as "torch".

    Returns:
        The backend.

    Raises:
        RecAdamError: when no backend has that name, or its library is not installed.

    Example:
        >>> get_backend("numpy").name
        'numpy'
    """
    announced = _announced()
    if name not in announced:
        raise unknown("backend", name, announced)
    return _load(name)


def backend_for(array: Any) -> Backend:
    """The backend that serves this array; the specification itself for other array API libraries.

    Args:
        array: an array of any library that follows the array API standard.

    Returns:
        The backend.

    Raises:
        RecAdamError: when the object is no array.

    Example:
        >>> backend_for(np.ones(3)).name
        'numpy'
    """
    for name in _announced():
        # An array of a library exists only where that library is loaded.
        if name in sys.modules and _load(name).owns(array):
            return _load(name)
    if is_array_api_obj(array):
        return Specification(array_namespace(array))
    raise RecAdamError(
        f"{type(array).__module__}.{type(array).__qualname__} is no array; give arrays of one library"
    )
