"""`recadam_jax` over eight devices; test_jax_sharding.py runs this file in a process that has them.

With the flag that keeps XLA from contracting operations every bit must be that of one device; without it XLA
contracts differently in arrays of other sizes, and numbers differ in their last digits.
"""

from __future__ import annotations

import contextlib
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from recadam_core import Hyperparameters, Linear
from recadam_jax import (
    FLAG,
    add_anchor_pull,
    from_hyperparameters,
    host_coefficients,
    load_anchor,
    recadam,
    release,
)

HP = Hyperparameters(lr=1e-2, gamma=20.0, weight_decay=0.1, annealing=Linear(t0=8))
SHAPES = {"encoder": {"kernel": (16, 24), "bias": (24,)}, "head": {"kernel": (24, 8)}}
HOST = jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Host))(jnp.ones(1)).sharding.memory_kind
EXACT = FLAG in os.environ.get("XLA_FLAGS", "")
COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")
# Mesh, and by number of dimensions how an array is laid out.
LAYOUTS = {
    "data": ({"data": 8}, {1: P(), 2: P()}),
    "fsdp": ({"fsdp": 8}, {1: P("fsdp"), 2: P("fsdp", None)}),
    "tensor": ({"model": 8}, {1: P("model"), 2: P(None, "model")}),
    "both": ({"fsdp": 2, "model": 4}, {1: P("model"), 2: P("fsdp", "model")}),
}


def draw(seed):
    rng = np.random.default_rng(seed)
    one = lambda shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(one, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def shardings(layout, kind=AxisType.Auto):
    sizes, specs = LAYOUTS[layout]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))
    return jax.tree.map(lambda x: NamedSharding(mesh, specs[x.ndim]), draw(0))


def make(**kept):
    return from_hyperparameters(HP, anchor={"encoder": draw(1)["encoder"], "head": None}, **kept)


def pulled(**kept):
    """The pull around another optimizer."""
    anchor = {"encoder": draw(1)["encoder"], "head": None}
    rate = optax.linear_schedule(1e-2, 0.0, 20)
    pull = add_anchor_pull(0.5, annealing=HP.annealing, learning_rate=rate, anchor=anchor, **kept)
    return optax.chain(optax.adam(1e-2), pull)


def trained(tx, params, state=None, steps=range(12)):
    state = tx.init(params) if state is None else state
    places = jax.tree.map(lambda p: p.sharding, params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for t in steps:
        params, state = step(params, state, jax.device_put(draw(t), places))
    return params, state


def assert_equal(a, b):
    bound = 0 if EXACT else 1e-6
    compare = lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=bound, atol=bound)  # noqa: E731
    jax.tree.map(compare, a, b)


def assert_laid_out(tree, places):
    for x, place in zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)
        assert x.addressable_shards[0].data.shape == place.shard_shape(x.shape)


@pytest.fixture(scope="module")
def alone():
    """The trajectory on one device."""
    return trained(make(), jax.tree.map(jnp.asarray, draw(0)))


@pytest.fixture(scope="module")
def pulled_alone():
    """The same, of the pull around another optimizer."""
    return trained(pulled(), jax.tree.map(jnp.asarray, draw(0)))


def test_there_are_eight_devices():
    assert jax.device_count() == 8


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sharded_run_is_the_run_on_one_device(layout, kind, alone):
    places = shardings(layout, kind)
    params, state = trained(make(), jax.device_put(draw(0), places))
    assert_equal(params, alone[0])
    assert_equal(state, alone[1])
    for tree in (params, state.mu, state.nu):
        assert_laid_out(tree, places)
    assert_laid_out(state.anchor["encoder"], places["encoder"])
    assert state.anchor["head"] == {"kernel": None}


