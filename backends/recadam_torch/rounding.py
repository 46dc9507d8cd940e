"""How the sum of a 16-bit parameter and its change is rounded, where plain rounding would lose the change."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .memory import cast
from .shards import local, mix, part, positions

__all__ = ["ROUNDINGS", "key_of", "noise", "number_of", "residual_of", "round_", "widened"]

ROUNDINGS = ("nearest", "stochastic", "compensated")
"""Ways to round: to the nearest; up or down by chance, right on average; keeping what was lost for later."""


def widened(thetas: list[Tensor], residuals: Sequence[Tensor | None]) -> list[Tensor]:
    """16-bit parameters in float32, with what rounding has left over."""
    wide = cast(thetas, torch.float32)
    left = [x for x in residuals if x is not None]
    if left:
        torch._foreach_add_(wide, cast(left, torch.float32))
    return wide


def residual_of(p: Tensor, state: dict[str, Any], ways: Mapping[str, Any]) -> Tensor | None:
    """This process's part of what rounding has left over; None where that is not kept."""
    if ways["rounding"] != "compensated" or p.dtype not in (torch.bfloat16, torch.float16):
        return None
    if "residual" not in state:
        state["residual"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return local(state["residual"])


def round_(
    thetas: list[Tensor],
    new: list[Tensor],
    residuals: Sequence[Tensor | None],
    noises: Iterable[Tensor] | None,
) -> None:
    r"""Round float32 sums to the parameters, in place.

    Math:
        With chance $u$ uniform in [0, 1) of a unit in bfloat16's last place, $\lfloor x + u \rfloor$ has the
        mean $x$. With a residual, $\theta = \mathrm{round}(x)$ and $\rho = \mathrm{round}(x - \theta)$, so
        that $\theta + \rho$ has the digits of both.

    Source: Zamirai and others, Revisiting BFloat16 Training, arXiv 2010.06192.
    """
    if noises is not None:
        for theta, x, chance in zip(thetas, new, noises, strict=True):
            rounded = ((x.view(torch.int32) + chance) & -65536).view(torch.float32)
            theta.copy_(torch.where(x.isfinite(), rounded, x))
        return
    torch._foreach_copy_(thetas, new)
    left = [x for x in residuals if x is not None]
    if left:
        torch._foreach_sub_(new, cast(thetas, torch.float32))
        torch._foreach_copy_(left, new)


def noise(p: Tensor, name: str, t: Any) -> Tensor:
    """Chance that depends on parameter, element and step alone: the same after a resume, however sharded."""
    return (mix(positions(part(p), p.shape, p.device) + key_of(p, name, t)) & 0xFFFF).int()


def key_of(p: Tensor, name: str, t: Any) -> Tensor:
    """What is added to each element's position, before it is mixed, for `noise`; arguments as there."""
    return mix(torch.as_tensor(t, device=p.device).long() + number_of(name))


def number_of(name: str) -> int:
    """A number for a name, beyond all step counts."""
    return zlib.crc32(name.encode()) << 31
