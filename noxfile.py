"""`make versions`: the tests of the built wheel on every Python that is found, over old and new libraries.

nox and not tox, since the lowest versions are read from pyproject.toml and the table of the documentation is
written from what ran: Python, which tox would take from scripts beside its configuration.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import date
from functools import cache
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

import nox
from packaging.requirements import Requirement

ROOT = Path(__file__).parent
RESULTS = ROOT / "runs" / "versions"
PAGE = ROOT / "docs" / "versions.md"
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
SOURCES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
SHOWN = ("numpy", "array-api-compat", "jax", "optax", "numba", "torch")

# PyTorch only where it is asked for: on most systems its own name brings gigabytes for CUDA.
TORCH = os.environ.get("TORCH", "")
TORCH_ON = os.environ.get("TORCH_ON", "").split()
PIP_FLAGS = ["-qq", "--disable-pip-version-check", *shlex.split(os.environ.get("PIP_FLAGS", ""))]

nox.options.error_on_missing_interpreters = False
nox.options.download_python = "never"

# Behind the path, all that pyenv has, chosen there or not.
PYENV = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
FOLDERS = [str(folder) for python in PYTHONS for folder in sorted(PYENV.glob(f"{python}.*/bin"))[::-1]]
os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *FOLDERS])


@nox.session(python=PYTHONS)
def versions(session: nox.Session) -> None:
    """What pip resolves today."""
    run(session, "newest")


@nox.session(python=PYTHONS[0])
def lowest(session: nox.Session) -> None:
    """The lowest versions that pyproject.toml declares."""
    run(session, "lowest", lowest_pins())


def lowest_pins() -> list[str]:
    """`name==bound` of every `name>=bound`, PyTorch's aside, of which one build is named."""
    lists = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    requirements = map(Requirement, chain.from_iterable(lists))
    bounds = {r.name: str(r.specifier) for r in requirements if r.name not in ("recadam-core", "torch")}
    return [name + bound.replace(">=", "==") for name, bound in sorted(bounds.items())]


@cache
def wheel() -> Path:
    folder = ROOT / ".nox" / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    (path,) = folder.glob("*.whl")
    return path


def run(session: nox.Session, which: str, constraints: Sequence[str] = ()) -> None:
    """Install the wheel, run what can run there, and keep the figures."""
    result = RESULTS / f"{session.python}-{which}.json"
    result.unlink(missing_ok=True)
    extras = ["jax", "cpu", "conformance", "finetune", "test", "test-jax"]
    packages = ["core", "numpy", "jax", "harness"]
    wanted, flags = [], ["--doctest-ignore-import-errors"]  # of modules whose framework is left out
    if TORCH and session.python in TORCH_ON:
        extras += ["torch", "experiments", "test-torch"]
        packages.append("torch")
        wanted, flags = [TORCH], []
    packages = [f"recadam_{name}" for name in packages]
    RESULTS.mkdir(parents=True, exist_ok=True)
    held = RESULTS / f"{which}.txt"
    held.write_text("\n".join(constraints), encoding="utf-8")
    # Two times quiet: of what pip says of its indexes nothing is about the packages.
    session.install(*PIP_FLAGS, "-c", str(held), *wanted, f"{wheel()}[{','.join(extras)}]")
    with tempfile.TemporaryDirectory() as folder:
        copy_without_sources(Path(folder))
        session.chdir(folder)
        env = {"PYTHONPATH": None}
        said = session.run("python", "-c", ABOUT, *packages, env=env, silent=True)
        about = json.loads(said.splitlines()[-1])
        report = Path(folder) / "report.xml"
        session.run(
            *("pytest", "-q", "-n", "auto", "-m", "not heavy", f"--junit-xml={report}"),
            *(*flags, *session.posargs, "--pyargs", "./tests", *packages),
            env=env,
        )
        figures = counted(report)
    result.write_text(json.dumps({"which": which, **about, **figures}, indent=1), encoding="utf-8")
    session.log(" ".join(row(json.loads(result.read_text(encoding="utf-8")))))


# What is tested is what was installed.
ABOUT = """
import importlib, json, platform, sys
from importlib.metadata import distributions
from pathlib import Path
for name in sys.argv[1:]:
    place = Path(importlib.import_module(name).__file__)
    assert place.parent.parent.name == "site-packages" and place.is_relative_to(sys.prefix), place
versions = {d.metadata["Name"].lower(): d.version for d in distributions()}
print(json.dumps({"python": platform.python_version(), "versions": versions}))
"""


def copy_without_sources(folder: Path) -> None:
    """The tests and what they read, without the packages: these are in the environment."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, check=True, stdout=subprocess.PIPE, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file() and not name.startswith(tuple(f"{source}/" for source in SOURCES)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def counted(report: Path) -> dict[str, object]:
    """Figures of a report of pytest; what was skipped is counted by what is not there."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    known = [x for x in suite.iter("skipped") if x.get("type") == "pytest.xfail"]
    skipped = [f"{x.get('message')} {x.text}" for x in suite.iter("skipped") if x not in known]
    why = [re.search(r"could not import '(\w+)|no (sources)", text) for text in skipped]
    return {
        "passed": int(suite.get("tests")) - len(known) - len(skipped),
        "files": sum(text.startswith("collection skipped") for text in skipped),
        "skipped": len(skipped),
        "lacking": dict(Counter(m[1] or m[2] if m else "else" for m in why).most_common()),
    }


def row(result: dict) -> list[str]:
    versions = [result["versions"].get(name, "–") for name in SHOWN]
    skipped = f"{result['skipped'] - result['files']} and {result['files']} files"
    lacking = ", ".join(f"{name} {count}" for name, count in result["lacking"].items())
    return [result["python"], result["which"], *versions, str(result["passed"]), skipped, lacking]


@nox.session(python=False)
def table(session: nox.Session) -> None:
    """Write docs/versions.md from the runs."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")]
    rows = sorted((row(result) for result in results), key=lambda r: (r[0].split(".")[1], r[1]))
    head = ["Python", "versions", *SHOWN, "passed", "skipped", "for lack of"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    command = f'make versions TORCH_ON="{" ".join(TORCH_ON)}"'
    on = f"`{command}` on {platform.system()} {platform.machine()}, {date.today()}:"
    text, end = PAGE.read_text(encoding="utf-8"), "<!-- end of what it wrote -->"
    before, after = text.split("<!-- make versions writes from here -->")[0], text.split(end)[1]
    written = "\n".join(["<!-- make versions writes from here -->", on, "", *lines, "", end])
    PAGE.write_text(before + written + after, encoding="utf-8")
    session.log(f"{PAGE.relative_to(ROOT)}: {len(rows)} rows")
