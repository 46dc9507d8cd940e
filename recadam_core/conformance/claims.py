"""The claims that a backend is held to, and what was measured."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..backends import Backend
from ..coefficients import Coefficients, coefficients
from ..errors import RecAdamError, unknown
from ..hyperparameters import FORMS, Hyperparameters
from ..variants import Variant
from . import oracle
from .cases import ANNEALINGS, BOTH, DENORMALS, EXACT, FAST, WEIGHED, Case
from .manners import MANNERS
from .oracle import Spread
from .replay import Frame, Recording, load_recording, replay, trajectories, trajectory_deviation, walk

__all__ = ["BOUNDS", "LEVELS", "Claim", "Result", "check", "claims"]

LEVELS = ("exact", "fast")
"""The two levels: the specification's bits in the exact setting; bounded errors in the default one."""

BOUNDS = {
    "trajectory float64": 1e-13,
    "trajectory float32": 5e-5,
    "golden float64": 1e-12,
    "golden float32": 1e-5,
}
"""Largest distance from the reference trajectory, as a share of the distance travelled."""


@dataclass(frozen=True)
class Claim:
    """What is claimed of a variant, and the cases that show it.

    Args:
        kind: "exact", "denormals", "weighed", "step", "trajectory", "golden", "coefficients" or "manners".
        level: one of `LEVELS`.
        dtype: the weights' dtype.
        cases: names of cases, of annealings or of manners, or paths of golden files.

    Example:
        >>> Claim("exact", "exact", "float32", ()).name
        'exact float32'
    """

    kind: str
    level: str
    dtype: str
    cases: tuple[str, ...]

    @property
    def name(self) -> str:
        """Kind and dtype."""
        return f"{self.kind} {self.dtype}"


@dataclass(frozen=True)
class Result:
    """One claim about one variant of a backend, and the worst case found.

    Args:
        backend: the backend's name.
        variant: the variant's name.
        level: one of `LEVELS`.
        claim: kind and dtype.
        cases: number of cases.
        worst: what was measured: for "exact", "denormals" and "weighed" the number of values whose bits
            differ; for "step" and "coefficients" the largest error as a share of its derived bound; for
            "manners" 0; else the largest distance as a share of the way. Infinite where something was raised.
        bound: what it may be at most.
        ulps: largest and mean error in ulps of the largest operand, where that was measured.
        where: the worst case: its name, the array, and the step; or what it raised.
        command: what shows that case alone.
        seconds: how long it took.
        known: why the claim is known to be missed; empty when it is not.
        lacks: what is not installed here, so that nothing was measured; empty otherwise.

    Example:
        >>> Result("numpy", "functional", "exact", "exact float64", 1, 0.0, 0.0).verdict
        'yes'
    """

    backend: str
    variant: str
    level: str
    claim: str
    cases: int
    worst: float
    bound: float
    ulps: tuple[float, float] | None = None
    where: str = ""
    command: str = ""
    seconds: float = 0.0
    known: str = ""
    lacks: str = ""

    @property
    def holds(self) -> bool:
        """Whether the worst case is within the bound; NaN is not."""
        return self.worst <= self.bound

    @property
    def verdict(self) -> str:
        """One of yes, NO, known (a declared miss), STALE (a declared miss that holds), skipped."""
        if self.lacks:
            return "skipped"
        if self.known:
            return "STALE" if self.holds else "known"
        return "yes" if self.holds else "NO"

    @property
    def passes(self) -> bool:
        """Whether the kit is content."""
        return self.verdict in ("yes", "known", "skipped")

    def to_dict(self) -> dict[str, Any]:
        """The fields and the verdict, ready for JSON."""
        # JSON has no infinity: null where nothing could be measured.
        worst = self.worst if math.isfinite(self.worst) else None
        return {**asdict(self), "worst": worst, "verdict": self.verdict}


@dataclass(frozen=True)
class Measured:
    """What one case showed."""

    worst: float
    where: str = ""
    ulps: float = 0.0
    total: float = 0.0  # of errors in ulps
    count: int = 0


def claims(backend: Backend, variant: Variant, level: str, golden: Path | None = None) -> list[Claim]:
    """The claims of one level about one variant, as its backend's capabilities have them.

    Args:
        backend: the backend.
        variant: one of its variants.
        level: one of `LEVELS`.
        golden: a folder of golden trajectories to replay too; None for none.

    Returns:
        The claims.

    Raises:
        RecAdamError: when the level is unknown or there is no golden trajectory in the folder.

    Example:
        >>> from recadam_core import get_backend
        >>> numpy = get_backend("numpy")
        >>> [claim.name for claim in claims(numpy, numpy.capabilities.variants[0], "exact")]
        ['exact float32', 'denormals float32', 'weighed float32', 'exact float64', 'denormals float64',
        'weighed float64']
    """
    if level not in LEVELS:
        raise unknown("level", level, LEVELS)
    for dtype in backend.capabilities.dtypes:
        if dtype not in oracle.DIGITS:
            raise unknown(f"dtype in the capabilities of {backend.name!r}:", dtype, oracle.DIGITS)
    # A miss of what is never claimed would never be found stale.
    every = [claim for each in LEVELS for claim in _claims(backend, variant, each, dict.fromkeys(BOTH, ()))]
    possible = {name for claim in every for name in (claim.kind, claim.name)}
    for missed in variant.misses:
        if missed not in possible:
            raise unknown(f"claim in the misses of {backend.name!r} {variant.name!r}:", missed, possible)
    return _claims(backend, variant, level, _golden(golden))


