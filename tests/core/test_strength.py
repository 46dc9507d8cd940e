"""Annealings in shares of the training, floors, strengths, and a pull that holds a budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import recadam_core as rc
from recadam_core.annealing import annealed_weights


@given(steps=st.integers(1, 10**6), center=st.floats(0, 2), width=st.floats(0.01, 2), floor=st.floats(0, 1))
def test_over_has_its_tenths_where_it_says(steps, center, width, floor):
    curve = rc.Sigmoid.over(steps, center, width, floor=floor)
    for share, weight in ((center - width / 2, 0.1), (center, 0.5), (center + width / 2, 0.9)):
        task, recall = curve.weights(share * steps)
        assert task == pytest.approx(weight, rel=1e-9)
        assert recall == pytest.approx(max(floor, 1 - weight), rel=1e-9)


def test_length_changes_nothing_but_the_unit():
    short, long = rc.Sigmoid.over(100), rc.Sigmoid.over(100_000)
    for t in (1, 25, 60, 100):
        assert short.weights(t) == pytest.approx(long.weights(1000 * t), rel=1e-12)


@pytest.mark.parametrize("curve", [rc.Sigmoid(k=0.3, t0=20, floor=0.25), rc.Linear(t0=40, floor=0.25)])
def test_a_floor_holds_to_the_end_and_never_frees_the_anchor(curve):
    jnp = pytest.importorskip("jax.numpy")
    plain = type(curve)(**{**vars(curve), "floor": 0.0})
    for t in (1, 5, 20, 40, 10_000):
        task, recall = curve.weights(t)
        assert task == plain.weights(t)[0]
        assert recall == max(0.25, plain.weights(t)[1])
        traced = annealed_weights(curve, jnp.asarray(float(t)), jnp)
        assert [float(x) for x in traced] == pytest.approx([task, recall], rel=1e-6)
    assert rc.release_step(curve) is None
    assert rc.annealing_from_dict(rc.annealing_to_dict(curve)) == curve


def test_an_old_description_of_an_annealing_still_reads():
    assert rc.annealing_from_dict({"name": "sigmoid", "k": 0.1, "t0": 250, "weight": 1.0}) == rc.Sigmoid()


@given(lr=st.floats(1e-6, 1.0), half_life=st.floats(0.5, 1e4))
def test_the_half_life_halves(lr, half_life):
    pull = lr * rc.gamma_for(lr, half_life=half_life)
    assert (1 - pull) ** half_life == pytest.approx(0.5, rel=1e-6)


def test_half_life_in_a_training():
    """Six steps of pull alone at a half-life of two leave an eighth of the distance."""
    gamma = rc.gamma_for(0.01, half_life=2)
    hp = rc.Hyperparameters(lr=0.01, gamma=gamma, annealing=rc.Constant(1.0, 1.0))
    opt = rc.RecAdam(hp)
    params = {"w": np.array([9.0])}
    state = opt.init(params, {"w": np.array([1.0])})
    for _ in range(6):
        params, state = opt.step(params, {"w": np.zeros(1)}, state)
    assert params["w"][0] == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rc.Sigmoid.over(0), "Sigmoid.over: steps is 0; give a finite number >= 1"),
        (lambda: rc.Sigmoid.over(9, width=0.0), "Sigmoid.over: width is 0.0; give a finite number > 0"),
        (lambda: rc.Sigmoid(floor=-1.0), "Sigmoid: floor is -1.0; give a finite number >= 0"),
        (lambda: rc.gamma_for(1e-3), "gamma_for: give one of pull and half_life"),
        (lambda: rc.gamma_for(1e-3, pull=0.1, half_life=2.0), "gamma_for: give one of pull and half_life"),
        (lambda: rc.gamma_for(0.0, pull=0.1), "gamma_for: lr is 0.0; give a finite number > 0"),
        (lambda: rc.DriftBudget(0.0), "DriftBudget: budget is 0.0; give a finite number > 0"),
        (lambda: rc.DriftBudget(1.0)(1.0, math.nan), "DriftBudget: figure is nan; give a finite number >= 0"),
    ],
)
def test_bad_input_is_named_in_one_line(make, message):
    with pytest.raises(rc.RecAdamError) as caught:
        make()
    assert str(caught.value) == message


def test_a_budget_is_held_where_plain_adam_walks_away():
    """A steady gradient drives Adam a learning rate a step; the controller stops it at the budget."""

    def walk(control):
        gamma, distance = 1.0, 0.0
        theta, anchor = np.zeros(1), np.zeros(1)
        moments = rc.Moments.zeros_like(theta)
        for t in range(1, 801):
            hp = rc.Hyperparameters(lr=0.01, gamma=gamma, annealing=rc.Constant(1.0, 1.0), form="proximal")
            delta, moments = rc.update(theta, np.ones(1), moments, anchor, rc.coefficients(t, hp))
            theta = theta + delta
            distance = float(abs(theta[0]))
            gamma = control(gamma, distance) if control else 0.0
        return distance

    assert walk(None) == pytest.approx(8.0, rel=0.01)
    assert walk(rc.DriftBudget(0.5)) == pytest.approx(0.5, rel=0.02)
    assert walk(rc.DriftBudget(0.05)) == pytest.approx(0.05, rel=0.02)
