"""What is in the wheel, and whether it works away from the sources."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.tree


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "recadam_core",
        "recadam_harness",
        "recadam_numpy",
        "recadam_torch",
        "recadam_jax",
    }
    assert {"recadam_core/py.typed", "recadam_harness/templates/report.html.j2"} <= set(names)


def test_the_wheel_works_away_from_the_sources(wheel, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import numpy as np, recadam_core as rc, recadam_torch, recadam_jax\n"
        f"assert all(m.__file__.startswith({str(site)!r}) for m in (rc, recadam_torch, recadam_jax))\n"
        "p = {'w': np.ones(2)}\n"
        "o = rc.RecAdam(rc.Hyperparameters(lr=0.1, gamma=1.0))\n"
        "print(o.step(p, p, o.init(p, p))[0]['w'], rc.available_backends())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "['jax', 'numpy', 'torch']" in result.stdout
