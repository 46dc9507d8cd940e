"""The conformance kit: what it certifies, and that it can fail."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("mpmath")

import array_api_strict
import mpmath
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recadam_core import (
    Coefficients,
    Hyperparameters,
    Linear,
    RecAdamError,
    Sigmoid,
    coefficients,
    get_backend,
)
from recadam_core.backends import Specification
from recadam_core.conformance import Case, oracle, walk
from recadam_core.conformance.cases import ARRAYS, DENORMALS, EXACT, FAST
from recadam_core.conformance.claims import Claim, Result, check, claims
from recadam_core.conformance.kit import BackendConformance
from recadam_core.conformance.oracle import Spread, exact_coefficients, exact_step, ulp
from recadam_core.conformance.replay import to_bfloat16
from recadam_core.conformance.run import Job, _elsewhere, certify, plan
from recadam_core.conformance.tables import cells, grouped, markdown, support
from recadam_core.optimizer import Functional
from recadam_core.variants import Capabilities, Exact, Variant

GOLDEN = Path(__file__).parents[1] / "golden"
NUMPY = get_backend("numpy")


# Every claim about every variant of the three backends is `make conformance`, which CI runs; here those
# that need no process of their own, and of the slow ones some.
class TestNumpy(BackendConformance):
    backend = "numpy"
    golden = GOLDEN


class TestTorch(BackendConformance):
    backend = "torch"
    variants = ("single", "foreach", "fused")
    kinds = ("exact", "weighed", "pull", "step", "manners")


class TestTriton(BackendConformance):
    backend = "torch"
    variants = ("triton",)
    kinds = ("denormals",)


class TestJax(BackendConformance):
    backend = "jax"
    kinds = ("denormals", "coefficients")


class TestJaxExact(BackendConformance):
    backend = "jax"
    variants = ("functional", "eager")
    kinds = ("exact",)
    cases = (Case("released", "slow", arrays="mixed", dtype="float32", steps=20).name,)


class TestArrayApiStrict(BackendConformance):
    backend = "array_api_strict"
    levels = ("exact",)
    kinds = ("exact",)
    cases = tuple(case.name for dtype in EXACT for case in EXACT[dtype] if case.arrays in ("one", "mixed"))


if importlib.util.find_spec("mlx"):

    class TestMlx(BackendConformance):
        backend = "mlx.core"


STRICTEST = {
    "api_version": "2022.12",
    "boolean_indexing": False,
    "data_dependent_shapes": False,
    "enabled_extensions": (),
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_strictest_array_api_walks_the_same_bits(dtype):
    backend = Specification(array_api_strict)
    names = tuple(case.name for case in EXACT[dtype] if case.arrays == "mixed")
    with array_api_strict.ArrayAPIStrictFlags(**STRICTEST):
        result = check(backend, backend.capabilities.variants[0], Claim("exact", "exact", dtype, names))
    assert result.verdict == "yes", result.where


# What the cases are.


def test_the_cases_cover_what_they_promise():
    for dtype, cases in EXACT.items():
        assert any(case.steps == 1000 for case in cases)
        assert {case.arrays for case in cases} >= {"one", "mixed", "few", "solo", "large"}
        for part in ("form", "annealing", "settings"):
            assert len({getattr(case, part) for case in cases}) >= 3, (dtype, part)
    pairs = {(case.form, case.annealing) for case in EXACT["float32"] if case.arrays == "mixed"}
    assert len(pairs) == 15
    assert len(ARRAYS["many"]) == 1000
    assert ARRAYS["large"]["embedding"].shape[0] > 2**18
    assert {v.numbers for v in ARRAYS["mixed"].values()} == {"usual", "zeros", "at anchor", "huge"}
    assert set(FAST) == {"float32", "float64", "bfloat16", "float16"}
    assert all({case.arrays for case in cases} == {"few", "mixed", "wide"} for cases in FAST.values())


def test_special_numbers_are_what_they_are_called():
    group = Case(arrays="mixed", dtype="float32", steps=3).recording().groups[0]
    assert (np.abs(group.grads["huge gradients"]) > np.sqrt(np.finfo(np.float32).max)).any()
    assert not group.grads["zeros"].any()
    np.testing.assert_array_equal(group.anchors["at anchor"], group.theta0["at anchor"])
    assert group.theta0["empty"].size == 0
    tiny = DENORMALS["float64"][0].recording()
    last = list(walk(tiny, moments=True))[-1]
    for x in last.moments["vector"]:
        assert ((np.abs(x) > 0) & (np.abs(x) < np.finfo(np.float64).tiny)).any()
    assert (np.abs(tiny.groups[0].theta0["vector"]) < np.finfo(np.float64).tiny).all()


@pytest.mark.parametrize("name", ["numpy", "jax", "torch"])
@pytest.mark.parametrize("layout", ["", "transposed", "strided"])
def test_layouts_hold_the_same_numbers(name, layout):
    from recadam_core.conformance.replay import place

    x = np.arange(12.0).reshape(3, 4)
    backend = get_backend(name)
    placed = place(backend, x, "float32", layout)
    np.testing.assert_array_equal(backend.to_numpy(placed), x)
    if name == "torch":
        assert placed.is_contiguous() == (layout == "")


@pytest.mark.needs("torch")
@given(st.floats(-(2.0**99), 2.0**99, width=32))
def test_bfloat16_rounds_to_nearest_even(x):
    import torch

    expected = torch.tensor(x, dtype=torch.float32).bfloat16().float().item()
    assert to_bfloat16(np.array([x]))[0] == np.float32(expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decoupled/sigmoid", "not form/annealing/settings/arrays/dtype/steps"),
        ("decoupled/sigmoid/plain/few/float32/x", "not form/annealing/settings/arrays/dtype/steps"),
        ("decoupled/sigmoide/plain/few/float32/3", "annealing 'sigmoide': did you mean 'sigmoid'"),
        ("decoupled/sigmoid/plain/few/float32/0", "0 steps; give 1 or more"),
    ],
)  # fmt: skip
def test_a_case_that_is_none(name, message):
    with pytest.raises(RecAdamError, match=message):
        Case.named(name)


# The oracle.


def test_the_oracle_on_a_step_that_was_done_by_hand():
    """t = 1: m' = 0.1 g, v' = 0.001 g^2, both corrected to g and g^2; lambda = 1/2 at t0."""
    hp = Hyperparameters(lr=0.1, gamma=2.0, eps=0.0, weight_decay=0.5, annealing=Sigmoid(k=1.0, t0=1))
    x = {"theta": 2.0, "grad": 3.0, "m": 0.0, "v": 0.0, "anchor": 1.0}
    c = exact_coefficients(1, hp, 0.1)
    got = exact_step(**{name: np.array([value]) for name, value in x.items()}, c=c)
    # 2 + 0.1 * 2 * 0.5 * (1 - 2) - 0.1 * 0.5 * 3/3 - 0.1 * 0.5 * 2
    assert float(got.theta[0]) == pytest.approx(1.75, abs=1e-16)
    assert float(got.m[0]) == pytest.approx(0.3, abs=1e-15)


@pytest.mark.parametrize("annealing", [Sigmoid(k=1.0, t0=5, floor=0.25), Linear(t0=10, floor=0.25)])
def test_the_oracle_knows_the_floor_of_an_annealing(annealing):
    hp = Hyperparameters(lr=0.5, gamma=1.0, annealing=annealing, bias_correction=False)
    c = exact_coefficients(1000, hp, 0.5)
    assert (float(c.pull), float(c.step)) == (0.125, 0.5)
    for t in (1, 6, 9, 1000):
        theirs = coefficients(t, hp)
        assert float(exact_coefficients(t, hp, 0.5).pull) == pytest.approx(theirs.pull, rel=1e-15)


@given(t=st.integers(1, 10**6), k=st.floats(1e-3, 1.0), beta=st.sampled_from([0.9, 0.999, 0.99999]))
@settings(max_examples=50)
def test_the_oracle_agrees_with_a_precision_twice_as_high(t, k, beta):
    hp = Hyperparameters(
        annealing=Sigmoid(k=k, t0=500), betas=(beta, beta), form="proximal", weight_decay=0.1
    )
    once = exact_coefficients(t, hp, 1e-3)
    oracle.BITS *= 2
    try:
        twice = exact_coefficients(t, hp, 1e-3)
    finally:
        oracle.BITS //= 2
    for a, b in zip(once, twice, strict=True):
        assert abs(a - b) <= abs(b) * mpmath.mpf(2) ** -150


def test_ulp_is_the_spacing():
    x = np.geomspace(1e-30, 1e30, 50)
    np.testing.assert_array_equal(ulp(x.astype(np.float32), "float32"), np.spacing(x.astype(np.float32)))
    np.testing.assert_array_equal(ulp(x, "float64"), np.spacing(x))


# That it can fail.


class Off(Specification):
    """A backend that is off by a given share of one parameter at one step."""

    name = "off"

    def __init__(self, share, known=None):
        super().__init__(np)
        self.share = share
        self.name = f"off by {share}"
        self.capabilities = Capabilities(variants=(Variant("functional", misses=known or {}),))

    def step(self, params, grads, moments, anchors, c):
        new, states = super().step(params, grads, moments, anchors, c)
        new[0] = new[0] * new[0].dtype.type(1 + self.share)
        return new, states


@pytest.mark.parametrize(
    ("claim", "share", "verdict"),
    [
        ("exact", 2.0**-23, "NO"),
        ("step", 2.0**-23, "NO"),
        ("trajectory", 1e-2, "NO"),
        ("exact", 0.0, "yes"),
        ("step", 0.0, "yes"),
        ("trajectory", 0.0, "yes"),
    ],
)
def test_a_backend_that_is_off_is_caught(claim, share, verdict):
    backend = Off(share)
    name = Case(dtype="float32", steps=8).name
    result = check(backend, backend.capabilities.variants[0], Claim(claim, "fast", "float32", (name,)))
    assert result.verdict == verdict
    if verdict == "NO":
        assert result.where.startswith(f"{name}, ")
        assert result.command.endswith(f"--claim {claim} --case {name}")


@pytest.mark.parametrize(("share", "verdict"), [(1e-3, "known"), (0.0, "STALE")])
def test_a_known_miss_must_be_one(share, verdict):
    backend = Off(share, {"exact": "it is off"})
    claim = Claim("exact", "exact", "float32", (Case(dtype="float32", steps=2).name,))
    result = check(backend, backend.capabilities.variants[0], claim)
    assert (result.verdict, result.passes) == (verdict, verdict == "known")


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (
            {"misses": {"denormal": "why"}},
            "unknown claim in the misses of 'off by 0.0' 'functional': 'denormal'",
        ),
        ({"misses": {"step float46": "why"}}, "unknown claim in the misses"),
        ({"misses": {"step bfloat16": "why"}}, "unknown claim in the misses"),
        ({"misses": {"coefficients": "why"}}, "unknown claim in the misses"),
        ({"dtypes": ("float46",)}, "unknown dtype in the capabilities of 'off by 0.0': 'float46'"),
    ],
)
def test_a_misspelt_declaration_is_an_error(declared, message):
    backend = Off(0.0, declared.get("misses"))
    if "dtypes" in declared:
        backend.capabilities = dataclasses.replace(backend.capabilities, **declared)
    with pytest.raises(RecAdamError, match=message):
        claims(backend, backend.capabilities.variants[0], "fast")


def writes_gradients(params, grads, moments, anchors, new):
    for grad in grads:
        grad *= 2
    return new


def writes_parameters(params, grads, moments, anchors, new):
    for x in params:
        x *= 2
    return new


def widens(params, grads, moments, anchors, new):
    return [x.astype(np.float64) for x in new[0]], new[1]


def flattens(params, grads, moments, anchors, new):
    return [x.reshape(-1) for x in new[0]], new[1]


def breaks(params, grads, moments, anchors, new):
    raise TypeError("no such thing")


@pytest.mark.parametrize(
    ("manner", "says"),
    [
        (writes_gradients, "step 1: gradient 'scalar' was changed by the step"),
        (writes_parameters, "step 1: parameter 'scalar' was changed by the step"),
        (widens, "step 1: 'scalar' came back as float64 of shape (), not float16 of ()"),
        (flattens, "step 1: 'scalar' came back as float16 of shape (1,), not float16 of ()"),
        (breaks, "TypeError: no such thing"),
    ],
)
def test_bad_manners_are_a_miss(manner, says):
    class Rude(Specification):
        def step(self, params, grads, moments, anchors, c):
            new = super().step(params, grads, moments, anchors, c)
            return manner(params, grads, moments, anchors, new)

    backend = Rude(np)
    backend.name = f"rude: {manner.__name__}"
    claim = Claim("step", "fast", "float16", (Case(dtype="float16", steps=3).name,))
    variant = Variant("functional", misses={"step": "a known miss is no licence to break"})
    result = check(backend, variant, claim)
    assert result.verdict == "NO"
    assert says in result.where


class Faulty(Specification):
    """The specification over NumPy with one fault, which a subclass puts in."""

    def __init__(self):
        super().__init__(np)
        self.capabilities = Capabilities(("float16", "float32", "float64"))


class CopiesNothing(Faulty):
    def copy(self, array):
        return array


class ReadsViews(Faulty):
    def to_numpy(self, array):
        return array


class MakesViews(Faulty):
    def from_numpy(self, array, dtype=None):
        return np.asarray(array, dtype=dtype or array.dtype)


class OwnsAll(Faulty):
    def owns(self, array):
        return True


class WritesMoments(Faulty):
    def step(self, params, grads, moments, anchors, c):
        new, states = super().step(params, grads, moments, anchors, c)
        for old, s in zip(moments, states, strict=True):
            if old.m.shape:
                old.m[...] = s.m
        return new, states


class ReusesResults(Faulty):
    buffers: dict = {}  # noqa: RUF012

    def step(self, params, grads, moments, anchors, c):
        new, states = super().step(params, grads, moments, anchors, c)
        for i, x in enumerate(new):
            buffer = self.buffers.setdefault((i, x.shape, x.dtype.name), np.empty_like(x))
            buffer[...] = x
            new[i] = buffer
        return new, states


class WritesLate(Faulty):
    calls = 0

    def step(self, params, grads, moments, anchors, c):
        result = super().step(params, grads, moments, anchors, c)
        self.calls += 1
        if self.calls > 4:
            for grad in grads:
                grad[...] = 0
        return result


class ByOrder(Faulty):
    def __init__(self):
        super().__init__()

        class Zips(Functional):
            def __call__(self, grads, lr):
                return super().__call__(dict(zip(self.params, grads.values(), strict=True)), lr)

        def make(params, anchors, hp, exact=False, importance=None):
            return Zips(self, params, anchors, hp, importance)

        self.capabilities = Capabilities(
            ("float16", "float32", "float64"), variants=(Variant("functional", make=make),)
        )


class HidesNaN(Faulty):
    def step(self, params, grads, moments, anchors, c):
        return super().step(params, [np.nan_to_num(g) for g in grads], moments, anchors, c)


class OneDtype(Faulty):
    def step(self, params, grads, moments, anchors, c):
        new, states = super().step(params, grads, moments, anchors, c)
        return [x.astype(new[0].dtype) for x in new], states


class SharesMoments(Faulty):
    kept: dict = {}  # noqa: RUF012

    def step(self, params, grads, moments, anchors, c):
        moments = [self.kept.get((i, x.shape, float(c.step) > 1e-5), s) for i, (x, s) in
                   enumerate(zip(params, moments, strict=True))]  # fmt: skip
        new, states = super().step(params, grads, moments, anchors, c)
        self.kept.update({(i, x.shape, True): s for i, (x, s) in enumerate(zip(new, states, strict=True))})
        return new, states


class WidensMoments(Faulty):
    def step(self, params, grads, moments, anchors, c):
        new, states = super().step(params, grads, moments, anchors, c)
        return new, [type(s)(s.m.astype(np.float64), s.v.astype(np.float64)) for s in states]


class LargeWrong(Faulty):
    def step(self, params, grads, moments, anchors, c, *more):
        new, states = super().step(params, grads, moments, anchors, c, *more)
        return [x * (x.size < 1000) for x in new], states


class Misreads(Faulty):
    def step(self, params, grads, moments, anchors, c, *more):
        grads = [g if g.flags.c_contiguous else g.T.reshape(g.shape) for g in grads]
        return super().step(params, grads, moments, anchors, c, *more)


@pytest.mark.parametrize(
    ("faulty", "kind", "says"),
    [
        (CopiesNothing, "manners", "copy shares memory"),
        (ReadsViews, "manners", "to_numpy shares memory"),
        (MakesViews, "manners", "from_numpy shares memory"),
        (OwnsAll, "manners", "owns accepts a builtins.float"),
        (WritesMoments, "manners", "step 2 changed the m of step 1, 'vector'; copy before writing"),
        (ReusesResults, "manners", "step 2 changed the parameter of step 1, 'scalar'"),
        (WritesLate, "manners", "step 3 changed the gradient of step 3, 'scalar'"),
        (ByOrder, "manners", "gradient of 'scalar' has shape (5, 2)"),
        (HidesNaN, "manners", "NaN or infinity leaves its parameter finite"),
        (OneDtype, "manners", "beside others a float32 parameter came back as float16"),
        (SharesMoments, "manners", "gradients in another order change 'head'"),
        (WidensMoments, "step", "m of 'scalar' is float64; keep the moments of float32 in float32"),
        (LargeWrong, "step", "wide/float32/2, embedding"),
        (Misreads, "step", "transposed (m), step 1"),
    ],
)
def test_a_fault_is_found_in_the_default_setting(faulty, kind, says):
    backend = faulty()
    variant = backend.capabilities.variants[0]
    (claim,) = [c for c in claims(backend, variant, "fast") if (c.kind, c.dtype) == (kind, "float32")]
    short = tuple(name for name in claim.cases if kind == "manners" or "/few/" not in name or "/45" in name)
    found = check(backend, variant, dataclasses.replace(claim, cases=short))
    assert found.verdict == "NO"
    assert says in found.where


def test_the_specification_has_no_such_fault():
    for variant in (backend := Faulty()).capabilities.variants:
        for claim in claims(backend, variant, "fast"):
            if claim.kind == "manners":
                assert check(backend, variant, claim).verdict == "yes"


def test_a_mended_backend_of_the_same_name_is_looked_at_anew():
    claim = Claim("step", "fast", "float32", (Case(dtype="float32", steps=4).name,))
    off, mended = Off(1e-3), Off(0.0)
    off.name = mended.name = "mended"
    verdicts = [check(b, b.capabilities.variants[0], claim).verdict for b in (off, mended, off)]
    assert verdicts == ["NO", "yes", "NO"]


def test_values_that_overflow_alike_are_no_deviation():
    case = Case("proximal", "pull", "sign", "mixed", "float32", 12).name
    claim = Claim("trajectory", "fast", "float32", (case,))
    assert check(NUMPY, NUMPY.capabilities.variant("specification"), claim).verdict == "yes"


def test_json_has_no_infinity():
    result = Result("x", "y", "fast", "step float32", 1, np.inf, 1.0)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["worst"] is None


def test_a_string_in_place_of_a_tuple_is_an_error():
    with pytest.raises(RecAdamError, match="Variant 'x': needs is a string; give a tuple of names"):
        Variant("x", needs="numba")

    class Stringy(BackendConformance):
        backend = "numpy"
        kinds = "denormals"

    with pytest.raises(RecAdamError, match="Stringy: kinds is a string; give a tuple of names"):
        Stringy().jobs()


def test_what_owns_nothing_is_a_miss():
    backend = Off(0.0)
    backend.name, backend.owns = "disowning", lambda array: False
    claim = Claim("exact", "exact", "float32", (Case(dtype="float32", steps=2).name,))
    assert "does not own what it made itself" in check(backend, Variant("functional"), claim).where


def test_a_backend_that_refuses_misses_its_claim():
    class Refusing(Off):
        def step(self, *arguments):
            raise RecAdamError("step 1: no such thing here; use another")

    backend = Refusing(0.0)
    claim = Claim("exact", "exact", "float32", (Case(dtype="float32", steps=2).name,))
    result = check(backend, backend.capabilities.variants[0], claim)
    assert (result.verdict, result.worst) == ("NO", np.inf)
    assert "no such thing here" in result.where


def test_one_step_that_is_no_number_is_not_forgotten():
    class Lost(Off):
        def __init__(self, name):
            super().__init__(0.0)
            self.name, self.calls = name, 0

        def step(self, params, grads, moments, anchors, c):
            new, states = super().step([np.nan_to_num(x) for x in params], grads, moments, anchors, c)
            self.calls += 1
            return [x * np.nan if self.calls == 1 else x for x in new], states

    for kind in ("step", "trajectory", "exact"):
        backend = Lost(f"lost in {kind}")
        claim = Claim(kind, "fast", "float32", (Case(dtype="float32", steps=4).name,))
        assert check(backend, backend.capabilities.variants[0], claim).verdict == "NO"


def test_not_a_number_is_no_pass():
    assert Result("x", "y", "fast", "step float32", 1, np.nan, 1.0).verdict == "NO"


# Running it.


def test_what_is_not_installed_is_skipped(monkeypatch):
    variant = Variant("fused", needs=("no_such_module",), programs=(("no-such-program", "nor-this"),))
    assert variant.lacks() == "no_such_module, no-such-program"
    monkeypatch.setattr(
        type(NUMPY), "capabilities", dataclasses.replace(NUMPY.capabilities, variants=(variant,))
    )
    (result,) = certify(plan(NUMPY, kinds=["golden"], golden=GOLDEN, levels=["fast"]))[:1]
    assert result.verdict == "skipped"
    assert result.passes
    assert cells([result])[-1] == "needs no_such_module, no-such-program"


@pytest.mark.needs("jax")
def test_a_job_with_an_environment_gets_it():
    """JAX's exact setting holds in the process that is made for it, and is refused without."""
    case = Case(dtype="float32", steps=3).name
    jobs = plan(get_backend("jax"), ["functional"], ["exact"], ["exact"], [case])
    assert jobs[0].environment == (("XLA_FLAGS", "--xla_cpu_max_isa=AVX"),)
    assert [result.verdict for result in certify(jobs)] == ["yes"]
    here = [dataclasses.replace(jobs[0], environment=())]
    (refused,) = certify(here)
    assert "start the process with XLA_FLAGS=--xla_cpu_max_isa=AVX" in refused.where


