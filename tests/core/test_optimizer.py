from __future__ import annotations

import numpy as np
import pytest

from recadam_core import Constant, Hyperparameters, Linear, RecAdam, RecAdamError, State, get_backend

BACKENDS = ["numpy", "torch", "jax"]
HP = Hyperparameters(lr=1e-2, gamma=10.0, annealing=Linear(t0=5))


def start(backend, dtype="float32"):
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((3, 2)), "b": rng.standard_normal(2), "head": rng.standard_normal(2)}
    return {n: backend.from_numpy(x.astype(dtype)) for n, x in arrays.items()}


@pytest.mark.parametrize("name", BACKENDS)
def test_init_and_step_are_pure_and_resumable(name):
    backend = get_backend(name)
    params = start(backend)
    before = {n: backend.to_numpy(x) for n, x in params.items()}
    anchors = {n: params[n] for n in ("w", "b")}
    optimizer = RecAdam(HP)
    state = optimizer.init(params, anchors)
    for _ in range(3):
        new, new_state = optimizer.step(params, params, state, lr=5e-3)
        again, _ = optimizer.step(params, params, state, lr=5e-3)
        for n in params:
            np.testing.assert_array_equal(backend.to_numpy(new[n]), backend.to_numpy(again[n]))
    for n, x in before.items():
        np.testing.assert_array_equal(backend.to_numpy(params[n]), x)
        assert not np.array_equal(backend.to_numpy(new[n]), x)
    assert (state.step, new_state.step) == (0, 1)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_anchor_is_a_copy(name):
    backend = get_backend(name)
    params = start(backend)
    state = RecAdam(HP).init(params, {"w": params["w"]})
    kept = backend.to_numpy(state.anchors["w"])
    if name != "jax":  # whose arrays cannot be changed
        params["w"] += 1
    np.testing.assert_array_equal(backend.to_numpy(state.anchors["w"]), kept)


def test_the_anchor_is_freed_at_its_release_and_no_bit_changes():
    backend = get_backend("numpy")
    params = start(backend)
    optimizer = RecAdam(HP)
    state = optimizer.init(params, {"w": params["w"]})
    anchors = dict(state.anchors)
    kept_params, kept_state = params, state
    for t in range(1, 10):
        params, state = optimizer.step(params, params, state)
        kept_params, kept_state = optimizer.step(kept_params, kept_params, kept_state)
        kept_state = State(kept_state.step, kept_state.moments, anchors)  # never freed
        assert (state.anchors["w"] is None) == (t >= 5)
        np.testing.assert_array_equal(params["w"], kept_params["w"])


def test_a_pull_that_comes_back_finds_its_anchor():
    class Returning:
        def weights(self, t, xp=None):
            return 0.0, 0.0 if t < 3 else 1.0

    optimizer = RecAdam(Hyperparameters(lr=0.1, gamma=1.0, annealing=Returning()))
    params = {"w": np.ones(1)}
    state = optimizer.init(params, {"w": np.zeros(1)})
    for expected in (1.0, 1.0, 0.9, 0.81):
        params, state = optimizer.step(params, {"w": np.ones(1)}, state)
        assert params["w"][0] == pytest.approx(expected, rel=1e-14)


def test_a_pull_after_the_anchor_was_freed_is_refused():
    params = {"w": np.ones(1)}
    freed = RecAdam(HP).init(params, params)._replace(anchors={"w": None})
    with pytest.raises(RecAdamError, match="step 1: the anchor was freed, but the annealing pulls again"):
        RecAdam(HP).step(params, params, freed)


@pytest.mark.parametrize("name", BACKENDS)
def test_sixteen_bit_parameters_have_float32_moments(name):
    backend = get_backend(name)
    params = start(backend, "float16")
    optimizer = RecAdam(HP)
    new, state = optimizer.step(params, params, optimizer.init(params, params))
    assert "float16" in str(new["w"].dtype)
    assert "float32" in str(state.moments["w"].m.dtype)


def test_a_head_takes_plain_adam_whatever_the_annealing():
    head = {"head": np.ones(2)}
    grads = {"head": np.array([0.5, -3.0])}
    results = []
    for annealing in (Linear(5), Constant(0.1, 1.0)):
        optimizer = RecAdam(HP.replace(annealing=annealing))
        new, _ = optimizer.step(head, grads, optimizer.init(head, {}))
        results.append(new["head"])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_allclose(results[0], [0.99, 1.01], rtol=1e-9)


W = np.ones((2, 2))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda o: o.init({"w.weight": W}, {"w.wieght": W}),
            "anchors: 'w.wieght' matches no parameter; the nearest is 'w.weight'; rename it or leave it out",
        ),
        (
            lambda o: o.init({"w": W}, {"w": W[0]}),
            "anchors: 'w' has shape (2,), its parameter (2, 2); give the pretrained array of that parameter, "
            "or leave the name out for a new head",
        ),
        (
            lambda o: o.init({"w": W.astype(int)}, {}),
            "parameter 'w' has dtype int64; give a real floating array of 16 bits or more",
        ),
        (lambda o: o.init({"w": [1.0]}, {}), "parameter 'w' is list; give an array"),
        (lambda o: o.init([W], {}), "parameters: list; give a dict of arrays by parameter name"),
        (lambda o: o.init({"w": W}, [W]), "anchors: list; give a dict of arrays by parameter name"),
        (
            lambda o: o.init({"w": W}, {"w": None}),
            "anchors: 'w' is None; give an array, or leave the name out for a new head",
        ),
        (
            lambda o: o.init({"w": W}, {"w": W * np.nan}),
            "anchor 'w' holds NaN or infinity; give the pretrained values",
        ),
        (
            lambda o: RecAdam({"w": W}),
            "RecAdam: hp is dict; give Hyperparameters, and arrays to init",
        ),
        (
            lambda o: o.step({"w": W}, {}, o.init({"w": W}, {})),
            "parameter 'w' has no gradient; give one, or leave it out of params",
        ),
        (
            lambda o: o.step({"w": W}, {"w": W, "x": W}, o.init({"w": W}, {})),
            "gradient 'x' matches no parameter; leave it out",
        ),
        (
            lambda o: o.step({"w": W}, {"w": W[0]}, o.init({"w": W}, {})),
            "gradient of 'w' has shape (2,), its parameter (2, 2); give the gradient of that parameter",
        ),
        (
            lambda o: o.step({"w": W}, {"w": W}, o.init({"v": W}, {})),
            "parameter 'w' has no state; call init with it",
        ),
    ],
)
def test_bad_input_is_named_in_one_line(act, message):
    with pytest.raises(RecAdamError) as caught:
        act(RecAdam(HP))
    assert str(caught.value) == message
