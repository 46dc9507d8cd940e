"""Where `recadam` and `add_anchor_pull` are put, and what then holds; as a script it prints the table."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from recadam_core import Hyperparameters, Linear, Sigmoid, apply, pull
from recadam_jax import (
    Released,
    add_anchor_pull,
    from_hyperparameters,
    host_coefficients,
    recadam,
    release,
    scale_by_recadam,
)

ANNEALING = Linear(t0=8)  # over within a test
HP = Hyperparameters(lr=1e-2, gamma=20.0, annealing=ANNEALING)
SETTINGS = {"gamma": 20.0, "annealing": ANNEALING}
STEPS = 12
ROWS = np.random.default_rng(7).standard_normal((STEPS, 6, 5)).astype(np.float32)


def weights(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = {"first": {"kernel": (5, 4), "bias": (4,)}, "second": {"kernel": (4, 2), "bias": (2,)}}
    draw = lambda shape: jnp.array(rng.standard_normal(shape) * 0.5, dtype)  # noqa: E731
    return {k: {n: draw(s) for n, s in v.items()} for k, v in shapes.items()}


def loss(params, rows):
    hidden = jnp.tanh(rows @ params["first"]["kernel"] + params["first"]["bias"])
    return jnp.mean(jnp.square(hidden @ params["second"]["kernel"] + params["second"]["bias"]))


class Optax:
    """A loop of one's own over a transformation."""

    def __init__(self, make, dtype="float32", state=None, params=None):
        self.tx = make()
        self.params = weights(dtype) if params is None else params
        self.state = self.tx.init(self.params) if state is None else state
        self.traces = 0

        @jax.jit
        def step(params, state, rows, more):
            self.traces += 1
            grads = jax.grad(loss)(params, rows)
            updates, state = self.tx.update(grads, state, params, **more)
            return optax.apply_updates(params, updates), state

        self._step = step

    def step(self, t, **more):
        self.params, self.state = self._step(self.params, self.state, ROWS[t], more)

    def weights(self):
        return [self.params[k][n] for k in ("first", "second") for n in ("kernel", "bias")]

    def release(self):
        self.state = release(self.state, ANNEALING)

    def again(self, state, params):
        """A new loop that goes on from there."""
        return type(self)(lambda: self.tx, state=state, params=params)


class ByHand(Optax):
    """After each step of the base optimizer the specification's pull."""

    def __init__(self, make):
        super().__init__(make)
        self.anchors = self.params

    def step(self, t):
        task, recall = ANNEALING.weights(t + 1)
        grads = jax.grad(loss)(self.params, ROWS[t])
        updates, self.state = self.tx.update(grads, self.state, self.params)
        stepped = optax.apply_updates(self.params, jax.tree.map(lambda u: task * u, updates))
        home = lambda theta, star: apply(theta, pull(theta, star, PULL * recall))  # noqa: E731
        self.params = jax.tree.map(home, stepped, self.anchors)


class Net(nnx.Module):
    def __init__(self, params):
        self.first = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        for name, part in params.items():
            for key, value in part.items():
                getattr(getattr(self, name), key)[...] = value

    def __call__(self, rows):
        return self.second(jnp.tanh(self.first(rows)))


class Nnx(Optax):
    """`flax.nnx.Optimizer`."""

    def __init__(self, make, dtype="float32", state=None, params=None):
        model = Net(weights())
        if dtype != "float32":
            nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model)))
        if params is not None:
            nnx.update(model, params)
        self.model, self.tx, self.traces = model, make(), 0
        self.optimizer = nnx.Optimizer(model, self.tx, wrt=nnx.Param)
        if state is not None:
            nnx.update(self.optimizer, state)

        @nnx.jit
        def step(model, optimizer, rows, more):
            self.traces += 1
            grads = nnx.grad(lambda m: jnp.mean(jnp.square(m(rows))))(model)
            optimizer.update(model, grads, **more)

        self._step = step

    def step(self, t, **more):
        self._step(self.model, self.optimizer, ROWS[t], more)

    @property
    def params(self):
        return nnx.state(self.model, nnx.Param)

    @property
    def state(self):
        return nnx.state(self.optimizer)

    def weights(self):
        return [
            getattr(part, n)[...]
            for part in (self.model.first, self.model.second)
            for n in ("kernel", "bias")
        ]

    def release(self):
        self.optimizer.opt_state = nnx.data(release(self.optimizer.opt_state, ANNEALING))

    def again(self, state, params):
        return Nnx(lambda: self.tx, state=state, params=params)


