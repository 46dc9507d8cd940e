"""GLUE: files in the official layout, metrics against known values, and the grid on tiny BERT and ALBERT."""

from __future__ import annotations

import csv
import dataclasses
import random
import shutil

import numpy as np
import pytest

from recadam_core import RecAdamError, Sigmoid
from recadam_harness.experiments import Trial, glue, run_trial
from recadam_harness.experiments.data import target_of
from recadam_harness.experiments.grids import EXPERIMENTS, Options
from recadam_harness.experiments.report import write_experiment
from recadam_harness.experiments.run import _row
from recadam_harness.experiments.table import Results

pytest.importorskip("torch")

from recadam_harness.experiments.classifiers import Classifier

# Header and columns of each task's files; CoLA's have no header. `{a}`, `{b}` are texts, `{y}` the label.
OFFICIAL = {
    "CoLA": (None, "src\t{y}\t*\t{a}"),
    "SST-2": ("sentence\tlabel", "{a}\t{y}"),
    "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{y}\t1\t2\t{a}\t{b}"),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tg\tf\t2012\t0\tx\ty\t{a}\t{b}\t{y}",
    ),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\t{a}\t{b}\t{y}"),
    "MNLI": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t2\tg\tp\tp\tp\tp\t{a}\t{b}\tneutral\t{y}",
    ),
    "QNLI": ("index\tquestion\tsentence\tlabel", "0\t{a}\t{b}\t{y}"),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{y}"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The eight tasks, forty rows each; an unpaired quotation mark in every text, as the real files have."""
    rng = random.Random(0)
    where = tmp_path_factory.mktemp("glue")
    for name, (header, line) in OFFICIAL.items():
        (where / name).mkdir()
        labels = glue.TASKS[name].labels
        for part, count in (("train", 40), (glue.TASKS[name].dev, 12)):
            lines = [header] if header else []
            for i in range(count):
                label = labels[i % len(labels)] if labels else f"{rng.uniform(0, 5):.3f}"
                word = "good" if i % max(1, len(labels)) == 0 else "not"
                lines.append(line.format(a=f'the "{word} man', b=f"a man is {word}", y=label))
            lines += (
                ["133273\t213221\t213222\tis this cut off"] if name == "QQP" else []
            )  # as in the real one
            text = "\n".join(lines) + "\n"
            (where / name / f"{part}.tsv").write_text(("\ufeff" if name == "MRPC" else "") + text, "utf-8")
    return str(where)


@pytest.mark.parametrize("name", sorted(glue.TASKS))
def test_official_files(folder, name):
    splits = target_of(f"glue/{name}", folder)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (36, 4, 12)
    task = glue.TASKS[name]
    assert splits.classes == (len(task.labels) or 1)
    assert splits.test.first[0] == 'the "good man'
    assert (splits.test.second is None) == (name in ("CoLA", "SST-2"))
    if splits.test.second:
        assert splits.test.second[0] == "a man is good"
    if task.labels:
        assert splits.test.labels.tolist() == [i % len(task.labels) for i in range(12)]
    else:
        assert ((splits.test.labels >= 0) & (splits.test.labels <= 5)).all()


def test_the_hubs_data_set():
    """Rows as `datasets` gives them: class numbers, named columns."""
    rows = [{"question": "is the man good", "sentence": "the man is good", "label": 0, "idx": 0}] * 3
    task = glue.TASKS["QNLI"]
    texts = glue._texts("QNLI", "hub", ((r[task.hub[1]], r[task.hub[2]], r["label"]) for r in rows))
    assert (texts.first[0], texts.second[0], texts.labels.tolist()) == (
        "is the man good", "the man is good", [0, 0, 0],
    )  # fmt: skip


