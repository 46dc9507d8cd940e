"""Results and capabilities as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from ..backends import Backend
from .claims import Result
from .measures import MEASURES

__all__ = ["COLUMNS", "LEGEND", "SUPPORT", "cells", "grouped", "markdown", "support"]

COLUMNS = {
    "backend": False,
    "claim": False,
    "variants": False,
    "cases": True,
    "holds": False,
    "worst": True,
    "bound": True,
    "ulps": True,
    "mean": True,
    "worst case": False,
}
"""Columns of a table of results, and whether they hold numbers."""

LEGEND = """\
worst, of exact, denormals, weighed and pull: how many values differ in any bit from the specification's
worst, of step and coefficients: largest error against the oracle, as a share of its derived bound
worst, of manners: 0, or infinity where one was amiss
worst, of trajectory and golden: largest distance between trajectories, as a share of the distance travelled
ulps, mean: largest and mean error in ulps of the largest operand
a worst case alone: recadam conformance --backend BACKEND --variant VARIANT --claim CLAIM --case CASE"""
"""What the numbers are."""


def grouped(results: Iterable[Result]) -> list[list[Result]]:
    """Results of one backend, claim and verdict together, the worst first.

    Example:
        >>> import dataclasses
        >>> one = Result("numpy", "functional", "exact", "exact float32", 36, 0.0, 0.0)
        >>> [len(group) for group in grouped([one, dataclasses.replace(one, variant="fused")])]
        [2]
    """
    groups: dict[tuple[str, str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.backend, result.claim, result.verdict, result.known), []).append(result)
    return [sorted(group, key=lambda r: (not math.isnan(r.worst), -r.worst)) for group in groups.values()]


def cells(group: list[Result]) -> list[str]:
    """A group of results as the cells of a table's row.

    Example:
        >>> cells([Result("numpy", "fused", "exact", "exact float32", 36, 0.0, 0.0)])[2:6]
        ['fused', '36', 'yes', '0']
    """
    worst = group[0]
    ulps = [result.ulps for result in group if result.ulps]
    where = f"{worst.variant}: {worst.where}" if worst.where else ""
    if worst.lacks:
        where = f"needs {worst.lacks}"
    if worst.known:
        where = worst.known
    measured = not worst.lacks
    return [
        worst.backend,
        worst.claim,
        ", ".join(result.variant for result in sorted(group, key=lambda r: r.variant)),
        str(worst.cases),
        worst.verdict,
        f"{worst.worst:.2g}" if measured else "",
        f"{worst.bound:g}" if measured else "",
        f"{max(largest for largest, _ in ulps):.2f}" if ulps else "",
        f"{sum(mean for _, mean in ulps) / len(ulps):.2f}" if ulps else "",
        where,
    ]


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), *rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown(results: Iterable[Result]) -> str:
    """Results as a Markdown table: a row a claim, a column a backend, the worst of its variants in it.

    Example:
        >>> print(markdown([Result("numpy", "fused", "exact", "exact float32", 36, 0.0, 0.0)]))
        | claim | cases | bound | numpy |
        | --- | --- | --- | --- |
        | exact float32 | 36 | 0 | 0 |
    """
    groups = grouped(results)
    backends = list(dict.fromkeys(group[0].backend for group in groups))
    rows: dict[str, dict[str, list[list[Result]]]] = {}
    for group in groups:
        rows.setdefault(group[0].claim, {}).setdefault(group[0].backend, []).append(group)
    lines = []
    for claim in sorted(rows, key=_order):
        any_group = next(iter(rows[claim].values()))[0]
        cases = max(result.cases for of in rows[claim].values() for group in of for result in group)
        line = ["; ".join(_cells(rows[claim].get(backend, []))) for backend in backends]
        lines.append([claim, str(cases), f"{any_group[0].bound:g}", *line])
    return _table(["claim", "cases", "bound", *backends], lines)


def _order(claim: str) -> tuple[int, str]:
    kind, dtype = claim.split()
    return [*MEASURES].index(kind), dtype


def _cells(groups: list[list[Result]]) -> Iterator[str]:
    """What the groups of one claim and backend measured; nothing is said of the figures of a known miss."""
    for verdict, words in (("yes", ""), ("NO", "**NO**"), ("STALE", "**STALE**")):
        for group in groups:
            if group[0].verdict == verdict:
                _, _, variants, _, _, worst, _, ulps, mean, _ = cells(group)
                figures = f"{worst} ({ulps} ulp, mean {mean})" if ulps else worst
                yield figures if verdict == "yes" else f"{words} {variants}: {figures}"
    for verdict, words in (("known", "known miss"), ("skipped", "skipped")):
        variants = ", ".join(r.variant for group in groups for r in group if r.verdict == verdict)
        if variants:
            yield f"{words}: {variants}"


SUPPORT = ("backend", "variant", "a user writes", "bit for bit", "at the price of", "needs")
"""Columns of the table of variants."""


def support(backends: Iterable[Backend]) -> str:
    """Markdown tables of the backends, of their variants, and of the claims that are known to be missed.

    Example:
        >>> from recadam_core import get_backend
        >>> "| numpy | float16, float32, float64 | cpu |" in support([get_backend("numpy")])
        True
    """
    loaded = [(b.name, b.capabilities) for b in backends]
    ways = [(name, v) for name, c in loaded for v in c.variants]
    first = [
        [
            name,
            ", ".join(c.dtypes),
            ", ".join(c.devices),
            *("yes" if x else "no" for x in (c.jit, c.sharding)),
        ]
        for name, c in loaded
    ]
    second = []
    for name, v in ways:
        how = v.exact.how if v.exact.how in ("always", "never") else f"`{v.exact.how}`"
        needs = [*v.needs, *map(" or ".join, v.programs), *(f"{k}={x}" for k, x in v.environment.items())]
        second.append([name, v.name, f"`{v.about}`", how, v.exact.price, ", ".join(needs)])
    misses: dict[tuple[str, str, str], list[str]] = {}
    for name, v in ways:
        for claim, why in v.misses.items():
            misses.setdefault((name, claim, why), []).append(v.name)
    third = [[name, claim, ", ".join(variants), why] for (name, claim, why), variants in misses.items()]
    head = ("backend", "dtypes", "devices", "inside the user's jit", "sharding")
    known = _table(("backend", "claim", "missed by", "because"), third)
    return "\n\n".join((_table(head, first), _table(SUPPORT, second), known))
