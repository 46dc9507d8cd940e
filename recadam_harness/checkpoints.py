"""The checkpoint, from which a run that was cut short goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recadam_core.errors import RecAdamError
from recadam_core.files import parse_json, replacing
from recadam_core.update import Moments

from .directory import CHECKPOINT, RECORDS, Run, check_evaluations
from .engines import Array, Engine
from .folders import Folder
from .weights import digest_of, packed, unpacked, weights_name

__all__ = ["Checkpoint"]

REMEDY = "delete it, or give --overwrite"


@dataclass(frozen=True)
class Checkpoint:
    """All that a run goes on from after a step, in one file that vouches for itself.

    A kill may come between any two files of a run. So the file holds its own sha256, the identity of its run,
    how many records there were and their sha256, and the evaluations.
    """

    step: int
    weights: Mapping[str, Array]
    moments: Mapping[str, Moments]
    evaluations: list[dict[str, Any]]

    @classmethod
    def of(cls, engine: Engine, step: int, evaluations: list[dict[str, Any]]) -> Checkpoint:
        """An engine's, after a step."""
        weights = engine.weights()
        return cls(step, weights, {name: engine.moments(name) for name in weights}, evaluations)

    def write(self, folder: Folder) -> None:
        """Write the file, whole or as it was."""
        arrays = {f"weights.{name}": x for name, x in self.weights.items()}
        arrays |= {f"{part}.{n}": getattr(x, part) for n, x in self.moments.items() for part in "mv"}
        about = {
            "run": folder.identity,
            "step": str(self.step),
            "records": str(self.step),
            "records_sha256": _sha256_of_lines(folder.path / RECORDS, self.step),
            "evaluations": json.dumps(self.evaluations),
        }
        folder.begin([CHECKPOINT])
        with replacing(folder.path / CHECKPOINT) as beside:
            beside.write_bytes(packed(arrays, {**about, "sha256": _digest(arrays, about)}))

    @classmethod
    def read(cls, run: Run, start: Mapping[str, Array]) -> Checkpoint:
        """The checkpoint of a run that began at these weights, if it is this run's and whole."""
        path = run.path / CHECKPOINT
        try:
            arrays, about = unpacked(path)
            if about.pop("sha256", None) != _digest(arrays, about):
                raise ValueError("its sha256 is not that of what is in it")
            if about["run"] != run.folder.identity:
                raise ValueError("it is of another run")
            step, records = int(about["step"]), int(about["records"])
            if not 0 < step < run.config.steps or records != step:
                raise ValueError(f"its step is {step} of {run.config.steps}, with {records} records")
            for name, wanted in start.items():
                for x in (arrays[f"{part}.{name}"] for part in ("weights", "m", "v")):
                    if x.shape != wanted.shape or x.dtype != run.config.dtype:
                        raise ValueError(
                            f"{name} is {x.dtype} {x.shape}, not {run.config.dtype} {wanted.shape}"
                        )
            evaluations = check_evaluations(path, parse_json(path, about["evaluations"], list, REMEDY))
        except (OSError, KeyError, ValueError) as error:
            raise RecAdamError(f"{path}: damaged ({error}); {REMEDY}") from None
        if (
            len(run.steps["step"]) < step
            or _sha256_of_lines(run.path / RECORDS, step) != about["records_sha256"]
        ):
            raise RecAdamError(
                f"{run.path / RECORDS}: damaged (its first {step} records are not those of {CHECKPOINT}); "
                "give --overwrite"
            )
        for earlier in (t for t in range(1, step + 1) if run.config.keeps(t)):
            run.weights(earlier)
        weights = {name: arrays[f"weights.{name}"] for name in start}
        moments = {name: Moments(arrays[f"m.{name}"], arrays[f"v.{name}"]) for name in start}
        return cls(step, weights, moments, evaluations)

    def put_back(self, run: Run, resumed: Mapping[str, Any]) -> None:
        """Put the files of a run back to where they were at the checkpoint, and note that it goes on."""
        folder = run.folder
        folder.remove(weights_name(step) for step in run.snapshots() if step > self.step)
        lines = (run.path / RECORDS).read_bytes().splitlines(keepends=True)
        folder.begin([RECORDS])
        with replacing(run.path / RECORDS) as beside:
            beside.write_bytes(b"".join(lines[: self.step]))
        folder.write_json("evaluations.json", self.evaluations)
        earlier = run.provenance.get("resumed", [])
        again = {"resumed": [*earlier, {"step": self.step, **resumed}]}
        folder.write_json("provenance.json", {**run.provenance, **again})


def _digest(arrays: Mapping[str, Array], about: Mapping[str, str]) -> str:
    """The sha256 of arrays and metadata, whatever their order."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    digest_of(arrays, digest)
    return digest.hexdigest()


def _sha256_of_lines(path: Path, count: int) -> str:
    """The sha256 of the first lines of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for _ in range(count):
            digest.update(file.readline())
    return digest.hexdigest()