def test_metrics():
    """Matthews by hand for a table of 3, 1, 2, 4: (12 - 2) / sqrt(5 * 4 * 6 * 5); F1 is 6 / 9."""
    labels = np.array([1] * 5 + [0] * 5)
    said = np.array([1] * 3 + [0] * 2 + [1] * 1 + [0] * 4)
    scores = np.eye(2)[said]
    assert glue.TASKS["CoLA"].metrics(scores, labels)["matthews"] == pytest.approx(
        10 / np.sqrt(5 * 4 * 6 * 5)
    )
    assert glue.TASKS["MRPC"].metrics(scores, labels) == {"accuracy": 0.7, "f1": pytest.approx(6 / 9)}
    assert glue.TASKS["RTE"].metrics(scores, labels) == {"accuracy": 0.7}
    x = np.arange(5.0)
    found = glue.TASKS["STS-B"].metrics(x[:, None] ** 3, x)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(np.corrcoef(x**3, x)[0, 1])
    assert glue.TASKS["STS-B"].metrics(np.ones((5, 1)), x) == {"pearson": 0.0, "spearman": 0.0}


def test_the_papers_settings():
    options = Options(targets=("glue/RTE", "glue/CoLA"), models=(), data="hub", preset="bert-base")
    entries = EXPERIMENTS["glue"].stages[0](options, None)
    assert len(entries) == 2 * 5 * 3
    trial = entries[0].trial
    assert (trial.model, trial.steps, trial.batch_size, trial.lr) == (
        "google-bert/bert-base-uncased",
        7800,
        32,
        2e-5,
    )
    assert trial.hp.gamma == pytest.approx(5000)
    assert trial.hp.annealing == Sigmoid(k=0.05, t0=250.0)
    assert (trial.dropout, trial.rows) == (None, 0)
    options = Options(targets=("glue/CoLA",), models=(), data="hub", preset="albert-xxlarge")
    trial = EXPERIMENTS["glue"].stages[0](options, None)[-1].trial
    assert (trial.steps, trial.batch_size, trial.lr, trial.warmup_steps) == (5336, 16, 1e-5, 320)
    assert (trial.k, trial.t0, trial.dropout) == (1.0, 500.0, 0.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0\tthe man\tmaybe", r"line 2 has 3 columns; fetch the file again"),
        ("0\tthe man\ta man\tmaybe", r"the label of row 1 is 'maybe', not entailment or not_entailment"),
        (None, "no rows; fetch it again"),
        ("", r"train.tsv: empty; give the official files"),
        (
            "0\tthe man\ta man\tentailment",
            "glue/RTE: one training row, and some are kept out; fetch the file",
        ),
        ("0\tthe caf\xe9\ta man\tentailment", r"damaged after line 0 \('utf-8' codec can't decode"),
    ],
)
def test_damaged_files_are_named(tmp_path, line, message):
    (tmp_path / "RTE").mkdir()
    for part in ("train", "dev"):
        text = OFFICIAL["RTE"][0] + "\n" + (f"{line}\n" if line else "") if line != "" else ""
        (tmp_path / "RTE" / f"{part}.tsv").write_text(text, encoding="latin-1")
    with pytest.raises(RecAdamError, match=message):
        glue.read("RTE", str(tmp_path))


def test_a_score_is_from_0_to_5(tmp_path):
    (tmp_path / "STS-B").mkdir()
    header, line = OFFICIAL["STS-B"]
    for part in ("train", "dev"):
        (tmp_path / "STS-B" / f"{part}.tsv").write_text(f"{header}\n{line.format(a='a', b='b', y='500')}\n")
    with pytest.raises(RecAdamError, match=r"the label of row 1 is 500.0, not a score from 0 to 5"):
        glue.read("STS-B", str(tmp_path))


