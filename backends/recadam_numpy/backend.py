"""NumPy's backend: the kernel behind the protocol of recadam_core."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from recadam_core import Capabilities, Coefficients, Hyperparameters, Moments, RecAdamError
from recadam_core.backends import Functional, Specification, Stepper, Variant

from .kernel import kernel

__all__ = ["NumpyBackend", "backend"]

Array = np.ndarray[Any, Any]


class NumpyBackend(Specification):
    """The backend of NumPy arrays.

    Args:
        fused: whether to step in one pass over memory, on all cores, which needs numba. Changes no bit.
            It takes no importance.
        in_place: whether a step may write into the arrays of parameters and state that it is given, and
            return them. Needs `fused`. Otherwise it is pure, and spends most of its time on new memory.

    Example:
        >>> backend.owns(np.ones(2))
        True
    """

    capabilities = Capabilities(
        dtypes=("float16", "float32", "float64"),
        variants=(
            Variant("functional", "recadam_core.RecAdam", weighs=True),
            Variant("specification", "recadam_core.update", weighs=True),
            Variant("fused", "RecAdam(hp, NumpyBackend(fused=True))", needs=("numba",)),
        ),
        finetunes=("mlp",),
    )

    def __init__(self, fused: bool = False, in_place: bool = False) -> None:
        super().__init__(np)
        self._kernel: Callable[..., None] = kernel
        self._one_pass: Callable[..., None] | None = None
        self._in_place = in_place
        if in_place and not fused:
            raise RecAdamError("NumpyBackend: in_place needs fused=True; give both")
        if fused:
            from .one_pass import one_pass

            self._one_pass = one_pass
            plain = (dataclasses.replace(v, weighs=False) for v in self.capabilities.variants)
            self.capabilities = dataclasses.replace(self.capabilities, variants=tuple(plain))

    def owns(self, array: Any) -> bool:
        """Whether the object is an array or a scalar of NumPy."""
        return isinstance(array, (np.ndarray, np.generic))

    def step(
        self,
        params: Sequence[Array],
        grads: Sequence[Array],
        moments: Sequence[Moments],
        anchors: Sequence[Array] | None,
        c: Coefficients,
        importances: Sequence[Array] | None = None,
    ) -> tuple[list[Array], list[Moments]]:
        """One step, in new memory unless `in_place`; 16-bit parameters are summed in float32."""
        stars, weights = ([None] * len(params) if xs is None else xs for xs in (anchors, importances))
        if self._one_pass is not None and importances is not None:
            raise RecAdamError("NumpyBackend: fused=True takes no importance; leave one of them out")
        lists: dict[Any, list[list[Any]]] = {}
        new_params: list[Array] = []
        new_moments: list[Moments] = []
        for old, grad, (m, v), star, weight in zip(params, grads, moments, stars, weights, strict=True):
            dtype = np.result_type(old, m, v)
            if dtype.itemsize < 4:
                dtype = np.dtype(np.float32)
            copy = None if self._in_place else True
            if self._in_place and not (old.flags.writeable and m.flags.writeable and v.flags.writeable):
                raise RecAdamError("NumpyBackend: an array is read-only; give copies, or leave in_place out")
            theta, m_new, v_new = (np.array(x, dtype=dtype, copy=copy, order="C") for x in (old, m, v))
            g, *pull = (None if x is None else np.asarray(x, dtype=dtype) for x in (grad, star, weight))
            columns = lists.setdefault(dtype, [[] for _ in range(6)])
            for column, x in zip(columns, (theta, g, m_new, v_new, *pull), strict=True):
                column.append(x)
            new_params.append(theta)
            new_moments.append(Moments(m_new, v_new))
        for columns in lists.values():
            if self._one_pass is not None:
                self._one_pass(*columns[:4], None if anchors is None else columns[4], c)
                continue
            for *arrays, importance in zip(*columns, strict=True):
                self._kernel(*arrays, c, importance)
        for i, (old, (m, v)) in enumerate(zip(params, moments, strict=True)):
            new_params[i] = _as_was(old, new_params[i])
            new_moments[i] = Moments(_as_was(m, new_moments[i].m), _as_was(v, new_moments[i].v))
        return new_params, new_moments

    def stepper(
        self,
        variant: str,
        params: dict[str, Any],
        anchors: dict[str, Any],
        hp: Hyperparameters,
        exact: bool = False,
        importance: dict[str, Any] | None = None,
    ) -> Stepper:
        """`recadam_core.RecAdam` over one of the kernels, or over the specification itself; all are exact."""
        self.capabilities.variant(variant)
        serving = {"functional": self, "specification": Specification(np)}
        return Functional(serving.get(variant) or NumpyBackend(fused=True), params, anchors, hp, importance)

    @property
    def engine(self) -> Any:
        """The engine that trains the harness's models with NumPy."""
        from .engine import NumpyEngine

        return NumpyEngine


def _as_was(old: Array, new: Array) -> Array:
    """The new values in the old array's dtype; in its memory only where that is the new one's already."""
    return new.astype(old.dtype, copy=False)


backend = NumpyBackend()
