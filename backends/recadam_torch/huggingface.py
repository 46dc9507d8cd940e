"""RecAdam in Hugging Face's Trainer: a factory of the optimizer, and a callback that logs what it does."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from recadam_core import RecAdamError

from .anchors import Anchors
from .groups import param_groups
from .optimizer import RecAdam

__all__ = ["RecAdamCallback", "RecAdamFactory"]


class RecAdamFactory:
    """Makes the optimizer from the model when Trainer asks for it.

    Trainer makes it after it has loaded a checkpoint to resume from: the model as it is then may be a tuned
    one. So the anchors have to be given: the name of the pretrained weights, or `Anchors.of(model)`, taken
    before.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> settings = {"anchors": Anchors.of(model, new=["bias"]), "lr": 1e-4}
        >>> optimizer = RecAdamFactory()(model, **settings)
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
        """The optimizer."""
        if anchors is None:
            raise RecAdamError(
                "RecAdamFactory: anchors is None, and Trainer may have loaded a checkpoint into the model "
                "by now; name the pretrained weights, or give Anchors.of(model, new=[...]), taken before"
            )
        if isinstance(anchors, Anchors) and new:
            raise RecAdamError("RecAdamFactory: new and Anchors are both given; say new to Anchors.of")
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
        ours = _unwrapped(optimizer)
        if ours is None:
            return {}
        drift = ours.drift()
        names = {
            "lambda": drift.task,
            "recall": drift.recall,
            "rate": drift.rate,
            "pull_share": drift.pull_share,
            "distance": drift.distance,
        }
        return {f"recadam/{name}": value for name, value in names.items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer's hook: warns when it resumes from a checkpoint without the optimizer's state."""
        optimizer, step = _unwrapped(kwargs.get("optimizer")), state.global_step
        if optimizer is None or not step or any(int(s["step"]) for s in optimizer.state.values()):
            return
        warnings.warn(
            f"RecAdam: Trainer resumes at step {step} from a checkpoint without the optimizer "
            "(save_only_model?): moments and annealing begin anew, and without anchors=... the tuned weights "
            "are the anchors; save the optimizer, too",
            stacklevel=2,
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Trainer's hook."""
        if logs is None or "loss" not in logs:
            return  # an evaluation's
        with torch.no_grad():
            figures = self.figures(kwargs.get("optimizer"))
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)


def _unwrapped(optimizer: Any) -> RecAdam | None:
    """The optimizer in accelerate's wrapper; None when it is another."""
    while not isinstance(optimizer, RecAdam) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, RecAdam) else None