def test_a_head_of_another_task_is_not_taken(folder, encoders, tmp_path):
    """Whether it has as many classes or not."""
    import torch
    from transformers import AutoModelForSequenceClassification

    shutil.copytree(encoders["bert"], tmp_path, dirs_exist_ok=True)
    model = AutoModelForSequenceClassification.from_pretrained(encoders["bert"], num_labels=2)
    torch.nn.init.constant_(model.classifier.weight, 7.0)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    other = Classifier(str(tmp_path), 2)
    assert other.new == {"body.classifier.weight", "body.classifier.bias"}
    assert 0 < float(other.body.classifier.weight.detach().abs().max()) < 0.2
    assert torch.equal(other.body.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    for name in ("RTE", "STS-B"):
        place = {"target": f"glue/{name}", "data": folder, "model": str(tmp_path), "rows": 0}
        figures = run_trial(Trial(method="recadam", steps=2, batch_size=4, max_length=16, **place))
        assert figures["distance"] > 0


def test_other_columns_are_named(tmp_path):
    (tmp_path / "RTE").mkdir()
    for part in ("train", "dev"):
        (tmp_path / "RTE" / f"{part}.tsv").write_text("a\tb\n")
    with pytest.raises(
        RecAdamError, match="no column 'sentence1' in its first line; give the official files"
    ):
        glue.read("RTE", str(tmp_path))


@pytest.mark.parametrize("kind", ["bert", "albert"])
@pytest.mark.parametrize("name", ["CoLA", "STS-B", "MNLI"])
def test_trials_on_tiny_encoders(folder, encoders, kind, name):
    """Two classes, scores, three classes: RecAdam moves and is pulled, AdamW is not; both repeat."""
    size = {"steps": 20, "batch_size": 8, "rows": 0, "max_length": 16, "dropout": None, "lr": 1e-2}
    place = {"target": f"glue/{name}", "data": folder, "model": encoders[kind]}
    free = run_trial(Trial(**place, **size))
    pulled = run_trial(Trial(method="l2sp", pull=0.9, **place, **size))
    assert pulled["distance"] < 0.5 * free["distance"]
    assert glue.headline(name, free) == glue.headline(name, run_trial(Trial(**place, **size)))
    if name == "CoLA":  # the label is a word
        learned = run_trial(Trial(**place, **{**size, "steps": 100}))
        assert learned["matthews"] == 1.0


def test_the_grid_and_its_page(folder, encoders, tmp_path):
    """The code that runs the paper's grid, on small files: two trials to choose from, two seeds."""
    options = Options(
        (0, 1), (encoders["albert"],), ("glue/RTE", "glue/STS-B"), (), True, folder, "albert-xxlarge"
    )
    results = Results(tmp_path)
    for stage in EXPERIMENTS["glue"].stages:
        for entry in stage(options, results):
            results.add(_row(entry))
    stages = [stage(options, results) for stage in EXPERIMENTS["glue"].stages]
    assert [r.error for r in results.rows.values() if r.error] == []
    assert [len(results.of(stage)) for stage in stages] == [4, 8]
    write_experiment("glue", results, options)
    summary = (tmp_path / "summary.md").read_text()
    lines = [line.split(" | ") for line in summary.splitlines() if line.startswith(("| AdamW", "| RecAdam"))]
    assert [line[-1].strip(" |") for line in lines] == ["71.1", "74.4", "89.8", "90.4"]
    with (tmp_path / "table.csv").open() as file:
        assert {r["pearson"] != "" for r in csv.DictReader(file) if r["target"] == "glue/STS-B"} == {True}


def test_the_grids_arms_and_encoders(folder):
    """Only what is asked for is planned, and nothing is searched for AdamW, which has no k and t0."""
    tuning, test = EXPERIMENTS["glue"].stages
    options = Options((0, 1), ("a/x", "b/y"), ("glue/RTE", "glue/CoLA"), ("AdamW",), data=folder)
    assert tuning(options, Results(None)) == []
    entries = test(options, Results(None))
    assert {(e.arm, e.trial.model, e.trial.target, e.trial.seed) for e in entries} == {
        ("AdamW", model, target, seed)
        for model in options.models
        for target in options.targets
        for seed in (0, 1)
    }
    assert len(entries) == 8
    with pytest.raises(RecAdamError, match="unknown arm 'adamw'"):
        tuning(dataclasses.replace(options, arms=("adamw",)), Results(None))


def test_what_glue_cannot_do_is_said(folder, encoders):
    trial = Trial(target="glue/RTE", data=folder, model=encoders["bert"], method="lora")
    with pytest.raises(RecAdamError, match="glue/RTE: method 'lora'"):
        run_trial(trial)
