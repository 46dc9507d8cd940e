"""Pictures of fronts: what is learned for what is forgotten, a rate too high, and which meter tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recadam_core.figures import COLOURS, styled

from .figures import INK, panels_of, place_labels
from .fronts import Meter, Standing, forgotten

__all__ = ["cost_figure", "front_figure", "meter_figure"]

FAMILIES = {
    "AdamW": (COLOURS["adamw"], ("adamw",)),
    "a pull": (COLOURS["recadam"], ("recadam", "l2sp", "feature-pull", "ewc", "ewc-dr", "muon-pull")),
    "replay": ("#1a7f37", ("replay-1", "replay-5", "replay-10", "self-replay")),
    "other methods": ("#8a8a8a", ()),
}
"""Colours of arms, by family."""


LINEAR = 0.03
TICKS = (-0.3, -0.1, -0.03, 0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def _family(arm: str) -> str:
    return next((name for name, (_, arms) in FAMILIES.items() if arm in arms), "other methods")


def _colour(arm: str) -> str:
    return FAMILIES[_family(arm)][0]


def _legend(panel: Any, arms: Sequence[str], **where: Any) -> None:
    present = {_family(arm) for arm in arms}
    for name, (colour, _) in FAMILIES.items():
        if name in present:
            panel.plot([], [], "o-", color=colour, label=name)
    panel.legend(fontsize=8, **where)


def _around_zero(panel: Any, name: str) -> None:
    """An axis that is straight about zero and logarithmic beyond, in plain figures."""
    axis = getattr(panel, f"{name}axis")
    getattr(panel, f"set_{name}scale")("symlog", linthresh=LINEAR)
    low, high = axis.get_view_interval()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


@styled
def front_figure(standings: Sequence[Standing], title: str, learned: str) -> Any:
    """Fronts on test rows: a line a method through the medians of its settings."""
    figure, ((panel,),) = panels_of(1, 1, 10.5, 6.6)
    panel.invert_xaxis()
    scale = standings[0].scale
    places = []
    # Greys first, so that what stands out lies on them.
    for standing in sorted(standings, key=lambda s: list(FAMILIES).index(_family(s.arm)), reverse=True):
        points = sorted(standing.points)
        colour = _colour(standing.arm)
        panel.plot(*zip(*points, strict=True), "o-", color=colour, markersize=5, linewidth=1.2, alpha=0.85)
        x, y = max(points, key=lambda p: (1.0 - p[0] / scale.forgotten) * (p[1] - standing.before))
        places.append((x, y, standing.label, colour))
    panel.axvline(0.0, color=INK, linewidth=0.9)
    most = scale.forgotten, standings[0].before + scale.gained
    panel.plot(*most, "o", color=COLOURS["adamw"], markersize=8, markerfacecolor="white")
    places.append((*most, "AdamW where it learns most", COLOURS["adamw"]))
    widest = 1.08 * scale.forgotten
    least = min(0.0, *(x for standing in standings for x, _ in standing.points))
    panel.set_xlim(widest, least - 0.25 * widest)  # room for the labels of those that forget nothing
    reached = [most[1], *(y for standing in standings for _, y in standing.points)]
    room = 0.08 * (max(reached) - min(reached))
    panel.set_ylim(min(reached) - room, max(reached) + room)
    panel.set(
        xlabel="forgotten, in nats (turned: further right forgets less; the line: nothing)",
        ylabel=f"{learned} (before: {standings[0].before:.3f})",
    )
    panel.set_title(title)
    place_labels(panel, [place for place in places if place[0] < widest])
    _legend(panel, [s.arm for s in standings], loc="lower left")
    return figure


@styled
def cost_figure(standings: Sequence[Standing], title: str, learned: str) -> Any:
    """Each method as it was chosen and at a rate four times as high: what it learns, what it forgets."""
    shown = [(s, s.untuned) for s in standings if s.untuned is not None]
    shown.sort(key=lambda pair: pair[1].forgotten.median, reverse=True)
    figure, ((left, right),) = panels_of(1, 2, 10.5, 0.30 * len(shown) + 1.3, sharey=True)
    for line, (standing, faster) in enumerate(shown):
        colour = _colour(standing.arm)
        for panel, name in ((left, "learned"), (right, "forgotten")):
            before, after = (getattr(x, name) for x in (standing.choice, faster))
            panel.plot([before.median, after.median], [line, line], color=colour, linewidth=1.4, alpha=0.6)
            panel.plot(before.median, line, "o", color=colour, markersize=6)
            panel.plot(after.median, line, "o", color=colour, markersize=6, markerfacecolor="white")
            panel.hlines(line, after.low, after.high, color=colour, linewidth=3.5, alpha=0.25)
    left.set_yticks(range(len(shown)), [s.label for s, _ in shown])
    left.set(xlabel=learned)
    left.axvline(standings[0].before, color=INK, linewidth=0.9)
    left.set_title(f"{title}: ● as chosen, ○ at four times the rate")
    right.set(xlabel="forgotten, in nats")
    right.axvline(0.0, color=INK, linewidth=0.9)
    _around_zero(right, "x")
    return figure


@styled
def meter_figure(meters: Mapping[str, Meter], title: str) -> Any:
    """Of all runs what was forgotten against each meter, with the rank correlation."""
    figure, (panels,) = panels_of(1, len(meters), 3.4 * len(meters), 3.6, sharey=True)
    for panel, (name, meter) in zip(panels, meters.items(), strict=True):
        for row, value in zip(meter.rows, meter.values, strict=True):
            panel.plot(value, forgotten(row), ".", color=_colour(row.entry.arm.partition(",")[0]), alpha=0.5)
        panel.set(xlabel=name, title=f"ρ = {meter.correlation.median:+.2f}")
        _around_zero(panel, "y")
        if min(meter.values) > 0.0 and max(meter.values) > 5.0 * min(meter.values):
            panel.set_xscale("log")
    panels[0].set_ylabel("forgotten, in nats")
    arms = [row.entry.arm.partition(",")[0] for row in next(iter(meters.values())).rows]
    _legend(panels[0], arms, loc="upper left")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure
