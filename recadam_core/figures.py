"""The style of every picture, and the one of a schedule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np

from .annealing import Annealing

__all__ = ["COLOURS", "new_figure", "schedule_figure", "styled"]

P = ParamSpec("P")
T = TypeVar("T")
COLOURS = {"recadam": "#0b6e99", "adamw": "#d1662a", "coupled": "#6b4c9a", "annealed": "#7a9a01"}
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
}


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draw under this module's style, importing matplotlib only then."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def new_figure(columns: int) -> tuple[Any, Any]:
    """A row of panels, drawn without a display and without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.1 * columns, 3.5), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


@styled
def schedule_figure(annealing: Annealing, lr: float, gamma: float, steps: int) -> Any:
    """A matplotlib figure of the task weight, the recall weight and the pull of each step."""
    figure, (weights, pull) = new_figure(2)
    t = np.arange(1.0, steps + 1)
    task, recall = annealing.weights(t, np)
    weights.plot(t, task, color=COLOURS["recadam"], label="task weight λ(t)")
    weights.plot(t, recall, color=COLOURS["adamw"], label="recall weight")
    weights.set(title="Annealing", xlabel="step", ylim=(-0.02, 1.05 * max(1.0, task.max(), recall.max())))
    weights.legend()
    pull.plot(t, lr * gamma * recall, color="#333333")
    pull.axhline(1.0, color="#b00020", linewidth=1, linestyle="--")
    pull.annotate(
        "overshoots above", (steps, 1.0), (0, 4), textcoords="offset points", color="#b00020", ha="right"
    )
    pull.set(title="Pull: share of the way home in a step", xlabel="step")
    pull.set_yscale("log")
    pull.set_ylim(1e-6, 4)
    return figure
