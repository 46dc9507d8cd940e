"""A run that is killed again and again ends where one that is left alone does, in every bit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("killed_worker.py")


def start(folder, steps):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", WORKER, folder, str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def run(folder, steps, kills):
    """Kill at each of these steps, or as soon after as the process notices, then let it end."""
    for kill in kills:
        with start(folder, steps) as process:
            for line in process.stdout:
                if int(line) >= kill:
                    process.send_signal(signal.SIGKILL)
                    break
            process.stdout.read()
        assert process.returncode == -signal.SIGKILL
    with start(folder, steps) as process:
        process.communicate(timeout=120)
    assert process.returncode == 0
    return torch.load(folder / "final.pt")


@pytest.mark.parametrize(("steps", "count"), [(60, 2), pytest.param(2000, 20, marks=pytest.mark.heavy)])
def test_kills_at_random_points_change_no_bit(tmp_path, steps, count):
    """Some before the anchors are released and some after; with stochastic rounding, which is no chance."""
    rng = random.Random(0)
    # A checkpoint may not be reached between two kills: then the same steps are taken once more.
    points = sorted(rng.sample(range(1, steps), count))
    alone = run(tmp_path / "alone", steps, [])
    killed = run(tmp_path / "killed", steps, points)
    for name, weights in alone.items():
        assert torch.equal(weights, killed[name])
