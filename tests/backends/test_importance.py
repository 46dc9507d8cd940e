"""The pull weighted by an importance: on every backend, and in optax transformations."""

from __future__ import annotations

import array_api_strict as strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import recadam_core as rc
from recadam_numpy import NumpyBackend

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import optax

import recadam_jax

SETTINGS = {"lr": 1e-2, "gamma": 20.0, "annealing": rc.Sigmoid(k=0.3, t0=10)}


def arrays(seed, count, shape=(3, 5)):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for _ in range(count)]


def by_hand(importance, steps=12):
    """The formula in NumPy, written out."""
    theta, anchor, *grads = arrays(0, 2 + steps)
    m = v = np.zeros_like(theta)
    hp = rc.Hyperparameters(**SETTINGS)
    for t, grad in enumerate(grads, start=1):
        c = rc.coefficients(t, hp)
        m, v = c.beta1 * m + (1 - c.beta1) * grad, c.beta2 * v + (1 - c.beta2) * grad**2
        theta = theta + importance * c.pull * (anchor - theta) - c.step * m / (np.sqrt(v) + c.eps)
    return theta


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_importance_ends_nearer_to_the_anchor(one, other):
    """Without a gradient; so the bounds on lr * gamma hold with any importance."""
    theta, anchor = np.array([3.0]), np.array([1.0])
    c = rc.Coefficients(0.9, 0.999, 0.1, 1e-8, 0.5, 0.0)
    ends = []
    for importance in sorted((one, other)):
        delta, _ = rc.update(
            theta, np.zeros(1), rc.Moments.zeros_like(theta), anchor, c, np.array([importance])
        )
        ends.append(abs(float((theta + delta - anchor)[0])))
    assert 1.0 <= ends[1] <= ends[0] <= 2.0


def test_the_specification_refuses_another_shape():
    theta = np.ones(2)
    c = rc.Coefficients(0.9, 0.999, 0.1, 1e-8, 0.5, 0.0)
    with pytest.raises(rc.RecAdamError, match=r"update: importance has shape \(3,\), theta \(2,\)"):
        rc.update(theta, theta, rc.Moments.zeros_like(theta), theta, c, np.ones(3))


def over(backend, importance, steps=12):
    """`recadam_core.RecAdam` over a backend, with a new head; the weights and the last state."""
    backend = rc.get_backend(backend) if isinstance(backend, str) else backend
    theta, anchor, *grads = arrays(0, 2 + steps)
    with backend.precision("float64"):
        params = {name: backend.from_numpy(theta) for name in ("w", "head")}
        weights = importance if importance is None else {"w": backend.from_numpy(importance)}
        optimizer = rc.RecAdam(rc.Hyperparameters(**SETTINGS), backend)
        state = optimizer.init(params, {"w": backend.from_numpy(anchor)}, weights)
        for grad in grads:
            step = {name: backend.from_numpy(grad) for name in params}
            params, state = optimizer.step(params, step, state)
        return backend.to_numpy(params["w"]), backend.to_numpy(params["head"]), state


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "array_api_strict"])
def test_every_backend_follows_the_formula(backend):
    importance = np.random.default_rng(5).uniform(size=(3, 5))
    w, head, state = over(backend, importance)
    np.testing.assert_allclose(w, by_hand(importance), rtol=1e-12)
    np.testing.assert_array_equal(head, over(backend, None)[1])
    assert list(state.importance) == ["w"]


def test_the_state_lets_go_of_it_with_the_anchors():
    optimizer = rc.RecAdam(rc.Hyperparameters(lr=0.1, gamma=1.0, annealing=rc.Linear(t0=2)))
    params = {"w": np.ones(2)}
    state = optimizer.init(params, params, {"w": np.ones(2)})
    for expected in ({"w"}, set()):
        params, state = optimizer.step(params, {"w": np.ones(2)}, state)
        assert set(state.importance) == expected
    optimizer.step(params, {"w": np.ones(2)}, state)


