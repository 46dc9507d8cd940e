"""The tidy table of an experiment: a row a trial, kept whole on disk, from which it is resumed."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recadam_core.errors import RecAdamError
from recadam_core.files import check_regular, parse_json, replacing

from ..folders import Folder
from .data import kind_of
from .trial import Trial

__all__ = ["CURVES", "FIGURES", "INPUTS", "TABLE", "Entry", "Results", "Row"]

TABLE, CURVES, INPUTS = "table.csv", "curves.csv", "inputs.json"
FIELDS = tuple(f.name for f in dataclasses.fields(Trial))
FIGURES = (
    "accuracy", "matthews", "f1", "pearson", "spearman",
    "snli_mnr", "snli_recall_at_1", "snli_auc", "bbc_recall_at_1",
    "snli_mnr_before", "snli_recall_at_1_before", "snli_auc_before", "bbc_recall_at_1_before",
    "distance", "loss", "seconds",
)  # fmt: skip
LATER = ("share", "weight", "held_out")
MEASURES = (
    "learned", "learned_before", "forgotten", "moved", "kl",
    "recall_at_1", "mnr", "bbc_mnr", "topics_accuracy", "news_nats", "posts_nats",
    "recall_at_1_before", "mnr_before", "bbc_mnr_before", "topics_accuracy_before", "news_nats_before",
    "posts_nats_before",
)  # fmt: skip
"""Settings and figures that a table has a column for where a row has them."""
POINTS = ("step", "loss", "source_loss", "distance")
CHECK = "sha256"
"""The column that tells whether a row, or its curve, is as it was written."""
NAMES = ("stage", "arm", *FIELDS, *FIGURES, *MEASURES, "error", "command", CHECK)
RANGES = {
    **dict.fromkeys(("matthews", "pearson", "spearman"), (-1.0, 1.0)),
    **dict.fromkeys(("snli_mnr", "distance", "loss", "seconds"), (0.0, math.inf)),
    **dict.fromkeys(("mnr", "bbc_mnr", "news_nats", "posts_nats"), (0.0, math.inf)),
    **dict.fromkeys(("forgotten", "moved", "kl"), (-math.inf, math.inf)),
}
"""Least and largest values of the figures that are no shares."""
STAGES = ("tune", "test")


@dataclass(frozen=True)
class Entry:
    """A trial's place in an experiment."""

    stage: str
    arm: str
    trial: Trial

    @property
    def name(self) -> tuple[str, str, str]:
        """What tells it from others."""
        return self.stage, self.arm, self.trial.command


@dataclass(frozen=True)
class Row:
    """An entry and what was found."""

    entry: Entry
    figures: Mapping[str, float]
    curve: Sequence[Mapping[str, float]] = field(default_factory=list)
    error: str = ""

    @property
    def trial(self) -> Trial:
        """Its trial."""
        return self.entry.trial

    def told(self, names: Iterable[str]) -> str:
        """Those of these figures that it has, in words."""
        known = ((name.replace("_", " "), self.figures[name]) for name in names if name in self.figures)
        return ", ".join(f"{name} {x:.4g}" for name, x in known)

    @property
    def wrong(self) -> str:
        """What keeps the figures of a trial without an error from being used; empty where nothing does."""
        if self.error:
            return ""
        kind = "glue" if self.trial.target.startswith("glue/") else kind_of(self.trial.target)
        needed = {
            "glue": ("seconds",),
            "classification": ("accuracy", "snli_mnr", "snli_mnr_before", "distance"),
        }.get(kind, ("learned", "learned_before", "forgotten", "moved", "distance"))
        for name in needed:
            if name not in self.figures:
                return f"no {name}"
        for name, x in self.figures.items():
            low, high = RANGES.get(name.removesuffix("_before"), (0.0, 1.0))
            if not (math.isfinite(x) and low <= x <= high):
                return f"{name} is {x}"
        return ""

    @property
    def check(self) -> str:
        """The first digits of the sha256 of all that it says, however it is written."""
        figures = {
            name: _digits(x) for name in (*FIGURES, *MEASURES) if (x := self.figures.get(name)) is not None
        }
        curve = [[_digits(point.get(name)) for name in POINTS] for point in self.curve]
        said = json.dumps([*self.entry.name, figures, self.error, curve])
        return hashlib.sha256(said.encode()).hexdigest()[:16]


