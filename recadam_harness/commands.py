"""Sub-commands of `recadam` that train, compare and report."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from recadam_core.annealing import ANNEALINGS, annealing_from_dict
from recadam_core.console import progress, say, show
from recadam_core.errors import Interrupted, RecAdamError, unknown
from recadam_core.hyperparameters import FORMS

from .archives import ARCHIVES, fetch_all
from .compare import PREDICTIONS, Comparison, compare_runs
from .config import RunConfig, check_read
from .decoders import decoder_folder
from .demo import PLAN, plan_demo, run_demo
from .directory import CHECKPOINT, Run, claim, load_run
from .engines import OPTIMIZERS, UNREAD, announced
from .experiments.data import TARGETS
from .experiments.experiment import Options
from .experiments.glue import TASKS as GLUE
from .experiments.grids import EXPERIMENTS
from .folders import Folder, owned
from .run import finetune
from .schedules import SCHEDULES
from .tasks import TASKS, get_task

__all__ = ["app"]

FREE = [name for name, archive in ARCHIVES.items() if not archive.terms]
app = typer.Typer()


@app.command("finetune")
def finetune_command(
    context: typer.Context,
    task: Annotated[str, typer.Argument(help="; ".join(f"{t.name}: {t.about}" for t in TASKS.values()))],
    backend: Annotated[str, typer.Option(help=f"{', '.join(announced())}.")] = "torch",
    optimizer: Annotated[str, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")] = "recadam",
    out: Annotated[
        Path | None, typer.Option(help="Directory of the run [default: runs/TASK-BACKEND-OPTIMIZER-SEED].")
    ] = None,
    form: Annotated[str | None, typer.Option(help=f"Form of the update: {', '.join(FORMS)}.")] = None,
    annealing: Annotated[str | None, typer.Option(help=f"One of {', '.join(ANNEALINGS)}.")] = None,
    k: Annotated[float | None, typer.Option(help="Slope of the sigmoid, per step.")] = None,
    t0: Annotated[
        float | None, typer.Option(help="Middle of the sigmoid, or end of the line, in steps.")
    ] = None,
    gamma: Annotated[float | None, typer.Option(help="Strength of the pull.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Decay towards zero.")] = None,
    eps: Annotated[float | None, typer.Option(help="Adam's epsilon.")] = None,
    schedule: Annotated[str | None, typer.Option(help=f"One of {', '.join(SCHEDULES)}.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of linear warm-up.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the new head and the batches.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64.")] = None,
    model: Annotated[
        str | None, typer.Option(help="minilm-l3, minilm-l6, a checkpoint folder, or org/model on the hub.")
    ] = None,
    train_rows: Annotated[int | None, typer.Option(help="Training rows.")] = None,
    test_rows: Annotated[int | None, typer.Option(help="Test rows.")] = None,
    source_rows: Annotated[int | None, typer.Option(help="SNLI pairs of the source measure.")] = None,
    bbc_rows: Annotated[
        int | None, typer.Option(help="BBC articles of the source measure; 0 for none.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a sentence is cut to.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Evaluate every so many steps; 0 for never.")] = None,
    snapshot_every: Annotated[int | None, typer.Option(help="Keep weights every so many steps.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in the directory.")] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on from the last checkpoint of an earlier run that was cut short.")
    ] = False,
    checkpoint_every: Annotated[
        int, typer.Option(help="Keep what a resume needs every so many steps; 0 for never.")
    ] = 0,
    accept_gemma_terms: Annotated[
        bool, typer.Option(help="reviews-decoder: its weights are under the Gemma Terms of Use.")
    ] = False,
) -> None:
    """Fine-tune on a task; settings that are not given are the task's own."""
    others = ("task", "backend", "optimizer", "out", "overwrite", "resume", "checkpoint_every", "annealing",
              "accept_gemma_terms")  # fmt: skip
    changes = _settings(context, *others)
    if annealing:
        check_read(optimizer, ["annealing"])
    if annealing not in (None, "sigmoid"):
        curve: dict[str, Any] = {name: changes.pop(name) for name in ("k", "t0") if name in changes}
        changes["annealing"] = annealing_from_dict({"name": annealing, **curve})
    config = RunConfig.for_task(task, backend, optimizer, **changes)
    directory = out or Path("runs") / f"{task}-{backend}-{optimizer}-{seed}"
    # Before the bar, since pip shows one of its own.
    fetch_all(get_task(task).archives(**config.options))
    if accept_gemma_terms:
        decoder_folder(accept_terms=True)
    earlier = None
    with contextlib.suppress(RecAdamError):  # which is raised again where the folder is this process's alone
        earlier = claim(directory, config, overwrite, resume) if resume else None
    if earlier and earlier.status["state"] != "complete" and not (directory / CHECKPOINT).exists():
        say(f"{directory}: no checkpoint to resume from: from the start")
    try:
        with progress(config.steps, f"{task}, {backend}, {optimizer}") as tell:
            run = finetune(config, directory, overwrite, tell, resume, checkpoint_every)
    except KeyboardInterrupt:
        says = f"{directory} says so" if (directory / "status.json").exists() else ""
        raise Interrupted(says) from None
    _summarize([run])
    print(run.path)


