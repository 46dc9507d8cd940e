"""Results and capabilities as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..backends import Backend
from .claims import Result

__all__ = ["COLUMNS", "LEGEND", "SUPPORT", "cells", "markdown", "support"]

COLUMNS = {
    "backend": False,
    "variant": False,
    "claim": False,
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
exact, denormals: values whose bits differ from the specification's
step, coefficients: largest error against the oracle as a share of its derived bound; and in ulps of the
largest operand, worst and mean
trajectory, golden: largest distance between the trajectories as a share of the distance travelled"""
"""What the numbers are."""


def cells(result: Result) -> list[str]:
    """A result as the cells of a table's row.

    Args:
        result: the result.

    Returns:
        A cell for each of `COLUMNS`.

    Example:
        >>> cells(Result("numpy", "fused", "exact", "exact float32", 36, 0.0, 0.0))[4:7]
        ['yes', '0', '0']
    """
    where = result.where
    if result.known:
        where = result.known
    if result.lacks:
        where = f"needs {result.lacks}"
    measured = not result.lacks
    return [
        result.backend,
        result.variant,
        result.claim,
        str(result.cases),
        result.verdict,
        f"{result.worst:.3g}" if measured else "",
        f"{result.bound:g}" if measured else "",
        f"{result.ulps[0]:.2f}" if result.ulps else "",
        f"{result.ulps[1]:.2f}" if result.ulps else "",
        where,
    ]


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), *rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown(results: Iterable[Result]) -> str:
    """Results as a Markdown table.

    Args:
        results: the results.

    Returns:
        The table.

    Example:
        >>> print(markdown([]).splitlines()[0])
        | backend | variant | claim | cases | holds | worst | bound | ulps | mean | worst case |
    """
    return _table(COLUMNS, [cells(result) for result in results])


SUPPORT = (
    "backend",
    "variant",
    "what a user writes",
    "bit for bit",
    "at the price of",
    "needs",
    "known misses",
)
"""Columns of the table of variants."""


def support(backends: Iterable[Backend]) -> str:
    """What each variant of each backend can do, as two Markdown tables.

    Args:
        backends: the backends.

    Returns:
        A table of backends, and one of their variants.

    Example:
        >>> from recadam_core import get_backend
        >>> "| numpy | float16, float32, float64 | cpu |" in support([get_backend("numpy")])
        True
    """
    loaded = list(backends)
    first = [
        [
            b.name,
            ", ".join(c.dtypes),
            ", ".join(c.devices),
            _yes(c.jit),
            _yes(c.sharding),
            ", ".join(c.finetunes),
        ]
        for b in loaded
        for c in [b.capabilities]
    ]
    second = [
        [
            b.name,
            v.name,
            f"`{v.about}`",
            v.exact.how if v.exact.how in ("always", "never") else f"`{v.exact.how}`",
            v.exact.price,
            ", ".join([*v.needs, *(" or ".join(names) for names in v.programs)]),
            "; ".join(f"{claim}: {why}" for claim, why in v.misses.items()),
        ]
        for b in loaded
        for v in b.capabilities.variants
    ]
    head = ("backend", "dtypes", "devices", "inside the user's jit", "sharding", "trains in the harness")
    return f"{_table(head, first)}\n\n{_table(SUPPORT, second)}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
