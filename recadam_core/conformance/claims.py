"""The claims that a backend is held to, and what was measured."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..backends import Backend
from ..errors import RecAdamError, unknown
from ..variants import Variant
from .cases import ANNEALINGS, BOTH, DENORMALS, EXACT, FAST, PULLS, WEIGHED
from .manners import MANNERS
from .measures import MEASURES, Measured
from .oracle import DIGITS
from .replay import load_recording

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
        kind: "exact", "denormals", "weighed", "pull", "step", "trajectory", "golden", "coefficients" or
            "manners".
        level: one of `LEVELS`.
        dtype: the weights' dtype.
        cases: names of cases, of pulls, of annealings or of manners, or paths of golden files.

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
        worst: what was measured: for "exact", "denormals", "weighed" and "pull" the number of values whose
            bits differ; for "step" and "coefficients" the largest error as a share of its derived bound; for
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


def claims(backend: Backend, variant: Variant, level: str, golden: Path | None = None) -> list[Claim]:
    """The claims of a level about a variant, as its backend's capabilities have them; golden: a folder.

    Example:
        >>> from recadam_core import get_backend
        >>> numpy = get_backend("numpy")
        >>> [claim.name for claim in claims(numpy, numpy.capabilities.variants[0], "exact")]
        ['exact float32', 'denormals float32', 'weighed float32', 'exact float64', 'denormals float64',
        'weighed float64', 'pull float32', 'pull float64', 'pull float16']
    """
    if level not in LEVELS:
        raise unknown("level", level, LEVELS)
    for dtype in backend.capabilities.dtypes:
        if dtype not in DIGITS:
            raise unknown(f"dtype in the capabilities of {backend.name!r}:", dtype, DIGITS)
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
    made = []
    if level == "exact":
        for dtype in EXACT:
            for kind, cases in (("exact", EXACT), ("denormals", DENORMALS), ("weighed", WEIGHED)):
                claim = Claim(kind, level, dtype, tuple(case.name for case in cases[dtype]))
                # What is never exact promises no bits; that it misses them may be shown all the same.
                if variant.exact.promised or {kind, claim.name} & set(variant.misses):
                    made.append(claim)
        if variant.pull is not None:
            made += [Claim("pull", level, dtype, tuple(PULLS)) for dtype in FAST]
    else:
        for dtype, fast in FAST.items():
            names = tuple(case.name for case in (*fast, WEIGHED[dtype][0]))
            made.append(Claim("step", level, dtype, names))
            if f"trajectory {dtype}" in BOUNDS:
                made.append(Claim("trajectory", level, dtype, names))
        if variant.coefficients is not None:
            dtypes_of_them = EXACT if variant.traced else ("float64",)  # of the host
            made += [Claim("coefficients", level, dtype, tuple(ANNEALINGS)) for dtype in dtypes_of_them]
        made += [Claim("golden", level, dtype, paths) for dtype, paths in golden.items()]
        usual = "float32" if "float32" in dtypes else dtypes[0]
        made.append(Claim("manners", level, usual, tuple(MANNERS)))
    return [claim for claim in made if claim.dtype in dtypes]


def _golden(folder: Path | None) -> dict[str, tuple[str, ...]]:
    if folder is None:
        return {}
    paths = sorted(Path(folder).glob("*.npz"))
    if not paths:
        raise RecAdamError(f"{folder}: no .npz file there; give the folder of golden trajectories")
    by_dtype: dict[str, tuple[str, ...]] = {}
    for path in paths:
        dtype = load_recording(path).dtype
        by_dtype[dtype] = (*by_dtype.get(dtype, ()), str(path))
    return by_dtype


def check(backend: Backend, variant: Variant, claim: Claim) -> Result:
    """Hold one variant to one claim, in this process: the result, with the worst case.

    Example:
        >>> from recadam_core import get_backend
        >>> numpy = get_backend("numpy")
        >>> from recadam_core.conformance import Case
        >>> claim = Claim("exact", "exact", "float32", (Case(dtype="float32", steps=5).name,))
        >>> check(numpy, numpy.capabilities.variants[0], claim).verdict
        'yes'
    """
    began = time.perf_counter()
    known = variant.misses.get(claim.kind, "") or variant.misses.get(claim.name, "")
    measures: list[tuple[Measured, str]] = []
    for case in claim.cases:
        try:
            measured = MEASURES[claim.kind](backend, variant, claim.dtype, case)
        except Exception as error:
            # Whatever a stranger's code raises is a miss, and no known one.
            kind = "" if isinstance(error, RecAdamError) else f"{type(error).__name__}: "
            measured, known = Measured(math.inf, f": {kind}{error}"), ""
        measures.append((measured, case))
        if known and not measures[-1][0].worst <= _bound(claim):
            break  # a known miss is shown by one case
    worst, case = max(measures, key=lambda pair: math.inf if math.isnan(pair[0].worst) else pair[0].worst)
    count = sum(measured.count for measured, _ in measures)
    ulps = None
    if count:
        largest = max(measured.ulps for measured, _ in measures)
        ulps = (largest, sum(measured.total for measured, _ in measures) / count)
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
    if claim.kind in ("exact", "denormals", "weighed", "pull", "manners"):
        return 0.0
    return BOUNDS.get(claim.name, 1.0)
