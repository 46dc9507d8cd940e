"""Settings of any kind of number, for all three constructors: refused in one line, or Python's number."""

from __future__ import annotations

import decimal
import fractions
import math
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recadam_core import (
    Constant,
    DriftBudget,
    Hyperparameters,
    InstabilityWarning,
    Linear,
    Moments,
    RecAdam,
    RecAdamError,
    Sigmoid,
    annealing_from_dict,
    coefficients,
    gamma_for,
    update,
)
from recadam_core.annealing import annealed_weights
from recadam_core.errors import check_number

# What a real number may be wrapped in, by library; each is taken as `float` of it.
REAL = {
    "float": float,
    "int": lambda x: int(x) if math.isfinite(x) else x,
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "longdouble": np.longdouble,
    "int64": lambda x: np.int64(max(min(x, 1e18), -1e18) if math.isfinite(x) else 3),
    "uint8": lambda x: np.uint8(abs(x) % 250 if math.isfinite(x) else 3),
    "0-d array": np.array,
    "0-d float16 array": lambda x: np.array(x, dtype=np.float16),
    "other byte order": lambda x: np.array(x, dtype=">f8"),
}
# What is no real number, or more than one.
OTHER = {
    "truth": bool,
    "NumPy's truth": np.bool_,
    "0-d truths": lambda x: np.array(bool(x)),
    "text": str,
    "NumPy's text": np.str_,
    "bytes": lambda x: str(x).encode(),
    "decimal": decimal.Decimal,
    "fraction": lambda x: fractions.Fraction(x) if math.isfinite(x) else None,
    "complex": complex,
    "complex64": np.complex64,
    "duration": lambda x: np.timedelta64(3, "s"),
    "date": lambda x: np.datetime64("2020"),
    "one in an array": lambda x: np.array([x]),
    "list": lambda x: [x],
    "tuple": lambda x: (x,),
    "none": lambda x: None,
    "0-d object": lambda x: np.array(x, dtype=object),
    "long": lambda x: 10**400,
    "longer": lambda x: 10**5000,
}


def of_torch():
    import torch

    real = {
        f"torch {dtype}": lambda x, dtype=dtype: torch.tensor(x, dtype=torch.float64).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    }
    other = {
        "torch truth": lambda x: torch.tensor(bool(x)),
        "torch complex": lambda x: torch.tensor(complex(x)),
        "torch one": lambda x: torch.tensor([x]),
        "torch gradient": lambda x: torch.tensor(x, requires_grad=True),
        "torch meta": lambda x: torch.tensor(x, device="meta"),
    }
    return real, other


def of_jax():
    import jax.numpy as jnp

    real = {
        "jax float32": jnp.float32,
        "jax bfloat16": jnp.bfloat16,
        "jax float16": jnp.float16,
        "jax array": lambda x: jnp.array(x, dtype=jnp.float32),
    }
    other = {
        "jax truth": lambda x: jnp.bool_(x),
        "jax complex": jnp.complex64,
        "jax one": lambda x: jnp.array([x], dtype=jnp.float32),
    }
    return real, other


VALUES = st.one_of(
    st.floats(0.0, 1.0),
    st.floats(0.0, 1e6),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1.0, 0.9, 1e-3, 1e-8, 5e-324, 1e300, 2.0**31, 2.0**60, 3e9, -1.0]),
)
HP = ("lr", "beta1", "beta2", "eps", "weight_decay", "gamma")
SETTINGS = [*((None, name) for name in HP)] + [
    (cls, name)
    for cls, names in ((Sigmoid, ("k", "t0", "weight", "floor")), (Linear, ("t0", "weight", "floor")),
                       (Constant, ("task", "recall")))
    for name in names
]  # fmt: skip
USUAL = {"lr": 1e-2, "gamma": 10.0, "weight_decay": 0.01}


def keywords(setting, value):
    """Arguments of a constructor of `Hyperparameters`, with one of them as given."""
    cls, name = setting
    found = {**USUAL, "annealing": cls(**{name: value}) if cls else Constant(1.0, 0.5), "betas": (0.9, 0.999)}
    if name in ("beta1", "beta2"):
        found["betas"] = (value, 0.999) if name == "beta1" else (0.9, value)
    elif cls is None:
        found[name] = value
    return found


