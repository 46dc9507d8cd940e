"""Digits: an MLP that knows ten digits learns ">= 5" from a hundred of them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from recadam_core.backends import get_backend
from recadam_core.errors import RecAdamError
from recadam_core.hyperparameters import Hyperparameters
from recadam_core.optimizer import RecAdam

from ..engines import plain_adam
from ..models import MLP, Ops
from ..models.ops import cross_entropy, linear
from .base import Array, Call, Problem, Rows, Task, accuracy

__all__ = ["Digits"]

OPS = Ops(np, None)
SOURCE = MLP((64, 64, 64), 10)
TARGET = MLP((64, 64, 64), 2)


class Digits(Task):
    """scikit-learn's digits; source task: which of ten, target task: is it five or more."""

    name = "digits"
    about = 'an MLP pretrained on ten digits learns ">= 5" from 100 rows (seconds)'
    defaults: ClassVar[dict[str, Any]] = {
        "steps": 300,
        "batch_size": 20,
        "lr": 2e-3,
        "gamma": 50.0,
        "k": 0.02,
        "t0": 100.0,
        "dtype": "float64",
        "snapshot_every": 25,
        "eval_every": 25,
    }
    options: ClassVar[dict[str, Any]] = {"train_rows": 100}
    lowest: ClassVar[dict[str, int]] = {"train_rows": 1}

    def _prepare(self, seed: int, train_rows: int) -> Problem:
        """Pretrain on ten digits, and set up the new task."""
        if train_rows > 400:
            raise RecAdamError(f"digits: train_rows is {train_rows}; there are 400")
        x, y = _data()
        body, head = _pretrained()
        rng = np.random.default_rng(seed)
        fresh = TARGET.init(rng)
        params = {**body, **{n: fresh[n] for n in ("head.weight", "head.bias")}}
        targets = np.eye(2)[(y >= 5).astype(int)]
        test = slice(1300, None)

        def measure_source(call: Call) -> dict[str, float]:
            features = call("features", {"x": x[test]})
            logits = linear(features, head["head.weight"], head["head.bias"])
            wanted = np.eye(10)[y[test]]
            loss = float(cross_entropy(OPS, np.asarray(logits, dtype=np.float64), wanted))
            return {"source_accuracy": accuracy(logits, wanted), "source_loss": loss}

        return Problem(
            model=TARGET,
            params=params,
            anchored=frozenset(body),
            train=_rows(x, targets, slice(900, 900 + train_rows)),
            test=_rows(x, targets, test),
            measure_source=measure_source,
            source=({"targets": y[test]}, head),
            headline=("source_accuracy", True),
            eval_batch=len(y) - 1300,
        )


def _rows(x: Array, targets: Array, where: slice) -> Rows:
    return {"x": x[where], "targets": targets[where]}


@lru_cache(maxsize=1)
def _data() -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    return x[order] / 16.0, y[order]


@lru_cache(maxsize=1)
def _pretrained() -> tuple[dict[str, Array], dict[str, Array]]:
    """Body and head after 600 steps of Adam on the first 900 digits, in NumPy and float64."""
    x, y = _data()
    rng = np.random.default_rng(1)
    params: dict[str, Array] = SOURCE.init(rng)
    optimizer = RecAdam(plain_adam(Hyperparameters(lr=3e-3)), get_backend("numpy"))
    state = optimizer.init(params, {})
    for _ in range(600):
        rows = rng.integers(0, 900, size=64)
        _, grads = SOURCE.value_and_grad(OPS, params, {"x": x[rows], "targets": np.eye(10)[y[rows]]})
        params, state = optimizer.step(params, grads, state)
    return {n: params[n] for n in SOURCE.body_names()}, {n: params[n] for n in ("head.weight", "head.bias")}
