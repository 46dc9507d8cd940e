"""GLUE: the official files or the hub's, its metrics, and the paper's settings."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recadam_core.errors import RecAdamError, unknown

from .texts import Splits, Texts, accuracy_of

__all__ = ["ALBERT", "BERT", "HUB", "PAPER", "TASKS", "GlueTask", "Preset", "read"]

Array = np.ndarray[Any, Any]
HUB = "nyu-mll/glue"


def _matthews(scores: Array, labels: Array) -> dict[str, float]:
    from sklearn.metrics import matthews_corrcoef

    return {
        "matthews": float(matthews_corrcoef(labels, scores.argmax(axis=1))),
        **accuracy_of(scores, labels),
    }


def _f1(scores: Array, labels: Array) -> dict[str, float]:
    from sklearn.metrics import f1_score

    f1 = f1_score(labels, scores.argmax(axis=1), zero_division=0.0)
    return {**accuracy_of(scores, labels), "f1": float(f1)}


def _correlations(scores: Array, labels: Array) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    flat = scores[:, 0]
    if not np.ptp(flat) or not np.ptp(labels):  # a constant correlates with nothing
        return {"pearson": 0.0, "spearman": 0.0}
    return {"pearson": float(pearsonr(flat, labels)[0]), "spearman": float(spearmanr(flat, labels)[0])}


@dataclass(frozen=True)
class GlueTask:
    """A task of GLUE."""

    columns: tuple[str | int, str | int, str | int]
    hub: tuple[str, str, str]
    labels: tuple[str, ...] = ("0", "1")
    metrics: Callable[[Array, Array], dict[str, float]] = accuracy_of
    dev: str = "dev"


ENTAILS = ("entailment", "not_entailment")
TASKS = {
    "CoLA": GlueTask((3, "", 1), ("cola", "sentence", ""), metrics=_matthews),
    "SST-2": GlueTask(("sentence", "", "label"), ("sst2", "sentence", "")),
    "MRPC": GlueTask(
        ("#1 String", "#2 String", "Quality"), ("mrpc", "sentence1", "sentence2"), metrics=_f1
    ),
    "STS-B": GlueTask(
        ("sentence1", "sentence2", "score"), ("stsb", "sentence1", "sentence2"), (), _correlations
    ),
    "QQP": GlueTask(
        ("question1", "question2", "is_duplicate"), ("qqp", "question1", "question2"), metrics=_f1
    ),
    "MNLI": GlueTask(
        ("sentence1", "sentence2", "gold_label"),
        ("mnli", "premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        dev="dev_matched",
    ),
    "QNLI": GlueTask(("question", "sentence", "label"), ("qnli", "question", "sentence"), ENTAILS),
    "RTE": GlueTask(("sentence1", "sentence2", "label"), ("rte", "sentence1", "sentence2"), ENTAILS),
}  # fmt: skip
"""The eight tasks of the paper."""


@dataclass(frozen=True)
class Preset:
    """The paper's settings for one model."""

    model: str
    settings: Mapping[str, Any]
    per_task: Mapping[str, Mapping[str, Any]]
    k: tuple[float, ...]
    t0: tuple[float, ...]


STEPS = {
    "CoLA": 13400, "STS-B": 9000, "MRPC": 11500, "RTE": 7800,
    "SST-2": 21050, "QNLI": 33890, "QQP": 56855, "MNLI": 61360,
}  # fmt: skip
SLOPES = (0.05, 0.1, 0.2, 0.5, 1.0)
BERT = Preset(
    "google-bert/bert-base-uncased",
    {"lr": 2e-5, "batch_size": 32, "max_length": 128, "dropout": None, "rows": 0},
    {task: {"steps": steps} for task, steps in STEPS.items()},
    SLOPES,
    (250.0, 500.0, 1000.0),
)
"""BERT-base. Source: arXiv 2004.12651."""


def _albert(lr: float, batch_size: int, steps: int, warmup: int, **more: Any) -> dict[str, Any]:
    return {"lr": lr, "batch_size": batch_size, "steps": steps, "warmup": warmup, **more}


ALBERT = Preset(
    "albert/albert-xxlarge-v2",
    {"max_length": 512, "dropout": None, "rows": 0},
    {
        "CoLA": _albert(1e-5, 16, 5336, 320, dropout=0.0),
        "STS-B": _albert(2e-5, 16, 3598, 214),
        "SST-2": _albert(1e-5, 32, 20935, 1256),
        "MNLI": _albert(3e-5, 128, 10000, 1000),
        "QNLI": _albert(1e-5, 32, 33112, 1986),
        "QQP": _albert(5e-5, 128, 14000, 1000),
        "RTE": _albert(3e-5, 32, 800, 200),
        "MRPC": _albert(2e-5, 32, 800, 200),
    },
    SLOPES,
    (100.0, 250.0, 500.0),
)
"""ALBERT-xxlarge. Source: arXiv 1909.11942, table 14, which arXiv 2004.12651 follows."""

