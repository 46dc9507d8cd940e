"""Fronts: areas, what is chosen and tested, meters, pages; and the subjects that they are of."""

from __future__ import annotations

import csv
import dataclasses
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from recadam_core import RecAdamError
from recadam_harness.experiments import METHODS, Trial
from recadam_harness.experiments.experiment import TUNING_SEED, Options
from recadam_harness.experiments.front_grids import DEFAULT, FRONTS, KEENEST, front_arms, untuned
from recadam_harness.experiments.fronts import (
    LEAST,
    MOST,
    Point,
    Scale,
    area_of,
    areas,
    chosen,
    front,
    keenest,
    meters_of,
    scale_of,
)
from recadam_harness.experiments.report import write_experiment
from recadam_harness.experiments.table import Entry, Results, Row

KINDS = ("embeddings", "decoder", "classification")
points = st.lists(st.builds(Point, st.floats(-1, 3), st.floats(-3, 1)), max_size=6)


@given(points)
def test_an_area_is_that_of_the_points_that_dominate(some):
    """Counted on a grid of the points' own coordinates."""
    gains, keeps = (sorted({0.0, *(max(0.0, p[i]) for p in some)}) for i in (0, 1))
    covered = sum(
        (x1 - x0) * (y1 - y0)
        for x0, x1 in pairwise(gains)
        for y0, y1 in pairwise(keeps)
        if any(p.gained >= x1 and p.kept >= y1 for p in some)
    )
    assert area_of(some) == pytest.approx(covered, abs=1e-12)


def row(arm, gained, forgotten, stage="tune", seed=TUNING_SEED, kind="embeddings", **settings):
    """A row whose trial is of an arm, with these figures; what has moved follows what is forgotten."""
    experiment = FRONTS[kind]
    method = front_arms(kind)[arm].method if arm in front_arms(kind) else "adamw"
    place = {"target": experiment.targets[0], "model": experiment.models[0]}
    trial = Trial(
        method=method, seed=seed, split="validation" if stage == "tune" else "test", **place, **settings
    )
    figures = {
        "learned": 0.3 + gained, "learned_before": 0.3, "forgotten": forgotten,
        "moved": 0.01 + max(0.0, forgotten), "distance": 10 * abs(gained) + 1, "loss": 1.0, "seconds": 2.0,
        "accuracy": 0.5, "snli_mnr": 1.0, "snli_mnr_before": 0.5,
    }  # fmt: skip
    return Row(Entry(stage, arm, trial), figures)


def test_the_scale_is_adamw_where_it_gains_most():
    rows = [
        row("adamw", 0.10, 0.4, lr=4e-4),
        row("adamw", 0.12, 0.2, lr=2e-4),
        row("adamw", 0.12, 0.3, lr=1e-4),
    ]
    assert keenest(rows) is rows[1]
    scale = scale_of([rows[1]])
    assert scale == pytest.approx(Scale(0.12, 0.2))
    assert scale.point(rows[1]) == pytest.approx(Point(1.0, 0.0))
    assert scale.point(row("l2sp", 0.06, -0.1)) == pytest.approx(Point(0.5, 1.0))  # no more than all is kept


def test_a_front_has_the_two_settings_of_the_largest_area():
    rows = [row("l2sp", g, f, lr=lr) for g, f, lr in ((1.0, 0.5, 1e-4), (0.5, 0.0, 2e-4), (0.8, 0.2, 4e-4))]
    scale = Scale(1.0, 1.0)
    picked = front(rows, scale)
    found = {
        some: area_of(scale.point(rows[i]) for i in some) for some in combinations(range(len(rows)), MOST)
    }
    assert len(picked) == MOST == 2
    assert area_of(map(scale.point, picked)) == max(found.values()) == pytest.approx(0.5 * 1.0 + 0.5 * 0.5)
    assert chosen(rows, scale) is rows[2]  # 0.5, 0.5 and 0.64
    # What another setting does as well is not run twice.
    assert front([rows[0], row("l2sp", 0.5, 0.9, lr=2e-4)], scale) == [rows[0]]


def test_a_seed_in_which_everything_diverged_has_no_area():
    scale, rows = Scale(1.0, 1.0), [row("l2sp", 0.5, 0.5, seed=0), row("l2sp", 0.2, 0.0, seed=0)]
    assert areas(rows, scale, (0, 1)) == {0: pytest.approx(0.25 + 0.2 * 0.5), 1: 0.0}


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_has_as_many_settings_and_no_two_trials_are_alike(kind):
    arms = front_arms(kind)
    experiment = FRONTS[kind]
    options = Options(targets=experiment.targets, models=experiment.models)
    entries = experiment.stages[0](options, Results(None))
    assert {len(arm.trials) for arm in arms.values()} == {6}
    assert len({entry.trial for entry in entries}) == len(entries) == 6 * len(arms) * len(experiment.targets)
    assert {entry.trial.seed for entry in entries} == {TUNING_SEED}
    assert {METHODS[arm.method].kinds or KINDS for arm in arms.values()} <= {KINDS, (kind,)}


def tuned(kind, names):
    """Rows of all settings of these arms: AdamW forgets as it learns, the others half as much."""
    experiment = FRONTS[kind]
    options = Options(targets=experiment.targets[:1], models=experiment.models, arms=names, seeds=(0, 1, 2))
    results = Results(None)
    for entry in experiment.stages[0](options, results):
        rate = np.log10(entry.trial.lr) + 6
        share = 1.0 if entry.arm == "adamw" else 0.5
        made = row(entry.arm, 0.02 * rate, 0.1 * share * rate, kind=kind)
        results.rows[entry.name] = dataclasses.replace(made, entry=entry)
    return experiment, options, results


