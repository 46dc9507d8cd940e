"""What is ready for a GPU: without one it claims nothing, and what can be run without one is."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "asv_benchmarks"

pytestmark = [pytest.mark.tree, pytest.mark.needs("torch")]


def run(script, *arguments, **environment):
    """A script of the suite, from elsewhere."""
    command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd="/", env={**os.environ, **environment}
    )


@pytest.mark.parametrize("script", ["smoke.py", "gpu.py"])
def test_without_a_device_nothing_is_claimed(script, tmp_path):
    result = run(script, "--out", tmp_path / "out", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "no CUDA device here: nothing was measured, nothing is claimed\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.heavy
def test_the_parts_that_can_run_under_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    result = run("smoke.py", "--out", tmp_path, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    found = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert found.keys() == {f"smoke-{part}" for part in ("bits", "small", "sync", "graphs", "blocks", "host")}
    assert len(found["smoke-bits"]["rows"]) > 100
    assert {"left out"} <= found["smoke-graphs"].keys() & found["smoke-host"].keys()
    conformance = run("gpu.py", "conformance", "--out", tmp_path, TRITON_INTERPRET="1")
    assert conformance.returncode == 0, conformance.stdout + conformance.stderr
    assert json.loads((tmp_path / "gpu-conformance.json").read_text())["rows"]["triton, exact"] == 0.0


def test_a_part_that_is_wrong_or_fails_is_told_and_loses_no_other(tmp_path):
    (tmp_path / "some.py").write_text(
        f"""import sys
sys.path.insert(0, {str(FOLDER)!r})
import parts
def fails(): raise ValueError("gone")
every = {{"right": lambda: {{"rows": 1}}, "wrong": lambda: {{"wrong": ["3 numbers differ"]}}, "fails": fails}}
parts.main(__file__, every, "about", 60, lambda out, found: print(sorted(found)))
"""
    )
    command = [sys.executable, "some.py", "--out", "out"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert result.returncode == 1
    lines = [line.partition(", ")[0] for line in result.stdout.splitlines()]
    assert lines == [
        "right: right",
        "wrong: WRONG",
        "  3 numbers differ",
        "fails: WRONG",
        "  ended with 1",
        "['right'",
        "wrong or failed: wrong",
    ]
    assert json.loads((tmp_path / "out" / "some-right.json").read_text()) == {"rows": 1}


def test_a_number_that_is_none_differs(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import torch

    smoke = importlib.import_module("smoke")
    x = torch.tensor([1.0, float("nan"), 0.0, float("nan")])
    assert smoke.differing([x], [torch.tensor([1.0, 2.0, -0.0, float("nan")])]) == 2


def test_the_page_of_a_device_tells_what_is_missing_and_wrong(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    gpu = importlib.import_module("gpu")
    row = {"step": "RecAdam", "kernel": "triton", "ms": 2.0, "host_ms": 0.5, "bytes": 32,
           "bytes_per_second": 2e12, "extra_bytes_per_parameter": 0.0}  # fmt: skip
    peer = {**row, "step": "torch AdamW fused", "kernel": "torch's", "ms": 1.6, "bytes": 28}
    table = {
        "shapes": "BERT-base",
        "dtype": "float32",
        "parameters": 10**8,
        "rows": [peer, row, {"step": "foreach", "ms": None}],
    }
    about = {"device": "Some GPU", "date": "2026-01-01", "versions": "torch 2", "copy_bytes_per_second": 4e12}
    page = gpu.markdown({"about": about, "scaler": {"wrong": ["moved"]}, "BERT-base float32": table})
    assert "Not measured: conformance, BERT-large float32" in page
    assert "- scaler: moved" in page
    assert "| RecAdam | triton | 2.00 | 1.25 | 1.14 | 50% | 0.50 | 0.0 |" in page
    assert "| foreach | | out of memory | | | | | |" in page
