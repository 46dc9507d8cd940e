"""The kernels: over lists of tensors, or in one pass over memory; all of them run the one formula.

Those of one pass take the arguments of `kernel_` but `exact`, and give the specification's bits: numba's on
the CPU, Triton's on CUDA, inductor's on both.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch

from recadam_core import RecAdamError

from .compiled import compiled_
from .lists import kernel_
from .numba import NumbaKernel

__all__ = ["FUSED", "chosen_fused", "fused_kernel", "kernel_", "one_pass_on", "triton_fault"]


def _triton() -> Callable[..., None]:
    from .triton import TritonKernel

    return TritonKernel(joins=os.environ.get("TRITON_INTERPRET") == "1")


FUSED: dict[str, Callable[[], Callable[..., None]]] = {
    "numba": NumbaKernel,
    "compiled": lambda: compiled_,
    "triton": _triton,
}
"""Makers of one-pass kernels by name."""


def chosen_fused(group: Mapping[str, Any], device: torch.device) -> str:
    """The one-pass kernel that a group's settings come to, for parameters on a device."""
    name = group["fused"]
    if name is False:
        return ""
    if name is None:
        others = group["foreach"] is not None or any(
            group[name] for name in ("exact", "differentiable", "capturable")
        )
        return "numba" if device.type == "cpu" and _has_numba() and not others else ""
    if name is True:
        name = "triton" if device.type == "cuda" else "numba" if _has_numba() else "compiled"
    if not isinstance(name, str) or name not in FUSED:
        raise RecAdamError(f"RecAdam: fused is {name!r}; give True, False, or one of {', '.join(FUSED)}")
    serves = {"numba": ("cpu",), "compiled": ("cpu", "cuda"), "triton": ("cuda",)}[name]
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        serves = ("cpu", "cuda")
    if device.type not in serves:
        raise RecAdamError(f"RecAdam: fused={name!r} does not run on {device.type}; give fused=False there")
    return name


def one_pass_on(device: torch.device) -> str:
    """The one-pass kernel that is to be had on a device without a long compilation; empty for none."""
    if device.type == "cpu":
        return "numba" if _has_numba() else ""
    if device.type != "cuda" or find_spec("triton") is None:
        return ""
    if triton_fault():
        _warn_of_triton()
        return ""
    return "triton"


@cache
def triton_fault() -> str:
    """Why Triton cannot launch kernels here; empty where it can.

    It builds a launcher when it is first asked, by a C compiler and with Python's headers, which slim images
    lack.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # whatever it is, it is Triton's
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
    return ""


@cache
def _warn_of_triton() -> None:
    warnings.warn(
        f"recadam_torch: Triton cannot launch its kernels ({triton_fault()}), and torch's own operations "
        "take their place, which are slower; install a C compiler and Python's headers (gcc, python3-dev)",
        stacklevel=2,
    )


def fused_kernel(name: str) -> Callable[..., None]:
    """A new one-pass kernel of this name."""
    if name == "numba":
        from recadam_numpy import one_pass  # noqa: F401  # says what to install
    if name == "compiled" and not torch.cuda.is_available() and not (which("g++") or which("clang++")):
        raise RecAdamError("RecAdam: fused='compiled' needs a C++ compiler; install g++, or give fused=False")
    if name == "triton" and find_spec("triton") is None:
        raise RecAdamError("RecAdam: fused='triton' needs 'triton'; pip install triton")
    if name == "triton" and triton_fault():
        raise RecAdamError(
            f"RecAdam: Triton cannot launch its kernels ({triton_fault()}); install a C compiler and "
            "Python's headers (gcc, python3-dev), or give fused=False"
        )
    return FUSED[name]()


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None
