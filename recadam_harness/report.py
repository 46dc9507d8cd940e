"""One page on any number of runs: tables, pictures and comparisons, readable without a server."""

from __future__ import annotations

import datetime
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recadam_core.errors import RecAdamError

from .compare import Comparison, compare_runs, setup_of
from .directory import Run
from .engines import reference_first
from .folders import Folder, owned
from .pages import Table, write_page, write_picture
from .plots import SOURCE_LABELS, seeds_figure, task_figure
from .seeds import Sweep

__all__ = ["PAGE", "compare_all", "draw_report", "draw_seeds", "summary_rows", "write_report"]

PAGE = "report.html"


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
    return sorted(runs, key=lambda run: reference_first(run.config.backend)[0])


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
    overwrite: bool = False,
) -> Path:
    """Write report.html, and a PNG of each task's picture beside it.

    Args:
        runs: the runs.
        out: the folder.
        title: title of the page.
        overwrite: whether to replace an earlier report in the folder.

    Returns:
        Path of the page.

    Raises:
        RecAdamError: when no run is complete, or the folder has files of these names.
    """
    out = Path(out)
    complete = [run for run in runs if run.status["state"] == "complete"]
    if not complete:
        raise RecAdamError(f"{out}: no complete run to report on; run one to the end")
    comparisons = compare_all(complete)
    with owned(out):
        folder = Folder(out, "report")
        folder.check([PAGE, *(f"{run.config.task}.png" for run in complete)], overwrite)
        return draw_report(runs, folder, title, comparisons)


def draw_report(runs: Sequence[Run], folder: Folder, title: str, comparisons: Sequence[Comparison]) -> Path:
    """Write the page and its pictures into a folder that is ours."""
    complete = [run for run in runs if run.status["state"] == "complete"]
    sections = []
    for task in dict.fromkeys(run.config.task for run in complete):
        chosen = _ordered([run for run in complete if run.config.task == task])
        paths = {str(run.path) for run in chosen}
        compared = [c for c in comparisons if paths.issuperset(c.paths)]
        figure = task_figure(chosen, compared)
        write_picture(folder, f"{task}.png", figure)
        picture = io.StringIO()
        figure.savefig(picture, format="svg")
        svg = picture.getvalue()
        sections.append(
            {
                "task": task,
                "runs": chosen,
                "marks": [run.config.optimizer for run in chosen],
                "learned": _learned(chosen),
                "figures": _figures(chosen),
                "compared": _compared(compared),
                "svg": svg[svg.index("<svg") :],
            }
        )
    return write_page(
        folder,
        PAGE,
        "report.html.j2",
        title=title,
        sections=sections,
        unfinished=[run for run in runs if run.status["state"] != "complete"],
        written=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
    )


def draw_seeds(sweeps: Sequence[Sweep], folder: Folder) -> None:
    """Write seeds.json and seeds.png into a folder that is ours."""
    folder.write_json("seeds.json", [sweep.to_dict() for sweep in sweeps])
    write_picture(folder, "seeds.png", seeds_figure(sweeps))


def _learned(runs: Sequence[Run]) -> Table:
    rows = summary_rows(runs)
    source = f"{rows[0]['metric']} ({rows[0]['better']} is better)"
    return ["run", "target accuracy", source, "distance to θ*", "seconds a step"], [
        [
            row["name"],
            f"{row['target_before']:.3f} → {row['target_after']:.3f}",
            f"{row['source_before']:.3f} → {row['source_after']:.3f}",
            f"{row['distance']:.3f}",
            f"{row['seconds']:.4f}",
        ]
        for row in rows
    ]


def _compared(comparisons: Sequence[Comparison]) -> Table:
    head = ["run", "held against", "agree", "weights apart, share of distance travelled", "bound",
            "same predictions", "first difference of any bit"]  # fmt: skip
    return head, [
        [
            c.second,
            c.first,
            "yes" if c.agree else "no",
            f"{c.weights:.2g}" + (f" at step {c.weights_step}" if c.weights else ""),
            f"{c.tolerance:g}",
            f"{100 * c.predictions:.2f}% of {c.rows}",
            "none" if c.first_difference is None else "step {}, {}".format(*c.first_difference),
        ]
        for c in comparisons
    ]


def _figures(runs: Sequence[Run]) -> Table:
    """Each evaluated figure, before and after."""
    ends = [(run.evaluations[0], run.evaluations[-1]) for run in runs]
    names = list(dict.fromkeys(name for before, _ in ends for name in before if name != "step"))
    return ["run", *(SOURCE_LABELS.get(name, name.replace("_", " ")) for name in names)], [
        [run.path.name, *(f"{a[n]:.3f} → {b[n]:.3f}" if n in a else "" for n in names)]
        for run, (a, b) in zip(runs, ends, strict=True)
    ]
