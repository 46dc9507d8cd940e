"""A run: one task, one backend, one optimizer, one directory."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recadam_core.annealing import annealed_weights
from recadam_core.backends import get_backend
from recadam_core.coefficients import coefficients
from recadam_core.errors import RecAdamError
from recadam_core.files import replacing, write_json
from recadam_core.update import Moments

from .config import RunConfig, check_whole
from .directory import (
    CHECKPOINT,
    COLUMNS,
    Run,
    born,
    claim,
    clear,
    load_run,
    remove_unfinished,
    save_weights,
    weights_path,
)
from .engines import Engine, StepRecord, make_engine
from .tasks import get_task
from .tasks.base import Array, Problem, Rows

__all__ = ["Prepared", "batch_order", "finetune", "prepare"]

VERSIONS = ("recadam-core", "numpy", "torch", "jax", "jaxlib", "optax", "tokenizers", "scikit-learn")


def batch_order(rows: int, batch_size: int, steps: int, seed: int) -> Array:
    """Row numbers of each batch: epoch after epoch of seeded permutations."""
    rng = np.random.default_rng([seed, 1])
    epochs = -(-steps * batch_size // rows)
    order = np.concatenate([rng.permutation(rows) for _ in range(epochs)])
    return order[: steps * batch_size].reshape(steps, batch_size)


class Prepared(NamedTuple):
    """A configuration with its task, and an engine before its first step."""

    config: RunConfig
    problem: Problem
    engine: Engine
    order: Array

    def batch(self, t: int) -> Rows:
        """The rows of step t."""
        return {name: column[self.order[t - 1]] for name, column in self.problem.train.items()}

    def step(self, t: int) -> StepRecord:
        """Step t."""
        return self.engine.step(self.batch(t), self.config.rate(t))


def prepare(config: RunConfig) -> Prepared:
    """Read the data and make the engine, where the backend's precision is the configuration's."""
    problem = get_task(config.task).prepare(config.seed, **config.options)
    start = problem.model, problem.params, problem.anchored
    engine = make_engine(config.backend, *start, config.optimizer, config.hp, config.dtype)
    rows = len(problem.train["targets"])
    order = batch_order(rows, config.batch_size, config.steps, config.seed)
    return Prepared(config, problem, engine, order)


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
    earlier = claim(out, overwrite, config if resume else None)
    if earlier is not None and earlier.status["state"] == "complete":
        earlier = load_run(out)
        earlier.weights(config.steps)
        earlier.predictions()
        return earlier
    for t in np.unique(np.linspace(1, config.steps, 1000, dtype=int)):
        _policy(config, int(t))  # a pull that diverges is refused before anything is written
    tell(0, "reading data and model")
    with get_backend(config.backend).precision(config.dtype):
        prepared = prepare(config)
        provenance = _provenance(prepared.problem, config)
        step = _resume(earlier, prepared, provenance) if earlier else 0
        if not step:
            clear(out)
            write_json(out / "config.json", config.to_dict())
            write_json(out / "provenance.json", provenance)
        with _status(out, step) as status:
            _train(prepared, out, status, tell, checkpoint_every)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return load_run(out)


def _train(
    prepared: Prepared,
    out: Path,
    status: dict[str, Any],
    tell: Callable[[int, str], None],
    checkpoint_every: int,
) -> None:
    config, problem, engine = prepared.config, prepared.problem, prepared.engine
    first = int(status["step"]) + 1
    evaluations: list[dict[str, Any]] = load_run(out).evaluations if first > 1 else []

    def evaluate(step: int) -> Array:
        tell(step, "evaluating")
        logits, figures = problem.evaluate(engine.call)
        evaluations.append({"step": step, **figures})
        write_json(out / "evaluations.json", evaluations)
        return logits

    if first == 1:
        evaluate(0)
    with (out / "steps.jsonl").open("a", encoding="utf-8") as records:
        for t in range(first, config.steps + 1):
            batch, lr = prepared.batch(t), config.rate(t)
            began = time.perf_counter()
            record = engine.step(batch, lr)
            seconds = time.perf_counter() - began
            task_weight, recall_weight, pull = _policy(config, t)
            line = (t, *record, task_weight, recall_weight, lr, pull, seconds)
            records.write(json.dumps(dict(zip(COLUMNS, line, strict=True))) + "\n")
            records.flush()
            status["step"] = t
            if not np.isfinite(record.loss):
                raise RecAdamError(f"{out}: the loss is {record.loss} at step {t}; lower lr, or raise eps")
            tell(t, f"loss {record.loss:.4f}")
            last = t == config.steps
            if last or (config.snapshot_every and t % config.snapshot_every == 0):
                save_weights(weights_path(out, t), engine.weights())
            if last or (config.eval_every and t % config.eval_every == 0):
                logits = evaluate(t)
            if checkpoint_every and t % checkpoint_every == 0 and not last:
                _checkpoint(out / CHECKPOINT, t, engine)
    with replacing(out / "predictions.npy") as beside, beside.open("wb") as file:
        np.save(file, logits)


def _policy(config: RunConfig, t: int) -> tuple[float, float, float]:
    """Task weight, recall weight and pull of a step, for its record."""
    if config.optimizer == "adamw":
        return 1.0, 0.0, 0.0
    task, recall = annealed_weights(config.hp.annealing, t)
    if config.optimizer != "recadam":
        return task, recall, 0.0
    return task, recall, coefficients(t, config.hp, config.rate(t)).pull


def _checkpoint(path: Path, step: int, engine: Engine) -> None:
    weights = engine.weights()
    moments = {name: engine.moments(name) for name in weights}
    arrays = {f"weights.{name}": x for name, x in weights.items()}
    arrays |= {f"{part}.{name}": getattr(pair, part) for name, pair in moments.items() for part in "mv"}
    save_weights(path, arrays, {"step": str(step)})


def _resume(run: Run, prepared: Prepared, provenance: dict[str, Any]) -> int:
    """Put the engine and the records back to the last checkpoint; its step, 0 where there is none."""
    from safetensors import SafetensorError, safe_open

    path = run.path / CHECKPOINT
    if not path.exists():
        return 0
    if run.provenance.get("start_sha256") != provenance["start_sha256"]:
        raise RecAdamError(f"{run.path}: cannot resume: other starting weights or data; give --overwrite")
    config, start = run.config, prepared.problem.params
    try:
        with safe_open(path, framework="numpy") as file:
            step = int((file.metadata() or {})["step"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # is no dict
        if not 0 < step < config.steps:
            raise ValueError(f"its step is {step} of {config.steps}")
        for name, wanted in start.items():
            for x in (arrays[f"{part}.{name}"] for part in ("weights", "m", "v")):
                if x.shape != wanted.shape or x.dtype != config.dtype:
                    raise ValueError(f"{name} is {x.dtype} {x.shape}, not {config.dtype} {wanted.shape}")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise RecAdamError(f"{path}: damaged ({error}); delete it, or give --overwrite") from None
    told = [
        e.get("step") if isinstance(e, dict) and "target_accuracy" in e else None for e in run.evaluations
    ]
    if len(run.steps["step"]) < step or not told or not all(isinstance(x, int) for x in told):
        raise RecAdamError(
            f"{run.path}: records or evaluations end before step {step} of {path.name}; give --overwrite"
        )
    weights = {name: arrays[f"weights.{name}"] for name in start}
    moments = {name: Moments(arrays[f"m.{name}"], arrays[f"v.{name}"]) for name in start}
    prepared.engine.restore(step, weights, moments)
    remove_unfinished(run.path)
    for later in (s for s in run.snapshots() if s > step):
        weights_path(run.path, later).unlink()
    lines = (run.path / "steps.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    with replacing(run.path / "steps.jsonl") as beside:
        beside.write_text("".join(lines[:step]), encoding="utf-8")
    write_json(run.path / "evaluations.json", [e for e in run.evaluations if e["step"] <= step])
    resumed = {name: provenance[name] for name in ("started", "command", "versions")}
    write_json(
        run.path / "provenance.json",
        {**run.provenance, "resumed": [*run.provenance.get("resumed", []), {"step": step, **resumed}]},
    )
    return step


@contextlib.contextmanager
def _status(out: Path, step: int = 0) -> Iterator[dict[str, Any]]:
    """Keep status.json true: running, then complete, interrupted or failed."""
    pid = os.getpid()
    status: dict[str, Any] = {"state": "running", "step": step, "pid": pid, "born": born(pid)}
    write_json(out / "status.json", status)
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
        write_json(out / "status.json", status)


def _provenance(problem: Problem, config: RunConfig) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name in sorted(problem.params):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(problem.params[name].astype(config.dtype)).tobytes())
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
        "start_sha256": digest.hexdigest(),
        "parameters": int(sum(x.size for x in problem.params.values())),
        "anchored": int(sum(problem.params[n].size for n in problem.anchored)),
        "train_rows": len(problem.train["targets"]),
        "test_rows": len(problem.test["targets"]),
        "headline": list(problem.headline),
    }
