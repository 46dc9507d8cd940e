"""An experiment's page: pictures, tables and the command of every row; and the same as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from recadam_core.errors import RecAdamError

from ..folders import Folder, owned
from ..pages import Table, markdown_table, picture_of, write_page
from .experiment import Options
from .figures import curves_figure, label_of, lines_figure, pareto_figure
from .front_report import front_pictures, front_section
from .glue import PAPER, TASKS
from .grids import EXPERIMENTS
from .statistics import Summary, summarize
from .table import Results, Row

__all__ = ["PAGE", "SUMMARY", "files_of", "write_experiment"]

PAGE, SUMMARY = "report.html", "summary.md"
TOLD = ("accuracy", "matthews", "f1", "pearson", "spearman", "snli_mnr", "snli_recall_at_1", "snli_auc",
        "bbc_recall_at_1", "distance")  # fmt: skip


def files_of(options: Options) -> list[str]:
    """What may be written beside the table."""
    models = {model.rstrip("/"): _place(model, "") for model in options.models}
    for model, place in models.items():
        if list(models.values()).count(place) > 1:
            raise RecAdamError(f"model {model!r}: another one has a folder of that name, too; rename one")
    places = [_place(model, target) for model in options.models for target in options.targets]
    pictures = [[f"{place}.png", *front_pictures(place)] for place in places]
    return [PAGE, SUMMARY, *chain(*pictures)]


def _place(model: str, target: str) -> str:
    return f"{model.rstrip('/').rsplit('/', 1)[-1]}-{target.replace('/', '-')}"


def write_experiment(name: str, results: Results, options: Options) -> Path:
    """Write report.html, summary.md and the pictures, beside the table."""
    planned = EXPERIMENTS[name].planned(options, results)
    tested, tuning = results.of(planned[-1]), results.of(planned[0]) if len(planned) > 1 else []
    failed = results.failed(chain(*planned))
    if not tested:
        why = (
            "every trial failed; mend that, and run again"
            if failed
            else "none yet; let the experiment run on"
        )
        raise RecAdamError(f"{results.folder}: no row of a test, {why}")
    with owned(results.folder):
        folder = Folder(results.folder, "experiment")
        folder.check(files_of(options), edited=False)
        sections = []
        for model, target in dict.fromkeys((row.trial.model, row.trial.target) for row in tested):
            rows = [row for row in tested if (row.trial.model, row.trial.target) == (model, target)]
            tuned = [row for row in tuning if (row.trial.model, row.trial.target) == (model, target)]
            make = front_section if EXPERIMENTS[name].fronts else _section
            sections.append(make(name, model, target, _place(model, target), rows, tuned, folder))
        text = "\n".join(_markdown(section) for section in sections)
        folder.write(SUMMARY, text.encode(errors="backslashreplace"))
        return write_page(
            folder,
            PAGE,
            "experiment.html.j2",
            title=name,
            about=EXPERIMENTS[name].about,
            fronts=EXPERIMENTS[name].fronts,
            sections=sections,
            failed=failed,
            quick=options.quick,
        )


def _section(
    name: str, model: str, target: str, place: str, rows: Sequence[Row], tuned: Sequence[Row], folder: Folder
) -> dict[str, Any]:
    summaries = summarize(rows)
    draw: Callable[[], Any] | None = None
    if name == "comparison":
        draw = lambda: pareto_figure(summaries, f"{target}, {model}")  # noqa: E731
    elif name == "forgetting":
        draw = lambda: curves_figure(rows, _curve_groups(rows))  # noqa: E731
    elif name == "sensitivity":
        draw = lambda: lines_figure(_panels(summaries))  # noqa: E731
    pictures = [picture_of(folder, f"{place}.png", draw())] if draw else []
    first = rows[0].trial
    seeds = sorted({row.trial.seed for row in rows})
    return {
        "model": model,
        "target": target,
        "pictures": pictures,
        "seeds": seeds,
        "size": f"{first.rows or 'all'} rows, {first.steps} steps of {first.batch_size}",
        "before": _before(summaries[0]),
        "varies": len({(row.trial.rows, row.trial.steps) for row in rows}) > 1,
        "tables": [("", _glue_table(summaries, target) if target.startswith("glue/") else _table(summaries))],
        "runs": [(row, row.told(TOLD)) for row in rows],
        "tuned": [(row, row.told(TOLD)) for row in tuned],
    }


def _table(summaries: Sequence[Summary]) -> Table:
    header = ["", "settings", "target accuracy", "over AdamW, seed by seed", "source loss", "kept",
              "BBC recall@1", "kept, by that", "distance"]  # fmt: skip
    lines = [
        [
            label_of(s.arm),
            s.settings,
            str(s.target),
            "" if np.isnan(s.gain.median) else s.gain.signed,
            str(s.source),
            _percent(s.kept),
            "" if np.isnan(s.titles.median) else f"{s.titles.median:.3f}",
            _percent(s.titles_kept),
            f"{s.distance.median:.2f}",
        ]
        for s in summaries
    ]
    return header, lines


def _before(summary: Summary) -> str:
    if np.isnan(summary.before):
        return ""
    return f"Source loss before: {summary.before:.3f}; BBC recall@1: {summary.titles_before:.3f}."


def _percent(share: float) -> str:
    return "" if np.isnan(share) else f"{100 * share:.0f}%"


def _glue_table(summaries: Sequence[Summary], target: str) -> Table:
    """Medians in percent beside the paper's."""
    task = target.removeprefix("glue/")
    paper = dict(zip(("AdamW", "RecAdam"), PAPER.get(task, (None, None)), strict=True))
    figure = next(iter(TASKS[task].metrics(np.eye(2), np.arange(2))))
    lines = []
    for s in summaries:
        low, high = (f"{100 * x:.1f}" for x in s.target[1:])
        figures = f"{100 * s.target.median:.1f} ({low} to {high})"
        lines.append([s.arm, s.settings, figures, str(paper.get(s.arm) or "")])
    return ["", "settings", figure, "the paper's median (BERT-base)"], lines


