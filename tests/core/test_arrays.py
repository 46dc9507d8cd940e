"""What may be stepped: all else is refused in one line, wherever it is given, and nothing is changed."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import array_api_strict as strict
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("jax")
pytest.importorskip("numba")

import jax
import jax.numpy as jnp
import ml_dtypes

from recadam_core import (
    Coefficients,
    Constant,
    Hyperparameters,
    Moments,
    RecAdam,
    RecAdamError,
    State,
    apply,
    coefficients,
    get_backend,
    importance_from,
    update,
)
from recadam_numpy import NumpyBackend, kernel
from recadam_numpy.one_pass import one_pass

torch = importlib.import_module("torch") if find_spec("torch") else None

W = np.array([[0.5, 1.0], [0.25, 0.0]])
HP = Hyperparameters(lr=1e-2, gamma=10.0, annealing=Constant(1.0, 1.0))
C = coefficients(1, HP)


def zeros():
    return Moments(np.zeros_like(W), np.zeros_like(W))


def state():
    return State(0, {"w": zeros()}, {"w": W.copy()}, {"w": W.copy()})


PLACES = {
    "init: parameter": lambda x: RecAdam(HP).init({"w": x}, {}),
    "init: anchor": lambda x: RecAdam(HP).init({"w": W}, {"w": x}),
    "init: importance": lambda x: RecAdam(HP).init({"w": W}, {"w": W}, {"w": x}),
    "step: parameter": lambda x: RecAdam(HP).step({"w": x}, {"w": W}, state()),
    "step: gradient": lambda x: RecAdam(HP).step({"w": W}, {"w": x}, state()),
    "step: m": lambda x: RecAdam(HP).step({"w": W}, {"w": W}, state()._replace(moments={"w": Moments(x, W)})),
    "step: v": lambda x: RecAdam(HP).step({"w": W}, {"w": W}, state()._replace(moments={"w": Moments(W, x)})),
    "step: anchor": lambda x: RecAdam(HP).step({"w": W}, {"w": W}, state()._replace(anchors={"w": x})),
    "step: importance": lambda x: RecAdam(HP).step({"w": W}, {"w": W}, state()._replace(importance={"w": x})),
    "update: theta": lambda x: update(x, W, zeros(), W, C),
    "update: grad": lambda x: update(W, x, zeros(), W, C),
    "update: m": lambda x: update(W, W, Moments(x, W), W, C),
    "update: anchor": lambda x: update(W, W, zeros(), x, C),
    "apply: theta": lambda x: apply(x, W),
    "apply: delta": lambda x: apply(W, x),
    "Moments": lambda x: Moments.zeros_like(x),
    "importance_from": lambda x: importance_from({"w": x}),
    "NumpyBackend: theta": lambda x: NumpyBackend().step([x], [W], [zeros()], [W], C),
    "NumpyBackend: grad": lambda x: NumpyBackend().step([W], [x], [zeros()], [W], C),
    "NumpyBackend: v": lambda x: NumpyBackend(fused=True).step([W], [W], [Moments(W, x)], [W], C),
    "NumpyBackend: anchor": lambda x: NumpyBackend(fused=True).step([W], [W], [zeros()], [x], C),
    "NumpyBackend: importance": lambda x: NumpyBackend().step([W], [W], [zeros()], [W], C, [x]),
    "kernel: grad": lambda x: kernel(W.copy(), x, *zeros(), W, C),
    "kernel: m": lambda x: kernel(W.copy(), W, x, np.zeros_like(W), W, C),
    "one_pass: theta": lambda x: one_pass([x], [W], *([m] for m in zeros()), [W], C),
    "one_pass: anchor": lambda x: one_pass([W.copy()], [W], *([m] for m in zeros()), [x], C),
}

NO_ARRAYS = {
    "a masked array": np.ma.array(W, mask=[[True, False], [False, False]]),
    "a masked array without a mask": np.ma.array(W),
    "a matrix": W.view(np.matrix),
    "a record array": W.view(np.recarray),
    "a subclass": W.view(type("Quantity", (np.ndarray,), {})),
    "structured": np.zeros((2, 2), [("a", "f8")]),
    "objects": W.astype(object),
    "integers": W.astype(int),
    "truth values": W.astype(bool),
    "complex": W.astype(complex),
    "text": W.astype(str),
    "times": W.astype("m8[s]"),
    "bfloat16 in NumPy": W.astype(ml_dtypes.bfloat16),
    "float8 in NumPy": W.astype(ml_dtypes.float8_e4m3fn),
    "a list": W.tolist(),
    "a number": 0.5,
    "a string": "w",
    "a class": np.ndarray,
    "of JAX, float8": jnp.asarray(W, jnp.float8_e4m3fn),
    "a key": jax.random.key(0),
}
OF_ANOTHER = {
    "of JAX": jnp.asarray(W),
    "of array-api-strict": strict.asarray(W),
}
if torch:
    NO_ARRAYS["of torch, float8"] = torch.tensor(W).to(torch.float8_e4m3fn)
    OF_ANOTHER["of torch"] = torch.tensor(W)
    NO_ARRAYS["of torch, sparse"] = torch.tensor(W).to_sparse()
ALONE = {"init: parameter", "Moments", "importance_from"}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_plain_array_of_this_library_is_refused(place):
    before = W.copy()
    for what, x in {**NO_ARRAYS, **({} if place in ALONE else OF_ANOTHER)}.items():
        with pytest.raises(RecAdamError) as caught:
            PLACES[place](x)
        assert "\n" not in str(caught.value), what
        assert "; give" in str(caught.value), what
    np.testing.assert_array_equal(W, before)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: RecAdam(HP).init({"w": W}, {"w": np.ma.array(W * np.nan, mask=True)}),
            "anchors: 'w' is MaskedArray, of which a step keeps the bare numbers; give a plain NumPy array, "
            "or leave the name out for a new head",
        ),
        pytest.param(
            lambda: RecAdam(HP).init({"a": W, "b": torch.ones(2)}, {}),
            "parameter 'b' is of torch beside arrays of numpy; give all of one library",
            marks=pytest.mark.needs("torch"),
        ),
        pytest.param(
            lambda: RecAdam(HP).step({"w": W}, {"w": torch.ones(2, 2)}, state()),
            "gradient of 'w' is of torch beside arrays of numpy; give all of one library",
            marks=pytest.mark.needs("torch"),
        ),
        pytest.param(
            lambda: RecAdam(HP).init({"w": torch.ones(2, dtype=torch.float8_e5m2)}, {}),
            "parameter 'w' has dtype torch.float8_e5m2; give a real floating array of 16 bits or more",
            marks=pytest.mark.needs("torch"),
        ),
        (lambda: RecAdam(HP).init({3: W}, {}), "parameters: the name 3 is no string; give one"),
        (lambda: RecAdam(HP).init({}, {}), "parameters: there is none; give a dict of arrays by name"),
        (
            lambda: RecAdam(HP, "numpy"),
            "RecAdam: backend is 'numpy'; give one, as get_backend('numpy'), or leave it out",
        ),
        pytest.param(
            lambda: RecAdam(HP, get_backend("numpy")).init({"w": torch.ones(2)}, {}),
            "parameter 'w' is none of the backend 'numpy'; give its arrays, or no backend",
            marks=pytest.mark.needs("torch"),
        ),
        (
            lambda: RecAdam(HP).step({"w": W}, {"w": W}, {"step": 0}),
            "state: dict; give what init or the step before returned",
        ),
        (
            lambda: RecAdam(HP).step({"w": W}, [W], state()),
            "gradients: list; give a dict of arrays by parameter name",
        ),
        (
            lambda: RecAdam(HP).step({"w": W}, {"w": W}, state()._replace(anchors=None)),
            "anchors in the state: NoneType; give a dict of arrays by parameter name",
        ),
        (
            lambda: RecAdam(HP).step({"w": W}, {"w": W}, state()._replace(moments={"w": (W, W)})),
            "moments of 'w': tuple; give Moments(m, v)",
        ),
        (
            lambda: RecAdam(HP).step({"w": W}, {"w": W}, state()._replace(importance={"v": W})),
            "importance of 'w' is missing in the state; give all, or none",
        ),
        (
            lambda: RecAdam(HP).step({"w": W}, {"w": W}, state()._replace(step="3")),
            "state: step is '3'; give a finite number >= 0",
        ),
        (
            lambda: RecAdam(HP).step({"w": W}, {"w": W}, state()._replace(step=2.5)),
            "state: step is 2.5; give a whole number, not traced",
        ),
        (
            lambda: update(W, W, (W, W), W, C),
            "update: state is tuple; give Moments(m, v)",
        ),
        (
            lambda: update(W, W, Moments(W, W[0]), W, C),
            "update: v has shape (2,), theta (2, 2); give equal shapes",
        ),
        (
            lambda: update(W, W, zeros(), W, C._replace(step=None)),
            "update: step is None; give a finite number",
        ),
        (lambda: update(W, W, zeros(), W, None), "update: c is None; give Coefficients"),
        (
            lambda: apply(W, W[0]),
            "apply: delta is float64 of shape (2,), theta float64 of (2, 2); give what update returned",
        ),
        (
            lambda: apply(W, W.astype(np.float32)),
            "apply: delta is float32 of shape (2, 2), theta float64 of (2, 2); give what update returned",
        ),
        (lambda: importance_from([W]), "importance: list; give a dict of arrays by parameter name"),
        (
            lambda: NumpyBackend().step([W], [W, W], [zeros()], [W], C),
            "NumpyBackend: lists of several lengths; give as many arrays of each",
        ),
        (
            lambda: NumpyBackend().step([W], [W[:1]], [zeros()], [W], C),
            "NumpyBackend: grad of 0 has shape (1, 2), theta (2, 2); give equal shapes",
        ),
        (
            lambda: NumpyBackend().step([W], [W], [zeros()], None, C),
            "NumpyBackend: pull is 0.1 but there are no anchors; give them",
        ),
    ],
)
def test_it_is_named_in_one_line(act, message):
    with pytest.raises(RecAdamError) as caught:
        act()
    assert str(caught.value) == message


def test_plain_numbers_in_any_memory_are_stepped_alike(tmp_path):
    """In a file, of other byte order, strided, read-only, or a scalar of NumPy."""
    mapped = np.memmap(tmp_path / "w", np.float64, "w+", shape=W.shape)
    mapped[:] = W
    frozen = W.copy()
    frozen.flags.writeable = False
    wanted = RecAdam(HP).step({"w": W}, {"w": W}, RecAdam(HP).init({"w": W}, {"w": W}))[0]["w"]
    for backend in (NumpyBackend(), NumpyBackend(fused=True), get_backend("array_api_compat.numpy")):
        for x in (mapped, frozen, W.astype(">f8"), np.repeat(W, 2, axis=1)[:, ::2], np.asfortranarray(W)):
            optimizer = RecAdam(HP, backend)
            new, _ = optimizer.step({"w": x}, {"w": x}, optimizer.init({"w": x}, {"w": x}))
            np.testing.assert_array_equal(new["w"], wanted)
            assert new["w"].dtype == x.dtype
        scalar = np.float64(0.5)
        new, _ = optimizer.step({"w": scalar}, {"w": scalar}, optimizer.init({"w": scalar}, {"w": scalar}))
        assert new["w"] == wanted[0, 0]


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.asarray, "torch", jnp.float32])
def test_scalars_of_any_library_are_their_numbers_to_the_kernel(kind):
    """Bit for bit: 1 - beta is taken of the number, not in the scalar's precision."""
    plain = Coefficients(0.9, 0.999, 1e-2, 1e-3, 0.25, 0.125)
    given = Coefficients(*map(torch.tensor if kind == "torch" else kind, plain))
    plain = Coefficients(*map(float, given))
    for xp in (np, strict):
        theta, grad, anchor = (
            xp.asarray(x * W, dtype=xp.float32) for x in (np.float32(1), np.float32(3), np.float32(2))
        )
        got, wanted = (update(theta, grad, Moments.zeros_like(theta), anchor, c) for c in (given, plain))
        for x, y in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    arrays = [W.astype(np.float32)], [W.astype(np.float32) * 3], [Moments.zeros_like(W.astype(np.float32))]
    got, wanted = (NumpyBackend().step(*arrays, [W * 2], c) for c in (given, plain))
    np.testing.assert_array_equal(got[0][0], wanted[0][0])


