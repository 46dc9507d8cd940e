"""Equinox: a network that knows ten digits learns whether a digit is five or more, and keeps what it knew.

python examples/jax_equinox.py --steps 200
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from recadam_core import Sigmoid
from recadam_jax import recadam

Array = np.ndarray[Any, Any]


class Net(eqx.Module):
    """A body that is shared, and a head."""

    body: eqx.nn.MLP
    head: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jax.nn.relu(self.body(x)))


def trained(net: Net, tx: optax.GradientTransformation, x: Array, y: Array, steps: int) -> Net:
    """The network after so many batches of 32."""
    params, static = eqx.partition(net, eqx.is_inexact_array)
    state = tx.init(params)

    @eqx.filter_jit
    def step(params: Net, state: Any, x: jax.Array, y: jax.Array) -> tuple[Net, Any]:
        def loss(params: Net) -> jax.Array:
            logits = jax.vmap(eqx.combine(params, static))(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = tx.update(eqx.filter_grad(loss)(params), state, params)
        return eqx.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, len(x), 32)
        params, state = step(params, state, x[rows], y[rows])
    return eqx.combine(params, static)


def accuracy(net: Callable[[jax.Array], jax.Array], x: Array, y: Array) -> float:
    """Share of the rows that the network gets right."""
    return float((jax.vmap(net)(x).argmax(-1) == y).mean())


def main() -> None:
    """Learn ten digits, then the new task by AdamW and by RecAdam; print what is known of both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = jnp.asarray(x[order] / 16.0, jnp.float32), y[order]
    big = (y >= 5).astype(int)
    known, few, test = slice(0, 900), slice(900, 1000), slice(1300, None)
    keys = jax.random.split(jax.random.key(0), 3)
    first = Net(eqx.nn.MLP(64, 64, 64, 1, key=keys[0]), eqx.nn.Linear(64, 10, key=keys[1]))
    pretrained = trained(first, optax.adam(3e-3), x[known], y[known], 600)

    start = Net(pretrained.body, eqx.nn.Linear(64, 2, key=keys[2]))
    anchor = Net(eqx.filter(pretrained.body, eqx.is_inexact_array), None)  # none for the new head
    annealing = Sigmoid(k=0.02, t0=args.steps / 3)
    for name, tx in (
        ("AdamW", optax.adamw(2e-3, weight_decay=0.0)),
        ("RecAdam", recadam(2e-3, gamma=50.0, annealing=annealing, anchor=anchor)),
    ):
        net = trained(start, tx, x[few], big[few], args.steps)
        kept = accuracy(Net(net.body, pretrained.head), x[test], y[test])
        learnt = accuracy(net, x[test], big[test])
        print(f"{name}: ten-digit accuracy {kept:.3f}, test accuracy: {learnt:.3f}")


if __name__ == "__main__":
    main()
