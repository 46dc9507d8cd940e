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

from .lists import kernel_

__all__ = ["compiled_"]


def compiled_(
    thetas: list[Tensor],
    grads: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    anchors: list[Tensor] | None,
    c: Coefficients,
    importances: list[Tensor] | None = None,
) -> None:
    """One step by inductor: large tensors one by one in their places, small ones joined."""
    columns = [thetas, grads, ms, vs, *(xs for xs in (anchors, importances if anchors else None) if xs)]
    small = []
    for i, column in enumerate(zip(*columns, strict=True)):
        if column[0].numel() < SMALL or not all(map(Tensor.is_contiguous, column)):
            small.append(i)
        else:
            _inductor(c, *(x.detach().view(-1) for x in column))
    if not small:
        return
    wide = ms[0].dtype
    flat = [torch.cat([xs[i].detach().reshape(-1).to(wide) for i in small]) for xs in columns]
    if flat[0].numel() < 2:  # inductor would compile sizes 0 and 1 apart
        theta, grad, m, v, *others = ([x] for x in flat)
        star, weight, *_ = *others, None, None
        kernel_(theta, grad, m, v, star, c, weight, exact=True)
    else:
        _inductor(c, *flat)
    sizes = [thetas[i].numel() for i in small]
    for xs, new in zip((thetas, ms, vs), (flat[0], flat[2], flat[3]), strict=True):
        for i, part in zip(small, torch.split(new, sizes), strict=True):
            xs[i].copy_(part.view(xs[i].shape))


SMALL = 1 << 15
"""Elements below which a call of a compiled function costs more than joining the tensor to others."""


def _inductor(c: Coefficients, *columns: Tensor) -> None:
    # 0-d tensors: another number each step compiles nothing anew.
    number = columns[2].new_tensor
    decay = number(c.decay) if c.decay else None
    run = _compiled(*(x.dtype for x in columns), decay is None)
    run(columns, c.beta1, c.beta2, number(c.step), number(c.eps), number(c.pull), decay)


def _in_place(
    columns: tuple[Tensor, ...],
    beta1: float,
    beta2: float,
    step: Tensor,
    eps: Tensor,
    pull: Tensor,
    decay: Tensor | None,
) -> None:
    """The formula over whole tensors, for a compiler that rounds each operation by itself."""
    wide = columns[2].dtype
    old, grad, m, v, *others = (x.to(wide) for x in columns)
    anchor, importance, *_ = *others, None, None
    betas = beta1, 1 - beta1, beta2, 1 - beta2
    delta, m, v = formula(
        old, grad, m, v, anchor, importance, *betas, step, eps, pull, decay, torch.sqrt, truediv
    )
    for x, new in zip((columns[0], columns[2], columns[3]), (old + delta, m, v), strict=True):
        x.copy_(new)


@cache
def _compiled(*kind: Any) -> Callable[..., Any]:
    """The formula, compiled for one kind of arguments; a copy, since one is compiled only so often."""
    return torch.compile(FunctionType(_in_place.__code__.replace(), _in_place.__globals__), dynamic=True)
