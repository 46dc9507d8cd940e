"""Child processes that keep to their share of the cores and do not outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

__all__ = ["settle", "shares", "thread_limits"]


def shares(jobs: int) -> list[list[int]]:
    """The cores of this process in so many parts; fewer parts where there are fewer cores."""
    known = hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0)) if known else list(range(os.cpu_count() or 1))
    jobs = min(jobs, len(cores))
    return [cores[i::jobs] for i in range(jobs)]


def thread_limits(share: Sequence[int]) -> dict[str, str]:
    """The environment of a process that is to use no more threads than it has cores."""
    return {name: str(len(share)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def settle(share: Sequence[int]) -> None:
    """In a child process: keep to these cores, and end when the parent ends, however that happens."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, share)
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
