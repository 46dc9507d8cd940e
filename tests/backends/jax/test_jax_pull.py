"""`add_anchor_pull`: what it adds to any transformation's updates."""

from __future__ import annotations

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recadam_core import Constant, Linear, RecAdamError, Sigmoid, apply, pull
from recadam_jax import AnchorPullState, Released, add_anchor_pull, release


def tree(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    return {"encoder": {"kernel": draw(4, 3), "bias": draw(3)}, "head": draw(3)}


def once(tx, params, updates=None, state=None):
    """The parameters after one step."""
    updates = jax.tree.map(jnp.zeros_like, params) if updates is None else updates
    state = tx.init(params) if state is None else state
    updates, state = tx.update(updates, state, params)
    return optax.apply_updates(params, updates), state


def run(tx, params, steps):
    step = jax.jit(lambda params, state, grads: _stepped(tx, params, state, grads))
    state = tx.init(params)
    for t in range(steps):
        params, state = step(params, state, tree(t + 1))
    return params, state


def _stepped(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def distance(a, b):
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)))


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_it_leads_to_where_the_specification_pulls(dtype, weighed):
    params, star, updates = tree(0, dtype), tree(1, dtype), tree(2, dtype)
    weight = jax.tree.map(lambda x: jnp.abs(jnp.tanh(x.astype(jnp.float32))), tree(3)) if weighed else None
    new, _ = once(add_anchor_pull(0.25, anchor=star, importance=weight), params, updates)

    def meant(theta, u, star, weight=None):
        wide = theta.astype(jnp.float32) + u.astype(jnp.float32)
        return apply(wide, pull(wide, star, 0.25, weight)).astype(dtype)

    expected = jax.tree.map(meant, params, updates, star, *([weight] if weighed else []))
    bits = float(jnp.finfo(dtype).eps)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=6 * bits), new, expected)
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(dtype)}


