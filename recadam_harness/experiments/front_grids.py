"""The experiments with fronts: every method over a grid of its own, all of one size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import product
from typing import Any

from recadam_core.errors import unknown

from .data import DECODER, TARGETS, kind_of
from .experiment import TUNING_SEED, Arm, Experiment, Options
from .fronts import MOST, UNTUNED, chosen, front, keenest, scale_of
from .table import Entry, Results, Row
from .trial import METHODS, Trial

__all__ = ["DEFAULT", "FRONTS", "KEENEST", "front_arms", "untuned"]

KEENEST = "adamw, learning most"
"""The setting of AdamW that the others are held against."""

DEFAULT = "pull=0.1, AdamW's rate"
"""The same with the pull that `anchor` has where none is given."""

RATES = {
    "encoder": (2e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4),
    "decoder": (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4),
}
FEW = {"encoder": (1e-4, 2e-4, 4e-4), "decoder": (2e-5, 5e-5, 1e-4)}
HIGHER = {"encoder": (2e-4, 5e-4, 1e-3), "decoder": (5e-5, 1e-4, 2e-4)}  # of Muon
ADAPTED = {"encoder": (5e-4, 1e-3, 3e-3), "decoder": (1e-4, 3e-4, 1e-3)}  # of adapters


@dataclasses.dataclass(frozen=True)
class _Family:
    """A method's grid: rates alone, or rates times strengths."""

    label: str
    method: str
    rates: Mapping[str, tuple[float, ...]]
    strengths: tuple[dict[str, Any], ...] = ({},)


def _each(name: str, *values: float) -> tuple[dict[str, Any], ...]:
    return tuple({name: value} for value in values)


_ANNEALED = ({"pull": 0.05, "center": 0.25}, {"pull": 0.2, "center": 0.5})
_FAMILIES = {
    "adamw": _Family("AdamW", "adamw", RATES),
    "recadam": _Family("RecAdam", "recadam", FEW, _ANNEALED),
    "l2sp": _Family("constant pull", "l2sp", FEW, _each("pull", 0.02, 0.1)),
    "feature-pull": _Family("feature-weighted pull", "feature-pull", FEW, _each("pull", 0.3, 0.9)),
    "ewc": _Family("EWC pull", "ewc", FEW, _each("pull", 0.3, 0.9)),
    "ewc-dr": _Family("EWC-DR pull", "ewc-dr", FEW, _each("pull", 0.3, 0.9)),
    "muon-pull": _Family("constant pull, Muon", "muon-pull", HIGHER, _each("pull", 0.02, 0.1)),
    "spd": _Family("SPD", "spd", FEW, _each("pull", 1.0, 2.0)),
    "mofo": _Family("MoFO", "mofo", FEW, _each("share", 0.05, 0.15)),
    "half": _Family("half fine-tuning", "half", FEW, _each("share", 0.25, 0.5)),
    "finch": _Family("FINCH", "finch", RATES),
    "lwf": _Family("KL to the base (LwF)", "lwf", FEW, _each("weight", 0.1, 1.0)),
    "wiseft": _Family("WiSE-FT", "wiseft", FEW, _each("alpha", 0.3, 0.6)),
    "fapm": _Family("FAPM", "fapm", FEW, _each("share", 0.1, 0.3)),
    "lora": _Family("LoRA", "lora", ADAPTED, _each("rank", 8, 64)),
    "osf": _Family("OSF", "osf", FEW, _each("share", 0.25, 0.5)),
    "replay-1": _Family("replay of 1%", "replay", RATES, _each("share", 0.01)),
    "replay-5": _Family("replay of 5%", "replay", RATES, _each("share", 0.05)),
    "replay-10": _Family("replay of 10%", "replay", RATES, _each("share", 0.1)),
    "self-replay": _Family("self-replay", "self-replay", FEW, _each("share", 0.05, 0.1)),
}
SIZES: dict[str, dict[str, Any]] = {
    "embeddings": {"rows": 1920, "steps": 60, "batch_size": 32, "max_length": 32},
    "decoder": {"rows": 384, "steps": 48, "batch_size": 8, "max_length": 64},
    "classification": {"head": "probed"},
}
QUICK_SIZES: dict[str, dict[str, Any]] = {
    "embeddings": {"rows": 256, "steps": 8, "held_out": 200},
    "decoder": {"rows": 48, "steps": 6, "held_out": 24},
    "classification": {"rows": 250, "steps": 15},
}
QUICK = ("adamw", "l2sp", "replay-5")