PAPER = {
    "CoLA": (60.6, 62.4),
    "STS-B": (89.8, 90.4),
    "MRPC": (86.5, 87.7),
    "RTE": (71.1, 74.4),
    "SST-2": (93.0, 93.6),
}
"""Medians for BERT-base, vanilla and RecAdam, as far as quoted. Source: arXiv 2004.12651, table 1."""


def check(name: str, data: str) -> None:
    """Raise unless there is such a task, and files of it where they are said to be."""
    if name not in TASKS:
        raise unknown("GLUE task", name, TASKS)
    if not data:
        raise RecAdamError(
            f"glue/{name}: no data; give --data FOLDER with {name}/train.tsv in it, or --data hub; a trial "
            "takes it as data=FOLDER"
        )
    for part in () if data == "hub" else ("train", TASKS[name].dev):
        if not (path := Path(data) / name / f"{part}.tsv").is_file():
            raise RecAdamError(f"{path}: not there; give --data the folder of the official GLUE files")


def read(name: str, data: str) -> Splits:
    """A task of GLUE: development rows are the test rows; up to a tenth and 1,000 of training's validate."""
    check(name, data)
    task = TASKS[name]
    if data == "hub":
        parts = _from_hub(task)
        train, dev = (
            _texts(
                name,
                f"{HUB} {part}",
                ((row[task.hub[1]], row.get(task.hub[2], ""), row["label"]) for row in rows),
            )
            for part, rows in parts.items()
        )
    else:
        train, dev = (
            _texts(name, str(path), _official(task, path))
            for path in (Path(data) / name / f"{part}.tsv" for part in ("train", task.dev))
        )
    if len(train) < 2:
        raise RecAdamError(f"glue/{name}: one training row, and some are kept out; fetch the files again")
    order = np.random.default_rng(0).permutation(len(train))
    count = min(1000, max(1, len(train) // 10))
    return Splits(
        train=train.pick(order[count:]),
        validation=train.pick(order[:count]),
        test=dev,
        classes=len(task.labels) or 1,
        metrics=task.metrics,
    )


def _official(task: GlueTask, path: Path) -> Iterable[tuple[str, str, str]]:
    """Text, second text and label of each line."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        rows = _whole(path, reader)
        places = task.columns
        if not isinstance(places[0], int):
            header = next(rows, None)
            if header is None:
                raise RecAdamError(f"{path}: empty; give the official files")
            absent = [x for x in places if x and x not in header]
            if absent:
                raise RecAdamError(
                    f"{path}: no column {absent[0]!r} in its first line; give the official files"
                )
            places = tuple(header.index(str(x)) if x else "" for x in places)  # type: ignore[assignment]
        first, second, label = places
        for row in rows:
            try:
                yield row[first], row[second] if second != "" else "", row[label]  # type: ignore[index]
            except IndexError:
                if task is TASKS["QQP"]:  # whose official file has some rows without a second question
                    continue
                raise RecAdamError(
                    f"{path}: line {reader.line_num} has {len(row)} columns; fetch the file again"
                ) from None


def _whole(path: Path, reader: Any) -> Iterator[list[str]]:
    """The rows of a csv.reader, as long as they can be read."""
    try:
        yield from reader
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecAdamError(
            f"{path}: damaged after line {reader.line_num} ({error}); fetch it again"
        ) from None


def _texts(name: str, where: str, rows: Iterable[tuple[str, str, Any]]) -> Texts:
    task = TASKS[name]
    first, second, labels = [], [], []
    for number, (one, other, label) in enumerate(rows, start=1):
        try:
            if task.labels and isinstance(label, str):
                label = task.labels.index(label)
            label = float(label)
            if label not in range(len(task.labels)) if task.labels else not 0 <= label <= 5:
                raise ValueError
        except ValueError:
            says = " or ".join(task.labels) or "a score from 0 to 5"
            raise RecAdamError(
                f"{where}: the label of row {number} is {label!r}, not {says}; fetch it again"
            ) from None
        first.append(one)
        second.append(other)
        labels.append(label)
    if not first:
        raise RecAdamError(f"{where}: no rows; fetch it again")
    values = np.array(labels, dtype=int if task.labels else float)
    return Texts(first, second if task.hub[2] else None, values)


def _from_hub(task: GlueTask) -> dict[str, Any]:
    """Training and development rows, as the hub's data set has them."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise RecAdamError(
            "glue: the hub's data needs 'datasets'; pip install datasets, or give --data FOLDER"
        ) from None
    try:
        splits = load_dataset(HUB, task.hub[0])
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise RecAdamError(
            f"glue: cannot fetch {HUB} {task.hub[0]!r}: {reason}; give --data FOLDER"
        ) from error
    dev = "validation_matched" if task.dev == "dev_matched" else "validation"
    return {"train": splits["train"], "dev": splits[dev]}


def headline(task: str, figures: Mapping[str, float]) -> float:
    """The figure by which the paper judges a task."""
    return figures[{"CoLA": "matthews", "STS-B": "pearson"}.get(task, "accuracy")]