def _curve_groups(rows: Sequence[Row]) -> dict[str, Sequence[str]]:
    arms = list(dict.fromkeys(row.entry.arm for row in rows))
    reference = [arm for arm in arms if arm == "AdamW"]
    slopes = [arm for arm in arms if arm.startswith("k=")]
    middles = [arm for arm in arms if arm.startswith("t0=")]
    groups: dict[str, Sequence[str]] = {}
    if slopes:
        groups["k moves, t0 = 50"] = [*reference, *sorted(slopes, key=_number)]
    if middles:
        groups["t0 moves, k = 0.2"] = [*reference, *sorted(middles, key=_number)]
    return groups or {"": arms}


def _number(arm: str) -> float:
    return float(arm.partition("=")[2].partition(",")[0])


def _panels(summaries: Sequence[Summary]) -> list[tuple[str, str, dict[str, list[tuple[float, Summary]]]]]:
    """A column of panels for each setting of `SENSITIVITY` that moves; see `lines_figure`."""

    def line(prefix: str, suffix: str = "") -> list[tuple[float, Summary]]:
        chosen = [s for s in summaries if s.arm.startswith(prefix) and s.arm.endswith(suffix)]
        return sorted(((_number(s.arm), s) for s in chosen), key=lambda point: point[0])

    rates = {"lr·γ = 0.2": line("lr=", "lr·γ=0.2"), "γ = 1000": line("lr=", "γ=1000")}
    rows = {name: line("rows=", f", {name}") for name in ("RecAdam", "AdamW", "constant pull")}
    panels = (
        ("pull (lr·γ)", "log", {"RecAdam": line("pull=")}),
        ("learning rate", "log", rates),
        ("middle of the annealing / steps", "linear", {"RecAdam": line("center=")}),
        ("training rows", "log", rows),
    )
    return [
        (title, scale, {label: points for label, points in lines.items() if points})
        for title, scale, lines in panels
        if any(lines.values())
    ]


def _markdown(section: dict[str, Any]) -> str:
    seeds = ", ".join(map(str, section["seeds"]))
    size = "" if section["varies"] else f"; {section['size']}"
    text = [f"### {section['target']}, {section['model']}", ""]
    about = f"Seeds {seeds}{size}. Medians, and 95% bootstrap intervals (of few seeds: their range)."
    text += [f"{about} {section['before']}".rstrip(), ""]
    for file, _ in section["pictures"]:
        text += [f"![{section['target']}, {section['model']}]({file})", ""]
    for title, (header, lines) in section["tables"]:
        text += [f"{title}:", ""] if title else []
        text += markdown_table(
            header, [[cell.replace(" to ", "&nbsp;to&nbsp;") for cell in line] for line in lines]
        )
        text += [""]
    return "\n".join(text)
