"""What an optimizer did in its last step, and how far it has come from its anchors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recadam_core import Coefficients

from .shards import local

__all__ = ["Drift", "drift_of", "squares"]


class Drift(NamedTuple):
    """How far a parameter is from its anchor, and what pulls it.

    Example:
        >>> Drift("w", 0.5, 0.25, 0.1, 0.9, 0.1, 1e-3).distance
        0.5
    """

    name: str  # of the parameter; empty for all together
    distance: float  # Euclidean, to the anchor; NaN where that was freed
    relative: float  # distance / norm of the anchor
    pull_share: float  # of the last update: norm of the pull / (that + norm of the task's step)
    task: float  # task weight of the last step
    recall: float  # recall weight of the last step
    rate: float  # lr * gamma
    parameters: Mapping[str, Drift] = {}  # each by name, in the figures of all together


def squares(p: Tensor, state: dict[str, Any], c: Coefficients | None) -> list[Tensor]:
    """Sums of squares over this process's part: distance, anchor, the last pull, the last task step."""
    m, v = local(state["exp_avg"]), local(state["exp_avg_sq"])
    theta, star = (local(x).to(m.device, m.dtype) for x in (p, state["anchor"]))
    found = [(theta - star).square(), star.square()]
    if c is None or abs(1 - c.recall - c.decay) < 1e-3:  # too little is left of where it stood
        found += [torch.full_like(m, torch.nan)] * 2
    else:
        adam = c.step * (m / (v.sqrt() + c.eps))
        recall = c.recall * local(state["importance"]).to(m.dtype) if "importance" in state else c.recall
        before = (theta - recall * star + adam) / (1 - recall - c.decay)
        found += [(recall * (star - before)).square(), adam.square()]
    return [x.sum(dtype=torch.float64) for x in found]


def drift_of(name: str, sums: Tensor, task: float, recall: float, rate: float) -> Drift:
    """The figures, from sums of squares as `squares` gives them and the weights of the last step."""
    distance, norm, pull, adam = sums.sqrt().tolist()
    share = 0.0 if pull + adam == 0 else pull / (pull + adam)
    return Drift(name, distance, distance / norm if norm else float("inf"), share, task, recall, rate)