# Drawn.

NUMBERS = {
    "numpy": [
        lambda x: x,
        lambda x: x.astype(np.float32),
        lambda x: x.astype(np.float16),
        lambda x: x.astype(">f4"),
        lambda x: np.repeat(x[..., None], 2, axis=-1)[..., 0],
        lambda x: np.broadcast_to(x, x.shape),
        lambda x: x.astype(np.float32)[()],
    ],
    "strict": [lambda x: strict.asarray(x), lambda x: strict.asarray(x, dtype=strict.float32)],
    "jax": [lambda x, d=d: jnp.asarray(x, d) for d in (jnp.float32, jnp.bfloat16, jnp.float16)],
}
OTHERS = [
    lambda x: None,
    lambda x: x.tolist(),
    lambda x: np.ma.array(x),
    lambda x: x * np.nan,
    lambda x: x * 1j,
    lambda x: x.astype(int),
    lambda x: x.astype(object),
    lambda x: x.astype(ml_dtypes.bfloat16),
    lambda x: x[None],
    lambda x: jnp.asarray(x, jnp.float8_e5m2),
    *(makers[0] for makers in NUMBERS.values()),
]
RATES = [None, None, 1e-2, np.float16(0.02), jnp.float32(1e-3), np.nan, "1e-2", 3.0]
if torch:
    NUMBERS["torch"] = [
        lambda x, d=d: torch.tensor(x, dtype=d) for d in (torch.float64, torch.float32, torch.bfloat16)
    ]
    OTHERS += [lambda x: torch.tensor(x * 1j), NUMBERS["torch"][0]]
    RATES.append(torch.tensor(3e-2))
