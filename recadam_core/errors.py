"""The one exception type of bad input, and the checks that raise it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = ["Interrupted", "RecAdamError", "check_number", "unknown"]


class Interrupted(Exception):
    """A command was interrupted, and left behind what the message says.

    Example:
        >>> str(Interrupted("the runs in runs/demo say so"))
        'the runs in runs/demo say so'
    """


class RecAdamError(ValueError):
    """Input that cannot be used: what is wrong, where, and what to do, in one line.

    A `ValueError`, so code that guards an optimizer's constructor needs no new except clause.

    Example:
        >>> from recadam_core import Sigmoid
        >>> Sigmoid(k=-1.0, t0=250)
        Traceback (most recent call last):
        ...
        recadam_core.errors.RecAdamError: Sigmoid: k is -1.0; give a finite number > 0
    """


def unknown(kind: str, name: object, choices: Iterable[str]) -> RecAdamError:
    """The error for a name that is not one of `choices`, with the nearest one.

    Args:
        kind: what was being named, as in "annealing".
        name: the name that was given.
        choices: the names that exist.

    Returns:
        The error, to be raised by the caller.

    Example:
        >>> print(unknown("form", "proxmal", ["decoupled", "proximal"]))
        unknown form 'proxmal': did you mean 'proximal'? (decoupled, proximal)
    """
    options = sorted(choices)
    near = difflib.get_close_matches(str(name), options, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "choose one of"
    return RecAdamError(f"unknown {kind} {name!r}: {hint} ({', '.join(options)})")


def check_number(
    where: str,
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise unless `value` is a finite number in the interval; arrays and tracers pass unchecked.

    A traced or device-side scalar has no value that the host may ask for, so only plain numbers
    (Python's and NumPy's) are checked.

    Args:
        where: the object being made, for the message.
        name: the argument's name, for the message.
        value: the number.
        low: lower end of the interval.
        high: upper end of the interval.
        open_low: whether `low` itself is excluded.
        open_high: whether `high` itself is excluded.

    Raises:
        RecAdamError: when the value is outside, not finite, or no number at all.

    Example:
        >>> check_number("Hyperparameters", "eps", 1e-8, low=0.0)
    """
    if isinstance(value, np.generic):
        value = value.item()
    if hasattr(value, "shape"):
        return
    inside = False
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        above = low < value if open_low else low <= value
        below = value < high if open_high else value <= high
        inside = math.isfinite(value) and above and below
    if not inside:
        bounds = [f"{'>' if open_low else '>='} {low:g}"] if low > -math.inf else []
        bounds += [f"{'<' if open_high else '<='} {high:g}"] if high < math.inf else []
        raise RecAdamError(
            f"{where}: {name} is {value!r}; give a finite number {' and '.join(bounds)}".rstrip()
        )
