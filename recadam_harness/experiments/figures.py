"""Pictures of experiments: who learns, who forgets, at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recadam_core.figures import COLOURS, styled

from .grids import ARMS
from .statistics import SOURCE, Summary
from .table import Row

__all__ = [
    "INK",
    "curves_figure",
    "label_of",
    "lines_figure",
    "panels_of",
    "pareto_figure",
    "place_labels",
]

FAMILIES = {
    "AdamW": (COLOURS["adamw"], ("adamw", "adamw-careful", "AdamW")),
    "RecAdam": (
        COLOURS["recadam"],
        ("recadam", "recadam-released", "recadam-proximal", "recadam-floor", "recall", "budget"),
    ),
    "constant pull": ("#1a7f37", ("l2sp", "ewc", "feature-pull")),
    "no anchor, or not in the optimizer": (
        COLOURS["coupled"],
        ("annealed", "coupled", "wiseft", "lora", "frozen", "multitask"),
    ),
}
"""Colours of arms, by family; another head or rule leaves an arm in its family."""

INK = "#444444"


def label_of(arm: str) -> str:
    """An arm's label, where it has one besides its name."""
    return ARMS[arm].label if arm in ARMS else arm


def _family(arm: str) -> str | None:
    arm = arm.removesuffix("-accurate").removesuffix("-probed")
    return next((name for name, (_, arms) in FAMILIES.items() if arm in arms), None)


def _colour(arm: str) -> str:
    family = _family(arm)
    return FAMILIES[family][0] if family else INK


def _plain(axis: Any) -> None:
    """A logarithmic axis marked at 0.5, 1, 2, 5, in plain figures."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def panels_of(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Any, Any]:
    """A figure without a display, and its panels by row and column."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


@styled
def pareto_figure(summaries: Sequence[Summary], title: str) -> Any:
    """Target accuracy against the source loss, every run a point, every median with its label."""
    figure, ((panel,),) = panels_of(1, 1, 10.5, 6.4)
    panel.set_xscale("log")
    panel.invert_xaxis()
    reference = next((s for s in summaries if s.arm == "adamw"), None)
    if reference is not None:
        low, high = reference.target.low, reference.target.high
        panel.axhspan(low, high, color=COLOURS["adamw"], alpha=0.10, linewidth=0)
    if reference is not None and np.isfinite(reference.kept):
        limit = reference.before + 0.2 * (reference.source.median - reference.before)
        panel.axvline(limit, color=INK, linewidth=0.9, linestyle=(0, (4, 4)))
        panel.annotate(
            "80% kept of what AdamW forgets →", (limit, 0.015), (4, 0), color=INK, fontsize=8,
            xycoords=("data", "axes fraction"), textcoords="offset points",
        )  # fmt: skip
    before = summaries[0].before
    panel.axvline(before, color=INK, linewidth=0.9)
    panel.annotate(
        "before", (before, 0.985), (4, 0), color=INK, fontsize=8, va="top",
        xycoords=("data", "axes fraction"), textcoords="offset points",
    )  # fmt: skip
    places = []
    for label, summary in _labelled(summaries):
        points = np.array([(r.figures[SOURCE], r.figures["accuracy"]) for r in summary.rows])
        colour = _colour(summary.arm)
        panel.plot(*points.T, ".", color=colour, alpha=0.35, markersize=6)
        panel.plot(summary.source.median, summary.target.median, "o", color=colour, markersize=8)
        places.append((summary.source.median, summary.target.median, label, colour))
    panel.set(
        xlabel="source loss after fine-tuning (SNLI pairs; log scale, turned: further right forgets less)",
        ylabel="target accuracy",
    )
    panel.set_title(title)
    _plain(panel.xaxis)
    panel.margins(0.06, 0.08)
    left, right = panel.get_xlim()
    panel.set_xlim(right=right * (right / left) ** 0.2)  # room for the labels of those that forget nothing
    place_labels(panel, places)
    present = {_family(s.arm) for s in summaries}
    for name, (colour, _) in FAMILIES.items():
        if name in present:
            panel.plot([], [], "o", color=colour, label=name)
    panel.legend(loc="lower left", fontsize=8)
    return figure


def _labelled(summaries: Sequence[Summary]) -> list[tuple[str, Summary]]:
    """Each arm's label; arms for which the same trials were chosen are one point, and share it."""
    labels: dict[Any, tuple[str, Summary]] = {}
    for summary in summaries:
        label = label_of(summary.arm)
        first, same = labels.get(trials := tuple(row.trial for row in summary.rows), ("", summary))
        labels[trials] = (f"{first} (also {label.removeprefix(f'{first}, ')})" if first else label, same)
    return list(labels.values())


