"""Experiments: trials and their commands, the table, choosing, statistics, kills, pages."""

from __future__ import annotations

import csv
import dataclasses
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from recadam_core import Constant, RecAdamError, Sigmoid
from recadam_harness.experiments import METHODS, Trial
from recadam_harness.experiments.data import Source, archives, target_of
from recadam_harness.experiments.figures import pareto_figure
from recadam_harness.experiments.grids import ARMS, EXPERIMENTS, TUNING_SEED, Options, choose
from recadam_harness.experiments.report import write_experiment
from recadam_harness.experiments.run import _bind, _each, _row, run_experiment
from recadam_harness.experiments.statistics import median_of, summarize
from recadam_harness.experiments.table import Entry, Results, Row
from recadam_harness.folders import Folder

SMALL = {"rows": 24, "steps": 3, "batch_size": 8, "max_length": 16}

CLASSIFYING = sorted(name for name, x in METHODS.items() if not x.kinds or "classification" in x.kinds)

trials = st.sampled_from(CLASSIFYING).flatmap(
    lambda method: st.builds(
        Trial,
        method=st.just(method),
        seed=st.integers(0, 10**6),
        rows=st.integers(0, 8000),
        head=st.sampled_from(["new", "probed"]),
        model=st.sampled_from(["minilm-l3", "/a folder/it's"]),
        **{
            name: st.floats(0.001, 0.9)
            for name in ("lr", "dropout", "pull", "floor", "alpha")
            if name in Trial.reads(method)
        },
    )
)


@given(trials)
def test_a_command_says_the_whole_trial(trial):
    assert Trial.parse(shlex.split(trial.command)[2:]) == trial


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["lr"], "trial: 'lr' is no setting; give name=value, as lr=1e-4"),
        (["rate=1"], "unknown setting of a trial 'rate': choose one of"),
        (["lr=fast"], "trial: lr is 'fast'; give a number"),
        (["steps=1.5"], "trial: steps is '1.5'; give a whole number"),
        (["steps=0"], "trial: steps is 0; give a whole number from 1 to 100,000,000"),
        ([f"seed={2**70}"], f"trial: seed is {2**70}; give a whole number from 0 to 9,223,372,036"),
        (["method=frozen", "lr=1e-3"], "trial: method 'frozen' does not read lr (it reads inverse_strength)"),
        (["init=random", "head=probed"], "trial: init=random goes with no probed head and no feature-pull"),
        (["data=folder"], "trial: movie-reviews reads no data; that is for targets glue/TASK"),
        (["method=recadam", "k=1", "t0=5", "width=0.1"], "trial: k and t0 stand for center and width; give"),
        (["lr=1", "lr=2"], "trial: lr is given twice; give it once"),
        (["lr=nan"], "trial: lr is nan; give a finite number > 0"),
        (["method=adam"], "unknown method 'adam': did you mean 'adamw'?"),
        (["pull=0.2"], "trial: method 'adamw' does not read pull (it reads none of its kind)"),
        (["method=l2sp", "center=0.5"], "trial: method 'l2sp' does not read center (it reads pull)"),
        (["method=recadam", "k=0.1"], "trial: k and t0 go together; give both, or center and width instead"),
        (["split=train"], "unknown split 'train'"),
        (["method=lora", "curve_every=5"], "trial: lora has no curve, since its adapters are merged at"),
        (["method=wiseft", "alpha=2"], "trial: alpha is 2.0; give a finite number >= 0 and <= 1"),
    ],
)
def test_bad_trials_are_named_in_one_line(pairs, message):
    with pytest.raises(RecAdamError) as caught:
        Trial.parse(pairs)
    assert str(caught.value).startswith(message)


def test_settings_become_the_optimizers():
    trial = Trial(method="recadam", lr=1e-4, pull=0.2, steps=200, center=0.5, width=0.4, floor=0.1)
    assert trial.hp.gamma == pytest.approx(2000)
    assert trial.hp.annealing == Sigmoid.over(200, 0.5, 0.4, floor=0.1)
    assert Trial(method="recadam", k=0.1, t0=250.0).annealing == Sigmoid(k=0.1, t0=250.0)
    assert Trial(method="l2sp").annealing == Constant(1.0, 1.0)
    assert Trial(method="annealed").hp.gamma == 0
    assert Trial(method="recall").annealing.weights(25) == (1.0, 0.5)
    assert [Trial(method=f"recadam{x}").hp.form for x in ("", "-released", "-proximal")] == [
        "decoupled", "released", "proximal",
    ]  # fmt: skip


