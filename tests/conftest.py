"""Fixtures that several test files share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def recadam():
    """Runs the command line in a process of its own."""

    def run(*args, cwd=None, env=None, timeout=300):
        return subprocess.run(
            [sys.executable, "-m", "recadam_core", *map(str, args)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            timeout=timeout,
            check=False,
        )

    return run
