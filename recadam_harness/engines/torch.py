"""The harness's engine for PyTorch: autograd through the shared models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from recadam_core import Hyperparameters, Moments
from recadam_torch import RecAdam

from ..models import Ops
from . import Array, Engine, Weights

__all__ = ["TorchEngine"]

OPS = Ops(xp, torch.erf)


class TorchEngine(Engine):
    """Trains with `recadam_torch.RecAdam` or torch's AdamW; see `recadam_harness.engines.Engine`."""

    ops = OPS
    params: dict[str, Tensor]

    def _column(self, x: Array) -> Tensor:
        tensor = torch.tensor(x, device="cuda" if torch.cuda.is_available() else "cpu")
        return tensor.to(getattr(torch, self.dtype)) if tensor.is_floating_point() else tensor

    def _parameter(self, x: Array) -> Tensor:
        return self._column(x).requires_grad_()

    @staticmethod
    def _copy(x: Tensor) -> Tensor:
        return x.detach().clone()

    @staticmethod
    def _numpy(x: Tensor) -> Array:
        array: Array = x.detach().cpu().numpy().copy()
        return array

    @staticmethod
    def _untaped() -> AbstractContextManager[Any]:
        return torch.no_grad()

    def _begin(self, hp: Hyperparameters, pulled: frozenset[str]) -> None:
        self.optimizer: torch.optim.Optimizer
        if self.optimizer_name == "adamw":
            rates: Any = {"lr": hp.lr, "betas": hp.betas, "eps": hp.eps}
            self.optimizer = torch.optim.AdamW(self.params.items(), **rates, weight_decay=hp.weight_decay)
        else:
            settings = {name: getattr(hp, name) for name in hp.__dataclass_fields__}
            anchors = {name: self.anchors[name] for name in pulled}
            self.optimizer = RecAdam(self.params.items(), anchors=anchors, **settings)

    @torch.enable_grad()
    def _differentiate(self, rows: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.optimizer.zero_grad()
        loss = self.model.loss(OPS, self.params, rows)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in self.params.items()}

    def _update(self, grads: Mapping[str, Any], lr: float) -> None:
        for name, grad in grads.items():
            self.params[name].grad = grad
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()

    @staticmethod
    def _norm(arrays: Iterable[Any]) -> float:
        norms = [torch.linalg.vector_norm(x) for x in arrays]
        return float(torch.stack(norms or [torch.zeros(1)]).double().norm())

    def moments(self, name: str) -> Moments:
        """A copy of one parameter's moments; AdamW has none before its first step."""
        theta = self.params[name]
        state = self.optimizer.state.get(theta, {})
        zeros = torch.zeros_like(theta)
        return Moments(*(self._numpy(state.get(part, zeros)) for part in ("exp_avg", "exp_avg_sq")))

    @torch.no_grad()
    def restore(self, step: int, weights: Weights, moments: Mapping[str, Moments]) -> None:
        """Put a new engine where another was after a step."""
        self.t = step
        saved = self.optimizer.state_dict()
        for index, (name, p) in enumerate(self.params.items()):
            p.copy_(self._column(weights[name]))
            pair = {"exp_avg": self._column(moments[name].m), "exp_avg_sq": self._column(moments[name].v)}
            saved["state"].setdefault(index, {}).update(pair, step=torch.tensor(float(step)))
        self.optimizer.load_state_dict(saved)