def test_every_arm_is_tried_as_often_and_no_two_trials_are_alike():
    assert {len(arm.trials) for arm in ARMS.values()} == {6}
    for arm in ARMS.values():
        made = [Trial(method=arm.method, **settings) for settings in arm.trials]
        assert len(set(made)) == 6


def test_splits_are_disjoint_and_fixed():
    for name in ("movie-reviews", "snli", "topics"):
        splits = target_of(name)
        assert (len(splits.test), len(splits.validation)) == (1000, 1000)
        parts = [
            set(zip(p.first, p.second or p.first, strict=True))
            for p in (splits.train, splits.validation, splits.test)
        ]
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert len(parts[one] & parts[other]) <= (name == "snli")  # by premises, so one may be cut
        assert set(np.unique(splits.train.labels)) == set(range(splits.classes))
    assert len(target_of("movie-reviews").train) >= 8000
    sources = {split: Source(split) for split in ("validation", "test")}
    assert not set(sources["validation"].premises) & set(sources["test"].premises)
    trained, target = set(Source.pairs()[0]), target_of("snli")
    for premises in (*(s.premises for s in sources.values()), target.train.first, target.test.first):
        assert not trained & set(premises)
    assert not set(target.train.first) & set(sources["test"].premises)


def row(arm, accuracy, loss, seed=TUNING_SEED, stage="tune", **settings):
    method = ARMS[arm].method if arm in ARMS else "adamw"
    figures = {
        "accuracy": accuracy,
        "snli_mnr": loss,
        "snli_mnr_before": 0.4,
        "bbc_recall_at_1": round(1 - loss / 4, 6),
        "bbc_recall_at_1_before": 0.9,
        "distance": 1.0,
        "seconds": 2.0,
    }
    return Row(Entry(stage, arm, Trial(method=method, seed=seed, **settings)), figures)


def test_choosing():
    """The standard error at 0.75 and 1,000 rows is 0.0137."""
    rows = [
        row("adamw", 0.75, 2.0),
        row("adamw", 0.74, 1.0),
        row("adamw", 0.737, 0.8),
        row("adamw", 0.73, 0.5),
    ]
    assert choose(rows, "best") is rows[0]
    assert choose(rows, "careful") is rows[2]


def test_what_is_kept_and_what_is_as_good():
    rows = [row("adamw", 0.70 + 0.01 * s, 2.4 + 0.01 * s, s, "test") for s in range(5)]
    rows += [row("l2sp", 0.71, 0.8, s, "test") for s in range(5)]
    rows += [row("frozen", 0.60, 0.4, s, "test") for s in range(5)]
    adamw, l2sp, frozen = summarize(rows)
    assert (adamw.target, adamw.kept) == ((0.72, 0.70, 0.74), 0.0)
    assert l2sp.kept == pytest.approx(1 - 0.4 / 2.02)
    assert frozen.kept == 1.0
    assert l2sp.titles_kept == pytest.approx(1 - 0.4 / 2.02)
    # Of the loss of 0.4, nothing is forgotten of which a share could be kept.
    (alone,) = summarize([row("adamw", 0.7, 0.41, s, "test") for s in range(5)])
    assert np.isnan(alone.kept)
    # Seed by seed 0.01 more to 0.03 less, and 0.1 to 0.14 less.
    assert l2sp.gain == pytest.approx((-0.01, -0.03, 0.01))
    assert frozen.gain.high < 0
    assert adamw.gain == (0, 0, 0)


