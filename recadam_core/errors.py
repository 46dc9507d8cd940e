"""The one exception type of bad input, and the checks that raise it."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = ["Interrupted", "RecAdamError", "check_flag", "check_number", "check_whole", "shown", "unknown"]


class Interrupted(Exception):
    """A command was interrupted, and left behind what the message says."""


class RecAdamError(ValueError):
    """Input that cannot be used: what is wrong, where, and what to do, in one line.

    A `ValueError`, so code that guards an optimizer's constructor needs no new except clause.

    Example:
        >>> from recadam_core import Sigmoid
        >>> Sigmoid(k=-1.0, t0=250)
        Traceback (most recent call last):
        ...
        recadam_core.errors.RecAdamError: Sigmoid: k is -1.0; give a finite number > 0

        A name with a line break in it makes no second line:

        >>> print(RecAdamError("my\\nrun: no run here"))
        my\\nrun: no run here
    """

    def __init__(self, message: str = "") -> None:
        super().__init__("".join(x if x.isprintable() else ascii(x)[1:-1] for x in message))


def unknown(kind: str, name: object, choices: Iterable[str]) -> RecAdamError:
    """The error for a name that is not one of `choices`, with the nearest one.

    Example:
        >>> print(unknown("form", "proxmal", ["decoupled", "proximal"]))
        unknown form 'proxmal': did you mean 'proximal'? (decoupled, proximal)
    """
    options = sorted(choices)
    near = difflib.get_close_matches(name if isinstance(name, str) else shown(name), options, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "choose one of"
    return RecAdamError(f"unknown {kind} {shown(name)}: {hint} ({', '.join(options)})")


def check_number(
    where: str,
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> Any:
    """The value as a Python number, if it is a finite one in the interval; traced scalars as they are.

    What settings may be is decided here, for every constructor, parameter group and checkpoint: real
    numbers of Python and NumPy, and 0-d arrays of any library. Text, truth values, Python's Decimal and
    Fraction, complex numbers and tensors that carry a gradient are refused.

    Args:
        where: the object being made, for the message.
        name: the argument's name, for the message.
        value: the number. A 0-d JAX tracer has no value that the host may ask for, and passes unchecked.
        low: lower end of the interval.
        high: upper end of the interval.
        open_low: whether `low` itself is excluded.
        open_high: whether `high` itself is excluded.

    Returns:
        An int below 2^31 as it is, so that libraries with 32-bit integers take it; any other number as
        `float(value)`; a tracer as it is.

    Raises:
        RecAdamError: when the value is outside, not finite, or no number at all.

    Example:
        >>> import numpy as np
        >>> check_number("Hyperparameters", "eps", np.float16(0.5), low=0.0)
        0.5
    """
    number = value
    if type(value) is not float:
        number = _python_number(value)
        if number is None and _is_traced(value):
            return value
    if number is not None and math.isfinite(number):
        above = low < number if open_low else low <= number
        below = number < high if open_high else number <= high
        if above and below:
            return number
    bounds = [f"{'>' if open_low else '>='} {low:g}"] if low > -math.inf else []
    bounds += [f"{'<' if open_high else '<='} {high:g}"] if high < math.inf else []
    raise RecAdamError(
        f"{where}: {name} is {shown(value)}; give a finite number {' and '.join(bounds)}".rstrip()
    )


def check_flag(where: str, name: str, value: Any) -> bool:
    """The value as True or False, if it is one of them.

    Example:
        >>> check_flag("Hyperparameters", "bias_correction", "False")
        Traceback (most recent call last):
        ...
        recadam_core.errors.RecAdamError: Hyperparameters: bias_correction is 'False'; give True or False
    """
    if not isinstance(value, (bool, np.bool_)):
        raise RecAdamError(f"{where}: {name} is {shown(value)}; give True or False")
    return bool(value)


def check_whole(name: str, value: Any, low: int, high: int = 10**8) -> int:
    """The value as an int, if it is a whole number in the interval.

    Example:
        >>> check_whole("steps", 10**20, 1)
        Traceback (most recent call last):
        ...
        recadam_core.errors.RecAdamError: steps is 100000000000000000000; give a whole number from 1 to ...
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise RecAdamError(f"{name} is {shown(value)}; give a whole number from {low} to {high:,}")
    return int(value)


def shown(value: Any) -> str:
    """A value for a message: in one line, and not too long.

    Example:
        >>> shown("a" * 100)[-10:], shown(np.ones((2, 2)))
        ('aaaaaaa...', 'array([[1., 1.], [1., 1.]])')
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:  # as of an integer of 5,000 digits
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _python_number(value: Any) -> int | float | None:
    """The same number as Python has it; None where it is no real number with a value."""
    try:
        if isinstance(value, int) and not isinstance(value, bool):
            return int(value) if abs(value) < 2**31 else float(value)
        if isinstance(value, float) or (
            _is_real_scalar(value) and not getattr(value, "requires_grad", False)
        ):
            return float(value)
    except Exception:  # too large, or without a value, as on torch's meta device and in a trace
        pass
    return None


def _is_real_scalar(value: Any) -> bool:
    """Whether it is a 0-d array, or a scalar of an array library, of integers or real floating numbers."""
    if getattr(value, "shape", None) != ():
        return False
    dtype = getattr(value, "dtype", None)
    # Libraries name their dtypes alike, but for their own names before a dot.
    kind = str(getattr(dtype, "name", dtype)).rpartition(".")[2]
    return kind.startswith(("float", "bfloat", "int", "uint"))


def _is_traced(value: Any) -> bool:
    """Whether it is a real 0-d tracer of JAX, which is not imported here."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.core.Tracer) and _is_real_scalar(value)
