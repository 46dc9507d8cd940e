"""RecAdam in Hugging Face's Trainer: a factory of the optimizer, and a callback that logs what it does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .anchors import Anchors
from .groups import param_groups
from .optimizer import RecAdam

__all__ = ["RecAdamCallback", "RecAdamFactory"]


class RecAdamFactory:
    """Makes the optimizer from the model when Trainer asks for it.

    Trainer makes it after it has loaded a checkpoint to resume from. So name the pretrained weights, or keep
    the anchors in the checkpoint with `save_anchors=True`; otherwise the model as it is then would be taken
    for the pretrained one, which loading refuses.

    Example:
        >>> factory = RecAdamFactory()
        >>> optimizer = factory(nn.Linear(2, 1), new=["bias"], lr=1e-4)
        >>> [group["anchored"] for group in optimizer.param_groups]
        [True, False]
    """

    def __call__(
        self,
        model: nn.Module,
        anchors: str | Path | Mapping[str, Tensor] | None = None,
        new: Iterable[str] = (),
        weight_decay: float = 0.0,
        anchored_weight_decay: float = 0.0,
        new_lr: float | None = None,
        **settings: Any,
    ) -> RecAdam:
        """The optimizer.

        Args:
            model: the model.
            anchors: what `Anchors.of` takes; or `Anchors` themselves.
            new: names or patterns of new parameters.
            weight_decay: of new weights.
            anchored_weight_decay: of anchored weights.
            new_lr: learning rate of new parameters; None for that of the others.
            **settings: of `RecAdam`, as lr, gamma, annealing.
        """
        if not isinstance(anchors, Anchors):
            anchors = Anchors.of(model, anchors, new=new)
        groups = param_groups(
            model,
            anchors,
            new_lr=new_lr,
            weight_decay=weight_decay,
            anchored_weight_decay=anchored_weight_decay,
        )
        return RecAdam(groups, **settings)


class RecAdamCallback(TrainerCallback):
    """Adds to every log: both weights, lr * gamma, the pull's share and the distance to the anchors.

    Example:
        >>> RecAdamCallback().figures(RecAdam(nn.Linear(2, 1).named_parameters()))["recadam/distance"]
        0.0
    """

    @classmethod
    def add_to(cls, trainer: Any) -> RecAdamCallback:
        """Put one before the trainer's other callbacks, so that all of them report its figures."""
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def figures(self, optimizer: Any) -> dict[str, float]:
        """The figures by name; none when the optimizer is another."""
        while not isinstance(optimizer, RecAdam) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # accelerate's wrapper
        if not isinstance(optimizer, RecAdam):
            return {}
        drift = optimizer.drift()
        names = {
            "lambda": drift.task,
            "recall": drift.recall,
            "rate": drift.rate,
            "pull_share": drift.pull_share,
            "distance": drift.distance,
        }
        return {f"recadam/{name}": value for name, value in names.items()}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Trainer's hook."""
        if logs is None or "loss" not in logs:
            return  # an evaluation's
        with torch.no_grad():
            found = self.figures(kwargs.get("optimizer"))
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)
