"""The kernel in NumPy, in place and with two scratch arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from recadam_core import Coefficients

__all__ = ["kernel"]

Array = np.ndarray[Any, Any]


def kernel(
    theta: Array,
    grad: Array,
    m: Array,
    v: Array,
    anchor: Array | None,
    c: Coefficients,
    importance: Array | None = None,
) -> None:
    r"""One step, in place on `theta`, `m` and `v`: operation for operation that of `recadam_core.update`.

    Args:
        theta: parameter, float32 or float64; overwritten.
        grad: gradient, theta's shape and dtype.
        m: first moment, theta's shape and dtype; overwritten.
        v: second moment, theta's shape and dtype; overwritten.
        anchor: pretrained value, theta's shape and dtype; None where `c.recall` is 0.
        c: coefficients, Python floats.
        importance: by which the pull is multiplied, theta's shape and dtype; None for 1.

    Example:
        >>> theta, m, v = np.ones(2), np.zeros(2), np.zeros(2)
        >>> kernel(theta, np.ones(2), m, v, np.zeros(2), Coefficients(0.9, 0.999, 0.0, 1e-8, 0.25, 0.0))
        >>> theta
        array([0.75, 0.75])

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12.
    """
    a, b = np.empty_like(theta), np.empty_like(theta)
    np.multiply(m, c.beta1, out=m)
    np.multiply(grad, 1 - c.beta1, out=a)
    np.add(m, a, out=m)
    np.multiply(v, c.beta2, out=v)
    np.multiply(grad, grad, out=a)
    np.multiply(a, 1 - c.beta2, out=a)
    np.add(v, a, out=v)
    np.sqrt(v, out=a)
    np.add(a, c.eps, out=a)
    np.divide(m, a, out=a)
    np.multiply(a, c.step, out=a)
    if anchor is None:
        np.negative(a, out=a)
    else:
        np.subtract(anchor, theta, out=b)
        np.multiply(b, c.recall, out=b)
        if importance is not None:
            np.multiply(b, importance, out=b)
        np.subtract(b, a, out=a)
    if c.decay:
        np.multiply(theta, c.decay, out=b)
        np.subtract(a, b, out=a)
    np.add(theta, a, out=theta)