def _settings(context: typer.Context, *others: str) -> dict[str, Any]:
    """The settings of a run that are given on the command line: all that is, but for these names."""
    return {n: x for n, x in context.params.items() if x is not None and n not in others}


def _print(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int | None = None) -> None:
    """Print a table; numbers, from that column on, stand to the right."""
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if numbers is not None and i >= numbers else "left")
    for row in rows:
        table.add_row(*row)
    show(table)


def _summarize(runs: list[Run]) -> None:
    from .report import summary_rows

    head = ["task", "backend", "optimizer"]
    figures = ["target accuracy", "source figure", "before -> after", "distance to anchor"]
    rows = [
        [
            *(row[name] for name in head),
            f"{row['target_before']:.3f} -> {row['target_after']:.3f}",
            f"{row['metric']} ({row['better']} is better)",
            f"{row['source_before']:.3f} -> {row['source_after']:.3f}",
            f"{row['distance']:.3f}",
        ]
        for row in summary_rows(runs)
    ]
    _print(head + figures, rows, numbers=len(head))


def _held(c: Comparison) -> list[str]:
    return [c.second, c.first, "yes" if c.agree else "NO", f"{c.weights:.2g} of the way"]


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs; the first is the reference.")],
    tolerance: Annotated[
        float | None,
        typer.Option(help="Bound on weights and records [default: 1e-9 in float64, 0.01 in float32]."),
    ] = None,
    predictions: Annotated[
        float, typer.Option(help="Smallest share of equal test predictions.")
    ] = PREDICTIONS,
    bisect: Annotated[
        bool | None,
        typer.Option(
            help="Take two runs that differ again, up to the first bit that does, and name its step, "
            "parameter, element and operation [default: with two runs]."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Do these runs agree, step by step, and where do they first part? Exit 1 when they do not agree."""
    if len(runs) < 2:
        raise RecAdamError("compare: give two runs or more; the first is the reference")
    if bisect and len(runs) > 2:
        raise RecAdamError(f"compare: --bisect is for two runs, and {len(runs)} are given; leave it out")
    loaded = [load_run(path) for path in runs]
    results = [compare_runs(loaded[0], run, tolerance, predictions) for run in loaded[1:]]
    parting = None
    if bisect is not False and len(runs) == 2 and (results[0].first_difference or results[0].weights):
        from .bisect import bisect_runs

        with progress(loaded[0].config.steps, "bisecting") as tell:
            parting = bisect_runs(loaded[0], loaded[1], lambda step: tell(step, ""))
    if as_json:
        values = [asdict(result) for result in results]
        if len(runs) == 2:
            values[0]["parting"] = None if parting is None else asdict(parting)
        print(json.dumps(values, indent=2))
    else:
        head = ["run", "against", "agree", "weights apart", "at", "bound", "same predictions"]
        rows = [
            [
                *_held(c),
                f"step {c.weights_step} {c.weights_name}",
                f"{c.tolerance:g}",
                f"{_percent(c.predictions)} of {c.rows}",
                *("never" if x is None else f"step {x[0]}, {x[1]}" for x in (c.parted, c.first_difference)),
            ]
            for c in results
        ]
        _print([*head, "parted", "first bit"], rows)
        for line in parting.lines() if parting else ():
            print(line)
    if not all(result.agree for result in results):
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs.")],
    out: Annotated[Path, typer.Option(help="Folder of report.html and the pictures.")] = Path("report"),
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Fine-tuning runs",
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier report in the folder.")] = False,
) -> None:
    """Write a page with tables and pictures of runs."""
    from .report import write_report

    print(write_report([load_run(path) for path in runs], out, title, overwrite))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the runs and the report.")] = Path("runs/demo"),
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each on its share of the cores.")] = 2,
    only: Annotated[str | None, typer.Option(help=f"One task alone: {' or '.join(PLAN)}.")] = None,
) -> None:
    """Every task on every backend with RecAdam and AdamW, compared, with a report. Exit 1 on disagreement."""
    plan = plan_demo(only)
    fetch_all(name for task, _, _ in plan for name in get_task(task).archives())
    try:
        with progress(len(plan), "demo") as tell:
            runs, comparisons, page = run_demo(plan, out, jobs, tell)
    except KeyboardInterrupt:
        says = f"the runs in {out} say so" if any(out.glob("*/status.json")) else ""
        raise Interrupted(says) from None
    _summarize(runs)
    head = ["task", "run", "against", "agree", "weights apart", "same predictions"]
    rows = [[task, *_held(c), f"{_percent(c.predictions)} of {c.rows}"] for task, c in comparisons]
    _print(head, rows)
    print(f"report: {page.resolve()}")
    if not all(c.agree for _, c in comparisons):
        raise typer.Exit(1)


@app.command("fetch")
def fetch_command(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"What to fetch [default: {' '.join(FREE)}].")
    ] = None,
) -> None:
    """Fetch models and data into the cache folder, or check those that are there."""
    for name, path in fetch_all(names or FREE).items():
        print(f"{name}: {path}")


@app.command()
def seeds(
    context: typer.Context,
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(TASKS)}.")] = "digits",
    optimizer: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(OPTIMIZERS)}; give it again for more.")
    ] = None,
    backend: Annotated[str, typer.Option(help="One that trains many seeds at once.")] = "jax",
    count: Annotated[int, typer.Option(min=1, max=1024, help="Seeds, from 0.")] = 16,
    steps: Annotated[int | None, typer.Option(help="Number of steps.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Strength of the pull.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    k: Annotated[float | None, typer.Option(help="Slope of the sigmoid, per step.")] = None,
    t0: Annotated[float | None, typer.Option(help="Middle of the sigmoid, in steps.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Evaluate every so many steps.")] = None,
    out: Annotated[Path, typer.Option(help="Directory of seeds.json and seeds.png.")] = Path("runs/seeds"),
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier sweep in the directory.")] = False,
) -> None:
    """Train from many seeds in one program, and show how much they differ."""
    from .report import draw_seeds
    from .seeds import sweep_seeds

    changes = _settings(context, "task", "optimizer", "backend", "count", "out", "overwrite")
    names = list(dict.fromkeys(optimizer or ["recadam", "annealed", "adamw"]))
    # Each optimizer gets the settings that it reads, and every setting has one that does.
    reads = {name: {n: x for n, x in changes.items() if n not in UNREAD.get(name, ())} for name in names}
    for setting in changes:
        if all(setting not in read for read in reads.values()):
            check_read(names[0], [setting])
    configs = [RunConfig.for_task(task, backend, name, **reads[name]) for name in names]
    fetch_all(get_task(task).archives(**configs[0].options))
    with owned(out):
        folder = Folder(out, "seeds")
        folder.check(["seeds.json", "seeds.png"], overwrite)
        sweeps = []
        with progress(len(configs), f"{task}, {count} seeds") as tell:
            for done, config in enumerate(configs):
                tell(done, config.optimizer)
                sweeps.append(sweep_seeds(config, range(count)))
            tell(len(configs), "")
        draw_seeds(sweeps, folder)
    figures = list(sweeps[0].evaluations)
    rows = []
    for sweep in sweeps:
        spread = (sweep.quartiles(name) for name in figures)
        cells = (f"{middle:.4f} ({low:.4f} to {high:.4f})" for low, middle, high in spread)
        rows.append([sweep.config.optimizer, *cells])
    _print(["optimizer", *(name.replace("_", " ") for name in figures)], rows, numbers=1)
    print(f"medians and middle halves of {count} seeds after step {sweeps[0].config.steps}")
    print(out / "seeds.png")


@app.command()
def trial(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="name=value, as method=recadam lr=2e-4 pull=0.2; what is left out is at its default."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """One training of the experiments, from the line that its row shows. Prints what is in that row."""
    from .experiments import Trial, run_trial
    from .experiments.data import archives

    chosen = Trial.parse(settings or [])
    fetch_all(archives(chosen.target, chosen.model))
    figures = run_trial(chosen)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    rows = [[name, f"{value:.6g}"] for name, value in figures.items() if name != "curve"]
    _print(["figure", "value"], rows, numbers=1)


@app.command()
def experiment(
    name: Annotated[
        str, typer.Argument(help="; ".join(f"{e.name}: {e.about}" for e in EXPERIMENTS.values()))
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of table and report [default: runs/experiments/NAME].")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Seeds of the tests, from 0 [default: 5; quick: 2].")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="minilm-l3 (default), minilm-l6, a checkpoint folder, or org/model; may be repeated."
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(TARGETS)}; for glue {', '.join(GLUE)}; may be repeated."),
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm; may be repeated.")] = None,
    quick: Annotated[
        bool, typer.Option(help="A small version that takes minutes: to see that it works.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at once, each on one thread.")] = (
        os.cpu_count() or 1
    ),
    data: Annotated[str, typer.Option(help="glue: the folder of the official files, or 'hub'.")] = "",
    preset: Annotated[str, typer.Option(help="glue: bert-base (default) or albert-xxlarge.")] = "",
    accept_gemma_terms: Annotated[
        bool, typer.Option(help="decoder: its weights are under the Gemma Terms of Use.")
    ] = False,
) -> None:
    """Run one of the paper's experiments, or go on with it, and write its table and its page."""
    from .experiments.report import write_experiment
    from .experiments.run import run_experiment

    if name not in EXPERIMENTS:
        raise unknown("experiment", name, EXPERIMENTS)
    if name != "glue" and (data or preset):
        raise RecAdamError(f"experiment {name!r} reads no --data and no --preset; they are for 'glue'")
    if accept_gemma_terms:
        decoder_folder(accept_terms=True)
    chosen, defaults = EXPERIMENTS[name], Options()
    options = Options(
        seeds=tuple(range(seeds)) if seeds else defaults.seeds[: 2 if quick else None],
        models=tuple(dict.fromkeys(x.rstrip("/") or x for x in model or ())) or chosen.models,
        targets=tuple(f"glue/{x}" if name == "glue" else x for x in target or ()) or chosen.targets,
        arms=tuple(arm or ()),
        quick=quick,
        data=data,
        preset=preset or defaults.preset,
    )
    folder = out or Path("runs/experiments") / (f"{name}-quick" if quick else name)
    try:
        with progress(1, name) as tell:
            results = run_experiment(EXPERIMENTS[name], options, folder, jobs, tell)
    except KeyboardInterrupt:
        raise Interrupted(f"{folder} has what is done; run it again, and it goes on") from None
    for row in results.failed(chain(*EXPERIMENTS[name].planned(options, results))):
        say(f"failed: {row.trial.command}: {row.error}")
    print(write_experiment(name, results, options))