class Equinox(Optax):
    """An equinox module, of which only the arrays are stepped."""

    def __init__(self, make, dtype="float32", state=None, params=None):
        given = weights(dtype)
        net = eqx.nn.MLP(5, 2, 4, depth=1, activation=jnp.tanh, key=jax.random.key(0))
        parts = lambda m: [x for layer in m.layers for x in (layer.weight, layer.bias)]  # noqa: E731
        values = [x.T for part in given.values() for x in part.values()]
        net = eqx.tree_at(parts, net, values)
        self.tx, self.traces, self._parts = make(), 0, parts
        self.params, self._rest = eqx.partition(net, eqx.is_inexact_array)
        self.params = self.params if params is None else params
        self.state = self.tx.init(self.params) if state is None else state

        @eqx.filter_jit
        def step(params, state, rows, more):
            self.traces += 1

            def mean(params):
                net = eqx.combine(params, self._rest)
                return jnp.mean(jnp.square(jax.vmap(net)(rows)))

            grads = eqx.filter_grad(mean)(params)
            updates, state = self.tx.update(grads, state, params, **more)
            return eqx.apply_updates(params, updates), state

        self._step = step

    def weights(self):
        return [x.T for x in self._parts(self.params)]


class Case(NamedTuple):
    """A way to use it."""

    name: str
    make: Callable[..., optax.GradientTransformation]
    loop: type = Optax
    own_path: bool = False  # whether it is meant to walk another path than in a loop of one's own
    base: Callable[..., optax.GradientTransformation] | None = None  # around which the pull goes


alone = partial(from_hyperparameters, HP)
LABELS = {"first": "a", "second": "b"}
PULL = 0.5
adamw, sgd = partial(optax.adamw, 1e-2), partial(optax.sgd, 1e-1)


def pulled(base):
    """It, and last in the chain the pull."""
    return optax.chain(base(), add_anchor_pull(PULL, annealing=ANNEALING))


def freed(base):
    return optax.contrib.schedule_free(base, 1e-1)


def around(base, name, wrap=lambda tx: tx, loop=Optax):
    """The case of the pull around an optimizer, in a wrapper."""
    return Case(f"`add_anchor_pull` after {name}", lambda: wrap(pulled(base)), loop, base=base)


CASES = [
    Case("alone", alone),
    Case("`chain` after `clip_by_global_norm`", lambda: optax.chain(optax.clip_by_global_norm(1e9), alone())),
    Case(
        "`scale_by_recadam` in a `chain`",
        lambda: optax.chain(scale_by_recadam(**SETTINGS), optax.scale_by_learning_rate(1e-2)),
    ),
    Case("`named_chain`", lambda: optax.named_chain(("clip", optax.clip(1e9)), ("recadam", alone()))),
    Case("`masked`", lambda: optax.masked(alone(), True)),
    Case("`partition`", lambda: optax.partition({"a": alone(), "b": alone()}, LABELS)),
    Case("`MultiSteps` of one", lambda: optax.MultiSteps(alone(), 1).gradient_transformation()),
    Case("`apply_if_finite`", lambda: optax.apply_if_finite(alone(), 3)),
    Case(
        "`inject_hyperparams`",
        lambda: optax.inject_hyperparams(recadam, hyperparam_dtype=jnp.float32)(1e-2, **SETTINGS),
    ),
    Case(
        "`inject_hyperparams` of gamma, k and t0",
        lambda: optax.inject_hyperparams(
            lambda learning_rate, gamma, k, t0: recadam(learning_rate, gamma=gamma, annealing=Sigmoid(k, t0)),
            hyperparam_dtype=jnp.float32,
        )(1e-2, 20.0, 0.5, 4.0),
        own_path=True,
    ),
    Case("`flatten`", lambda: optax.flatten(alone())),
    Case("`conditionally_mask`", lambda: optax.conditionally_mask(alone(), lambda step, **_: step >= 0)),
    Case("`reduce_on_plateau`", lambda: optax.chain(alone(), optax.contrib.reduce_on_plateau())),
    Case("`schedule_free`", lambda: optax.contrib.schedule_free(alone(), 1e-2), own_path=True),
    Case("`flax.nnx.Optimizer`", alone, Nnx),
    Case("equinox, filtered", alone, Equinox),
    around(adamw, "`adamw`"),
    around(sgd, "`sgd`"),
    around(partial(optax.lion, 1e-3), "`lion`"),
    around(partial(optax.adafactor, 1e-2), "`adafactor`"),
    around(partial(optax.contrib.muon, 1e-2), "`muon`"),
    Case(
        "`add_anchor_pull` after `sgd`, both in `schedule_free`",
        lambda: freed(pulled(sgd)),
        own_path=True,
        base=lambda: freed(sgd()),
    ),
    around(adamw, "`adamw`, both in `masked`", lambda tx: optax.masked(tx, True)),
    around(adamw, "`adamw`, both in `partition`", lambda tx: optax.partition({"a": tx, "b": tx}, LABELS)),
    around(adamw, "`adamw`, both in `apply_if_finite`", lambda tx: optax.apply_if_finite(tx, 3)),
    around(
        adamw, "`adamw`, both in `MultiSteps`", lambda tx: optax.MultiSteps(tx, 1).gradient_transformation()
    ),
    Case(
        "`add_anchor_pull` by `inject_hyperparams`",
        lambda: optax.chain(adamw(), optax.inject_hyperparams(add_anchor_pull)(PULL, annealing=ANNEALING)),
        base=adamw,
    ),
    around(adamw, "`adamw` in `flax.nnx.Optimizer`", loop=Nnx),
    around(adamw, "`adamw` in equinox, filtered", loop=Equinox),
]