def place_labels(panel: Any, places: Sequence[tuple[float, float, str, str]]) -> None:
    """A label beside each point, where it lies on no other label and on no point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white", alpha=0.85)]  # over the points of single runs
    canvas: Any = FigureCanvasAgg(panel.figure)
    canvas.draw()  # or nothing has a place yet
    pixel = panel.figure.dpi / 72
    spots = [tuple(panel.transData.transform((x, y))) for x, y, _, _ in places]
    taken = [(x - 5 * pixel, y - 5 * pixel, x + 5 * pixel, y + 5 * pixel) for x, y in spots]
    inside = panel.get_window_extent()
    for (x, y, text, colour), (at_x, at_y) in sorted(zip(places, spots, strict=True), key=lambda p: -p[1][1]):
        label = panel.annotate(text, (x, y), (0, 0), textcoords="offset points", color=colour, fontsize=8)
        label.set(va="center", in_layout=False, path_effects=halo)
        width, height = label.get_window_extent(canvas.get_renderer()).size

        def box(
            side: int, up: float, at: tuple[float, float] = (at_x, at_y), size: Any = (width, height)
        ) -> Any:
            left = at[0] + 9 * pixel if side > 0 else at[0] - 9 * pixel - size[0]
            middle = at[1] + up * pixel
            return left, middle - size[1] / 2, left + size[0], middle + size[1] / 2

        tried = [(side, 11.0 * step * sign) for step in range(12) for sign in (1, -1) for side in (1, -1)]
        free = [
            place
            for place in tried
            if not any(_overlap(box(*place), other) for other in taken)
            and box(*place)[0] > inside.x0
            and box(*place)[2] < inside.x1
        ]
        side, up = free[0] if free else (1, 0.0)
        taken.append(box(side, up))
        label.set(position=(9 * side, up), ha="left" if side > 0 else "right")
        if abs(up) > 11:
            line = {"color": colour, "linewidth": 0.5, "alpha": 0.7}
            panel.annotate(
                "", (x, y), (9 * side, up), textcoords="offset points", arrowprops={"arrowstyle": "-", **line}
            )


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@styled
def curves_figure(rows: Sequence[Row], groups: dict[str, Sequence[str]]) -> Any:
    """Target loss, source loss and distance along the way: a row of panels a group of arms."""
    from matplotlib import colormaps

    figure, panels = panels_of(len(groups), 3, 12.3, 3.4 * len(groups))
    names = {
        "loss": "target loss (training)",
        "source_loss": "source loss (SNLI pairs)",
        "distance": "distance to θ*",
    }
    for line, (title, arms) in zip(panels, groups.items(), strict=True):
        shades = colormaps["viridis"](np.linspace(0.0, 0.85, max(2, len(arms) - 1)))
        colours = dict(zip([a for a in arms if a != "AdamW"], shades, strict=False))
        for arm in arms:
            curves = [row.curve for row in rows if row.entry.arm == arm and row.curve]
            if not curves:
                continue
            steps = [point["step"] for point in curves[0]]
            for panel, name in zip(line, names, strict=True):
                values = np.array([[point.get(name, np.nan) for point in curve] for curve in curves])
                colour = colours.get(arm, COLOURS["adamw"])
                panel.plot(steps, np.median(values, axis=0), color=colour, label=arm, linewidth=1.7)
                panel.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        for panel, (name, label) in zip(line, names.items(), strict=True):
            panel.set(title=f"{title}: {label}" if panel is line[0] else label, xlabel="step")
            if name == "source_loss":
                panel.set_yscale("log")
                _plain(panel.yaxis)
        line[0].legend(fontsize=8, ncols=2)
    return figure


@styled
def lines_figure(panels: Sequence[tuple[str, str, dict[str, list[tuple[float, Summary]]]]]) -> Any:
    """Target accuracy above, source loss below, as one setting moves: a column a setting."""
    figure, grid = panels_of(2, len(panels), 3.6 * len(panels), 6.2, sharex="col", sharey="row")
    shades = (COLOURS["recadam"], COLOURS["adamw"], "#1a7f37")
    for (title, scale, lines), above, below in zip(panels, grid[0], grid[1], strict=True):
        for (label, points), colour in zip(lines.items(), shades, strict=False):
            x = [value for value, _ in points]
            for panel, intervals in (
                (above, [s.target for _, s in points]),
                (below, [s.source for _, s in points]),
            ):
                middle = np.array([i.median for i in intervals])
                spread = [middle - [i.low for i in intervals], [i.high for i in intervals] - middle]
                panel.errorbar(
                    x, middle, yerr=spread, fmt="o-", color=colour, label=label, markersize=4, capsize=2
                )
        above.set(title=title, xscale=scale)
        below.set(xscale=scale, yscale="log")
        _plain(below.yaxis)
        ticks = sorted({value for points in lines.values() for value, _ in points})
        below.set_xticks(ticks, [f"{value:g}" for value in ticks], fontsize=8)
        below.set_xticks([], minor=True)
        below.axhline(next(iter(lines.values()))[0][1].before, color=INK, linewidth=0.8)
        if len(lines) > 1:
            above.legend(fontsize=8)
    grid[0, 0].set_ylabel("target accuracy")
    grid[1, 0].set_ylabel("source loss (line: before)")
    return figure
