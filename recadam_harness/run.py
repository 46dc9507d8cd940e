"""A run: one task, one backend, one optimizer, one directory."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from recadam_core.annealing import Sigmoid, annealed_weights
from recadam_core.backends import get_backend
from recadam_core.coefficients import coefficients
from recadam_core.errors import RecAdamError, unknown
from recadam_core.files import replacing, write_json
from recadam_core.hyperparameters import Hyperparameters
from recadam_core.update import Moments

from .engines import OPTIMIZERS, Engine, StepRecord, make_engine
from .schedules import SCHEDULES, learning_rate
from .tasks import get_task
from .tasks.base import Problem, Rows, accuracy, in_batches

__all__ = ["Run", "RunConfig", "batch_order", "finetune", "load_run"]

Array = np.ndarray[Any, Any]
COLUMNS = (
    "step",
    *StepRecord._fields,
    "task_weight",
    "recall_weight",
    "lr",
    "pull",
    "seconds",
)
CHECKPOINT = "checkpoint.safetensors"
FILES = (
    "config.json",
    "provenance.json",
    "status.json",
    "steps.jsonl",
    "evaluations.json",
    "predictions.npy",
    CHECKPOINT,
)
VERSIONS = ("recadam-core", "numpy", "torch", "jax", "jaxlib", "optax", "tokenizers", "scikit-learn")


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run.

    Two runs whose configurations differ in nothing but the backend walk the same path.

    Args:
        task: name of the task.
        backend: name of the backend.
        optimizer: name of the optimizer, as "recadam" or "adamw".
        hp: settings of the optimizer.
        steps: number of steps.
        batch_size: rows a step.
        schedule: "constant" or "linear".
        warmup: steps of linear warm-up.
        seed: seed of the new head and of the order of the batches.
        dtype: "float32" or "float64".
        eval_every: evaluate every so many steps, besides start and end; 0 for never.
        snapshot_every: keep the weights every so many steps, besides the end; 0 for never.
        options: options of the task.

    Raises:
        RecAdamError: for a name or a number that cannot be used.

    Example:
        >>> RunConfig.for_task("digits", backend="numpy").steps
        300
    """

    task: str
    backend: str
    optimizer: str = "recadam"
    hp: Hyperparameters = field(default_factory=Hyperparameters)
    steps: int = 100
    batch_size: int = 16
    schedule: str = "constant"
    warmup: int = 0
    seed: int = 0
    dtype: str = "float32"
    eval_every: int = 0
    snapshot_every: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        task = get_task(self.task)
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if self.dtype not in ("float32", "float64"):
            raise unknown("dtype", self.dtype, ("float32", "float64"))
        lowest = {"steps": 1, "batch_size": 1, "warmup": 0, "eval_every": 0, "snapshot_every": 0}
        for name, low in lowest.items():
            _check_whole(name, getattr(self, name), low)
        _check_whole("seed", self.seed, 0, 2**63 - 1)
        if self.schedule == "linear" and self.warmup >= self.steps:
            raise RecAdamError(f"warmup is {self.warmup} of {self.steps} steps; give fewer than there are")
        for name, value in self.options.items():
            if name not in task.options:
                raise unknown(f"option of task {self.task!r}:", name, task.options)
            if name in task.lowest:
                _check_whole(name, value, task.lowest[name])

    @classmethod
    def for_task(cls, task: str, backend: str, optimizer: str = "recadam", **changes: Any) -> RunConfig:
        """The task's own settings, with changes.

        Args:
            task: name of the task.
            backend: name of the backend.
            optimizer: name of the optimizer.
            **changes: fields of `RunConfig`, fields of `Hyperparameters`, `k`, `t0` and `weight` of the
                annealing, or options of the task.

        Returns:
            The configuration.

        Raises:
            RecAdamError: for an unknown name or a value outside its range.
        """
        declared = get_task(task)
        values = {**declared.defaults, **changes}
        annealing = values.pop("annealing", None)
        sigmoid = {name: values.pop(name) for name in ("k", "t0", "weight") if name in values}
        known = {f.name for f in dataclasses.fields(cls)} - {"task", "backend", "optimizer", "hp", "options"}
        policy = {f.name for f in dataclasses.fields(Hyperparameters)}
        for name in values:
            if name not in known | policy | set(declared.options):
                raise unknown("setting", name, known | policy | set(declared.options) | {"k", "t0", "weight"})
        hp = {name: values[name] for name in values if name in policy}
        return cls(
            task=task,
            backend=backend,
            optimizer=optimizer,
            hp=Hyperparameters(annealing=annealing or Sigmoid(**sigmoid), **hp),
            options={**declared.options, **{n: values[n] for n in values if n in declared.options}},
            **{name: values[name] for name in values if name in known},
        )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "hp": self.hp.to_dict(), "options": dict(self.options)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The configuration that `to_dict` described."""
        return cls(**{**values, "hp": Hyperparameters.from_dict(values["hp"])})


def _check_whole(name: str, value: Any, low: int, high: int = 10**8) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise RecAdamError(f"{name} is {value!r}; give a whole number from {low} to {high:,}")


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
        path = _weights_path(self.path, steps[-1] if step is None else step)
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


def batch_order(rows: int, batch_size: int, steps: int, seed: int) -> Array:
    """Row numbers of each batch: epoch after epoch of seeded permutations."""
    rng = np.random.default_rng([seed, 1])
    epochs = -(-steps * batch_size // rows)
    order = np.concatenate([rng.permutation(rows) for _ in range(epochs)])
    return order[: steps * batch_size].reshape(steps, batch_size)


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
    _check_whole("checkpoint_every", checkpoint_every, 0)
    if overwrite and resume:
        raise RecAdamError(f"{out}: overwrite and resume exclude one another; give one of them")
    earlier = _claim(out, overwrite, config if resume else None)
    if earlier is not None and earlier.status["state"] == "complete":
        earlier = load_run(out)
        earlier.weights(config.steps)
        earlier.predictions()
        return earlier
    for t in np.unique(np.linspace(1, config.steps, 1000, dtype=int)):
        # A pull that diverges is refused before anything is written.
        _policy(config, int(t), learning_rate_of(config, int(t)))
    tell(0, "reading data and model")
    backend = get_backend(config.backend)
    problem = get_task(config.task).prepare(config.seed, **config.options)
    with backend.precision(config.dtype):
        engine = make_engine(
            config.backend,
            problem.model,
            problem.params,
            problem.anchored,
            config.optimizer,
            config.hp,
            config.dtype,
        )
        provenance = _provenance(problem, config)
        step = _resume(earlier, engine, problem, provenance) if earlier else 0
        if not step:
            _clear(out)
            write_json(out / "config.json", config.to_dict())
            write_json(out / "provenance.json", provenance)
        with _status(out, step) as status:
            _train(config, problem, engine, out, status, tell, checkpoint_every)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return load_run(out)


def _train(
    config: RunConfig,
    problem: Problem,
    engine: Engine,
    out: Path,
    status: dict[str, Any],
    tell: Callable[[int, str], None],
    checkpoint_every: int,
) -> None:
    first = int(status["step"]) + 1
    rows = len(problem.train["targets"])
    order = batch_order(rows, config.batch_size, config.steps, config.seed)
    evaluations: list[dict[str, Any]] = load_run(out).evaluations if first > 1 else []

    def evaluate(step: int) -> Array:
        tell(step, "evaluating")
        logits = in_batches(engine.call, "logits", problem.test, problem.eval_batch)
        figures = {
            "target_accuracy": accuracy(logits, problem.test["targets"]),
            **problem.measure_source(engine.call),
        }
        evaluations.append({"step": step, **figures})
        write_json(out / "evaluations.json", evaluations)
        return logits

    if first == 1:
        evaluate(0)
    with (out / "steps.jsonl").open("a", encoding="utf-8") as records:
        for t in range(first, config.steps + 1):
            batch: Rows = {name: column[order[t - 1]] for name, column in problem.train.items()}
            lr = learning_rate_of(config, t)
            began = time.perf_counter()
            record = engine.step(batch, lr)
            seconds = time.perf_counter() - began
            task, recall, pull = _policy(config, t, lr)
            line = (t, *record, task, recall, lr, pull, seconds)
            records.write(json.dumps(dict(zip(COLUMNS, line, strict=True))) + "\n")
            records.flush()
            status["step"] = t
            if not np.isfinite(record.loss):
                raise RecAdamError(f"{out}: the loss is {record.loss} at step {t}; lower lr, or raise eps")
            tell(t, f"loss {record.loss:.4f}")
            last = t == config.steps
            if last or (config.snapshot_every and t % config.snapshot_every == 0):
                _save_weights(_weights_path(out, t), engine.weights())
            if last or (config.eval_every and t % config.eval_every == 0):
                logits = evaluate(t)
            if checkpoint_every and t % checkpoint_every == 0 and not last:
                _checkpoint(out / CHECKPOINT, t, engine)
    with replacing(out / "predictions.npy") as beside, beside.open("wb") as file:
        np.save(file, logits)


def learning_rate_of(config: RunConfig, t: int) -> float:
    """The learning rate of a step of a run."""
    return learning_rate(t, config.steps, config.hp.lr, config.schedule, config.warmup)


def _policy(config: RunConfig, t: int, lr: float) -> tuple[float, float, float]:
    """Task weight, recall weight and pull of a step, for its record."""
    if config.optimizer == "adamw":
        return 1.0, 0.0, 0.0
    task, recall = annealed_weights(config.hp.annealing, t)
    return task, recall, coefficients(t, config.hp, lr).recall if config.optimizer == "recadam" else 0.0


def _claim(out: Path, overwrite: bool, resumed: RunConfig | None) -> Run | None:
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


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        found.update(flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value})
    return found


def _clear(out: Path) -> None:
    """Make the directory, and remove what an earlier run left in it: its own files and no others."""
    out.mkdir(parents=True, exist_ok=True)
    for path in [*out.glob("weights/[0-9]*.safetensors"), *(out / name for name in reversed(FILES))]:
        path.unlink(missing_ok=True)
    _sweep(out)


def _sweep(out: Path) -> None:
    """Remove the files that a kill has left beside their places."""
    own = [f".{name}.*" for name in FILES] + ["weights/.[0-9]*.safetensors.*"]
    for path in [path for pattern in own for path in out.glob(pattern)]:
        path.unlink(missing_ok=True)


def resumable(out: Path) -> bool:
    """Whether a directory has what a resume goes on from: a checkpoint, or a run that is complete."""
    return (out / CHECKPOINT).exists() or (out / "predictions.npy").exists()


def _checkpoint(path: Path, step: int, engine: Engine) -> None:
    weights = engine.weights()
    moments = {name: engine.moments(name) for name in weights}
    held = {f"weights.{name}": x for name, x in weights.items()}
    held.update({f"{part}.{name}": getattr(pair, part) for name, pair in moments.items() for part in "mv"})
    _save_weights(path, held, {"step": str(step)})


def _resume(run: Run, engine: Engine, problem: Problem, provenance: dict[str, Any]) -> int:
    """Put the engine and the records back to the last checkpoint; its step, 0 where there is none."""
    from safetensors import SafetensorError, safe_open

    path = run.path / CHECKPOINT
    if not path.exists():
        return 0
    if run.provenance.get("start_sha256") != provenance["start_sha256"]:
        raise RecAdamError(f"{run.path}: cannot resume: other starting weights or data; give --overwrite")
    config = run.config
    try:
        with safe_open(path, framework="numpy") as file:
            step = int((file.metadata() or {})["step"])
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # is no dict
        if not 0 < step < config.steps:
            raise ValueError(f"its step is {step} of {config.steps}")
        for name, start in problem.params.items():
            for x in (held[f"{part}.{name}"] for part in ("weights", "m", "v")):
                if x.shape != start.shape or x.dtype != config.dtype:
                    raise ValueError(f"{name} is {x.dtype} {x.shape}, not {config.dtype} {start.shape}")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise RecAdamError(f"{path}: damaged ({error}); delete it, or give --overwrite") from None
    weights = {name: held[f"weights.{name}"] for name in problem.params}
    moments = {name: Moments(held[f"m.{name}"], held[f"v.{name}"]) for name in problem.params}
    told = [
        e.get("step") if isinstance(e, dict) and "target_accuracy" in e else None for e in run.evaluations
    ]
    if len(run.steps["step"]) < step or not told or not all(isinstance(x, int) for x in told):
        raise RecAdamError(
            f"{run.path}: records or evaluations end before step {step} of {path.name}; give --overwrite"
        )
    engine.restore(step, weights, moments)
    _sweep(run.path)
    for later in (s for s in run.snapshots() if s > step):
        _weights_path(run.path, later).unlink()
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
    status: dict[str, Any] = {"state": "running", "step": step, "pid": pid, "born": _born(pid)}
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


def _weights_path(out: Path, step: int) -> Path:
    return out / "weights" / f"{step:06d}.safetensors"


def _save_weights(path: Path, weights: Mapping[str, Array], metadata: dict[str, str] | None = None) -> None:
    from safetensors.numpy import save

    # Not by save_file, which writes beside its place too: a kill would leave that file, under any name.
    with replacing(path) as beside:
        beside.write_bytes(save({name: np.ascontiguousarray(x) for name, x in weights.items()}, metadata))


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


def _alive(pid: Any, born: Any) -> bool:
    """Whether that process still runs; its start time tells it from a later one of the same number."""
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's, but there
    now = _born(pid)
    return born is None or now is None or born == now


def _born(pid: int) -> int | None:
    """When a process started, in the system's ticks; None where /proc does not tell."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