SCHEDULES = {
    "warmed up": optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 40),
    "falling": optax.linear_schedule(2e-3, 0.0, 40),
    "a number": 1e-3,
    "warmed up late": optax.join_schedules(
        [optax.linear_schedule(0.0, 1e-3, 20_000), optax.constant_schedule(1e-3)], [20_000]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_pull_follows_the_learning_rate(name):
    schedule = SCHEDULES[name]
    rates = [float(schedule(t)) if callable(schedule) else schedule for t in range(40)]
    peak = 5e-4 if name == "warmed up late" else max(rates)  # of the first ten thousand steps
    tx = add_anchor_pull(0.5, learning_rate=schedule, anchor={"w": jnp.zeros(1)})
    state = tx.init({"w": jnp.ones(1)})
    update = jax.jit(tx.update)
    for rate in rates:
        updates, state = update({"w": jnp.zeros(1)}, state, {"w": jnp.ones(1)})
        p = 0.5 * rate / peak
        np.testing.assert_allclose(updates["w"], -p / (1 + p), rtol=2e-4, atol=1e-7)


def test_a_rate_above_all_that_were_looked_at_is_the_peak_from_then_on():
    spike = lambda count: jnp.where(count == 11, 1.0, 0.1)  # noqa: E731
    tx = add_anchor_pull(1.0, learning_rate=spike, anchor={"w": jnp.zeros(1)}, annealing=Linear(t0=10**9))
    state = tx.init({"w": jnp.ones(1)})._replace(peak=jnp.float32(0.1))
    shares = []
    for _ in range(14):
        updates, state = tx.update({"w": jnp.zeros(1)}, state, {"w": jnp.ones(1)})
        shares.append(-float(updates["w"][0]))
    np.testing.assert_allclose(shares[:11], 0.5, rtol=1e-5)
    np.testing.assert_allclose(shares[11:], [0.5, 1 / 11, 1 / 11], rtol=1e-5)


def test_the_pull_itself_may_be_a_schedule():
    tx = add_anchor_pull(lambda count: 1.0 / (count + 1), anchor={"w": jnp.zeros(1)})
    state, w = tx.init({"w": jnp.ones(1)}), {"w": jnp.ones(1)}
    for p in (1, 1 / 2, 1 / 3):
        updates, state = jax.jit(tx.update)({"w": jnp.zeros(1)}, state, w)
        np.testing.assert_allclose(-updates["w"], p / (1 + p), rtol=1e-6)


@pytest.mark.parametrize("curve", [Sigmoid(k=0.5, t0=4), Linear(t0=8), Constant(0.5, 2.0), 0.25])
def test_the_annealing_weighs_the_pull_and_the_updates_of_what_is_anchored(curve):
    params, ones = tree(), jax.tree.map(jnp.ones_like, tree())
    star = {"encoder": params["encoder"], "head": None}
    tx = add_anchor_pull(0.5, annealing=curve, anchor=star)
    state = tx.init(params)
    for t in range(1, 10):
        updates, state = tx.update(ones, state, params)
        task, recall = (curve, 1 - curve) if isinstance(curve, float) else curve.weights(t)
        share = 0.5 * recall / (1 + 0.5 * recall)
        np.testing.assert_allclose(updates["encoder"]["bias"], task * (1 - share), rtol=1e-5)
        np.testing.assert_array_equal(updates["head"], 1.0)


def test_what_has_no_anchor_is_left_alone_in_every_bit():
    params, updates = tree(), tree(1)
    tx = add_anchor_pull(10.0, anchor=tree(2), anchor_mask={"encoder": True, "head": False})
    state = tx.init(params)
    new, _ = jax.jit(tx.update)(updates, state, params)
    np.testing.assert_array_equal(new["head"], updates["head"])
    assert state.anchor["head"] is None
    assert distance(new["encoder"], updates["encoder"]) > 1


def test_a_huge_pull_brings_home_and_none_leaves_the_updates():
    params, star, updates = tree(), tree(1), tree(2)
    for huge in (1e30, 3e38):
        new, _ = once(add_anchor_pull(huge, anchor=star), params, updates)
        assert distance(new, star) < 1e-6
    new, _ = add_anchor_pull(0.0, anchor=star).update(
        updates, add_anchor_pull(0.0, anchor=star).init(params), params
    )
    jax.tree.map(np.testing.assert_array_equal, new, updates)


def test_the_anchor_is_a_copy_in_the_state_and_donation_works():
    params = tree()
    tx = optax.chain(optax.sgd(0.1), add_anchor_pull(0.1))
    state = tx.init(params)
    jaxpr = jax.make_jaxpr(tx.update)(params, state, params)
    assert [c for c in jaxpr.consts if np.size(c) > 1] == []
    kept = jax.tree.map(np.asarray, params)
    step = jax.jit(lambda p, s, g: _stepped(tx, p, s, g), donate_argnums=(0, 1))
    for t in range(3):
        params, state = step(params, state, tree(t))
    jax.tree.map(np.testing.assert_array_equal, state[-1].anchor, kept)


@pytest.mark.parametrize("pulls", [False, True])
def test_in_schedule_free_it_holds_both_the_mean_and_what_is_stepped(pulls):
    params, star = tree(), tree()
    base = optax.chain(optax.sgd(0.1), *([add_anchor_pull(0.1)] if pulls else []))
    tx = optax.contrib.schedule_free(base, 0.1)
    end, state = run(tx, params, 200)
    mean = optax.contrib.schedule_free_eval_params(state, end)
    far = [distance(x, star) for x in (end, mean, state.z)]
    held, gone = (0.8, 0.8, 3.0), (3.0, 3.0, 5.0)
    assert all(x < y for x, y in zip(far, held, strict=True)) == pulls
    assert all(x > y for x, y in zip(far, gone, strict=True)) != pulls


def test_after_its_annealing_the_state_needs_no_anchors():
    curve = Linear(t0=4)
    tx = optax.chain(optax.adam(0.1), add_anchor_pull(0.5, annealing=curve))
    params, star = tree(), tree()
    state = tx.init(params)
    step = jax.jit(lambda p, s, g: _stepped(tx, p, s, g))
    for t in range(4):
        params, state = step(params, state, tree(t))
    less = release(state, curve)
    assert jax.tree.leaves(less[-1].anchor) == []
    assert isinstance(less[-1].anchor["head"], Released)
    for t in range(4, 8):
        (params, state), (again, less) = step(params, state, tree(t)), step(params, less, tree(t))
        jax.tree.map(np.testing.assert_array_equal, params, again)
    assert distance(params, star) > 1e-2
    with pytest.raises(RecAdamError, match=r"the anchors are released, and Constant.* reads them in every"):
        add_anchor_pull(0.5).update(params, less[-1], params)
    with pytest.raises(RecAdamError, match=r"step 9: the anchors are released, and Linear.* still reads"):
        add_anchor_pull(0.5, annealing=Linear(t0=20)).update(params, less[-1], params)


def test_an_infinite_update_under_apply_if_finite_moves_nothing():
    tx = optax.apply_if_finite(optax.chain(optax.sgd(0.1), add_anchor_pull(0.5, anchor=tree(1))), 3)
    params = tree()
    bad = jax.tree.map(lambda x: x * jnp.inf, params)
    new, state = once(tx, params, bad)
    jax.tree.map(np.testing.assert_array_equal, new, params)
    assert int(state.inner_state[-1].count) == 0


def test_over_many_members_of_a_vmap():
    tx = optax.chain(optax.sgd(0.1), add_anchor_pull(0.5))
    many = jax.tree.map(lambda *xs: jnp.stack(xs), *(tree(seed) for seed in range(3)))
    state = jax.vmap(tx.init)(many)
    new, _ = jax.vmap(lambda p, s: _stepped(tx, p, s, tree(9)))(many, state)
    for i in range(3):
        one, _ = once(tx, tree(i), tree(9))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x[i], y, rtol=0, atol=1e-6), new, one)  # noqa: B023


