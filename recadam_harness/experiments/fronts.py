"""Fronts: what a method learns for what is forgotten, and the cost of a rate that was not chosen well."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from .experiment import Arm
from .intervals import Interval, median_of
from .table import Row
from .trial import METHODS, Trial

__all__ = [
    "MOST",
    "UNTUNED",
    "Measured",
    "Meter",
    "Point",
    "Scale",
    "Standing",
    "ahead",
    "area_of",
    "areas",
    "by_seed",
    "chosen",
    "forgotten",
    "front",
    "gained",
    "keenest",
    "measured",
    "meters_of",
    "scale_of",
    "standings_of",
]

Array = np.ndarray[Any, Any]
MOST = 2
"""Settings of a method's front that are tested."""

UNTUNED = 4.0
"""How many times its chosen rate a method is tried at, once it is chosen."""

LEAST = 6
"""Fewer runs than that have no rank correlation here."""


def gained(row: Row) -> float:
    """What was learned, over what the pretrained model or chance could."""
    return row.figures["learned"] - row.figures["learned_before"]


def forgotten(row: Row) -> float:
    """What was lost of what the model knew, in nats; less than 0 where it has gained."""
    return row.figures["forgotten"]


class Point(NamedTuple):
    """What was gained and what kept, as shares of what AdamW gains and loses where it gains most."""

    gained: float
    kept: float


class Scale(NamedTuple):
    """What AdamW gains at the rate at which it gains most, and what it forgets there."""

    gained: float
    forgotten: float

    def point(self, row: Row) -> Point:
        """A row's place. What is kept beyond everything counts as everything."""
        return Point(gained(row) / self.gained, min(1.0, 1.0 - forgotten(row) / self.forgotten))


def keenest(rows: Sequence[Row]) -> Row:
    """The row that gains most; of several the one that forgets least."""
    return max(rows, key=lambda row: (gained(row), -forgotten(row)))


def scale_of(rows: Sequence[Row]) -> Scale:
    """The scale by rows of the setting of AdamW that gains most."""
    return Scale(*(float(np.median([figure(row) for row in rows])) for figure in (gained, forgotten)))


def area_of(points: Iterable[Point]) -> float:
    r"""The area that points dominate.

    Math:
        $|\bigcup_i [0, g_i] \times [0, k_i]|$ over points $(g_i, k_i)$, gained and kept, above 0

    Args:
        points: the points.

    Returns:
        The area; of a method that gains as much as AdamW does and forgets nothing 1.

    Example:
        >>> area_of([Point(1.0, 0.5), Point(0.5, 1.0), Point(0.2, 0.2), Point(2.0, -1.0)])
        0.75
    """
    area, reached = 0.0, 0.0
    for point in sorted(points, key=lambda p: (-p.kept, -p.gained)):
        if point.kept > 0.0 and point.gained > reached:
            area += (point.gained - reached) * point.kept
            reached = point.gained
    return area


def front(rows: Sequence[Row], scale: Scale, most: int = MOST) -> list[Row]:
    """The rows of a method, at most so many, that dominate the largest area together."""
    points = [scale.point(row) for row in rows]
    subsets = [
        some for count in range(1, min(most, len(rows)) + 1) for some in combinations(range(len(rows)), count)
    ]
    best = max(subsets, key=lambda some: (round(area_of(points[i] for i in some), 9), -len(some)))
    return [rows[i] for i in best]


def chosen(rows: Sequence[Row], scale: Scale) -> Row:
    """The one row that dominates the largest area alone; of several the one that gains most."""
    return max(rows, key=lambda row: (area_of([scale.point(row)]), gained(row)))


def areas(rows: Sequence[Row], scale: Scale, seeds: Iterable[int]) -> dict[int, float]:
    """The area of each seed; 0 of one in which nothing came to an end."""
    points = {seed: [scale.point(row) for row in rows if row.trial.seed == seed] for seed in seeds}
    return {seed: area_of(some) for seed, some in points.items()}


def ahead(ours: Mapping[int, float], others: Mapping[int, float]) -> Interval:
    """How much larger figures are than others, seed by seed; NaN where no seed has both."""
    return median_of([ours[seed] - others[seed] for seed in ours if seed in others] or [np.nan])


def by_seed(figure: Callable[[Row], float], rows: Sequence[Row]) -> dict[int, float]:
    """A figure of each seed's row."""
    return {row.trial.seed: figure(row) for row in rows}


class Measured(NamedTuple):
    """What a setting learned and forgot, over its seeds."""

    learned: Interval
    forgotten: Interval


