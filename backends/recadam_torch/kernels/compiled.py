"""The kernel in one pass over memory by inductor: whole tensors, in a function that `torch.compile` makes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from operator import truediv
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from recadam_core import Coefficients
from recadam_core.update import formula

from ..memory import wide_dtype
from .lists import kernel_

__all__ = ["compiled_"]


def compiled_(
    thetas: list[Tensor],
    grads: list[Tensor] | None,
    ms: list[Tensor] | None,
    vs: list[Tensor] | None,
    anchors: list[Tensor] | None,
    c: Coefficients,
    importances: list[Tensor] | None = None,
) -> None:
    """One step by inductor: large tensors one by one in their places, small ones joined."""
    others = [grads, ms, vs, anchors, importances if anchors else None]  # None where they are not read
    small = []
    for i, theta in enumerate(thetas):
        row = [None if xs is None else xs[i] for xs in others]
        if theta.numel() < SMALL or not all(x.is_contiguous() for x in (theta, *row) if x is not None):
            small.append(i)
        else:
            _inductor(c, theta.detach().view(-1), *(x if x is None else x.detach().view(-1) for x in row))
    if not small:
        return
    wide = wide_dtype(thetas[0]) if ms is None else ms[0].dtype

    def joined(xs: list[Tensor]) -> Tensor:
        return torch.cat([xs[i].detach().reshape(-1).to(wide) for i in small])

    flat, rows = joined(thetas), [None if xs is None else joined(xs) for xs in others]
    if flat.numel() < 2:  # inductor would compile sizes 0 and 1 apart
        grad, m, v, star, weight = (None if x is None else [x] for x in rows)
        kernel_([flat], grad, m, v, star, c, weight, exact=True)
    else:
        _inductor(c, flat, *rows)
    for xs, new in ((thetas, flat), (ms, rows[1]), (vs, rows[2])):
        if xs is None or new is None:
            continue
        for i, part in zip(small, torch.split(new, [xs[i].numel() for i in small]), strict=True):
            xs[i].copy_(part.view(xs[i].shape))


SMALL = 1 << 15
"""Elements below which a call of a compiled function costs more than joining the tensor to others."""


def _inductor(c: Coefficients, theta: Tensor, *others: Tensor | None) -> None:
    _, m, *_ = others
    wide = wide_dtype(theta) if m is None else m.dtype

    def number(x: float) -> Tensor:
        """A 0-d tensor: another number each step compiles nothing anew."""
        return torch.tensor(x, dtype=wide, device=theta.device)

    decay = number(c.decay) if c.decay else None
    columns = (theta, *others)
    run = _compiled(*(None if x is None else x.dtype for x in columns), wide, decay is None)
    run(columns, wide, c.beta1, c.beta2, number(c.step), number(c.eps), number(c.pull), decay)


def _in_place(
    columns: tuple[Tensor | None, ...],
    wide: torch.dtype,
    beta1: float,
    beta2: float,
    step: Tensor,
    eps: Tensor,
    pull: Tensor,
    decay: Tensor | None,
) -> None:
    """The formula over whole tensors, for a compiler that rounds each operation by itself."""
    old, grad, m, v, anchor, importance = (None if x is None else x.to(wide) for x in columns)
    betas = beta1, 1 - beta1, beta2, 1 - beta2
    delta, m, v = formula(
        old, grad, m, v, anchor, importance, *betas, step, eps, pull, decay, torch.sqrt, truediv
    )
    for x, new in zip((columns[0], columns[2], columns[3]), (old + delta, m, v), strict=True):
        if x is not None:
            x.copy_(new)


@cache
def _compiled(*kind: Any) -> Callable[..., Any]:
    """The formula, compiled for one kind of arguments; a copy, since one is compiled only so often."""
    return torch.compile(FunctionType(_in_place.__code__.replace(), _in_place.__globals__), dynamic=True)
