"""Engines: what trains a model in one framework, so that one loop serves all of them.

One is announced by an entry point in the group `recadam_harness.engines` whose name is its backend's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, NamedTuple

import numpy as np

from recadam_core.annealing import Annealing, annealed_weights
from recadam_core.errors import RecAdamError, unknown
from recadam_core.hyperparameters import Hyperparameters
from recadam_core.interrupts import deferred
from recadam_core.update import Moments

from ..models import Model, Ops

__all__ = [
    "OPTIMIZERS",
    "UNREAD",
    "Engine",
    "StepRecord",
    "able",
    "announced",
    "coupled_gradient",
    "coupled_gradients",
    "engine_of",
    "make_engine",
    "plain_adam",
    "policy",
    "reference_first",
]

Array = np.ndarray[Any, Any]
Weights = Mapping[str, Array]

OPTIMIZERS = {
    "recadam": "RecAdam: Adam with the annealed pull outside of its moments",
    "annealed": "RecAdam without its pull: the annealing's task weight alone",
    "adamw": "the framework's own AdamW (in NumPy, the kernel without an anchor)",
    "coupled": "Adam fed with the gradient of the annealed objective, penalty and all",
}
"""Optimizers that every engine has, with a line on each."""

_CURVE = ("annealing", "k", "t0", "weight")
UNREAD = {
    "adamw": ("gamma", *_CURVE, "form", "bias_correction"),
    "annealed": ("gamma",),
    "coupled": ("form",),
}
"""Settings that one of them does not read."""


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


class Engine(ABC):
    """A model, its parameters and an optimizer in one framework.

    Made as `Engine(model, params, anchored, optimizer, hp, dtype)`: the model, its starting values in
    NumPy, the names of those that are pretrained and thus anchored where they start, a name in
    `OPTIMIZERS`, settings, and "float32" or "float64".

    A framework adds how it holds arrays, differentiates and updates: what is abstract here.
    """

    kinds: ClassVar[tuple[str, ...]] = ("mlp", "bert", "gemma")  # of model that it can train
    ops: ClassVar[Ops]
    sweep: ClassVar[Callable[..., tuple[dict[str, Array], list[dict[str, Array]]]] | None] = None
    """Trains from many starts in one program, as `recadam_harness.seeds` calls it; None where it cannot."""

    def __init__(
        self,
        model: Model,
        params: Weights,
        anchored: frozenset[str],
        optimizer: str,
        hp: Hyperparameters,
        dtype: str,
    ) -> None:
        self.model, self.hp, self.dtype, self.optimizer_name = model, hp, dtype, optimizer
        self.params: dict[str, Any] = {name: self._parameter(x) for name, x in params.items()}
        self.start = {name: self._copy(x) for name, x in self.params.items()}
        self.anchors = {name: x for name, x in self.start.items() if name in anchored}
        self.t = 0
        self._begin(*policy(optimizer, hp, anchored))

    def step(self, batch: Weights, lr: float) -> StepRecord:
        """Gradient of the batch's loss, and one step of the optimizer."""
        with self._untaped():
            self.t += 1
            loss, grads = self._differentiate(self._rows(batch))
            norm = self._norm(grads.values())
            if self.optimizer_name == "coupled":
                grads = coupled_gradients(grads, self.params, self.anchors, self.hp, self.t)
            self._update(grads, lr)
            moved = {name: x - self.start[name] for name, x in self.params.items()}
            distance = self._norm(moved[name] for name in self.anchors)
            return StepRecord(float(loss), norm, distance, self._norm(moved.values()))

    def call(self, function: str, batch: Weights) -> Array:
        """The model's method of that name ("logits", "features"), at the present parameters."""
        with self._untaped():
            return self._numpy(getattr(self.model, function)(self.ops, self.params, self._rows(batch)))

    def weights(self) -> dict[str, Array]:
        """The present parameters in NumPy, as later steps leave them."""
        return {name: self._numpy(x) for name, x in self.params.items()}

    def gradients(self, batch: Weights) -> dict[str, Array]:
        """Gradient of the batch's loss at the present parameters, in NumPy; takes no step."""
        grads = self._differentiate(self._rows(batch))[1]
        return {name: self._numpy(x) for name, x in grads.items()}

    @abstractmethod
    def moments(self, name: str) -> Moments:
        """The present moments of one parameter in NumPy, as later steps leave them."""

    @abstractmethod
    def restore(self, step: int, weights: Weights, moments: Mapping[str, Moments]) -> None:
        """Put a new engine where another was after a step, by what `weights` and `moments` gave there."""

    def _rows(self, batch: Weights) -> dict[str, Any]:
        return {name: self._column(x) for name, x in batch.items()}

    def _column(self, x: Array) -> Any:
        """A column of a batch: floats in the run's dtype, whole numbers as they are."""
        return x.astype(self.dtype) if x.dtype.kind == "f" else x

    def _parameter(self, x: Array) -> Any:
        return self._column(x)

    @staticmethod
    def _copy(x: Any) -> Any:
        """A parameter, as later steps leave it."""
        return x

    @staticmethod
    def _numpy(x: Any) -> Array:
        """An array in NumPy, as later steps leave it."""
        return np.array(x)

    @staticmethod
    def _untaped() -> AbstractContextManager[Any]:
        """Where nothing is recorded for differentiation."""
        return nullcontext()

    @abstractmethod
    def _begin(self, hp: Hyperparameters, pulled: frozenset[str]) -> None:
        """Make the optimizer: RecAdam with these settings and anchors, or what stands for it."""

    @abstractmethod
    def _differentiate(self, rows: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The loss and its gradient by name."""

    def _update(self, grads: Mapping[str, Any], lr: float) -> None:
        """One step of the optimizer; not needed where `step` is one compiled function."""
        raise NotImplementedError

    @staticmethod
    def _norm(arrays: Iterable[Any]) -> Any:
        """Euclidean norm of all of them together."""
        raise NotImplementedError


GROUP = "recadam_harness.engines"
"""The entry-point group in which engines are announced."""


def reference_first(backend: str) -> tuple[int, str]:
    """Sorts the names of backends: the reference first, those of other packages last."""
    order = ("numpy", "torch", "jax")
    return (order.index(backend) if backend in order else len(order)), backend


@cache
def announced() -> dict[str, EntryPoint]:
    """Engines by their backend's name, installed or not."""
    points = {point.name: point for point in entry_points(group=GROUP)}
    return {name: points[name] for name in sorted(points, key=reference_first)}


def able(can: Callable[[type[Engine]], bool]) -> str:
    """The backends, of those that are installed, whose engine is able to do something: "torch or jax"."""
    names = []
    for name in announced():
        try:
            names += [name] * can(engine_of(name))
        except RecAdamError:
            continue
    return " or ".join(names) or "another backend"


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
    if backend not in announced():
        raise unknown("engine", backend, announced())
    try:
        with deferred():
            engine: type[Engine] = announced()[backend].load()
    except ModuleNotFoundError as error:
        raise RecAdamError(
            f"engine {backend!r} needs {error.name!r}, which is not installed; pip install {error.name}"
        ) from error
    except (ImportError, AttributeError) as error:  # a module of which only a part was loaded
        raise RecAdamError(f"engine {backend!r} does not load: {error}; start Python anew") from error
    return engine


def make_engine(
    backend: str,
    model: Model,
    params: Weights,
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
    engine = engine_of(backend)
    if model.kind not in engine.kinds:
        others = able(lambda other: model.kind in other.kinds)
        raise RecAdamError(f"backend {backend!r} has no gradient for a {model.kind} model; use {others}")
    return engine(model, params, anchored, optimizer, hp, dtype)


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
