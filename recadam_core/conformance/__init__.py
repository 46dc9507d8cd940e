"""Conformance: what a backend is held to, in which cases, and what was measured."""

from .cases import Case
from .replay import Deviation, Frame, Group, Recording, load_recording, replay, trajectory_deviation, walk

__all__ = [
    "Case",
    "Deviation",
    "Frame",
    "Group",
    "Recording",
    "load_recording",
    "replay",
    "trajectory_deviation",
    "walk",
]
