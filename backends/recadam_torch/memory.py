"""Tensors as kernels that walk memory need them."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor

from recadam_core import RecAdamError

__all__ = ["is_writable", "regular", "reshaped", "wide_dtype"]

_dtype, _device, _shape = map(attrgetter, ("dtype", "device", "shape"))


def regular(
    tensors: list[Tensor],
    wide: torch.dtype,
    walkable: frozenset[torch.dtype],
    shapes: list[torch.Size],
    device: torch.device,
    is_written: bool = False,
) -> list[Tensor]:
    """Tensors whose memory a one-pass kernel can walk: the very list where it can already, else copies."""
    dtypes, devices = set(map(_dtype, tensors)), set(map(_device, tensors))
    if list(map(_shape, tensors)) != shapes:
        raise RecAdamError("a parameter, its gradient, moments and anchor have several shapes")
    if any(place.type == "meta" for place in devices):
        raise RecAdamError("a parameter, its gradient, moments or anchor is on the meta device")
    negative = any(map(Tensor.is_neg, tensors))  # which only say that they are
    if negative or not all(map(Tensor.is_contiguous, tensors)):
        if is_written and not all(map(is_writable, tensors)):
            raise RecAdamError("a parameter or moment is a view that cannot be written to")
        tensors = [x.resolve_neg() for x in tensors]
    if len(dtypes) > 1 or not dtypes <= walkable:
        tensors = [x.detach().to(device, wide, non_blocking=True) for x in tensors]
    elif devices - {device}:
        tensors = [x.detach().to(device, non_blocking=True) for x in tensors]
    if all(map(Tensor.is_contiguous, tensors)):
        return tensors
    return [x.detach().contiguous() for x in tensors]


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a tensor without moments is stepped: its own, at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def is_writable(x: Tensor) -> bool:
    """Whether each element of a dense tensor has a place of its own to be written to."""
    shared = x.numel() and any(step == 0 and n > 1 for step, n in zip(x.stride(), x.shape, strict=True))
    return not (shared or x.is_neg())


def reshaped(name: str, theta: Tensor, what: str, other: Tensor) -> RecAdamError:
    """The error of what belongs to a parameter and has not its shape."""
    return RecAdamError(
        f"parameter {name!r} has shape {tuple(theta.shape)}, its {what} {tuple(other.shape)}: its shape was "
        "changed; make a new optimizer"
    )