def front_arms(kind: str) -> dict[str, Arm]:
    """The methods that are compared on targets of a kind, each with its grid."""
    of = "decoder" if kind == "decoder" else "encoder"
    arms = {}
    for name, family in _FAMILIES.items():
        if METHODS[family.method].kinds and kind not in METHODS[family.method].kinds:
            continue
        pairs = product(family.rates[of], family.strengths)
        arms[name] = Arm(family.label, family.method, tuple({"lr": lr, **some} for lr, some in pairs))
    return arms


def untuned(name: str) -> str:
    """The arm of a method at a rate that was not chosen."""
    return f"{name}, lr × {UNTUNED:g}"


def _experiment(kind: str, about: str) -> Experiment:
    """Every method on its grid, on validation rows; then its front, and its choice at 4 times the rate."""
    arms, targets = front_arms(kind), [name for name in TARGETS if kind_of(name) == kind]

    def places(options: Options) -> list[tuple[str, str]]:
        for target in options.targets:
            if target not in targets:
                raise unknown("target", target, targets)
        if options.quick:
            return [(options.targets[0], model) for model in options.models]
        return [(target, model) for target in options.targets for model in options.models]

    def names(options: Options) -> tuple[str, ...]:
        # Without AdamW there is nothing to hold the others against.
        return tuple(dict.fromkeys(("adamw", *options.chosen(arms, QUICK if options.quick else ()))))

    def tuned(options: Options, name: str, target: str, model: str) -> list[Entry]:
        size = {**SIZES[kind], **(QUICK_SIZES[kind] if options.quick else {})}
        place = {"target": target, "model": model, "seed": TUNING_SEED, "split": "validation"}
        tried = arms[name].trials[-2:] if options.quick else arms[name].trials
        return [
            Entry("tune", name, Trial(method=arms[name].method, **{**place, **size, **settings}))
            for settings in tried
        ]

    def tuning(options: Options, results: Results) -> list[Entry]:
        return [e for place in places(options) for x in names(options) for e in tuned(options, x, *place)]

    def picked(options: Options, results: Results, place: tuple[str, str]) -> dict[str, list[Row]]:
        most = keenest(results.some(tuned(options, "adamw", *place)))
        scale = scale_of([most])
        found: dict[str, list[Row]] = {KEENEST: [most], DEFAULT: [_pulled(most)]}
        for name in names(options):
            rows = results.of(tuned(options, name, *place))
            if rows:
                found[name] = front(rows, scale)
                found[untuned(name)] = [_faster(chosen(found[name], scale))]
        return found

    def test(options: Options, results: Results) -> list[Entry]:
        picks = [x for place in places(options) for x in picked(options, results, place).items()]
        return [
            Entry("test", name, dataclasses.replace(row.trial, seed=seed, split="test"))
            for seed in options.seeds
            for name, rows in picks
            for row in rows
        ]

    def count(options: Options) -> tuple[int, int]:
        many = len(places(options)) * len(names(options))
        return many * (2 if options.quick else 6), (many * (MOST + 1) + 2 * len(places(options))) * len(
            options.seeds
        )

    return Experiment(
        kind,
        about,
        [KEENEST, DEFAULT, *(x for name in arms for x in (name, untuned(name)))],
        (tuning, test),
        count,
        targets=("movie-reviews",) if kind == "classification" else tuple(targets),
        models=(DECODER,) if kind == "decoder" else ("minilm-l3",),
        fronts=True,
    )


def _faster(row: Row) -> Row:
    return _with(row, lr=UNTUNED * row.trial.lr)


def _pulled(row: Row) -> Row:
    return _with(row, method="l2sp", pull=0.1)


def _with(row: Row, **settings: Any) -> Row:
    """The row of a trial with other settings, which nobody has run."""
    trial = dataclasses.replace(row.trial, **settings)
    return dataclasses.replace(row, entry=dataclasses.replace(row.entry, trial=trial))


FRONTS = {
    experiment.name: experiment
    for experiment in (
        _experiment("embeddings", "who learns, who forgets: sentence embeddings, every method's front"),
        _experiment("decoder", "who learns, who forgets: Gemma 3 270M, every method's front"),
        _experiment("classification", "who learns, who forgets: a classifier from a probed head, fronts"),
    )
}
"""The experiments with fronts, by name."""
