"""The main job: every task on every backend, with RecAdam and with AdamW, compared and reported."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from recadam_core.backends import available_backends
from recadam_core.cli import main
from recadam_core.errors import RecAdamError, unknown
from recadam_core.interrupts import obey

from .compare import Comparison
from .config import RunConfig
from .directory import Run, clear, load_run
from .folders import MANIFEST, Folder, is_empty, owned
from .processes import pool
from .report import PAGE, compare_all, draw_report

__all__ = ["plan_demo", "run_demo"]

PLAN = {"movie-reviews": ("torch", "jax"), "digits": ("numpy", "torch", "jax")}
"""Tasks and their backends, the longest first; RecAdam and AdamW run on each.

On the first backend RecAdam runs without its pull, too: what of the effect is the annealed task weight?
"""


def plan_demo(only: str | None = None) -> list[tuple[str, str, str]]:
    """The runs of the demo: (task, backend, optimizer), for the backends that are installed."""
    if only is not None and only not in PLAN:
        raise unknown("task", only, PLAN)
    installed = available_backends()
    return [
        (task, backend, optimizer)
        for task in ([only] if only else PLAN)
        for backend in PLAN[task]
        if backend in installed
        for optimizer in ("recadam", "adamw", *(["annealed"] if backend == PLAN[task][0] else []))
    ]


def run_demo(
    plan: list[tuple[str, str, str]], out: Path, jobs: int, tell: Callable[[int, str], None]
) -> tuple[list[Run], list[tuple[str, Comparison]], Path]:
    """Run a plan in other processes, each on its share of the cores."""
    paths = {out / "-".join(entry): entry for entry in plan}
    with owned(out):
        folder = Folder(out, "demo")
        files = [PAGE, *(f"{task}.png" for task, _, _ in plan)]
        logs, manifests = (
            [form.format(p.name) for p in paths] for form in ("logs/{}.log", f"{{}}/{MANIFEST}")
        )
        folder.check([*files, *logs], edited=False)
        for path, entry in paths.items():
            _check_ours(folder, path, entry)
        for path in paths:
            if (path / MANIFEST).exists():
                with owned(
                    path
                ):  # a run that is there when its turn comes is somebody else's, and is refused
                    clear(path)
        folder.remove(logs)  # which may be links by now
        folder.begin([*files, *logs, *manifests])
        unfinished = list(paths)
        with pool(jobs) as each:
            tell(0, ", ".join(path.name for path in unfinished[:jobs]))
            for (path, _), _ in each(_finetune, paths.items()):
                for name in (f"{path.name}/{MANIFEST}", f"logs/{path.name}.log"):
                    folder.seal(name)
                unfinished.remove(path)
                tell(len(plan) - len(unfinished), ", ".join(path.name for path in unfinished[:jobs]))
        for path in paths:
            if folder.altered(f"{path.name}/{MANIFEST}"):
                raise RecAdamError(f"{path}: is another run by now; move it, and run the demo again")
        runs = [load_run(path) for path in paths]
        comparisons = compare_all(runs)
        title = "RecAdam beside AdamW, in " + ", ".join(dict.fromkeys(b for _, b, _ in plan))
        page = draw_report(runs, folder, title, comparisons)
    task_of = {str(run.path): run.config.task for run in runs}
    by_task = sorted(comparisons, key=lambda c: list(PLAN).index(task_of[c.paths[0]]))
    return runs, [(task_of[c.paths[0]], c) for c in by_task], page


def _check_ours(folder: Folder, path: Path, entry: tuple[str, str, str]) -> None:
    """Raise unless a run may be replaced: one that a demo wrote, to its end or with the same settings."""
    manifest = f"{path.name}/{MANIFEST}"
    folder.check([manifest])
    if not (path / MANIFEST).exists() and not is_empty(path):
        raise RecAdamError(f"{path}: holds something that is no run; move it, or give another directory")
    if not (path / "config.json").exists():
        return
    if folder.files.get(manifest) is not None and not folder.altered(manifest):
        return
    if load_run(path, strict=False).config != RunConfig.for_task(*entry):
        raise RecAdamError(f"{path}: is no run of a demo; move it, or give another directory")


def _finetune(run: tuple[Path, tuple[str, str, str]]) -> None:
    """In another process: a run by its command, and what that prints in a log."""
    path, (task, backend, optimizer) = run
    log = path.parent / "logs" / f"{path.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("x", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["recadam", "finetune", task, "--backend", backend, "--optimizer", optimizer]
    sys.argv += ["--out", str(path)]
    obey(insistent=False)
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > 128:  # by a signal that was for the whole demo
            os._exit(end.code)
        failed = bool(end.code)
    except Exception:
        traceback.print_exc()
        failed = True
    sys.stdout.flush()
    sys.stderr.flush()
    if failed:
        lines = log.read_text(encoding="utf-8").strip().splitlines() or ["no output"]
        says = lines[-1].removeprefix("recadam: ").removeprefix(f"{path}: ")
        raise RecAdamError(f"{path}: {says}; see {log}")
