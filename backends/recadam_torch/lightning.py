"""Lightning: the pull around any optimizer by a callback."""

from __future__ import annotations

import weakref
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import nn

from recadam_core import RecAdamError

from .anchors import Anchors
from .callbacks import Anchoring
from .pulling import anchor

__all__ = ["AnchorCallback"]


class AnchorCallback(Anchoring, Callback):
    """Lets whatever optimizers a module makes pull towards the pretrained weights: `anchor` in one line.

    The anchors are the module's weights when `fit` begins, before a checkpoint is loaded into it; or those
    that are given. A module that was itself loaded from a tuned checkpoint needs `anchors`.

    Args:
        pull: as in `anchor`.
        anchors: where the pretrained weights are: as in `Anchors.of`, or `Anchors`.
        new: names of new parameters, or patterns as "head.*": these are not pulled.
        annealing: as in `anchor`.
        importance: as in `anchor`.
        probe: batches on which forgetting is measured, as in `Forgetting`; its figure is logged.
        every: steps between two measurements.
        budget: of the figure, which the pull's strength then holds: a number, or a `DriftBudget`.
        stop_at: the figure at which training ends.

    Raises:
        RecAdamError: for a value outside its range, at once; when `fit` begins, as `anchor` and `Anchors.of`
            do, or when the checkpoint to resume from was pulled elsewhere.

    Example:
        >>> callback = AnchorCallback(pull=0.1)  # lightning.Trainer(callbacks=[callback])
        >>> callback.handles  # one for each optimizer, once training has started
        []
    """

    _anchors: Anchors | None = None  # between setup and the optimizers
    _module: weakref.ref[nn.Module] | None = None
    _seen = 0

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Lightning's hook: the module is as it was made."""
        if stage != "fit":
            return
        source: Any = self._given
        if source is None and self._module is not None and self._module() is pl_module:  # trained before
            source = {name: star for handle in self.handles for name, star in handle.anchors.items()}
        elif source is None:  # those alone that are trained: of what is frozen no copy is needed
            source = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
            if not source:
                raise RecAdamError(
                    "AnchorCallback: the module has no parameters when fit begins (does configure_model make "
                    "them?); give anchors=..."
                )
        self._module = weakref.ref(pl_module)
        self._anchors = (
            source if isinstance(source, Anchors) else Anchors.of(pl_module, source, new=self._new)
        )

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Lightning's hook: the optimizers are made, and their states are yet to be loaded."""
        kept = [handle for handle in self.handles if any(map(handle.is_of, trainer.optimizers))]
        self.handles = kept
        for optimizer in trainer.optimizers:
            if not any(handle.is_of(optimizer) for handle in kept):
                names = pl_module.named_parameters()
                self.handles.append(anchor(optimizer, self._anchors, names=names, **self._settings))
        self._anchors = None  # each handle has its copies
        self.watch.begin(pl_module, self.handles, None, trainer.estimated_stepping_batches)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Lightning's hook: the figures go where the module's own do, as often."""
        steps = trainer.global_step // max(1, len(trainer.optimizers))
        if steps == self._seen:
            return
        self._seen = steps
        if self.watch.look(self.handles, steps):
            trainer.should_stop = True
        if steps % trainer.log_every_n_steps:
            return
        for name, figure in self.watch.figures().items():
            pl_module.log(name, figure)
        for number, handle in enumerate(self.handles):
            drift, which = handle.drift(), f"_{number}" if number else ""
            pl_module.log(f"anchor/distance{which}", drift.distance)
            pl_module.log(f"anchor/pull{which}", drift.rate)