BACKENDS = [None, NumpyBackend(), NumpyBackend(fused=True), NumpyBackend(fused=True, in_place=True)]


@st.composite
def draws(draw):
    """Parameters, gradients, anchors, importances, which state is stepped, a learning rate and a backend."""
    library = draw(st.sampled_from(list(NUMBERS)))
    odd = draw(
        st.sampled_from(["", "", "", "parameter", "gradient", "anchor", "importance", "m", "v", "star"])
    )
    rng = np.random.default_rng(draw(st.integers(0, 9)))

    def array(what, shape):
        maker = draw(st.sampled_from(OTHERS if what == odd else NUMBERS[library]))
        return maker(np.asarray(rng.random(shape)))

    shapes = {n: draw(st.sampled_from([(), (0,), (3,), (2, 2)])) for n in draw(st.sampled_from(["a", "ab"]))}
    params, grads = ({n: array(what, s) for n, s in shapes.items()} for what in ("parameter", "gradient"))
    anchored = [n for n in shapes if draw(st.booleans())]
    anchors = {n: array("anchor", shapes[n]) for n in anchored}
    weighs = draw(st.integers(0, 3)) == 0
    importance = {n: array("importance", shapes[n]) for n in anchored} if weighs else None
    changes = {n: {k: array(k, s) for k in ("m", "v", "star") if k == odd} for n, s in shapes.items()}
    lr = draw(st.sampled_from(RATES))
    backend = draw(st.sampled_from(BACKENDS if library == "numpy" else [None] * 7 + BACKENDS[1:2]))
    if draw(st.integers(0, 5)) == 0 and len(shapes) == 2:  # two names, one memory
        params["b"] = params["a"]
    return params, grads, anchors, importance, changes, lr, backend


