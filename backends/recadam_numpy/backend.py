"""NumPy's backend: the kernel behind the protocol of recadam_core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from recadam_core import Capabilities, Coefficients, Hyperparameters, Moments
from recadam_core.backends import Functional, Specification, Stepper, Variant

from .kernel import kernel

__all__ = ["NumpyBackend", "backend"]

Array = np.ndarray[Any, Any]


class NumpyBackend(Specification):
    """The backend of NumPy arrays.

    Args:
        fused: whether to step in one pass over memory, which needs numba. Changes no bit.

    Example:
        >>> backend.owns(np.ones(2))
        True
    """

    capabilities = Capabilities(
        dtypes=("float16", "float32", "float64"),
        variants=(
            Variant("functional", "recadam_core.RecAdam"),
            Variant("specification", "recadam_core.update"),
            Variant("fused", "RecAdam(hp, NumpyBackend(fused=True))", needs=("numba",)),
        ),
        finetunes=("mlp",),
    )

    def __init__(self, fused: bool = False) -> None:
        super().__init__(np)
        self._kernel: Callable[..., None] = kernel
        if fused:
            from .one_pass import one_pass

            self._kernel = one_pass

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
    ) -> tuple[list[Array], list[Moments]]:
        """One step in new memory; 16-bit parameters are summed in float32 and rounded once."""
        stars = [None] * len(params) if anchors is None else anchors
        new_params, new_moments = [], []
        for old, grad, (m, v), star in zip(params, grads, moments, stars, strict=True):
            dtype = np.result_type(old, m, v)
            if dtype.itemsize < 4:
                dtype = np.dtype(np.float32)
            theta, m_new, v_new = (np.array(x, dtype=dtype) for x in (old, m, v))
            anchor = None if star is None else np.asarray(star, dtype=dtype)
            self._kernel(theta, np.asarray(grad, dtype=dtype), m_new, v_new, anchor, c)
            new_params.append(theta.astype(old.dtype, copy=False))
            new_moments.append(Moments(m_new.astype(m.dtype, copy=False), v_new.astype(v.dtype, copy=False)))
        return new_params, new_moments

    def stepper(
        self,
        variant: str,
        params: dict[str, Any],
        anchors: dict[str, Any],
        hp: Hyperparameters,
        exact: bool = False,
    ) -> Stepper:
        """`recadam_core.RecAdam` over one of the kernels, or over the specification itself; all are exact."""
        self.capabilities.variant(variant)
        serving = {"functional": self, "specification": Specification(np)}
        return Functional(serving.get(variant) or NumpyBackend(fused=True), params, anchors, hp)

    @property
    def engine(self) -> Any:
        """The engine that trains the harness's models with NumPy."""
        from .engine import NumpyEngine

        return NumpyEngine


backend = NumpyBackend()
