"""Pictures of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recadam_core.figures import COLOURS, new_figure, styled

from .compare import TINY, Comparison
from .directory import Run
from .seeds import Sweep

__all__ = ["SOURCE_LABELS", "seeds_figure", "task_figure"]

NAMES = {"recadam": "RecAdam", "adamw": "AdamW", "coupled": "coupled Adam", "annealed": "λ(t) alone"}
DASHES = ("-", (0, (6, 4)), (0, (2, 3)))
MARKERS = {"torch": "o", "jax": "x", "numpy": "+"}
SOURCE_LABELS = {
    "source_accuracy": "ten-digit accuracy",
    "source_loss": "ten-digit loss",
    "snli_mnr": "SNLI pair loss (MNR)",
    "snli_recall_at_1": "SNLI recall@1",
    "snli_auc": "SNLI AUC",
    "bbc_recall_at_1": "BBC title recall@1",
}


def _smooth(y: Any, width: int) -> Any:
    """Running mean over the last `width` values (fewer at the start)."""
    sums = np.cumsum(np.concatenate([[0.0], y]))
    ends = np.arange(1, len(y) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


@styled
def task_figure(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> Any:
    """Four panels on the runs of one task: learning, drift, what was keeps, and the same path."""
    figure, (learn, drift, keeps, path) = new_figure(4)
    width = max(1, runs[0].config.steps // 15)
    backends = dict.fromkeys(run.config.backend for run in runs)
    dashes = {name: DASHES[min(i, len(DASHES) - 1)] for i, name in enumerate(backends)}
    for run in runs:
        config, steps = run.config, run.steps
        colour, dash = COLOURS[config.optimizer], dashes[config.backend]
        style = {"color": colour, "linestyle": dash, "linewidth": 1.8}
        learn.plot(steps["step"], _smooth(steps["loss"], width), **style)
        drift.plot(steps["step"], steps["distance"], **style)
    learn.set(title="Learns: loss on the target task", xlabel=f"step (mean over {width})", ylim=(0, None))
    for name in dict.fromkeys(run.config.optimizer for run in runs):
        learn.plot([], [], color=COLOURS[name], linewidth=1.8, label=NAMES[name])
    for name in backends:
        style = {"linestyle": dashes[name], "marker": MARKERS.get(name, "s")}
        learn.plot([], [], color="#555555", linewidth=1.2, markerfacecolor="none", label=name, **style)
    learn.legend(fontsize=8, ncols=2)
    drift.set(title="Drifts: distance to the anchor θ*", xlabel="step", ylim=(0, None))
    annealed = [run for run in runs if run.config.optimizer != "adamw"]
    if annealed:
        weight = drift.twinx()
        steps = annealed[0].steps
        weight.fill_between(steps["step"], steps["task_weight"], color="#888888", alpha=0.13, linewidth=0)
        weight.set(ylim=(0, 1.02), yticks=[0, 0.5, 1])
        weight.grid(False)
        weight.annotate("λ(t)", (0.97, 0.06), xycoords="axes fraction", color="#777777", ha="right")
        weight.tick_params(colors="#777777")

    metric, more = runs[0].provenance["headline"]
    for run in runs:
        before, after = run.evaluations[0], run.evaluations[-1]
        colour = COLOURS[run.config.optimizer]
        keeps.annotate(
            "",
            (after["target_accuracy"], after[metric]),
            (before["target_accuracy"], before[metric]),
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.25, "linewidth": 1.2},
        )
        keeps.plot(
            after["target_accuracy"],
            after[metric],
            MARKERS.get(run.config.backend, "s"),
            color=colour,
            markersize=9,
            markerfacecolor="none",
            markeredgewidth=2,
        )
    start = runs[0].evaluations[0]
    keeps.plot(start["target_accuracy"], start[metric], "D", color="#333333", markersize=6)
    keeps.annotate("before", (start["target_accuracy"], start[metric]), (6, 6), textcoords="offset points")
    keeps.margins(0.18)
    if not more:
        keeps.invert_yaxis()
    keeps.set(title="Keeps: best is top right", xlabel="target accuracy")
    keeps.set_ylabel(SOURCE_LABELS.get(metric, metric) + ("" if more else ", axis turned"))

    lowest = 1.0
    for c in comparisons:
        first, second = (next(run for run in runs if str(run.path) == where) for where in c.paths)
        backend, optimizer = second.config.backend, second.config.optimizer
        kept_steps, shares = zip(*c.snapshots, strict=True)
        records = np.abs(second.steps["distance"] - first.steps["distance"])
        records = records / np.maximum(first.steps["travelled"], TINY)
        floor = float(np.finfo(np.float64).eps) / 8
        style = {"color": COLOURS[optimizer], "linestyle": dashes[backend]}
        path.semilogy(first.steps["step"], np.maximum(records, floor), linewidth=0.8, alpha=0.5, **style)
        marks = {"linestyle": "none", "marker": MARKERS.get(backend, "s"), "markerfacecolor": "none"}
        path.semilogy(kept_steps, np.maximum(shares, floor), color=COLOURS[optimizer], markersize=7, **marks)
        lowest = min(lowest, *shares, *records)
    if comparisons:
        bound = comparisons[0].tolerance
        path.axhline(bound, color="#b00020", linewidth=1)
        style = {"textcoords": "offset points", "color": "#b00020"}
        path.annotate("bound on the weights", (0, bound), (4, -11), **style)
        path.set_ylim(max(lowest / 3, 1e-17), 10 * bound)
        path.plot([], [], color="#555555", linestyle="none", marker="x", label="weights")
        path.plot([], [], color="#555555", linewidth=0.8, alpha=0.5, label="record of the distance to θ*")
        path.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.82))
        name = comparisons[0].first.split()[0]
        path.set(title=f"Same path: apart from {name}'s", xlabel=f"step ({runs[0].config.dtype})")
        path.set_ylabel("share of the distance travelled")
    else:
        path.set_visible(False)
    return figure


@styled
def seeds_figure(sweeps: Sequence[Sweep]) -> Any:
    """The spread over seeds: target accuracy, what was kept, and drift, by optimizer."""
    figure, panels = new_figure(3)
    source = sweeps[0].headline
    for sweep in sweeps:
        name = sweep.config.optimizer
        steps = np.arange(1, sweep.config.steps + 1)
        curves = (
            (sweep.at, sweep.evaluations["target_accuracy"]),
            (sweep.at, sweep.evaluations[source]),
            (steps, sweep.steps["distance"]),
        )
        for panel, (x, values) in zip(panels, curves, strict=True):
            low, first, middle, third, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1], axis=0)
            panel.fill_between(x, low, high, color=COLOURS[name], alpha=0.12, linewidth=0)
            panel.fill_between(x, first, third, color=COLOURS[name], alpha=0.3, linewidth=0)
            panel.plot(x, middle, color=COLOURS[name], label=NAMES[name])
    count = len(sweeps[0].seeds)
    titles = (
        "Target accuracy",
        SOURCE_LABELS[source][0].upper() + SOURCE_LABELS[source][1:],
        "Distance to the anchor",
    )
    for panel, title in zip(panels, titles, strict=True):
        panel.set(title=title, xlabel=f"step ({count} seeds)")
    panels[0].legend()
    return figure
