"""The paper's experiments: who learns, who forgets, and at what cost.

A `Trial` is one training; an experiment is a declared grid of them, run several at once, resumable trial by
trial, with one tidy table and a page of pictures at the end.
"""

from .trial import METHODS, Trial, run_trial

__all__ = ["METHODS", "Trial", "run_trial"]