@pytest.mark.parametrize("jit", [False, True], ids=["init", "compiled init"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_device_holds_or_fetches_more_than_its_part(layout, jit):
    places = shardings(layout)
    params = jax.device_put(draw(0), places)
    given = jax.device_put(draw(1), places) if layout == "fsdp" else draw(1)
    tx = from_hyperparameters(HP, anchor=given)
    state = jax.jit(tx.init)(params) if jit else tx.init(params)
    for tree in (state.mu, state.nu, state.anchor):
        assert_laid_out(tree, places)
    grads = jax.device_put(draw(1), places)
    compiled = jax.jit(tx.update, donate_argnums=(0, 1)).lower(grads, state, params).compile()
    assert COLLECTIVE.findall(compiled.as_text()) == []


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pull_around_another_optimizer_is_that_on_one_device(layout, kind, pulled_alone):
    places = shardings(layout, kind)
    params, state = trained(pulled(), jax.device_put(draw(0), places))
    assert_equal(params, pulled_alone[0])
    assert_equal(state, pulled_alone[1])
    assert_laid_out(params, places)
    assert_laid_out(state[1].anchor["encoder"], places["encoder"])


@pytest.mark.parametrize("memory", [None, "pinned_host"])
def test_the_pull_around_another_optimizer_moves_nothing_between_devices(memory, pulled_alone):
    places = shardings("both")
    importance = {"encoder": jax.tree.map(np.ones_like, draw(2)["encoder"]), "head": None}
    tx = pulled(anchor_memory=memory, importance=importance)
    params, state = trained(tx, jax.device_put(draw(0), places))
    assert_equal(params, pulled_alone[0])
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves((state[1].anchor, state[1].importance))}
    assert kinds == {HOST if memory else "device"}
    update = jax.jit(tx.update).lower(jax.device_put(draw(1), places), state, params)
    assert COLLECTIVE.findall(update.compile().as_text()) == []


def test_the_pull_around_another_optimizer_is_restored_into_another_layout(tmp_path, pulled_alone):
    tx = pulled()
    params, state = trained(tx, jax.device_put(draw(0), shardings("tensor")), steps=range(5))
    there = jax.device_put(draw(0), shardings("fsdp"))
    like = {"params": there, "state": tx.init(there)}
    everywhere = NamedSharding(shardings("fsdp")["encoder"]["bias"].mesh, P())
    like = jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, everywhere), like)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        saved = checkpointer.restore(tmp_path / "state", like)
    assert_laid_out(saved["state"][1].anchor["encoder"], shardings("fsdp")["encoder"])
    assert_equal(trained(tx, saved["params"], saved["state"], range(5, 12))[0], pulled_alone[0])


def test_the_pattern_knows_a_collective():
    places = shardings("fsdp")
    x = jax.device_put(draw(0), places)["encoder"]["kernel"]
    gathers = jax.jit(lambda x: x.sum()).lower(x).compile().as_text()
    assert "all-reduce" in COLLECTIVE.findall(gathers)


def test_inside_a_scan(alone):
    params = jax.device_put(draw(0), shardings("fsdp"))
    grads = jax.tree.map(lambda *xs: jnp.stack(xs), *(draw(t) for t in range(12)))
    tx = make()

    @jax.jit
    def train(params, state, grads):
        def step(carry, grads):
            updates, state = tx.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, state), grads)[0]

    assert_equal(train(params, tx.init(params), grads)[0], alone[0])


def test_inside_a_shard_map(alone):
    places = shardings("fsdp")
    params = jax.device_put(draw(0), places)
    mesh = places["encoder"]["bias"].mesh
    tx = make()
    state = tx.init(params)
    specs = jax.tree.map(lambda x: x.spec, places)
    part = {"encoder": specs["encoder"], "head": {"kernel": None}}
    states = type(state)(P(), specs, specs, part)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(specs, states, specs), out_specs=(specs, states))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(12):
        params, state = step(params, state, jax.device_put(draw(t), places))
    assert_equal(params, alone[0])