def by_core(setting, value):
    hp = Hyperparameters(**keywords(setting, value))
    settled = [*hp.betas, hp.lr, hp.eps, hp.weight_decay, hp.gamma]
    assert all(type(x) in (int, float) for x in settled)
    c = [coefficients(t, hp, anchored=on) for t in (1, 3, 300) for on in (True, False)]
    return np.array(c, dtype=np.float64)


def by_torch(setting, value):
    import torch

    from recadam_torch import RecAdam as TorchRecAdam

    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = TorchRecAdam([("p", p)], anchors={"p": torch.tensor([0.5, 3.0])}, **keywords(setting, value))
    for t in range(2):
        p.grad = torch.tensor([0.1, -0.7]) * (t + 1)
        optimizer.step()
    return p.detach().numpy()


def by_jax(setting, value):
    import jax.numpy as jnp

    from recadam_jax import recadam

    given = keywords(setting, value)
    given["b1"], given["b2"] = given.pop("betas")
    tx = recadam(given.pop("lr"), anchor=jnp.array([0.5, 3.0]), **given)
    params = jnp.array([1.0, -2.0])
    state = tx.init(params)
    for t in range(2):
        updates, state = tx.update(jnp.array([0.1, -0.7]) * (t + 1), state, params)
        params = params + updates
    return np.asarray(params)


