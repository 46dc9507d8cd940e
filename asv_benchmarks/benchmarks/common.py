"""What all benchmarks share: sizes, shapes, and turns taken by contenders. Loads no framework."""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

PROFILE = os.environ.get("RECADAM_BENCH", "fast")
ROUNDS = {"quick": 2, "fast": 5, "regular": 9}[PROFILE]
AT_LEAST = {"quick": 0.0, "fast": 1.0, "regular": 1.0}[PROFILE]
"""Seconds that turns last: short steps take up to twenty times the rounds."""


def bert(layers: int, hidden: int, vocabulary: int, positions: int = 512) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a BERT with its pooler.

    Example:
        >>> sum(int(np.prod(s)) for s in bert(12, 768, 30522))
        109482240
    """
    square, wide, row = (hidden, hidden), (4 * hidden, hidden), (hidden,)
    layer = [*[square, row] * 4, row, row, wide, (4 * hidden,), (hidden, 4 * hidden), row, row, row]
    embeddings = [(vocabulary, hidden), (positions, hidden), (2, hidden), row, row]
    return [*embeddings, *layer * layers, square, row]


SHAPES = {
    "quick": bert(1, 32, 500, 64),  # 0.03 million: whether it runs, not how fast
    "fast": bert(2, 256, 8000),  # 3.8 million
    "regular": bert(12, 768, 30522),  # BERT-base: 109.5 million
}[PROFILE]
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)
MODEL = [f"{SIZE / 1e6:.2f} million"]
"""A parameter of the benchmarks that take these shapes, so that no graph joins two sizes."""


def arrays(shapes: Iterable[tuple[int, ...]], seed: int) -> list[np.ndarray]:
    """Seeded float32 arrays."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def turns(
    steps: dict[str, Callable[[], object]], rounds: int = ROUNDS, warm: int = 2
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, all of them taking turns, so that noise meets them alike."""
    for step in steps.values():
        for _ in range(warm):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for taken in range(20 * rounds):
            if taken >= rounds and time.perf_counter() - start >= AT_LEAST:
                break
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - began)
    finally:
        gc.enable()
    return seconds


def ratio(seconds: dict[str, list[float]], ours: str, peer: str) -> float:
    """The median over rounds of ours over the peer's.

    Example:
        >>> ratio({"a": [1.0, 3.0], "b": [1.0, 1.0]}, "a", "b")
        2.0
    """
    return statistics.median(x / y for x, y in zip(seconds[ours], seconds[peer], strict=True))


def best(seconds: dict[str, list[float]], ours: str, peer: str) -> float:
    """Our fastest round over the peer's, which moves less than the median where others use the machine.

    Example:
        >>> best({"a": [2.0, 30.0], "b": [1.0, 9.0]}, "a", "b")
        2.0
    """
    return min(seconds[ours]) / min(seconds[peer])


def interquartile(seconds: dict[str, list[float]], ours: str, peer: str) -> tuple[float, float]:
    """The middle half of the ratios."""
    found = [x / y for x, y in zip(seconds[ours], seconds[peer], strict=True)]
    low, _, high = statistics.quantiles(found, n=4, method="inclusive")
    return low, high


def extra_memory(step: Callable[[], object]) -> float:
    """Bytes that a step needs at its peak beyond what is there before; NaN where Linux does not tell.

    Read off the process every fifth of a millisecond, by a thread.
    """
    path = Path("/proc/self/statm")
    if not path.exists():
        return float("nan")
    page = os.sysconf("SC_PAGE_SIZE")
    peak, done = 0, threading.Event()

    def read() -> int:
        return int(path.read_text().split()[1]) * page

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0002):
            peak = max(peak, read())

    gc.collect()
    before = read()
    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        step()
    done.set()
    watcher.join()
    return float(max(0, peak - before))


GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Environment in which glibc gives back what is freed, so that a process has what it uses."""


def in_a_process(code: str, **environment: str) -> str:
    """What Python prints for some code in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
    )  # fmt: skip
    return result.stdout.strip()
