"""Taking turns: medians of several rounds, so that a noisy machine disturbs both sides alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

# One BERT-like layer of width 256 and a slice of its embedding: 1.8 million parameters.
SHAPES = [(4000, 256), (256,), (256,), *[(256, 256), (256,)] * 4, (1024, 256), (1024,), (256, 1024), (256,)]


def arrays(seed: int) -> list[np.ndarray]:
    """Seeded float32 arrays of `SHAPES`."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]


def ratio(ours: Callable[[], object], peer: Callable[[], object], rounds: int = 15, calls: int = 5) -> float:
    """Median over rounds of our time over the peer's, after a warm-up of each."""
    for step in (ours, peer):
        for _ in range(3):
            step()

    def seconds(step: Callable[[], object]) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            step()
        return time.perf_counter() - began

    return statistics.median(seconds(ours) / seconds(peer) for _ in range(rounds))
