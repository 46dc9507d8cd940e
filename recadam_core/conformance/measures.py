"""How each kind of claim is measured, against the specification and the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from ..backends import Backend
from ..coefficients import Coefficients, coefficients
from ..hyperparameters import FORMS, Hyperparameters
from ..update import apply, pull
from ..variants import Variant
from . import oracle
from .cases import ANNEALINGS, PULLS, Case
from .manners import MANNERS
from .replay import (
    Frame,
    Recording,
    load_recording,
    place,
    replay,
    to_bfloat16,
    trajectories,
    trajectory_deviation,
    walk,
)

__all__ = ["MEASURES", "Measured"]


@dataclass(frozen=True)
class Measured:
    """What one case showed."""

    worst: float
    where: str = ""
    ulps: float = 0.0
    total: float = 0.0  # of errors in ulps
    count: int = 0


@lru_cache(maxsize=4)
def _recording(case: str) -> Recording:
    return load_recording(case) if case.endswith(".npz") else Case.named(case).recording()


@lru_cache(maxsize=64)
def _reference(case: str) -> list[Frame]:
    """The specification's walk; kept, since every variant is held against it."""
    return list(walk(_recording(case), moments=True))


_walks: dict[tuple[Backend, str, str], list[Frame]] = {}


def _walked(backend: Backend, variant: str, case: str) -> list[Frame]:
    """A variant's walk in its default setting; kept, since two claims look at it."""
    key = (backend, variant, case)
    if key not in _walks:
        while len(_walks) >= 16:
            _walks.pop(next(iter(_walks)))
        _walks[key] = list(walk(_recording(case), backend, variant, moments=True))
    return _walks[key]


def _bits(backend: Backend, variant: Variant, dtype: str, case: str) -> Measured:
    """How many values differ from the specification's, in any bit."""
    recording = _recording(case)
    steps = len(recording.lr)
    reference: Iterable[Frame] = _reference(case) if steps < 1000 else walk(recording, moments=True)
    ours = walk(recording, backend, variant.name, exact=True, moments=True)
    differing, where = 0, ""
    for one, other in zip(ours, reference, strict=True):
        for name, a in one.params.items():
            pairs = [("", a, other.params[name])]
            # Moments are compared where the walk ends; on the way they show in the weights.
            if one.t in (1, steps):
                states = zip("mv", one.moments[name], other.moments[name], strict=True)
                pairs += [(f" ({letter})", x, y) for letter, x, y in states]
            for what, x, y in pairs:
                count = _differing(x, y)
                if count and not where:
                    where = f", {name}{what}, step {one.t}"
                differing += count
    return Measured(float(differing), where)


@np.errstate(all="ignore")
def _pull(backend: Backend, variant: Variant, dtype: str, case: str) -> Measured:
    """How many values of three pulls, one after the other, differ from the specification's in any bit."""
    arrays, recall = PULLS[case]
    (group,) = Case(arrays=arrays, dtype=dtype, steps=1).recording().groups
    names = list(group.anchors)
    weights = [group.importance[name] for name in names] if group.importance else None
    taken: Any = variant.pull
    differing, where = 0, ""
    with backend.precision(dtype):
        layouts = [group.layouts[name] for name in names]
        params = [
            place(backend, group.theta0[n], dtype, at) for n, (at, *_) in zip(names, layouts, strict=True)
        ]
        stars = [
            place(backend, group.anchors[n], dtype, at) for n, (*_, at) in zip(names, layouts, strict=True)
        ]
        ours = weights and [place(backend, x, dtype, "") for x in weights]
        expected = [group.theta0[name] for name in names]
        for t in (1, 2, 3):
            params = taken(params, stars, recall, ours)
            for i, name in enumerate(names):
                delta = pull(expected[i], group.anchors[name], recall, weights and weights[i])
                expected[i] = apply(expected[i], delta)
                if dtype == "bfloat16":  # which NumPy has as float32
                    expected[i] = to_bfloat16(expected[i])
                pairs = [("", params[i], expected[i]), (" (anchor)", stars[i], group.anchors[name])]
                for what, x, want in pairs:
                    count = _differing(backend.to_numpy(x), want)
                    where = where or f", {name}{what}, step {t}" if count else where
                    differing += count
    return Measured(float(differing), where)


