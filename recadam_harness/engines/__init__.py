"""Engines: what trains a model in one framework, so that one loop serves all of them.

One is announced by an entry point in the group `recadam_harness.engines` whose name is its backend's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from recadam_core.annealing import Annealing, annealed_weights
from recadam_core.errors import RecAdamError, unknown
from recadam_core.hyperparameters import Hyperparameters
from recadam_core.update import Moments

from ..models import Model

__all__ = [
    "OPTIMIZERS",
    "Engine",
    "StepRecord",
    "coupled_gradient",
    "coupled_gradients",
    "engine_of",
    "make_engine",
    "plain_adam",
    "policy",
]

OPTIMIZERS = {
    "recadam": "RecAdam: Adam with the annealed pull outside of its moments",
    "annealed": "RecAdam without its pull: the annealing's task weight alone",
    "adamw": "the framework's own AdamW (in NumPy, the kernel without an anchor)",
    "coupled": "Adam fed with the gradient of the annealed objective, penalty and all",
}
"""Optimizers that every engine has, with a line on each."""


class StepRecord(NamedTuple):
    """What an engine reports of one step.

    Example:
        >>> StepRecord(0.7, 1.0, 0.0, 0.0).loss
        0.7
    """

    loss: float  # of the batch, before the step
    grad_norm: float  # Euclidean norm of the target loss's gradient
    distance: float  # Euclidean distance of the anchored parameters to their anchors, after the step
    travelled: float  # Euclidean distance of all parameters to their start, after the step


class Engine(Protocol):
    """A model, its parameters and an optimizer in one framework.

    Made as `Engine(model, params, anchored, optimizer, hp, dtype)`: the model, its starting values in
    NumPy, the names of those that are pretrained and thus anchored where they start, a name in
    `OPTIMIZERS`, settings, and "float32" or "float64".
    """

    kinds: ClassVar[tuple[str, ...]]  # of model that it can train

    def __init__(
        self,
        model: Model,
        params: Mapping[str, np.ndarray[Any, Any]],
        anchored: frozenset[str],
        optimizer: str,
        hp: Hyperparameters,
        dtype: str,
    ) -> None: ...

    def step(self, batch: Mapping[str, np.ndarray[Any, Any]], lr: float) -> StepRecord:
        """Gradient of the batch's loss, and one step of the optimizer."""
        ...

    def call(self, function: str, batch: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """The model's method of that name ("logits", "features"), at the present parameters."""
        ...

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        """A copy of the present parameters, in NumPy."""
        ...

    def gradients(self, batch: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Gradient of the batch's loss at the present parameters, in NumPy; takes no step."""
        ...

    def moments(self, name: str) -> Moments:
        """A copy of the present moments of one parameter, in NumPy."""
        ...

    def restore(
        self, step: int, weights: Mapping[str, np.ndarray[Any, Any]], moments: Mapping[str, Moments]
    ) -> None:
        """Put a new engine where another was after a step, by what `weights` and `moments` gave there."""
        ...


GROUP = "recadam_harness.engines"
"""The entry-point group in which engines are announced."""


@cache
def engine_of(backend: str) -> type[Engine]:
    """The class of a backend's engine.

    Args:
        backend: the backend's name.

    Returns:
        The class.

    Raises:
        RecAdamError: when the backend has none, or its framework is not installed.

    Example:
        >>> engine_of("numpy").kinds
        ('mlp',)
    """
    announced = {point.name: point for point in entry_points(group=GROUP)}
    if backend not in announced:
        raise unknown("engine", backend, announced)
    try:
        found: type[Engine] = announced[backend].load()
    except ModuleNotFoundError as error:
        raise RecAdamError(
            f"engine {backend!r} needs {error.name!r}, which is not installed; pip install {error.name}"
        ) from error
    return found


def make_engine(
    backend: str,
    model: Model,
    params: Mapping[str, np.ndarray[Any, Any]],
    anchored: frozenset[str],
    optimizer: str,
    hp: Hyperparameters,
    dtype: str,
) -> Engine:
    """The backend's engine for a model.

    Args:
        backend: the backend's name.
        model: the model.
        params: starting values by name.
        anchored: names of the pretrained ones.
        optimizer: a name in `OPTIMIZERS`.
        hp: the settings.
        dtype: "float32" or "float64".

    Returns:
        The engine, ready for its first step.

    Raises:
        RecAdamError: when the backend cannot train that kind of model.
    """
    found = engine_of(backend)
    if model.kind not in found.kinds:
        raise RecAdamError(f"backend {backend!r} has no gradient for a {model.kind} model; use torch or jax")
    return found(model, params, anchored, optimizer, hp, dtype)


def plain_adam(hp: Hyperparameters) -> Hyperparameters:
    """The settings under which RecAdam without anchors is the framework's AdamW or Adam."""
    return hp.replace(gamma=0.0, form="decoupled")


def policy(
    optimizer: str, hp: Hyperparameters, anchored: frozenset[str]
) -> tuple[Hyperparameters, frozenset[str]]:
    """Settings and anchored names for the RecAdam that plays one of `OPTIMIZERS`."""
    if optimizer == "recadam":
        return hp, anchored
    if optimizer == "annealed":
        return hp.replace(gamma=0.0), anchored
    return plain_adam(hp), frozenset()


def coupled_gradient(
    grad: Any, theta: Any, anchor: Any, annealing: Annealing, gamma: float, t: Any, xp: Any = None
) -> Any:
    r"""Gradient of the annealed objective, for an Adam that is fed the penalty too.

    Math:
        $\lambda_t\, g + \bar\lambda_t\, \gamma\, (\theta - \theta^*)$

    Args:
        grad: gradient of the target loss.
        theta: parameter.
        anchor: pretrained value; None for a new head, whose gradient stays as it is.
        annealing: gives the two weights.
        gamma: strength of the penalty.
        t: the step, from 1; a floating array of `xp` when traced.
        xp: namespace of a traced t.

    Returns:
        The gradient, of theta's shape.

    Example:
        >>> from recadam_core import Constant
        >>> coupled_gradient(1.0, 3.0, 2.0, Constant(1.0, 0.5), 10.0, 1)
        6.0

    Source: arXiv 2004.12651, Algorithm 1, the column of Adam on the objective of eq. (8).
    """
    if anchor is None:
        return grad
    task, recall = annealed_weights(annealing, t, xp)
    return task * grad + (recall * gamma) * (theta - anchor)


def coupled_gradients(
    grads: Mapping[str, Any],
    params: Mapping[str, Any],
    anchors: Mapping[str, Any],
    hp: Hyperparameters,
    t: Any,
    xp: Any = None,
) -> dict[str, Any]:
    """`coupled_gradient` of every parameter by name; those without an anchor keep their gradient."""
    return {
        name: coupled_gradient(grad, params[name], anchors.get(name), hp.annealing, hp.gamma, t, xp)
        for name, grad in grads.items()
    }
