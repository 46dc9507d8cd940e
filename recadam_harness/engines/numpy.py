"""The harness's engine for NumPy: models that bring a backward pass of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from recadam_core import Hyperparameters, Moments, RecAdam
from recadam_numpy import backend

from ..models import Ops
from . import Array, Engine, Weights

__all__ = ["NumpyEngine"]

OPS = Ops(np, None)


class NumpyEngine(Engine):
    """Trains with `recadam_core.RecAdam` over NumPy arrays, which makes new ones in each step."""

    kinds = ("mlp",)
    ops = OPS
    model: Any

    @staticmethod
    def _numpy(x: Array) -> Array:
        return x

    def _begin(self, hp: Hyperparameters, pulled: frozenset[str]) -> None:
        self.optimizer = RecAdam(hp, backend)
        self.state = self.optimizer.init(self.params, {name: self.anchors[name] for name in pulled})

    def _differentiate(self, rows: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        loss, grads = self.model.value_and_grad(OPS, self.params, rows)
        return loss, grads

    def _update(self, grads: Mapping[str, Any], lr: float) -> None:
        self.params, self.state = self.optimizer.step(self.params, grads, self.state, lr)

    @staticmethod
    def _norm(arrays: Iterable[Any]) -> float:
        return float(np.sqrt(sum(np.square(x).sum(dtype=np.float64) for x in arrays)))

    def moments(self, name: str) -> Moments:
        """The moments of one parameter."""
        return self.state.moments[name]

    def restore(self, step: int, weights: Weights, moments: Mapping[str, Moments]) -> None:
        """Put a new engine where another was after a step."""
        self.t, self.params = step, dict(weights)
        self.state = self.state._replace(step=step, moments=dict(moments))
