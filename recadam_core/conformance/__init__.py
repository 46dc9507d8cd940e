"""Conformance: recorded gradients, replayed through every backend and held against the specification."""

from .replay import Deviation, Group, Recording, load_recording, record, replay, trajectory_deviation

__all__ = [
    "Deviation",
    "Group",
    "Recording",
    "load_recording",
    "record",
    "replay",
    "trajectory_deviation",
]