@pytest.mark.parametrize(
    ("hp", "backend", "importance", "message"),
    [
        ({}, None, {"v": np.ones(2)}, "importance: 'v' matches no parameter; rename it or leave it out"),
        ({}, None, {}, "importance of 'w' is None; give a floating array of shape (2,)"),
        ({}, None, [np.ones(2)], "importance: list; give a dict of arrays by parameter name"),
        ({}, None, {"w": np.ones(2, int)}, "importance of 'w' has dtype int64; give a floating array"),
        ({}, None, {"w": np.full(2, -0.5)}, "importance of 'w' leaves [0, 1]; scale it"),
        (
            {},
            None,
            {"w": strict.ones(2)},
            "importance of 'w' is of array_api_strict beside arrays of numpy; give all of one library",
        ),
        ({"form": "released"}, None, {"w": np.ones(2)}, "importance needs form='decoupled', not 'released'"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(hp, backend, importance, message):
    optimizer = rc.RecAdam(rc.Hyperparameters(**hp), backend)
    with pytest.raises(rc.RecAdamError) as caught:
        optimizer.init({"w": np.ones(2)}, {"w": np.ones(2)}, importance)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_one_pass_has_the_bits_of_the_functional_form(dtype, in_place):
    pytest.importorskip("numba")
    rng = np.random.default_rng(0)
    shapes = {"w": (40, 1000), "b": (7,), "empty": (0,), "scalar": ()}
    params, anchors, importance, *grads = (
        {name: np.asarray(rng.uniform(size=shape), dtype) for name, shape in shapes.items()} for _ in range(8)
    )
    hp = rc.Hyperparameters(lr=1e-2, gamma=10.0, weight_decay=0.01)
    ends = []
    for backend in (NumpyBackend(), NumpyBackend(fused=True, in_place=in_place)):
        optimizer = rc.RecAdam(hp, backend)
        ours = {name: x.copy() for name, x in params.items()}
        state = optimizer.init(ours, anchors, importance)
        for grad in grads:
            ours, state = optimizer.step(ours, grad, state)
        ends.append((ours, state.moments))
    for name in shapes:
        np.testing.assert_array_equal(ends[0][0][name], ends[1][0][name])
        for one, other in zip(ends[0][1][name], ends[1][1][name], strict=True):
            np.testing.assert_array_equal(one, other)


def transformed(importance, steps=12, **more):
    """`recadam_jax.recadam`, compiled; the weights and the last state."""
    theta, anchor, *grads = arrays(0, 2 + steps)
    with jax.enable_x64(True):
        weights = importance if importance is None else {"w": jnp.array(importance), "head": None}
        tx = recadam_jax.recadam(
            SETTINGS["lr"],
            gamma=SETTINGS["gamma"],
            annealing=SETTINGS["annealing"],
            anchor={"w": jnp.array(anchor), "head": None},
            importance=weights,
            **more,
        )
        params = {"w": jnp.array(theta), "head": jnp.array(theta)}
        state, step = tx.init(params), jax.jit(tx.update)
        for grad in grads:
            updates, state = step({name: jnp.array(grad) for name in params}, state, params)
            params = optax.apply_updates(params, updates)
        return params, state


@pytest.mark.parametrize("more", [{}, {"anchor_memory": "pinned_host"}], ids=str)
def test_jax_follows_the_formula(more):
    importance = np.random.default_rng(5).uniform(size=(3, 5))
    params, state = transformed(importance, **more)
    np.testing.assert_allclose(params["w"], by_hand(importance), rtol=1e-12)
    np.testing.assert_array_equal(params["head"], transformed(None)[0]["head"])
    np.testing.assert_array_equal(state.importance["w"], importance)
    assert state.importance["head"] is None
    assert transformed(None, steps=1)[1].importance is None


def test_jax_refuses_other_forms_at_once():
    with pytest.raises(rc.RecAdamError, match="importance needs form='decoupled', not 'proximal'"):
        recadam_jax.recadam(1e-4, importance=jnp.ones(2), form="proximal")


def test_jax_lets_go_of_it_with_the_anchors():
    annealing = rc.Linear(t0=2)
    tx = recadam_jax.recadam(0.1, gamma=1.0, annealing=annealing, importance=jnp.array([0.5, 1.0]))
    params = jnp.ones(2)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jnp.ones(2), state, params)
        params = optax.apply_updates(params, updates)
    released = recadam_jax.release(state, annealing)
    assert released.importance is None
    for held in (state, released):
        updates, _ = tx.update(jnp.ones(2), held, params)
        np.testing.assert_array_equal(updates, tx.update(jnp.ones(2), state, params)[0])


def test_the_direction_in_a_chain_of_ones_own():
    importance = jnp.array([0.25, 1.0])
    settings = {"gamma": 5.0, "annealing": rc.Constant(1.0, 1.0), "anchor": jnp.zeros(2)}
    whole = recadam_jax.recadam(0.1, importance=importance, **settings)
    direction = recadam_jax.scale_by_recadam(importance=importance, **settings)
    parts = optax.chain(direction, optax.scale_by_learning_rate(0.1))
    params = jnp.ones(2)
    one, other = (tx.update(jnp.zeros(2), tx.init(params), params)[0] for tx in (whole, parts))
    np.testing.assert_allclose(one, [-0.125, -0.5], rtol=1e-6)
    np.testing.assert_allclose(other, one, rtol=1e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["init", "compiled init"])
@pytest.mark.parametrize(
    ("importance", "message"),
    [
        ({"a": {"w": jnp.ones(3)}}, "importance of 'a/w' has shape (3,); give a floating array of"),
        ({"a": None}, "importance of 'a/w' is None; give a floating array of shape (2,)"),
        ({"a": {"w": jnp.array([0.5, 1.5])}}, "importance of 'a/w' leaves [0, 1]; scale it"),
        ({"b": jnp.ones(2)}, "importance: not the parameters' tree ("),
        ({"a": jnp.ones(2)}, "importance: an array stands where the parameters have a branch; give an"),
    ],
)
def test_jax_names_bad_input_in_one_line(importance, message, compiled):
    init = recadam_jax.recadam(1e-4, importance=importance).init
    with pytest.raises(rc.RecAdamError) as caught:
        (jax.jit(init) if compiled else init)({"a": {"w": jnp.ones(2)}})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "importance: no parameters; give the anchored ones"),
        ({"n": jnp.arange(2)}, "importance: 'n' has dtype int32; give the floating arrays alone"),
        ({"n": 1.0}, "importance: 'n' is a float; give the floating arrays alone"),
        ({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, "importance: two parameters have one path; rename"),
    ],
)
def test_jax_weighs_floating_arrays_alone(params, message):
    with pytest.raises(rc.RecAdamError) as caught:
        recadam_jax.importance_of(lambda p, x: x.sum(), params, [jnp.ones(1)])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_sums_of_squares_must_be_ones(bad):
    with pytest.raises(rc.RecAdamError, match="importance: 'v' has sums of squares below 0 or not finite"):
        rc.importance_from({"w": np.ones(2), "v": np.array([1.0, bad])})


