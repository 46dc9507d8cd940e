"""`recadam_jax.recadam` as an optax transformation."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import recadam_core as rc
import recadam_jax
from recadam_core import Constant, Hyperparameters, Linear, RecAdamError, Sigmoid
from recadam_jax import (
    HostCoefficients,
    from_hyperparameters,
    host_coefficients,
    importance_of,
    load_anchor,
    recadam,
    release,
    scale_by_recadam,
)

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
# Where a compiled program puts what is to be in the host's memory: before 0.10 JAX has one memory on a CPU.
HOST = jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Host))(jnp.ones(1)).sharding.memory_kind


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_anchors_it_is_optax_adamw(weight_decay):
    with jax.enable_x64(True):
        params = tree(dtype=jnp.float64)
        ours, _ = run(recadam(1e-2, weight_decay=weight_decay, gamma=0.0, anchor_mask=NEW), params, 100)
        theirs, _ = run(optax.adamw(1e-2, weight_decay=weight_decay), params, 100)
        assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_package_needs_no_private_or_experimental_name_of_jax():
    for file in Path(recadam_jax.__file__).parent.glob("*.py"):
        assert not re.search(r"jax\.(_src|experimental|interpreters|extend|lib)\b", file.read_text()), file


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


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", 1e300), ("learning_rate", 4e38), ("eps", 1e300)]
)
def test_a_setting_beyond_float32_is_refused_before_a_compiled_step_makes_it_infinite(name, value):
    settings = {"learning_rate": 1e-3, "gamma": 1.0, "form": "proximal", **{name: value}}
    params = {"w": jnp.ones(2)}
    message = rf"{name.replace('_', ' ')} is .*; give a finite number >= 0 and <="
    with pytest.raises(RecAdamError, match=message):
        jax.jit(recadam(**settings).init)(params)


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


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_scale_by_recadam_in_a_chain_is_recadam(weight_decay):
    with jax.enable_x64(True):
        params = tree(dtype=jnp.float64)
        chain = optax.chain(
            scale_by_recadam(**SETTINGS),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(1e-2),
        )
        whole, _ = run(recadam(1e-2, weight_decay=weight_decay, **SETTINGS), params, 40)
        parts, _ = run(chain, params, 40)
        assert_close(parts, whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "annealing",
    [
        lambda count: jnp.minimum(1.0, (count + 1) / 20),
        optax.linear_schedule(1 / 20, 1.0, 19),
        lambda count: (jnp.minimum(1.0, (count + 1) / 20), jnp.maximum(0.0, (19 - count) / 20)),
    ],
)
def test_any_schedule_of_the_count_is_an_annealing(annealing):
    with jax.enable_x64(True):
        params = tree(dtype=jnp.float64)
        ours, _ = run(recadam(1e-2, gamma=10.0, annealing=annealing), params, 30)
        named, _ = run(recadam(1e-2, gamma=10.0, annealing=Linear(t0=20)), params, 30)
        assert_close(ours, named, rtol=0, atol=1e-8)  # a schedule of int32 counts is float32


def test_a_number_is_an_annealing_that_does_not_change():
    ours, _ = run(recadam(1e-2, gamma=10.0, annealing=0.25), tree(), 10)
    named, _ = run(recadam(1e-2, gamma=10.0, annealing=Constant(0.25, 0.75)), tree(), 10)
    assert_close(ours, named, rtol=0, atol=1e-7)


def test_k_and_t0_are_injected_and_changed_in_mid_run():
    @optax.inject_hyperparams
    def make(learning_rate, k, t0):
        return recadam(learning_rate, gamma=10.0, annealing=Sigmoid(k, t0))

    params = tree()
    tx = make(1e-2, k=0.3, t0=15.0)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(3):
        _, state = update(params, state, params)
    state.hyperparams["t0"] = jnp.asarray(1e6)  # recall for good: all pull, no task
    moved = jax.tree.map(lambda p: p + 1, params)
    updates, _ = update(params, state, moved)
    assert_close(updates, jax.tree.map(lambda p: jnp.full_like(p, -0.1), params), rtol=1e-4, atol=0)


def test_tree_map_params_finds_the_anchor_that_was_given():
    params = tree()
    tx = recadam(1e-2, gamma=10.0, anchor={**params, "head": None})
    state = tx.init(params)
    specs = jax.tree.map(lambda p: p.shape, params)
    found = optax.tree_utils.tree_map_params(
        tx, lambda _, spec: spec, state, specs, is_leaf=lambda x: x is None, transform_non_params=lambda _: ()
    )
    assert found == (found.count, specs, specs, specs, None)


# A compiled step on the host's coefficients is the specification up to contraction; without it, see the kit.
@pytest.mark.parametrize("form", ["decoupled", "released", "proximal"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_host_coefficients_are_the_specifications(form, weight_decay):
    hp = Hyperparameters(lr=1e-2, weight_decay=weight_decay, form=form, gamma=10.0, annealing=Linear(t0=20))
    params = {"w": np.linspace(-1, 1, 7, dtype=np.float32), "head": np.ones(3, np.float32)}
    anchor = {"w": np.zeros(7, np.float32), "head": None}
    opt = rc.RecAdam(hp, rc.get_backend("numpy"))
    theirs, held = dict(params), opt.init(params, {"w": anchor["w"]})
    tx = from_hyperparameters(hp, anchor=anchor)
    ours, state = jax.tree.map(jnp.asarray, params), tx.init(params)
    update = jax.jit(lambda g, s, p, c: tx.update(g, s, p, coefficients=c))
    for t in range(1, 31):
        lr = 1e-2 / t
        grads = {name: np.sin(x * t).astype(np.float32) for name, x in theirs.items()}
        theirs, held = opt.step(theirs, grads, held, lr=lr)
        updates, state = update(grads, state, ours, host_coefficients(t, hp, lr))
        ours = optax.apply_updates(ours, updates)
    assert_close(ours, theirs, rtol=0, atol=5e-7)
    with pytest.raises(RecAdamError, match=r"step 1: lr \* gamma \* recall = 9\.5 diverges"):
        host_coefficients(1, hp.replace(form="decoupled"), lr=1.0)


def test_a_pull_that_diverges_later_is_refused_on_the_host_when_it_does():
    hp = Hyperparameters(lr=1e-3, gamma=1000.0, annealing=Constant(1.0, 1.0))
    assert isinstance(host_coefficients(5, hp), HostCoefficients)
    with pytest.raises(RecAdamError, match=r"^step 6: lr"):
        host_coefficients(6, hp, lr=1e-2)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "form": "released"}, {"form": "proximal"}])
@pytest.mark.parametrize("annealing", [Linear(t0=10), Sigmoid(k=4.0, t0=5)], ids=str)
def test_released_anchors_change_no_bit(annealing, settings):
    tx = optax.chain(optax.clip(1.0), recadam(1e-2, gamma=10.0, annealing=annealing, **settings))
    last = rc.release_step(annealing)
    params = tree()
    whole, _ = run(tx, params, 30)

    @jax.jit
    def step(params, state, t):
        grads = jax.tree.map(lambda p: jnp.sin(p * (t + 1)), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for t in range(30):
        if t + 1 == last - 1:
            with pytest.raises(RecAdamError, match=f"release: step {last - 1} still reads the anchors"):
                release(state, annealing)
        if t + 1 == last:
            before = sum(x.size for x in jax.tree.leaves(state))
            state = release(state, annealing)
            assert before - sum(x.size for x in jax.tree.leaves(state)) == 18
        params, state = step(params, state, t)
    assert_close(params, whole, rtol=0, atol=0)


def test_released_anchors_that_are_read_again_are_refused_where_the_step_is_known():
    params = {"w": jnp.ones(2)}
    state = recadam(1e-3, gamma=100.0, annealing=Linear(t0=2)).init(params)
    state = release(state._replace(count=jnp.asarray(5)), Linear(t0=2))
    longer = recadam(1e-3, gamma=100.0, annealing=Linear(t0=200))
    with pytest.raises(RecAdamError, match="recadam, step 6: the anchors are released, and Linear"):
        longer.update(params, state, params)
    updates, _ = recadam(1e-3, gamma=100.0, annealing=Linear(t0=2)).update(params, state, params)
    assert float(updates["w"][0]) < 0


def test_anchors_keep_a_dtype_and_a_memory_of_their_own():
    params = tree()
    kept = {"anchor_dtype": jnp.bfloat16, "anchor_memory": "pinned_host"}
    tx = recadam(1e-2, gamma=10.0, annealing=Constant(0.0, 1.0), **kept)
    for init, memory in ((tx.init, "pinned_host"), (jax.jit(tx.init), HOST)):
        state = init(params)
        assert {x.dtype for x in jax.tree.leaves(state.anchor)} == {jnp.dtype(jnp.bfloat16)}
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state.anchor)} == {memory}
    updates, after = jax.jit(tx.update, donate_argnums=1)(params, state, params)
    wanted = jax.tree.map(lambda p: 0.1 * (p.astype(jnp.bfloat16).astype(jnp.float32) - p), params)
    assert_close(updates, wanted, rtol=1e-5, atol=1e-9)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(after.anchor)} == {HOST}


def test_members_of_a_vmap_are_released_together():
    annealing = Linear(t0=3)
    tx = recadam(1e-2, gamma=10.0, annealing=annealing)
    params = jnp.ones((4, 2))
    state = jax.vmap(tx.init)(params)
    for _ in range(2):
        _, state = jax.vmap(tx.update)(params, state, params)
    assert jax.tree.leaves(release(state, annealing).anchor) == []


def test_anchors_are_turned_from_a_file_of_pytorch(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file

    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_file({"dense.weight": weight, "dense.bias": np.ones(2, np.float32)}, tmp_path / "m.safetensors")
    params = {"dense": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}, "head": jnp.zeros(2)}
    names = {"dense/kernel": "dense.weight", "dense/bias": "dense.bias"}
    for source in ("m.safetensors", "m.safetensors.index.json"):
        if source.endswith("json"):
            index = {"weight_map": dict.fromkeys(names.values(), "m.safetensors")}
            (tmp_path / source).write_text(json.dumps(index))
        anchor = load_anchor(
            tmp_path / source, params, names.get, new=["head"], transpose=lambda path: path == "dense/kernel"
        )
        np.testing.assert_array_equal(anchor["dense"]["kernel"], weight.T)
        assert anchor["head"] is None
        assert recadam(1e-5, anchor=anchor).init(params).anchor["dense"]["bias"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("file", "more", "message"),
    [
        ("m.safetensors", {}, "anchors: {}/m.safetensors has no 'head' for parameter 'head'; give name="),
        ("m.safetensors", {"new": ["hed"]}, "anchors: new names 'hed', which is no parameter (there is"),
        ("other.safetensors", {}, "anchors: {}/other.safetensors: no such file or folder; give"),
        ("x" * 5000, {}, "anchors: '{}"),
        ("bad.safetensors", {}, "anchors: {}/bad.safetensors: damaged, or not there (Error while"),
        ("bad.safetensors.index.json", {}, "anchors: {}/bad.safetensors.index.json: damaged index ("),
        ("lost.safetensors.index.json", {}, "anchors: {}/lost.safetensors: damaged, or not there (no such"),
        (
            "m.safetensors",
            {"name": lambda path: "dense.bias", "new": ["head"]},
            "anchors: {}/m.safetensors: 'dense.bias' has shape (2,), parameter 'dense/kernel' (2, 3); give",
        ),
        ("empty", {}, "anchors: {}/empty: no checkpoint of orbax; give the folder"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_anchor_is_named_in_one_line(tmp_path, file, more, message):
    save_file = pytest.importorskip("safetensors.numpy").save_file

    save_file({"dense.kernel": np.ones((2, 3)), "dense.bias": np.ones(2)}, tmp_path / "m.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no such thing")
    (tmp_path / "bad.safetensors.index.json").write_text("[]")
    lost = {"weight_map": {"dense.kernel": "lost.safetensors"}}
    (tmp_path / "lost.safetensors.index.json").write_text(json.dumps(lost))
    (tmp_path / "empty").mkdir()
    params = {"dense": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(2)}, "head": jnp.zeros(2)}
    with pytest.raises(RecAdamError) as caught:
        load_anchor(tmp_path / file, params, **more)
    assert str(caught.value).startswith(message.format(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
def test_a_given_anchor_may_be_taken_while_tracing(make):
    params = tree()
    tx = recadam(1e-2, anchor=jax.tree.map(lambda p: make(p + 1), params), **SETTINGS)
    eager, traced = tx.init(params), jax.jit(tx.init)(params)
    assert_close(traced, eager, rtol=0, atol=0)
    shapes = jax.eval_shape(tx.init, params)
    assert jax.tree.map(lambda x: x.shape, shapes.anchor) == jax.tree.map(lambda x: x.shape, params)
    bad = recadam(1e-2, anchor=jax.tree.map(lambda p: make(p * jnp.nan), params), **SETTINGS)
    with pytest.raises(RecAdamError, match="anchor 'encoder/bias' holds NaN"):
        jax.jit(bad.init)(params)


def test_numpy_arrays_are_stepped_without_jit_too():
    params, grads = {"w": np.ones(3, np.float32)}, {"w": np.full(3, 0.5, np.float32)}
    tx = recadam(1e-2, **SETTINGS)
    state = tx.init(params)
    updates, _ = tx.update(grads, state, params)
    again, _ = tx.update(*jax.tree.map(jnp.asarray, (grads, state, params)))
    assert_close(updates, again, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_two_parameters_may_take_one_tensor_of_a_checkpoint(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    save_file = pytest.importorskip("safetensors.numpy").save_file

    save_file({"emb": np.ones(2, np.float32)}, tmp_path / "m.safetensors")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"emb": jnp.ones(2), "other": jnp.zeros(3)})
    params = {"decoder": jnp.zeros(2), "encoder": jnp.zeros(2)}
    for source in ("m.safetensors", "orbax"):
        anchor = load_anchor(tmp_path / source, params, name=lambda path: "emb")
        assert_close(anchor, jax.tree.map(jnp.ones_like, params), rtol=0, atol=0)
    with pytest.raises(RecAdamError, match="transpose is for"):
        load_anchor(tmp_path / "orbax", params, name=lambda path: "emb", transpose=lambda path: True)
    for chunk in (tmp_path / "orbax").rglob("d/*"):
        chunk.write_bytes(b"")
    with pytest.raises(RecAdamError, match=r"orbax: (cannot be read|no checkpoint of orbax)"):
        load_anchor(tmp_path / "orbax", params, name=lambda path: "emb")
    gc.collect()  # a restore that failed leaves an event loop, which complains when it is collected


def test_a_checkpoint_of_flax_nnx_has_the_paths_of_its_state(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    nnx = pytest.importorskip("flax.nnx")

    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", state)
    anchor = load_anchor(tmp_path / "orbax", state, new=iter(["bias"]))
    np.testing.assert_array_equal(anchor["kernel"][...], state["kernel"][...])
    (kept,) = jax.tree.leaves(recadam(1e-5, anchor=anchor).init(state).anchor)
    np.testing.assert_array_equal(kept, state["kernel"][...])


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
            "recadam, step 2: the learning rate is Array(-",
        ),
        (
            lambda: recadam(1e-5).update({"a": {"w": None}}, recadam(1e-5).init(PARAMS), PARAMS),
            "gradient 'a/w' is None; give floating arrays of 16 to 64 bits, or freeze the parameter",
        ),
        (lambda: recadam(1e-5, mu_dtype=jnp.int32), "recadam_jax: mu_dtype is"),
        (lambda: recadam(1e-5, anchor_dtype=jnp.int8), "recadam_jax: anchor_dtype is"),
        (lambda: recadam(1e-5, anchor_memory="disk"), "recadam_jax: anchor_memory is 'disk'; give 'pinned"),
        (lambda: recadam(1e-5, anchor_memory=np.ones(2)), "recadam_jax: anchor_memory is array([1., 1.])"),
        (lambda: recadam(1e-5, anchor_memory=10**5000), "recadam_jax: anchor_memory is a int that cannot be"),
        (lambda: recadam(1e-5, anchor_memory=["device"]), "recadam_jax: anchor_memory is ['device']; give"),
        (
            lambda: from_hyperparameters(Hyperparameters(), anchr=PARAMS),
            "unknown argument of from_hyperparameters: 'anchr': did you mean 'anchor'?",
        ),
        (lambda: load_anchor("there", PARAMS, name={"a/w": "w"}), "anchors: name is {'a/w': 'w'}; give a"),
        (lambda: load_anchor("there", PARAMS, transpose=True), "anchors: transpose is True; give a function"),
        (
            lambda: importance_of(lambda p, b: 0.0, PARAMS, None),
            "importance: the batches are None; give a list or generator",
        ),
        (
            lambda: recadam(1e-5, form="proximal").update(
                PARAMS, recadam(1e-5, importance=PARAMS).init(PARAMS), PARAMS
            ),
            "importance needs form='decoupled', not 'proximal'",
        ),
        (lambda: from_hyperparameters(5), "from_hyperparameters: hp is 5; give Hyperparameters"),
        (lambda: host_coefficients(1, None), "coefficients: hp is None; give Hyperparameters"),
        (lambda: load_anchor("there", PARAMS, new=5), "anchors: new is 5; give paths of parameters"),
        (lambda: load_anchor("there", PARAMS, new=[5]), "anchors: new is [5]; give paths of parameters"),
        *(
            (
                lambda given=given: recadam(1e-5).update(
                    PARAMS, recadam(1e-5).init(PARAMS), PARAMS, coefficients=given
                ),
                "recadam: coefficients are HostCoefficients(",
            )
            for given in (
                HostCoefficients((1.0,), (1.0,)),
                HostCoefficients(1.0, 2.0),
                HostCoefficients("abcd", "abcd"),
            )
        ),
        (lambda: recadam(1e-5, annealing=Sigmoid), "Hyperparameters: annealing is"),
        (
            lambda: recadam(1e-4, anchor={"a": {"w": jnp.arange(2)}}).init(PARAMS),
            "anchor 'a/w' has dtype int32; give floating arrays of 16 to 64 bits",
        ),
        (
            lambda: recadam(1e-4, anchor={"a": {"v": jnp.ones(2)}}).init(PARAMS),
            "anchor: not the parameters' tree (it has 'a/v', which they have not); give one",
        ),
        (
            lambda: recadam(1e-4, anchor={}).init(PARAMS),
            "anchor: not the parameters' tree (it lacks 'a/w'; None stands for a new head); give",
        ),
        (
            lambda: recadam(1e-4).update({"a": {"w": jnp.ones(3)}}, recadam(1e-4).init(PARAMS), PARAMS),
            "gradient 'a/w' has shape (3,), its parameter (2,); give equal shapes",
        ),
        (
            lambda: recadam(1e-4).update({"a": {"w": jnp.arange(2)}}, recadam(1e-4).init(PARAMS), PARAMS),
            "gradient 'a/w' has dtype int32; give floating arrays of 16 to 64",
        ),
        (
            lambda: recadam(1e-4).update(PARAMS, recadam(1e-4).init({"a": {"w": jnp.ones(3)}}), PARAMS),
            "first moment 'a/w' has shape (3,), its parameter (2,); give equal shapes",
        ),
        (
            lambda: recadam(1e-4).update(PARAMS, recadam(1e-4).init({"b": jnp.ones(3)}), PARAMS),
            "the state's mu: not the parameters' tree (it has 'b', which they have not)",
        ),
        (
            lambda: recadam(1e-4).update(PARAMS, recadam(1e-4).init(PARAMS), PARAMS, coefficients=(1.0,)),
            "recadam: coefficients are (1.0,); give those of host_coefficients(t, hp)",
        ),
        (
            lambda: recadam(1e-4, anchor={"a": jnp.ones(2)}).init({"a": {**PARAMS["a"], "v": jnp.ones(2)}}),
            "anchor: an array stands where the parameters have a branch; give an array for each, or None",
        ),
        (
            lambda: recadam(1e-4, anchor_mask={"a": {"w": "no"}}).init(PARAMS),
            "anchor_mask 'a/w' is 'no'; give True or False",
        ),
        (
            lambda: recadam(1e-4, anchor_mask=PARAMS).init(PARAMS),
            "anchor_mask 'a/w' is of shape (2,); give True or False",
        ),
        (
            lambda: recadam(1e-4, anchor={"a": {"w": jnp.full(2, 1e5)}}, anchor_dtype="float16").init(PARAMS),
            "anchor 'a/w' has values beyond float16; give another anchor_dtype",
        ),
        (lambda: recadam(1e-4, anchor_dtype="float99"), "recadam_jax: anchor_dtype is 'float99'; give a"),
        (
            lambda: recadam(lambda count: None).init(PARAMS),
            "recadam, step 1: the schedule's learning rate is None; give a finite number >= 0",
        ),
        (
            lambda: recadam(1e-4, annealing=lambda count: jnp.nan).init(PARAMS),
            "Schedule, step 1: the task weight is nan; give a finite number >= 0",
        ),
        (
            lambda: recadam(1e-4, annealing=lambda count: (1.0, 2.0, 3.0)).init(PARAMS),
            "Schedule, step 1: weights gives (1.0, 2.0, 3.0); have it give two numbers, (task, recall)",
        ),
        (
            lambda: recadam(1e-4).update(PARAMS, (), PARAMS),
            "recadam: the state is a tuple; give what init returned",
        ),
        (
            lambda: scale_by_recadam().update(
                PARAMS, scale_by_recadam().init(PARAMS), PARAMS,
                coefficients=host_coefficients(1, Hyperparameters(lr=1e-4)),
            ),
            "scale_by_recadam: coefficients hold the learning rate; give them to recadam",
        ),
        (
            lambda: recadam(1e-4, annealing=Constant(1.0, 1.0)).update(
                PARAMS, release(jax.eval_shape(recadam(1e-4).init, PARAMS), Linear(t0=3)), PARAMS
            ),
            "recadam: the anchors are released, and Constant(task=1.0, recall=1.0) reads them in every step",
        ),
        (
            lambda: jax.jit(lambda s: release(s, Linear(t0=3)))(recadam(1e-4).init(PARAMS)),
            "release: the count is traced; release outside of jit, where it can be checked",
        ),
        (
            lambda: release(jax.eval_shape(recadam(1e-4).init, PARAMS), Constant(1.0, 1.0)),
            "release: Constant(task=1.0, recall=1.0) never ends",
        ),
        (lambda: release(optax.adam(1e-3).init(PARAMS), Linear(t0=3)), "release: this state has no part of"),
        (
            lambda: release(recadam(1e-4).init(PARAMS), Constant(1.0, 1.0)),
            "release: Constant(task=1.0, recall=1.0) never ends; its anchors are read in every step",
        ),
        (
            lambda: recadam(1e-5, anchor={"a": {"w": jnp.array([1.0, jnp.nan])}}).init(PARAMS),
            "anchor 'a/w' holds NaN",
        ),
        (
            lambda: recadam(1e-4, anchor_mask=lambda params: None).init(PARAMS),
            "anchor_mask: the function gives None; have it give a tree of bools",
        ),
        *[
            (lambda x=x: recadam(1e-4, annealing=x), "recadam: annealing is ")
            for x in (-1.0, 1.5, np.nan, True, np.ones(1), jnp.float32(-1.0))
        ],
        (lambda: recadam(1e-4, annealing="half"), "Hyperparameters: annealing is 'half'; give one"),
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


def through_msgpack(state):
    serialization = pytest.importorskip("flax.serialization")

    return serialization.from_bytes(state, serialization.to_bytes(state))


def through_npz(state):
    file = io.BytesIO()
    leaves, structure = jax.tree.flatten(state)
    np.savez(file, *map(np.asarray, leaves))
    file.seek(0)
    return structure.unflatten(list(np.load(file).values()))


def through_orbax(state):
    ocp = pytest.importorskip("orbax.checkpoint")

    with tempfile.TemporaryDirectory() as folder, ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "state", state)
        kept = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), state)
        return checkpointer.restore(Path(folder) / "state", item=state, restore_args=kept)


def counting(kind):
    return lambda state: state._replace(count=kind(state.count))


RESTORED = {
    "device_get": jax.device_get,
    "msgpack": through_msgpack,
    "npz": through_npz,
    "orbax": through_orbax,
    "count as int": counting(int),
    "count as np.int32": counting(np.int32),
    "count as np.int64": counting(np.int64),
}
HP = Hyperparameters(lr=1e-2, gamma=10.0, annealing=Constant(1.0, 1.0))
STEPPED = {
    "recadam": (from_hyperparameters(HP, importance={"w": np.ones(2, np.float32)}), {}),
    "scale_by_recadam": (scale_by_recadam(gamma=10.0, annealing=HP.annealing), {}),
    "host_coefficients": (from_hyperparameters(HP), {"coefficients": host_coefficients(1, HP)}),
}


@pytest.mark.parametrize("tx", STEPPED.values(), ids=STEPPED)
@pytest.mark.parametrize("restored", RESTORED.values(), ids=RESTORED)
@pytest.mark.filterwarnings("ignore")
def test_a_restored_state_steps_alike(restored, tx):
    tx, more = tx
    params = {"w": jnp.ones(2)}
    state, moved = tx.init(params), {"w": jnp.full(2, 2.0)}
    wanted = tx.update(params, state, moved, **more)
    for update in (tx.update, jax.jit(tx.update)):
        whole = update(params, state, moved, **more)
        found = update(params, restored(state), moved, **more)
        assert_close(found, whole, rtol=0, atol=0)
        assert_close(found, wanted, rtol=1e-6, atol=0)
        assert jax.tree.map(lambda x: x.dtype, found[1]) == jax.tree.map(lambda x: x.dtype, whole[1])
    with jax.disable_jit():
        assert_close(tx.update(params, restored(state), moved, **more), wanted, rtol=0, atol=0)
    scale = -1e2 if tx is STEPPED["scale_by_recadam"][0] else 1.0
    np.testing.assert_allclose(wanted[0]["w"], (-0.01 - 0.1) * scale, rtol=1e-5)


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, np.array])
def test_a_leaf_that_is_a_number_steps_as_an_array_does(kind):
    tx = recadam(1e-2, **SETTINGS)
    for update in (tx.update, jax.jit(tx.update)):
        results = []
        for one in (kind, jnp.float32):
            params, grads = {"w": one(1.5)}, {"w": one(0.3)}
            results.append(update(grads, tx.init(params), params))
        assert_close(*results, rtol=0, atol=0)
        assert results[0][0]["w"].dtype == jnp.float32


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of JAX, by equinox where that is newer
@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_that_is_a_module_is_a_tree(compiled):
    eqx = pytest.importorskip("equinox")

    net = eqx.filter(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    mask = jax.tree.map(lambda x: x.ndim == 2, net)
    assert callable(mask)
    init = recadam(1e-5, anchor_mask=mask).init
    anchor = (jax.jit(init) if compiled else init)(net).anchor
    assert [layer.bias for layer in anchor.layers] == [None, None]
    assert [layer.weight.shape for layer in anchor.layers] == [(4, 2), (2, 4)]


FULL = {"body": {"w": jnp.ones(2), "b": jnp.ones(1)}, "head": jnp.ones(3)}


@pytest.mark.parametrize("branch", [True, False], ids=["branch", "leaves"])
@pytest.mark.parametrize("frozen", ["body", "head"])
def test_frozen_branches_take_no_anchor_of_a_whole_tree(frozen, branch):
    trained = {name: jax.tree.map(lambda _, kept=name != frozen: kept, x) for name, x in FULL.items()}
    if branch:
        trained = {name: name != frozen for name in FULL}
    label = jax.tree.map(lambda x: "trained" if x else "frozen", trained)
    ours = recadam(1e-2, gamma=10.0, annealing=Constant(0.0, 1.0), anchor=FULL, importance=FULL)
    moved = jax.tree.map(lambda x: x + 1, FULL)
    zeros = jax.tree.map(jnp.zeros_like, FULL)
    for tx in (
        optax.partition({"trained": ours, "frozen": optax.set_to_zero()}, label),
        optax.masked(ours, trained),
    ):
        for init, update in ((tx.init, tx.update), (jax.jit(tx.init), jax.jit(tx.update))):
            updates, _ = update(zeros, init(FULL), moved)
            for name in FULL:
                pull = 0.0 if name == frozen else -0.1
                assert_close(
                    updates[name], jax.tree.map(lambda x, r=pull: x * r, FULL[name]), rtol=1e-6, atol=0
                )


def test_where_a_filtered_tree_has_nothing_a_whole_anchor_is_not_read():
    state = recadam(1e-5, anchor=FULL).init({**FULL, "body": None})
    assert state.anchor["body"] is None
    assert state.anchor["head"].shape == (3,)


@pytest.mark.parametrize("kind", [float, np.float16, np.float32, np.float64, np.array, jnp.float32])
def test_each_kind_of_number_is_an_annealing_that_does_not_change(kind):
    ours, _ = run(recadam(1e-2, gamma=10.0, annealing=kind(0.5)), tree(), 3)
    named, _ = run(recadam(1e-2, gamma=10.0, annealing=Constant(0.5, 0.5)), tree(), 3)
    assert_close(ours, named, rtol=0, atol=0)


def test_a_schedule_may_end_a_rounding_above_one():
    tx = recadam(1e-2, gamma=1.0, annealing=lambda count: jnp.float32(1 + 2e-7))
    params = {"w": jnp.ones(2)}
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(params, tx.init(params), {"w": jnp.full(2, 5.0)})
        np.testing.assert_allclose(updates["w"], -0.01, rtol=1e-5)


# What an annealing may give, as a schedule and as an object of one's own, and what the host says of it.
WRONG_WEIGHTS = {
    "nan": (jnp.nan, "the task weight is nan"),
    "infinite": (jnp.inf, "the task weight is inf"),
    "negative": (-0.5, "the task weight is -0.5"),
    "None": (None, "the task weight is None"),
    "text": ("a lot", "the task weight is 'a lot'"),
    "three": ((1.0, 1.0, 1.0), "weights gives (1.0, 1.0, 1.0)"),
    "recall of nan": ((1.0, jnp.nan), "the recall weight is nan"),
    "recall below 0": ((1.0, -1.0), "the recall weight is -1.0"),
    "recall below 0 by the task": (1.5, "the recall weight is -0.5"),
    "a vector": (np.ones(1), "the task weight is array([1.])"),
    "a truth": (True, "the task weight is True"),
}


@pytest.mark.parametrize("form", ["decoupled", "proximal"])
@pytest.mark.parametrize(("weights", "message"), WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_wrong_weights_of_an_annealing_are_refused(weights, message, form):
    class Own:
        def weights(self, t, xp=None):
            return weights

    pair = isinstance(weights, tuple)
    for annealing, name in ((lambda count: weights, "Schedule"), (Own(), "Own"))[: 1 + pair]:
        tx = recadam(1e-3, gamma=1.0, annealing=annealing, form=form)
        with pytest.raises(RecAdamError) as caught:
            tx.init(PARAMS)
        assert str(caught.value).startswith(name)
        assert message in str(caught.value)
        state = recadam(1e-3, gamma=1.0).init(PARAMS)
        for update in (tx.update, jax.jit(tx.update)):
            with pytest.raises(RecAdamError):
                update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("weight", [jnp.nan, jnp.inf, -0.5])
def test_wrong_weights_in_arrays_are_refused_in_the_step_that_is_not_compiled(weight):
    tx = recadam(1e-3, gamma=1.0, annealing=lambda c: (jnp.where(c < 1, 0.5, weight), jnp.float32(0.5)))
    _, state = tx.update(PARAMS, recadam(1e-3, gamma=1.0).init(PARAMS), PARAMS)
    with pytest.raises(
        RecAdamError, match=r"^recadam, step 2: the learning rate or the annealing is negative"
    ):
        tx.update(PARAMS, state, PARAMS)


def test_a_schedule_that_falls_below_zero_is_refused():
    with pytest.raises(RecAdamError, match=r"^Schedule, step 1\d\d: the task weight is -0\.\d*; give"):
        recadam(1e-3, gamma=1.0, annealing=lambda count: 1 - count / 100).init(PARAMS)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("gamma", jnp.float32(-1.0), "gamma is Array(-1., dtype=float32)"),
        ("eps", jnp.float32(jnp.nan), "eps is Array(nan, dtype=float32)"),
        ("weight_decay", np.array(-1.0), "weight_decay is array(-1.)"),
        ("b1", jnp.float32(1.0), "betas[0] is Array(1., dtype=float32)"),
        ("b2", np.float16(1.0), "betas[1] is np.float16(1.0)"),
        ("learning_rate", jnp.ones(1), "lr is Array([1.], dtype=float32)"),
        ("learning_rate", "1e-3", "lr is '1e-3'"),
    ],
)  # fmt: skip
def test_concrete_settings_are_checked_whatever_they_are_made_of(setting, value, message):
    with pytest.raises(RecAdamError) as caught:
        recadam(**{setting: value})
    assert str(caught.value).startswith(f"Hyperparameters: {message}; give a finite number >= 0")


INJECTED = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "gamma": 10.0}
CURVES = [(0.1, 250.0, 0.0), (1e-8, 250.0, 0.0), (0.1, 3e9, 0.0), (0.1, 250.0, 0.1), (1e-8, 3e9, 0.1)]


@pytest.mark.parametrize(("k", "t0", "floor"), CURVES)
def test_every_numeric_setting_can_be_injected(k, t0, floor):
    @optax.inject_hyperparams
    def make(learning_rate, b1, b2, eps, weight_decay, gamma, k, t0, weight, floor):
        annealing = Sigmoid(k, t0, weight, floor)
        return recadam(learning_rate, b1, b2, eps, weight_decay, gamma, annealing)

    params = {"w": jnp.full(2, 0.5)}
    grads = {"w": jnp.full(2, 0.25)}
    plain = recadam(1e-2, annealing=Sigmoid(k, t0, 1.0, floor), **INJECTED)
    wanted, _ = plain.update(grads, plain.init(params), {"w": jnp.full(2, 1.5)})
    tx = make(1e-2, k=k, t0=t0, floor=floor, weight=1.0, **INJECTED)
    for init, update in ((tx.init, tx.update), (jax.jit(tx.init), jax.jit(tx.update))):
        updates, state = update(grads, init(params), {"w": jnp.full(2, 1.5)})
        assert len(state.hyperparams) == 10
        assert_close(updates, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [recadam, scale_by_recadam])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_injected_truth_is_named_in_one_line(make, compiled):
    tx = optax.inject_hyperparams(make)(bias_correction=jnp.array(True))
    with pytest.raises(RecAdamError) as caught:
        (jax.jit(tx.init) if compiled else tx.init)(PARAMS)
    assert str(caught.value) == (
        f"{make.__name__}: bias_correction is Array(True, dtype=bool); give True or False, and name "
        "bias_correction in static_args of inject_hyperparams"
    )


STRUCTS = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), FULL)


@pytest.mark.parametrize("kept", [{}, {"anchor": FULL}, {"anchor_mask": False}], ids=str)
def test_shapes_alone_make_the_shapes_of_a_state(kept):
    tx = recadam(1e-5, **kept)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), tx.init(FULL))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(tx.init, STRUCTS)) == shapes


def test_shapes_alone_make_a_state_where_no_values_are_needed():
    for kept in ({"anchor": FULL}, {"anchor_mask": False}):
        tx = recadam(1e-5, **kept)
        assert_close(tx.init(STRUCTS), tx.init(FULL), rtol=0, atol=0)
    with pytest.raises(RecAdamError) as caught:
        recadam(1e-5).init(STRUCTS)
    assert str(caught.value) == (
        "anchor 'body/b' is a ShapeDtypeStruct, which has no values; give arrays, or trace: "
        "jax.eval_shape(tx.init, params)"
    )


class Foreign:
    shape, dtype = (2,), "float32"


UNFIT = {
    "masked": (np.ma.masked_array([1.0, np.nan], [False, True]), "is a MaskedArray"),
    "complex": (np.ones(2, np.complex64), "has dtype complex64"),
    "float8": (jnp.ones(2, jnp.float8_e4m3fn), "has dtype float8_e4m3fn"),
    "integers": (np.ones(2, np.int32), "has dtype int32"),
    "truths": (np.ones(2, bool), "has dtype bool"),
    "long double": (np.ones(2, np.longdouble), "has dtype float128"),
    "another byte order": (np.ones(2, ">f4"), "has dtype >f4"),
    "foreign": (Foreign(), "is a Foreign"),
    "text": ("ones", "is a str"),
    "function": (jnp.sin, "is a "),
    "key": (jax.random.key(0), "has dtype key<fry>"),
}


@pytest.mark.parametrize("what", ["parameter", "gradient", "anchor", "importance", "first moment"])
@pytest.mark.parametrize(("leaf", "message"), UNFIT.values(), ids=UNFIT)
def test_a_leaf_that_is_no_floating_array_is_named(leaf, message, what):
    good, bad = {"w": jnp.ones(2)}, {"w": leaf}
    tx = recadam(1e-5)
    acts = {
        "parameter": lambda: tx.init(bad),
        "gradient": lambda: tx.update(bad, tx.init(good), good),
        "anchor": lambda: recadam(1e-5, anchor=bad).init(good),
        "importance": lambda: recadam(1e-5, importance=bad).init(good),
        "first moment": lambda: tx.update(good, tx.init(good)._replace(mu=bad), good),
    }
    with pytest.raises(RecAdamError) as caught:
        acts[what]()
    assert str(caught.value).startswith(f"{what} 'w' {message}")
    assert "; give floating arrays of 16 to 64 bits" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of JAX, by equinox where that is newer
def test_a_whole_model_is_told_what_to_filter():
    eqx = pytest.importorskip("equinox")

    net = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    tx = recadam(1e-5)
    arrays = eqx.filter(net, eqx.is_inexact_array)
    for act in (lambda: tx.init(net), lambda: tx.update(arrays, tx.init(arrays), net)):
        with pytest.raises(
            RecAdamError, match=r"^parameter 'activation' .*eqx\.filter\(model, eqx\.is_inexact"
        ):
            act()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "complex64", "int8"])
@pytest.mark.parametrize("name", ["mu_dtype", "anchor_dtype"])
def test_a_dtype_that_others_cannot_be_promoted_to_is_refused_at_once(name, dtype):
    with pytest.raises(RecAdamError) as caught:
        recadam(1e-5, **{name: getattr(jnp, dtype)})
    assert str(caught.value).endswith("; give a floating dtype of 16 to 64 bits")


@pytest.mark.parametrize("dtype", [{}, 5, "whole", [1], True, 10**5000, int], ids=type)
@pytest.mark.parametrize("name", ["mu_dtype", "anchor_dtype"])
def test_what_is_no_dtype_is_refused_at_once(name, dtype):
    with pytest.raises(RecAdamError, match=f"recadam_jax: {name} is ") as caught:
        recadam(1e-5, **{name: dtype})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_anchor_that_would_become_infinite_is_refused(compiled):
    for anchor, dtype in ((np.array([1.0, 1e300]), None), (jnp.array([1.0, 1e5]), "float16")):
        init = recadam(1e-5, anchor={"w": anchor}, anchor_dtype=dtype).init
        with pytest.raises(
            RecAdamError, match=r"^anchor 'w' has values beyond float\d\d; give another anchor_d"
        ):
            (jax.jit(init) if compiled else init)({"w": jnp.ones(2)})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"w": "../m.safetensors"}, "index ('../m.safetensors' is outside of its folder); fetch it again"),
        ({"w": "/m.safetensors"}, "index ('/m.safetensors' is outside of its folder); fetch it again"),
        ({"w": "m.safetensors", "v": "m.safetensors"}, "lacks 'v', which m.safetensors.index.json says is"),
        ({"v": "m.safetensors"}, "lacks 'v', which m.safetensors.index.json says is there; fetch it again"),
        ({"w": "n.safetensors"}, "n.safetensors: damaged, or not there (no such file); fetch it again"),
        ({"w": "pipe"}, "pipe: damaged, or not there (no such file); fetch it again"),
        ({"w": "."}, "damaged, or not there (no such file); fetch it again"),
        ({"w": 3}, "damaged index (TypeError"),
        ({"w": ["m.safetensors"]}, "damaged index (TypeError"),
    ],
)
def test_an_index_reads_the_files_of_its_folder_alone(tmp_path, weights, message):
    save_file = pytest.importorskip("safetensors.numpy").save_file

    folder = tmp_path / "model"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    for place in (tmp_path, folder):
        save_file({"w": np.ones(2, np.float32)}, place / "m.safetensors")
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(RecAdamError) as caught:
        load_anchor(index, {"w": jnp.zeros(2)})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_index_may_be_a_link_as_in_a_cache_of_files(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file

    for folder in ("blobs", "snapshot"):
        (tmp_path / folder).mkdir()
    save_file({"w": np.full(2, 3.0, np.float32)}, tmp_path / "blobs" / "a")
    (tmp_path / "blobs" / "b").write_text(json.dumps({"weight_map": {"w": "m.safetensors"}}))
    (tmp_path / "snapshot" / "m.safetensors").symlink_to("../blobs/a")
    (tmp_path / "snapshot" / "m.safetensors.index.json").symlink_to("../blobs/b")
    anchor = load_anchor(tmp_path / "snapshot" / "m.safetensors.index.json", {"w": jnp.zeros(2)})
    assert anchor["w"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("source", ["", None, 3, "a\0b", "pipe", "/dev/null"])
def test_what_is_no_path_of_a_checkpoint_is_named(tmp_path, source):
    if source == "pipe":
        source = tmp_path / source
        os.mkfifo(source)
    with pytest.raises(RecAdamError, match=r"^anchors: .*; give the pretrained checkpoint"):
        load_anchor(source, {"w": jnp.zeros(2)})


@pytest.mark.parametrize("count", [-1, 1.0, None, 10**12, np.zeros(2, int)], ids=str)
def test_a_count_that_is_none_is_refused(count):
    tx = recadam(1e-5)
    with pytest.raises(RecAdamError, match=r"^recadam: the state's count is .*; give what init returned"):
        tx.update(PARAMS, tx.init(PARAMS)._replace(count=count), PARAMS)


ONES = jax.tree.map(jnp.ones_like, PARAMS)


def within_scan(tx, state):
    steps = jax.lax.scan(lambda p, _: (p, tx.update(ONES, state, p)[0]), PARAMS, None, length=1)[1]
    return jax.tree.map(lambda x: x[0], steps)


def wrapped(tx):
    return tx.update(ONES, tx.init(PARAMS), PARAMS)[0]


TRACED_WITH_A_CONCRETE_STATE = {
    "jit": lambda tx, state: jax.jit(lambda g: tx.update(g, state, PARAMS)[0])(ONES),
    "scan": within_scan,
    "apply_if_finite": lambda tx, _: wrapped(optax.apply_if_finite(tx, 3)),
    "conditionally_mask": lambda tx, _: wrapped(optax.conditionally_mask(tx, lambda step, **_: step >= 0)),
}


@pytest.mark.parametrize("way", TRACED_WITH_A_CONCRETE_STATE)
@pytest.mark.parametrize("count", [jnp.asarray, np.int32, int])
def test_a_state_with_values_is_stepped_within_a_trace(way, count):
    tx = recadam(1e-2, gamma=10.0, annealing=Constant(1.0, 0.5))
    state = tx.init(PARAMS)
    expected = tx.update(ONES, state, PARAMS)[0]
    found = TRACED_WITH_A_CONCRETE_STATE[way](tx, state._replace(count=count(state.count)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8), found, expected)
    shapes = jax.eval_shape(lambda p: tx.update(ONES, state, p)[0], PARAMS)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, expected)
