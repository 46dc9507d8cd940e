"""What the commands print: tables, and progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from .files import naming

__all__ = ["progress", "say", "show"]

# What is printed is text: names and messages may hold square brackets, which are no markup.
PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
out_console = Console(**PLAIN)
err_console = Console(stderr=True, **PLAIN)


def say(text: str) -> None:
    """A line on standard error, of which nothing depends: where that is full, it is lost."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def show(table: Table) -> None:
    """Print a table; a pipe gets it at full width, a terminal at its own."""
    console = out_console if out_console.is_terminal else Console(width=200, **PLAIN)
    with naming(Path("standard output")):
        console.print(table)


@contextmanager
def progress(total: int, label: str) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; where that is no terminal, a line for each of a few stages.

    What it yields is called with the step, a note, and a new total where that changes.
    """
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    ]
    if not err_console.is_terminal:
        yield _plain(total, label)
        return
    with Progress(*columns, console=err_console, transient=True) as bar:
        task = bar.add_task(label, total=total, note="")
        yield lambda step, note, total=None: bar.update(task, completed=step, note=note, total=total)


def _plain(total: int, label: str) -> Callable[..., None]:
    told = 0

    def tell(step: int, note: str, now: int | None = None) -> None:
        nonlocal told
        if step > told and (now is not None or total < 20):
            say(f"{label}: {step} of {now or total} done")
        told = step

    return tell
