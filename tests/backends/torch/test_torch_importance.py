"""The pull weighted by an importance in `recadam_torch`, and what weighs parameters there."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import recadam_core as rc
from recadam_torch import Anchors, RecAdam, feature_importance, importance_of, lora_anchors, param_groups

SETTINGS = {"lr": 1e-2, "gamma": 20.0, "annealing": rc.Sigmoid(k=0.3, t0=10)}
WAYS = (
    {"fused": "numba"},
    {"fused": "compiled"},
    {"fused": False},
    {"foreach": True},
    {"foreach": False},
    {"exact": True},
    {"capturable": True},
)


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


def specification(importance, steps=12):
    theta, anchor, *grads = arrays(0, 2 + steps)
    hp, moments = rc.Hyperparameters(**SETTINGS), rc.Moments.zeros_like(theta)
    for t, grad in enumerate(grads, start=1):
        delta, moments = rc.update(theta, grad, moments, anchor, rc.coefficients(t, hp), importance)
        theta = theta + delta
    return theta


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_to_step_follows_the_formula(way):
    importance = np.random.default_rng(5).uniform(size=(3, 5))
    w, head, _ = run(importance, **way)
    np.testing.assert_allclose(w, specification(importance), rtol=1e-12)
    np.testing.assert_array_equal(head, run(None, **way)[1])


@pytest.mark.parametrize("way", [{}, {"exact": True}, {"fused": "numba"}, {"fused": "compiled"}], ids=str)
def test_exact_and_one_pass_have_the_specifications_bits(way):
    importance = np.random.default_rng(5).uniform(size=(3, 5))
    np.testing.assert_array_equal(run(importance, **way)[0], specification(importance))


def test_ones_change_no_bit_and_zeros_leave_the_annealed_adam():
    np.testing.assert_array_equal(run(np.ones((3, 5)), exact=True)[0], run(None, exact=True)[0])
    theta, _, *grads = arrays(0, 14)
    w = torch.nn.Parameter(torch.tensor(theta))
    alone = RecAdam([("w", w)], exact=True, **{**SETTINGS, "gamma": 0.0})
    for grad in grads:
        w.grad = torch.tensor(grad)
        alone.step()
    np.testing.assert_array_equal(run(np.zeros((3, 5)), exact=True)[0], w.detach().numpy())


def test_sixteen_bits_and_rounding():
    importance = np.random.default_rng(5).uniform(size=(3, 5))
    for rounding, fused in itertools.product(
        ("nearest", "stochastic", "compensated"), (None, False, "compiled")
    ):
        w = torch.nn.Parameter(torch.ones(3, 5, dtype=torch.bfloat16))
        settings = {"lr": 1e-2, "gamma": 50.0, "annealing": rc.Constant(1.0, 1.0)}
        anchors = {"w": torch.zeros(3, 5)}
        optimizer = RecAdam(
            [("w", w)], anchors=anchors, importance={"w": torch.tensor(importance)}, rounding=rounding,
            fused=fused, **settings,
        )  # fmt: skip
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


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: importance_of(m.named_parameters(), None), "importance: the losses are None; give a list"),
        (
            lambda m: feature_importance(m.named_parameters(), 5),
            "importance: the features are 5; give a list",
        ),
        (lambda m: importance_of(5, []), "importance: the parameters are a int; give"),
        (lambda m: lora_anchors(5), "lora_anchors: the model is a int; give the module"),
        (lambda m: param_groups(5), "param_groups: the model is a int; give the module"),
        (lambda m: Anchors.of([]), "anchors: the model is a list; give the module"),
        (lambda m: RecAdam(m.named_parameters()).interpolate(0.5, anchors=5), "anchors: int; give a dict"),
        (
            lambda m: RecAdam(m.to("meta").named_parameters()).drift(),
            "drift: parameter 'weight' is on the me",
        ),
    ],
)
def test_what_a_helper_cannot_take_is_named(act, message):
    with pytest.raises(rc.RecAdamError) as caught:
        act(torch.nn.Linear(2, 2))
    assert str(caught.value).startswith(message)
