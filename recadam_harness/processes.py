"""The pool: child processes that keep to their share of the cores and do not outlive their parent."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from recadam_core.errors import RecAdamError

__all__ = ["Each", "pool"]

PATIENCE = 20.0  # seconds until processes that were told to end are killed: a compiler may have one of them
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[tuple[Any, Any]]]
"""A function of every item, in the pool's processes: pairs of item and result, as they come."""


@contextmanager
def pool(jobs: int) -> Iterator[Each]:
    """So many processes at once, fewer where there are fewer cores; they end when the block does."""
    known = hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0)) if known else list(range(os.cpu_count() or 1))
    jobs = min(jobs, len(cores))
    spawn = multiprocessing.get_context("spawn")
    shares: Any = spawn.Queue()
    for i in range(jobs):
        shares.put(cores[i::jobs])
    # Read by the libraries when a process imports them.
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, str(len(cores[::jobs]))))
    executor = ProcessPoolExecutor(jobs, spawn, initializer=_begin, initargs=(shares,))

    def each(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        with _uninterrupted():
            futures = {executor.submit(function, item): item for item in items}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                raise RecAdamError(
                    "a process was killed, for want of memory perhaps; run again with fewer --jobs"
                ) from None

    try:
        yield each
        executor.shutdown()
    finally:
        processes = list((getattr(executor, "_processes", None) or {}).values())  # forgotten by shutdown
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        until = time.monotonic() + PATIENCE
        for process in processes:  # a run says first that it was interrupted
            process.join(max(0.0, until - time.monotonic()))
            process.kill()
        shares.close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes started in the block get no Ctrl-C, not even while they import: it is their parent's."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(shares: Any) -> None:
    """In a child process, before anything is imported that starts threads."""
    share = shares.get()
    if sys.platform == "linux":
        os.sched_setaffinity(0, share)
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: it ends when the parent does
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it could not be blocked
    sys.stdout = sys.stderr  # what a library prints is no result
