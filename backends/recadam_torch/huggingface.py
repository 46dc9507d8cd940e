"""Hugging Face's Trainer and its kin: RecAdam by a factory, the pull around any optimizer by a callback."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from recadam_core import RecAdamError
from recadam_core.errors import shown

from .anchors import Anchors, check_new
from .callbacks import Anchoring
from .groups import param_groups
from .optimizer import RecAdam
from .pulling import AnchorPull
from .starts import Start

__all__ = ["AnchorCallback", "RecAdamCallback", "RecAdamFactory"]


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
        new = check_new("RecAdamFactory", anchors, new)
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


class _Logged(TrainerCallback):
    """A callback whose figures are in every log of the training loss."""

    @classmethod
    def add_to(cls, trainer: Any, *args: Any, **settings: Any) -> Any:
        """Put one before the trainer's other callbacks, so that all of them report its figures."""
        if not hasattr(trainer, "callback_handler"):
            raise RecAdamError(
                f"{cls.__name__}.add_to: {shown(trainer)} is no Trainer of transformers; give one"
            )
        callback = cls(*args, **settings)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def figures(self, optimizer: Any) -> dict[str, float]:
        """The figures by name; none when they are not of this optimizer."""
        raise NotImplementedError

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Trainer's hook."""
        if logs is None or "loss" not in logs:
            return  # an evaluation's
        with torch.no_grad():
            figures = self.figures(kwargs.get("optimizer"))
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)


class RecAdamCallback(_Logged):
    """Adds to every log: both weights, lr * gamma, the pull's share and the distance to the anchors.

    Example:
        >>> RecAdamCallback().figures(RecAdam(nn.Linear(2, 1).named_parameters()))["recadam/distance"]
        0.0
    """

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


class AnchorCallback(Anchoring, _Logged):
    r"""Lets whatever optimizer Trainer makes pull towards the pretrained weights: `anchor` in one line.

    For Trainer and what is made of it: TRL's trainers, sentence-transformers'. When training starts, the
    anchors are the file that the model names, if the model is still what it holds; otherwise the weights as
    they are, which are written beside the checkpoints, once, for a run that is resumed. Of LoRA the product
    is anchored at zero, where it starts.

    Args:
        pull: as in `anchor`.
        anchors: where the pretrained weights are: as in `Anchors.of`, or `Anchors`. None as said above.
        new: names of new parameters, or patterns as "classifier.*": these are not pulled.
        annealing: as in `anchor`.
        importance: as in `anchor`.
        probe: texts or batches on which forgetting is measured, as in `Forgetting`; its figure is logged.
        every: steps between two measurements.
        budget: of the figure, which the pull's strength then holds: a number, or a `DriftBudget`.
        stop_at: the figure at which training ends.

    Raises:
        RecAdamError: for a value outside its range, at once; when training starts, as `anchor` and
            `Anchors.of` do, and when the anchors of a run that is resumed are not found.

    Example:
        >>> callback = AnchorCallback(pull=0.1)  # trainer.add_callback(callback)
        >>> callback.handle is None  # until training starts; then it is what `anchor` returns
        True
    """

    @property
    def handle(self) -> AnchorPull | None:
        """What `anchor` returned; None until training starts."""
        return self.handles[0] if self.handles else None

    def figures(self, optimizer: Any) -> dict[str, float]:
        """The distance to the anchors, and the weight of the last step's pull."""
        if self.handle is None:
            return {}
        drift = self.handle.drift()
        return {"anchor/distance": drift.distance, "anchor/pull": drift.rate, **self.watch.figures()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer's hook: the optimizer is made, and a checkpoint to resume from is loaded."""
        self._begin(args, state, kwargs["model"], kwargs["optimizer"])
        tokenizer = kwargs.get("processing_class")
        self.watch.begin(kwargs["model"], self.handles, tokenizer, state.max_steps - state.global_step)

    def _begin(self, args: Any, state: Any, model: nn.Module, optimizer: Any) -> None:
        """Let there be a handle of this optimizer."""
        before = self.handle
        if before is not None and before.is_of(optimizer):
            return  # trained on
        start = Start(model, optimizer, Path(args.output_dir), self._new, self._settings)
        if self._given is not None:
            handle = start.given(self._given)
        elif before is not None and start.is_of(before):  # begun anew, as with batches that fit
            handle = start.given(before.anchors)
        elif state.global_step:
            handle = start.again(state.global_step)
        else:
            handle = start.first(_saves(args), writes=state.is_world_process_zero)
        self.handles = [handle]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer's hook: measures forgetting, if it is time."""
        if self.watch.look(self.handles, state.global_step):
            control.should_training_stop = control.should_log = True
            control.should_save = control.should_save or _saves(args)


def _saves(args: Any) -> bool:
    """Whether there will be checkpoints."""
    return str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"


def _unwrapped(optimizer: Any) -> RecAdam | None:
    """The optimizer in accelerate's wrapper; None when it is another."""
    while not isinstance(optimizer, RecAdam) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, RecAdam) else None