def outcome(make, setting, value):
    """The numbers, or the class of what is raised; always in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InstabilityWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's own, as of a cast that overflows
        try:
            return make(setting, value)
        except RecAdamError as error:
            refused = str(error)
    assert "\n" not in refused
    assert len(refused) < 400
    return RecAdamError


def kinds(make):
    """Real kinds and others; those of a library that is here, for its own constructor and for core."""
    found = [(REAL, OTHER)]
    found += [of_torch()] if make is not by_jax and find_spec("torch") else []
    found += [of_jax()] if make is not by_torch and find_spec("jax") else []
    return {k: v for real, _ in found for k, v in real.items()}, {
        k: v for _, other in found for k, v in other.items()
    }


@pytest.mark.parametrize(
    "make",
    [
        by_core,
        pytest.param(by_torch, marks=pytest.mark.needs("torch")),
        pytest.param(by_jax, marks=pytest.mark.needs("jax")),
    ],
)
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(data=st.data(), setting=st.sampled_from(SETTINGS), x=VALUES)
def test_a_setting_is_refused_in_one_line_or_is_python_s_number(make, data, setting, x):
    """Bit for bit that of `float(x)`; what is no real number is always refused."""
    real, other = kinds(make)
    kind = data.draw(st.sampled_from([*real, *other]))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = (real.get(kind) or other[kind])(x)
    found = outcome(make, setting, value)
    # PyTorch takes a tensor for the learning rate alone, and that with a gradient, too.
    if make is by_torch and kind.startswith("torch"):
        if kind == "torch gradient" and setting == (None, "lr"):
            return
        if setting in [(None, name) for name in HP[1:]]:
            assert found is RecAdamError
            return
    if kind in other:
        assert found is RecAdamError, (kind, value)
        return
    expected = outcome(make, setting, float(value))
    if expected is RecAdamError or found is RecAdamError:
        assert found is expected, (kind, value)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", [*REAL, *OTHER])
def test_a_number_becomes_python_s_when_it_is_made(kind):
    value = (REAL.get(kind) or OTHER[kind])(0.5 if kind not in ("int", "int64", "uint8") else 3)
    if kind in OTHER:
        with pytest.raises(RecAdamError, match="give a finite number"):
            Sigmoid(t0=value)
        return
    t0 = Sigmoid(t0=value).t0
    assert type(t0) in (int, float)
    assert t0 == float(value)


# Where the numbers end.


def test_a_proximal_step_is_right_for_any_strength():
    """p / (1 + p) is 1 at infinity, and what is divided by 1 + p is nothing."""
    for lr, gamma in ((1e10, 1e300), (1e308, 1.7e308), (1.0, 1e308), (1.0, 1e17), (1e-300, 1e308)):
        hp = Hyperparameters(lr=lr, gamma=gamma, annealing=Constant(), form="proximal")
        c = coefficients(1, hp)
        p = lr * gamma
        assert c.pull == pytest.approx(1.0 if p > 1e15 else p / (1 + p), rel=1e-15)
        assert 0 <= c.step <= 1e10 * 32
        assert math.isfinite(c.step)
    theta, anchor = np.array([1.0, 2.0]), np.array([5.0, -7.0])
    hp = Hyperparameters(lr=1e10, gamma=1e300, annealing=Constant(), form="proximal")
    delta, _ = update(theta, np.ones(2), Moments.zeros_like(theta), anchor, coefficients(1, hp))
    np.testing.assert_array_equal(theta + delta, anchor)


@pytest.mark.parametrize("form", ["decoupled", "released", "proximal"])
def test_no_recall_is_no_pull_however_strong(form):
    hp = Hyperparameters(lr=1e10, gamma=1e300, annealing=Constant(1, 0), form=form)
    c, plain = coefficients(1, hp), coefficients(1, hp.replace(gamma=0.0))
    assert c == plain
    assert c.pull == 0.0


@pytest.mark.needs("jax")
@pytest.mark.parametrize("form", ["decoupled", "released"])
def test_jax_knows_a_pull_without_recall_and_a_decay_without_anchors(form):
    from recadam_jax import recadam

    params = {"w": np.ones(2, np.float32)}
    recadam(1e10, gamma=1e300, annealing=Constant(1, 0), form=form).init(params)
    with pytest.raises(RecAdamError, match=r"step 1: lr \* weight_decay = 2000 diverges \(2 or more\)"):
        recadam(1.0, weight_decay=2000.0, gamma=0.0, form=form, anchor_mask=False).init(params)
    recadam(1e-3, gamma=1e9, form=form, anchor_mask=False).init(params)  # what nothing is pulled by


@pytest.mark.parametrize("form", ["decoupled", "released", "proximal"])
def test_a_decay_that_diverges_is_refused_as_a_pull_is(form):
    hp = Hyperparameters(lr=1.0, gamma=0.0, form=form)
    for decay in (2.0, 2000.0, 1e308):
        with pytest.raises(RecAdamError, match=r"step 3: lr \* weight_decay = .* diverges \(2 or more\)"):
            coefficients(3, hp.replace(weight_decay=decay), anchored=False)
    with pytest.warns(InstabilityWarning, match=r"weight_decay is above 1: every step overshoots zero"):
        coefficients(3, hp.replace(weight_decay=1.5), anchored=False)
    assert coefficients(3, hp.replace(weight_decay=1.0), anchored=False).decay == 1.0
    with pytest.raises(RecAdamError, match="diverges"):
        coefficients(1, hp.replace(lr=1e200, weight_decay=1e200))


def test_a_pull_and_a_decay_that_diverge_together_are_refused():
    hp = Hyperparameters(lr=1.0, gamma=0.9, weight_decay=0.9, annealing=Constant())
    with pytest.warns(InstabilityWarning, match="overshoots its goal"):
        coefficients(1, hp)
    with pytest.raises(RecAdamError, match=r"lr \* \(gamma \* recall \+ weight_decay\) = 2.4 diverges"):
        coefficients(1, hp.replace(gamma=1.2, weight_decay=1.2))
    # Where the pull damps the decay, it may be larger.
    proximal = hp.replace(form="proximal", gamma=3.0, weight_decay=4.9)
    with pytest.warns(InstabilityWarning):
        c = coefficients(1, proximal)
    assert abs(1 - c.pull - c.decay) < 1
    with pytest.raises(RecAdamError, match=r"diverges \(5 or more\)"):
        coefficients(1, proximal.replace(weight_decay=5.0))


@given(
    pull=st.floats(0, 4), decay=st.floats(0, 4), form=st.sampled_from(["decoupled", "released", "proximal"])
)
def test_what_is_not_refused_comes_home(pull, decay, form):
    """Without a gradient, the distance to where pull and decay lead does not grow."""
    hp = Hyperparameters(lr=1.0, gamma=pull, weight_decay=decay, annealing=Constant(), form=form)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InstabilityWarning)
        try:
            c = coefficients(1, hp)
        except RecAdamError:
            return
    assert abs(1 - c.pull - c.decay) <= 1


def test_coefficients_beyond_the_range_of_numbers_are_refused():
    hp = Hyperparameters(lr=1e308, betas=(0.0, 0.999), gamma=0.0, annealing=Constant(1e10, 0.0))
    with pytest.raises(RecAdamError, match="beyond the range of numbers"):
        coefficients(5, hp)


@pytest.mark.parametrize("t", [0, -1, 0.5, math.nan, math.inf, "1", None, True, 1j, np.array([1, 2])])
def test_a_step_that_is_none_is_refused(t):
    with pytest.raises(RecAdamError, match="coefficients: t is"):
        coefficients(t, Hyperparameters())


def test_any_kind_of_step_gives_the_same_coefficients():
    hp = Hyperparameters(annealing=Sigmoid(k=0.1, t0=5))
    for t in (np.int32(7), np.float32(7), np.array(7), 7.0):
        assert coefficients(t, hp) == coefficients(7, hp)
        assert {type(x) for x in coefficients(t, hp)} == {float}


@pytest.mark.parametrize("lr", [np.float16(2e-5), np.float32(2e-5), np.float64(2e-5)])
def test_a_rate_in_few_bits_lowers_no_coefficient(lr):
    """The rate is `float(lr)`; what is made of it has 64 bits."""
    hp = Hyperparameters(lr=lr, annealing=Constant())
    assert coefficients(1, hp) == coefficients(1, Hyperparameters(lr=float(lr), annealing=Constant()))
    assert coefficients(1, hp).step > 0
    assert coefficients(1, Hyperparameters(annealing=Constant()), lr) == coefficients(1, hp)


def test_numpy_s_settings_step_any_library_s_arrays():
    """array-api-strict takes Python's numbers alone."""
    strict = pytest.importorskip("array_api_strict")
    found = []
    for number in (float, np.float64, np.float32):
        x = {name: number(value) for name, value in (("lr", 0.125), ("gamma", 2.0), ("weight_decay", 0.5))}
        opt = RecAdam(Hyperparameters(annealing=Sigmoid(k=number(0.5), t0=number(4)), **x))
        params = {"w": strict.asarray([1.0, -2.0])}
        state = opt.init(params, {"w": strict.asarray([0.5, 1.0])})
        for _ in range(3):
            params, state = opt.step(params, {"w": strict.asarray([0.3, 0.1])}, state, lr=number(0.25))
        found.append(np.asarray(params["w"]))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


