"""Learning-rate schedules of the harness: numbers of the step, the same for every framework."""

from __future__ import annotations

from recadam_core.errors import unknown

__all__ = ["SCHEDULES", "learning_rate"]

SCHEDULES = ("constant", "linear")
"""Constant after the warm-up, or falling linearly to zero at the end."""


def learning_rate(t: int, steps: int, peak: float, schedule: str = "constant", warmup: int = 0) -> float:
    """Learning rate of step t.

    Args:
        t: the step, from 1.
        steps: number of steps of the run.
        peak: learning rate after the warm-up.
        schedule: a name in `SCHEDULES`.
        warmup: steps of linear warm-up.

    Returns:
        The learning rate.

    Raises:
        RecAdamError: for an unknown schedule.

    Example:
        >>> [learning_rate(t, 4, 1.0, "linear", warmup=2) for t in (1, 2, 3, 4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    if t <= warmup:
        return peak * t / warmup
    if schedule == "linear":
        return peak * (steps - t + 1) / (steps - warmup)
    return peak
