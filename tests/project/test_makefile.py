"""What make does to files that are not its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.tree
MAKEFILE = Path(__file__).parents[2] / "Makefile"
THEIRS = (
    "runs/demo/report.html",
    "dist/mine.whl",
    "build/notes.txt",
    "mine/bin/python",
    "docs/a.md",
    "pyproject.toml",
    "constraints.txt",
)
BUILT = (".asv/x", ".nox/x", "docs/_build/html/x", ".mypy_cache/x", ".venv/.made", ".venv/bin/python")


@pytest.fixture
def folder(tmp_path):
    shutil.copy(MAKEFILE, tmp_path)
    for name in (*THEIRS, *BUILT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    return tmp_path


def make(folder, *arguments, **environment):
    command = ["make", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("exported", [{}, {"VENV": "mine"}, {"VENV": "runs"}])
def test_clean_removes_what_was_built_and_nothing_else(folder, exported):
    assert make(folder, "clean", **exported).returncode == 0
    assert [name for name in THEIRS if not (folder / name).exists()] == []
    assert [name for name in BUILT if (folder / name).exists()] == []


def test_clean_leaves_an_environment_that_was_there_before_it_installed_there(folder):
    (folder / ".venv" / ".made").unlink()
    (folder / ".venv" / ".runtime").touch()
    told = make(folder, "clean")
    assert told.returncode == 0
    assert ".venv stays: make did not make it\n" in told.stdout
    assert (folder / ".venv" / "bin" / "python").read_text() == "mine"


@pytest.mark.parametrize("venv", ["mine", "runs", "docs"])
def test_clean_leaves_an_environment_that_make_did_not_make(folder, venv):
    assert make(folder, "clean", f"VENV={venv}").returncode == 0
    assert [name for name in THEIRS if not (folder / name).exists()] == []


def test_without_an_index_it_is_said_what_to_copy_where(folder):
    shutil.rmtree(folder / ".venv")
    shutil.copy(MAKEFILE.with_name("pyproject.toml"), folder)
    (folder / "constraints.txt").write_text("")
    told = make(
        folder,
        "demo",
        PIP_NO_INDEX="1",
        PIP_CONFIG_FILE=os.devnull,
        PIP_FIND_LINKS="",
        HOME="/home/me",
        RECADAM_CACHE="",
    )
    assert told.returncode == 2
    for words in (
        "cannot install into .venv; pip's reason is above. If no package index can be reached from here:",
        "download -d wheels -c constraints.txt hatchling editables 'torch==2.13.0' '.[torch,jax,finetune]'",
        f"2. copy that folder to {folder}/wheels, and",
        "all files to /home/me/.cache/recadam/archives",
        "3. make demo PIP_FLAGS='--no-index --find-links wheels'",
    ):
        assert words in told.stderr
    assert not (folder / ".venv" / ".runtime").exists()


def test_a_folder_that_is_no_environment_is_not_made_one(folder):
    told = make(folder, "install", "VENV=runs")
    assert told.returncode == 2
    assert "runs is there and is no environment of make; give another by VENV=..." in told.stderr
    assert [name for name in THEIRS if not (folder / name).exists()] == []


def test_nothing_is_installed_into_an_environment_of_somebodys_own(folder):
    (folder / ".venv" / ".made").unlink()
    told = make(folder, "demo")
    assert told.returncode == 2
    assert (
        ".venv is there and make did not make it; give another by VENV=..., or touch .venv/.made"
        in told.stderr
    )
    assert (folder / ".venv" / "bin" / "python").read_text() == "mine"


def test_a_link_to_an_environment_that_is_away_stays(folder, tmp_path):
    shutil.rmtree(folder / ".venv")
    (folder / ".venv").symlink_to(tmp_path / "unmounted")
    told = make(folder, "demo")
    assert (told.returncode, (folder / ".venv").is_symlink()) == (2, True)
    assert ".venv is there and is no environment of make" in told.stderr


def test_a_name_with_a_space_is_refused(folder):
    told = make(folder, "clean", "VENV=mine too")
    assert told.returncode == 2
    assert 'VENV is "mine too"; give one folder' in told.stderr
    assert [name for name in (*THEIRS, *BUILT) if not (folder / name).exists()] == []