# Annealings, and what is made of them.


@pytest.mark.parametrize(
    "weights",
    [(math.nan, 1.0), (1.0, math.inf), (-1.0, 1.0), (1.0, -1e-9), None, 0.5, (1.0,), (1.0, 1.0, 1.0),
     ("1", 1.0), (None, None), (True, 1.0), (np.ones(2), 1.0), "ab", {1, 2}],
    ids=str,
)  # fmt: skip
def test_weights_that_are_none_are_refused(weights):
    class Given:
        def weights(self, t, xp=None):
            return weights

    with pytest.raises(RecAdamError, match="Given") as caught:
        annealed_weights(Given(), 3)
    assert "\n" not in str(caught.value)
    opt = RecAdam(Hyperparameters(annealing=Given()))
    params = {"w": np.ones(2)}
    state = opt.init(params, params)
    with pytest.raises(RecAdamError, match="Given"):
        opt.step(params, params, state)


@pytest.mark.parametrize(
    "fields", [None, "sigmoid", 3, [], {}, {"name": 3}, {"name": ["sigmoid"]}, {"name": "linear", "k": 1}]
)
def test_an_annealing_is_read_from_a_dict_of_its_fields_alone(fields):
    with pytest.raises(RecAdamError):
        annealing_from_dict(fields)


