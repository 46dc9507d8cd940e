"""The experiments, declared: which trials each one is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from recadam_core.errors import unknown

from . import glue
from .data import HELD_OUT, TARGETS
from .experiment import TUNING_SEED, Arm, Experiment, Options
from .front_grids import FRONTS
from .table import Entry, Results, Row
from .trial import Trial

__all__ = ["ARMS", "EXPERIMENTS", "choose"]


def _product(*names: str, rows: Sequence[Sequence[Any]]) -> tuple[dict[str, Any], ...]:
    return tuple(dict(zip(names, row, strict=True)) for row in rows)


def _probed(trials: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    return tuple({**settings, "head": "probed"} for settings in trials)


RATES = _product("lr", rows=[(2e-5,), (5e-5,), (1e-4,), (2e-4,), (4e-4,), (8e-4,)])
ANNEALED = _product(
    "lr", "pull", "center",
    rows=[(1e-4, 0.05, 0.25), (2e-4, 0.05, 0.25), (2e-4, 0.2, 0.25),
          (2e-4, 0.2, 0.5), (4e-4, 0.2, 0.25), (4e-4, 0.2, 0.5)],
)  # fmt: skip
MIDDLES = _product(
    "lr", "center",
    rows=[(1e-4, 0.25), (2e-4, 0.25), (4e-4, 0.25), (1e-4, 0.5), (2e-4, 0.5), (4e-4, 0.5)],
)  # fmt: skip
# In Adam's moments gamma is held against the gradient: 1, 10 and 100.
COUPLED = _product(
    "lr", "pull",
    rows=[(1e-4, 1e-4), (1e-4, 1e-3), (1e-4, 1e-2), (4e-4, 4e-4), (4e-4, 4e-3), (4e-4, 4e-2)],
)  # fmt: skip
FLOORS = _product(
    "lr", "pull", "center", "floor",
    rows=[(2e-4, 0.2, 0.25, 0.1), (2e-4, 0.2, 0.25, 0.5), (4e-4, 0.2, 0.25, 0.1),
          (4e-4, 0.2, 0.25, 0.3), (4e-4, 0.4, 0.25, 0.3), (4e-4, 0.2, 0.1, 0.5)],
)  # fmt: skip
RECALLS = _product(
    "lr", "pull", "center",
    rows=[(2e-4, 0.1, 0.5), (2e-4, 0.3, 0.5), (4e-4, 0.1, 0.5),
          (4e-4, 0.3, 0.5), (2e-4, 0.2, 0.75), (4e-4, 0.2, 0.75)],
)  # fmt: skip
CONSTANTS = _product(
    "lr", "pull", rows=[(2e-4, 0.05), (2e-4, 0.1), (2e-4, 0.2), (4e-4, 0.1), (4e-4, 0.2), (4e-4, 0.4)]
)
BUDGETS = _product(
    "lr", "budget", rows=[(2e-4, 0.5), (2e-4, 1.0), (2e-4, 1.5), (4e-4, 0.5), (4e-4, 1.0), (4e-4, 1.5)]
)
FISHERS = _product(
    "lr", "pull", rows=[(2e-4, 0.1), (2e-4, 0.3), (2e-4, 0.9), (4e-4, 0.1), (4e-4, 0.3), (4e-4, 0.9)]
)
SHARES = _product(
    "lr", "alpha", rows=[(2e-4, 0.25), (2e-4, 0.5), (2e-4, 0.75), (4e-4, 0.25), (4e-4, 0.5), (4e-4, 0.75)]
)
RANKS = _product("lr", "rank", rows=[(3e-4, 8), (1e-3, 8), (2e-3, 8), (4e-3, 8), (1e-3, 32), (2e-3, 32)])
STRENGTHS = _product("inverse_strength", rows=[(0.01,), (0.03,), (0.1,), (0.3,), (1.0,), (3.0,)])
SOURCES = _product(
    "lr", "source_weight",
    rows=[(1e-4, 0.3), (1e-4, 1.0), (2e-4, 0.3), (2e-4, 1.0), (4e-4, 0.3), (4e-4, 1.0)],
)  # fmt: skip

ARMS = {
    "adamw": Arm("AdamW", "adamw", RATES, rule="best"),
    "adamw-careful": Arm("AdamW, lr chosen with care", "adamw", RATES, shares="adamw"),
    "recadam": Arm("RecAdam", "recadam", ANNEALED),
    "recadam-released": Arm("RecAdam, released form", "recadam-released", ANNEALED),
    "recadam-proximal": Arm("RecAdam, proximal form", "recadam-proximal", ANNEALED),
    "coupled": Arm("coupled Adam", "coupled", COUPLED),
    "annealed": Arm("λ(t) alone", "annealed", MIDDLES),
    "recadam-floor": Arm("RecAdam with a floor", "recadam", FLOORS),
    "recall": Arm("annealed pull alone", "recall", RECALLS),
    "l2sp": Arm("constant pull (L2-SP)", "l2sp", CONSTANTS),
    "budget": Arm("drift budget", "budget", BUDGETS),
    "ewc": Arm("EWC", "ewc", FISHERS),
    "feature-pull": Arm("feature-weighted pull", "feature-pull", FISHERS),
    "wiseft": Arm("WiSE-FT", "wiseft", SHARES),
    "lora": Arm("LoRA", "lora", RANKS),
    "frozen": Arm("frozen encoder", "frozen", STRENGTHS),
    "adamw-probed": Arm("AdamW from a probed head", "adamw", _probed(RATES)),
    "recadam-probed": Arm("RecAdam from a probed head", "recadam", _probed(ANNEALED)),
    "l2sp-probed": Arm("constant pull from a probed head", "l2sp", _probed(CONSTANTS)),
    "ewc-probed": Arm("EWC from a probed head", "ewc", _probed(FISHERS)),
    "feature-pull-probed": Arm("feature-weighted pull from a probed head", "feature-pull", _probed(FISHERS)),
    "multitask": Arm("multi-task, with source data", "multitask", SOURCES),
}
"""What `comparison` compares, by name."""

# Chosen as AdamW's are: what do these learn if nothing need be kept?
ARMS |= {
    f"{name}-accurate": dataclasses.replace(
        ARMS[name], label=f"{ARMS[name].label}, most accurate", rule="best", shares=name
    )
    for name in ("recadam", "l2sp", "ewc", "adamw-probed", "ewc-probed", "feature-pull-probed")
}

QUICK_SIZE: dict[str, Any] = {"rows": 250, "steps": 30}
QUICK = ("adamw", "recadam", "annealed", "l2sp", "wiseft", "frozen")


def choose(rows: Sequence[Row], rule: str) -> Row:
    r"""The trial whose settings are taken, among those of one arm on validation rows.

    "best" is the most accurate. "careful" is the one that forgets least (by the source task's loss) of
    those that are no worse than the most accurate by more than its standard error,
    $\sqrt{p (1 - p) / n}$. In a tie the first.
    """
    best = max(rows, key=lambda row: row.figures["accuracy"])
    if rule == "best":
        return best
    top = best.figures["accuracy"]
    near = [row for row in rows if row.figures["accuracy"] >= top - np.sqrt(top * (1 - top) / HELD_OUT)]
    return min(near, key=lambda row: row.figures["snli_mnr"])


def _arms(options: Options) -> dict[str, Arm]:
    return {name: ARMS[name] for name in options.chosen(ARMS, QUICK if options.quick else ())}


def _size(options: Options, target: str) -> dict[str, Any]:
    """Rows and steps of a target task."""
    if options.quick:
        return QUICK_SIZE
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)
    sizes = {"snli": {"rows": 2490, "steps": 156}, "topics": {"rows": 1000, "max_length": 64}}
    return sizes.get(target, {})


def _tuning(options: Options, name: str, target: str, model: str) -> list[Entry]:
    """The trials of one arm from which its settings are chosen."""
    arm = ARMS[name]
    if arm.shares:
        return _tuning(options, arm.shares, target, model)
    place: dict[str, Any] = {"target": target, "model": model, "seed": TUNING_SEED, "split": "validation"}
    tried = arm.trials[-2:] if options.quick else arm.trials  # at higher rates something is forgotten soon
    size = _size(options, target)
    return [Entry("tune", name, Trial(method=arm.method, **place, **size, **settings)) for settings in tried]


def _places(options: Options) -> list[tuple[str, str]]:
    return [(target, model) for target in options.targets for model in options.models]


def _comparison_tuning(options: Options, results: Results) -> list[Entry]:
    entries = [
        e for place in _places(options) for name in _arms(options) for e in _tuning(options, name, *place)
    ]
    return list({entry.name: entry for entry in entries}.values())


def _comparison_test(options: Options, results: Results) -> list[Entry]:
    chosen = {
        (name, place): choose(results.some(_tuning(options, name, *place)), arm.rule).trial
        for place in _places(options)
        for name, arm in _arms(options).items()
    }
    return [
        Entry("test", name, dataclasses.replace(trial, seed=seed, split="test"))
        for seed in options.seeds
        for (name, _), trial in chosen.items()
    ]


def _comparison_count(options: Options) -> tuple[int, int]:
    tuned = _comparison_tuning(options, Results(None))
    return len(tuned), len(_places(options)) * len(_arms(options)) * len(options.seeds)


# One point from which the others move one setting at a time.
POINT: dict[str, Any] = {"method": "recadam", "lr": 2e-4, "pull": 0.2, "center": 0.25}


def _declared(name: str, about: str, arms: dict[str, dict[str, Any]]) -> Experiment:
    """An experiment of declared trials, each with every seed, encoder and target task."""

    def stage(options: Options, results: Results) -> list[Entry]:
        chosen = options.chosen(arms)
        size = QUICK_SIZE if options.quick else {}
        return [
            Entry("test", arm, Trial(**{"target": target, "model": model, "seed": seed, **settings, **size}))
            for seed in options.seeds
            for target in options.targets
            for model in options.models
            for arm, settings in arms.items()
            if arm in chosen
        ]

    def count(options: Options) -> tuple[int, ...]:
        return (len(options.chosen(arms)) * len(options.seeds) * len(_places(options)),)

    return Experiment(name, about, arms, (stage,), count)


INITIALIZATION: dict[str, dict[str, Any]] = {
    "AdamW, pretrained": {"lr": 2e-4},
    "AdamW, random": {"lr": 2e-4, "init": "random"},
    "RecAdam, pretrained": {**POINT},
    "RecAdam, random": {**POINT, "init": "random"},
    "RecAdam, random, later": {**POINT, "center": 0.5, "width": 0.3, "init": "random"},
    "RecAdam, pretrained, later": {**POINT, "center": 0.5, "width": 0.3},
}

WATCHED: dict[str, Any] = {"method": "recadam", "lr": 2e-4, "pull": 0.2, "curve_every": 10}
FORGETTING: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 2e-4, "curve_every": 10},
    **{f"k={k:g}": {**WATCHED, "k": k, "t0": 50.0} for k in (0.05, 0.1, 0.2, 0.5, 1.0)},
    **{f"t0={t0:g}": {**WATCHED, "k": 0.2, "t0": t0} for t0 in (10.0, 25.0, 50.0, 75.0, 90.0)},
}


def _with(**settings: Any) -> dict[str, Any]:
    return {**POINT, **settings}


RATES_AROUND = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
SENSITIVITY: dict[str, dict[str, Any]] = {
    # The pull, at one learning rate.
    **{f"pull={p:g}": _with(pull=p) for p in (0.01, 0.05, 0.2, 0.5, 0.9)},
    # The learning rate, with lr * gamma held, and with gamma held at that of the middle.
    **{f"lr={lr:g}, lr·γ=0.2": _with(lr=lr) for lr in RATES_AROUND},
    **{f"lr={lr:g}, γ=1000": _with(lr=lr, pull=lr * 1000) for lr in RATES_AROUND},
    # The middle of the annealing.
    **{f"center={c:g}": _with(center=c) for c in (0.0, 0.25, 0.5, 0.75, 1.0)},
    # Rows, two epochs of them up to 2,000 and one from there.
    **{
        f"rows={rows}, {label}": {**settings, "rows": rows, "steps": steps}
        for rows, steps in ((250, 32), (500, 63), (1000, 126), (2000, 250), (4000, 250), (8000, 500))
        for label, settings in (
            ("AdamW", {"lr": 2e-4}),
            ("RecAdam", POINT),
            ("constant pull", {"method": "l2sp", "lr": 4e-4, "pull": 0.2}),
        )
    },
}


def _preset(options: Options) -> glue.Preset:
    presets = {"bert-base": glue.BERT, "albert-xxlarge": glue.ALBERT}
    if options.preset not in presets:
        raise unknown("preset", options.preset, presets)
    return presets[options.preset]


def _glue_trial(options: Options, task: str, model: str, **settings: Any) -> Trial:
    preset = _preset(options)
    size = {"steps": 4, "batch_size": 4} if options.quick else {}
    known = {"model": model, "data": options.data, **preset.settings}
    return Trial(target=f"glue/{task}", **{**known, **preset.per_task[task], **settings, **size})


def _glue_places(options: Options) -> list[tuple[str, str]]:
    preset = _preset(options)
    tasks = [target.removeprefix("glue/") for target in options.targets]
    for task in tasks:
        glue.check(task, options.data)
    return [(task, model) for task in tasks for model in options.models or (preset.model,)]


GLUE_ARMS = ("AdamW", "RecAdam")


def _searched(options: Options, task: str, model: str) -> list[Entry]:
    """Slopes and middles, on validation rows, as the paper searched them; the pull is its gamma of 5,000."""
    preset = _preset(options)
    pairs = [(k, t0) for k in preset.k for t0 in preset.t0][: 2 if options.quick else None]
    pull = 5000 * _glue_trial(options, task, model).lr
    place = {"method": "recadam", "pull": pull, "seed": TUNING_SEED, "split": "validation"}
    return [
        Entry("tune", "RecAdam", _glue_trial(options, task, model, k=k, t0=t0, **place)) for k, t0 in pairs
    ]


def _glue_tuning(options: Options, results: Results) -> list[Entry]:
    searched = "RecAdam" in options.chosen(GLUE_ARMS)
    return [entry for place in _glue_places(options) if searched for entry in _searched(options, *place)]


def _glue_test(options: Options, results: Results) -> list[Entry]:
    entries = []
    for task, model in _glue_places(options):
        trials = {"AdamW": _glue_trial(options, task, model)}
        if "RecAdam" in options.chosen(GLUE_ARMS):
            tried = results.some(_searched(options, task, model))
            best = max(tried, key=lambda row: glue.headline(task, row.figures)).trial
            trials["RecAdam"] = dataclasses.replace(best, split="test")
        entries += [
            Entry("test", arm, dataclasses.replace(trials[arm], seed=seed))
            for seed in options.seeds
            for arm in options.chosen(GLUE_ARMS)
        ]
    return entries


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "comparison",
            "who learns, who forgets: every method, each tuned by as many trials",
            ARMS,
            (_comparison_tuning, _comparison_test),
            _comparison_count,
        ),
        _declared("initialization", "from pretrained or from random weights", INITIALIZATION),
        _declared(
            "forgetting", "target loss, source loss and distance along the way, as k and t0 move", FORGETTING
        ),
        _declared(
            "sensitivity",
            "the pull, the learning rate, the middle of the annealing, the number of rows",
            SENSITIVITY,
        ),
        Experiment(
            "glue",
            "the paper's own tasks and settings, on GLUE's files or the hub's",
            GLUE_ARMS,
            (_glue_tuning, _glue_test),
            targets=tuple(f"glue/{name}" for name in glue.TASKS),
            models=(),
        ),
        *FRONTS.values(),
    )
}
"""The experiments, by name."""
