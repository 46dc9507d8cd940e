"""The anchors as a reference model: the model itself, with other weights while it is called."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from .matching import check_module

__all__ = ["reference"]

Model = TypeVar("Model", bound=nn.Module)


class HasAnchors(Protocol):
    """What can put a model to its anchors: `AnchorPull`, `RecAdam`, `AnchorCallback`."""

    def at_anchors(self) -> AbstractContextManager[None]:
        """The model with its pretrained weights, for as long as the context lasts."""


def reference(model: Model, anchored: HasAnchors) -> Model:
    """The model as it was before it was tuned: a reference for DPO or distillation that needs no memory.

    It shares everything with the model. When it is called, in evaluation mode and without gradients, the
    parameters are at their anchors until it returns.

    Args:
        model: the model that is trained.
        anchored: what knows its anchors and has `at_anchors`: the handle of `anchor`, a `RecAdam`, or an
            `AnchorCallback`, before training starts, too.

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
    twin = copy.copy(model)
    kind: Any = type(model)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        was = [module for module in self.modules() if module.training]
        for module in was:
            module.training = False
        try:
            with torch.no_grad(), anchored.at_anchors():
                return kind.__call__(self, *args, **kwargs)
        finally:
            for module in was:
                module.training = True

    twin.__class__ = type(kind.__name__, (kind,), {"__call__": called, "__module__": kind.__module__})
    return twin