def test_optax_finds_the_importance_in_the_state():
    params = {"w": jnp.ones(2), "head": jnp.ones(3)}
    weights = {"w": jnp.ones(2), "head": None}
    tx = recadam_jax.recadam(1e-3, gamma=1.0, anchor=weights, importance=weights)
    found = optax.tree_utils.tree_map_params(
        tx,
        lambda _, spec: spec,
        tx.init(params),
        {"w": "of w", "head": "of head"},
        is_leaf=lambda x: x is None,
    )
    assert found.importance == {"w": "of w", "head": "of head"}


def test_a_half_precision_importance_from_the_host():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    found = recadam_jax.importance_of(lambda p, x: (p["w"] * x).sum(), params, [jnp.array([1.0, 2.0, 0.0])])
    state = recadam_jax.recadam(1e-3, gamma=1.0, importance=jax.device_get(found)).init(params)
    assert state.importance["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(state.importance["w"], found["w"])


def test_two_frameworks_weigh_alike():
    torch = pytest.importorskip("torch")
    from recadam_torch import importance_of

    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((4, 3)), rng.standard_normal((6, 8, 4))
    p = torch.nn.Parameter(torch.tensor(w))
    theirs = importance_of({"w": p}, ((torch.tensor(b) @ p).tanh().square().sum() for b in x))["w"].numpy()
    with jax.enable_x64(True):
        loss = lambda held, batch: jnp.square(jnp.tanh(batch @ held["w"])).sum()  # noqa: E731
        ours = recadam_jax.importance_of(loss, {"w": jnp.array(w)}, map(jnp.array, x))["w"]
        assert ours.dtype == jnp.float64
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert 0 < np.mean(theirs == 1) <= 2 / 12


def test_jax_importance_by_features_is_their_curvature():
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((400, 16, 3)).astype(np.float32), jnp.zeros((3, 2))
    found = recadam_jax.feature_importance(lambda w, batch: batch @ w, w, list(x))
    curvature = (x**2).sum(axis=(0, 1))[:, None] * np.ones((3, 2))
    np.testing.assert_allclose(found / found.max(), curvature / curvature.max(), rtol=0.25)
    again, other = (recadam_jax.feature_importance(lambda w, b: b @ w, w, list(x), s) for s in (0, 1))
    np.testing.assert_array_equal(found, again)
    assert (found != other).any()


@pytest.mark.parametrize(
    ("loss", "batches", "message"),
    [
        (lambda w, x: (w * x).sum(), [], "importance: no loss depends on any of the parameters"),
        (lambda w, x: x.sum(), [1.0], "importance: no loss depends on any of the parameters"),
        (lambda w, x: (w * x).sum(), [1.0, jnp.nan], "importance: the loss of batch 1 is nan; leave it out"),
        (lambda w, x: w * x, [1.0], "importance: the loss has shape (2,); give a scalar"),
        (lambda w, x: (w.sum(), x), [1.0], "importance: the loss is a tuple; give a scalar"),
        (lambda w, x: (w * x).sum() * 1e20, [1.0], "importance: 'w' has sums of squares below 0 or not fin"),
        (
            lambda w, x: (w * x).sum() * 1e-25,
            [1.0],
            "importance: no loss depends on any of the parameters, or so",
        ),
        (
            lambda w, x: jnp.sqrt(w - 1).sum(),
            [1.0],
            "importance: the gradient of 'w' in batch 0 is not finite; leave the batch out",
        ),
    ],
)
def test_jax_importance_of_nothing_is_named(loss, batches, message):
    with pytest.raises(rc.RecAdamError) as caught:
        recadam_jax.importance_of(
            lambda p, x: loss(p["w"], x), {"w": jnp.ones(2)}, [jnp.asarray(x) for x in batches]
        )
    assert str(caught.value).startswith(message)