def test_a_case_has_an_adamw_of_its_own():
    rows = [row("rows=250, AdamW", 0.70, 0.8), row("rows=250, RecAdam", 0.71, 0.6)]
    rows += [
        row("rows=500, AdamW", 0.80, 0.5),
        row("rows=500, RecAdam", 0.78, 0.45),
        row("pull=0.1", 0.7, 0.6),
    ]
    gains = {s.arm: (s.gain.median, s.kept) for s in summarize(rows)}
    assert gains["rows=250, RecAdam"] == pytest.approx((0.01, 0.5))
    assert gains["rows=500, RecAdam"] == pytest.approx((-0.02, 0.5))
    assert np.isnan(gains["pull=0.1"]).all()


def test_arms_with_the_same_trials_are_one_point_of_the_picture():
    rows = [row(arm, 0.7, 0.8, s, "test") for arm in ("adamw", "adamw-careful") for s in range(3)]
    rows += [row("l2sp", 0.7, 0.6, s, "test", pull=0.2) for s in range(3)]
    rows += [row("l2sp-accurate", 0.71, 0.7, s, "test", pull=0.1) for s in range(3)]
    (panel,) = pareto_figure(summarize(rows), "title").axes
    assert [text.get_text() for text in panel.texts] == [
        "80% kept of what AdamW forgets →",
        "before",
        "constant pull (L2-SP), most accurate",
        "AdamW (also lr chosen with care)",
        "constant pull (L2-SP)",
    ]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_the_interval_holds_its_median(values):
    found = median_of(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)


def test_the_bootstrap_of_a_hundred_is_narrow():
    """The median of 100 normal values has a standard error of 1.2533 / 10."""
    found = median_of(np.random.default_rng(1).standard_normal(100))
    assert 0.2 < found.high - found.low < 0.8


def test_the_table_comes_back_as_it_was(tmp_path):
    results = Results(tmp_path)
    curve = [{"step": 0.0, "source_loss": 0.5, "distance": 0.0}]
    results.add(dataclasses.replace(row("adamw", 0.5, 1.25, lr=3e-5), curve=curve))
    results.add(row("l2sp", 0.5, 1.5, pull=0.3, warmup=4))
    results.add(Row(Entry("test", 'a, "b"', Trial()), {}, [], "diverged, at step 3"))
    again = Results(tmp_path)
    assert list(again.rows) == list(results.rows)
    for mine, theirs in zip(again.rows.values(), results.rows.values(), strict=True):
        assert (mine.entry, mine.figures, mine.error) == (theirs.entry, theirs.figures, theirs.error)
    entries = [found.entry for found in results.rows.values()]
    assert again.of(entries[::-1])[1].curve == curve
    assert [found.entry.arm for found in again.of(entries[::-1])] == ["l2sp", "adamw"]
    for _ in range(3):  # the same trial in two places has one curve, however often it is read again
        again.add(
            dataclasses.replace(again.of(entries)[0], entry=dataclasses.replace(entries[0], arm="twin"))
        )
        again = Results(tmp_path)
    assert [len(found.curve) for found in again.rows.values()] == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda text: text.replace(b"0.53", b"half"),
            "line 2: damaged (could not convert string to float: 'ha",
        ),
        (
            lambda text: text.replace(b"0.53", b"nan"),
            "line 2: damaged (accuracy is nan); delete that line, and",
        ),
        (
            lambda text: text.replace(b"0.53", b""),
            "line 2: damaged (no accuracy); delete that line, and its tri",
        ),
        (lambda text: text.replace(b"\ntune", b"\ntnue"), "line 2: damaged (stage 'tnue'); delete that line"),
        (lambda text: text.replace(b"0.53", b"7.5"), "line 2: damaged (accuracy is 7.5); delete that line"),
        (lambda text: text.replace(b",0.6875,", b",7,"), "line 2: damaged (bbc_recall_at_1 is 7.0); delete"),
        (lambda text: text.replace(b",1,,2,", b",-1,,2,"), "line 2: damaged (distance is -1.0); delete"),
        (lambda text: text.replace(b",1,,2,", b",1,,-2,"), "line 2: damaged (seconds is -2.0); delete that"),
        (lambda text: text.replace(b",1.25,", b",-1.25,"), "line 2: damaged (snli_mnr is -1.25); delete"),
        (
            lambda text: text + text.splitlines(keepends=True)[1],
            "'adamw' has 'recadam trial seed=1000' twice; delete one of the lines",
        ),
        (lambda text: b"", "no column 'stage' in its first line; delete the file, or give another folder by"),
        (lambda text: b"a,b\n1,2\n", "no column 'stage' in its first line; delete the file"),
        (
            lambda text: text[:-30],
            "damaged after line 2 (it has not as many columns as the first line); mend it",
        ),
        (lambda text: text + b"\xff\xfe", "damaged after line"),
        (lambda text: text + b"x" * 200_000, "damaged after line 2 (field larger than field limit"),
    ],
)
def test_a_damaged_table_is_named_by_line(tmp_path, damage, message):
    Results(tmp_path).add(row("adamw", 0.53, 1.25))
    path = tmp_path / "table.csv"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RecAdamError) as caught:
        Results(tmp_path)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("table.csv", "0.53", "0.63"), ("table.csv", "0.53", ""), ("curves.csv", "0.25", "0.125")],
)
def test_a_figure_that_was_changed_is_refused_and_its_row_alone(tmp_path, name, old, new):
    results = Results(tmp_path)
    curve = [{"step": 0.0, "source_loss": 0.25, "distance": 0.0}]
    results.add(dataclasses.replace(row("adamw", 0.53, 1.25, 0, curve_every=5), curve=curve))
    results.add(row("adamw", 0.7, 1.25, 1))
    assert [len(found.curve) for found in Results(tmp_path).rows.values()] == [1, 0]
    text = (tmp_path / name).read_text()
    assert text.count(old) == 1
    (tmp_path / name).write_text(text.replace(old, new))
    with pytest.raises(RecAdamError, match=r"table.csv: line 2: damaged .*; delete that line, and its trial"):
        Results(tmp_path)
    lines = (tmp_path / "table.csv").read_text().splitlines(keepends=True)
    (tmp_path / "table.csv").write_text("".join([lines[0], lines[2]]))
    assert [found.figures["accuracy"] for found in Results(tmp_path).rows.values()] == [0.7]