def test_tests_are_of_the_front_the_scale_and_four_times_the_rate():
    experiment, options, results = tuned("embeddings", ("l2sp",))
    entries = experiment.stages[1](options, results)
    assert {entry.trial.split for entry in entries} == {"test"}
    assert {entry.trial.seed for entry in entries} == {0, 1, 2}
    arms = {arm: {entry.trial.lr for entry in entries if entry.arm == arm} for arm in experiment.arms}
    assert arms[KEENEST] == arms[DEFAULT] == {8e-4}
    assert {(e.trial.method, e.trial.pull) for e in entries if e.arm == DEFAULT} == {("l2sp", 0.1)}
    (fast,) = arms[untuned("l2sp")]
    assert fast / 4 in {entry.trial.lr for entry in entries if entry.arm == "l2sp"}
    assert 1 <= len(arms["adamw"]) <= MOST
    # The bar of the progress promises no less than there will be.
    assert experiment.count(options)[1] >= len(entries)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_has_the_fronts_the_costs_and_the_meters(tmp_path, kind):
    experiment, options, found = tuned(kind, ("l2sp", "replay-5"))
    results = Results(tmp_path)
    results.rows = found.rows
    rng = np.random.default_rng(0)
    for entry in experiment.stages[1](options, results):
        rate = np.log10(entry.trial.lr) + 6
        share = 1.0 if entry.arm.startswith("adamw") else 0.5
        made = row("adamw", 0.02 * rate + 0.001 * rng.random(), 0.1 * share * rate, kind=kind)
        results.rows[entry.name] = dataclasses.replace(made, entry=entry)
    results.write()
    page = write_experiment(kind, results, options)
    text = (tmp_path / "summary.md").read_text()
    for said in (
        "Is a pull ahead?",
        "Fronts on test rows:",
        "What the default pull costs and keeps",
        "At 4 times the chosen rate:",
        "What tells what is forgotten:",
        "| constant pull |",
        "| replay of 5% | old data |",
        "| the same with pull=0.1 |",
    ):
        assert said in text
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert len(pictures) == 3
    assert all(f"({name})" in text for name in pictures)
    assert page.read_text().count("<img") == 3
    # Constant pull keeps half of what AdamW loses at each rate, and its area is larger in every seed.
    (line,) = [line for line in text.splitlines() if line.startswith("| constant pull | ") and "lr=" in line]
    assert "+0." in line.split("|")[5]
    answer, *_ = (line for line in text.splitlines() if line.startswith("| constant pull | "))
    assert (
        answer.split("|")[2] == line.split("|")[5]
    )  # over AdamW's; then over replay's and at 4 times the rate
    assert len(answer.split("|")) == 7  # over replay's, too, and at 4 times the rate
    assert answer.split("|")[5].strip().startswith("-0.")  # where less is forgotten
    # Read again, the same page.
    again = Results(tmp_path)
    assert {name: r.check for name, r in again.rows.items()} == {n: r.check for n, r in results.rows.items()}
    with (tmp_path / "table.csv").open() as file:
        head = next(csv.reader(file))
    assert {"learned", "learned_before", "forgotten", "moved", "share"} <= set(head)
    assert "topics_accuracy" not in head  # which no row has


def test_a_meter_is_told_by_ranks():
    rows = [
        row("adamw", g, f, lr=1e-4 * (i + 1)) for i, (g, f) in enumerate(zip(range(8), range(8), strict=True))
    ]
    meters = meters_of(rows)
    assert meters["distance of the weights"].correlation.median == pytest.approx(1.0)
    assert meters["distance of the weights"].within == pytest.approx(1.0)
    assert np.isnan(meters["training loss at the end"].correlation.median)  # constant
    assert not meters_of(rows[: LEAST - 1])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            ["method=self-replay"],
            "trial: method 'self-replay' is for decoder; movie-reviews is classification",
        ),
        (["target=newsgroup-pairs", "method=frozen"], "trial: method 'frozen' is for classification; newsgr"),
        (
            ["target=snli-answers"],
            "trial: target snli-answers and model minilm-l3; the targets of gemma-270m",
        ),
        (["model=gemma-270m"], "trial: target movie-reviews and model gemma-270m; the targets of gem"),
        (
            ["target=newsgroup-pairs", "head=probed"],
            "trial: head is of classification, and newsgroup-pairs i",
        ),
        (["target=newsgroup-pairs", "curve_every=5"], "trial: curve_every is of classification, and newsgro"),
        (
            ["held_out=5"],
            "trial: held_out is of embeddings and decoders, and movie-reviews is classification",
        ),
        (["target=newsgroup-pairs", "held_out=-1"], "trial: held_out is -1; give a whole number from 0"),
        (["method=mofo", "share=0"], "trial: share is 0.0; give a finite number > 0 and <= 1"),
        (["method=lwf", "weight=-1"], "trial: weight is -1.0; give a finite number >= 0"),
        (["share=0.5"], "trial: method 'adamw' does not read share (it reads none of its kind)"),
        (
            ["method=osf", "curve_every=5"],
            "trial: osf has no curve, since its adapters are merged at the end",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(pairs, message):
    with pytest.raises(RecAdamError) as caught:
        Trial.parse(pairs)
    assert str(caught.value).startswith(message)


def test_a_target_of_another_kind_is_refused():
    options = Options(targets=("movie-reviews",), models=("minilm-l3",))
    with pytest.raises(RecAdamError, match=r"unknown target 'movie-reviews': choose one of .newsgroup-pair"):
        FRONTS["embeddings"].stages[0](options, Results(None))
    with pytest.raises(RecAdamError, match="unknown arm 'l2'"):
        FRONTS["embeddings"].stages[0](
            Options(targets=("newsgroup-pairs",), models=("minilm-l3",), arms=("l2",)), Results(None)
        )