def test_anchors_in_the_hosts_memory(alone):
    params = jax.device_put(draw(0), shardings("both"))
    tx = make(anchor_memory="pinned_host")
    end, state = trained(tx, params)
    assert_equal(end, alone[0])
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.anchor)} == {HOST}
    kernel = state.anchor["encoder"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8


@pytest.mark.parametrize("memory", [None, "pinned_host"])
def test_an_importance_is_laid_out_as_its_parameter(memory):
    importance = {"encoder": jax.tree.map(lambda x: np.abs(np.tanh(x)), draw(2)["encoder"]), "head": None}
    alone = trained(make(importance=importance), jax.tree.map(jnp.asarray, draw(0)))
    places = shardings("both")
    tx = make(importance=importance, anchor_memory=memory)
    params, state = trained(tx, jax.device_put(draw(0), places))
    assert_equal(params, alone[0])
    for x, place in zip(*map(jax.tree.leaves, (state.importance, places["encoder"])), strict=True):
        assert x.addressable_shards[0].data.shape == place.shard_shape(x.shape)
        assert x.sharding.memory_kind == (HOST if memory else "device")
    compiled = jax.jit(tx.update).lower(jax.device_put(draw(1), places), state, params).compile()
    assert COLLECTIVE.findall(compiled.as_text()) == []


def test_anchors_from_a_file_are_read_in_parts(tmp_path, alone):
    file = tmp_path / "model.safetensors"
    save_file({f"encoder.{n}": x for n, x in draw(1)["encoder"].items()}, file)
    params = jax.device_put(draw(0), shardings("both"))
    anchor = load_anchor(file, params, new=["head"])
    assert_laid_out(anchor["encoder"], shardings("both")["encoder"])
    assert_equal(trained(from_hyperparameters(HP, anchor=anchor), params)[0], alone[0])


@pytest.mark.parametrize("phase", ["anchored", "released"])
@pytest.mark.parametrize("target", ["fsdp", "both", "one device"])
def test_a_checkpoint_is_restored_into_another_layout(target, phase, tmp_path, alone):
    tx, at = make(), 5 if phase == "anchored" else 9
    params, state = trained(tx, jax.device_put(draw(0), shardings("tensor")), steps=range(at))
    if phase == "released":
        state = release(state, HP.annealing)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: one, draw(0)) if target == "one device" else shardings(target)
        bias = places["encoder"]["bias"]
        rest = one if target == "one device" else NamedSharding(bias.mesh, P())
        like = jax.eval_shape(tx.init, params)
        like = release(like, HP.annealing) if phase == "released" else like
        by_shape = {x.shape: place for x, place in zip(*map(jax.tree.leaves, (params, places)), strict=True)}
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_shape.get(x.shape, rest)),
            {"params": params, "state": like},
        )
        saved = checkpointer.restore(tmp_path / "state", abstract)
    assert_laid_out(saved["params"], places)
    assert_laid_out(saved["state"].mu, places)
    end = trained(tx, saved["params"], saved["state"], range(at, 12))
    assert_equal(end[0], alone[0])


def test_coefficients_of_the_host(alone):
    places = shardings("fsdp")
    params = jax.device_put(draw(0), places)
    tx = make()
    state = tx.init(params)
    step = jax.jit(lambda p, s, g, c: tx.update(g, s, p, coefficients=c))
    for t in range(12):
        updates, state = step(params, state, jax.device_put(draw(t), places), host_coefficients(t + 1, HP))
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-6), params, alone[0])


ONE = np.ones((16, 8), np.float32)