class Results:
    """All rows of an experiment, and the files that hold them."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder or Path()
        self.manifest = Folder(self.folder, "experiment") if folder else None
        self.rows: dict[tuple[str, str, str], Row] = {}
        self._curves: dict[str, list[dict[str, float]]] = {}
        if folder is not None:
            self._curves = self._read_curves()
            for row in self._read_table(self._curves):
                if row.entry.name in self.rows:
                    arm, command = row.entry.arm, row.trial.command
                    raise RecAdamError(
                        f"{folder / TABLE}: {arm!r} has {command!r} twice; delete one of the lines"
                    )
                self.rows[row.entry.name] = row

    def _lines(
        self, name: str, known: Iterable[str], needed: Iterable[str]
    ) -> Iterable[tuple[int, dict[str, str]]]:
        path = self.folder / name
        if not path.exists():
            return
        check_regular(path)
        # A spreadsheet may have put a byte order mark before the first name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            try:
                absent = [x for x in needed if x not in (reader.fieldnames or ())]
                if absent:
                    raise RecAdamError(
                        f"{path}: no column {absent[0]!r} in its first line; delete the file, or give "
                        "another folder by --out"
                    )
                more = [x for x in reader.fieldnames or () if x not in known]
                if more:
                    raise RecAdamError(
                        f"{path}: no experiment wrote its column {more[0]!r}, which would be lost; move it "
                        "to a file of your own"
                    )
                for line in reader:
                    if None in line or None in line.values():
                        raise ValueError("it has not as many columns as the first line")
                    yield reader.line_num, line
            except RecAdamError:
                raise
            except (ValueError, csv.Error) as error:
                raise RecAdamError(
                    f"{path}: damaged after line {reader.line_num} ({error}); mend it, or delete the file"
                ) from None

    def _read_curves(self) -> dict[str, list[dict[str, float]]]:
        curves: dict[str, list[dict[str, float]]] = {}
        try:
            for _, line in self._lines(CURVES, ("key", *POINTS), ("key", *POINTS)):
                point = {name: float(line[name]) for name in POINTS if line[name]}
                if wrong := next((n for n, x in point.items() if not 0 <= x < math.inf), ""):
                    raise ValueError(f"{wrong} is {point[wrong]}")
                curves.setdefault(line["key"], []).append(point)
        except (KeyError, ValueError, TypeError) as error:
            raise RecAdamError(f"{self.folder / CURVES}: damaged ({error}); delete it and {TABLE}") from None
        return curves

    def _read_table(self, curves: Mapping[str, list[dict[str, float]]]) -> Iterable[Row]:
        needed = ("stage", "arm", "method", *FIGURES, *NAMES[-3:])
        for number, line in self._lines(TABLE, NAMES, needed):
            try:
                read = Trial.reads(line["method"], line.get("head", ""))
                trial = Trial.parse(
                    f"{name}={line[name]}" for name in FIELDS if name in line and name in read
                )
                figures = {name: float(line[name]) for name in (*FIGURES, *MEASURES) if line.get(name)}
                row = Row(
                    Entry(line["stage"], line["arm"], trial),
                    figures,
                    curves.get(trial.key, []),
                    line["error"],
                )
                if row.entry.stage not in STAGES:
                    raise ValueError(f"stage {row.entry.stage!r}")
                if wrong := row.wrong:
                    raise ValueError(wrong)
                if line[CHECK] != row.check or line["command"] != trial.command:
                    raise ValueError("it, or its curve, was changed since it was written")
            except (KeyError, ValueError, TypeError) as error:
                where = f"{self.folder / TABLE}: line {number}"
                raise RecAdamError(
                    f"{where}: damaged ({error}); delete that line, and its trial is run again"
                ) from None
            yield row

    def inputs(self) -> dict[str, Any]:
        """The sha256 of the models and data of the user's that rows are of, by name."""
        path = self.folder / INPUTS
        if self.manifest is None or INPUTS not in self.manifest.files:
            return {}
        remedy = "put it back, or give another folder by --out"
        if not path.is_file():
            raise RecAdamError(f"{path}: is not there; {remedy}")
        data = path.read_bytes()
        if self.manifest.altered(INPUTS, data):
            raise RecAdamError(f"{path}: damaged (its sha256 is not the manifest's); {remedy}")
        return parse_json(path, data, dict, remedy)

    def add(self, row: Row) -> None:
        """Take a row, and write the files anew: whole, or as they were."""
        self.rows[row.entry.name] = row
        self.write()

    def write(self) -> None:
        """Write the curves where there are any, and then the table, which says what is done."""
        if self.manifest:
            self.manifest.begin([TABLE, CURVES])
        # With what no row has, as after a kill between the two files.
        curves = {**self._curves, **{row.trial.key: row.curve for row in self.rows.values() if row.curve}}
        if curves:
            with (
                replacing(self.folder / CURVES) as beside,
                beside.open("w", encoding="utf-8", newline="") as file,
            ):
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["key", *POINTS])
                for key, curve in curves.items():
                    writer.writerows([key, *(_digits(point.get(name)) for name in POINTS)] for point in curve)
        with replacing(self.folder / TABLE) as beside, beside.open("w", encoding="utf-8", newline="") as file:
            used = {name for row in self.rows.values() for name in (*row.trial.changed, *row.figures)}
            columns = [name for name in NAMES if name in used or name not in (*LATER, *MEASURES)]
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            for row in self.rows.values():
                said = {
                    **{name: _said(getattr(row.trial, name)) for name in FIELDS},
                    **{name: _digits(x) for name, x in row.figures.items()},
                    "stage": row.entry.stage, "arm": row.entry.arm, "error": row.error,
                    "command": row.trial.command, CHECK: row.check,
                }  # fmt: skip
                writer.writerow([said.get(name, "") for name in columns])

    def of(self, entries: Iterable[Entry]) -> list[Row]:
        """Rows of these entries, in their order; without those that failed or are still to come."""
        return [row for row in self._tried(entries) if not row.error]

    def failed(self, entries: Iterable[Entry]) -> list[Row]:
        """Rows of these entries that say why they have no figures."""
        return [row for row in self._tried(entries) if row.error]

    def _tried(self, entries: Iterable[Entry]) -> list[Row]:
        return [self.rows[entry.name] for entry in entries if entry.name in self.rows]

    def some(self, entries: Sequence[Entry]) -> list[Row]:
        """As `of`, of entries that have been tried."""
        if not (rows := self.of(entries)):
            first = self.rows[entries[0].name]
            raise RecAdamError(
                f"{self.folder / TABLE}: {first.trial.command} failed, as all of {first.entry.arm} did: "
                f"{first.error}; mend that, and run again"
            )
        return rows


def _said(value: Any) -> Any:
    return "None" if value is None else value


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
