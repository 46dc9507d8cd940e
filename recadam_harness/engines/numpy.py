"""The harness's engine for NumPy: models that bring a backward pass of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from recadam_core import Hyperparameters, Moments, RecAdam
from recadam_numpy import backend

from ..models import Ops
from . import StepRecord, coupled_gradients, policy

__all__ = ["NumpyEngine"]

Array = np.ndarray[Any, Any]
OPS = Ops(np, None)


class NumpyEngine:
    """Trains with `recadam_core.RecAdam` over NumPy arrays; see `recadam_harness.engines.Engine`."""

    kinds = ("mlp",)

    def __init__(
        self,
        model: Any,
        params: Mapping[str, Array],
        anchored: frozenset[str],
        optimizer: str,
        hp: Hyperparameters,
        dtype: str,
    ) -> None:
        self.model, self.hp, self.dtype = model, hp, dtype
        self.params = {name: x.astype(dtype) for name, x in params.items()}
        self.start = dict(self.params)
        self.anchors = {name: self.start[name] for name in self.start if name in anchored}
        self.coupled = optimizer == "coupled"
        settings, pulled = policy(optimizer, hp, anchored)
        self.optimizer = RecAdam(settings, backend)
        self.state = self.optimizer.init(self.params, {name: self.anchors[name] for name in pulled})

    def step(self, batch: Mapping[str, Array], lr: float) -> StepRecord:
        """One step."""
        loss, grads = self.model.value_and_grad(OPS, self.params, self._batch(batch))
        norm = _norm(grads.values())
        if self.coupled:
            grads = coupled_gradients(grads, self.params, self.anchors, self.hp, self.state.step + 1)
        self.params, self.state = self.optimizer.step(self.params, grads, self.state, lr)
        moved = {n: x - self.start[n] for n, x in self.params.items()}
        return StepRecord(float(loss), norm, _norm(moved[n] for n in self.anchors), _norm(moved.values()))

    def call(self, function: str, batch: Mapping[str, Array]) -> Array:
        """A method of the model."""
        result: Array = getattr(self.model, function)(OPS, self.params, self._batch(batch))
        return result

    def weights(self) -> dict[str, Array]:
        """The parameters; steps make new ones, so none is copied."""
        return dict(self.params)

    def gradients(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Gradient of the batch's loss."""
        grads: dict[str, Array] = self.model.value_and_grad(OPS, self.params, self._batch(batch))[1]
        return grads

    def moments(self, name: str) -> Moments:
        """The moments of one parameter; steps make new ones."""
        return self.state.moments[name]

    def restore(self, step: int, weights: Mapping[str, Array], moments: Mapping[str, Moments]) -> None:
        """Put a new engine where another was after a step."""
        self.params = dict(weights)
        self.state = self.state._replace(step=step, moments=dict(moments))

    def _batch(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        return {n: x.astype(self.dtype) if x.dtype.kind == "f" else x for n, x in batch.items()}


def _norm(arrays: Any) -> float:
    return float(np.sqrt(sum(np.square(x).sum(dtype=np.float64) for x in arrays)))