def placed(kind, mesh):
    """An array of one kind of place; the mesh's axis is x."""
    first, third = jax.devices()[0], jax.devices()[3]
    single = jax.sharding.SingleDeviceSharding
    other = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("y",))
    return {
        "numpy": lambda: ONE,
        "anywhere": lambda: jnp.asarray(ONE),
        "third device": lambda: jax.device_put(ONE, third),
        "host": lambda: jax.device_put(ONE, single(first, memory_kind="pinned_host")),
        "other mesh": lambda: jax.device_put(ONE, NamedSharding(other, P("y"))),
        "mesh": lambda: jax.device_put(ONE, NamedSharding(mesh, P("x"))),
        "mesh, turned": lambda: jax.device_put(ONE, NamedSharding(mesh, P(None, "x"))),
        "mesh, host": lambda: jax.device_put(ONE, NamedSharding(mesh, P("x"), memory_kind="pinned_host")),
    }[kind]()


GENTLE = {"gamma": 1.0, "annealing": Linear(t0=10)}
GIVEN = ("numpy", "anywhere", "third device", "host", "other mesh")
PLACES = [
    *((None, kind, GIVEN) for kind in ("numpy", "anywhere", "third device", "host")),
    *(
        (axes, kind, (*GIVEN, "mesh", "mesh, turned"))
        for axes in (AxisType.Auto, AxisType.Explicit)
        for kind in ("mesh", "mesh, host")
    ),
]


@pytest.mark.parametrize(
    ("axes", "kind", "given"),
    PLACES,
    ids=[f"{axes.name if axes else 'no'} {kind}" for axes, kind, _ in PLACES],
)
def test_an_anchor_goes_where_its_parameter_is(axes, kind, given):
    if HOST != "pinned_host" and axes is AxisType.Explicit and "host" in kind:
        pytest.skip("before 0.10 JAX compiles no such program for a CPU")
    mesh = axes and jax.make_mesh((8,), ("x",), axis_types=(axes,))
    with jax.set_mesh(mesh) if axes is AxisType.Explicit else contextlib.nullcontext():
        params = {"w": placed(kind, mesh)}
        p = jnp.asarray(params["w"]) if kind == "numpy" else params["w"]
        grads = {"w": jax.device_put(ONE, p.sharding.with_memory_kind("device")) if p.committed else ONE}
        update = recadam(1e-2, **GENTLE).update
        compiled = jax.jit(update)
        for name in given:
            x = {"w": placed(name, mesh)}
            init = recadam(1e-2, anchor=x, importance=x, **GENTLE).init
            for make, memory in ((init, p.sharding.memory_kind), (jax.jit(init), HOST)):
                state = make(params)
                for kept in (state.anchor["w"], state.importance["w"]):
                    where = p.sharding.with_memory_kind(memory if "host" in kind else "device")
                    assert kept.sharding.is_equivalent_to(where, 2)
                    assert kept.sharding.memory_kind == where.memory_kind
                    assert p.committed or not kept.committed
                updates, _ = compiled(grads, state, params)
                assert updates["w"].devices() == p.devices()
                np.testing.assert_allclose(updates["w"], -1e-3, rtol=1e-5)
        for step in (update, compiled):
            updates, _ = step(grads, jax.device_get(state), params)
            assert updates["w"].devices() == p.devices()
            np.testing.assert_allclose(updates["w"], -1e-3, rtol=1e-5)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("within", [False, True])
def test_an_anchor_of_one_device_goes_into_a_mesh_that_is_set(axes, within):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axes,))
    everywhere = NamedSharding(mesh, P("x"))
    anchor = None if within else jax.device_put(jnp.ones(16), jax.devices()[3])
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(jnp.ones(16), everywhere)}
        anchor = jax.device_put(jnp.ones(16), jax.devices()[3]) if within else anchor
        state = recadam(1e-2, anchor={"w": anchor}, **GENTLE).init(params)
        assert state.anchor["w"].sharding.is_equivalent_to(everywhere, 1)


def test_shapes_with_shardings_make_a_state_that_is_laid_out():
    places = shardings("both")
    shapes = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), draw(0), places
    )
    state = make().init(shapes)
    for tree in (state.mu, state.nu):
        assert_laid_out(tree, places)
    assert_laid_out(state.anchor["encoder"], places["encoder"])
