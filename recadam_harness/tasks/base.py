"""What a task is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..models import Model

__all__ = ["Problem", "Rows", "Task", "accuracy", "in_batches"]

Array = np.ndarray[Any, Any]
Rows = dict[str, Array]
Call = Callable[[str, Mapping[str, Array]], Array]


@dataclass(frozen=True)
class Problem:
    """A task, prepared: everything a run needs, the same for every framework.

    Args:
        model: the model.
        params: starting values by name, NumPy.
        anchored: names of the pretrained ones; the others are a new head.
        train: training rows by column.
        test: test rows by column.
        measure_source: from a function (method name, rows) -> output to figures of the source task.
        source: rows of the source task, as `measure_source` reads them.
        headline: the figure of `measure_source` that a table shows, and whether more is better.
        eval_batch: rows at a time in evaluations.
    """

    model: Model
    params: dict[str, Array]
    anchored: frozenset[str]
    train: Rows
    test: Rows
    measure_source: Callable[[Call], dict[str, float]]
    source: tuple[Rows, ...]
    headline: tuple[str, bool]
    eval_batch: int = 64

    def evaluate(self, call: Call) -> tuple[Array, dict[str, float]]:
        """Scores of the test rows, and the figures of target and source task."""
        scores = in_batches(call, "logits", self.test, self.eval_batch)
        return scores, {
            "target_accuracy": accuracy(scores, self.test["targets"]),
            **self.measure_source(call),
        }


class Task(ABC):
    """A target task with its data and model, and a measure of what its pretrained model knew."""

    name: ClassVar[str]
    about: ClassVar[str]
    defaults: ClassVar[dict[str, Any]]  # settings of a run that fit this task
    options: ClassVar[dict[str, Any]]  # what `prepare` takes, with defaults
    lowest: ClassVar[dict[str, int]]  # smallest values of the options that are whole numbers

    def archives(self, **options: Any) -> tuple[str, ...]:
        """Names of the archives that `prepare` would fetch with these options."""
        return ()

    def prepare(self, seed: int, **options: Any) -> Problem:
        """Load the data and the pretrained model."""
        return self._prepare(seed, **{**self.options, **options})

    @abstractmethod
    def _prepare(self, seed: int, *args: Any, **options: Any) -> Problem: ...


def in_batches(call: Call, function: str, rows: Rows, size: int) -> Array:
    """A method of the model over many rows, in batches of one shape (the last is filled up)."""
    count = len(next(iter(rows.values())))
    outputs = []
    for start in range(0, count, size):
        chosen = np.minimum(np.arange(start, start + size), count - 1)
        outputs.append(call(function, {name: column[chosen] for name, column in rows.items()}))
    return np.concatenate(outputs)[:count]


def accuracy(logits: Array, targets: Array) -> float:
    """Share of rows whose largest score is the target's."""
    return float(np.mean(np.argmax(logits, axis=1) == np.argmax(targets, axis=1)))
