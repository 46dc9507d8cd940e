"""How much each weight matters to the old task: what the pull may be multiplied by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from .arrays import Array, check_arrays, check_named, fault
from .backends import backend_for
from .errors import RecAdamError

__all__ = ["check_importance", "check_weighable", "importance_from"]

EXCEEDED_BY = 0.1
"""Share of the squares above zero that have the whole pull, so that a few large ones do not take it all."""


def importance_from(squares: Mapping[str, Array]) -> dict[str, Array]:
    r"""Scale squared gradients to importances.

    Math:
        $\min(1, F_i / q)$, where q is exceeded by a tenth of those $F_i$ that are not zero, so that no pull
        is stronger than `gamma` says

    Args:
        squares: sums $F_i \ge 0$ of squared gradients by parameter name, of any scale; floating arrays that
            this process can read whole.

    Returns:
        Arrays in [0, 1] of the same names, shapes and dtypes.

    Raises:
        RecAdamError: when one is no real floating array, negative, not finite or spread over processes, or
            all vanish.

    Example:
        >>> importance_from({"w": np.array([1.0, 4.0, 0.0])})["w"].round(2)
        array([0.27, 1.  , 0.  ])

    Source: elastic weight consolidation, arXiv 1612.00796, equation 3.
    """
    check_named("importance", squares)
    xp = check_arrays((f"importance: {name!r}", x) for name, x in squares.items())
    known = [np.zeros(0)]
    for name, x in squares.items():
        try:
            told = backend_for(x).to_numpy(x)
        except RuntimeError as error:  # as torch and JAX say it
            raise RecAdamError(
                f"importance: {name!r} is spread over processes; gather its sum of squares first"
            ) from error
        if not (np.isfinite(told) & (told >= 0)).all():
            raise RecAdamError(
                f"importance: {name!r} has sums of squares below 0 or not finite; scale the loss down"
            )
        known.append(told[told > 0])
    every = np.concatenate(known)
    top = float(np.quantile(every, 1 - EXCEEDED_BY)) if every.size else 0.0
    if top < 2.0**-126:  # below it frameworks flush to zero
        raise RecAdamError(
            "importance: no loss depends on any of the parameters, or so little that its squared gradients "
            "vanish; give some batches, or scale the loss up"
        )
    scaled = {name: x / top for name, x in squares.items()}
    return {name: xp.where(x < 1, x, xp.ones_like(x)) for name, x in scaled.items()}


def check_weighable(form: str) -> None:
    """Raise unless the form of the update can have importances."""
    if form != "decoupled":  # the others' steps shrink by the pull, which is one number there
        raise RecAdamError(f"importance needs form='decoupled', not {form!r}")


def check_importance(name: str, importance: Any, shape: Any) -> None:
    """Raise unless an importance fits its parameter.

    Example:
        >>> check_importance("w", np.array([0.5, 2.0]), (2,))
        Traceback (most recent call last):
        ...
        recadam_core.errors.RecAdamError: importance of 'w' leaves [0, 1]; scale it, and set the strength by
        gamma or pull
    """
    what = fault(importance).partition(";")[0]
    if not what and tuple(importance.shape) != tuple(shape):
        what = f"has shape {tuple(importance.shape)}"
    if what:
        raise RecAdamError(f"importance of {name!r} {what}; give a floating array of shape {tuple(shape)}")
    try:
        fits = getattr(importance, "is_meta", False) or bool(
            array_namespace(importance).all((importance >= 0) & (importance <= 1))
        )
    except TypeError:
        fits = True  # traced: there is no value to look at
    if not fits:
        raise RecAdamError(
            f"importance of {name!r} leaves [0, 1]; scale it, and set the strength by gamma or pull"
        )
