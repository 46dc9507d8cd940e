"""Where two runs part, down to the operation."""

from __future__ import annotations

import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sklearn")

from recadam_core import Coefficients, Moments
from recadam_harness import RunConfig, finetune
from recadam_harness.bisect import ROOT, SITES, Inputs, _apart, _fused, bisect_runs, explain

C = Coefficients(0.9, 0.999, 1e-3, 1e-8, 0.1, 0.01)
numbers = st.floats(-1e3, 1e3, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)


@given(numbers, numbers, numbers)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_fused_is_one_rounding(dtype, a, x, y):
    a, x, y = (dtype(value) / dtype(3) for value in (a, x, y))
    exact = Fraction(float(a)) * Fraction(float(x)) + Fraction(float(y))
    got = _fused(a, np.array([x]), np.array([y]))[0]
    gap = abs(Fraction(float(got)) - exact)
    for neighbour in (np.nextafter(got, dtype(np.inf)), np.nextafter(got, dtype(-np.inf))):
        assert gap <= abs(Fraction(float(neighbour)) - exact) * (1 + Fraction(1, 2**20))


def inputs(dtype):
    rng = np.random.default_rng(0)
    theta, grad, m, anchor = (rng.standard_normal(500).astype(dtype) for _ in range(4))
    return Inputs(theta, grad, Moments(m, np.abs(m)), anchor)


def walk(x, way):
    """The kernel, with one operation rounded otherwise."""
    number = x.theta.dtype.type
    beta1, beta2, step, eps, pull, decay = map(number, C)
    rest1, rest2 = number(1 - C.beta1), number(1 - C.beta2)
    m = beta1 * x.moments.m + rest1 * x.grad
    if way == SITES["m"][1]:
        m = _fused(beta1, x.moments.m, rest1 * x.grad)
    v = beta2 * x.moments.v + rest2 * (x.grad * x.grad)
    if way == SITES["v"][1]:
        v = _fused(beta2, x.moments.v, rest2 * (x.grad * x.grad))
    root = np.sqrt(v)
    if way == ROOT:
        root[::3] = np.nextafter(root[::3], number(np.inf))
        root[1::3] = np.nextafter(root[1::3], number(0))
    ratio = m / (root + eps)
    delta = pull * (x.anchor - x.theta) - step * ratio
    if way == SITES["pull"][1]:
        delta = _fused(pull, x.anchor - x.theta, -(step * ratio))
    delta = _fused(-decay, x.theta, delta) if way == SITES["decay"][1] else delta - decay * x.theta
    return Inputs(x.theta + delta, x.grad, Moments(m, v), x.anchor)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("way", ["", SITES["m"][1], SITES["v"][1], ROOT, SITES["pull"][1], SITES["decay"][1]])
def test_the_operation_is_named(dtype, way):
    x = inputs(dtype)
    after = walk(x, way)
    operations, explained = explain(x, after, {"": C})
    assert explained == 500
    # What the root is off by may be lost when theta is rounded.
    assert operations in ([(way,), ()] if way == ROOT else [(way,) if way else ()])


def test_what_cannot_be_explained_is_not():
    x = inputs(np.float32)
    after = walk(x, "")
    after.theta[:7] += 1
    assert explain(x, after, {"": C}) == ((), 493)


@pytest.mark.parametrize(
    ("a", "b", "apart"), [(1.0, 1.0, 0), (1.0, 1.0 + 2**-52, 1), (0.0, -5e-324, 1), (-5e-324, 5e-324, 2)]
)
def test_numbers_between(a, b, apart):
    assert _apart(np.float64(a), np.float64(b)) == apart


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def make(backend, dtype="float64", **changes):
        config = RunConfig.for_task("digits", backend, steps=4, dtype=dtype, **changes)
        return finetune(config, folder / f"{backend}-{dtype}-{len(changes)}", overwrite=True)

    return make


def test_a_run_parts_from_itself_nowhere(runs):
    assert bisect_runs(runs("numpy"), runs("numpy")) is None


@pytest.mark.parametrize(("name", "dtype"), [("torch", "float64"), ("torch", "float32"), ("jax", "float64")])
def test_frameworks_part_where_they_differentiate(runs, name, dtype):
    parting = bisect_runs(runs("numpy", dtype), runs(name, dtype))
    assert parting.step == 1
    assert parting.name == "body.0.weight"
    assert 1 <= parting.ulps < 100
    assert parting.gradients[0] != parting.gradients[1]
    assert parting.repeats
    numpy_kernel, kernel = parting.kernels
    assert (numpy_kernel.operations, numpy_kernel.explained) == ((), 4096)
    assert kernel.explained == 4096
    # Which of torch's square roots are correctly rounded depends on the processor.
    expected = {"torch": (ROOT,), "jax": ("the coefficients, computed traced",)}
    assert kernel.operations in (expected[name], ())
    lines = parting.lines()
    assert lines[0].startswith("first difference: step 1, body.0.weight[")
    assert "so differentiation made the first difference" in lines[1]
    assert lines[2] == "kernel of numpy recadam: every operation is rounded as specified"


def test_a_kernel_that_rounds_otherwise_is_found(runs, monkeypatch):
    """Equal gradients: two NumPy runs, of which one sums its first moment in one rounding."""
    one = runs("numpy")
    numpy_backend = sys.modules["recadam_numpy.backend"]
    plain = numpy_backend.unchecked

    def contracted(theta, grad, m, v, anchor, c, importance):
        sharp = _fused(np.float64(c.beta1), m, np.float64(1 - c.beta1) * grad)
        keep = m.copy()
        plain(theta.copy(), grad, m, v.copy(), anchor, c)
        # The rest of the step, from the sharper moment.
        m[...] = sharp
        x = Inputs(theta.copy(), grad, Moments(keep, v.copy()), anchor)
        v[...] = c.beta2 * v + (1 - c.beta2) * (grad * grad)
        delta = -(c.step * (m / (np.sqrt(v) + c.eps)))
        if anchor is not None:
            delta = c.pull * (anchor - x.theta) + delta
        if c.decay:
            delta = delta - c.decay * x.theta
        theta[...] = x.theta + delta

    class Other:
        calls = 0

        def __call__(self, *arguments):
            return contracted(*arguments) if self.on else plain(*arguments)

    switch = Other()
    switch.on = True
    monkeypatch.setattr(numpy_backend, "unchecked", switch)
    other = runs("numpy", eval_every=1)
    from recadam_harness import bisect

    prepare = bisect.prepare

    def switched(config):
        prepared = prepare(config)
        step = prepared.engine.step

        def stepped(batch, lr):
            switch.on = config.eval_every == 1
            return step(batch, lr)

        prepared.engine.step = stepped
        return prepared

    monkeypatch.setattr(bisect, "prepare", switched)
    parting = bisect_runs(one, other)
    assert parting.step == 2  # the first step's moment is zero: there is nothing to sum
    assert parting.gradients[0] == parting.gradients[1]
    assert "so the kernel made the difference" in parting.lines()[1]
    assert parting.kernels[1].operations == ("beta1 m + ... in one rounding",)
    assert parting.kernels[1].explained == parting.kernels[1].elements