PARAMS = tree()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: add_anchor_pull(-1), "add_anchor_pull: pull is -1; give a finite number >= 0"),
        (lambda: add_anchor_pull(float("nan")), "add_anchor_pull: pull is nan; give a finite"),
        (lambda: add_anchor_pull(np.inf), "add_anchor_pull: pull is inf; give a finite"),
        (lambda: add_anchor_pull("0.1"), "add_anchor_pull: pull is '0.1'; give a finite"),
        (lambda: add_anchor_pull(True), "add_anchor_pull: pull is True; give a finite"),
        (lambda: add_anchor_pull(None), "add_anchor_pull: pull is None; give a finite"),
        (lambda: add_anchor_pull(jnp.float32(-1)), "add_anchor_pull: pull is Array\\(-1"),
        (lambda: add_anchor_pull(annealing="sigmoid"), "annealing is 'sigmoid'"),
        (lambda: add_anchor_pull(annealing=1.5), "annealing is 1.5; give a finite number >= 0 and <= 1"),
        (lambda: add_anchor_pull(learning_rate=-1.0), "add_anchor_pull: learning_rate is -1.0; give"),
        (lambda: add_anchor_pull(anchor_dtype="int8"), "recadam_jax: anchor_dtype is 'int8'"),
        (lambda: add_anchor_pull(anchor_memory="disk"), "recadam_jax: anchor_memory is 'disk'"),
        (lambda: add_anchor_pull(lambda c: -1.0).init(PARAMS), "step 1: the schedule's pull is -1.0"),
        (lambda: add_anchor_pull(lambda c: jnp.nan).init(PARAMS), "step 1: the schedule's pull is nan"),
        (
            lambda: add_anchor_pull(learning_rate=lambda c: 1.0 - c).init(PARAMS),
            "add_anchor_pull, step 3: the learning rate is Array\\(-1",
        ),
        (lambda: add_anchor_pull(anchor={"encoder": None}).init(PARAMS), "anchor: not the parameters' tree"),
        (lambda: add_anchor_pull(anchor=tree(0)["head"]).init(PARAMS), "anchor: an array stands where"),
        (
            lambda: add_anchor_pull(anchor={**PARAMS, "head": jnp.ones(4)}).init(PARAMS),
            "anchor 'head' has shape \\(4,\\), its parameter \\(3,\\)",
        ),
        (
            lambda: add_anchor_pull(anchor={**PARAMS, "head": jnp.full(3, jnp.nan)}).init(PARAMS),
            "anchor 'head' holds NaN",
        ),
        (
            lambda: add_anchor_pull(importance=jax.tree.map(lambda x: x + 9, PARAMS)).init(PARAMS),
            "importance of 'encoder/bias' leaves",
        ),
        (lambda: add_anchor_pull().init({"n": jnp.ones(2, int)}), "parameter 'n' has dtype int32"),
        (lambda: add_anchor_pull().update(PARAMS, add_anchor_pull().init(PARAMS)), "needs the parameters"),
        (lambda: add_anchor_pull().update(PARAMS, optax.EmptyState(), PARAMS), "the state is a EmptyState"),
        (
            lambda: add_anchor_pull().update(PARAMS["head"], add_anchor_pull().init(PARAMS), PARAMS),
            "updates: not the parameters' tree",
        ),
        (
            lambda: add_anchor_pull().update(
                {**PARAMS, "head": jnp.ones(4)}, add_anchor_pull().init(PARAMS), PARAMS
            ),
            "update 'head' has shape \\(4,\\), its parameter",
        ),
        (
            lambda: add_anchor_pull().update(
                PARAMS, add_anchor_pull().init(PARAMS)._replace(count=-1), PARAMS
            ),
            "add_anchor_pull: the state's count is -1",
        ),
        (
            lambda: add_anchor_pull(lambda c: jnp.float32(-1.0)).update(
                PARAMS, add_anchor_pull().init(PARAMS), PARAMS
            ),
            "add_anchor_pull, step 1: the pull is Array\\(-",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(call, message):
    with pytest.raises(RecAdamError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_state_restored_as_numpy_arrays_steps_as_it_is():
    tx = add_anchor_pull(0.5, learning_rate=1e-3, anchor=tree(1))
    params = tree()
    state = tx.init(params)
    restored = jax.tree.map(np.asarray, state)
    restored = AnchorPullState(int(restored.count), float(restored.peak), *restored[2:])
    a, b = once(tx, params, state=state)[0], once(tx, params, state=restored)[0]
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_tree_without_parameters():
    tx = add_anchor_pull(0.1)
    assert tx.update({}, tx.init({}), {})[0] == {}
