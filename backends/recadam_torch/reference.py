"""The anchors as a reference model: the model itself, with other weights while it is called."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from recadam_core import RecAdamError
from recadam_core.errors import shown

from .drift import Drift
from .matching import check_module, some_of

__all__ = ["evaluating", "reference", "together", "warn_of_others"]

Model = TypeVar("Model", bound=nn.Module)


class HasAnchors(Protocol):
    """What can put a model to its anchors: `AnchorPull`, `RecAdam`, `AnchorCallback`."""

    def at_anchors(self) -> AbstractContextManager[None]:
        """The model with its pretrained weights, for as long as the context lasts."""


def reference(model: Model, anchored: HasAnchors | Sequence[HasAnchors]) -> Model:
    """The model as it was before it was tuned: a reference for DPO or distillation that needs no memory.

    It shares everything with the model. When it is called, in evaluation mode and without gradients, the
    parameters are at their anchors until it returns.

    Args:
        model: the model that is trained.
        anchored: what knows its anchors and has `at_anchors`: the handle of `anchor`, a `RecAdam`, or an
            `AnchorCallback`, before training starts, too; or a list, of a model with several optimizers.

    Returns:
        A module of the model's class, to be called and not to be trained, saved or sharded.

    Raises:
        RecAdamError: when the model is no module; when it is called, as `at_anchors` does.

    Example:
        >>> from recadam_torch import anchor
        >>> model = nn.Linear(1, 1, bias=False)
        >>> frozen = reference(model, anchor(torch.optim.SGD(model.parameters(), lr=0.1)))
        >>> before = model(torch.ones(1)).item()
        >>> _ = model.weight.data.add_(1.0)
        >>> frozen(torch.ones(1)).item() == before
        True

    Source: the reference policy of arXiv 2305.18290, eq. (7).
    """
    check_module("reference", model)
    known = together("reference", anchored)
    warn_of_others("reference", model, anchored)
    twin = copy.copy(model)
    kind: Any = type(model)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), evaluating(self), known.at_anchors():
            return kind.__call__(self, *args, **kwargs)

    def itself(self: Any, *_: Any, **__: Any) -> Any:
        return self  # or what is asked of the reference would be done to the model

    methods = dict.fromkeys(("train", "eval", "requires_grad_", "_apply"), itself)
    methods |= {"__call__": called, "__module__": kind.__module__}
    twin.__class__ = type(kind.__name__, (kind,), methods)
    return twin


def together(where: str, anchored: Any) -> Any:
    """What has `at_anchors`, made of several if it is a list of such."""
    several = anchored if isinstance(anchored, (list, tuple)) else [anchored]
    if not several or not all(hasattr(one, "at_anchors") for one in several):
        raise RecAdamError(f"{where}: {shown(anchored)} has no at_anchors; give what anchor() returns")
    return several[0] if len(several) == 1 else Several(several)


def warn_of_others(where: str, model: nn.Module, anchored: Any) -> None:
    """Warn of what in the model is not at its anchors when it should be."""
    several = anchored if isinstance(anchored, (list, tuple)) else [anchored]
    groups = [_groups_of(one) for one in several]
    stepped = {p for some in groups for group in some or () for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = [name for name, p in trained.items() if p not in stepped]
    if groups and all(some is not None for some in groups) and stepped.isdisjoint(model.parameters()):
        raise RecAdamError(
            f"{where}: what has the anchors steps none of this model's parameters; give the handle of the "
            "optimizer that trains the model"
        )
    if all(some is not None for some in groups) and others and len(others) < len(trained):
        warnings.warn(
            f"{where}: {some_of(others)} are stepped by an optimizer that is not among these, and stay as "
            "they are; give a list of all handles",
            stacklevel=3,
        )
    for name, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None:
            warnings.warn(
                f"{where}: the running statistics of {name!r} have no anchors, and stay as they are",
                stacklevel=3,
            )
            return


def _groups_of(anchored: Any) -> list[Any] | None:
    """The groups of parameters that something has the anchors of; None where it does not say."""
    handles = getattr(anchored, "handles", None)
    if handles is None:
        groups: list[Any] | None = getattr(anchored, "param_groups", None)
        return groups
    return [group for handle in handles for group in handle.param_groups] or None  # before training


class Several:
    """What knows the anchors of one optimizer's parameters, and of another's.

    Example:
        >>> from recadam_torch import anchor
        >>> layers = [nn.Linear(1, 1), nn.Linear(1, 1)]
        >>> handles = [anchor(torch.optim.SGD(layer.parameters(), lr=0.1)) for layer in layers]
        >>> Several(handles).drift().distance
        0.0
    """

    def __init__(self, several: Sequence[Any]) -> None:
        self._several = several

    @contextmanager
    def at_anchors(self) -> Iterator[None]:
        """All at their anchors."""
        with ExitStack() as stack:
            for one in self._several:
                stack.enter_context(one.at_anchors())
            yield

    def drift(self) -> Drift:
        """The drift of all together, of which only the distance is one number if they are several."""
        drifts: list[Drift] = [one.drift() for one in self._several]
        if len(drifts) == 1:
            return drifts[0]
        parameters = {name: x for drift in drifts for name, x in drift.parameters.items()}
        distance = math.hypot(*(drift.distance for drift in drifts))
        unknown = dict.fromkeys(("relative", "pull_share", "task", "recall", "rate"), math.nan)
        return Drift(name="", distance=distance, parameters=parameters, **unknown)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and each module as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
