"""What may be stepped: plain arrays of real floating numbers, all of one library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
from array_api_compat import array_namespace, is_array_api_obj

from .errors import RecAdamError, shown

__all__ = ["Array", "NumpyArray", "check_arrays", "check_named", "fault", "kind_of", "library", "not_plain"]

Array: TypeAlias = Any
"""An array of any library that follows the array API standard; none names the type of all of them."""

NumpyArray: TypeAlias = np.ndarray[Any, Any]

PLAIN = (np.ndarray, np.memmap)
"""Kinds of NumPy array that are their numbers and nothing else: no mask, unit or product of their own."""

_kinds: dict[tuple[type, Any, Any], tuple[Any, str]] = {}


def kind_of(array: Any) -> tuple[Any, str]:
    """Namespace of an array (None of what is none), and what keeps it from being stepped; empty if nothing.

    Example:
        >>> kind_of(np.ones(2, dtype=int))[1]
        'has dtype int64; give a real floating array of 16 bits or more'
    """
    key = type(array), getattr(array, "dtype", None), _layout(array)
    try:
        known = _kinds.get(key)
    except TypeError:  # what calls itself a dtype there is none
        return None, not_plain(array) or "has no dtype; give an array"
    if known is None:
        known = _kinds[key] = _look(array)
    return known


def _look(array: Any) -> tuple[Any, str]:
    if wrong := not_plain(array):
        return None, wrong
    xp = array_namespace(array)
    if "sparse" in (layout := str(_layout(array))):
        return xp, f"has layout {layout}; give a dense array"
    try:
        fits = xp.isdtype(array.dtype, "real floating") and xp.finfo(array.dtype).bits >= 16
    except Exception:  # a dtype from outside of the library, as each library says it
        fits = False
    return xp, "" if fits else f"has dtype {array.dtype}; give a real floating array of 16 bits or more"


def _layout(array: Any) -> Any:
    """PyTorch's, by which its sparse arrays are told; others mean something else by the word."""
    layout = getattr(array, "layout", None)
    return layout if type(layout).__name__ == "layout" else None


def not_plain(array: Any) -> str:
    """What keeps an object from being an array that is its numbers and nothing else; empty if nothing.

    Example:
        >>> not_plain([1.0])
        'is list; give an array'
    """
    name = "None" if array is None else type(array).__name__
    if isinstance(array, np.ndarray) and type(array) not in PLAIN:
        return f"is {name}, of which a step keeps the bare numbers; give a plain NumPy array"
    if isinstance(array, type) or not is_array_api_obj(array):
        return f"is {name}; give an array"
    return ""


def fault(array: Any, xp: Any = None) -> str:
    """What keeps an object from being stepped, beside arrays of xp if that is given; empty if nothing.

    Example:
        >>> fault(1.0), fault(np.ones(1), np)
        ('is float; give an array', '')
    """
    namespace, wrong = kind_of(array)
    if not wrong and xp is not None and namespace is not xp and library(namespace) != library(xp):
        return f"is of {library(namespace)} beside arrays of {library(xp)}; give all of one library"
    return wrong


def library(xp: Any) -> str:
    """Import name of the library that a namespace stands for.

    Example:
        >>> library(np)
        'numpy'
    """
    name: str = xp.__name__
    return name.removeprefix("array_api_compat.")


def check_named(what: str, arrays: Any) -> None:
    """Raise unless it is a dict by name."""
    if not isinstance(arrays, Mapping):
        raise RecAdamError(f"{what}: {type(arrays).__name__}; give a dict of arrays by parameter name")
    if not {*map(type, arrays)} <= {str}:
        for name in arrays:
            if not isinstance(name, str):
                raise RecAdamError(f"{what}: the name {shown(name)} is no string; give one")


def check_arrays(arrays: Iterable[tuple[str, Any]], xp: Any = None) -> Any:
    """The namespace of arrays, each after what to call it, unless one cannot be stepped beside the others.

    Example:
        >>> check_arrays([("parameter 'w'", np.ones(2, dtype=bool))])
        Traceback (most recent call last):
        ...
        recadam_core.errors.RecAdamError: parameter 'w' has dtype bool; give a real floating array of 16 bits
        or more
    """
    for what, array in arrays:
        if wrong := fault(array, xp):
            raise RecAdamError(f"{what} {wrong}")
        xp = xp or kind_of(array)[0]
    return xp
