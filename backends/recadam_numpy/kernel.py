"""The kernel in NumPy, in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from recadam_core import Coefficients, RecAdamError
from recadam_core.arrays import check_arrays
from recadam_core.update import formula, scalars

__all__ = ["kernel", "unchecked"]

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
        anchor: pretrained value, theta's shape and dtype; None where `c.pull` is 0.
        c: coefficients, Python floats.
        importance: by which the pull is multiplied, theta's shape and dtype; None for 1.

    Raises:
        RecAdamError: when shapes or dtypes differ, or what is overwritten is read-only or shares memory with
            another array; nothing is changed then.

    Example:
        >>> theta, m, v = np.ones(2), np.zeros(2), np.zeros(2)
        >>> kernel(theta, np.ones(2), m, v, np.zeros(2), Coefficients(0.9, 0.999, 0.0, 1e-8, 0.25, 0.0))
        >>> theta
        array([0.75, 0.75])

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12.
    """
    every: dict[str, Any] = {
        "theta": theta,
        "m": m,
        "v": v,
        "grad": grad,
        "anchor": anchor,
        "importance": importance,
    }
    arrays = {what: x for what, x in every.items() if x is not None or what not in ("anchor", "importance")}
    for what, x in arrays.items():
        check_arrays([(f"kernel: {what}", x)], np)
        if x.shape != theta.shape or x.dtype != theta.dtype:
            raise RecAdamError(
                f"kernel: {what} is {x.dtype} of shape {x.shape}, theta {theta.dtype} of {theta.shape}; give "
                "equal ones"
            )
    for what in ("theta", "m", "v"):
        x = arrays.pop(what)
        if not x.flags.writeable:
            raise RecAdamError(f"kernel: {what} is read-only; give a copy")
        for other, y in arrays.items():
            if np.may_share_memory(x, y):
                raise RecAdamError(f"kernel: {what} and {other} share memory; give a copy of one")
    unchecked(theta, grad, m, v, anchor, scalars("kernel", c), importance)


def unchecked(
    theta: Array,
    grad: Array,
    m: Array,
    v: Array,
    anchor: Array | None,
    c: Coefficients,
    importance: Array | None = None,
) -> None:
    """`kernel` of arrays that are known to fit."""
    numbers = (c.beta1, 1 - c.beta1, c.beta2, 1 - c.beta2, c.step, c.eps, c.pull, c.decay or None)
    delta, m[...], v[...] = formula(theta, grad, m, v, anchor, importance, *numbers, np.sqrt, np.divide)
    np.add(theta, delta, out=theta)