@pytest.mark.needs("jax")
def test_a_termination_ends_the_processes(tmp_path):
    command = [sys.executable, "-m", "recadam_core", "conformance", "--backend", "jax"]
    command += ["--variant", "functional", "--level", "exact", "--claim", "exact", "--jobs", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    found = ""
    while not found:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        found = " ".join(task.read_text() for task in tasks).strip()
    process.terminate()
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 143
    assert stderr.strip().splitlines()[-1] == "recadam: interrupted"
    for child in found.split():
        assert not Path(f"/proc/{child}").exists()


def test_a_process_that_starts_during_the_end_is_ended():
    stopped = threading.Event()
    stopped.set()
    job = plan(NUMPY, ["functional"], ["exact"], ["exact"])[0]
    with pytest.raises(RecAdamError, match="the process failed: exit code -15"):
        _elsewhere(job, [], stopped, print)


def test_what_a_backend_prints_is_no_result(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import recadam_numpy; print('hello')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    job = dataclasses.asdict(plan(NUMPY, ["functional"], ["exact"], ["denormals"])[0])
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[1:] = [{json.dumps(json.dumps(job))}]\n"
         "import recadam_core.conformance.claims as claims\n"
         "from recadam_core.conformance import run\n"
         "check = run.check\n"
         "run.check = lambda *a: (print('hello'), check(*a))[1]\n"
         "run._main()"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    lines = result.stdout.splitlines()[1:]  # the first is sitecustomize's, before the kit runs
    assert [json.loads(line)["claim"] for line in lines] == ["denormals float32", "denormals float64"]
    assert result.stderr.count("hello") == 2


def test_a_process_that_fails_says_why():
    job = Job("numpy", (("RECADAM_TEST", "1"),), (("nothing", Claim("exact", "exact", "float32", ())),))
    with pytest.raises(RecAdamError, match=r"conformance of 'numpy': the process failed: .*unknown variant"):
        certify([job])


def test_nothing_left_to_show_is_an_error():
    with pytest.raises(RecAdamError, match="no claim is left"):
        plan(NUMPY, ["functional"], kinds=["coefficients"])
    with pytest.raises(RecAdamError, match="claim 'golden' needs recorded trajectories; give their folder"):
        plan(NUMPY, kinds=["golden"])
    with pytest.raises(RecAdamError, match="unknown variant 'optax'"):
        plan(NUMPY, ["optax"])
    for case, message in {
        "typo": "case 'typo': no claim that was asked for has it",
        "bogus/sigmoid/plain/few/float32/8": "form 'bogus'",
        "decoupled/sigmoid/plain/few/float32/0": "0 steps",
        "decoupled/sigmoid/bare/few/float32/8": "no claim that was asked for has it",
    }.items():
        good = Case(dtype="float32", steps=8).name
        with pytest.raises(RecAdamError, match=message):
            plan(NUMPY, kinds=["step"], cases=[good, case])
    with pytest.raises(RecAdamError, match="unknown claim 'exakt': did you mean 'exact'"):
        plan(NUMPY, kinds=["exakt"])
    with pytest.raises(RecAdamError, match="unknown level 'fats'"):
        plan(NUMPY, levels=["fats"])
    with pytest.raises(RecAdamError, match=r"no \.npz file there"):
        plan(NUMPY, golden=Path(__file__).parents[1] / "stranger")


@pytest.mark.needs("jax")
def test_jax_op_by_op_needs_no_environment():
    assert get_backend("jax").capabilities.variant("eager").exact.environment == {}
    assert Exact().price == "nothing"


def test_the_table_of_results_names_the_worst():
    one = Result("b", "first", "fast", "step float32", 3, 0.1, 1.0, (1.5, 0.25), "case, w, step 1")
    two = dataclasses.replace(one, variant="second", worst=0.9, where="case, w, step 2", ulps=(1.25, 0.75))
    (group,) = grouped([one, two])
    assert cells(group)[:5] == ["b", "step float32", "first, second", "3", "yes"]
    assert cells(group)[5:] == ["0.9", "1", "1.50", "0.50", "second: case, w, step 2"]
    miss = dataclasses.replace(two, backend="c", worst=1.5)
    known = dataclasses.replace(miss, variant="third", known="since ever")
    assert markdown([one, two, miss, known]).splitlines() == [
        "| claim | cases | bound | b | c |",
        "| --- | --- | --- | --- | --- |",
        "| step float32 | 3 | 1 | 0.9 (1.50 ulp, mean 0.50) | **NO** second: 1.5 (1.25 ulp, mean 0.75);"
        " known miss: third |",
    ]


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_the_support_table_is_the_declaration(name):
    backend = get_backend(name)
    table = support([backend])
    for variant in backend.capabilities.variants:
        assert f"| {name} | {variant.name} | `{variant.about}` |" in table


@pytest.mark.needs("torch", "jax")
def test_the_support_table_of_the_documentation_is_up_to_date():
    table = support(get_backend(name) for name in ("jax", "numpy", "torch"))
    written = (Path(__file__).parents[2] / "docs" / "support.md").read_text(encoding="utf-8")
    assert table in written, "run: make support"


@pytest.mark.needs("torch")
def test_claims_follow_the_capabilities():
    torch = get_backend("torch")
    names = [claim.name for claim in claims(torch, torch.capabilities.variants[0], "fast")]
    assert "step bfloat16" in names
    numpy_names = [claim.name for claim in claims(NUMPY, NUMPY.capabilities.variants[0], "fast")]
    assert "step bfloat16" not in numpy_names
    assert Spread._fields == Coefficients._fields[2:]


# A stranger's backend, from installed wheels, away from the sources.


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    pytest.importorskip("build")
    here = Path(__file__).parents[1]
    folder = tmp_path_factory.mktemp("stranger")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    for source in (here.parent, here / "stranger"):
        subprocess.run([*build, str(source)], check=True, capture_output=True)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    install += ["--target", str(folder / "site"), *map(str, folder.glob("*.whl"))]
    subprocess.run(install, check=True, capture_output=True)
    (folder / "test_mine.py").write_text((here / "stranger" / "check_recadam_dask.py").read_text())

    def run(*command):
        environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True
        )

    return run


@pytest.mark.tree
def test_a_stranger_finds_its_backend_and_the_kit(stranger):
    result = stranger("pytest", "-q", "-p", "no:cacheprovider", "test_mine.py", "-k", "denormals")
    assert "2 passed, 9 deselected" in result.stdout, result.stdout + result.stderr
    result = stranger("recadam_core", "conformance", "--backend", "dask", "--claim", "denormals", "--json")
    assert [r["verdict"] for r in json.loads(result.stdout)] == ["yes", "yes"], result.stderr
    where = stranger("pytest", "--collect-only", "-q", "test_mine.py")
    assert "test_mine.py::TestDask::test_claim[functional-exact float64]" in where.stdout


@pytest.mark.tree
@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_a_stranger_passes_the_whole_kit(stranger):
    result = stranger("pytest", "-q", "-p", "no:cacheprovider", "test_mine.py")
    assert "11 passed" in result.stdout, result.stdout + result.stderr
