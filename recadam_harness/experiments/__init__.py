"""The paper's experiments: who learns, who forgets, and at what cost.

A `Trial` is one training; an experiment is a declared grid of them, run several at once, resumable trial by
trial, with one tidy table and a page of pictures at the end.
"""

from __future__ import annotations

from typing import Any

from recadam_core.backends import get_backend

from .trial import METHODS, Trial

__all__ = ["METHODS", "Trial", "run_trial"]


def run_trial(trial: Trial) -> dict[str, Any]:
    """Train and measure, with PyTorch.

    Args:
        trial: what to do.

    Returns:
        Figures by name: of the target task; of the source task, before and after; "distance" to the
        pretrained weights; "loss", the mean of the last tenth of the steps; "seconds"; and "curve", what
        was measured along the way.

    Raises:
        RecAdamError: when the data is not there, or training diverges.
    """
    get_backend("torch")  # or what it lacks
    from .training import run

    return run(trial)
