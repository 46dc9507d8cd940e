"""One page on any number of runs: tables, pictures and comparisons, readable without a server."""

from __future__ import annotations

import datetime
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recadam_core.errors import RecAdamError
from recadam_core.files import replacing

from .compare import Comparison, compare_runs, setup_of
from .directory import Run
from .plots import SOURCE_LABELS, task_figure

__all__ = ["compare_all", "summary_rows", "write_report"]


def compare_all(runs: Sequence[Run]) -> list[Comparison]:
    """Compare runs that differ in nothing but the backend, each with the first of its kind."""
    comparisons = []
    first: dict[str, Run] = {}
    for run in _ordered(runs):
        key = repr(setup_of(run))
        if key in first:
            comparisons.append(compare_runs(first[key], run))
        else:
            first[key] = run
    return comparisons


def _ordered(runs: Sequence[Run]) -> list[Run]:
    """By backend, the reference first; within a backend as given."""
    order = ("numpy", "torch", "jax")
    return sorted(runs, key=lambda run: (*order, run.config.backend).index(run.config.backend))


def summary_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What each run learned and forgot, for a table."""
    rows = []
    for run in runs:
        before, after = run.evaluations[0], run.evaluations[-1]
        metric, more = run.provenance["headline"]
        seconds = sorted(run.steps["seconds"])
        rows.append(
            {
                "name": run.path.name,
                "task": run.config.task,
                "backend": run.config.backend,
                "optimizer": run.config.optimizer,
                "target_before": before["target_accuracy"],
                "target_after": after["target_accuracy"],
                "metric": SOURCE_LABELS.get(metric, metric),
                "better": "more" if more else "less",
                "source_before": before[metric],
                "source_after": after[metric],
                "distance": float(run.steps["distance"][-1]),
                "seconds": seconds[len(seconds) // 2],
            }
        )
    return rows


def write_report(
    runs: Sequence[Run],
    out: str | Path,
    title: str = "Fine-tuning runs",
    comparisons: Sequence[Comparison] | None = None,
) -> Path:
    """Write report.html, and a PNG of each task's picture beside it."""
    from jinja2 import Environment, PackageLoader

    out = Path(out)
    complete = [run for run in runs if run.status["state"] == "complete"]
    if not complete:
        raise RecAdamError(f"{out}: no complete run to report on; run one to the end")
    if comparisons is None:
        comparisons = compare_all(complete)
    sections = []
    for task in dict.fromkeys(run.config.task for run in complete):
        chosen = _ordered([run for run in complete if run.config.task == task])
        paths = {str(run.path) for run in chosen}
        compared = [c for c in comparisons if paths.issuperset(c.paths)]
        figure = task_figure(chosen, compared)
        with replacing(out / f"{task}.png") as beside:
            figure.savefig(beside, format="png", dpi=150)
        picture = io.StringIO()
        figure.savefig(picture, format="svg")
        svg = picture.getvalue()
        sections.append(
            {
                "task": task,
                "runs": chosen,
                "rows": summary_rows(chosen),
                "figures": [_figures(run) for run in chosen],
                "names": list(dict.fromkeys(name for run in chosen for name in _figures(run))),
                "comparisons": compared,
                "svg": svg[svg.index("<svg") :],
            }
        )
    environment = Environment(loader=PackageLoader("recadam_harness"), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        title=title,
        sections=sections,
        unfinished=[run for run in runs if run.status["state"] != "complete"],
        written=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        labels=SOURCE_LABELS,
    )
    with replacing(out / "report.html") as beside:
        beside.write_text(page, encoding="utf-8")
    return out / "report.html"


def _figures(run: Run) -> dict[str, tuple[float, float]]:
    """Each evaluated figure, before and after."""
    before, after = run.evaluations[0], run.evaluations[-1]
    return {name: (before[name], after[name]) for name in before if name != "step"}