def _differing(a: Any, b: Any) -> int:
    """Values whose bits differ; any NaN equals any other."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return int(max(a.size, b.size, 1))
    whole = np.dtype(f"u{a.dtype.itemsize}")
    same = (np.atleast_1d(a).view(whole) == np.atleast_1d(b).view(whole)) | np.atleast_1d((a != a) & (b != b))
    return int(same.size - np.count_nonzero(same))


@np.errstate(all="ignore")
def _step(backend: Backend, variant: Variant, dtype: str, case: str) -> Measured:
    """The largest error of one step, from where the backend itself stands, as a share of its bound."""
    recording = _recording(case)
    worst, where, largest, total, count = 0.0, "", 0.0, 0.0, 0
    inner = dtype if dtype in ("float64", "float32") else "float32"
    precise = inner if variant.traced else "float64"
    before: Frame | None = None
    for frame in _walked(backend, variant.name, case):
        group = recording.groups[frame.group]
        if before is None or not _looked_at(frame.t):
            before = frame
            continue
        for anchored in (True, False):
            names = [name for name in frame.params if (name in group.anchors) == anchored]
            if not names:
                continue
            sizes = np.cumsum([frame.params[name].size for name in names])
            some = _some(int(sizes[-1]))
            start, got = ([x[some] for x in _stand(at, names)] for at in (before, frame))
            start.insert(1, _joined(frame.grads, names)[some])
            star = _joined(group.anchors, names)[some] if anchored else None
            weight = _joined(group.importance, names)[some] if anchored and group.importance else None
            # Where a square overflows there is no error to speak of; the claim on bits covers those.
            overflows = ~np.isfinite(start[1].astype(start[3].dtype) ** 2) | ~np.isfinite(start[3])
            about = (dtype, precise, variant.rounds_update)
            exact, may = _oracle(case, group.hp, frame, start, star, weight, *about)
            for i, what in enumerate(("theta", "m", "v")):
                error = _error(got[i].tobytes(), got[i].dtype.str, exact[i])
                spacing = oracle.ulp(may[i + 3], dtype if what == "theta" else inner)
                share = np.where(overflows, 0.0, _or_infinite(error / may[i]))
                ulps = np.where(overflows, 0.0, error / spacing)
                largest, total, count = max(largest, float(ulps.max())), total + ulps.sum(), count + ulps.size
                k = int(np.argmax(share))
                if share[k] > worst:
                    worst = float(share[k])
                    name = names[int(np.searchsorted(sizes, some[k], side="right"))]
                    where = f", {name}{'' if what == 'theta' else f' ({what})'}, step {frame.t}"
        before = frame
    return Measured(worst, where, largest, total, count)


def _looked_at(t: int) -> bool:
    """The first steps, where bias correction and annealing change most, and every fourth after them."""
    return 1 <= t <= 8 or (t % 4 == 0 and t > 0)


def _some(size: int) -> Any:
    """Which of so many values the oracle is asked about: all; or of a large array some, its ends included."""
    return np.unique(np.linspace(0, size - 1, min(size, 300)).astype(int))


_told: dict[Any, Any] = {}


def _oracle(
    case: str, hp: Hyperparameters, frame: Frame, start: Any, star: Any, weight: Any, *about: Any
) -> tuple[oracle.Exactly, oracle.Budget]:
    """What the oracle says of a step; told again to variants that stand on the same bits."""
    key = (case, frame.group, frame.t, star is None, about, *(x.tobytes() for x in start))
    if key not in _told:
        dtype, precise, rounds_update = about
        c = oracle.exact_coefficients(frame.t, hp, frame.lr, star is not None)
        off = oracle.spread(frame.t, hp, frame.lr, star is not None, precise, c)
        theta, grad, m, v = start
        exact = oracle.exact_step(theta, grad, m, v, star, c, weight)
        may = oracle.budget(theta, grad, m, v, star, c, exact, off, dtype, rounds_update, weight)
        _told[key] = exact, may
    answer: tuple[oracle.Exactly, oracle.Budget] = _told[key]
    return answer


def _error(got: bytes, dtype: str, exact: Any) -> Any:
    """Distance of computed numbers from exact ones; told again, like the oracle's answers."""
    key = (got, id(exact))
    if key not in _told:
        numbers = np.frombuffer(got, dtype=dtype).astype(object)
        _told[key] = np.abs(np.asarray(oracle.mpf(numbers) - exact, dtype=np.float64))
    return _told[key]


