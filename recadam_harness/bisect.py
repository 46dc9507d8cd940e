"""Where two runs first part: step, parameter, element, and the operation that rounds differently."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from recadam_core.backends import get_backend
from recadam_core.coefficients import Coefficients, coefficients
from recadam_core.interrupts import deferred
from recadam_core.update import Moments

from .directory import Run
from .engines import Array, Engine, policy
from .run import prepare

__all__ = ["Inputs", "Kernel", "Parting", "bisect_runs", "explain"]


@dataclass(frozen=True)
class Kernel:
    """How one run's kernel rounded, held against the specification on the same numbers."""

    run: str
    operations: tuple[str, ...]
    explained: int
    elements: int

    def __str__(self) -> str:
        """One line."""
        if self.explained < self.elements:
            share = f"{self.explained} of {self.elements} elements"
            known = f"; nearest: {', '.join(self.operations)}" if self.operations else ""
            return f"{self.run}: not explained (the specification's operations give {share}{known})"
        if not self.operations:
            return f"{self.run}: every operation is rounded as specified"
        return f"{self.run}: first {', then '.join(self.operations)}"


@dataclass(frozen=True)
class Parting:
    """The first difference of two runs."""

    step: int
    name: str
    element: tuple[int, ...]
    values: tuple[float, float]
    ulps: int
    differing: int
    gradients: tuple[float, float]
    kernels: tuple[Kernel, ...]
    repeats: bool

    def lines(self) -> list[str]:
        """The parting in words."""
        where = f"{self.name}[{', '.join(map(str, self.element))}]"
        first, second = self.gradients
        equal = "equal, so the kernel made the difference"
        if first != second:
            equal = f"{first!r} and {second!r}, so differentiation made the first difference"
        lines = [
            f"first difference: step {self.step}, {where}: {self.values[0]!r} and {self.values[1]!r}, "
            f"{self.ulps} ulp apart ({self.differing} elements of it differ)",
            f"gradients there: {equal}",
            *(f"kernel of {kernel}" for kernel in self.kernels),
        ]
        if not self.repeats:
            lines.append("taken again here the runs do not repeat their records bit for bit: they were made")
            lines[-1] += " elsewhere, by another release, or on another number of threads"
        return lines


@dataclass(frozen=True)
class Inputs:
    """What the kernel read, of one parameter."""

    theta: Array
    grad: Array
    moments: Moments
    anchor: Array | None


def bisect_runs(reference: Run, other: Run, progress: Callable[[int], None] | None = None) -> Parting | None:
    """Take two runs again, side by side, until a weight differs, and look into that step."""
    tell = progress or (lambda step: None)
    runs = (reference, other)
    with contextlib.ExitStack() as stack:
        for run in runs:
            stack.enter_context(get_backend(run.config.backend).precision(run.config.dtype))
        difference = None
        repeats = True
        check = stack.enter_context(deferred())
        for t, records, weights in _together(runs):
            check()
            tell(t)
            for run, record in zip(runs, records, strict=True):
                repeats = repeats and bool(record.loss == run.steps["loss"][t - 1])
            difference = _difference(*weights)
            if difference is not None:
                break
        if difference is None:
            return None
        name, element, differing = difference
        a, b = (w[name][element] for w in weights)
        inputs, outputs = _once_more(runs, t, name, check)
        return Parting(
            step=t,
            name=name,
            element=tuple(int(i) for i in element),
            values=(float(a), float(b)),
            ulps=_apart(a, b),
            differing=differing,
            gradients=(float(inputs[0].grad[element]), float(inputs[1].grad[element])),
            kernels=tuple(_kernel(run, t, i, o) for run, i, o in zip(runs, inputs, outputs, strict=True))
            if reference.config.optimizer in ("recadam", "annealed")
            else (),
            repeats=repeats,
        )


def _together(runs: tuple[Run, Run]) -> Iterator[tuple[int, list[Any], list[dict[str, Array]]]]:
    """Step, records and weights of both runs, step by step."""
    both = [prepare(run.config) for run in runs]
    for t in range(1, runs[0].config.steps + 1):
        records = [one.step(t) for one in both]
        yield t, records, [one.engine.weights() for one in both]


def _difference(a: Mapping[str, Array], b: Mapping[str, Array]) -> tuple[str, tuple[Any, ...], int] | None:
    for name, x in a.items():
        differs = ~((x == b[name]) | ((x != x) & (b[name] != b[name])))
        if differs.any():
            return name, np.unravel_index(int(np.argmax(differs)), x.shape), int(differs.sum())
    return None


def _apart(a: Any, b: Any) -> int:
    """How many numbers of the dtype lie between two of them."""
    whole = np.dtype(f"i{a.dtype.itemsize}")
    x, y = (int(np.asarray(value).view(whole)) for value in (a, b))
    lowest = -(2 ** (8 * a.dtype.itemsize - 1))
    places = [number if number >= 0 else lowest - number for number in (x, y)]
    return int(abs(places[0] - places[1]))