@pytest.mark.parametrize("values", [None, [], "lr", {"betas": 0.9}, {"annealing": "sigmoid"}, {3: 1}])
def test_hyperparameters_are_read_from_a_dict_of_them_alone(values):
    with pytest.raises(RecAdamError):
        Hyperparameters.from_dict(values)


@pytest.mark.parametrize("annealing", [None, "sigmoid", Sigmoid, 0.5, {"name": "sigmoid"}, object()])
def test_what_is_no_annealing_is_refused(annealing):
    with pytest.raises(RecAdamError, match="annealing is"):
        Hyperparameters(annealing=annealing)


@pytest.mark.parametrize("step", ["a", -1, 0, True, 2.5])
def test_a_release_step_that_is_none_is_refused_when_it_is_given(step):
    class Given:
        def weights(self, t, xp=None):
            return 1.0, 1.0

        def release_step(self):
            return step

    with pytest.raises(RecAdamError, match=r"Given: release_step gives .*; have it give a step from 1"):
        RecAdam(Hyperparameters(annealing=Given()))


@pytest.mark.parametrize("form", ["proximal", "released"])
def test_a_state_with_importances_is_stepped_in_the_form_that_takes_them(form):
    params = {"w": np.zeros(2)}
    hp = Hyperparameters(lr=0.01, gamma=1.0)
    state = RecAdam(hp).init(params, params, params)
    with pytest.raises(RecAdamError, match="importance needs form='decoupled'"):
        RecAdam(hp.replace(form=form)).step(params, params, state)


class OfTheStep:
    def weights(self, t):
        return 1.0, 1.0


class OfTheNamespaceByName:
    def weights(self, t, *, xp=None):
        return 1.0, 1.0


@pytest.mark.parametrize("annealing", [OfTheStep(), OfTheNamespaceByName()])
def test_an_annealing_that_cannot_be_called_as_one_is_refused_when_it_is_given(annealing):
    with pytest.raises(
        RecAdamError, match=r"takes other arguments; define it as weights\(self, t, xp=None\)"
    ):
        Hyperparameters(annealing=annealing)


@pytest.mark.parametrize("flag", ["False", 0, 1, None, np.array(True), [True]])
def test_a_flag_is_true_or_false(flag):
    with pytest.raises(RecAdamError, match=r"bias_correction is .*; give True or False"):
        Hyperparameters(bias_correction=flag)
    assert Hyperparameters(bias_correction=np.bool_(False)).bias_correction is False


def test_a_budget_s_gain_may_be_any_number():
    control = DriftBudget(0.5, gain=2000)
    assert (control(1000.0, 5.0), control(1000.0, 0.0)) == (control.high, control.low)
    assert DriftBudget(np.float32(0.5), gain=1e308)(0.0, 1e308) == 1.0
    for gamma in (-1.0, math.nan, "1", None):
        with pytest.raises(RecAdamError, match="gamma is"):
            control(gamma, 0.5)
    for figure in (-1.0, math.nan, math.inf, None, "1"):
        with pytest.raises(RecAdamError, match="figure is"):
            control(1.0, figure)


def test_a_strength_beyond_the_range_of_numbers_is_refused():
    with pytest.raises(RecAdamError, match=r"gamma_for: pull / lr is inf"):
        gamma_for(5e-324, pull=1.0)
    assert gamma_for(np.float32(0.5), pull=np.int8(1)) == 2.0
    assert gamma_for(1.0, half_life=1e-320) == 1.0


def test_messages_stay_in_one_short_line():
    class Wordy:
        def __repr__(self):
            return "\n".join(["a line"] * 100)

    class Broken:
        def __repr__(self):
            raise RuntimeError

    for wrong in (Wordy(), Broken(), "x\ny" * 1000, 10**5000, np.zeros((50, 50))):
        for make in (
            lambda x: check_number("here", "x", x),
            lambda x: Hyperparameters(form=x),
            lambda x: Hyperparameters(annealing=x),
            lambda x: Hyperparameters(betas=x),
            lambda x: Hyperparameters(bias_correction=x),
        ):
            with pytest.raises(RecAdamError) as caught:
                make(wrong)
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 250
