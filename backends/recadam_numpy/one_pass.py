"""The kernel in one pass over memory, compiled by numba."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from recadam_core import Coefficients, RecAdamError

try:
    import numba
except ModuleNotFoundError as error:
    raise RecAdamError("the one-pass kernel needs 'numba'; pip install 'recadam-core[cpu]'") from error

__all__ = ["one_pass"]

Array = np.ndarray[Any, Any]


def one_pass(theta: Array, grad: Array, m: Array, v: Array, anchor: Array | None, c: Coefficients) -> None:
    """One step, in place on `theta`, `m` and `v`: the numbers of `kernel`, without temporary arrays.

    Args:
        theta: parameter, float32 or float64; overwritten.
        grad: gradient, theta's shape and dtype.
        m: first moment, theta's shape and dtype; overwritten.
        v: second moment, theta's shape and dtype; overwritten.
        anchor: pretrained value, theta's shape and dtype; None where `c.recall` is 0.
        c: coefficients, Python floats.

    Example:
        >>> theta, m, v = np.ones(2), np.zeros(2), np.zeros(2)
        >>> one_pass(theta, np.ones(2), m, v, np.zeros(2), Coefficients(0.9, 0.999, 0.0, 1e-8, 0.25, 0.0))
        >>> theta
        array([0.75, 0.75])

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12.
    """
    scalars = (c.beta1, 1 - c.beta1, c.beta2, 1 - c.beta2, c.step, c.eps, c.recall, c.decay)
    arrays = theta, grad, m, v, grad if anchor is None else anchor
    flat = [np.ascontiguousarray(x).reshape(-1) for x in arrays]
    arguments: list[Any] = [*flat, *map(theta.dtype.type, scalars), anchor is not None, c.decay != 0]
    _loop(*arguments)
    for array, i in ((theta, 0), (m, 2), (v, 3)):
        if not array.flags.c_contiguous:
            array[...] = flat[i].reshape(array.shape)


# Neither fastmath nor contraction: each operation is rounded as NumPy rounds it.
@numba.njit(error_model="numpy", nogil=True)
def _loop(
    theta: Any,
    grad: Any,
    m: Any,
    v: Any,
    anchor: Any,
    beta1: Any,
    rest1: Any,
    beta2: Any,
    rest2: Any,
    step: Any,
    eps: Any,
    recall: Any,
    decay: Any,
    pulls: Any,
    decays: Any,
) -> None:
    for i in range(theta.size):
        m[i] = beta1 * m[i] + rest1 * grad[i]
        v[i] = beta2 * v[i] + rest2 * (grad[i] * grad[i])
        delta = -(step * (m[i] / (math.sqrt(v[i]) + eps)))
        if pulls:
            delta = recall * (anchor[i] - theta[i]) + delta
        if decays:
            delta = delta - decay * theta[i]
        theta[i] = theta[i] + delta
