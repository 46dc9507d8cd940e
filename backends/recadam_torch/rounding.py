"""How the sum of a 16-bit parameter and its change is rounded, where plain rounding would lose the change."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .shards import local, mix, part, positions

__all__ = ["ROUNDINGS", "key_of", "noise", "residual_of", "round_", "widened"]

ROUNDINGS = ("nearest", "stochastic", "compensated")
"""Ways to round: to the nearest; up or down by chance, right on average; keeping what was lost for later."""


def widened(theta: Tensor, residual: Tensor | None) -> Tensor:
    """A 16-bit parameter in float32, with what rounding has left over."""
    wide = theta.detach().float()
    return wide if residual is None else wide.add_(residual)


def residual_of(p: Tensor, state: dict[str, Any], ways: Mapping[str, Any]) -> Tensor | None:
    """This process's part of what rounding has left over; None where that is not kept."""
    if ways["rounding"] != "compensated" or p.dtype not in (torch.bfloat16, torch.float16):
        return None
    if "residual" not in state:
        state["residual"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return local(state["residual"])


def round_(theta: Tensor, new: Tensor, residual: Tensor | None, chance: Tensor | None) -> None:
    r"""Round a float32 sum to the parameter, in place.

    Math:
        With chance $u$ uniform in [0, 1) of a unit in bfloat16's last place, $\lfloor x + u \rfloor$ has the
        mean $x$. With a residual, $\theta = \mathrm{round}(x)$ and $\rho = \mathrm{round}(x - \theta)$, so
        that $\theta + \rho$ has the digits of both.

    Source: Zamirai and others, Revisiting BFloat16 Training, arXiv 2010.06192.
    """
    if chance is not None:
        rounded = ((new.view(torch.int32) + chance) & -65536).view(torch.float32)
        new = torch.where(new.isfinite(), rounded, new)
    theta.copy_(new)
    if residual is not None:
        residual.copy_(new.sub_(theta))


def noise(p: Tensor, name: str, t: Any) -> Tensor:
    """Chance that depends on parameter, element and step alone: the same after a resume, however sharded."""
    return (mix(positions(part(p), p.shape, p.device) + key_of(p, name, t)) & 0xFFFF).int()


def key_of(p: Tensor, name: str, t: Any) -> Tensor:
    """What is added to each element's position, before it is mixed, for `noise`; arguments as there."""
    return mix(torch.as_tensor(t, device=p.device).long() + (zlib.crc32(name.encode()) << 31))