def _once_more(
    runs: tuple[Run, Run], t: int, name: str, check: Callable[[], None]
) -> tuple[list[Inputs], list[Inputs]]:
    """What both kernels read of a parameter at step t, and what they wrote."""
    inputs, outputs = [], []
    for run in runs:
        again = prepare(run.config)
        for earlier in range(1, t):
            check()
            again.step(earlier)
        problem, engine = again.problem, again.engine
        _, pulled = policy(run.config.optimizer, run.config.hp, problem.anchored)
        anchor = np.asarray(problem.params[name], dtype=run.config.dtype) if name in pulled else None

        def read(grad: Array, engine: Engine = engine, anchor: Array | None = anchor) -> Inputs:
            return Inputs(engine.weights()[name].copy(), grad, engine.moments(name), anchor)

        inputs.append(read(engine.gradients(again.batch(t))[name]))
        again.step(t)
        outputs.append(read(inputs[-1].grad))
    return inputs, outputs


def _kernel(run: Run, t: int, before: Inputs, after: Inputs) -> Kernel:
    config = run.config
    hp, _ = policy(config.optimizer, config.hp, frozenset())
    lr = config.rate(t)
    anchored = before.anchor is not None
    choices = {"": coefficients(t, hp, lr, anchored)}
    for variant in get_backend(config.backend).capabilities.variants:
        if variant.traced and variant.coefficients is not None:
            traced = variant.coefficients(np.array(float(t)), hp.replace(lr=lr), anchored, config.dtype)
            choices["the coefficients, computed traced"] = Coefficients(*map(float, traced))
    operations, explained = explain(before, after, choices)
    return Kernel(run.label, operations, explained, before.theta.size)


def explain(
    before: Inputs, after: Inputs, choices: Mapping[str, Coefficients]
) -> tuple[tuple[str, ...], int]:
    """The fewest operations that, rounded otherwise than specified, give what a kernel wrote.

    Tried are: Adam's fraction off by an ulp of the root in some elements, and a product and a sum in one
    rounding. Several changes may write the same numbers: what is named is the shortest reading, no proof.
    """
    best: tuple[int, int, tuple[str, ...]] = (-1, 0, ())
    for name, c in choices.items():
        for picks in itertools.product(*SITES.values()):
            operations = tuple(filter(None, (name, *picks)))
            same = np.zeros(before.theta.shape, dtype=bool)
            for ulps in (-1, 0, 1) if operations and ROOT in operations else (0,):
                with np.errstate(all="ignore"):
                    theta, m, v = _candidate(before, c, picks, ulps)
                same |= (theta == after.theta) & (m == after.moments.m) & (v == after.moments.v)
            tried = (int(same.sum()), -len(operations), operations)
            if tried[:2] > best[:2]:
                best = tried
    return best[2], best[0]


ROOT = "m' / (sqrt(v') + eps), an ulp off in places: a root or a division that is not correctly rounded"

SITES: dict[str, tuple[str, ...]] = {
    "m": ("", "beta1 m + ... in one rounding", "... + (1 - beta1) g in one rounding"),
    "v": ("", "beta2 v + ... in one rounding", "... + (1 - beta2) g^2 in one rounding"),
    "root": ("", ROOT),
    "pull": (
        "",
        "pull (anchor - theta) - ... in one rounding",
        "... - step (m' / ...) in one rounding",
    ),
    "decay": ("", "... - decay theta in one rounding"),
}
"""Operations that may be rounded otherwise, in the kernel's order; "" as specified."""


def _candidate(x: Inputs, c: Coefficients, picks: tuple[str, ...], ulps: int) -> Any:
    """Parameter and moments after the step, with operations rounded as picked and a root that is ulps off."""
    ways = {site: SITES[site].index(pick) for site, pick in zip(SITES, picks, strict=True)}
    number = x.theta.dtype.type
    beta1, beta2, step, eps, pull, decay = map(number, c)
    rest1, rest2 = number(1 - c.beta1), number(1 - c.beta2)
    square = x.grad * x.grad
    m = _sum(beta1, x.moments.m, rest1, x.grad, ways["m"])
    v = _sum(beta2, x.moments.v, rest2, square, ways["v"])
    root = np.sqrt(v)
    if ulps:
        root = np.nextafter(root, number(np.inf if ulps > 0 else 0.0))
    ratio = m / (root + eps)
    if x.anchor is None or not c.pull:
        delta = -(step * ratio)
    else:
        delta = _sum(pull, x.anchor - x.theta, -step, ratio, ways["pull"])
    if c.decay:
        delta = _fused(-decay, x.theta, delta) if ways["decay"] else delta - decay * x.theta
    return x.theta + delta, m, v


def _sum(a: Any, x: Any, b: Any, y: Any, way: int) -> Any:
    """A x + b y: three roundings; or two, with the first or the second product not rounded."""
    if way == 1:
        return _fused(a, x, b * y)
    return _fused(b, y, a * x) if way == 2 else a * x + b * y


def _fused(a: Any, x: Any, y: Any) -> Any:
    """A x + y, rounded once."""
    if x.dtype == np.float32:  # the product is exact in float64
        return (np.float64(a) * x.astype(np.float64) + y.astype(np.float64)).astype(np.float32)
    product = a * x
    high, low = _split(a), _split(x)
    error = ((high[0] * low[0] - product) + high[0] * low[1] + high[1] * low[0]) + high[1] * low[1]
    total = product + y
    back = total - product
    return total + (((product - (total - back)) + (y - back)) + error)


def _split(x: Any) -> tuple[Any, Any]:
    """The upper and the lower half of a float64's digits."""
    scaled = x * 134217729.0
    high = scaled - (scaled - x)
    return high, x - high