def test_a_curve_that_no_row_has_stays(tmp_path):
    curve = [{"step": 0.0, "source_loss": 0.25, "distance": 0.0}]
    Results(tmp_path).add(dataclasses.replace(row("adamw", 0.53, 1.25, 0, curve_every=5), curve=curve))
    with (tmp_path / "curves.csv").open("a") as file:
        file.write("mine,1,2,3,4\n")
    Results(tmp_path).add(row("adamw", 0.7, 1.25, 1))
    assert (tmp_path / "curves.csv").read_text().count("mine,1,2,3,4\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line.replace("recadam trial", "rm -rf"), "line 2: damaged"),
        (
            lambda line: line.rpartition(",")[0],
            "no column 'sha256' in its first line; delete the file, or give",
        ),
        (lambda line: line.replace("sha256", "SHA256"), "no column 'sha256' in its first line; delete the"),
        (
            lambda line: f"{line},notes",
            "no experiment wrote its column 'notes', which would be lost; move it to",
        ),
    ],
)
def test_a_table_has_its_columns_and_no_others(tmp_path, change, message):
    Results(tmp_path).add(row("adamw", 0.53, 1.25))
    path = tmp_path / "table.csv"
    path.write_text("\n".join(map(change, path.read_text().splitlines())))
    with pytest.raises(RecAdamError, match=message):
        Results(tmp_path)


@pytest.mark.tree
@pytest.mark.parametrize("name", ["comparison", "comparison-l6", "comparison-targets", "forgetting",
                                  "initialization", "sensitivity"])  # fmt: skip
def test_the_published_tables_are_as_they_were_written(tmp_path, name):
    published = Path(__file__).parents[2] / "docs" / "experiments" / name
    folder = shutil.copytree(published, tmp_path / name)
    Results(folder).write()
    assert (folder / "table.csv").read_bytes() == (published / "table.csv").read_bytes()


