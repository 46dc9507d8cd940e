"""NumPy's backend: the kernel behind the protocol of recadam_core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recadam_core import Capabilities, Coefficients, Moments
from recadam_core.backends import Specification

from .kernel import kernel

__all__ = ["NumpyBackend", "backend"]

Array = np.ndarray[Any, Any]


class NumpyBackend(Specification):
    """The backend of NumPy arrays.

    Example:
        >>> backend.owns(np.ones(2))
        True
    """

    capabilities = Capabilities(dtypes=("float16", "float32", "float64"), finetunes=("mlp",))

    def __init__(self) -> None:
        super().__init__(np)

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
            kernel(theta, np.asarray(grad, dtype=dtype), m_new, v_new, anchor, c)
            new_params.append(theta.astype(old.dtype, copy=False))
            new_moments.append(Moments(m_new.astype(m.dtype, copy=False), v_new.astype(v.dtype, copy=False)))
        return new_params, new_moments

    @property
    def engine(self) -> Any:
        """The engine that trains the harness's models with NumPy."""
        from .engine import NumpyEngine

        return NumpyEngine


backend = NumpyBackend()
