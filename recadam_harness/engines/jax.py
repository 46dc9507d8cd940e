"""The harness's engine for JAX: forward, backward and update in one compiled, donated step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recadam_core import Hyperparameters, Moments
from recadam_jax import backend, from_hyperparameters

from ..models import Model, Ops
from . import Array, Engine, StepRecord, Weights, coupled_gradients, policy

__all__ = ["JaxEngine"]

OPS = Ops(jnp, jax.scipy.special.erf)
STRIDE = 200  # steps of one program, of many seeds


class JaxEngine(Engine):
    """Trains with `recadam_jax.recadam` or optax's AdamW; see `recadam_harness.engines.Engine`."""

    ops = OPS

    def _parameter(self, x: Array) -> Any:
        return backend.from_numpy(x, self.dtype)

    def _column(self, x: Array) -> Array:
        return x.astype(self.dtype if x.dtype.kind == "f" else np.int32)

    @staticmethod
    def _copy(x: Any) -> Any:
        return backend.copy(x)

    def _begin(self, hp: Hyperparameters, pulled: frozenset[str]) -> None:
        names = frozenset(self.params), frozenset(self.anchors)
        init, train = _training(self.model, *names, self.optimizer_name, self.hp)
        self.state = init(self.params)
        self.train = jax.jit(train, donate_argnums=(0, 1))

    def step(self, batch: Weights, lr: float) -> StepRecord:
        """One step, all of it compiled."""
        self.t += 1
        self.params, self.state, record = self.train(
            self.params, self.state, self.start, self._rows(batch), float(self.t), lr
        )
        return StepRecord(*(float(x) for x in record))

    def call(self, function: str, batch: Weights) -> Array:
        """A method of the model, compiled for each shape of batch."""
        return np.array(_method(cast(Hashable, self.model), function)(self.params, self._rows(batch)))

    def _differentiate(self, rows: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        compiled = jax.jit(jax.grad(lambda params, rows: self.model.loss(OPS, params, rows)))
        return None, compiled(self.params, rows)

    def moments(self, name: str) -> Moments:
        """A copy of one parameter's moments."""
        state = self.state if hasattr(self.state, "mu") else self.state[0]
        return Moments(np.array(state.mu[name]), np.array(state.nu[name]))

    def restore(self, step: int, weights: Weights, moments: Mapping[str, Moments]) -> None:
        """Put a new engine where another was after a step."""
        self.t = step
        self.params = {n: backend.from_numpy(weights[n]) for n in self.params}
        saved = {
            "count": jnp.asarray(step, jnp.int32),
            "mu": {n: backend.from_numpy(moments[n].m) for n in self.params},
            "nu": {n: backend.from_numpy(moments[n].v) for n in self.params},
        }
        self.state = optax.tree_utils.tree_set(self.state, **saved)

    @staticmethod
    def sweep(
        model: Model,
        starts: Sequence[Weights],
        batches: Weights,
        rates: Array,
        at: Sequence[int],
        anchored: frozenset[str],
        optimizer: str,
        hp: Hyperparameters,
        dtype: str,
        check: Callable[[], None],
    ) -> tuple[dict[str, Array], list[dict[str, Array]]]:
        """Train from many starts in one program; see `recadam_harness.seeds`."""
        init, train = _training(model, frozenset(starts[0]), anchored, optimizer, hp)
        rows = {n: x.astype(dtype if x.dtype.kind == "f" else np.int32) for n, x in batches.items()}
        times, rates = np.arange(1.0, len(rates) + 1).astype(dtype), rates.astype(dtype)

        def walk(carry: Any, start: Any, times: Any, rows: Any) -> Any:
            def step(carry: Any, now: Any) -> Any:
                (t, lr), batch = now
                params, state, record = train(*carry, start, batch, t, lr)
                return (params, state), record

            return jax.lax.scan(step, carry, (times, rows))

        many = jax.jit(jax.vmap(walk, in_axes=(0, 0, None, 0)), donate_argnums=0)
        start = {n: backend.from_numpy(np.stack([x[n] for x in starts]), dtype) for n in starts[0]}
        carry = jax.tree.map(jnp.copy, start), jax.jit(jax.vmap(init))(start)
        records, weights, done = [], [], 0
        for last in at:
            # Some steps at a time: a signal waits for the end of a program.
            for part in np.array_split(np.arange(done, last), -(-(last - done) // STRIDE)):
                check()
                where = slice(part[0], part[-1] + 1)
                of_steps = times[where], rates[where]
                carry, record = many(carry, start, of_steps, {n: x[:, where] for n, x in rows.items()})
                records.append([np.array(x) for x in record])
            weights.append({n: np.array(x) for n, x in carry[0].items()})
            done = last
        columns = map(partial(np.concatenate, axis=1), zip(*records, strict=True))
        return dict(zip(StepRecord._fields, columns, strict=True)), weights


@cache
def _method(model: Hashable, function: str) -> Callable[..., Any]:
    return jax.jit(partial(getattr(model, function), OPS))


def _training(
    model: Model, names: frozenset[str], anchored: frozenset[str], optimizer: str, hp: Hyperparameters
) -> tuple[Callable[[Any], Any], Callable[..., Any]]:
    """From parameters to the optimizer's first state; and a step, to be compiled."""
    if optimizer == "adamw":
        b1, b2 = hp.betas
        make = partial(optax.adamw, b1=b1, b2=b2, eps=hp.eps, weight_decay=hp.weight_decay)
    else:
        settings, pulled = policy(optimizer, hp, anchored)
        make = partial(from_hyperparameters, settings, anchor_mask={n: n in pulled for n in names})

    def train(params: Any, state: Any, start: Any, batch: Any, t: Any, lr: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: model.loss(OPS, p, batch))(params)
        norm = _norm(grads.values())
        if optimizer == "coupled":
            stars = {n: start[n] for n in anchored}
            grads = coupled_gradients(grads, params, stars, hp, t, jnp)
        updates, state = make(lr).update(grads, state, params)
        params = optax.apply_updates(params, updates)
        moved = {n: p - start[n] for n, p in params.items()}
        distance = _norm(moved[n] for n in sorted(anchored))
        return params, state, (loss, norm, distance, _norm(moved.values()))

    return make(0.0).init, train


def _norm(arrays: Iterable[jax.Array]) -> jax.Array:
    return jnp.sqrt(sum((jnp.sum(jnp.square(x)) for x in arrays), start=jnp.zeros(())))
