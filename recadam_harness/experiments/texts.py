"""Labelled texts, and the three parts they come in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Splits", "Texts", "accuracy_of"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Texts:
    """Labelled texts, or pairs of them.

    Args:
        first: texts.
        second: the second of each pair; None where there are no pairs.
        labels: class numbers, or scores.

    Example:
        >>> Texts(["a", "b"], None, np.array([0, 1])).part(slice(1, None)).first
        ['b']
    """

    first: list[str]
    second: list[str] | None
    labels: Array

    def __len__(self) -> int:
        return len(self.first)

    def part(self, where: slice) -> Texts:
        """Some of the rows, in order."""
        return Texts(self.first[where], self.second and self.second[where], self.labels[where])

    def pick(self, rows: Array) -> Texts:
        """These rows."""
        second = self.second and [self.second[i] for i in rows]
        return Texts([self.first[i] for i in rows], second, self.labels[rows])


def accuracy_of(scores: Array, labels: Array) -> dict[str, float]:
    """Accuracy of the largest score.

    Example:
        >>> accuracy_of(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([1, 1]))
        {'accuracy': 0.5}
    """
    return {"accuracy": float(np.mean(scores.argmax(axis=1) == labels))}


@dataclass(frozen=True)
class Splits:
    """The parts of a target task.

    Args:
        train: rows to train on.
        validation: rows to choose settings by.
        test: rows to report on.
        classes: number of classes; 1 where the labels are scores.
        metrics: figures of scores and labels; the first is the one that counts.
    """

    train: Texts
    validation: Texts
    test: Texts
    classes: int
    metrics: Callable[[Array, Array], dict[str, float]] = accuracy_of
