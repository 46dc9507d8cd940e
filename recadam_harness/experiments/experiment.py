"""What an experiment is: arms, and trials in stages."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from recadam_core.errors import unknown

from .table import Entry, Results

__all__ = ["TUNING_SEED", "Arm", "Experiment", "Options", "Stage"]

TUNING_SEED = 1000
"""Of the trials by which settings are chosen; no seed of a test."""


@dataclass(frozen=True)
class Options:
    """How much of an experiment is run."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    models: tuple[str, ...] = ("minilm-l3",)
    targets: tuple[str, ...] = ("movie-reviews",)
    arms: tuple[str, ...] = ()
    quick: bool = False
    data: str = ""
    preset: str = "bert-base"

    def chosen(self, known: Collection[str], otherwise: Collection[str] = ()) -> tuple[str, ...]:
        """The arms that are asked for, each once, of those that are known; else `otherwise`, or all."""
        for arm in self.arms:
            if arm not in known:
                raise unknown("arm", arm, known)
        return tuple(dict.fromkeys(self.arms or otherwise or known))


Stage = Callable[[Options, Results], list[Entry]]


@dataclass(frozen=True)
class Experiment:
    """A grid of trials in stages; a later stage may read what an earlier one found.

    Args:
        name: on the command line.
        about: one line on the question that it answers.
        arms: what its rows may be of.
        stages: from options and results so far to the entries of the stage.
        count: from options to the number of entries of each stage, for the progress bar.
        targets: that it is run on, where none are named.
        models: that are trained, where none are named.
        fronts: whether its rows are of fronts.
    """

    name: str
    about: str
    arms: Collection[str]
    stages: tuple[Stage, ...]
    count: Callable[[Options], tuple[int, ...]] = lambda options: ()
    targets: tuple[str, ...] = ("movie-reviews",)
    models: tuple[str, ...] = ("minilm-l3",)
    fronts: bool = False

    def planned(self, options: Options, results: Results) -> list[list[Entry]]:
        """The entries of each stage."""
        return [stage(options, results) for stage in self.stages]

    def later(self, options: Options, stage: Stage) -> int:
        """How many entries the stages after this one will have."""
        counts = self.count(options)
        return sum(counts[self.stages.index(stage) + 1 :])


@dataclass(frozen=True)
class Arm:
    """Something that is compared."""

    label: str
    method: str
    trials: tuple[dict[str, Any], ...]
    rule: str = "careful"
    shares: str = ""
