"""Sub-commands of `recadam` that need no harness; other packages add theirs by entry point."""

from __future__ import annotations

import json
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from . import __version__
from .annealing import ANNEALINGS, Sigmoid, annealed_weights, annealing_from_dict, release_step
from .backends import GROUP, available_backends, get_backend
from .conformance.claims import LEVELS, Result
from .conformance.measures import MEASURES
from .conformance.run import certify, plan
from .conformance.tables import COLUMNS, LEGEND, cells, grouped, markdown, support
from .console import progress, show
from .errors import RecAdamError
from .hyperparameters import FORMS, Hyperparameters

__all__ = ["app", "whole"]

app = typer.Typer(
    help="RecAdam: fine-tune without forgetting, the same in NumPy, PyTorch and JAX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def schedule(
    steps: Annotated[int, typer.Option(min=1, max=10_000_000, help="Steps of the training.")] = 1000,
    annealing: Annotated[str, typer.Option(help=f"One of {', '.join(ANNEALINGS)}.")] = "sigmoid",
    k: Annotated[float | None, typer.Option(help="Slope of the sigmoid, per step.")] = None,
    t0: Annotated[
        float | None, typer.Option(help="Middle of the sigmoid, or end of the line, in steps.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-5,
    gamma: Annotated[float, typer.Option(help="Strength of the pull.")] = 5000.0,
    form: Annotated[str, typer.Option(help=f"One of {', '.join(FORMS)}.")] = "decoupled",
    plot: Annotated[Path | None, typer.Option(help="Write a picture to this file.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the picture if it is there.")] = False,
) -> None:
    """Print λ(t) and the pull, and warn when training is frozen, the pull inactive or lr * gamma unstable."""
    from .advice import schedule_advice

    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise RecAdamError(f"{plot}: unknown kind of picture; end the name in .png, .svg or .pdf")
    if plot is None and overwrite:
        raise RecAdamError("schedule: --overwrite is of --plot, which is not given; leave it out")
    if plot is not None and plot.is_dir():
        raise RecAdamError(f"{plot}: is a folder where a file belongs; give another name")
    if plot is not None and os.path.lexists(plot) and not overwrite:
        raise RecAdamError(f"{plot}: is there already; give --overwrite or another name")
    middle = {"k": k, "t0": t0}
    curve = annealing_from_dict({"name": annealing, **{n: v for n, v in middle.items() if v is not None}})
    hp = Hyperparameters(lr=lr, gamma=gamma, form=form, annealing=curve)
    marks = sorted({1, *(int(x) for x in np.linspace(0, steps, 11)[1:])})
    if isinstance(curve, Sigmoid):
        marks = sorted({*marks, *(t for t in (round(curve.t0),) if 1 <= t <= steps)})
    table = Table(box=None, pad_edge=False)
    for name in ("step", "task weight", "recall weight", "pull"):
        table.add_column(name, justify="right")
    for t in marks:
        task, recall = annealed_weights(curve, t)
        table.add_row(str(t), f"{task:.4g}", f"{recall:.4g}", f"{recall and lr * gamma * recall:.4g}")
    show(table)
    released = release_step(curve)
    if released is None:
        print("the anchor is needed to the end")
    else:
        print(f"the anchor can be freed from step {released} on")
    for warning in schedule_advice(hp, steps):
        print(f"warning: {warning}")
    if plot is not None:
        from .figures import schedule_figure
        from .files import replacing

        with replacing(plot) as beside:
            schedule_figure(curve, lr, gamma, steps).savefig(beside, format=plot.suffix[1:], dpi=150)
        print(plot)


@app.command()
def backends(
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print what each variant can do, in Markdown.")
    ] = False,
) -> None:
    """What is installed, and what each backend can do."""
    available = available_backends()
    if as_markdown:
        print(support(get_backend(name) for name in available))
        return
    table = Table(box=None, pad_edge=False)
    for name in ("backend", "library", "dtypes", "devices", "variants"):
        table.add_column(name)
    for name in sorted(point.name for point in entry_points(group=GROUP)):
        if name not in available:
            table.add_row(name, f"not installed; pip install 'recadam-core[{name}]'", "", "", "")
            continue
        try:
            release = version(name)
        except PackageNotFoundError:
            release = ""
        try:
            c = get_backend(name).capabilities
        except RecAdamError as error:
            table.add_row(name, str(error), "", "", "")
            continue
        ways = (f"{v.name} (needs {v.lacks()})" if v.lacks() else v.name for v in c.variants)
        columns = (c.dtypes, c.devices, ways)
        table.add_row(name, f"{name} {release}", *map(", ".join, columns))
    show(table)


@app.command()
def conformance(
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Backend, or any array API library, as array_api_strict; several may be given."),
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Variant; several may be given.")] = None,
    level: Annotated[
        list[str] | None, typer.Option(help="exact: the specification's bits. fast: bounded errors.")
    ] = None,
    claim: Annotated[list[str] | None, typer.Option(help=f"Kind of claim: {', '.join(MEASURES)}.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Case, as the table names it.")] = None,
    golden: Annotated[
        Path | None, typer.Option(help="Folder of golden trajectories, as tests/golden in the sources.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes at once; 1 runs here what can run here.")
    ] = os.cpu_count() or 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
) -> None:
    """Hold every backend to its claims, against specification and oracle. Exit 1 on any miss."""
    if as_json and as_markdown:
        raise RecAdamError("conformance: --json and --markdown are both given; give one of them")
    loaded = [get_backend(name) for name in backend or available_backends()]
    planned = plan(loaded, variant or (), level or LEVELS, claim or (), case or (), golden)
    total = sum(len(job.claims) for job in planned)
    done = 0
    with progress(total, "conformance") as tell:

        def count(result: Result) -> None:
            nonlocal done
            done += 1
            tell(done, f"{result.backend} {result.variant} {result.claim}")

        results = certify(planned, jobs, count)
    if as_json:
        print(json.dumps([result.to_dict() for result in results], indent=2, allow_nan=False))
    elif as_markdown:
        print(markdown(results))
    else:
        table = Table(box=None, pad_edge=False)
        for column, right in COLUMNS.items():
            table.add_column(column, justify="right" if right else "left")
        for group in grouped(results):
            table.add_row(*cells(group))
        show(table)
        print(LEGEND)
        for result in results:
            if not result.passes:
                print(f"{result.verdict}: {result.command}")
    if not all(result.passes for result in results):
        raise typer.Exit(1)
    if all(result.lacks for result in results):
        raise RecAdamError(f"conformance: nothing was tried; install {results[0].lacks}")


@cache
def whole() -> typer.Typer:
    """The application, with the commands of every package that announces some."""
    for point in entry_points(group="recadam_core.commands"):
        app.registered_commands.extend(point.load().registered_commands)
    return app
