from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recadam_core import (
    Constant,
    Hyperparameters,
    Linear,
    RecAdamError,
    Sigmoid,
    annealing_from_dict,
    annealing_to_dict,
    coefficients,
    release_step,
)
from recadam_core.annealing import RECALL_FLOOR

ALL = [
    Sigmoid(0.1, 250),
    Sigmoid(2.0, 10, weight=0.3),
    Linear(100),
    Linear(7.5, weight=2.0),
    Constant(0.5, 2.0),
]


@given(k=st.floats(1e-4, 50), t0=st.floats(0, 1e6), w=st.floats(1e-3, 10), t=st.integers(1, 10**7))
def test_sigmoid_weights_sum_to_its_weight_and_stay_inside(k, t0, w, t):
    task, recall = Sigmoid(k, t0, w).weights(t)
    assert 0 <= task <= w
    assert 0 <= recall <= w
    assert task + recall == pytest.approx(w, rel=1e-15)


def test_recall_keeps_its_digits_where_one_minus_task_has_none():
    # sigma(-25) to 15 digits, from its series: e^-25 (1 - e^-25 + ...).
    expected = 1.388794386477104e-11
    task, recall = Sigmoid(k=1.0, t0=0).weights(25)
    assert recall == pytest.approx(expected, rel=1e-15)
    assert abs((1.0 - task) / expected - 1.0) > 1e-7


def test_sigmoid_does_not_overflow_far_from_its_middle():
    assert Sigmoid(k=50, t0=1e6).weights(1) == (0.0, 1.0)
    assert Sigmoid(k=50, t0=0).weights(10**6) == (1.0, 0.0)


@pytest.mark.parametrize("annealing", ALL, ids=repr)
def test_arrays_and_numbers_agree(annealing):
    t = np.arange(1.0, 400.0)
    task, recall = annealing.weights(t, np)
    one_by_one = np.array([annealing.weights(int(x)) for x in t])
    np.testing.assert_allclose(np.stack([task, recall], axis=1), one_by_one, rtol=4e-16, atol=1e-300)


@pytest.mark.parametrize("annealing", ALL, ids=repr)
def test_survives_a_dict(annealing):
    assert annealing_from_dict(annealing_to_dict(annealing)) == annealing


@pytest.mark.parametrize("annealing", [a for a in ALL if release_step(a)], ids=repr)
def test_release_step_is_the_first_whose_pull_is_exactly_zero(annealing):
    step = release_step(annealing)
    hp = Hyperparameters(lr=1e-5, annealing=annealing)
    assert coefficients(step, hp).pull == 0.0
    assert coefficients(step - 1, hp).pull > 0.0
    assert annealing.weights(step)[1] < RECALL_FLOOR


def test_only_a_stranger_knows_when_its_own_pull_is_over():
    class Table:
        def weights(self, t, xp=None):
            return 1.0, [0.0, 0.0, 1.0][t]

    class Known(Table):
        def release_step(self):
            return 7

    assert release_step(Table()) is None
    assert release_step(Known()) == 7


def test_release_step_of_a_pull_that_stays():
    assert release_step(Constant(1.0, 1.0)) is None
    assert release_step(Constant(1.0, 0.0)) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sigmoid(k=0), "Sigmoid: k is 0; give a finite number > 0"),
        (lambda: Sigmoid(t0=-1), "Sigmoid: t0 is -1; give a finite number >= 0"),
        (lambda: Sigmoid(k=float("nan")), "Sigmoid: k is nan; give a finite number > 0"),
        (lambda: Sigmoid(k="0.1"), "Sigmoid: k is '0.1'; give a finite number > 0"),
        (lambda: Sigmoid(weight=float("inf")), "Sigmoid: weight is inf; give a finite number >= 0"),
        (lambda: Linear(t0=0), "Linear: t0 is 0; give a finite number > 0"),
        (lambda: Constant(recall=-0.1), "Constant: recall is -0.1; give a finite number >= 0"),
        (
            lambda: annealing_from_dict({"name": "sigmod"}),
            "unknown annealing 'sigmod': did you mean 'sigmoid'? (constant, linear, sigmoid)",
        ),
        (
            lambda: annealing_from_dict({"name": "linear", "k": 1}),
            "unknown argument of annealing 'linear': 'k': choose one of (floor, t0, weight)",
        ),
    ],
)
def test_bad_input_is_named_in_one_line(make, message):
    with pytest.raises(RecAdamError) as caught:
        make()
    assert str(caught.value) == message
