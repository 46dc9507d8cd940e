"""`recadam_jax.recadam` as an optax transformation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recadam_core import Constant, Linear, RecAdamError, Sigmoid
from recadam_jax import recadam

SETTINGS = {"gamma": 10.0, "annealing": Sigmoid(k=0.3, t0=15)}


def tree(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "encoder": {"kernel": jnp.array(rng.standard_normal((4, 3)), dtype), "bias": jnp.zeros(3, dtype)},
        "head": jnp.array(rng.standard_normal(3), dtype),
    }


def run(tx, params, steps, jit=True):
    state = tx.init(params)

    def step(params, state, t):
        grads = jax.tree.map(lambda p: jnp.sin(p * (t + 1)), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1)) if jit else step
    params = jax.tree.map(jnp.copy, params)
    for t in range(steps):
        params, state = step(params, state, t)
    return params, state


def assert_close(a, b, **bounds):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), **bounds), a, b)


NEW = jax.tree.map(lambda _: False, tree())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_anchors_it_is_optax_adamw(weight_decay):
    with jax.enable_x64(True):
        params = tree(dtype=jnp.float64)
        ours, _ = run(recadam(1e-2, weight_decay=weight_decay, gamma=0.0, anchor_mask=NEW), params, 100)
        theirs, _ = run(optax.adamw(1e-2, weight_decay=weight_decay), params, 100)
        assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_jit_and_op_by_op_agree_to_float32():
    a, _ = run(recadam(1e-2, **SETTINGS), tree(), 40)
    b, _ = run(recadam(1e-2, **SETTINGS), tree(), 40, jit=False)
    assert_close(a, b, rtol=0, atol=2e-6)


def test_the_anchor_is_a_copy_in_the_state_and_donation_works():
    params = tree()
    tx = recadam(1e-2, **SETTINGS)
    new, state = run(tx, params, 3)
    assert_close(state.anchor, params, rtol=0, atol=0)
    assert int(state.count) == 3
    assert float(jnp.abs(new["head"] - params["head"]).max()) > 1e-4


def test_the_compiled_step_holds_no_constant_arrays():
    params = tree()
    tx = recadam(1e-2, anchor=params, **SETTINGS)
    state = tx.init(params)
    jaxpr = jax.make_jaxpr(tx.update)(params, state, params)
    assert [c for c in jaxpr.consts if np.size(c) > 1] == []


def test_one_compilation_for_all_of_the_annealing():
    tx = recadam(1e-2, **SETTINGS)
    traces = 0

    @jax.jit
    def step(params, state):
        nonlocal traces
        traces += 1
        return tx.update(params, state, params)

    params = tree()
    state = tx.init(params)
    for _ in range(120):
        _, state = step(params, state)
    assert traces == 1


def test_in_a_chain_the_gradient_is_clipped_and_the_pull_is_not():
    params = {"w": jnp.array([3.0])}
    anchor = {"w": jnp.array([1.0])}
    tx = optax.chain(
        optax.clip_by_global_norm(1e-9),
        recadam(0.01, gamma=10.0, eps=1.0, annealing=Constant(1.0, 1.0), anchor=anchor),
    )
    updates, _ = tx.update({"w": jnp.array([1e6])}, tx.init(params), params)
    assert float(updates["w"][0]) == pytest.approx(0.1 * (1.0 - 3.0), rel=1e-6)


def test_schedules_get_the_count_from_zero_and_annealing_the_step_from_one():
    seen = []

    def schedule(count):
        seen.append(int(count))
        return 0.1 / (1 + count)

    class Recorder:
        def weights(self, t, xp=None):
            seen.append(float(t))
            return 1.0 + 0 * t, 0.0 * t

    params = tree()
    tx = recadam(schedule, annealing=Recorder())
    state = tx.init(params)
    seen.clear()  # init samples both for a pull that diverges
    for _ in range(2):
        _, state = tx.update(params, state, params)
    assert seen == [0, 1.0, 1, 2.0]


@pytest.mark.parametrize(
    "given",
    [
        {"anchor_mask": {"encoder": {"kernel": True, "bias": True}, "head": False}},
        {"anchor_mask": lambda p: {"encoder": {"kernel": True, "bias": True}, "head": False}},
        {"anchor": {**tree(), "head": None}},
        {"anchor_mask": {"encoder": True, "head": False}},
    ],
)
def test_new_heads_by_mask_or_by_a_missing_leaf(given):
    params = tree()
    state = recadam(1e-2, gamma=10.0, **given).init(params)
    assert state.anchor["head"] is None
    np.testing.assert_array_equal(state.anchor["encoder"]["kernel"], params["encoder"]["kernel"])
    frozen = recadam(1e-2, gamma=10.0, annealing=Constant(0.0, 1.0), **given)
    new, _ = run(frozen, params, 3)
    np.testing.assert_array_equal(new["encoder"]["kernel"], params["encoder"]["kernel"])
    assert float(jnp.abs(new["head"] - params["head"]).min()) > 0.005


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_kept(dtype):
    params = tree(dtype=dtype)
    tx = recadam(1e-2, mu_dtype=jnp.bfloat16, **SETTINGS)
    updates, state = tx.update(params, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state.nu)} == {jnp.dtype(jnp.float32)}


def test_multi_steps_and_masked_and_apply_if_finite():
    params = tree()
    labels = {"encoder": {"kernel": "a", "bias": "a"}, "head": "b"}
    for tx in (
        optax.MultiSteps(recadam(1e-2, **SETTINGS), 2),
        optax.masked(recadam(1e-2, **SETTINGS), {"encoder": {"kernel": True, "bias": True}, "head": False}),
        optax.apply_if_finite(recadam(1e-2, **SETTINGS), 3),
        optax.partition({"a": recadam(1e-2, **SETTINGS), "b": optax.adamw(1e-2)}, labels),
    ):
        new, _ = run(tx, params, 4)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(new))


def test_proximal_takes_any_strength():
    params, anchor = {"w": jnp.array([5.0])}, {"w": jnp.array([1.0])}
    tx = recadam(1e-2, gamma=1e9, form="proximal", annealing=Linear(t0=1000), anchor=anchor)
    new, _ = run(tx, params, 5)
    assert float(new["w"][0]) == pytest.approx(1.0, abs=1e-5)


def test_none_stands_for_a_whole_new_branch():
    params = {"encoder": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(3), "bias": jnp.zeros(1)}}
    tx = recadam(1e-5, anchor={"encoder": params["encoder"], "head": None})
    state = tx.init(params)
    assert state.anchor["head"] == {"kernel": None, "bias": None}
    updates, _ = tx.update(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_gamma_can_be_injected_and_changed():
    params = {"w": jnp.array([3.0])}
    make = optax.inject_hyperparams(recadam, static_args=("annealing", "anchor_mask"))
    tx = make(0.01, gamma=10.0, annealing=Constant(0.0, 1.0))
    state = tx.init(params)
    moved = {"w": jnp.array([5.0])}
    for gamma in (10.0, 50.0):
        state.hyperparams["gamma"] = jnp.asarray(gamma)
        updates, _ = jax.jit(tx.update)(params, state, moved)
        assert float(updates["w"][0]) == pytest.approx(0.01 * gamma * (3.0 - 5.0), rel=1e-5)


def test_annealing_parameters_may_be_traced():
    params = {"w": jnp.ones(3)}

    def drift(k):
        tx = recadam(1e-2, gamma=1.0, annealing=Sigmoid(k=k, t0=25.0))
        return tx.update(params, tx.init(params), params)[0]["w"][0]

    swept = jax.vmap(drift)(jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(swept, [drift(0.1), drift(0.2)], rtol=1e-5)


def test_a_very_slow_annealing_is_sampled_within_the_count():
    recadam(lambda count: 1e-4, gamma=1.0, annealing=Sigmoid(k=1e-8, t0=250)).init({"w": jnp.ones(2)})


def test_an_unanchored_tree_has_no_pull_to_refuse():
    state = recadam(1e-3, gamma=5000.0, anchor_mask=False).init(PARAMS)
    assert jax.tree.leaves(state.anchor) == []


PARAMS = {"a": {"w": jnp.ones(2)}}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: recadam(1e-3).init(PARAMS), "recadam, step 1: lr * gamma * recall = 5 diverges"),
        (
            lambda: recadam(lambda c: 1e-5 * (c + 1), annealing=Constant(1.0, 1.0)).init(PARAMS),
            "recadam, step 10000: lr * gamma * recall = 500 diverges",
        ),
        (
            lambda: recadam(lambda c: -1e-5 * c).init(PARAMS),
            "recadam, step 2: learning rate is -9.99",
        ),
        (
            lambda: recadam(1e-5).update({"a": {"w": None}}, recadam(1e-5).init(PARAMS), PARAMS),
            "gradient 'a/w' is None; give one",
        ),
        (lambda: recadam(1e-5, mu_dtype=jnp.int32), "recadam: mu_dtype is"),
        (
            lambda: recadam(1e-5, anchor={"a": {"w": jnp.array([1.0, jnp.nan])}}).init(PARAMS),
            "anchor 'a/w' holds NaN",
        ),
        (lambda: recadam(-1.0), "Hyperparameters: lr is -1.0; give a finite number >= 0"),
        (lambda: recadam(1e-4).init({"a": {"w": jnp.arange(2)}}), "parameter 'a/w' has dtype int32;"),
        (
            lambda: recadam(1e-4, anchor={"a": {"w": jnp.ones(3)}}).init(PARAMS),
            "anchor 'a/w' has shape (3,), its parameter (2,); give the pretrained array",
        ),
        (lambda: recadam(1e-4, anchor={"b": jnp.ones(2)}).init(PARAMS), "anchor: not the parameters' tree ("),
        (
            lambda: recadam(1e-4).update(PARAMS, recadam(1e-4).init(PARAMS)),
            "recadam: update needs the parameters; call update(grads, state, params)",
        ),
        (
            lambda: recadam(1e-4).update({"a": {"v": jnp.ones(2)}}, recadam(1e-4).init(PARAMS), PARAMS),
            "gradients: not the parameters' tree (",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named_in_one_line(act, message):
    with pytest.raises(RecAdamError) as caught:
        act()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