class Missing(Exception):
    """Does not apply; the page says why."""


def _end(case, steps, run=None, **more):
    run = case.loop(case.make) if run is None else run
    for t in steps:
        # `reduce_on_plateau` wants the loss, and what falls is no plateau.
        value = {"value": jnp.float32(1 / (t + 1))} if "plateau" in case.name else {}
        run.step(t, **value, **more)
    return run


@cache
def _whole(case):
    return _end(case, range(STEPS))


def _same(a, b, atol=0.0):
    return all(np.allclose(x, y, rtol=0, atol=atol) for x, y in zip(a.weights(), b.weights(), strict=True))


def same_path(case):
    if case.own_path:
        raise Missing("its own")
    by_hand = _whole(CASES[0]) if case.base is None else _end(case, range(STEPS), ByHand(case.base))
    return _same(_whole(case), by_hand, atol=2e-6)


def compiled_once(case):
    return _whole(case).traces == 1


def keeps_dtypes(case):
    run = case.loop(case.make, "bfloat16")
    before = jax.tree.map(lambda x: x.dtype, run.state)
    run = _end(case, range(2), run)
    kept = all(x.dtype == jnp.bfloat16 and jnp.isfinite(x).all() for x in run.weights())
    return kept and before == jax.tree.map(lambda x: x.dtype, run.state)


def takes_extra_arguments(case):
    """What nobody knows is left alone; coefficients of the host arrive."""
    _end(case, range(2), unknown=jnp.ones(()))
    if "scale_by_recadam" in case.name or case.base:
        raise Missing("(d)")
    given = host_coefficients(1, HP.replace(lr=0.0, gamma=0.0))
    start = case.loop(case.make)
    return _same(_end(case, range(1), coefficients=given), start, atol=1e-7)


def finds_anchors(case):
    """`tree_map_params` meets the anchors, and the rest of the state too."""
    if case.loop is Nnx:
        raise Missing("(b)")
    if "flatten" in case.name:
        raise Missing("(a)")
    run = case.loop(case.make)
    count = len(jax.tree.leaves(run.params))
    kept = "MultiSteps" in case.name  # gradients
    if case.base is None:
        return _met(run) == (3 + (kept or "schedule_free" in case.name)) * count
    return _met(run) == _met(case.loop(case.base)) + (1 + kept) * count


def _met(run):
    met = []
    optax.tree_utils.tree_map_params(run.tx, met.append, run.state, is_leaf=lambda x: x is None)
    return sum(isinstance(x, jax.Array) for x in met)


def resumes(case):
    """Saved by orbax after a third of the steps, restored, and gone on with: the same bits."""
    half = _end(case, range(4))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ocp.StandardCheckpointer() as checkpointer:
            tree = {"state": half.state, "params": half.params}
            checkpointer.save(Path(folder) / "4", tree)
            checkpointer.wait_until_finished()
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
            saved = checkpointer.restore(Path(folder) / "4", abstract)
    return _same(_end(case, range(4, STEPS), half.again(saved["state"], saved["params"])), _whole(case))


def releases(case):
    """Without its anchors from the step on that no longer reads them: the same bits."""
    if "k and t0" in case.name:
        raise Missing("(c)")
    run = _end(case, range(8))
    run.release()
    gone = [x for x in jax.tree.leaves(run.state, is_leaf=_is_released) if _is_released(x)]
    return len(gone) >= 1 and _same(_end(case, range(8, STEPS), run), _whole(case))


def _is_released(x):
    return isinstance(x, Released)


COLUMNS = {
    "path": same_path,
    "once": compiled_once,
    "dtypes": keeps_dtypes,
    "extra": takes_extra_arguments,
    "anchors": finds_anchors,
    "resumed": resumes,
    "released": releases,
}


def cell(case, check):
    try:
        return "yes" if check(case) else "no"
    except Missing as reason:
        return str(reason)


def table():
    lines = ["| use | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for case in CASES:
        lines.append(f"| {case.name} | " + " | ".join(cell(case, check) for check in COLUMNS.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
