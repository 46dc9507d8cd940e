"""One configuration from many seeds, in one compiled program where the backend can."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recadam_core.backends import get_backend
from recadam_core.coefficients import coefficients
from recadam_core.errors import RecAdamError
from recadam_core.interrupts import deferred

from .config import RunConfig
from .engines import Array, able, engine_of, make_engine
from .memory import check_memory
from .run import batch_order, step_memory
from .tasks import get_task
from .tasks.base import Problem

__all__ = ["Sweep", "sweep_seeds"]


@dataclass(frozen=True)
class Sweep:
    """What a sweep over seeds found."""

    config: RunConfig
    seeds: list[int]
    steps: dict[str, Array]
    at: list[int]
    evaluations: dict[str, Array]
    headline: str

    def quartiles(self, figure: str) -> tuple[float, float, float]:
        """First quartile, median and third quartile of a figure at the end."""
        low, middle, high = np.quantile(self.evaluations[figure][:, -1], [0.25, 0.5, 0.75])
        return float(low), float(middle), float(high)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, ready for JSON."""
        return {
            "config": self.config.to_dict(),
            "seeds": self.seeds,
            "steps": {name: x.tolist() for name, x in self.steps.items()},
            "at": self.at,
            "evaluations": {name: x.tolist() for name, x in self.evaluations.items()},
            "headline": self.headline,
        }


def sweep_seeds(config: RunConfig, seeds: Sequence[int]) -> Sweep:
    """Train a configuration from many seeds at once; each walks the path of `finetune` with that seed."""
    seeds = list(seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise RecAdamError(f"seeds are {seeds}; give some, each once")
    configs = [dataclasses.replace(config, seed=seed) for seed in seeds]
    backend = get_backend(config.backend)
    train = engine_of(config.backend).sweep
    if train is None:
        others = able(lambda engine: engine.sweep is not None)
        raise RecAdamError(f"backend {config.backend!r} trains one seed at a time; use {others}")
    batches = f"{config.steps:,} steps of {len(seeds)} seeds at once"
    check_memory(batches, 16.0 * len(seeds) * config.steps * config.batch_size)
    rates = np.array([config.rate(t) for t in range(1, config.steps + 1)])
    for t, lr in enumerate(rates, start=1):
        if config.optimizer == "recadam":  # a pull that diverges is refused before anything is trained
            coefficients(t, config.hp, float(lr))
    problems = [get_task(config.task).prepare(x.seed, **config.options) for x in configs]
    first = problems[0]
    rows = len(first.train["targets"])
    row = sum(column[0].size for column in first.train.values())
    held = 8.0 * config.steps * config.batch_size * row + step_memory(config, first)
    check_memory(batches, len(seeds) * held)
    order = np.stack([batch_order(rows, config.batch_size, config.steps, x.seed) for x in configs])
    every = config.eval_every or config.steps
    at = sorted({*range(every, config.steps + 1, every), config.steps})
    with backend.precision(config.dtype), deferred() as check:
        records, weights = train(
            first.model,
            [x.params for x in problems],
            {name: column[order] for name, column in first.train.items()},
            rates,
            at,
            first.anchored,
            config.optimizer,
            config.hp,
            config.dtype,
            check,
        )
        lost = np.argwhere(~np.isfinite(records["loss"]))
        if len(lost):
            seed, step = (int(x) for x in lost[0])
            raise RecAdamError(f"seed {seeds[seed]}: the loss is not finite at step {step + 1}; lower lr")
        figures = []
        for x in weights:
            check()
            figures.append(_figures(config, problems, x))
    evaluations = {
        name: np.array([[seed[name] for seed in then] for then in figures]).T for name in figures[0][0]
    }
    return Sweep(configs[0], [x.seed for x in configs], records, at, evaluations, first.headline[0])


def _figures(
    config: RunConfig, problems: list[Problem], weights: Mapping[str, Array]
) -> list[dict[str, float]]:
    """Figures of the target and the source task, of each seed."""
    figures = []
    for i, problem in enumerate(problems):
        params = {name: x[i] for name, x in weights.items()}
        start = problem.model, params, frozenset[str]()
        engine = make_engine(config.backend, *start, "adamw", config.hp, config.dtype)
        figures.append(problem.evaluate(engine.call)[1])
    return figures
