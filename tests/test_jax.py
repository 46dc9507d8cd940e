"""`recadam_jax.recadam` as an optax transformation."""

from __future__ import annotations

import gc
import json
import re
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
        ("bad.safetensors", {}, "anchors: {}/bad.safetensors: damaged, or not there (Error while"),
        ("bad.safetensors.index.json", {}, "anchors: {}/bad.safetensors.index.json: damaged index ("),
        ("lost.safetensors.index.json", {}, "anchors: {}/lost.safetensors: damaged, or not there (No such"),
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
            "gradient 'a/w' is None; give floating arrays of 16 bits or more, or freeze the parameter",
        ),
        (lambda: recadam(1e-5, mu_dtype=jnp.int32), "recadam: mu_dtype is"),
        (lambda: recadam(1e-5, anchor_dtype=jnp.int8), "recadam: anchor_dtype is"),
        (lambda: recadam(1e-5, anchor_memory="disk"), "recadam: anchor_memory is 'disk'; give 'pinned"),
        (lambda: recadam(1e-5, annealing=Sigmoid), "Hyperparameters: annealing is"),
        (
            lambda: recadam(1e-4, anchor={"a": {"w": jnp.arange(2)}}).init(PARAMS),
            "anchor 'a/w' has dtype int32; give floating arrays of 16 bits or more",
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
            "gradient 'a/w' has dtype int32; give floating arrays of 16 bits",
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
            "recadam: coefficients are tuple; give those of host_coefficients(t, hp)",
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
        (lambda: recadam(1e-4, anchor_dtype="float99"), "recadam: anchor_dtype is float99; give a floating"),
        (lambda: recadam(lambda count: None).init(PARAMS), "recadam, step 1: the schedule's learning rate is None; give a finite number"),
        (
            lambda: recadam(1e-4, annealing=lambda count: jnp.nan).init(PARAMS),
            "Schedule, step 1: the task weight is nan; give a finite number >= 0",
        ),
        (
            lambda: recadam(1e-4, annealing=lambda count: (1.0, 2.0, 3.0)).init(PARAMS),
            "Schedule: weights(1) gives (1.0, 2.0, 3.0); have it give two numbers, (task, recall)",
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