def _or_infinite(share: Any) -> Any:
    """What is no number exceeds any bound, and must not be forgotten at the next step."""
    return np.where(np.isnan(share), np.inf, share)


def _stand(frame: Frame, names: list[str]) -> list[Any]:
    """Parameters and both moments after a step, each in one row."""
    return [_joined(frame.params, names)] + [
        np.concatenate([np.ravel(frame.moments[name][i]) for name in names]) for i in (0, 1)
    ]


def _joined(arrays: Any, names: list[str]) -> Any:
    return np.concatenate([np.ravel(arrays[name]) for name in names])


def _trajectory(backend: Backend, variant: Variant, dtype: str, case: str) -> Measured:
    """The largest distance from the specification's trajectory, or a recorded one, as a share of the way."""
    recording = _recording(case)
    if recording.groups[0].expected is not None:
        worst = trajectory_deviation(recording, replay(recording, backend, variant.name))
    else:
        ours, theirs = map(trajectories, (_walked(backend, variant.name, case), _reference(case)))
        worst = trajectory_deviation(recording, ours, theirs)
    return Measured(worst.share, f", {worst.name}, step {worst.step}")


def _manners(backend: Backend, variant: Variant, dtype: str, case: str) -> Measured:
    """Nothing, or an error that says what is amiss."""
    with backend.precision(dtype), np.errstate(all="ignore"):
        MANNERS[case](backend, variant, dtype)
    return Measured(0.0)


STEPS = 100_000
"""Steps over which float32 coefficients are compared."""

SOME = np.unique(np.concatenate([np.arange(1, 101), np.geomspace(100, STEPS, 100).astype(int)]))
"""Steps at which the oracle computes them."""


@np.errstate(all="ignore")
def _coefficients(backend: Backend, variant: Variant, dtype: str, case: str) -> Measured:
    """The largest error of a coefficient over many steps, as a share of its bound."""
    worst, where, largest, total, count = 0.0, "", 0.0, 0.0, 0
    computes: Any = variant.coefficients
    for form in FORMS:
        hp = Hyperparameters(lr=1e-3, gamma=300.0, weight_decay=0.01, annealing=ANNEALINGS[case], form=form)
        # A new head's coefficients know no annealing: once is enough.
        for anchored in (True, False) if case == "sigmoid" else (True,):
            t, expected = _expected(hp, anchored, dtype)
            computed = computes(t, hp, anchored, dtype)[2:]
            ours = [np.broadcast_to(np.asarray(x, dtype=np.float64), t.shape) for x in computed]
            may = oracle.spread(t, hp, hp.lr, anchored, dtype, Coefficients(0.0, 0.0, *expected))
            for name, got, want, bound in zip(oracle.Spread._fields, ours, expected, may, strict=True):
                error = np.abs(got - want)
                ulps = error / oracle.ulp(np.abs(want), dtype)
                share = _or_infinite(error / bound)
                k = int(np.argmax(share))
                largest, total, count = max(largest, float(ulps.max())), total + ulps.sum(), count + ulps.size
                if share[k] > worst:
                    worst, where = float(share[k]), f", {form} {name}, step {t[k]}"
    return Measured(worst, where, largest, float(total), count)


@cache
def _expected(hp: Hyperparameters, anchored: bool, dtype: str) -> tuple[Any, list[Any]]:
    """Steps and their coefficients: the oracle's; for float32 NumPy's in float64 between those."""
    exact = [oracle.exact_coefficients(int(t), hp, hp.lr, anchored)[2:] for t in SOME]
    columns = [np.array(column, dtype=np.float64) for column in zip(*exact, strict=True)]
    if dtype == "float64":
        return SOME, columns
    t = np.arange(1, STEPS + 1)
    between = coefficients(t.astype(np.float64), hp, None, anchored, xp=np)[2:]
    whole = [np.broadcast_to(np.asarray(x, dtype=np.float64), t.shape).copy() for x in between]
    for column, x in zip(columns, whole, strict=True):
        x[SOME - 1] = column
    return t, whole


MEASURES: dict[str, Callable[[Backend, Variant, str, str], Measured]] = {
    "exact": _bits,
    "denormals": _bits,
    "weighed": _bits,
    "pull": _pull,
    "step": _step,
    "trajectory": _trajectory,
    "golden": _trajectory,
    "coefficients": _coefficients,
    "manners": _manners,
}
"""How each kind of claim is measured."""