def told(x):
    """A copy in NumPy, of anything."""
    if torch and isinstance(x, torch.Tensor):
        x = x.to(torch.complex128 if x.is_complex() else torch.float64).numpy()
    if isinstance(x, jax.Array) and x.dtype.itemsize < 4:
        x = x.astype(jnp.float32)
    return np.array(x, copy=True)


def everything(*parts):
    """Copies of all arrays in dicts and states."""
    return [told(x) for part in parts for x in jax.tree.leaves(part, is_leaf=lambda x: isinstance(x, list))]


def kept(x):
    if isinstance(x, dict):
        return {name: kept(y) for name, y in x.items()}
    return x.copy() if isinstance(x, np.ndarray) else x


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(draws())
def test_any_draw_is_refused_unchanged_or_stepped_as_the_specification_has_it(drawn):
    params, grads, anchors, importance, changes, lr, backend = drawn
    held = everything(params, grads, anchors, importance, changes)
    # One that steps in place writes into NumPy's arrays; others stay.
    start, given = ({n: kept(x) for n, x in arrays.items()} for arrays in (params, changes))
    optimizer, state, before, refused = RecAdam(HP, backend), None, [], ""
    try:
        state = optimizer.init(params, anchors, importance)
        for n, change in changes.items():
            if n in state.anchors and "star" in change:
                state.anchors[n] = change["star"]
            pair = state.moments[n]
            state.moments[n] = Moments(change.get("m", pair.m), change.get("v", pair.v))
        before = everything(state)
        new, new_state = optimizer.step(params, grads, state, lr)
    except RecAdamError as error:
        refused = str(error)
    if refused or backend is not BACKENDS[3]:
        np.testing.assert_equal(everything(params, grads, anchors, importance, changes), held)
        np.testing.assert_equal(everything(state) if before else [], before)
    if refused:
        assert "\n" not in refused
        return
    assert new_state.step == 1
    for n, theta in start.items():
        change = given.get(n, {})
        summed = [theta, *(change[k] for k in "mv" if k in change)]  # in the widest of these
        inner = np.float64 if any("64" in str(y.dtype) for y in summed) else np.float32
        x, g, star, weight = (
            None if y is None else told(y).astype(inner)
            for y in (theta, grads[n], anchors.get(n), (importance or {}).get(n))
        )
        star = told(change["star"]).astype(inner) if star is not None and "star" in change else star
        m, v = (told(change[k]).astype(inner) if k in change else np.zeros_like(x) for k in "mv")
        delta, _ = update(x, g, Moments(m, v), star, coefficients(1, HP, lr, n in anchors), weight)
        exact = isinstance(theta, np.ndarray | np.generic | strict._array_object.Array)
        wanted = apply(told(theta), delta) if exact else apply(x, delta)
        digits = 0 if exact else {2: 2.0**-8, 4: 1e-6, 8: 1e-15}[theta.dtype.itemsize]
        np.testing.assert_allclose(told(new[n]).astype(inner), wanted.astype(inner), rtol=digits, atol=digits)
