from __future__ import annotations

import math
import warnings
from decimal import Decimal, getcontext

import numpy as np
import pytest

from recadam_core import (
    Coefficients,
    Constant,
    Hyperparameters,
    InstabilityWarning,
    Linear,
    RecAdamError,
    Sigmoid,
    coefficients,
)
from recadam_core.hyperparameters import FORMS

ANNEALINGS = [Sigmoid(0.1, 250), Sigmoid(0.5, 30, weight=0.5), Linear(100), Constant(1.0, 0.5)]
STEPS = [1, 2, 10, 100, 250, 400, 520, 10_000, 100_000]


def exact(t, hp, lr, anchored):
    """The documented table in 50 digits."""
    getcontext().prec = 50
    d = Decimal
    a = hp.annealing
    task, recall = d(1), d(0)
    if anchored and isinstance(a, Sigmoid):
        x = d(a.k) * (d(t) - d(a.t0))
        task, recall = d(a.weight) / (1 + (-x).exp()), d(a.weight) / (1 + x.exp())
    elif anchored and isinstance(a, Linear):
        task = d(a.weight) * min(d(1), d(t) / d(a.t0))
        recall = d(a.weight) * max(d(0), (d(a.t0) - d(t)) / d(a.t0))
    elif anchored:
        task, recall = d(a.task), d(a.recall)
    if recall < d(2) ** -40:
        recall = d(0)
    b1, b2 = map(d, hp.betas)
    c1, c2 = (1 - b1**t, 1 - b2**t) if hp.bias_correction else (d(1), d(1))
    step = d(lr) * task * c2.sqrt() / c1
    pull, decay, eps = d(lr) * d(hp.gamma) * recall, d(lr) * d(hp.weight_decay), d(hp.eps)
    if hp.form == "released":
        return step * (1 - decay) * (1 - pull), eps, pull * (1 - decay), decay
    if hp.form == "proximal":
        return step / (1 + pull), eps * c2.sqrt(), pull / (1 + pull), decay / (1 + pull)
    return step, eps * c2.sqrt(), pull, decay


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("annealing", ANNEALINGS, ids=repr)
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_host_coefficients_against_fifty_digits(form, annealing, anchored, bias_correction):
    hp = Hyperparameters(
        lr=1e-4, weight_decay=0.01, form=form, annealing=annealing, bias_correction=bias_correction
    )
    for t in STEPS:
        got = coefficients(t, hp, 3e-5, anchored)
        assert (got.beta1, got.beta2) == hp.betas
        for name, value, wanted in zip(
            ("step", "eps", "pull", "decay"), got[2:], exact(t, hp, 3e-5, anchored), strict=True
        ):
            # k (t - t0) is rounded once before exp, so the tail's error grows with its size.
            assert value == pytest.approx(float(wanted), rel=2e-14), (t, name)


@pytest.mark.parametrize("form", FORMS)
def test_without_anchor_and_decay_it_is_adam_in_every_form(form):
    hp = Hyperparameters(lr=1e-3, form=form)
    c = coefficients(3, hp, anchored=False)
    scale = math.sqrt(1 - 0.999**3) / (1 - 0.9**3)
    assert c.step == pytest.approx(1e-3 * scale, rel=1e-12)
    assert (c.pull, c.decay) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("annealing", ANNEALINGS, ids=repr)
def test_traced_coefficients_are_the_host_ones_to_their_precision(dtype, form, annealing):
    hp = Hyperparameters(lr=1e-4, weight_decay=0.01, form=form, annealing=annealing)
    bound = {"float32": 4e-6, "float64": 1e-14}[dtype]
    for t in STEPS:
        got = coefficients(np.asarray(t, dtype=dtype)[()], hp, xp=np)
        wanted = coefficients(t, hp)
        for name, value, host in zip(Coefficients._fields, got, wanted, strict=True):
            assert float(value) == pytest.approx(host, rel=bound, abs=1e-30), (t, name)


def test_betas_of_zero():
    c = coefficients(1, Hyperparameters(lr=1.0, gamma=0.0, betas=(0.0, 0.0), annealing=Constant(1.0, 0.0)))
    assert (c.step, c.eps) == (1.0, 1e-8)


@pytest.mark.parametrize("form", ["decoupled", "released"])
def test_a_pull_of_two_or_more_is_refused_and_proximal_named(form):
    hp = Hyperparameters(lr=1e-3, gamma=5000.0, form=form)
    with pytest.raises(RecAdamError, match=r"^step 1: lr \* gamma \* recall = 5 diverges .*form='proximal'$"):
        coefficients(1, hp)
    # Once annealed away the same settings are harmless.
    assert coefficients(600, hp).pull == 0.0
    assert coefficients(1, hp.replace(form="proximal")).pull == pytest.approx(5 / 6)


def test_a_pull_above_one_warns():
    hp = Hyperparameters(lr=3e-4, gamma=5000.0)
    with pytest.warns(InstabilityWarning, match="overshoots the anchor.*proximal"):
        coefficients(1, hp)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coefficients(1, hp.replace(form="proximal"))
        coefficients(1, hp, anchored=False)


@pytest.mark.parametrize("t", [0, -3])
def test_steps_count_from_one(t):
    with pytest.raises(RecAdamError, match=f"t is {t}; steps count from 1"):
        coefficients(t, Hyperparameters())


def test_a_bad_learning_rate_names_the_step():
    with pytest.raises(RecAdamError, match=r"^step 7: lr is nan; give a finite number >= 0$"):
        coefficients(7, Hyperparameters(), lr=float("nan"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0; give a finite number >= 0"),
        ({"betas": (0.9, 1.0)}, "betas[1] is 1.0; give a finite number >= 0 and < 1"),
        ({"betas": 0.9}, "betas is 0.9; give two numbers, as (0.9, 0.999)"),
        ({"eps": -1e-8}, "eps is -1e-08; give a finite number >= 0"),
        ({"gamma": float("inf")}, "gamma is inf; give a finite number >= 0"),
        ({"gamma": True}, "gamma is True; give a finite number >= 0"),
        ({"weight_decay": None}, "weight_decay is None; give a finite number >= 0"),
        ({"annealing": "sigmoid"}, "annealing is 'sigmoid'; give one, as Sigmoid(k=0.1, t0=250)"),
    ],
)
def test_bad_hyperparameters(changes, message):
    with pytest.raises(RecAdamError) as caught:
        Hyperparameters(**changes)
    assert str(caught.value) == f"Hyperparameters: {message}"


def test_unknown_form_names_the_nearest():
    with pytest.raises(RecAdamError, match=r"unknown form 'decopled': did you mean 'decoupled'?"):
        Hyperparameters(form="decopled")


def test_hyperparameters_survive_a_dict():
    hp = Hyperparameters(lr=1e-4, betas=(0.8, 0.99), annealing=Linear(10), form="proximal")
    assert Hyperparameters.from_dict(hp.to_dict()) == hp
    with pytest.raises(RecAdamError, match=r"unknown hyperparameter 'gama': did you mean 'gamma'?"):
        Hyperparameters.from_dict({"gama": 1})
