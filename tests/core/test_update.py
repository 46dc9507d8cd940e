from __future__ import annotations

import itertools

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from recadam_core import (
    Coefficients,
    Constant,
    Hyperparameters,
    Moments,
    RecAdam,
    RecAdamError,
    apply,
    coefficients,
    pull,
    update,
)
from recadam_core.conformance import Case
from recadam_core.conformance.cases import ANNEALINGS
from recadam_core.hyperparameters import FORMS

values = st.floats(-1e3, 1e3, allow_nan=False, width=64)
vectors = arrays(np.float64, 5, elements=values)


@given(theta=vectors, grad=vectors, anchor=vectors, m=vectors, v=vectors)
def test_the_kernel_is_its_formula(theta, grad, anchor, m, v):
    v = np.abs(v)
    c = Coefficients(0.9, 0.999, 0.01, 1e-8, 0.1, 0.001)
    delta, new = update(theta, grad, Moments(m, v), anchor, c)
    for i in range(5):  # in Python's floats, number by number
        mi = 0.9 * m[i] + (1 - 0.9) * grad[i]
        vi = 0.999 * v[i] + (1 - 0.999) * (grad[i] * grad[i])
        di = 0.1 * (anchor[i] - theta[i]) - 0.01 * (mi / (vi**0.5 + 1e-8)) - 0.001 * theta[i]
        assert (new.m[i], new.v[i]) == (mi, vi)
        assert delta[i] == pytest.approx(di, rel=1e-14, abs=1e-300)


@given(theta=vectors, anchor=vectors, pull=st.floats(1e-3, 1e3))
def test_proximal_never_passes_the_anchor(theta, anchor, pull):
    hp = Hyperparameters(lr=1.0, gamma=pull, form="proximal", annealing=Constant(0.0, 1.0))
    delta, _ = update(theta, np.zeros(5), Moments.zeros_like(theta), anchor, coefficients(1, hp))
    before, after = np.abs(anchor - theta), np.abs(anchor - (theta + delta))
    assert np.all(after <= before * (1 + 1e-12))


@given(theta=vectors, grad=vectors, m=vectors, v=vectors)
def test_at_the_anchor_the_pull_is_nothing(theta, grad, m, v):
    c = Coefficients(0.9, 0.999, 0.01, 1e-8, 0.5, 0.0)
    state = Moments(m, np.abs(v))
    pulled, _ = update(theta, grad, state, theta, c)
    free, _ = update(theta, grad, state, None, c._replace(pull=0.0))
    np.testing.assert_array_equal(pulled, free)


@pytest.mark.parametrize("form", FORMS)
def test_forms_meet_at_small_learning_rates(form):
    """All three are the same differential equation: they differ in second order of lr."""
    rng = np.random.default_rng(0)
    theta, grad, anchor = rng.standard_normal((3, 50))
    deltas = []
    for lr in (1e-3, 1e-4):
        hp = Hyperparameters(lr=lr, gamma=10.0, weight_decay=0.1, form=form, annealing=Constant(0.7, 0.5))
        base = hp.replace(form="decoupled")
        state = Moments.zeros_like(theta)
        a, b = (update(theta, grad, state, anchor, coefficients(1, h))[0] for h in (hp, base))
        deltas.append(np.abs(a - b).max() / lr)
    if form == "decoupled":
        assert deltas == [0.0, 0.0]
    else:
        assert deltas[1] == pytest.approx(deltas[0] / 10, rel=0.05)


def test_a_missing_anchor_does_not_pass_silently():
    c = Coefficients(0.9, 0.999, 0.01, 1e-8, 0.1, 0.0)
    with pytest.raises(RecAdamError, match=r"pull is 0\.1 but there is no anchor"):
        update(np.ones(2), np.ones(2), Moments.zeros_like(np.ones(2)), None, c)


@given(theta=vectors, anchor=vectors, recall=st.floats(0, 1e300), weighs=st.booleans())
def test_the_pull_alone_is_the_steps_pull(theta, anchor, recall, weighs):
    """To the bit that of a step in which Adam's fraction is nothing."""
    importance = np.linspace(0.0, 1.0, 5) if weighs else None
    hp = Hyperparameters(lr=1.0, gamma=recall, form="proximal", annealing=Constant(0.0, 1.0))
    share = coefficients(1, hp).pull
    c = Coefficients(0.9, 0.999, 0.0, 1.0, share, 0.0)
    whole, _ = update(theta, np.zeros(5), Moments.zeros_like(theta), anchor, c, importance)
    alone = pull(theta, anchor, recall, importance)
    np.testing.assert_array_equal(alone, whole)
    assert 0.0 <= share <= 1.0
    assert share == pytest.approx(recall / (1.0 + recall), rel=1e-15)
    after = apply(theta, alone)
    assert np.all(np.abs(anchor - after) <= np.abs(anchor - theta) * (1 + 1e-12))


