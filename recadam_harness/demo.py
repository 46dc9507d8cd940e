"""The main job: every task on every backend, with RecAdam and with AdamW, compared and reported."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from recadam_core.backends import available_backends
from recadam_core.errors import RecAdamError, unknown

from .compare import Comparison
from .directory import Run, load_run
from .processes import settle, shares, thread_limits
from .report import compare_all, write_report

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
    """Run a plan in processes of their own, each on its share of the cores."""
    waiting, done = list(plan), 0
    running: list[Entry] = []
    slots = shares(jobs)
    try:
        while waiting or running:
            while waiting and slots:
                task, backend, optimizer = waiting.pop(0)
                running.append(_start(out, task, backend, optimizer, slots.pop(0)))
            for entry in [entry for entry in running if entry[0].poll() is not None]:
                process, path, slot, log = entry
                running.remove(entry)
                slots.append(slot)
                if process.returncode:
                    lines = log.read_text(encoding="utf-8").strip().splitlines() or ["no output"]
                    raise RecAdamError(f"{path}: {lines[-1].removeprefix('recadam: ')}; see {log}")
                done += 1
            tell(done, ", ".join(path.name for _, path, _, _ in running))
            time.sleep(0.1)
    finally:
        for process, *_ in running:
            process.terminate()
        for process, *_ in running:
            process.wait()
    runs = [load_run(out / f"{t}-{b}-{o}") for t, b, o in plan]
    comparisons = compare_all(runs)
    title = "RecAdam beside AdamW, in " + ", ".join(dict.fromkeys(b for _, b, _ in plan))
    page = write_report(runs, out, title, comparisons)
    task_of = {str(run.path): run.config.task for run in runs}
    by_task = sorted(comparisons, key=lambda c: list(PLAN).index(task_of[c.paths[0]]))
    return runs, [(task_of[c.paths[0]], c) for c in by_task], page


Entry = tuple["subprocess.Popen[str]", Path, list[int], Path]


def _start(out: Path, task: str, backend: str, optimizer: str, slot: list[int]) -> Entry:
    path = out / f"{task}-{backend}-{optimizer}"
    log = out / "logs" / f"{path.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "recadam_core", "finetune", task, "--backend", backend]
    command += ["--optimizer", optimizer, "--out", str(path), "--overwrite"]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **thread_limits(slot)},
            preexec_fn=lambda: settle(slot),
            text=True,
        )
    return process, path, slot, log
