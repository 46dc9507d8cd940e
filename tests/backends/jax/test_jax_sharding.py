"""Sharded runs: in processes of their own, which have eight devices."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax")

from recadam_jax import FLAG

HERE = Path(__file__).parent
DEVICES = "--xla_force_host_platform_device_count={}"


def started(command, devices, flags=FLAG):
    environment = {**os.environ, "XLA_FLAGS": f"{DEVICES.format(devices)} {flags}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "which", "count"),
    [
        pytest.param(FLAG, "", 55, marks=pytest.mark.heavy),
        pytest.param("", "sharded_run or scan or shard_map", 10, marks=pytest.mark.heavy),
        (FLAG, "anchor_goes and Explicit and not host or shapes_with", 2),
    ],
)
def test_on_eight_devices(flags, which, count):
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", HERE / "jax_on_eight.py"]
    process = started([*command, *(["-k", which] if which else [])], 8, flags)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-4000:]
    assert sum(map(int, re.findall(r"(\d+) (?:passed|skipped)", output))) == count


def test_on_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [started([HERE / "jax_process.py", rank, port], 4) for rank in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
        assert output.endswith("the same bits\n")
