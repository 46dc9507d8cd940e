"""An experiment, run: trials several at once, each on its share of the cores, resumed from the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from recadam_core.errors import RecAdamError

from ..archives import MODELS, check_encoder, digests_of, fetch_all, model_folder
from ..decoders import decoder_folder
from ..folders import Folder, owned
from ..processes import Each, pool
from . import run_trial
from .data import DECODER, archives, target_of
from .experiment import Experiment, Options
from .report import files_of
from .table import CURVES, INPUTS, TABLE, Entry, Results, Row
from .trial import Trial

__all__ = ["run_experiment"]


def run_experiment(
    experiment: Experiment,
    options: Options,
    folder: Path,
    jobs: int,
    tell: Callable[[int, str, int], None] | None = None,
) -> Results:
    """Run what is not in the folder's table yet."""
    with owned(folder):
        ours = Folder(folder, "experiment")
        ours.check([TABLE, CURVES, INPUTS])
        ours.check(files_of(options), edited=False)
        results = Results(folder)
        for row in results.rows.values():
            if row.entry.arm not in experiment.arms:
                raise RecAdamError(
                    f"{folder}: holds another experiment (a row of arm {row.entry.arm!r}); "
                    "give another folder by --out"
                )
        _run(experiment, options, results, jobs, tell or (lambda done, text, total: None))
    return results


def _run(
    experiment: Experiment,
    options: Options,
    results: Results,
    jobs: int,
    told: Callable[[int, str, int], None],
) -> None:
    finished = 0
    with pool(jobs) as each:
        for stage in experiment.stages:
            planned = stage(options, results)
            # What failed is tried again: the reason may be gone.
            waiting = [
                entry for entry in planned if entry.name not in results.rows or results.rows[entry.name].error
            ]
            finished += len(planned) - len(waiting)
            _prepare([entry.trial for entry in waiting])
            _bind(results, [entry.trial for entry in planned], [entry.trial for entry in waiting])
            total = finished + len(waiting) + experiment.later(options, stage)
            told(finished, "", total)
            for row in _each(each, waiting, results):
                results.add(row)
                finished += 1
                told(finished, f"{row.entry.arm}: {row.error or row.trial.command}", total)


def _prepare(trials: Sequence[Trial]) -> None:
    """Fetch what they read, and find what is wrong with it before any of them has run."""
    for model in dict.fromkeys(t.model for t in trials):
        if model == DECODER:
            decoder_folder()
        else:
            check_encoder(model_folder(model))
    fetch_all(name for t in trials for name in archives(t.target, t.model))
    for target, data in dict.fromkeys((t.target, t.data) for t in trials if t.data):
        target_of(target, data)


def _bind(results: Results, planned: Sequence[Trial], waiting: Sequence[Trial]) -> None:
    """Raise where a model or data of the user's is not what earlier rows are of; note what it is.

    Archives have their sha256 in the sources. What is gone is not missed where nothing is left to run.
    """
    found: dict[str, Any] = {}
    needed = {x for t in waiting for x in (t.model, (t.target, t.data))}
    for model in dict.fromkeys(t.model for t in planned if t.model not in (*MODELS, DECODER)):
        if model in needed or Path(model).is_dir():
            found[f"model {model}"] = digests_of(model_folder(model))
    for place in dict.fromkeys((t.target, t.data) for t in planned if t.data):
        if place in needed or Path(place[1]).is_dir():
            found["{} of {}".format(*place)] = [target_of(*place).sha256]
    known = results.inputs()
    for name, digests in found.items():
        if known.get(name, digests) != digests:
            raise RecAdamError(
                f"{results.folder}: {name} was changed since; give another folder by --out, or what it was"
            )
    if results.manifest is not None and found.keys() - known.keys():
        results.manifest.write_json(INPUTS, known | found)


def _each(each: Each, entries: Sequence[Entry], results: Results) -> Iterator[Row]:
    """Rows as they come. A trial that stands in several places is run once."""
    known = {row.trial: row for row in results.rows.values() if not row.error}
    places: dict[Trial, list[Entry]] = {}
    for entry in entries:
        if entry.trial in known:
            yield dataclasses.replace(known[entry.trial], entry=entry)
        else:
            places.setdefault(entry.trial, []).append(entry)
    for first, row in each(_row, [first for first, *_ in places.values()]):
        for entry in places[first.trial]:
            yield dataclasses.replace(row, entry=entry)


def _row(entry: Entry) -> Row:
    """In another process: one trial."""
    try:
        figures = run_trial(entry.trial)
    except RecAdamError as error:
        return Row(entry, {}, [], str(error))
    except Exception as error:  # of a library: the others go on
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return Row(entry, {}, [], f"{type(error).__name__}: {reason}")
    curve = figures.pop("curve", [])
    row = Row(entry, figures, curve)
    return Row(entry, {}, [], wrong) if (wrong := row.wrong) else row
