"""Do two runs agree, step by step, and where do they first part?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from recadam_core.errors import RecAdamError, check_number

from .config import flat
from .directory import Run

__all__ = ["TOLERANCES", "Comparison", "compare_runs", "setup_of"]

TOLERANCES = {"float64": 1e-9, "float32": 0.01}
"""Largest distance between two runs' weights, as a share of the distance travelled, by dtype."""

PREDICTIONS = 0.99
"""Smallest share of equal test predictions."""

TINY = float(np.finfo(np.float64).tiny)

COLUMNS = ("loss", "grad_norm", "distance")
"""Records that are compared at every step, each relative to its largest value in the run."""


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common.

    Args:
        first: label of the reference.
        second: label of the other.
        paths: directories of the two.
        agree: whether weights and predictions are within their bounds and every step is.
        weights: largest distance of the weights over the kept steps, as a share of the distance
            travelled by then.
        snapshots: each kept step, and that share.
        weights_step: the step of the largest.
        weights_name: the parameter that lies furthest apart there.
        predictions: share of equal test predictions.
        rows: number of test rows.
        steps: number of steps both have.
        records: largest relative difference of each recorded column.
        parted: the first step at which a recorded value differs by more than the tolerance, with the
            column; None when there is none.
        first_difference: the first step at which a recorded value differs at all, with the column.
        tolerance: the bound on `weights` and on the records.
    """

    first: str
    second: str
    paths: tuple[str, str]
    agree: bool
    weights: float
    snapshots: tuple[tuple[int, float], ...]
    weights_step: int
    weights_name: str
    predictions: float
    rows: int
    steps: int
    records: dict[str, float]
    parted: tuple[int, str] | None
    first_difference: tuple[int, str] | None
    tolerance: float


def compare_runs(
    reference: Run,
    other: Run,
    tolerance: float | None = None,
    predictions: float = PREDICTIONS,
) -> Comparison:
    """Hold one run against another that differs in nothing but the backend.

    Args:
        reference: the run to compare with.
        other: the run to compare.
        tolerance: bound on the distance of the weights, as a share of the distance travelled, and on
            the relative difference of each record; None for `TOLERANCES`.
        predictions: smallest share of equal test predictions.

    Returns:
        The comparison.

    Raises:
        RecAdamError: when a run is not complete, or the two were set up differently.
    """
    for run in (reference, other):
        if run.status["state"] != "complete":
            raise RecAdamError(
                f"{run.path}: {run.status['state']} at step {run.status['step']} of {run.config.steps}; "
                "run it to the end before comparing"
            )
    check_number("compare", "tolerance", 0.0 if tolerance is None else tolerance, low=0.0)
    check_number("compare", "predictions", predictions, low=0.0, high=1.0)
    _same_setup(reference, other)
    dtype = reference.config.dtype
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance

    records, parted, first = {}, None, None
    for name in COLUMNS:
        a, b = reference.steps[name], other.steps[name]
        gap = np.abs(a - b) / max(float(np.abs(a).max()), TINY)
        records[name] = float(gap.max())
        parted = _earliest(parted, ~(gap <= tolerance), name)
        first = _earliest(first, gap > 0, name)

    weights, weights_step, weights_name = 0.0, reference.config.steps, ""
    snapshots = []
    for step in sorted({*reference.snapshots()} & {*other.snapshots()} | {reference.config.steps}):
        a_weights, b_weights = reference.weights(step), other.weights(step)
        gaps = {n: _distance(a_weights[n], b_weights[n]) for n in a_weights}
        gap_total = float(np.sqrt(sum(g * g for g in gaps.values())))
        share = gap_total / max(float(reference.steps["travelled"][step - 1]), TINY)
        share = math.inf if math.isnan(share) else share
        snapshots.append((step, share))
        if share > weights:
            weights, weights_step, weights_name = share, step, max(gaps, key=lambda n: gaps[n])
    a_scores, b_scores = reference.predictions(), other.predictions()
    same = float(np.mean(a_scores.argmax(axis=1) == b_scores.argmax(axis=1)))
    return Comparison(
        first=reference.label,
        second=other.label,
        paths=(str(reference.path), str(other.path)),
        agree=weights <= tolerance and same >= predictions and parted is None,
        weights=weights,
        snapshots=tuple(snapshots),
        weights_step=weights_step,
        weights_name=weights_name,
        predictions=same,
        rows=len(a_scores),
        steps=reference.config.steps,
        records=records,
        parted=parted,
        first_difference=first,
        tolerance=tolerance,
    )


def setup_of(run: Run) -> dict[str, Any]:
    """What must be equal for two runs to be comparable: the configuration without the backend."""
    setup = flat(run.config.to_dict())
    for ignored in ("backend", "eval_every", "snapshot_every"):
        setup.pop(ignored)
    return setup


def _same_setup(reference: Run, other: Run) -> None:
    a, b = setup_of(reference), setup_of(other)
    differing = [name for name in a if a[name] != b.get(name)]
    if differing:
        name = differing[0]
        raise RecAdamError(
            f"{other.path}: {name} is {b.get(name)!r}, in {reference.path} {a[name]!r}; "
            "compare runs that differ in the backend alone"
        )
    if reference.provenance["start_sha256"] != other.provenance["start_sha256"]:
        raise RecAdamError(
            f"{other.path}: another model or other data than {reference.path}; run both on one machine and "
            "release"
        )


def _earliest(earlier: tuple[int, str] | None, where: Any, name: str) -> tuple[int, str] | None:
    if not where.any():
        return earlier
    step = int(np.argmax(where)) + 1
    return (step, name) if earlier is None or step < earlier[0] else earlier


def _distance(a: Any, b: Any) -> float:
    return float(np.linalg.norm((a.astype(np.float64) - b.astype(np.float64)).ravel()))