def test_a_folder_that_is_no_encoder_is_said_before_a_trial(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    wanted = ["model: no config.json", "config.json: no model_type", "model: no weights"]
    for message, config in zip(wanted, (None, "{}", '{"model_type": "bert"}'), strict=True):
        if config:
            (model / "config.json").write_text(config)
        with pytest.raises(RecAdamError, match=f"{message}.*"):
            run_experiment(EXPERIMENTS["comparison"], Options(models=(str(model),)), tmp_path / "out", 1)
        assert not (tmp_path / "out").exists()
    with pytest.raises(RecAdamError, match="unknown model ''"):
        run_experiment(EXPERIMENTS["comparison"], Options(models=("",)), tmp_path / "out", 1)


def test_rows_stay_with_the_model_and_the_data_that_they_are_of(encoders, tmp_path):
    model, out = shutil.copytree(encoders["bert"], tmp_path / "model"), tmp_path / "out"
    trials = [Trial(model=str(model))]
    for _ in range(2):
        _bind(Results(out), trials, trials)
    for name in ("config.json", "tokenizer_config.json", "pytorch_model-00001-of-00002.bin"):
        kept = (model / name).read_bytes() if (model / name).exists() else None
        (model / name).write_bytes((kept or b"") + b" ")
        for waiting in (trials, []):
            with pytest.raises(RecAdamError, match=r"out: model .*/model was changed since; give another"):
                _bind(Results(out), trials, waiting)
        (model / name).unlink() if kept is None else (model / name).write_bytes(kept)
    (out / "inputs.json").write_text("{}")
    with pytest.raises(RecAdamError, match=r"inputs.json: damaged \(its sha256 is not the manifest's\)"):
        _bind(Results(out), trials, trials)
    (out / "inputs.json").unlink()
    with pytest.raises(RecAdamError, match=r"inputs.json: is not there; put it back, or give another"):
        _bind(Results(out), trials, trials)


def test_what_a_person_wrote_into_a_summary_stays(tmp_path):
    results, options = Results(tmp_path), Options(seeds=(0,), arms=("adamw",))
    for seed in range(2):
        results.add(row("adamw", 0.5, 1.25, seed, "test", lr=8e-4))
    folder = Folder(tmp_path, "experiment")
    folder.write("summary.md", b"| 1 |")
    (tmp_path / "summary.md").write_text("mine")
    with pytest.raises(
        RecAdamError, match=r"summary.md: was changed after the experiment had written it; move"
    ):
        run_experiment(EXPERIMENTS["comparison"], options, tmp_path, 1)
    assert (tmp_path / "summary.md").read_text() == "mine"


def test_two_models_of_one_name_have_no_picture_of_one_name(tmp_path):
    for models in (("a/bert", "b/bert/"), ("org/minilm-l3", "minilm-l3")):
        with pytest.raises(RecAdamError, match="another one has a folder of that name, too; rename one"):
            run_experiment(EXPERIMENTS["comparison"], Options(models=models), tmp_path / "x", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_spreadsheets_table_is_read(tmp_path):
    Results(tmp_path).add(row("adamw", 0.53, 1.25))
    path = tmp_path / "table.csv"
    path.write_text(path.read_text().replace("0.53,", "0.5300,"), encoding="utf-8-sig")
    (found,) = Results(tmp_path).rows.values()
    assert found.figures["accuracy"] == 0.53


def test_two_experiments_do_not_share_a_folder(tmp_path):
    Results(tmp_path).add(row("k=0.1", 0.53, 1.25))
    with pytest.raises(
        RecAdamError, match=r"holds another experiment \(a row of arm 'k=0.1'\); give another"
    ):
        run_experiment(EXPERIMENTS["comparison"], Options(), tmp_path, 1)


def test_archives_and_targets():
    assert archives("glue/RTE", "org/model") == ()
    with pytest.raises(RecAdamError, match="unknown target 'reviews'"):
        archives("reviews", "minilm-l3")


# Real runs, on a tiny encoder and the real data.


def figures_of(printed):
    return dict(line.split() for line in printed.splitlines()[1:])


QUICK_METHODS = ("adamw", "recadam", "ewc", "lora", "frozen")


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=() if m in QUICK_METHODS else pytest.mark.heavy) for m in CLASSIFYING],
)
def test_every_method_runs_and_repeats(method, encoders, recadam):
    """The tiny encoder knows nothing; that it moves, or does not, and that it does so again, it can show."""
    from recadam_harness.experiments import run_trial

    rate = {"lr": 1e-2} if METHODS[method].trains else {}
    trial = Trial(method=method, model=encoders["bert"], **rate, **SMALL)
    first, again = run_trial(trial), run_trial(trial)
    assert {k: v for k, v in first.items() if k != "seconds"} == {
        k: v for k, v in again.items() if k != "seconds"
    }
    moved = first["snli_mnr"] != first["snli_mnr_before"]
    assert moved == (first["distance"] > 0) == (method != "frozen")
    assert 0 < first["accuracy"] < 1


