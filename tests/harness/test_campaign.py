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


@pytest.mark.parametrize("part", SMALL)
def test_nothing_is_corrupted(campaign, tmp_path, part):
    if part == "disks" and (
        not shutil.which("unshare")
        or subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "none", tmp_path], check=False
        ).returncode
    ):
        pytest.skip("no tmpfs can be mounted here")
    (tally,) = campaign.campaign({part: SMALL[part]}, seed=1, folder=tmp_path)
    assert tally.wrong == []
    assert tally.tried == SMALL[part]
