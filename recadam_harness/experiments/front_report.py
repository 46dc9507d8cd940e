"""The section of a page on one target's fronts: pictures, tables, and the answers in figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..folders import Folder
from ..pages import Table, picture_of
from .front_figures import FAMILIES, cost_figure, front_figure, meter_figure
from .front_grids import DEFAULT, KEENEST, front_arms, untuned
from .fronts import (
    UNTUNED,
    Standing,
    ahead,
    by_seed,
    forgotten,
    gained,
    measured,
    meters_of,
    scale_of,
    standings_of,
)
from .table import Row
from .trial import METHODS, Trial

__all__ = ["front_pictures", "front_section"]

LEARNED = {
    "embeddings": "learned: mean reciprocal rank of held-out pairs",
    "decoder": "learned: accuracy of held-out answers",
    "classification": "learned: accuracy on held-out rows",
}
"""What an axis says of the figure that is learned."""


OTHERS = {"adamw": "AdamW's", "replay-5": "replay of 5%'s", "lwf": "KL's"}
"""Whose areas the pulls' are held against."""

TOLD = ("learned", "forgotten", "moved", "kl", "distance", "loss")
"""The figures of a run that a page has beside its command."""


def front_pictures(place: str) -> list[str]:
    """The files of a section's pictures."""
    return [f"{place}-{name}.png" for name in ("fronts", "cost", "meters")]


def front_section(
    name: str, model: str, target: str, place: str, rows: Sequence[Row], tuned: Sequence[Row], folder: Folder
) -> dict[str, Any]:
    """What a page says of one target and model."""
    arms = front_arms(name)
    of = {arm: [row for row in rows if row.entry.arm == arm] for arm in (*arms, KEENEST, DEFAULT)}
    faster = {arm: [row for row in rows if row.entry.arm == untuned(arm)] for arm in arms}
    default = _default(of[KEENEST], of.pop(DEFAULT))
    scale = scale_of(of.pop(KEENEST))
    standings = standings_of({arm: some for arm, some in of.items() if some}, faster, arms, scale)
    meters = meters_of([*tuned, *rows])
    tables = {
        "Is a pull ahead? What it has over others, seed by seed": _answers(standings),
        "Fronts on test rows": _fronts(standings),
        "What the default pull costs and keeps, at the rate at which AdamW learns most": default,
        f"At {UNTUNED:g} times the chosen rate": _costs(standings),
        "What tells what is forgotten": _meters(meters),
    }
    title, learned = f"{target}, {model}", LEARNED[name]
    figures = [front_figure(standings, title, learned), cost_figure(standings, title, learned)]
    figures += [meter_figure(meters, title)] if meters else []
    drawn = zip(front_pictures(place), figures, strict=False)
    first = rows[0].trial
    return {
        "model": model,
        "target": target,
        "pictures": [picture_of(folder, file, figure) for file, figure in drawn],
        "seeds": sorted({row.trial.seed for row in rows}),
        "size": f"{first.rows or 'all'} rows, {first.steps} steps of {first.batch_size}",
        "before": (
            f"AdamW, where it learns most, gains {scale.gained:.3f} over {standings[0].before:.3f} and "
            f"forgets {scale.forgotten:.3f} nats: the unit of the areas."
        ),
        "varies": False,
        "tables": [(heading, table) for heading, table in tables.items() if table[1]],
        "runs": [(row, row.told(TOLD)) for row in rows],
        "tuned": [(row, row.told(TOLD)) for row in tuned],
    }


def _answers(standings: Sequence[Standing]) -> Table:
    others = [(name, s) for arm, name in OTHERS.items() for s in standings if s.arm == arm]
    (adamw,) = (s for s in standings if s.arm == "adamw")
    lines = []
    for s in standings:
        if s.arm in FAMILIES["a pull"][1]:
            areas = [ahead(s.areas, other.areas) for _, other in others]
            fast = [ahead(by_seed(f, s.faster), by_seed(f, adamw.faster)) for f in (gained, forgotten)]
            lines.append([s.label, *("" if np.isnan(x.median) else x.signed for x in (*areas, *fast))])
    at = f"at {UNTUNED:g} times both rates: "
    header = ["", *(f"area over {name}" for name, _ in others), at + "learned", at + "forgotten"]
    return header, lines


def _fronts(standings: Sequence[Standing]) -> Table:
    header = ["", "needs", "settings tested", "area", "over AdamW's", "its own choice: learned", "forgotten",
              "time"]  # fmt: skip
    (adamw,) = (s for s in standings if s.arm == "adamw")
    lines = []
    for s in standings:
        lines.append(
            [
                s.label,
                s.needs,
                "; ".join(_settings(trial) for trial in s.settings),
                str(s.area),
                ahead(s.areas, adamw.areas).signed if s is not adamw else "",
                f"{s.choice.learned.median:.3f}",
                f"{s.choice.forgotten.median:.3f}",
                f"{s.seconds / adamw.seconds:.2f}",
            ]
        )
    return header, lines


def _settings(trial: Trial) -> str:
    names = ["lr", *(x for x in METHODS[trial.method].settings if x not in ("width", "k", "t0", "floor"))]
    return " ".join(f"{name}={getattr(trial, name):g}" for name in names)


def _default(without: Sequence[Row], pulled: Sequence[Row]) -> Table:
    lines = []
    for label, some in (("AdamW", without), ("the same with pull=0.1", pulled)):
        if some:
            found = measured(some)
            lines.append([label, str(found.learned), str(found.forgotten)])
    gains = [ahead(by_seed(f, pulled), by_seed(f, without)) for f in (gained, forgotten)]
    if not np.isnan(gains[0].median):
        lines.append(["seed by seed", *(x.signed for x in gains)])
    return ["", "learned", "forgotten"], lines


def _costs(standings: Sequence[Standing]) -> Table:
    header = ["", "its rate", "learned", "at four times the rate", "forgotten", "at four times the rate"]
    shown = [(s, s.choice, s.untuned) for s in standings if s.untuned is not None]
    lines = [
        [
            s.label,
            f"{s.faster[0].trial.lr / UNTUNED:g}",
            f"{choice.learned.median:.3f}",
            str(faster.learned),
            f"{choice.forgotten.median:.3f}",
            str(faster.forgotten),
        ]
        for s, choice, faster in sorted(shown, key=lambda x: x[2].forgotten.median)
    ]
    for s in standings:
        if s.untuned is None:
            learned, forgotten = (f"{x.median:.3f}" for x in (s.choice.learned, s.choice.forgotten))
            lines.append([s.label, "", learned, "diverges", forgotten, "diverges"])
    return header, lines


def _meters(meters: Any) -> Table:
    header = ["meter", "rank correlation with what is forgotten, all runs", "within a method, median"]
    lines = [
        [name, str(meter.correlation), "" if np.isnan(meter.within) else f"{meter.within:.2f}"]
        for name, meter in meters.items()
    ]
    return header, lines
