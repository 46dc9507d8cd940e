"""A run: one task, one backend, one optimizer, one directory."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recadam_core.annealing import annealed_weights
from recadam_core.backends import get_backend
from recadam_core.coefficients import coefficients
from recadam_core.errors import RecAdamError, check_whole
from recadam_core.files import naming, write_json
from recadam_core.interrupts import deferred

from .checkpoints import Checkpoint
from .config import RunConfig
from .directory import (
    CHECKPOINT,
    COLUMNS,
    FIRST,
    PREDICTIONS,
    RECORDS,
    Run,
    born,
    claim,
    clear,
    identity_of,
    load_run,
)
from .engines import Engine, StepRecord, make_engine
from .folders import Folder, owned
from .memory import check_memory
from .tasks import get_task
from .tasks.base import Array, Problem, Rows
from .weights import digest_of, write_weights

__all__ = ["Batches", "Prepared", "batch_order", "finetune", "prepare", "step_memory"]

VERSIONS = ("recadam-core", "numpy", "torch", "jax", "jaxlib", "optax", "tokenizers", "scikit-learn")


class Batches:
    """Row numbers of each batch: epoch after epoch of seeded permutations, drawn when they are needed."""

    def __init__(self, rows: int, size: int, seed: int) -> None:
        if size > rows:
            raise RecAdamError(f"batch_size is {size}; there are {rows} training rows, give no more")
        self.rows, self.size, self.seed = rows, size, seed
        self._restart()

    def _restart(self) -> None:
        self._rng = np.random.default_rng([self.seed, 1])
        self._t, self._batch, self._ahead = 0, np.empty(0, int), np.empty(0, int)

    def __getitem__(self, t: int) -> Array:
        """The batch of step t, from 1; going back begins anew."""
        if t < self._t:
            self._restart()
        while self._t < t:
            if len(self._ahead) < self.size:
                self._ahead = np.concatenate([self._ahead, self._rng.permutation(self.rows)])
            self._batch, self._ahead = self._ahead[: self.size], self._ahead[self.size :]
            self._t += 1
        return self._batch


def batch_order(rows: int, batch_size: int, steps: int, seed: int) -> Array:
    """The batches of all steps, of shape (steps, batch_size)."""
    check_memory(f"{steps:,} steps with batch_size {batch_size:,}", 16.0 * steps * batch_size)
    batches = Batches(rows, batch_size, seed)
    return np.stack([batches[t] for t in range(1, steps + 1)])


class Prepared(NamedTuple):
    """A configuration with its task, and an engine before its first step."""

    config: RunConfig
    problem: Problem
    engine: Engine
    batches: Batches

    def batch(self, t: int) -> Rows:
        """The rows of step t."""
        return {name: column[self.batches[t]] for name, column in self.problem.train.items()}

    def step(self, t: int) -> StepRecord:
        """Step t."""
        return self.engine.step(self.batch(t), self.config.rate(t))


def prepare(config: RunConfig) -> Prepared:
    """Read the data and make the engine, where the backend's precision is the configuration's."""
    problem = get_task(config.task).prepare(config.seed, **config.options)
    batches = Batches(len(problem.train["targets"]), config.batch_size, config.seed)
    check_memory(f"batch_size {config.batch_size:,}", step_memory(config, problem))
    start = problem.model, problem.params, problem.anchored
    with deferred():
        engine = make_engine(config.backend, *start, config.optimizer, config.hp, config.dtype)
    return Prepared(config, problem, engine, batches)


def step_memory(config: RunConfig, problem: Problem) -> float:
    """Roughly the bytes of a step: weights, gradients, moments and anchors, and what each row leaves."""
    held = 5 * sum(x.size for x in problem.params.values())
    rows = config.batch_size * problem.model.floats_a_row(problem.train)
    return float(np.dtype(config.dtype).itemsize * (held + rows))


def finetune(
    config: RunConfig,
    out: str | Path,
    overwrite: bool = False,
    progress: Callable[[int, str], None] | None = None,
    resume: bool = False,
    checkpoint_every: int = 0,
) -> Run:
    """Run a configuration and write its directory.

    Args:
        config: what to run.
        out: the directory: new, empty, or with `overwrite` or `resume` that of an earlier run.
        overwrite: whether to replace an earlier run.
        progress: called with the step and a line on what is being done.
        resume: whether to go on from the last checkpoint of an earlier run of this configuration that was
            cut short: it ends as if it had not been, bit for bit. A complete run is returned as it is.
        checkpoint_every: keep what a resume needs (weights and moments) every so many steps, until the run
            is complete; 0 for never.

    Returns:
        The run.

    Raises:
        RecAdamError: when the directory holds something else, or the run cannot be set up.
        KeyboardInterrupt: when interrupted; the directory says so.
    """
    out = Path(out)
    tell = progress or (lambda step, text: None)
    check_whole("checkpoint_every", checkpoint_every, 0)
    if overwrite and resume:
        raise RecAdamError(f"{out}: overwrite and resume exclude one another; give one of them")
    for t in np.unique(np.linspace(1, config.steps, 1000, dtype=int)):
        _policy(config, int(t))  # a pull that diverges is refused before anything is written
    with owned(out):
        earlier = claim(out, config, overwrite, resume)
        if earlier is not None and earlier.status["state"] == "complete":
            earlier = load_run(out)
            earlier.folder.remove([CHECKPOINT])  # of a run that was killed when it had written all
            return earlier
        tell(0, "reading data and model")
        # What overflows is found in the records; NumPy's warnings of it are not in one line.
        with get_backend(config.backend).precision(config.dtype), np.errstate(all="ignore"):
            prepared = prepare(config)
            provenance = _provenance(prepared.problem, config)
            folder, step, evaluations = _begin(out, earlier, prepared, provenance)
            with _status(folder, step) as status, deferred() as check:
                _train(prepared, folder, status, evaluations, tell, check, checkpoint_every)
        folder.remove([CHECKPOINT])
        return load_run(out)


def _begin(
    out: Path, earlier: Run | None, prepared: Prepared, provenance: dict[str, Any]
) -> tuple[Folder, int, list[dict[str, Any]]]:
    """Make the directory ready, by the last checkpoint of an earlier run or from the start."""
    config = prepared.config
    if earlier is not None and (out / CHECKPOINT).exists():
        if earlier.provenance.get("start_sha256") != provenance["start_sha256"]:
            raise RecAdamError(f"{out}: cannot resume: another model or other data; give --overwrite")
        saved = Checkpoint.read(earlier, prepared.problem.params)
        with deferred():
            prepared.engine.restore(saved.step, saved.weights, saved.moments)
        saved.put_back(earlier, {name: provenance[name] for name in ("started", "command", "versions")})
        return earlier.folder, saved.step, saved.evaluations
    folder = clear(out)
    folder.begin(FIRST, identity_of(config, provenance["start_sha256"]))
    folder.write_json("config.json", config.to_dict())
    folder.write_json("provenance.json", provenance)
    return folder, 0, []


def _train(
    prepared: Prepared,
    folder: Folder,
    status: dict[str, Any],
    evaluations: list[dict[str, Any]],
    tell: Callable[[int, str], None],
    check: Callable[[], None],
    checkpoint_every: int,
) -> None:
    config, problem, engine = prepared.config, prepared.problem, prepared.engine
    first = int(status["step"]) + 1

    def call(function: str, rows: Mapping[str, Array]) -> Array:
        check()
        return engine.call(function, rows)

    def evaluate(step: int) -> Array:
        tell(step, "evaluating")
        logits, figures = problem.evaluate(call)
        evaluations.append({"step": step, **figures})
        folder.write_json("evaluations.json", evaluations)
        return logits

    if first == 1:
        evaluate(0)
    path = folder.path / RECORDS
    with naming(path), path.open("a", encoding="utf-8") as records:
        for t in range(first, config.steps + 1):
            check()
            batch, lr = prepared.batch(t), config.rate(t)
            began = time.perf_counter()
            record = engine.step(batch, lr)
            seconds = time.perf_counter() - began
            task_weight, recall_weight, pull = _policy(config, t)
            line = (t, *record, task_weight, recall_weight, lr, pull, seconds)
            records.write(json.dumps(dict(zip(COLUMNS, line, strict=True))) + "\n")
            records.flush()
            status["step"] = t
            for name, x in zip(
                ("loss", "gradient norm", "distance", "distance travelled"), record, strict=True
            ):
                if not np.isfinite(x):
                    raise RecAdamError(
                        f"{folder.path}: the {name} is {x} at step {t}; lower lr, or raise eps"
                    )
            tell(t, f"loss {record.loss:.4f}")
            if config.keeps(t):
                write_weights(folder, t, engine.weights())
            if config.evaluates(t):
                logits = evaluate(t)
            if checkpoint_every and t % checkpoint_every == 0 and t < config.steps:
                Checkpoint.of(engine, t, evaluations).write(folder)
    folder.seal(RECORDS)
    scores = io.BytesIO()
    np.save(scores, logits)
    folder.write(PREDICTIONS, scores.getvalue())


def _policy(config: RunConfig, t: int) -> tuple[float, float, float]:
    """Task weight, recall weight and pull of a step, for its record."""
    if config.optimizer == "adamw":
        return 1.0, 0.0, 0.0
    task, recall = annealed_weights(config.hp.annealing, t)
    if config.optimizer != "recadam":
        return task, recall, 0.0
    return task, recall, coefficients(t, config.hp, config.rate(t)).pull


@contextlib.contextmanager
def _status(folder: Folder, step: int = 0) -> Iterator[dict[str, Any]]:
    """Keep status.json true: running, then complete, interrupted or failed."""
    pid = os.getpid()
    status: dict[str, Any] = {"state": "running", "step": step, "pid": pid, "born": born(pid)}
    write_json(folder.path / "status.json", status)
    try:
        yield status
        status["state"] = "complete"
    except KeyboardInterrupt:
        status["state"] = "interrupted"
        raise
    except BaseException as error:
        status.update(
            state="failed", reason=str(error).splitlines()[0] if str(error) else type(error).__name__
        )
        raise
    finally:
        # Of a disk that is full the first error says so.
        failed = status["state"] == "failed"
        with contextlib.suppress(OSError) if failed else contextlib.nullcontext():
            write_json(folder.path / "status.json", status)


def _start(problem: Problem, dtype: str) -> str:
    """The sha256 of all that a run starts from: the model, its weights, and every row that is read."""
    digest = hashlib.sha256(repr(problem.model).encode())
    weights = {name: x.astype(dtype) for name, x in problem.params.items()}
    for columns in (weights, problem.train, problem.test, *problem.source):
        digest_of(columns, digest)
    return digest.hexdigest()


def _provenance(problem: Problem, config: RunConfig) -> dict[str, Any]:
    versions = {}
    for package in VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": versions,
        "start_sha256": _start(problem, config.dtype),
        "parameters": int(sum(x.size for x in problem.params.values())),
        "anchored": int(sum(problem.params[n].size for n in problem.anchored)),
        "train_rows": len(problem.train["targets"]),
        "test_rows": len(problem.test["targets"]),
        "headline": list(problem.headline),
    }
