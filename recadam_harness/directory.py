"""A run's directory: who may write there, what is in it, and how it is read."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from recadam_core.errors import RecAdamError, shown
from recadam_core.files import check_regular, parse_json

from .config import RunConfig, flat
from .engines import Array, StepRecord
from .folders import MANIFEST, Folder, is_empty
from .weights import read_weights, weights_name

__all__ = [
    "CHECKPOINT",
    "COLUMNS",
    "FILES",
    "FIRST",
    "PREDICTIONS",
    "RECORDS",
    "Run",
    "born",
    "check_evaluations",
    "claim",
    "clear",
    "identity_of",
    "load_run",
]

T = TypeVar("T")
COLUMNS = ("step", *StepRecord._fields, "task_weight", "recall_weight", "lr", "pull", "seconds")
CHECKPOINT, PREDICTIONS, RECORDS = "checkpoint.safetensors", "predictions.npy", "steps.jsonl"
FIRST = ("config.json", "provenance.json", "status.json", RECORDS, "evaluations.json")
FILES = (*FIRST, PREDICTIONS, CHECKPOINT)
STATES = ("complete", "running", "interrupted", "failed")
AGAIN = "run it again"
WEIGHTS = re.compile(r"weights/(\d{6,})\.safetensors")


@dataclass(frozen=True)
class Run:
    """A run's directory, read.

    Args:
        path: the directory.
        config: its configuration.
        status: "complete", "running", "interrupted" or "failed", and how far it came.
        steps: records by column: step, loss, grad_norm, distance, travelled, task_weight,
            recall_weight, lr, pull, seconds.
        evaluations: figures at the steps that were evaluated.
        provenance: versions, machine, and hash of model, starting weights and rows.
        folder: its manifest.
    """

    path: Path
    config: RunConfig
    status: dict[str, Any]
    steps: dict[str, Array]
    evaluations: list[dict[str, Any]]
    provenance: dict[str, Any]
    folder: Folder

    @property
    def label(self) -> str:
        """Backend and optimizer, as in tables."""
        return f"{self.config.backend} {self.config.optimizer}"

    def weights(self, step: int | None = None) -> dict[str, Array]:
        """Weights after a step; None for the last ones."""
        steps = self.snapshots()
        if not steps or (step is not None and step not in steps):
            raise RecAdamError(f"{self.path}: no weights of step {step or 'the end'}; {AGAIN}")
        return read_weights(self.folder, steps[-1] if step is None else step)

    def snapshots(self) -> list[int]:
        """Steps whose weights are kept."""
        listed = ((name, WEIGHTS.fullmatch(name)) for name in self.folder.files)
        return sorted(int(match[1]) for name, match in listed if match and (self.path / name).exists())

    def check_files(self) -> None:
        """Raise unless every file of a complete run is what the run wrote."""
        for name in self.folder.files:
            path = self.path / name
            if self.folder.files[name] is not None and not path.is_file():
                raise _damaged(path, "is not there")
            if self.folder.altered(name):
                raise _damaged(path, "not what the run wrote: its sha256 is not the manifest's")
        self.predictions()

    def predictions(self) -> Array:
        """Scores of the test rows after the last step, of shape (rows, classes)."""

        def parse(path: Path, data: bytes) -> Array:
            return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))

        if not (self.path / PREDICTIONS).exists():
            raise RecAdamError(f"{self.path / PREDICTIONS}: is not there; run it to the end")
        scores = _read(self.folder, PREDICTIONS, parse)
        rows = self.provenance.get("test_rows")
        if scores.ndim != 2 or scores.dtype.kind != "f" or len(scores) != rows:
            raise _damaged(self.path / PREDICTIONS, f"{scores.dtype} {scores.shape}, of {rows} rows")
        return scores


def load_run(path: str | Path, strict: bool = True) -> Run:
    """Read a run's directory; an unfinished one too.

    Every file is held against the sha256 that the run wrote into its manifest, so that no other run's file
    and no flipped bit is taken for this run's.

    Args:
        path: the directory.
        strict: whether a complete run must have all of its records.

    Returns:
        The run. A run whose process died without a word counts as interrupted.

    Raises:
        RecAdamError: when it is no run, or a file of it is missing, damaged or another run's.
    """
    path = Path(path)
    for _ in range(100):
        before = _stamp(path)
        try:
            return _load(path, strict)
        except RecAdamError:
            if _stamp(path) == before:
                raise  # else the run is alive, and wrote meanwhile
    return _load(path, strict)


def _stamp(path: Path) -> tuple[int, int] | None:
    """What tells a manifest from the one that takes its place."""
    try:
        found = (path / MANIFEST).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _load(path: Path, strict: bool) -> Run:
    if not (path / "config.json").exists():
        raise RecAdamError(f"{path}: no run here; give a directory that `recadam finetune` wrote")
    if not (path / MANIFEST).exists():
        raise _damaged(path / MANIFEST, "is not there")
    folder = Folder(path, "run")
    for name in {*FILES, *folder.files}:
        check_regular(path / name)
    config = _read(folder, "config.json", _config)
    nothing: dict[str, Any] = {}
    provenance = _read(folder, "provenance.json", _provenance, nothing)
    if provenance and folder.identity != identity_of(config, provenance["start_sha256"]):
        raise _damaged(path / MANIFEST, "of another configuration, model or data")
    status = _read(folder, "status.json", _status, {"state": "interrupted", "step": 0})
    columns = _read(folder, RECORDS, _records, _table([]))
    if status["state"] == "running" and not _alive(status.get("pid"), status.get("born")):
        status = {**status, "state": "interrupted", "step": len(columns["step"])}
    if folder.files.get(PREDICTIONS):  # which is written last, whatever is said
        status = {**status, "state": "complete", "step": config.steps}
    none_yet: list[dict[str, Any]] = []
    evaluations = _read(folder, "evaluations.json", _evaluations, none_yet)
    run = Run(path, config, status, columns, evaluations, provenance, folder)
    if strict and status["state"] == "complete":
        _check_complete(run)
    return run


def _check_complete(run: Run) -> None:
    """Raise unless all that a complete run has is there, and sealed."""
    evaluated = run.evaluations[-1] if run.evaluations else {}
    wanted = {"target_accuracy", *run.provenance.get("headline", [])[:1]}
    whole = {
        RECORDS: len(run.steps["step"]) == run.config.steps,
        "provenance.json": bool(run.provenance),
        "evaluations.json": evaluated.get("step") == run.config.steps
        and all(wanted <= e.keys() for e in run.evaluations),
    }
    for name, there in whole.items():
        if not there:
            raise _damaged(run.path / name, "the run is complete, this file is not")
    last = weights_name(run.config.steps)
    for name in ("config.json", "provenance.json", RECORDS, "evaluations.json", PREDICTIONS, last):
        if run.folder.files.get(name) is None:
            raise _damaged(run.path / MANIFEST, f"the run is complete, and {name} has no sha256 here")
    run.check_files()


def _damaged(path: Path, why: object) -> RecAdamError:
    return RecAdamError(f"{path}: damaged ({why}); {AGAIN}")


def _read(folder: Folder, name: str, parse: Callable[[Path, bytes], T], absent: T | None = None) -> T:
    """What a file of a run says, if it is what the run wrote; a value where it is not there."""
    path = folder.path / name
    if absent is not None and not path.exists():
        if folder.files.get(name) is not None:
            raise _damaged(path, "is not there")
        return absent
    try:
        data = path.read_bytes()
        value = parse(path, data)
    except RecAdamError:
        raise
    except OSError as error:
        raise RecAdamError(f"{path}: {error.strerror or error}; give a path that can be read") from None
    except Exception as error:  # what parsers make of nonsense is more than they say
        raise _damaged(path, f"{type(error).__name__}: {error}") from None
    if folder.altered(name, data):
        raise _damaged(path, "not what the run wrote: its sha256 is not the manifest's")
    return value


def _config(path: Path, data: bytes) -> RunConfig:
    values = parse_json(path, data, dict, AGAIN)
    try:
        return RunConfig.from_dict(values)
    except RecAdamError as error:
        raise _damaged(path, error) from None
    except Exception as error:
        raise _damaged(path, f"{type(error).__name__}: {shown(str(error))}") from None


def _provenance(path: Path, data: bytes) -> dict[str, Any]:
    values = parse_json(path, data, dict, AGAIN)
    resumed = values.setdefault("resumed", [])
    headline = values.get("headline")
    if not (isinstance(headline, list) and [type(x) for x in headline] == [str, bool]):
        raise _damaged(path, f"headline is {shown(headline)}")
    for name, kind in (("start_sha256", str), ("test_rows", int), ("versions", dict), ("command", str)):
        if not isinstance(values.get(name), kind):
            raise _damaged(path, f"{name} is {shown(values.get(name))}")
    if not isinstance(resumed, list) or not all(isinstance(x, dict) for x in resumed):
        raise _damaged(path, f"resumed is {shown(resumed)}")
    return values


def _status(path: Path, data: bytes) -> dict[str, Any]:
    values = parse_json(path, data, dict, AGAIN)
    if values.get("state") not in STATES:
        raise _damaged(path, f"state is {shown(values.get('state'))}")
    for name in ("step", "pid", "born"):
        value = values.get(name, None if name == "born" else 0)
        if not (name == "born" and value is None) and not _whole(value):
            raise _damaged(path, f"{name} is {shown(value)}")
    return {"step": 0, **values}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _records(path: Path, data: bytes) -> dict[str, Array]:
    """The records by column; a last line that a kill cut short is left out."""
    lines = data.decode("utf-8", "replace").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            values = [row[name] for name in COLUMNS]
            if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in values):
                raise TypeError(f"no number in {shown(line)}")
            rows.append([float(x) for x in values])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            if number < len(lines) or line.rstrip().endswith("}"):
                raise RecAdamError(
                    f"{path}: damaged in line {number} ({type(error).__name__}: {shown(str(error))}); {AGAIN}"
                ) from None
            break
        if values[0] != number:
            raise RecAdamError(f"{path}: damaged in line {number} (step {values[0]} stands there); {AGAIN}")
    return _table(rows)


def _table(rows: list[list[float]]) -> dict[str, Array]:
    return dict(zip(COLUMNS, np.array(rows).reshape(-1, len(COLUMNS)).T, strict=True))


def _evaluations(path: Path, data: bytes) -> list[dict[str, Any]]:
    return check_evaluations(path, parse_json(path, data, list, AGAIN))


def check_evaluations(path: Path, values: list[Any]) -> list[dict[str, Any]]:
    """The evaluations, if each has a later step than the one before, and finite figures."""
    before = -1
    for e in values:
        step = e.get("step", -1) if isinstance(e, dict) else -1
        if not _whole(step) or step <= before:
            raise _damaged(path, f"no evaluation, or none of a later step: {shown(e)}")
        before = step
        for name, x in e.items():
            if isinstance(x, bool) or not isinstance(x, (int, float)) or not _finite(x):
                raise _damaged(path, f"{shown(name)} is {shown(x)} at step {step}")
    return values


def _finite(x: float) -> bool:
    try:
        return math.isfinite(x)
    except OverflowError:  # an integer beyond every float
        return False


def _alive(pid: Any, since: Any) -> bool:
    """Whether that process still runs; its start time tells it from a later one of the same number."""
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # somebody else's, but there
    now = born(pid)
    return since is None or now is None or since == now


def born(pid: int) -> int | None:
    """When a process started, in the system's ticks; None where /proc does not tell."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def identity_of(config: RunConfig, start_sha256: str) -> str:
    """What a run's files belong to: the sha256 of its configuration and of what it starts from."""
    text = json.dumps([config.to_dict(), start_sha256], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def claim(out: Path, config: RunConfig, overwrite: bool, resume: bool) -> Run | None:
    """Make sure that the directory may be written; the earlier run that is to be resumed, if there is one."""
    if out.exists() and not out.is_dir():
        raise RecAdamError(f"{out}: is a file; give a directory")
    if is_empty(out):
        return None
    if not (out / MANIFEST).exists():
        raise RecAdamError(f"{out}: holds something that is no run; give another directory")
    folder = Folder(out, "run")
    there = (f"weights/{path.name}" for path in out.glob("weights/*"))
    planned = [match[0] for match in map(WEIGHTS.fullmatch, there) if match and config.keeps(int(match[1]))]
    folder.check([*folder.files, *FILES, *planned])
    folder.check([weights_name(config.steps)] if overwrite or resume else [])  # and the folder that it is in
    if overwrite or not any((out / name).exists() for name in folder.files):
        return None
    if not resume:
        hint = "give --overwrite, --resume or another directory"
        raise RecAdamError(f"{out}: holds a run already; {hint}")
    run = load_run(out, strict=False)
    theirs, ours = flat(run.config.to_dict()), flat(config.to_dict())
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise RecAdamError(
                f"{out}: cannot resume: {name} was {theirs.get(name)!r} and is {ours.get(name)!r}; give the "
                "settings of the run that is there, or another directory"
            )
    return run


def clear(out: Path) -> Folder:
    """Remove what an earlier run left: its own files and no others; config.json last."""
    folder = Folder(out, "run")
    folder.remove(sorted(folder.files, key=lambda name: (name in FILES, name == "config.json")))
    return folder