class Standing(NamedTuple):
    """A method on test rows."""

    arm: str
    label: str
    needs: str
    scale: Scale
    before: float  # what could be done without training
    settings: list[Trial]  # of its front
    points: list[tuple[float, float]]  # medians of these: forgotten and learned
    areas: dict[int, float]  # by seed
    choice: Measured  # the setting of the front that had the largest area of its own on validation rows
    untuned: Measured | None  # the chosen setting at a higher rate
    faster: list[Row]  # the rows of that
    seconds: float

    @property
    def area(self) -> Interval:
        """The area of its front."""
        return median_of(list(self.areas.values()))


def measured(rows: Sequence[Row]) -> Measured:
    """What the rows of one setting learned and forgot."""
    return Measured(
        median_of([row.figures["learned"] for row in rows]), median_of([forgotten(row) for row in rows])
    )


def _by_setting(rows: Sequence[Row]) -> dict[Trial, list[Row]]:
    """Rows by their trial without its seed."""
    found: dict[Trial, list[Row]] = {}
    for row in rows:
        found.setdefault(dataclasses.replace(row.trial, seed=0), []).append(row)
    return found


def standings_of(
    rows: Mapping[str, Sequence[Row]],
    untuned: Mapping[str, Sequence[Row]],
    labels: Mapping[str, Arm],
    scale: Scale,
) -> list[Standing]:
    """How methods stand on test rows, the largest area first, by rows of their fronts and at higher rates."""
    seeds = {row.trial.seed for row in rows["adamw"]}
    standings = []
    for arm, some in rows.items():
        settings = _by_setting(some)
        found = {trial: measured(members) for trial, members in settings.items()}
        faster = untuned.get(arm, ())
        slower = [dataclasses.replace(row.trial, seed=0, lr=row.trial.lr / UNTUNED) for row in faster[:1]]
        # Where all diverged at the higher rate, it is not told which setting that was of.
        best = next(
            (trial for trial in settings if trial in slower),
            max(settings, key=lambda trial: median_area(settings[trial], scale)),
        )
        standings.append(
            Standing(
                arm=arm,
                label=labels[arm].label,
                needs=METHODS[labels[arm].method].needs,
                scale=scale,
                before=some[0].figures["learned_before"],
                settings=list(settings),
                points=[(x.forgotten.median, x.learned.median) for x in found.values()],
                areas=areas(some, scale, seeds),
                choice=found[best],
                untuned=measured(faster) if faster else None,
                faster=list(faster),
                seconds=float(np.median([row.figures["seconds"] for row in some])),
            )
        )
    return sorted(standings, key=lambda s: -s.area.median)


def median_area(rows: Sequence[Row], scale: Scale) -> float:
    """The area that one setting dominates, the median of its seeds."""
    return float(np.median([area_of([scale.point(row)]) for row in rows]))


class Meter(NamedTuple):
    """Something that may tell what was forgotten."""

    rows: list[Row]
    values: list[float]
    correlation: Interval  # Spearman's, of ranks, with what was forgotten, and 95% of resampled runs
    within: float  # the median of the methods' own


METERS = {
    "moved": "answers to the new task's texts have moved by",
    "kl": "KL on general text, nats a token",
    "distance": "distance of the weights",
    "loss": "training loss at the end",
}


def meters_of(rows: Sequence[Row]) -> dict[str, Meter]:
    """How well each figure ranks runs by what they forget."""
    meters = {}
    for name, label in METERS.items():
        some = [row for row in rows if name in row.figures]
        if len(some) < LEAST:
            continue
        values = np.array([row.figures[name] for row in some])
        lost = np.array([forgotten(row) for row in some])
        drawn = np.random.default_rng(0).integers(0, len(some), (1000, len(some)))
        low, high = np.quantile([_ranked(values[i], lost[i]) for i in drawn], [0.025, 0.975])
        own = [_ranked(values[at], lost[at]) for at in _places(some) if len(at) >= LEAST]
        meters[label] = Meter(
            some,
            values.tolist(),
            Interval(_ranked(values, lost), float(low), float(high)),
            float(np.median(own)) if own else np.nan,
        )
    return meters


def _places(rows: Sequence[Row]) -> list[list[int]]:
    """Where the rows of each method are."""
    found: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault(row.trial.method, []).append(i)
    return list(found.values())


def _ranked(x: Array, y: Array) -> float:
    """Spearman's correlation; NaN where one of them is constant."""
    from scipy.stats import rankdata

    ranks = rankdata(x), rankdata(y)
    if not np.ptp(ranks[0]) or not np.ptp(ranks[1]):
        return np.nan
    return float(np.corrcoef(*ranks)[0, 1])
