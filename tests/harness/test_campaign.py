"""A small campaign; `python tests/harness/campaign.py` runs a long one: docs/robustness.md has its table."""

from __future__ import annotations

import shutil
import subprocess

import pytest

pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("filelock")

SMALL = {"damages": 60, "lines": 60, "pairs": 2, "kills": 3, "disks": 2}
HEAVY = {"stops": 5}
PARTS = [*SMALL, *(pytest.param(part, marks=pytest.mark.heavy) for part in HEAVY)]


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_corrupted(campaign, tmp_path, part):
    if part == "disks" and (
        not shutil.which("unshare")
        or subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "none", tmp_path], check=False
        ).returncode
    ):
        pytest.skip("no tmpfs can be mounted here")
    count = {**SMALL, **HEAVY}[part]
    (tally,) = campaign.campaign({part: count}, seed=1, folder=tmp_path)
    assert tally.wrong == []
    assert tally.tried == count
