"""A run's directory: who may write there, what is in it, and how it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recadam_core.errors import RecAdamError
from recadam_core.files import replacing

from .config import RunConfig, flat
from .engines import Array, StepRecord

__all__ = [
    "CHECKPOINT",
    "COLUMNS",
    "Run",
    "born",
    "claim",
    "clear",
    "load_run",
    "remove_unfinished",
    "resumable",
    "save_weights",
    "weights_path",
]

COLUMNS = ("step", *StepRecord._fields, "task_weight", "recall_weight", "lr", "pull", "seconds")
CHECKPOINT = "checkpoint.safetensors"
FILES = (
    *("config.json", "provenance.json", "status.json", "steps.jsonl", "evaluations.json"),
    *("predictions.npy", CHECKPOINT),
)


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
        provenance: versions, machine, and hash of the starting weights.
    """

    path: Path
    config: RunConfig
    status: dict[str, Any]
    steps: dict[str, Array]
    evaluations: list[dict[str, Any]]
    provenance: dict[str, Any]

    @property
    def label(self) -> str:
        """Backend and optimizer, as in tables."""
        return f"{self.config.backend} {self.config.optimizer}"

    def weights(self, step: int | None = None) -> dict[str, Array]:
        """Weights after a step; None for the last ones."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        steps = self.snapshots()
        if not steps or (step is not None and step not in steps):
            raise RecAdamError(f"{self.path}: no weights of step {step or 'the end'}; run it again")
        path = weights_path(self.path, steps[-1] if step is None else step)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise RecAdamError(f"{path}: damaged ({error}); run it again") from None

    def snapshots(self) -> list[int]:
        """Steps whose weights are kept."""
        return sorted(int(path.stem) for path in (self.path / "weights").glob("[0-9]*.safetensors"))

    def predictions(self) -> Array:
        """Scores of the test rows after the last step, of shape (rows, classes)."""
        try:
            return np.asarray(np.load(self.path / "predictions.npy", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise RecAdamError(f"{self.path / 'predictions.npy'}: {error}; run it to the end") from None


def load_run(path: str | Path, strict: bool = True) -> Run:
    """Read a run's directory; an unfinished one too.

    Args:
        path: the directory.
        strict: whether a complete run must have all of its records.

    Returns:
        The run. A run whose process died without a word counts as interrupted.

    Raises:
        RecAdamError: when it is no run, or a file of it is missing or damaged.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise RecAdamError(f"{path}: no run here; give a directory that `recadam finetune` wrote")

    def read(name: str, kind: type) -> Any:
        file = path / name
        try:
            value = json.loads(file.read_text(encoding="utf-8")) if file.exists() else kind()
        except ValueError as error:
            raise RecAdamError(f"{file}: damaged ({error}); run it again") from None
        if not isinstance(value, kind):
            raise RecAdamError(f"{file}: damaged (not a {kind.__name__}); run it again")
        return value

    try:
        config = RunConfig.from_dict(read("config.json", dict))
    except (KeyError, TypeError, AttributeError) as error:
        raise RecAdamError(f"{path / 'config.json'}: damaged ({error!r}); run it again") from None
    status = {"state": "interrupted", "step": 0, **read("status.json", dict)}
    columns = _read_records(path / "steps.jsonl")
    if status["state"] == "running" and not _alive(status.get("pid"), status.get("born")):
        status = {**status, "state": "interrupted", "step": len(columns["step"])}
    evaluations, provenance = read("evaluations.json", list), read("provenance.json", dict)
    if strict and status["state"] == "complete":
        complete = {
            "steps.jsonl": len(columns["step"]) == config.steps,
            "provenance.json": {"start_sha256", "headline"} <= provenance.keys(),
            "evaluations.json": bool(evaluations)
            and all(isinstance(e, dict) and "target_accuracy" in e for e in evaluations)
            and evaluations[-1].get("step") == config.steps,
        }
        for name, there in complete.items():
            if not there:
                raise RecAdamError(
                    f"{path / name}: damaged (the run is complete, this file is not); run it again"
                )
    return Run(path, config, status, columns, evaluations, provenance)


def _read_records(path: Path) -> dict[str, Array]:
    """The records by column; a last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append([float(row[name]) for name in COLUMNS])
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise RecAdamError(f"{path}: damaged in line {number} ({error!r}); run it again") from None
    return dict(zip(COLUMNS, np.array(rows).reshape(-1, len(COLUMNS)).T, strict=True))


def _alive(pid: Any, since: Any) -> bool:
    """Whether that process still runs; its start time tells it from a later one of the same number."""
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
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


def claim(out: Path, overwrite: bool, resumed: RunConfig | None) -> Run | None:
    """Make sure that the directory may be written; the earlier run that is to be resumed, if there is one."""
    if out.exists() and not out.is_dir():
        raise RecAdamError(f"{out}: is a file; give a directory")
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        run = load_run(out, strict=False)
    except RecAdamError:
        try:
            RunConfig.from_dict(json.loads((out / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecAdamError):
            raise RecAdamError(f"{out}: holds something that is no run; give another directory") from None
        if overwrite:  # a damaged run
            return None
        raise
    if not overwrite and resumed is None:
        hint = "give --overwrite, --resume or another directory"
        raise RecAdamError(f"{out}: holds a run already; {hint}")
    if run.status["state"] == "running":
        raise RecAdamError(
            f"{out}: process {run.status['pid']} is still writing this run; stop it, or delete status.json"
        )
    if resumed is None:
        return None
    theirs, ours = flat(run.config.to_dict()), flat(resumed.to_dict())
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise RecAdamError(
                f"{out}: cannot resume: {name} was {theirs.get(name)!r} and is {ours.get(name)!r}; give the "
                "settings of the run that is there, or another directory"
            )
    return run


def clear(out: Path) -> None:
    """Make the directory, and remove what an earlier run left in it: its own files and no others."""
    out.mkdir(parents=True, exist_ok=True)
    for path in [*out.glob("weights/[0-9]*.safetensors"), *(out / name for name in reversed(FILES))]:
        path.unlink(missing_ok=True)
    remove_unfinished(out)


def remove_unfinished(out: Path) -> None:
    """Remove the files that a kill has left beside their places."""
    patterns = [f".{name}.*" for name in FILES] + ["weights/.[0-9]*.safetensors.*"]
    for path in [path for pattern in patterns for path in out.glob(pattern)]:
        path.unlink(missing_ok=True)


def resumable(out: Path) -> bool:
    """Whether a directory has what a resume goes on from: a checkpoint, or a run that is complete."""
    return (out / CHECKPOINT).exists() or (out / "predictions.npy").exists()


def weights_path(out: Path, step: int) -> Path:
    """Where the weights after a step are."""
    return out / "weights" / f"{step:06d}.safetensors"


def save_weights(path: Path, weights: Mapping[str, Array], metadata: dict[str, str] | None = None) -> None:
    """Write arrays by name as safetensors, whole or not at all."""
    from safetensors.numpy import save

    # Not by save_file, which writes beside its place too: a kill would leave that file, under any name.
    with replacing(path) as beside:
        beside.write_bytes(save({name: np.ascontiguousarray(x) for name, x in weights.items()}, metadata))
