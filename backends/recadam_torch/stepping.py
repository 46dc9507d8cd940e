"""One step over parameters that share their settings: lists of tensors, so that a compiler can follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recadam_core import Coefficients, Hyperparameters, Moments, apply, coefficients, update

from .rounding import noise, round_, widened

__all__ = ["Work", "execute"]


class Work(NamedTuple):
    """Parameters that share their settings, and what a step needs of them: each process's own part."""

    params: list[Tensor]  # the optimizer's own, which may be sharded
    names: list[str]
    thetas: list[Tensor]
    grads: list[Tensor]
    ms: list[Tensor]
    vs: list[Tensor]
    anchors: list[Tensor] | None  # None where there are none, or they are freed
    residuals: list[Tensor | None]
    steps: list[Tensor]  # step counts before the step
    t: int | None  # the step, which all share; None where only the device knows
    hp: Hyperparameters
    lr: Any
    c: Coefficients | None  # None where it is to be computed on the device
    anchored: bool
    group: dict[str, Any]
    kernel: Callable[..., None]


def execute(work: Work) -> None:
    """Take the step, in place on parameters, moments, residuals and step counts."""
    group, anchors = work.group, work.anchors
    grads = list(torch._foreach_neg(work.grads)) if group["maximize"] else work.grads
    c = work.c or _traced(work)
    if c.recall == 0 if isinstance(c.recall, float) else anchors is None:
        anchors, c = None, c._replace(recall=0.0)
    rounds = group["rounding"] != "nearest" and work.thetas[0].dtype in (torch.bfloat16, torch.float16)
    if group["differentiable"]:
        for i, theta in enumerate(work.thetas):
            moments = Moments(work.ms[i], work.vs[i])
            delta, new = update(theta, grads[i], moments, anchors and anchors[i], _pick(c, i))
            work.ms[i].copy_(new.m)
            work.vs[i].copy_(new.v)
            theta.copy_(apply(theta, delta))
    elif rounds:
        # The kernel steps float32 copies; what is special is how they are made and rounded.
        pairs = zip(work.thetas, work.residuals, strict=True)
        wide = [widened(theta, residual) for theta, residual in pairs]
        work.kernel(wide, grads, work.ms, work.vs, anchors, c)
        for i, theta in enumerate(work.thetas):
            chance = None
            if group["rounding"] == "stochastic":
                t = work.steps[i] + 1 if work.t is None else work.t
                chance = noise(work.params[i], work.names[i], t)
            round_(theta, wide[i], work.residuals[i], chance)
    else:
        together = group["foreach"] or (group["foreach"] is None and work.thetas[0].is_cuda)
        if together or group["fused"] or work.c is None:
            parts = [slice(None)]
        else:
            parts = [slice(i, i + 1) for i in range(len(work.thetas))]
        for part in parts:
            lists = (work.thetas[part], grads[part], work.ms[part], work.vs[part])
            work.kernel(*lists, anchors and anchors[part], c)
    torch._foreach_add_(work.steps, 1)


def _traced(work: Work) -> Coefficients:
    """Coefficients computed on the device, as lists of 0-d tensors, one for each parameter."""
    t = torch.stack(work.steps) + 1
    t = t.to(torch.float32 if t.device.type == "mps" else torch.float64)  # which has no other
    m = work.ms[0]

    def column(x: Any) -> Any:
        """Numbers stay numbers."""
        if not isinstance(x, Tensor):
            return x
        return list(x.to(m.device, m.dtype).expand(len(work.steps)).unbind())

    return Coefficients(*map(column, coefficients(t, work.hp, work.lr, work.anchored, xp=torch)))


def _pick(c: Coefficients, index: int) -> Coefficients:
    """The coefficients of one parameter."""
    return Coefficients(*(x[index] if isinstance(x, list) else x for x in c))
