"""Learning-rate schedules of the harness: numbers of the step, the same for every framework."""

from __future__ import annotations

from recadam_core.errors import unknown

__all__ = ["SCHEDULES", "learning_rate"]

SCHEDULES = ("constant", "linear")
"""Constant after the warm-up, or falling linearly to zero at the end."""


def learning_rate(t: int, steps: int, peak: float, schedule: str = "constant", warmup: int = 0) -> float:
    """Learning rate of step t."""
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    if t <= warmup:
        return peak * t / warmup
    if schedule == "linear":
        return peak * (steps - t + 1) / (steps - warmup)
    return peak
