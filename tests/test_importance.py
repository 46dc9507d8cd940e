"""The pull weighted by an importance: on every backend, and in the optimizers of torch and optax."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recadam_core as rc
import recadam_jax
from recadam_numpy import NumpyBackend
from recadam_torch import RecAdam, feature_importance, importance_of

SETTINGS = {"lr": 1e-2, "gamma": 20.0, "annealing": rc.Sigmoid(k=0.3, t0=10)}
WAYS = ({}, {"foreach": True}, {"foreach": False}, {"exact": True}, {"capturable": True})


def arrays(seed, count, shape=(3, 5)):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for _ in range(count)]


def run(importance, steps=12, dtype=torch.float64, **more):
    theta, anchor, *grads = arrays(0, 2 + steps)
    w, head = (torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for x in (theta, theta))
    groups = [
        {"params": [("w", w)], "anchors": {"w": torch.tensor(anchor, dtype=dtype)}},
        {"params": [("head", head)], "anchored": False},
    ]
    given = None if importance is None else {"w": torch.tensor(importance)}
    optimizer = RecAdam(groups, importance=given, **SETTINGS, **more)
    for grad in grads:
        w.grad = head.grad = torch.tensor(grad, dtype=dtype)
        optimizer.step()
    return w.detach().numpy().copy(), head.detach().numpy().copy(), optimizer


def by_hand(importance, steps=12):
    """The formula in NumPy, written out."""
    theta, anchor, *grads = arrays(0, 2 + steps)
    m = v = np.zeros_like(theta)
    hp = rc.Hyperparameters(**SETTINGS)
    for t, grad in enumerate(grads, start=1):
        c = rc.coefficients(t, hp)
        m, v = c.beta1 * m + (1 - c.beta1) * grad, c.beta2 * v + (1 - c.beta2) * grad**2
        theta = theta + importance * c.recall * (anchor - theta) - c.step * m / (np.sqrt(v) + c.eps)
    return theta


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_to_step_follows_the_formula(way):
    importance = np.random.default_rng(5).uniform(size=(3, 5))
    w, head, _ = run(importance, **way)
    np.testing.assert_allclose(w, by_hand(importance), rtol=1e-12)
    np.testing.assert_array_equal(head, run(None, **way)[1])


def test_exact_has_the_specifications_bits():
    importance = np.random.default_rng(5).uniform(size=(3, 5))
    theta, anchor, *grads = arrays(0, 14)
    hp, moments = rc.Hyperparameters(**SETTINGS), rc.Moments.zeros_like(theta)
    for t, grad in enumerate(grads, start=1):
        delta, moments = rc.update(theta, grad, moments, anchor, rc.coefficients(t, hp), importance)
        theta = theta + delta
    np.testing.assert_array_equal(run(importance, exact=True)[0], theta)


def test_ones_change_no_bit_and_zeros_leave_the_annealed_adam():
    np.testing.assert_array_equal(run(np.ones((3, 5)), exact=True)[0], run(None, exact=True)[0])
    theta, _, *grads = arrays(0, 14)
    w = torch.nn.Parameter(torch.tensor(theta))
    alone = RecAdam([("w", w)], exact=True, **{**SETTINGS, "gamma": 0.0})
    for grad in grads:
        w.grad = torch.tensor(grad)
        alone.step()
    np.testing.assert_array_equal(run(np.zeros((3, 5)), exact=True)[0], w.detach().numpy())


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


def test_sixteen_bits_and_rounding():
    importance = np.random.default_rng(5).uniform(size=(3, 5))
    for rounding in ("nearest", "stochastic", "compensated"):
        w = torch.nn.Parameter(torch.ones(3, 5, dtype=torch.bfloat16))
        settings = {"lr": 1e-2, "gamma": 50.0, "annealing": rc.Constant(1.0, 1.0), "rounding": rounding}
        anchors = {"w": torch.zeros(3, 5)}
        optimizer = RecAdam(
            [("w", w)], anchors=anchors, importance={"w": torch.tensor(importance)}, **settings
        )
        w.grad = torch.zeros_like(w)
        optimizer.step()
        expected = 1 - 0.5 * importance
        np.testing.assert_allclose(w.detach().float().numpy(), expected, atol=2**-8)


def test_it_lives_in_the_state_and_survives_a_resume():
    importance = np.random.default_rng(5).uniform(size=(3, 5))
    _, _, optimizer = run(importance)
    saved = copy.deepcopy(optimizer.state_dict())
    _, _, other = run(np.ones((3, 5)), steps=1)
    other.load_state_dict(saved)
    state = other.state[other.param_groups[0]["params"][0]]
    np.testing.assert_array_equal(state["importance"].numpy(), importance)


@pytest.mark.parametrize(("mine", "theirs"), [(None, 1.0), (1.0, None)])
def test_a_state_of_another_kind_is_refused(mine, theirs):
    ones = [None if x is None else np.ones((3, 5)) for x in (mine, theirs)]
    optimizer, saved = run(ones[0], steps=1)[2], run(ones[1], steps=1)[2].state_dict()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(rc.RecAdamError, match="load_state_dict: 'w' was saved with"):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == str(before)


def test_groups_that_come_later_and_copies():
    w, v = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = RecAdam([("w", w)], lr=0.1, gamma=5.0, annealing=rc.Constant(1.0, 1.0))
    group = {
        "params": [("v", v)],
        "anchors": {"v": torch.zeros(2)},
        "importance": {"v": torch.tensor([1.0, 0.0])},
    }
    optimizer.add_param_group(group)
    twin = copy.deepcopy(optimizer)
    for some in (optimizer, twin):
        for g in some.param_groups:
            for p in g["params"]:
                p.grad = torch.zeros_like(p)
        some.step()
        assert some.param_groups[1]["params"][0].tolist() == [0.5, 1.0]


def test_drift_takes_it_into_account():
    importance = np.zeros((3, 5))
    _, _, optimizer = run(importance)
    assert optimizer.drift().parameters["w"].pull_share == 0.0


@pytest.mark.parametrize(
    ("importance", "more", "message"),
    [
        ({}, {}, "importance of 'w' is None; give a floating array of shape (2,)"),
        ({"w": torch.ones(3)}, {}, "importance of 'w' has shape (3,); give a floating array of shape (2,)"),
        ({"w": np.ones(2)}, {}, "importance of 'w' is a ndarray; give a tensor"),
        ({"w": [0.5] * 1000}, {}, "importance of 'w' is list; give a floating array of shape (2,)"),
        ({"w": torch.ones(2, device="meta")}, {}, "importance of 'w' is without data; give a tensor"),
        ([torch.ones(2)], {}, "importance: list; give a dict of tensors by parameter name"),
        ({"w": torch.ones(2)}, {"form": "proximal"}, "importance needs form='decoupled', not 'proximal'"),
        ({"w": torch.tensor([0.5, 2.0])}, {}, "importance of 'w' leaves [0, 1]; scale it, and set the"),
        ({"w": torch.tensor([0.5, torch.nan])}, {}, "importance of 'w' leaves [0, 1]; scale it"),
        (
            {"w": torch.ones(2)},
            {"fused": True},
            "RecAdam: importance and fused are both set; give one of them",
        ),
    ],
)
def test_bad_input_is_named_in_one_line(importance, more, message):
    with pytest.raises(rc.RecAdamError) as caught:
        RecAdam([("w", torch.nn.Parameter(torch.ones(2)))], importance=importance, **more)
    assert str(caught.value).startswith(message)


def test_what_has_no_anchor_has_no_importance():
    group = {"params": [("w", torch.nn.Parameter(torch.ones(2)))], "importance": {"w": torch.ones(2)}}
    with pytest.raises(rc.RecAdamError, match="a group has an importance and says 'anchored': False"):
        RecAdam([{**group, "anchored": False}])


def test_importance_needs_names():
    with pytest.raises(rc.RecAdamError, match="importance is matched by name; pass"):
        RecAdam([torch.nn.Parameter(torch.ones(2))], importance={"w": torch.ones(2)})


def test_the_specification_refuses_another_shape():
    theta = np.ones(2)
    c = rc.Coefficients(0.9, 0.999, 0.1, 1e-8, 0.5, 0.0)
    with pytest.raises(rc.RecAdamError, match=r"update: importance has shape \(3,\), theta \(2,\)"):
        rc.update(theta, theta, rc.Moments.zeros_like(theta), theta, c, np.ones(3))


def test_importance_is_the_mean_squared_gradient_with_its_top_cut():
    """Of a linear model the gradients are the inputs, and so is everything that follows."""
    x = np.random.default_rng(3).standard_normal((8, 50))
    w, unused = torch.zeros(50, requires_grad=True), torch.zeros(2, requires_grad=True)
    found = importance_of({"w": w, "unused": unused}, ((torch.tensor(row) * w).sum() for row in x))
    squares = (x**2).sum(axis=0)
    np.testing.assert_allclose(
        found["w"].numpy(), np.minimum(1, squares / np.quantile(squares, 0.9)), rtol=1e-5
    )
    assert int((found["w"] == 1).sum()) == 5
    assert found["unused"].tolist() == [0, 0]
    assert w.grad is None
    optimizer = RecAdam([("w", w), ("unused", unused)], lr=1e-3, gamma=1.0, importance=found)
    assert torch.equal(optimizer.state[w]["importance"], found["w"])


def test_importance_by_features_is_their_curvature():
    """Of f(x) = x W it is the sum of squares of the inputs, whichever the output."""
    rng = np.random.default_rng(4)
    x = torch.tensor(rng.standard_normal((2000, 64, 10)) * np.linspace(0.1, 1, 10))
    w = torch.zeros(10, 3, dtype=torch.float64, requires_grad=True)
    found = feature_importance({"w": w}, (batch @ w for batch in x))["w"].numpy()
    squares = (x**2).sum(dim=(0, 1)).numpy()
    expected = np.repeat(squares, 3).reshape(10, 3)
    expected = np.minimum(1, expected / np.quantile(expected, 0.9))
    np.testing.assert_allclose(found, expected, rtol=0.2)
    again = feature_importance({"w": w}, (batch @ w for batch in x))["w"].numpy()
    np.testing.assert_array_equal(again, found)
    assert (feature_importance({"w": w}, (b @ w for b in x), seed=1)["w"].numpy() != found).any()


def test_importance_of_half_precision_and_of_what_is_frozen():
    """A gradient of 300 is no number any more when float16 squares it."""
    w = torch.ones(2, dtype=torch.float16, requires_grad=True)
    frozen = torch.ones(2)
    found = importance_of({"w": w, "frozen": frozen}, [(w * torch.tensor([300.0, 30.0])).sum()])
    assert found["w"].dtype == torch.float16
    assert found["w"].tolist() == pytest.approx([1.0, 0.0111], rel=1e-2)
    assert found["frozen"].tolist() == [0, 0]


W = torch.ones(2, requires_grad=True)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([], "importance: no loss depends on any of the parameters, or so little"),
        ([W.sum() * 0], "importance: no loss depends on any of the parameters, or so little"),
        ([W.sum(), W.sum() * torch.nan], "importance: the loss of batch 1 is nan; leave it out"),
        ([torch.ones(())], "importance: the loss of batch 0 has no gradient; make it outside of torch.no_gr"),
        ([W * 2], r"importance: the loss of batch 0 has shape \(2,\); give a scalar"),
        ([(W - 1).norm()], "importance: no loss depends"),
        (
            [(W - 1).sqrt().sum()],
            "importance: the gradient of 'w' in batch 0 is not finite; leave the batch out",
        ),
    ],
)
def test_importance_of_nothing_is_named(losses, message):
    with pytest.raises(rc.RecAdamError, match=message):
        importance_of({"w": W}, losses)


def test_parameters_are_weighed_by_name():
    model = torch.nn.Linear(2, 1)
    found = importance_of(model.named_parameters(), [model(torch.ones(1, 2)).sum()])
    assert list(found) == ["weight", "bias"]
    loss = [model(torch.ones(1, 2)).sum()]
    with pytest.raises(
        rc.RecAdamError, match=r"importance: the parameters are a generator; give model\.named"
    ):
        importance_of(model.parameters(), loss)
    with pytest.raises(
        rc.RecAdamError, match="importance: the features are one tensor; give a list or gener"
    ):
        feature_importance(model.named_parameters(), model(torch.ones(1, 2)))
    with pytest.raises(rc.RecAdamError, match="importance: the losses of batch 0 are a float; give a tensor"):
        importance_of(model.named_parameters(), [1.0])


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
            {"w": torch.ones(2)},
            "importance of 'w' is of torch beside arrays of numpy; give all of one library",
        ),
        ({"form": "released"}, None, {"w": np.ones(2)}, "importance needs form='decoupled', not 'released'"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(hp, backend, importance, message):
    optimizer = rc.RecAdam(rc.Hyperparameters(**hp), backend)
    with pytest.raises(rc.RecAdamError) as caught:
        optimizer.init({"w": np.ones(2)}, {"w": np.ones(2)}, importance)
    assert str(caught.value).startswith(message)


def test_a_backend_that_takes_none_says_so():
    class Unweighed(NumpyBackend):
        capabilities = rc.Capabilities(dtypes=("float64",))

    optimizer, w = rc.RecAdam(rc.Hyperparameters(), Unweighed()), {"w": np.ones(2)}
    with pytest.raises(rc.RecAdamError, match="importance: the backend 'numpy' takes none; leave it out"):
        optimizer.init(w, w, w)
    pytest.importorskip("numba")
    fused = rc.RecAdam(rc.Hyperparameters(gamma=1.0), NumpyBackend(fused=True))
    with pytest.raises(rc.RecAdamError, match="importance: the backend 'numpy' takes none; leave it out"):
        fused.init(w, w, w)
    assert any(v.weighs for v in NumpyBackend().capabilities.variants)


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
