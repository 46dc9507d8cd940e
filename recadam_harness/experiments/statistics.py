"""Medians over seeds, how sure they are, and what an arm learned and kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .glue import headline
from .grids import ARMS
from .intervals import Interval, median_of
from .table import Row
from .trial import Trial

__all__ = ["REFERENCE", "SOURCE", "TITLES", "Summary", "summarize"]

REFERENCE = ("adamw", "AdamW", "AdamW, pretrained")
"""Names of the arm that the others are held against, the first that is there."""

SOURCE = "snli_mnr"
"""The figure by which forgetting is judged; less is better."""

TITLES = "bbc_recall_at_1"
"""Another, of data of another kind, which nothing is chosen by; more is better."""

LITTLE = 0.05
"""Share of the figure before; of less that is forgotten, no share that is kept means anything."""

COMMON = ("target", "model", "method", "seed", "split", "rows", "steps", "max_length", "curve_every", "data")


class Summary(NamedTuple):
    """What an arm learned and kept, over its seeds."""

    arm: str
    rows: list[Row]
    settings: str  # what was chosen, as `name=value`
    target: Interval  # of the target task's first figure
    before: float  # source loss of the pretrained encoder; NaN where none is measured
    source: Interval  # source loss after training
    kept: float  # share that it keeps of what the reference forgets; NaN where that is next to nothing
    titles_before: float  # BBC title recall at 1 of the pretrained encoder, and so on
    titles: Interval
    titles_kept: float
    distance: Interval  # to the anchor
    gain: Interval  # of the target task's figure over the reference's, seed by seed


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Summaries by arm, in the order in which arms appear.

    Each arm is held against `REFERENCE`; those named "CASE, METHOD" against "CASE, AdamW", if it is there.
    """
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(row.entry.arm, []).append(row)
    references = {arm: (f"{arm.rpartition(', ')[0]}, AdamW", *REFERENCE) for arm in arms}
    return [
        _summary(arm, members, next((arms[name] for name in references[arm] if name in arms), []))
        for arm, members in arms.items()
    ]


def _figure(rows: Sequence[Row], name: str) -> Interval:
    values = [row.figures[name] for row in rows if name in row.figures]
    return median_of(values) if values else Interval(np.nan, np.nan, np.nan)


def _target(rows: Sequence[Row]) -> Interval:
    return median_of([headline(row.trial.target.removeprefix("glue/"), row.figures) for row in rows])


def _gain(rows: Sequence[Row], reference: Sequence[Row]) -> Interval:
    by_seed = {row.trial.seed: _target([row]).median for row in reference}
    pairs = [(_target([row]).median, by_seed.get(row.trial.seed)) for row in rows]
    differences = [x - other for x, other in pairs if other is not None]
    return median_of(differences) if differences else Interval(np.nan, np.nan, np.nan)


def _before(rows: Sequence[Row], name: str) -> float:
    return rows[0].figures.get(f"{name}_before", np.nan)


def _forgotten(rows: Sequence[Row], name: str) -> float:
    sign = -1 if name == TITLES else 1
    values = [sign * (r.figures[name] - r.figures[f"{name}_before"]) for r in rows if name in r.figures]
    return float(np.median(values)) if values else np.nan


def _kept(rows: Sequence[Row], reference: Sequence[Row], name: str) -> float:
    lost = _forgotten(reference, name)
    return 1 - _forgotten(rows, name) / lost if lost > LITTLE * _before(rows, name) else np.nan


def _settings(arm: str, trial: Trial) -> str:
    """Those that were chosen among others, at their default or not; of other arms those that are not."""
    if arm in ARMS:
        names: Iterable[str] = dict.fromkeys(name for tried in ARMS[arm].trials for name in tried)
    else:
        names = (name for name in trial.changed if name not in COMMON)
    return " ".join(trial.pairs(names))


def _summary(arm: str, rows: list[Row], reference: Sequence[Row]) -> Summary:
    return Summary(
        arm=arm,
        rows=rows,
        settings=_settings(arm, rows[0].trial),
        target=_target(rows),
        before=_before(rows, SOURCE),
        source=_figure(rows, SOURCE),
        kept=_kept(rows, reference, SOURCE),
        titles_before=_before(rows, TITLES),
        titles=_figure(rows, TITLES),
        titles_kept=_kept(rows, reference, TITLES),
        distance=_figure(rows, "distance"),
        gain=_gain(rows, reference),
    )