def test_the_pull_holds_what_it_should(encoders):
    from recadam_harness.experiments import run_trial

    def distance(**settings):
        return run_trial(Trial(model=encoders["bert"], lr=1e-2, **{**SMALL, "steps": 12}, **settings))[
            "distance"
        ]

    free = distance()
    assert distance(method="l2sp", pull=0.5) < 0.5 * free
    assert distance(method="wiseft", alpha=0.5) == pytest.approx(0.5 * free, rel=1e-4)
    assert distance(method="wiseft", alpha=0.0) == pytest.approx(0.0, abs=1e-6)
    assert distance(method="annealed") < free
    assert distance(method="feature-pull", pull=0.9) < free  # most weights move no feature much
    budget = 0.3 * free
    assert distance(method="budget", budget=budget) < 1.6 * budget
    # With no pull every form is the annealed Adam.
    assert distance(method="recadam", pull=0.0) == distance(method="annealed")


@pytest.mark.needs("torch")
def test_what_is_not_there_is_named():
    from recadam_harness.experiments import run_trial

    with pytest.raises(RecAdamError, match="movie-reviews: rows is 9000; there are"):
        run_trial(Trial(rows=9000, model="nowhere"))
    with pytest.raises(RecAdamError, match="unknown model 'nowhere'"):
        run_trial(Trial(model="nowhere"))


def test_what_cannot_be_trained_is_said(encoders, tmp_path):
    from recadam_harness.experiments import run_trial

    with pytest.raises(RecAdamError, match="max_length is 600; the encoder reads up to 512 tokens"):
        run_trial(Trial(model=encoders["bert"], **{**SMALL, "max_length": 600}))
    folder = tmp_path / "without"
    shutil.copytree(encoders["bert"], folder, ignore=shutil.ignore_patterns("*token*", "*vocab*"))
    with pytest.raises(
        RecAdamError, match="it has no vocabulary of a tokenizer; give a folder of an encoder"
    ):
        run_trial(Trial(model=str(folder), **SMALL))
    with pytest.raises(RecAdamError, match="probe_head: no row of class"):
        run_trial(Trial(target="topics", method="frozen", model=encoders["bert"], **{**SMALL, "rows": 10}))
    with pytest.raises(RecAdamError, match="batch_size is 25; there are 24 rows, give no more"):
        run_trial(Trial(model=encoders["bert"], **{**SMALL, "batch_size": 25}))


def test_init_random_starts_elsewhere_and_is_pulled_home(encoders):
    from recadam_harness.experiments import run_trial

    settings = {**SMALL, "model": encoders["bert"], "lr": 1e-4, "init": "random"}
    start = run_trial(Trial(**{**settings, "steps": 1, "lr": 1e-9}))["distance"]
    assert start > 0.1
    assert run_trial(Trial(**settings))["distance"] == pytest.approx(start, rel=0.1)
    pulled = run_trial(Trial(method="l2sp", pull=0.9, **{**settings, "steps": 30}))["distance"]
    assert pulled < 0.1 * start