def test_the_pull_alone_goes_to_the_least_of_its_penalty():
    theta, anchor, p = np.array([1.0, -3.0]), np.array([0.5, 2.0]), 0.3

    def objective(x):
        return 0.5 * np.sum((x - theta) ** 2) + 0.5 * p * np.sum((x - anchor) ** 2)

    least = theta + pull(theta, anchor, p)
    for step in itertools.product((-1e-3, 0.0, 1e-3), repeat=2):
        assert objective(least + np.array(step)) >= objective(least)


def test_the_pull_alone_of_half_precision_is_in_float32_and_rounded_once():
    theta, anchor = np.full(1, 1.0, dtype=np.float16), np.full(1, 1.0 + 2.0**-10, dtype=np.float16)
    delta = pull(theta, anchor, 1.0)
    assert (delta.dtype, delta[0]) == (np.float32, 2.0**-11)
    assert apply(theta, delta)[0] == 1.0  # a tie, to even
    assert pull(theta, anchor, 0).dtype == np.float32


@pytest.mark.parametrize("recall", [-0.1, np.nan, np.inf, "0.1", True, None])
def test_a_weight_of_the_pull_that_is_none_is_refused(recall):
    with pytest.raises(RecAdamError, match=r"^pull: recall is .*; give a"):
        pull(np.ones(2), np.zeros(2), recall)


@pytest.mark.parametrize(
    ("anchor", "importance", "says"),
    [
        (None, None, "pull: anchor is None; give an array"),
        (np.zeros(3), None, r"pull: anchor has shape \(3,\), theta \(2,\); give equal shapes"),
        (np.zeros(2), np.ones(()), r"pull: importance has shape \(\), theta \(2,\); give equal shapes"),
        (np.zeros(2, dtype=int), None, "pull: anchor has dtype int64; give a real floating array"),
        (array_api_strict.zeros(2), None, "pull: anchor is of array_api_strict beside arrays of numpy"),
    ],
)
def test_an_anchor_that_does_not_fit_is_refused(anchor, importance, says):
    with pytest.raises(RecAdamError, match=says):
        pull(np.ones(2), anchor, 0.1, importance)


def test_a_traced_weight_of_the_pull_needs_nothing_but_the_standard():
    xp = array_api_strict
    with xp.ArrayAPIStrictFlags(**STRICTEST):
        theta, anchor = xp.asarray([1.0, 2.0]), xp.asarray([0.0, 2.0])
        delta = pull(theta, anchor, xp.asarray(1.0, dtype=xp.float64))
        assert [float(delta[i]) for i in range(2)] == [-0.5, 0.0]


def test_nothing_is_changed_in_place():
    arrays_ = [np.ones(3), np.full(3, 0.5), np.zeros(3), np.zeros(3), np.full(3, 2.0)]
    before = [x.copy() for x in arrays_]
    theta, grad, m, v, anchor = arrays_
    update(theta, grad, Moments(m, v), anchor, Coefficients(0.9, 0.999, 0.1, 1e-8, 0.1, 0.1))
    for x, y in zip(arrays_, before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_half_precision_is_summed_in_float32_and_rounded_once():
    theta = np.full(1, 1.0, dtype=np.float16)
    anchor = np.full(1, 1.001, dtype=np.float32)
    c = Coefficients(0.9, 0.999, 0.0, 1e-8, 0.5, 0.0)
    delta, state = update(theta, np.zeros(1, dtype=np.float16), Moments.zeros_like(theta), anchor, c)
    assert (delta.dtype, state.m.dtype) == (np.float32, np.float32)
    assert delta[0] == pytest.approx(0.0005, rel=1e-4)
    assert apply(theta, delta).dtype == np.float16


STRICTEST = {
    "api_version": "2022.12",
    "boolean_indexing": False,
    "data_dependent_shapes": False,
    "enabled_extensions": (),
}


def test_array_api_strict_finds_the_specification_by_itself():
    xp = array_api_strict
    params = {"w": xp.asarray([1.0, 2.0]), "head": xp.asarray([0.0])}
    optimizer = RecAdam(Hyperparameters(lr=0.1, gamma=1.0))
    state = optimizer.init(params, {"w": xp.asarray([0.0, 0.0])})
    grads = {"w": xp.asarray([0.0, 0.0]), "head": xp.asarray([1.0])}
    params, state = optimizer.step(params, grads, state)
    assert float(params["w"][1]) == pytest.approx(1.8)
    assert float(params["head"][0]) == pytest.approx(-0.1)


@pytest.mark.parametrize("flags", [{}, STRICTEST], ids=["default", "strictest"])
def test_traced_coefficients_need_nothing_but_the_standard(flags):
    xp = array_api_strict
    with xp.ArrayAPIStrictFlags(**flags):
        for form, annealing in itertools.product(FORMS, ANNEALINGS):
            hp = Case(form, annealing).hyperparameters
            got = coefficients(xp.asarray(7.0, dtype=xp.float64), hp, xp=xp)
            assert float(got.step) == pytest.approx(coefficients(7, hp).step, rel=1e-14)
