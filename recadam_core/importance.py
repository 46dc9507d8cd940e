"""How much each weight matters to the old task: what the pull may be multiplied by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_array_api_obj

from .backends import backend_for
from .errors import RecAdamError

__all__ = ["check_importance", "importance_from"]

EXCEEDED_BY = 0.1
"""Share of the squares above zero that have the whole pull, so that a few large ones do not take it all."""


def importance_from(squares: Mapping[str, Any]) -> dict[str, Any]:
    r"""Scale squared gradients to importances.

    Math:
        $\min(1, F_i / q)$, where q is exceeded by a tenth of those $F_i$ that are not zero, so that no pull
        is stronger than `gamma` says

    Args:
        squares: sums $F_i \ge 0$ of squared gradients by parameter name, of any scale.

    Returns:
        Arrays in [0, 1] of the same names, shapes and dtypes.

    Raises:
        RecAdamError: when all are zero.

    Example:
        >>> importance_from({"w": np.array([1.0, 4.0, 0.0])})["w"].round(2)
        array([0.27, 1.  , 0.  ])

    Source: elastic weight consolidation, arXiv 1612.00796, equation 3.
    """
    told = [np.ravel(backend_for(x).to_numpy(x)) for x in squares.values()]
    known = np.concatenate([x[x > 0] for x in told]) if told else np.zeros(0)
    if not known.size:
        raise RecAdamError("importance: no loss that depends on any of the parameters; give some batches")
    top = float(np.quantile(known, 1 - EXCEEDED_BY))
    return {name: array_namespace(x).clip(x / top, max=1.0) for name, x in squares.items()}


def check_importance(name: str, given: Any, shape: Any, form: str) -> None:
    """Raise unless an importance fits its parameter and the form of the update.

    Args:
        name: the parameter's name.
        given: its importance.
        shape: the parameter's shape.
        form: the form of the update.

    Raises:
        RecAdamError: when it is no floating array of that shape in [0, 1], or the form is not "decoupled".

    Example:
        >>> check_importance("w", np.array([0.5, 2.0]), (2,), "decoupled")
        Traceback (most recent call last):
        ...
        recadam_core.errors.RecAdamError: importance of 'w' leaves [0, 1]; scale it, and set the strength by
        gamma
    """
    if form != "decoupled":  # the others' steps shrink by the pull, which is one number there
        raise RecAdamError(f"importance needs form='decoupled', not {form!r}")
    what = "" if is_array_api_obj(given) else f"is {given!r}"
    if not what:
        xp = array_namespace(given)
        if tuple(given.shape) != tuple(shape):
            what = f"has shape {tuple(given.shape)}"
        elif not xp.isdtype(given.dtype, "real floating"):
            what = f"has dtype {given.dtype}"
    if what:
        raise RecAdamError(f"importance of {name!r} {what}; give a floating array of shape {tuple(shape)}")
    try:
        fits = bool(xp.all((given >= 0) & (given <= 1)))
    except (TypeError, RuntimeError):
        fits = True  # traced, or without data: there is no value to look at
    if not fits:
        raise RecAdamError(f"importance of {name!r} leaves [0, 1]; scale it, and set the strength by gamma")