@pytest.mark.heavy
def test_a_trial_is_repeated_by_its_command(encoders, recadam, tmp_path):
    """What is in a row of an experiment, to the digits that it has there."""
    arguments = [
        "--model",
        encoders["bert"],
        "--arm",
        "adamw",
        "--arm",
        "l2sp",
        "--quick",
        "--seeds",
        "1",
        "--jobs",
        "1",
    ]
    result = recadam("experiment", "comparison", *arguments, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "out" / "report.html")
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted((r["stage"], r["arm"]) for r in rows) == [
        ("test", "adamw"), ("test", "l2sp"), *[("tune", "adamw")] * 2, *[("tune", "l2sp")] * 2,
    ]  # fmt: skip
    repeated = recadam(*shlex.split(rows[-1]["command"])[1:])
    assert repeated.returncode == 0, repeated.stderr
    found = figures_of(repeated.stdout)
    names = [n for n in found if n != "seconds"]
    assert len(names) > 9
    assert {n: found[n] for n in names} == {n: rows[-1][n] for n in names}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("recadam trial") == 6
    assert "data:image/png" in page
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert re.search(r"\| constant pull \(L2-SP\) \| lr=0.0004 pull=0.\d+ \| 0\.\d{3} \(", summary)


def started(name, folder, encoders, *arguments):
    """An experiment, begun in a process of its own."""
    command = [sys.executable, "-m", "recadam_core", "experiment", name, "--model", encoders["bert"]]
    command += ["--out", str(folder), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def rows_of(folder):
    path = folder / "table.csv"
    if not path.exists():
        return {}
    with path.open() as file:
        return {
            (r["stage"], r["arm"], r["command"]): {**r, "seconds": "", "sha256": ""}
            for r in csv.DictReader(file)
        }


def wait_for(folder, count):
    deadline = time.time() + 240
    while len(rows_of(folder)) < count:
        assert time.time() < deadline
        time.sleep(0.05)


@pytest.mark.heavy
def test_killed_experiments_go_on_where_they_were(encoders, tmp_path):
    small = ["--quick", "--seeds", "1", "--arm", "adamw", "--arm", "wiseft"]
    folder, alone = tmp_path / "killed", tmp_path / "alone"
    for count in (1, 3):
        process = started("comparison", folder, encoders, *small)
        wait_for(folder, count)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert count <= len(rows_of(folder)) < 6
    before = rows_of(folder)
    for place in (folder, alone):
        process = started("comparison", place, encoders, *small)
        errors = process.communicate(timeout=400)[1]
        assert process.returncode == 0, errors
        assert "Warning" not in errors
    assert rows_of(folder) == rows_of(alone)
    assert before.items() <= rows_of(folder).items()
    assert len(rows_of(folder)) == 6
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.heavy
def test_an_interrupt_says_how_to_go_on(encoders, tmp_path):
    process = started("forgetting", tmp_path, encoders)
    wait_for(tmp_path, 1)
    second = started("forgetting", tmp_path, encoders)
    errors = second.communicate(timeout=120)[1]
    assert f"{tmp_path}: another process writes there; let it end, or give another directory" in errors
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    last = errors.strip().splitlines()[-1]
    assert last == f"recadam: interrupted; {tmp_path} has what is done; run it again, and it goes on"
    assert "Traceback" not in errors


def test_a_trial_that_diverges_is_a_row_of_its_own(encoders, recadam, tmp_path):
    """Settings that cannot be trained with must not take the others down."""
    entry = Entry("test", "recadam", Trial(method="l2sp", pull=5.0, model=encoders["bert"], **SMALL))
    found = _row(entry)
    assert found.figures == {}
    assert "diverges (2 or more)" in found.error
    last = Trial(lr=1e30, model=encoders["bert"], **{**SMALL, "steps": 1})
    assert "no finite weights after step 1; lower lr" in _row(Entry("test", "adamw", last)).error
    results = Results(tmp_path)
    results.add(found)
    with pytest.raises(RecAdamError, match=r"failed, as all of recadam did: .*diverges \(2 or more\)"):
        results.some([entry])
    results.add(row("adamw", 0.5, 1.25, 0, "test"))
    tuned = [
        row("adamw", accuracy / 10, 1.0, split="validation", **settings)
        for accuracy, settings in enumerate(ARMS["adamw"].trials)
    ]
    for each in (dataclasses.replace(tuned[0], figures={}, error="step 3 is lost"), *tuned[1:]):
        results.add(each)
    chosen = EXPERIMENTS["comparison"].stages[1](Options(seeds=(0,), arms=("adamw",)), results)
    assert [entry.trial for entry in chosen] == [Trial(lr=8e-4)]
    results.add(row("adamw", 0.5, 1.25, 0, "test", lr=8e-4))
    page = write_experiment("comparison", results, Options(seeds=(0,), arms=("adamw",))).read_text()
    assert "failed: step 3 is lost" in page
    assert found.error not in page  # of no trial of this grid


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["initialization", "forgetting", "sensitivity"])
def test_the_other_experiments_have_pages(name, encoders, recadam, tmp_path):
    arms = {
        "initialization": ["AdamW, pretrained", "RecAdam, random"],
        "forgetting": ["AdamW", "k=0.1", "t0=25"],
        "sensitivity": ["pull=0.2", "pull=0.5", "center=0", "center=0.25"],
    }[name]
    arguments = [x for arm in arms for x in ("--arm", arm)]
    result = recadam("experiment", name, "--quick", "--seeds", "2", "--model", encoders["bert"], *arguments,
                     "--out", tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["arm"] for r in rows} == set(arms)
    assert len(rows) == 2 * len(arms)
    assert (tmp_path / "summary.md").read_text().count("\n| ") == len(arms) + 1
    pictures = [p for p in tmp_path.iterdir() if p.suffix == ".png"]
    assert len(pictures) == (name != "initialization")
    if name == "forgetting":
        with (tmp_path / "curves.csv").open() as file:
            assert {float(line["step"]) for line in csv.DictReader(file)} == {0, 10, 20, 30}


