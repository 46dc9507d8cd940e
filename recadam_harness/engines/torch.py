"""The harness's engine for PyTorch: autograd through the shared models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor

from recadam_core import Hyperparameters, Moments
from recadam_torch import RecAdam

from ..models import Model, Ops
from . import StepRecord, coupled_gradients, policy

__all__ = ["TorchEngine"]

Array = np.ndarray[Any, Any]
OPS = Ops(xp, torch.erf)


class TorchEngine:
    """Trains with `recadam_torch.RecAdam` or torch's AdamW; see `recadam_harness.engines.Engine`."""

    kinds = ("mlp", "bert")

    def __init__(
        self,
        model: Model,
        params: Mapping[str, Array],
        anchored: frozenset[str],
        optimizer: str,
        hp: Hyperparameters,
        dtype: str,
    ) -> None:
        self.model, self.hp, self.optimizer_name = model, hp, optimizer
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, dtype)
        self.params = {n: self._tensor(x).requires_grad_() for n, x in params.items()}
        self.start = {n: p.detach().clone() for n, p in self.params.items()}
        self.anchors = {n: x for n, x in self.start.items() if n in anchored}
        self.t = 0
        if optimizer == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                self.params.items(), lr=hp.lr, betas=hp.betas, eps=hp.eps, weight_decay=hp.weight_decay
            )
        else:
            settings, pulled = policy(optimizer, hp, anchored)
            self.optimizer = RecAdam(
                self.params.items(),
                anchors={name: self.anchors[name] for name in pulled},
                **{name: getattr(settings, name) for name in settings.__dataclass_fields__},
            )

    def step(self, batch: Mapping[str, Array], lr: float) -> StepRecord:
        """One step."""
        self.t += 1
        self.optimizer.zero_grad()
        loss = self.model.loss(OPS, self.params, self._batch(batch))
        loss.backward()
        norm = _norm(p.grad for p in self.params.values())
        if self.optimizer_name == "coupled":
            with torch.no_grad():
                grads = {name: p.grad for name, p in self.params.items()}
                for name, grad in coupled_gradients(
                    grads, self.params, self.anchors, self.hp, self.t
                ).items():
                    self.params[name].grad = grad
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            moved = {n: p - self.start[n] for n, p in self.params.items()}
            return StepRecord(loss.item(), norm, _norm(moved[n] for n in self.anchors), _norm(moved.values()))

    @torch.no_grad()
    def call(self, function: str, batch: Mapping[str, Array]) -> Array:
        """A method of the model."""
        result: Array = getattr(self.model, function)(OPS, self.params, self._batch(batch)).cpu().numpy()
        return result

    def weights(self) -> dict[str, Array]:
        """A copy of the parameters."""
        return {n: p.detach().cpu().numpy().copy() for n, p in self.params.items()}

    def gradients(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Gradient of the batch's loss."""
        loss = self.model.loss(OPS, self.params, self._batch(batch))
        grads = torch.autograd.grad(loss, list(self.params.values()))
        return {name: x.cpu().numpy().copy() for name, x in zip(self.params, grads, strict=True)}

    def moments(self, name: str) -> Moments:
        """A copy of one parameter's moments; AdamW has none before its first step."""
        theta = self.params[name]
        state = self.optimizer.state.get(theta, {})
        zeros = torch.zeros_like(theta)
        return Moments(*(state.get(k, zeros).cpu().numpy().copy() for k in ("exp_avg", "exp_avg_sq")))

    @torch.no_grad()
    def restore(self, step: int, weights: Mapping[str, Array], moments: Mapping[str, Moments]) -> None:
        """Put a new engine where another was after a step."""
        self.t = step
        saved = self.optimizer.state_dict()
        for index, (name, p) in enumerate(self.params.items()):
            p.copy_(self._tensor(weights[name]))
            pair = {"exp_avg": self._tensor(moments[name].m), "exp_avg_sq": self._tensor(moments[name].v)}
            saved["state"].setdefault(index, {}).update(pair, step=torch.tensor(float(step)))
        self.optimizer.load_state_dict(saved)

    def _tensor(self, x: Array) -> Tensor:
        tensor = torch.tensor(x, device=self.device)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _batch(self, batch: Mapping[str, Array]) -> dict[str, Tensor]:
        return {n: self._tensor(x) for n, x in batch.items()}


def _norm(tensors: Iterable[Any]) -> float:
    return float(
        torch.stack([torch.linalg.vector_norm(x) for x in tensors] or [torch.zeros(1)]).double().norm()
    )