def _claims(
    backend: Backend, variant: Variant, level: str, golden: Mapping[str, tuple[str, ...]]
) -> list[Claim]:
    dtypes = backend.capabilities.dtypes
    found = []
    if level == "exact":
        for dtype in EXACT:
            kinds = {
                "exact": EXACT,
                "denormals": DENORMALS,
                "weighed": WEIGHED,
            }
            for kind, cases in kinds.items():
                claim = Claim(kind, level, dtype, tuple(case.name for case in cases[dtype]))
                # What is never exact promises no bits; that it misses them may be shown all the same.
                if variant.exact.promised or {kind, claim.name} & set(variant.misses):
                    found.append(claim)
    else:
        for dtype, fast in FAST.items():
            names = tuple(case.name for case in (*fast, WEIGHED[dtype][0]))
            found.append(Claim("step", level, dtype, names))
            if f"trajectory {dtype}" in BOUNDS:
                found.append(Claim("trajectory", level, dtype, names))
        if variant.coefficients is not None:
            dtypes_of_them = EXACT if variant.traced else ("float64",)  # of the host
            found += [Claim("coefficients", level, dtype, tuple(ANNEALINGS)) for dtype in dtypes_of_them]
        found += [Claim("golden", level, dtype, paths) for dtype, paths in golden.items()]
        usual = "float32" if "float32" in dtypes else dtypes[0]
        found.append(Claim("manners", level, usual, tuple(MANNERS)))
    return [claim for claim in found if claim.dtype in dtypes]


def _golden(folder: Path | None) -> dict[str, tuple[str, ...]]:
    if folder is None:
        return {}
    paths = sorted(Path(folder).glob("*.npz"))
    if not paths:
        raise RecAdamError(f"{folder}: no .npz file there; give the folder of golden trajectories")
    found: dict[str, tuple[str, ...]] = {}
    for path in paths:
        dtype = load_recording(path).dtype
        found[dtype] = (*found.get(dtype, ()), str(path))
    return found


def check(
    backend: Backend,
    variant: Variant,
    claim: Claim,
) -> Result:
    """Hold one variant to one claim, in this process.

    Args:
        backend: the backend.
        variant: one of its variants.
        claim: the claim.

    Returns:
        The result, with the worst case.

    Example:
        >>> from recadam_core import get_backend
        >>> numpy = get_backend("numpy")
        >>> claim = Claim("exact", "exact", "float32", (Case(dtype="float32", steps=5).name,))
        >>> check(numpy, numpy.capabilities.variants[0], claim).verdict
        'yes'
    """
    began = time.perf_counter()
    known = variant.misses.get(claim.kind, "") or variant.misses.get(claim.name, "")
    found: list[tuple[Measured, str]] = []
    for case in claim.cases:
        try:
            measured = MEASURES[claim.kind](backend, variant, claim, case)
        except Exception as error:
            # Whatever a stranger's code raises is a miss, and no known one.
            kind = "" if isinstance(error, RecAdamError) else f"{type(error).__name__}: "
            measured, known = Measured(math.inf, f": {kind}{error}"), ""
        found.append((measured, case))
        if known and not found[-1][0].worst <= _bound(claim):
            break  # a known miss is shown by one case
    worst, case = max(found, key=lambda pair: math.inf if math.isnan(pair[0].worst) else pair[0].worst)
    count = sum(measured.count for measured, _ in found)
    ulps = None
    if count:
        largest = max(measured.ulps for measured, _ in found)
        ulps = (largest, sum(measured.total for measured, _ in found) / count)
    path = Path(case)
    chosen = f"--golden {shlex.quote(str(path.parent))} --case {path.name}" if claim.kind == "golden" else ""
    command = (
        f"recadam conformance --backend {backend.name} --variant {variant.name} --level {claim.level} "
        f"--claim {claim.kind} {chosen or f'--case {case}'}"
    )
    where = f"{path.stem if claim.kind == 'golden' else case}{worst.where}" if worst.worst else ""
    return Result(
        backend=backend.name,
        variant=variant.name,
        level=claim.level,
        claim=claim.name,
        cases=len(claim.cases),
        worst=worst.worst,
        bound=_bound(claim),
        ulps=ulps,
        where=where,
        command=command,
        seconds=time.perf_counter() - began,
        known=known,
    )


def _bound(claim: Claim) -> float:
    if claim.kind in ("exact", "denormals", "weighed", "manners"):
        return 0.0
    return BOUNDS.get(claim.name, 1.0)


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