def test_the_same_trial_in_several_places_is_run_once(tmp_path):
    """Sensitivity's middle stands in four columns of its picture."""
    entries = EXPERIMENTS["sensitivity"].stages[0](Options(seeds=(0,)), Results(tmp_path))
    middle = Trial(method="recadam", lr=2e-4, pull=0.2, center=0.25)
    same = [entry for entry in entries if entry.trial == middle]
    assert [e.arm for e in same] == ["pull=0.2", "lr=0.0002, lr·γ=0.2", "lr=0.0002, γ=1000", "center=0.25"]

    submitted = []

    def each(function, entries):
        submitted.extend(entries)
        return ((entry, row("pull=0.2", 0.5, 1.0)) for entry in entries)

    found = list(_each(each, same, Results(tmp_path)))
    assert [r.entry for r in found] == same
    assert submitted == same[:1]
    results = Results(tmp_path)
    results.add(found[0])
    again = list(_each(lambda function, entries: iter(()), same[1:], results))
    assert [r.entry for r in again] == same[1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment", "compare"], "recadam: unknown experiment 'compare': did you mean 'comparison'?"),
        (["experiment", "forgetting", "--arm", "k=3"], "recadam: unknown arm 'k=3': did you mean 'k="),
        (["experiment", "comparison", "--arm", "adam"], "recadam: unknown arm 'adam': did you mean 'adamw'?"),
        (
            ["experiment", "glue", "--target", "RTE"],
            "recadam: glue/RTE: no data; give --data FOLDER with RTE/train.tsv",
        ),
        (["experiment", "glue", "--target", "rte", "--data", "x"], "recadam: unknown GLUE task 'rte'"),
        (
            ["experiment", "glue", "--target", "RTE", "--data", "/nowhere"],
            "recadam: /nowhere/RTE/train.tsv: not there;",
        ),
        (
            ["experiment", "glue", "--preset", "bert"],
            "recadam: unknown preset 'bert': did you mean 'bert-base'?",
        ),
        (["experiment", "comparison", "--target", "news"], "recadam: unknown target 'news'"),
        (
            ["experiment", "comparison", "--preset", "bert-base"],
            "recadam: experiment 'comparison' reads no --data and no --preset; they are for 'glue'",
        ),
        (["experiment", "comparison", "--model", "minilm-l9"], "recadam: unknown model 'minilm-l9': did you"),
    ],
)
def test_bad_input_is_one_line(recadam, tmp_path, arguments, message):
    result = recadam(*arguments, *(["--out", tmp_path / "x"] if arguments[0] == "experiment" else []))
    assert result.returncode == 2
    assert result.stderr.startswith(message), result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "x" / "table.csv").exists()
