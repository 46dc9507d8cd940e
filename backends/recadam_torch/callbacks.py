"""What the callbacks of all trainers are: the settings of a pull, and the handles that were made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from recadam_core import DriftBudget, RecAdamError
from recadam_core.errors import shown

from .anchors import check_new
from .drift import Drift
from .forgetting import Watch
from .pulling import AnchorPull, check_settings
from .reference import Several

__all__ = ["Anchoring"]


class Anchoring:
    """The settings of `anchor` and of a watch, checked at once; the handles come when training starts."""

    def __init__(
        self,
        pull: float = 0.1,
        anchors: str | Path | Mapping[str, Tensor] | None = None,
        *,
        new: Iterable[str] = (),
        annealing: Any = None,
        importance: Mapping[str, Tensor] | None = None,
        probe: Iterable[Any] | None = None,
        every: int = 50,
        budget: float | DriftBudget | None = None,
        stop_at: float | None = None,
    ) -> None:
        check_settings(pull, annealing)
        name = type(self).__name__
        self._given, self._new = anchors, check_new(name, anchors, new)
        if not (importance is None or isinstance(importance, Mapping)):
            raise RecAdamError(f"{name}: importance is {shown(importance)}; give tensors by parameter name")
        self.handles: list[AnchorPull] = []
        self._settings = {"pull": pull, "annealing": annealing, "importance": importance}
        self.watch = Watch(probe, every, budget, stop_at, pull)

    def at_anchors(self) -> AbstractContextManager[None]:
        """As a handle's: the model with its pretrained weights; as it is, before training starts."""
        return Several(self.handles).at_anchors()

    def drift(self) -> Drift:
        """As a handle's; of several optimizers, only the distance is one number."""
        return Several(self.handles).drift()