def _bits(backend: Backend, variant: Variant, claim: Claim, case: str) -> Measured:
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


def _differing(a: Any, b: Any) -> int:
    """Values whose bits differ; any NaN equals any other."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return int(max(a.size, b.size, 1))
    whole = np.dtype(f"u{a.dtype.itemsize}")
    same = (np.atleast_1d(a).view(whole) == np.atleast_1d(b).view(whole)) | np.atleast_1d((a != a) & (b != b))
    return int(same.size - np.count_nonzero(same))


@np.errstate(all="ignore")
def _step(backend: Backend, variant: Variant, claim: Claim, case: str) -> Measured:
    """The largest error of one step, from where the backend itself stands, as a share of its bound."""
    recording = _recording(case)
    worst, where, largest, total, count = 0.0, "", 0.0, 0.0, 0
    inner = claim.dtype if claim.dtype in ("float64", "float32") else "float32"
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
            start = [_joined(x, names)[some] for x in (before.params, frame.grads)]
            start += [_joined({n: s[i] for n, s in before.moments.items()}, names)[some] for i in (0, 1)]
            star = _joined(group.anchors, names)[some] if anchored else None
            weight = _joined(group.importance, names)[some] if anchored and group.importance else None
            # Where a square overflows there is no error to speak of; the claim on bits covers those.
            overflows = ~np.isfinite(start[1].astype(start[3].dtype) ** 2) | ~np.isfinite(start[3])
            about = (claim.dtype, precise, variant.rounds_update)
            exact, may = _oracle(case, group.hp, frame, start, star, weight, *about)
            got = [_joined(frame.params, names)[some]]
            got += [_joined({n: s[i] for n, s in frame.moments.items()}, names)[some] for i in (0, 1)]
            for i, what in enumerate(("theta", "m", "v")):
                error = _error(got[i].tobytes(), got[i].dtype.str, exact[i])
                spacing = oracle.ulp(may[i + 3], claim.dtype if what == "theta" else inner)
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


def _joined(arrays: Any, names: list[str]) -> Any:
    return np.concatenate([np.ravel(arrays[name]) for name in names])


def _trajectory(backend: Backend, variant: Variant, claim: Claim, case: str) -> Measured:
    """The largest distance from the specification's trajectory, as a share of the way."""
    recording = _recording(case)
    ours, theirs = map(trajectories, (_walked(backend, variant.name, case), _reference(case)))
    worst = trajectory_deviation(recording, ours, theirs)
    return Measured(worst.share, f", {worst.name}, step {worst.step}")


def _golden_way(backend: Backend, variant: Variant, claim: Claim, case: str) -> Measured:
    """The largest distance from the recorded weights, as a share of the way."""
    recording = _recording(case)
    worst = trajectory_deviation(recording, replay(recording, backend, variant.name))
    return Measured(worst.share, f", {worst.name}, step {worst.step}")


def _manners(backend: Backend, variant: Variant, claim: Claim, case: str) -> Measured:
    """Nothing, or an error that says what is amiss."""
    with backend.precision(claim.dtype), np.errstate(all="ignore"):
        MANNERS[case](backend, variant, claim.dtype)
    return Measured(0.0)


STEPS = 100_000
"""Steps over which float32 coefficients are compared."""

SOME = np.unique(np.concatenate([np.arange(1, 101), np.geomspace(100, STEPS, 100).astype(int)]))
"""Steps at which the oracle computes them."""


@np.errstate(all="ignore")
def _coefficients(backend: Backend, variant: Variant, claim: Claim, case: str) -> Measured:
    """The largest error of a coefficient over many steps, as a share of its bound."""
    worst, where, largest, total, count = 0.0, "", 0.0, 0.0, 0
    computes: Any = variant.coefficients
    for form in FORMS:
        hp = Hyperparameters(lr=1e-3, gamma=300.0, weight_decay=0.01, annealing=ANNEALINGS[case], form=form)
        # A new head's coefficients know no annealing: once is enough.
        for anchored in (True, False) if case == "sigmoid" else (True,):
            t, expected = _expected(hp, anchored, claim.dtype)
            computed = computes(t, hp, anchored, claim.dtype)[2:]
            ours = [np.broadcast_to(np.asarray(x, dtype=np.float64), t.shape) for x in computed]
            may = oracle.spread(t, hp, hp.lr, anchored, claim.dtype, Coefficients(0.0, 0.0, *expected))
            for name, got, want, bound in zip(Spread._fields, ours, expected, may, strict=True):
                error = np.abs(got - want)
                ulps = error / oracle.ulp(np.abs(want), claim.dtype)
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


MEASURES: dict[str, Callable[[Backend, Variant, Claim, str], Measured]] = {
    "exact": _bits,
    "denormals": _bits,
    "weighed": _bits,
    "step": _step,
    "trajectory": _trajectory,
    "golden": _golden_way,
    "coefficients": _coefficients,
    "manners": _manners,
}
"""How each kind of claim is measured."""
