"""Labelled texts, and the three parts they come in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Splits", "Texts", "accuracy_of"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Texts:
    """Labelled texts, or pairs of them."""

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
    """Accuracy of the largest score."""
    return {"accuracy": float(np.mean(scores.argmax(axis=1) == labels))}


@dataclass(frozen=True)
class Splits:
    """The parts of a target task."""

    train: Texts
    validation: Texts
    test: Texts
    classes: int
    metrics: Callable[[Array, Array], dict[str, float]] = accuracy_of

    @property
    def sha256(self) -> str:
        """The sha256 of all rows."""
        parts = (self.train, self.validation, self.test)
        rows = [[x.first, x.second, x.labels.tolist()] for x in parts]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
