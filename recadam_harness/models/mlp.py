"""A multilayer perceptron, with a backward pass of its own for NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .ops import Model, Ops, cross_entropy, linear, softmax

__all__ = ["MLP"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class MLP(Model):
    r"""Layers $h_{i+1} = \tanh(W_i h_i + b_i)$ and a linear head, named `body.i.*` and `head.*`."""

    widths: tuple[int, ...]
    classes: int
    kind = "mlp"
    head = "head"

    def body_names(self) -> list[str]:
        """Names of the encoder's parameters, without the head's."""
        return [f"body.{i}.{part}" for i in range(len(self.widths) - 1) for part in ("weight", "bias")]

    def init(self, rng: np.random.Generator) -> dict[str, Array]:
        """Fresh parameters: uniform weights of variance 1/fan_in, zero biases, float64."""
        sizes = {f"body.{i}": self.widths[i : i + 2] for i in range(len(self.widths) - 1)}
        params = {}
        for name, (fan_in, fan_out) in {**sizes, "head": (self.widths[-1], self.classes)}.items():
            params[f"{name}.weight"] = rng.uniform(-1, 1, (fan_out, fan_in)) * np.sqrt(3 / fan_in)
            params[f"{name}.bias"] = np.zeros(fan_out)
        return params

    def _layers(self, ops: Ops, params: Mapping[str, Any], x: Any) -> list[Any]:
        layers = [x]
        for i in range(len(self.widths) - 1):
            pre = linear(layers[-1], params[f"body.{i}.weight"], params[f"body.{i}.bias"])
            layers.append(ops.xp.tanh(pre))
        return layers

    def floats_a_row(self, rows: Mapping[str, Any]) -> int:
        """Every layer, forth and back."""
        return 2 * (sum(self.widths) + self.classes)

    def features(self, ops: Ops, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """The last hidden layer, of shape (rows, widths[-1])."""
        return self._layers(ops, params, batch["x"])[-1]

    def value_and_grad(
        self, ops: Ops, params: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The loss and its gradient by the chain rule, layer by layer backwards."""
        layers = self._layers(ops, params, batch["x"])
        logits = linear(layers[-1], params["head.weight"], params["head.bias"])
        loss = cross_entropy(ops, logits, batch["targets"])
        back = (softmax(ops, logits) - batch["targets"]) / logits.shape[0]
        grads = {"head.weight": back.T @ layers[-1], "head.bias": ops.xp.sum(back, axis=0)}
        back = back @ params["head.weight"]
        for i in reversed(range(len(self.widths) - 1)):
            back = back * (1.0 - layers[i + 1] * layers[i + 1])
            grads[f"body.{i}.weight"] = back.T @ layers[i]
            grads[f"body.{i}.bias"] = ops.xp.sum(back, axis=0)
            back = back @ params[f"body.{i}.weight"]
        return loss, grads
