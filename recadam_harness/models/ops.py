"""What a model may use: an array-API namespace, and the one function that the standard lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = ["Model", "Ops", "cross_entropy", "gelu", "layer_norm", "linear", "softmax"]


@dataclass(frozen=True)
class Ops:
    """A namespace for models.

    Args:
        xp: an array-API namespace.
        erf: the error function for its arrays.

    Example:
        >>> import numpy as np
        >>> Ops(np, erf=None).xp is np
        True
    """

    xp: Any
    erf: Callable[[Any], Any] | None


class Model:
    """A differentiable function of named parameters, the same for every framework: a linear head on features.

    `batch` is a dict of arrays whose rows
    are examples. `loss` is a scalar, the mean over rows of the cross-entropy against
    `batch["targets"]` (one-hot, of shape (rows, classes)).
    """

    kind: ClassVar[str]  # as an engine's `kinds` names it
    head: ClassVar[str]  # name of the linear layer on the features

    def floats_a_row(self, rows: Mapping[str, Any]) -> int:
        """Roughly how many numbers a step keeps of each row, for its way back."""
        raise NotImplementedError

    def features(self, ops: Ops, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """What the encoder makes of each row, of shape (rows, width)."""
        raise NotImplementedError

    def logits(self, ops: Ops, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """Scores of the target task, of shape (rows, classes)."""
        features = self.features(ops, params, batch)
        return linear(features, params[f"{self.head}.weight"], params[f"{self.head}.bias"])

    def loss(self, ops: Ops, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """Loss of the target task, a scalar: cross-entropy against one-hot `batch["targets"]`."""
        return cross_entropy(ops, self.logits(ops, params, batch), batch["targets"])


def linear(x: Any, weight: Any, bias: Any) -> Any:
    """X @ weight.T + bias, with weights of shape (out, in) as in PyTorch's checkpoints."""
    return x @ weight.T + bias


def softmax(ops: Ops, x: Any) -> Any:
    """Softmax over the last axis, shifted by its largest value."""
    e = ops.xp.exp(x - ops.xp.max(x, axis=-1, keepdims=True))
    return e / ops.xp.sum(e, axis=-1, keepdims=True)


def cross_entropy(ops: Ops, logits: Any, targets: Any) -> Any:
    """Mean over rows of -sum(targets * log softmax(logits))."""
    xp = ops.xp
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    log_sum = xp.log(xp.sum(xp.exp(shifted), axis=-1))
    return xp.mean(log_sum - xp.sum(targets * shifted, axis=-1))


def layer_norm(ops: Ops, x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """Layer normalisation over the last axis."""
    xp = ops.xp
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    variance = xp.mean(centred * centred, axis=-1, keepdims=True)
    return centred / xp.sqrt(variance + eps) * weight + bias


def gelu(ops: Ops, x: Any) -> Any:
    """X times the normal distribution's cumulative function, by erf as BERT has it."""
    if ops.erf is None:
        raise TypeError("gelu needs an erf in its Ops")
    return x * (0.5 * (1.0 + ops.erf(x * 0.7071067811865476)))
