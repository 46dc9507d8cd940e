"""NumPy's one pass over memory: the bits of the loop form, on any number of threads, or an error."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import os
import warnings

import numpy as np
import pytest

from recadam_core import Coefficients, Constant, Hyperparameters, RecAdam, RecAdamError, Sigmoid
from recadam_numpy import NumpyBackend, kernel

pytest.importorskip("numba")

from recadam_numpy.one_pass import COLUMNS, LEAST, Table, one_pass

SETTINGS = {"lr": 1e-2, "gamma": 10.0, "annealing": Constant(0.5, 0.5)}
C = Coefficients(0.9, 0.999, 0.01, 1e-8, 0.1, 0.0)


def one_thread(function, pointer, workers):
    """A team that gives fewer threads than were asked for."""
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(pointer)


def torch_threads():
    import torch

    from recadam_torch.kernels.numba import torch_team

    torch.ones(10**6).add_(1)  # wakes torch's threads, if there are any
    return torch_team()


TEAMS = {"pool": lambda: None, "torch": torch_threads, "fewer": lambda: one_thread}


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("team", ["pool", "torch", "fewer"])
def test_any_number_of_threads_shares_the_work_out(workers, team):
    sizes = [3, 0, 5 * LEAST + 17, 1, LEAST - 1, 0, 4 * LEAST, 2]
    rng = np.random.default_rng(0)
    columns = [[rng.standard_normal(n) for n in sizes] for _ in COLUMNS]
    columns[3] = [abs(x) for x in columns[3]]
    expected = [[x.copy() for x in xs] for xs in columns]
    c = Coefficients(0.9, 0.999, 1e-3, 1e-8, 0.25, 0.01)
    table = Table(sizes, ["float64"] * 6, workers)
    table.addresses[:] = [[x.ctypes.data for x in xs] for xs in columns]
    table.run(c, True, TEAMS[team](), weighs=True)
    for i in range(len(sizes)):
        *arrays, importance = (xs[i] for xs in expected)
        kernel(*arrays, c, importance)
    for name, xs, ys in zip(COLUMNS, columns, expected, strict=True):
        for x, y in zip(xs, ys, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own():
    table = Table([4 * LEAST], ["float32"] * 6, 2)
    held = [np.ones(4 * LEAST, dtype=np.float32) for _ in COLUMNS]
    table.addresses[:, 0] = [x.ctypes.data for x in held]
    c = Coefficients(0.9, 0.999, 1e-3, 1e-8, 0.25, 0.0)
    table.run(c, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking with threads, which is the point
        child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            table.run(c, True)
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_numpy_steps_in_place_when_it_may():
    hp = Hyperparameters(lr=1e-2, gamma=10.0, annealing=Sigmoid(k=0.5, t0=6.0))
    rng = np.random.default_rng(0)
    start = {"w": rng.standard_normal((40, 50)).astype(np.float32), "head": rng.standard_normal(3)}
    anchors = {"w": start["w"]}
    plain, placed = RecAdam(hp, NumpyBackend()), RecAdam(hp, NumpyBackend(fused=True, in_place=True))
    params, mine = dict(start), {name: x.copy() for name, x in start.items()}
    memory = {name: x.ctypes.data for name, x in mine.items()}
    state, own = plain.init(params, anchors), placed.init(mine, anchors)
    for t in range(60):
        grads = {name: rng.standard_normal(x.shape).astype(x.dtype) for name, x in start.items()}
        params, state = plain.step(params, grads, state)
        mine, own = placed.step(mine, grads, own)
        for name in start:
            np.testing.assert_array_equal(mine[name], params[name], err_msg=f"{name} at {t}")
            np.testing.assert_array_equal(own.moments[name].v, state.moments[name].v)
    assert {name: x.ctypes.data for name, x in mine.items()} == memory


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("part", ["moments", "anchor"])
def test_a_state_of_another_shape(part, fused):
    opt = RecAdam(Hyperparameters(**SETTINGS), NumpyBackend(fused=fused))
    params = {"w": np.ones(8, np.float32)}
    whole, small = opt.init(params, params), opt.init({"w": np.ones(4)}, {"w": np.ones(4)})
    changed = {"moments": small.moments} if part == "moments" else {"anchors": small.anchors}
    state = whole._replace(**changed) if hasattr(whole, "_replace") else dataclasses.replace(whole, **changed)
    with pytest.raises(
        RecAdamError, match=rf"^{part} of 'w' in the state: shape \(4,\), its parameter \(8,\)"
    ):
        opt.step(params, params, state)


@pytest.mark.parametrize(
    ("column", "array", "message"),
    [
        (1, np.ones(2), r"one_pass: grad 0 is float64 of shape \(2,\), theta float64 of \(3,\)"),
        (2, np.ones(3, np.float32), "one_pass: m 0 is float32"),
        (4, np.ones(4), "one_pass: anchor 0 is float64"),
        (3, np.ones(6)[::2], "one_pass: v 0 is read-only, not in C order"),
        (0, np.broadcast_to(np.ones(1), 3), "one_pass: theta 0 is read-only"),
    ],
)
def test_arrays_that_one_pass_cannot_walk(column, array, message):
    columns = [[np.ones(3)] for _ in range(5)]
    columns[column] = [array]
    with pytest.raises(RecAdamError, match=message):
        one_pass(*columns, C)
    if column != 3:
        assert columns[3][0].tolist() == [1.0, 1.0, 1.0]


def test_numpy_pulls_in_place_when_it_may():
    rng = np.random.default_rng(0)
    dtypes = (np.float32, np.float64, np.float16, np.float32)
    shapes = ((40, 50), (3,), (7,), (200, 300))
    made = [[rng.random(s).astype(d) for s, d in zip(shapes, dtypes, strict=True)] for _ in range(3)]
    params, anchors, importances = made
    params[0] = np.asfortranarray(params[0])  # which is stepped in a copy
    placed = NumpyBackend(fused=True, in_place=True)
    for weights in (None, importances):
        wanted = [x.copy() for x in params]
        mine = [x.copy(order="K") for x in params]
        for _ in range(3):
            wanted = NumpyBackend().pull(wanted, anchors, 0.1, weights)
            pulled = placed.pull(mine, anchors, 0.1, weights)
            for old, x, y in zip(mine, pulled, wanted, strict=True):
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y)
                assert np.shares_memory(old, x) == (old.flags.c_contiguous and old.itemsize >= 4)
            mine = pulled


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("read-only", "theta of '1' is read-only; give a copy, or leave in_place out"),
        ("shared", "NumpyBackend: theta of 1 and anchor of 0 share memory; give a copy of one"),
        ("shape", r"anchor of '1' has shape \(3,\), theta \(4,\); give equal shapes"),
        ("dtype", "anchor of '1' has dtype int64; give a real floating array"),
        ("weight", "importance of '1' is None; give an array"),
        ("number", "pull: recall is -1.0; give a"),
    ],
)
def test_what_cannot_be_pulled_in_place_is_refused_before_anything_is_written(kind, says):
    params, anchors = [np.ones(4), np.ones(4)], [np.zeros(4), np.zeros(4)]
    weights = None
    if kind == "read-only":
        params[1].flags.writeable = False
    elif kind == "shared":
        anchors[0] = params[1]
    elif kind in ("shape", "dtype"):
        anchors[1] = np.zeros(3) if kind == "shape" else np.zeros(4, dtype=int)
    elif kind == "weight":
        weights = [np.ones(4), None]
    with pytest.raises(RecAdamError, match=says):
        NumpyBackend(fused=True, in_place=True).pull(
            params, anchors, -1.0 if kind == "number" else 0.1, weights
        )
    assert [x.tolist() for x in params] == [[1.0] * 4] * 2


def test_read_only_arrays_are_not_stepped_in_place():
    raw = np.ones(4, np.float32).tobytes()
    params = {"w": np.frombuffer(raw, np.float32)}
    opt = RecAdam(Hyperparameters(**SETTINGS), NumpyBackend(fused=True, in_place=True))
    state = opt.init(params, params)
    with pytest.raises(RecAdamError, match="theta of 'w' is read-only; give a copy, or leave in_place out"):
        opt.step(params, {"w": np.ones(4, np.float32)}, state)
    assert raw == np.ones(4, np.float32).tobytes()


def two_names(kind):
    """Parameters, gradients and a state of two names, the second of which cannot be stepped in place."""
    rng = np.random.default_rng(0)
    whole = rng.random(9)
    params, grads = ({"a": rng.random(8), "b": rng.random(8)} for _ in range(2))
    anchors = {"a": params["a"]} if "head" in kind else params
    state = RecAdam(Hyperparameters(lr=1e-2, gamma=10.0)).init(params, anchors)
    if kind.startswith("one array"):
        params["b"] = params["a"]
    elif kind == "overlapping":
        params = {"a": whole[:-1], "b": whole[1:]}
    elif kind == "gradient":
        grads["b"] = params["a"]
    elif kind == "reversed gradient":
        params["b"], grads["a"] = whole[1:], whole[:-1]
    elif kind == "moment":
        state.moments["b"] = state.moments["b"]._replace(v=params["a"])
    elif kind == "moments":
        state.moments["b"] = state.moments["a"]
    elif kind == "anchor":
        state.anchors["a"] = params["b"]
    elif kind.startswith("read-only moment"):
        state.moments["b"].v.flags.writeable = False
    elif kind.startswith("read-only"):
        params["b"].flags.writeable = False
    elif kind.startswith("more bits"):  # which one pass does not know
        params["b"] = params["b"].astype(np.longdouble)
    elif kind == "masked":
        grads["b"] = np.ma.array(grads["b"])
    return params, grads, state


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("one array", "theta of 'a' and theta of 'b' share memory; give a copy of one"),
        ("one array, the other a head", "theta of 'a' and theta of 'b' share memory; give a copy of one"),
        ("overlapping", "theta of 'a' and theta of 'b' share memory; give a copy of one"),
        ("gradient", "theta of 'a' and grad of 'b' share memory; give a copy of one"),
        ("reversed gradient", "theta of 'b' and grad of 'a' share memory; give a copy of one"),
        ("moment", "theta of 'a' and v of 'b' share memory; give a copy of one"),
        ("moments", "of 'a' and"),
        ("moments", "of 'b' share memory; give a copy of one"),
        ("anchor", "theta of 'b' and anchor of 'a' share memory; give a copy of one"),
        ("read-only", "theta of 'b' is read-only; give a copy, or leave in_place out"),
        ("read-only head", "theta of 'b' is read-only; give a copy, or leave in_place out"),
        ("read-only moment of a head", "v of 'b' is read-only; give a copy, or leave in_place out"),
        ("more bits", "Table: moments are"),
        ("more bits in a head", "Table: moments are"),
        ("masked", "gradient of 'b' is MaskedArray"),
    ],
)
def test_what_cannot_be_stepped_in_place_is_refused_before_anything_is_written(kind, says):
    params, grads, state = two_names(kind)
    held = copy.deepcopy((params, grads, state))
    optimizer = RecAdam(Hyperparameters(lr=1e-2, gamma=10.0), NumpyBackend(fused=True, in_place=True))
    with pytest.raises(RecAdamError) as caught:
        optimizer.step(params, grads, state)
    assert says in str(caught.value)
    np.testing.assert_equal((params, grads, state), held)


@pytest.mark.parametrize("kind", ["one array", "overlapping", "gradient", "moments", "anchor", "read-only"])
@pytest.mark.parametrize("fused", [False, True])
def test_in_new_memory_arrays_may_be_shared(kind, fused):
    params, grads, state = two_names(kind)
    alone = copy.deepcopy((params, grads, state))
    optimizer = RecAdam(Hyperparameters(lr=1e-2, gamma=10.0), NumpyBackend(fused=fused))
    found, _ = optimizer.step(params, grads, state)
    for name in params:
        expected, _ = optimizer.step({name: alone[0][name].copy()}, {name: alone[1][name].copy()}, alone[2])
        np.testing.assert_array_equal(found[name], expected[name])


def test_interleaved_arrays_that_share_nothing_are_stepped_in_place():
    """Rows of one array, and columns, which are copied."""
    hp = Hyperparameters(lr=1e-2, gamma=10.0)
    for rows in (True, False):
        whole, grads = np.random.default_rng(0).random((2, 4, 4))
        params = {f"p{i}": x for i, x in enumerate(whole if rows else whole.T)}
        grads = {f"p{i}": x for i, x in enumerate(grads)}
        expected, _ = RecAdam(hp).step(params, grads, RecAdam(hp).init(params, params))
        placed = RecAdam(hp, NumpyBackend(fused=True, in_place=True))
        found, _ = placed.step(params, grads, placed.init(params, params))
        for name, x in expected.items():
            np.testing.assert_array_equal(found[name], x)
            assert not rows or np.shares_memory(found[name], whole)


@pytest.mark.parametrize(
    ("column", "array", "says"),
    [
        (0, np.ones(3, np.float32), "one_pass: theta 1 is float32 of shape (3,), theta float64 of (3,)"),
        (1, np.ones(3, ">f8"), "one_pass: grad 1 is >f8 of shape (3,), theta float64 of (3,)"),
        (2, [0.0] * 3, "one_pass: m 1 is list; give an array"),
        (4, np.ma.array(np.ones(3)), "one_pass: anchor 1 is MaskedArray"),
        (5, [np.nan] * 3, "one_pass: importance 1 is list; give an array"),
        (3, None, "one_pass: lists of [1, 2] arrays; give as many of each"),
    ],
)
def test_lists_of_several_kinds_are_refused_before_anything_is_written(column, array, says):
    columns = [[np.ones(3), np.ones(3)] for _ in COLUMNS]
    columns[column] = columns[column][:1] + ([] if array is None else [array])
    held = copy.deepcopy(columns)
    *arrays, importances = columns
    with pytest.raises(RecAdamError) as caught:
        one_pass(*arrays, Coefficients(0.9, 0.999, 1e-3, 1e-8, 0.25, 0.0), importances)
    assert says in str(caught.value)
    np.testing.assert_equal(columns, held)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grad": np.ones((1, 3))}, "kernel: grad is float64 of shape (1, 3), theta float64 of (3,)"),
        ({"anchor": np.ones(3, np.float32)}, "kernel: anchor is float32 of shape (3,)"),
        ({"importance": np.ones(2)}, "kernel: importance is float64 of shape (2,)"),
        ({"v": np.broadcast_to(0.0, 3)}, "kernel: v is read-only; give a copy"),
        ({"c": None}, "kernel: c is None; give Coefficients"),
    ],
)
def test_the_kernel_refuses_before_anything_is_written(change, says):
    c = Coefficients(0.9, 0.999, 1e-3, 1e-8, 0.25, 0.0)
    given = {name: np.ones(3) for name in COLUMNS} | {"c": c, **change}
    held = copy.deepcopy(given)
    with pytest.raises(RecAdamError) as caught:
        kernel(**given)
    assert says in str(caught.value)
    np.testing.assert_equal(given, held)
    shared = np.ones(3)
    with pytest.raises(RecAdamError, match="kernel: theta and grad share memory; give a copy of one"):
        kernel(shared, shared, np.ones(3), np.ones(3), None, c)
    assert shared.tolist() == [1.0, 1.0, 1.0]
