"""What a run is made of: the configuration, its checks, and its form as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from recadam_core.annealing import Sigmoid
from recadam_core.errors import RecAdamError, check_whole, shown, unknown
from recadam_core.hyperparameters import Hyperparameters

from .engines import OPTIMIZERS, UNREAD
from .schedules import SCHEDULES, learning_rate
from .tasks import get_task

__all__ = ["RunConfig", "check_read", "flat"]


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
        if self.optimizer == "annealed" and self.hp.form == "proximal":
            raise RecAdamError("optimizer 'annealed' has no pull, of which form 'proximal' is; leave it out")
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if self.dtype not in ("float32", "float64"):
            raise unknown("dtype", self.dtype, ("float32", "float64"))
        lowest = {"steps": 1, "batch_size": 1, "warmup": 0, "eval_every": 0, "snapshot_every": 0}
        for name, low in lowest.items():
            object.__setattr__(self, name, check_whole(name, getattr(self, name), low))
        object.__setattr__(self, "seed", check_whole("seed", self.seed, 0, 2**63 - 1))
        if self.schedule == "linear" and self.warmup >= self.steps:
            raise RecAdamError(f"warmup is {self.warmup} of {self.steps} steps; give fewer than there are")
        options = dict(self.options)
        for name, value in options.items():
            if name not in task.options:
                raise unknown(f"option of task {self.task!r}:", name, task.options)
            if name in task.lowest:
                options[name] = check_whole(name, value, task.lowest[name])
            elif not isinstance(value, str):
                raise RecAdamError(f"{name} is {shown(value)}; give a text")
        object.__setattr__(self, "options", options)

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
            RecAdamError: for an unknown name, a setting that the optimizer does not read, or a value outside
                its range.
        """
        declared = get_task(task)
        check_read(optimizer, changes)
        if changes.get("annealing") and (twice := [x for x in ("k", "t0", "weight") if x in changes]):
            raise RecAdamError(f"{twice[0]} is the sigmoid's, and another annealing is given; leave one out")
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

    def keeps(self, t: int) -> bool:
        """Whether the weights after a step are kept."""
        return t == self.steps or bool(
            self.snapshot_every and t % self.snapshot_every == 0 and t < self.steps
        )

    def evaluates(self, t: int) -> bool:
        """Whether a run is evaluated after a step."""
        return t in (0, self.steps) or bool(self.eval_every and t % self.eval_every == 0)

    def rate(self, t: int) -> float:
        """The learning rate of a step."""
        return learning_rate(t, self.steps, self.hp.lr, self.schedule, self.warmup)


def check_read(optimizer: str, settings: Iterable[str]) -> None:
    """Raise for a setting that the optimizer does not read."""
    for name in settings:
        if name in UNREAD.get(optimizer, ()):
            raise RecAdamError(f"optimizer {optimizer!r} does not read {name}; leave it out")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted names."""
    dotted: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        dotted |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return dotted
