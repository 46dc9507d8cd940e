"""Whose a folder is, and which of its files: nobody else's are replaced, and two do not write at once."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("filelock")

from recadam_core import RecAdamError
from recadam_core.files import replacing
from recadam_core.interrupts import deferred
from recadam_harness import RunConfig, finetune, load_run
from recadam_harness.demo import plan_demo, run_demo
from recadam_harness.folders import Folder, owned
from recadam_harness.report import write_report
from recadam_harness.run import _start
from recadam_harness.tasks import get_task

CONFIG = RunConfig.for_task("digits", "numpy", steps=4, snapshot_every=2, t0=2.0)
WORDS = ["finetune", "digits", "--backend", "numpy", "--steps", "4", "--snapshot-every", "2", "--t0", "2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run, which nobody changes."""
    return finetune(CONFIG, tmp_path_factory.mktemp("whole") / "run").path


@pytest.fixture
def run(whole, tmp_path):
    """A run to do with as one likes."""
    return shutil.copytree(whole, tmp_path / "run")


# One owner.


@pytest.mark.parametrize(
    "words",
    [
        [*WORDS, "--overwrite", "--out"],
        [*WORDS, "--resume", "--out"],
        ["demo", "--only", "digits", "--out"],
        ["report", "RUN", "--out"],
        ["seeds", "--count", "1", "--steps", "1", "--backend", "jax", "--out"],
        ["experiment", "comparison", "--quick", "--out"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.needs("torch", "jax", "transformers")
def test_the_second_is_refused_before_it_writes(campaign, recadam, whole, tmp_path, words):
    out = tmp_path / "out"
    if words[0] == "finetune":
        finetune(CONFIG, out)
    with owned(out):
        before = campaign.tree(out)
        result = recadam(*(whole if word == "RUN" else word for word in words), out)
        assert campaign.tree(out) == before
    assert (result.returncode, result.stdout) == (2, "")
    hint = "let it end, or give another directory"
    assert result.stderr.splitlines()[-1] == f"recadam: {out}: another process writes there; {hint}"


def test_a_killed_owner_holds_nothing(tmp_path):
    code = f"from pathlib import Path; from recadam_harness.folders import owned; import time\n\
with owned(Path({str(tmp_path)!r})): print('mine', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(RecAdamError, match="another process writes there"), owned(tmp_path):
            pass
        process.kill()
    with owned(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(RecAdamError, match="there are 400 training rows, give no more"):
        finetune(RunConfig.for_task("digits", "numpy", train_rows=400, batch_size=401), tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


# What is whose.

MINE = (
    "weights/1-my-best.safetensors",
    ".config.json.swp",
    ".lock",
    "notes.txt",
    "weights/000002.safetensors.bak",
)


def test_overwriting_and_resuming_leave_what_no_run_wrote(run):
    for name in MINE:
        (run / name).write_text("mine")
    (run / ".steps.jsonl.abcd1234.recadam-part").write_text("left by a kill")
    finetune(RunConfig.for_task("digits", "numpy", steps=1), run, overwrite=True)
    finetune(RunConfig.for_task("digits", "numpy", steps=1), run, resume=True)
    assert all((run / name).read_text() == "mine" for name in MINE)
    assert not (run / ".steps.jsonl.abcd1234.recadam-part").exists()
    assert load_run(run).snapshots() == [1]


def test_no_link_leads_a_run_into_another_folder(campaign, run, whole, tmp_path):
    shutil.rmtree(run / "weights")
    others = shutil.copytree(whole / "weights", tmp_path / "others")
    (run / "weights").symlink_to(others)
    with pytest.raises(RecAdamError, match="weights: is a link to another folder; remove the link, or give"):
        finetune(CONFIG, run, overwrite=True)
    assert len(list(others.iterdir())) == 2


def test_a_run_that_was_killed_before_its_manifest_was_there_is_none(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".recadam.lock").touch()
    (out / ".manifest.json.abcd1234.recadam-part").write_text("{")
    finetune(CONFIG, out)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_a_users_file_of_the_name_of_what_a_kill_leaves_stays(run):
    (run / ".config.json.mybackup.part").write_text("mine")
    finetune(CONFIG, run, overwrite=True)
    assert (run / ".config.json.mybackup.part").read_text() == "mine"


@pytest.mark.parametrize("name", ["predictions.npy", "checkpoint.safetensors", "weights/000004.safetensors"])
def test_a_users_file_beside_an_unfinished_run_is_not_taken_for_the_runs(campaign, tmp_path, name):
    out = tmp_path / "run"
    campaign.cut_short(CONFIG, out, 3)
    (out / name).unlink(missing_ok=True)
    Folder(out, "run").remove([name])
    (out / name).write_text("mine")
    for way in ("--resume", "--overwrite"):
        code, _, errors = campaign.call([*WORDS, way, "--out", str(out)])
        told = "is there, and no run wrote it; move it, or give another directory"
        assert (code, errors) == (2, f"recadam: {out}/{name}: {told}\n")
    assert (out / name).read_text() == "mine"


@pytest.mark.parametrize("content", ["mine", None])
def test_a_users_file_of_the_locks_name_stays(campaign, tmp_path, content):
    lock = tmp_path / "run" / ".recadam.lock"
    lock.parent.mkdir()
    if content is None:
        lock.symlink_to(tmp_path / "else")
    else:
        lock.write_text(content)
    before = campaign.tree(tmp_path)
    code, _, errors = campaign.call([*WORDS, "--out", str(lock.parent)])
    assert (code, errors) == (
        2, f"recadam: {lock}: is there, and is no lock; move it, or give another directory\n"
    )  # fmt: skip
    assert campaign.tree(tmp_path) == before


def lists(out, *names):
    out.mkdir()
    Folder(out, "demo").begin(names)


def test_a_demo_replaces_no_run_that_is_not_its_own(campaign, tmp_path):
    out = tmp_path / "demo"
    lists(out, "digits-numpy-recadam/manifest.json")
    finetune(CONFIG, out / "digits-numpy-recadam")
    before = campaign.tree(out)
    code, _, errors = campaign.call(["demo", "--only", "digits", "--out", str(out)])
    ours = out / "digits-numpy-recadam"
    assert (code, errors) == (
        2, f"recadam: {ours}: is no run of a demo; move it, or give another directory\n"
    )  # fmt: skip
    ours.rename(tmp_path / "mine")
    ours.symlink_to(tmp_path / "mine")
    code, _, errors = campaign.call(["demo", "--only", "digits", "--out", str(out)])
    assert (code, errors.count("is a link to another folder; remove the link")) == (2, 1)
    ours.unlink()
    (tmp_path / "mine").rename(ours)
    assert campaign.tree(out) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("logs", "logs: is a file where a folder belongs; move it"),
        ("digits-numpy-adamw", "digits-numpy-adamw: is a file where a folder belongs; move it"),
        (
            "digits-numpy-adamw/notes.txt",
            "digits-numpy-adamw: holds something that is no run; move it, or give another directory",
        ),
    ],
)
def test_a_refused_demo_leaves_nothing(campaign, tmp_path, name, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = campaign.tree(tmp_path)
    code, _, errors = campaign.call(["demo", "--only", "digits", "--out", str(tmp_path)])
    assert (code, errors) == (2, f"recadam: {tmp_path}/{message}\n")
    assert campaign.tree(tmp_path) == before


def test_a_demo_takes_no_run_that_came_meanwhile_for_its_own(campaign, tmp_path, monkeypatch):
    monkeypatch.setattr("recadam_harness.demo.PLAN", {"digits": ("numpy",)})
    words = ["demo", "--only", "digits", "--jobs", "1", "--out", str(tmp_path / "demo")]
    last = tmp_path / "demo" / "digits-numpy-annealed"
    other = RunConfig.for_task("digits", "numpy", "annealed", steps=4, seed=7, t0=2.0)

    def meanwhile(done, text):
        if done == 1:
            finetune(other, last)

    with pytest.raises(RecAdamError, match=rf"^{last}: holds a run already; give --overwrite"):
        run_demo(plan_demo(), tmp_path / "demo", 1, meanwhile)
    assert load_run(last).config == other
    code, _, errors = campaign.call(words)
    assert (code, errors) == (
        2,
        f"recadam: {last}: is no run of a demo; move it, or give another directory\n",
    )
    shutil.rmtree(last)

    def afterwards(done, text):
        if done == 2:
            finetune(other, tmp_path / "demo" / "digits-numpy-recadam", overwrite=True)

    with pytest.raises(RecAdamError, match="digits-numpy-recadam: is another run by now; move it, and run"):
        run_demo(plan_demo(), tmp_path / "demo", 1, afterwards)


def test_a_run_is_read_while_it_is_written(tmp_path):
    """The manifest may be older than a file: then both are read again."""
    every = RunConfig.for_task("digits", "numpy", steps=400, eval_every=1, t0=2.0)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        alive = pool.submit(finetune, every, tmp_path / "run")
        while not (tmp_path / "run" / "steps.jsonl").exists():
            time.sleep(0.01)
        read = 0
        while not alive.done():
            read += 1
            load_run(tmp_path / "run", strict=False)
    assert read > 20
    assert len(alive.result().evaluations) == 401


def test_equal_runs_have_equal_weights_in_every_byte(whole, tmp_path):
    again = finetune(CONFIG, tmp_path / "again")
    name = "weights/000004.safetensors"
    assert (again.path / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.needs("torch", "jax")
def test_a_demo_writes_its_logs_anew_and_follows_no_link(campaign, recadam, tmp_path, monkeypatch):
    monkeypatch.setattr("recadam_harness.demo.PLAN", {"digits": ("numpy",)})
    out, words = tmp_path / "demo", ["demo", "--only", "digits", "--out", str(tmp_path / "demo")]
    assert campaign.call(words)[0] == 0
    log = out / "logs" / "digits-numpy-recadam.log"
    text = log.read_text()
    (tmp_path / "mine.txt").write_text(text)
    log.unlink()
    log.symlink_to(tmp_path / "mine.txt")
    assert campaign.call(words)[0] == 0
    assert not log.is_symlink()
    assert (tmp_path / "mine.txt").read_text() == text
    log.write_text("my notes")
    code, _, errors = campaign.call(words)
    assert (code, errors) == (
        2, f"recadam: {log}: was changed after the demo had written it; move it\n"
    )  # fmt: skip
    assert log.read_text() == "my notes"


def test_of_what_failed_before_anything_was_written_no_manifest_stays(whole, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recadam_harness.report.task_figure", full)
    with pytest.raises(OSError, match="No space left"):
        write_report([load_run(whole)], tmp_path / "report")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["predictions.npy", "weights/000003.safetensors"])
def test_a_users_file_where_a_run_would_write_is_said_first(campaign, run, name):
    folder = Folder(run, "run")
    folder.remove([name])
    (run / name).write_text("mine")
    before = campaign.tree(run)
    with pytest.raises(
        RecAdamError, match=f"{name}: is there, and no run wrote it; move it, or give another"
    ):
        finetune(RunConfig.for_task("digits", "numpy", steps=3), run, overwrite=True)
    assert campaign.tree(run) == before


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["report", "RUN", "--out", "OUT"], "report.html"),
        (["report", "RUN", "--out", "OUT"], "digits.png"),
        (["seeds", "--count", "1", "--steps", "1", "--optimizer", "adamw", "--out", "OUT"], "seeds.png"),
        (["schedule", "--plot", "OUT/curve.png"], "curve.png"),
        (["demo", "--only", "digits", "--out", "OUT"], "digits.png"),
        (["demo", "--only", "digits", "--out", "OUT"], "logs/digits-numpy-recadam.log"),
        (["experiment", "comparison", "--quick", "--out", "OUT"], "report.html"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else x,
)
@pytest.mark.needs("torch", "jax", "transformers")
def test_a_file_that_is_there_is_not_replaced(recadam, whole, tmp_path, words, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    words = [word.replace("RUN", str(whole)).replace("OUT", str(tmp_path / "out")) for word in words]
    result = recadam(*words)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"out/{name}: is there" in result.stderr
    assert [x.read_text() for x in tmp_path.rglob("*") if x.is_file()] == ["mine"]


def test_what_a_command_wrote_it_replaces_when_asked(campaign, whole, tmp_path):
    hint = "is there already; give --overwrite or another"
    report = ["report", str(whole), "--out", str(tmp_path / "report")]
    plot = ["schedule", "--plot", str(tmp_path / "curve.svg")]
    for words, refused in ((report, f"report.html: {hint} directory\n"), (plot, f"curve.svg: {hint} name\n")):
        assert campaign.call(words)[0] == 0
        code, _, errors = campaign.call(words)
        assert (code, errors.endswith(refused)) == (2, True)
        assert campaign.call([*words, "--overwrite"])[0] == 0


def test_a_folder_holds_one_kind(whole, run):
    with pytest.raises(RecAdamError, match="holds a run, not a report; give another directory"):
        Folder(run, "report")
    (run / "manifest.json").write_text('{"name": "my web page"}')
    with pytest.raises(
        RecAdamError, match=r"manifest.json: damaged \(no manifest of a run\); move what is yours"
    ):
        finetune(CONFIG, run, overwrite=True)


@pytest.mark.parametrize(
    "name",
    [
        "../notes.txt",
        "/etc/hostname",
        "weights/../../notes.txt",
        "manifest.json",
        ".",
        "a\0b",
        "\ud800",
        "x" * 300,
    ],
)
def test_a_manifest_lists_nothing_outside(run, name):
    values = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**values, "files": {name: None}}))
    with pytest.raises(RecAdamError, match=r"manifest.json: damaged \(entry"):
        finetune(CONFIG, run, overwrite=True)


def test_a_run_is_of_its_model_and_of_every_row():
    problem = get_task("digits").prepare(0)
    flipped = {name: x.copy() for name, x in problem.test.items()}
    flipped["x"][7, 3] += 1
    others = [
        dataclasses.replace(problem, model=dataclasses.replace(problem.model, classes=3)),
        dataclasses.replace(problem, params={**problem.params, "head.bias": np.ones(2)}),
        dataclasses.replace(problem, train={name: x[::-1] for name, x in problem.train.items()}),
        dataclasses.replace(problem, test=flipped),
        dataclasses.replace(problem, source=()),
    ]
    assert len({_start(each, "float32") for each in (problem, *others)}) == 6
    assert _start(get_task("digits").prepare(0), "float32") == _start(problem, "float32")


@pytest.mark.parametrize("way", ["link", "dangling", "file"])
def test_weights_that_lead_elsewhere_are_found_before_anything_is_removed(campaign, tmp_path, way):
    out = tmp_path / "run"
    campaign.cut_short(dataclasses.replace(CONFIG, snapshot_every=0), out, 2)
    (tmp_path / "else").mkdir()
    if way == "file":
        (out / "weights").write_text("mine")
    else:
        (out / "weights").symlink_to(tmp_path / ("else" if way == "link" else "nowhere"))
    before = campaign.tree(tmp_path)
    for more in ("--overwrite", "--resume"):
        code, _, errors = campaign.call([*WORDS, "--snapshot-every", "0", more, "--out", str(out)])
        assert (code, errors.count("\n"), f"{out}/weights: is a" in errors) == (2, 1, True), errors
        assert campaign.tree(tmp_path) == before


@pytest.mark.parametrize(
    "says", ['{"state": "interrupted"}', '{"state": "failed"}', '{"state": "running", "pid": 1}', None]
)
def test_a_run_that_wrote_everything_is_complete_whatever_its_status_says(campaign, run, whole, says):
    (run / "status.json").unlink()
    if says:
        (run / "status.json").write_text(says)
    before = campaign.tree(run)
    assert load_run(run).status["state"] == "complete"
    code, _, errors = campaign.call([*WORDS, "--resume", "--out", str(run)])
    assert (code, errors) == (0, "")
    after = campaign.tree(run)
    assert {name for name in before if before[name] != after[name]} <= {"manifest.json"}


@pytest.mark.parametrize(
    "name", ["config.json", "steps.jsonl", "manifest.json", "weights/000002.safetensors"]
)
def test_a_pipe_in_the_place_of_a_file_is_not_read_for_ever(campaign, run, whole, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    for words in (["compare", str(whole), str(run)], [*WORDS, "--resume", "--out", str(run)]):
        told = f"recadam: {run}/{name}: is no regular file; move it\n"
        assert campaign.call(words) == (2, "", told)


@pytest.mark.parametrize("name", ["weights/000002.safetensors", "predictions.npy"])
@pytest.mark.parametrize("way", ["gone", "altered"])
def test_a_complete_run_is_whole_wherever_it_is_read(campaign, run, whole, name, way):
    if way == "gone":
        (run / name).unlink()
    else:
        (run / name).write_bytes((run / name).read_bytes()[:-1] + b"!")
    for words in ([*WORDS, "--resume", "--out", str(run)], ["compare", str(whole), str(run)]):
        code, said, errors = campaign.call(words)
        assert (code, said, errors.count("\n")) == (2, "", 1)
        assert errors.startswith(f"recadam: {run}/{name}: damaged (")


# What is in a file.


def changed(name, change):
    """A change to a JSON file of a run, which its manifest is told of: the value itself has to be refused."""

    def damage(run):
        value = json.loads((run / name).read_text())
        change(value)
        (run / name).write_text(json.dumps(value))
        if name != "manifest.json" and (folder := Folder(run, "run")).files[name] is not None:
            folder.seal(name)

    return damage


def raw(name, data, seal=True):
    def damage(run):
        (run / name).write_bytes(data)
        if seal and name not in ("manifest.json", "status.json"):
            Folder(run, "run").seal(name)

    return damage


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


DAMAGES = [
    (raw("predictions.npy", b""), "predictions.npy: damaged (EOFError: No data left in file)"),
    (raw("predictions.npy", b"", seal=False), "predictions.npy: damaged ("),
    (raw("predictions.npy", npy(np.zeros(3))), "predictions.npy: damaged (float64 (3,), of 497 rows)"),
    (
        raw("predictions.npy", npy(np.zeros((201, 2), complex))),
        "predictions.npy: damaged (complex128 (201, 2)",
    ),
    (raw("evaluations.json", b"[" * 100_000), "evaluations.json: damaged (nested too deeply)"),
    (raw("config.json", b"[" * 100_000), "config.json: damaged (nested too deeply)"),
    (raw("manifest.json", b"[" * 100_000), "manifest.json: damaged (nested too deeply)"),
    (raw("status.json", b"1" * 5000), "status.json: damaged ("),
    (raw("config.json", b"\xff\xfe"), "config.json: damaged ("),
    (changed("config.json", lambda c: c.update(steps=10**400)), "config.json: damaged (steps is 1000"),
    (
        changed("config.json", lambda c: c["hp"].update(lr=10**400)),
        "config.json: damaged (Hyperparameters: lr is",
    ),
    (changed("config.json", lambda c: c.update(schedule=[])), "config.json: damaged ("),
    (
        changed("config.json", lambda c: c.update(options={"train_rows": "x"})),
        "config.json: damaged (train_rows",
    ),
    (changed("config.json", lambda c: c.update(task="a\nb")), "config.json: damaged (unknown task"),
    (
        changed("config.json", lambda c: c["hp"].pop("lr")),
        "manifest.json: damaged (of another configuration, model",
    ),
    (
        changed("config.json", lambda c: c.update(seed=5)),
        "manifest.json: damaged (of another configuration, model",
    ),
    (changed("status.json", lambda s: s.update(step=10**400)), "status.json: damaged (step is 1000"),
    (changed("status.json", lambda s: s.update(pid=-1)), "status.json: damaged (pid is -1)"),
    (changed("status.json", lambda s: s.update(state="done")), "status.json: damaged (state is 'done')"),
    (
        changed("evaluations.json", lambda e: e[0].update(step="0")),
        "evaluations.json: damaged (no evaluation, or",
    ),
    (
        changed("evaluations.json", lambda e: e[1].update(step=0)),
        "evaluations.json: damaged (no evaluation, or",
    ),
    (
        changed("evaluations.json", lambda e: e[0].update(target_accuracy="0.5")),
        "evaluations.json: damaged ('targ",
    ),
    (
        changed("evaluations.json", lambda e: e[0].update(target_accuracy=10**400)),
        "evaluations.json: damaged ('t",
    ),
    (
        changed("evaluations.json", lambda e: e[0].update(target_accuracy=None)),
        "evaluations.json: damaged ('targ",
    ),
    (
        changed("evaluations.json", lambda e: e[0].pop("source_accuracy")),
        "evaluations.json: damaged (the run is",
    ),
    (
        raw("evaluations.json", b'[{"step": 0, "target_accuracy": NaN}]'),
        "evaluations.json: damaged ('target_accu",
    ),
    (
        changed("provenance.json", lambda p: p.update(headline=["x"])),
        "provenance.json: damaged (headline is ['x",
    ),
    (
        changed("provenance.json", lambda p: p.update(start_sha256=7)),
        "provenance.json: damaged (start_sha256 is",
    ),
    (changed("provenance.json", lambda p: p.update(resumed=7)), "provenance.json: damaged (resumed is 7)"),
    (
        changed("manifest.json", lambda m: m["files"].update({"predictions.npy": None})),
        "manifest.json: damaged (t",
    ),
    (changed("manifest.json", lambda m: m.pop("identity")), "manifest.json: damaged (no manifest of a run)"),
    (lambda run: (run / "manifest.json").unlink(), "manifest.json: damaged (is not there)"),
    (lambda run: (run / "evaluations.json").unlink(), "evaluations.json: damaged (is not there)"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message[:60] for _, message in DAMAGES])
def test_a_damaged_file_is_one_line(campaign, run, whole, tmp_path, damage, message):
    damage(run)
    before = campaign.tree(run)
    for command in (["compare", str(whole), str(run)], ["report", str(run), "--out", str(tmp_path / "page")]):
        code, said, errors = campaign.call(command)
        assert (code, said) == (2, ""), errors
        assert errors.startswith(f"recadam: {run}/{message}"), errors
        assert errors.count("\n") == 1
    assert campaign.tree(run) == before
    assert not (tmp_path / "page").exists()


def test_files_of_another_run_do_not_belong(run, tmp_path):
    other = finetune(
        RunConfig.for_task("digits", "numpy", steps=4, snapshot_every=2, t0=2.0, seed=1), tmp_path / "other"
    )
    for name in ("evaluations.json", "predictions.npy", "weights/000002.safetensors", "steps.jsonl"):
        kept = (run / name).read_bytes()
        shutil.copy(other.path / name, run / name)
        with pytest.raises(
            RecAdamError, match=f"{name}: damaged .not what the run wrote: its sha256 is not the man"
        ):
            load_run(run).check_files()
        (run / name).write_bytes(kept)
    shutil.copy(other.path / "manifest.json", run)
    with pytest.raises(
        RecAdamError, match=r"config.json: damaged \(not what the run wrote: its sha256 is not the"
    ):
        load_run(run)


# Names, and what they are printed on.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "a\nb", "c"], r"recadam: a\nb: no run here; give a directory that"),
        (["finetune", "dig\nits"], r"recadam: unknown task 'dig\nits'"),
        (["finetune", "digits", "--out", "a\x1bb/c\nd", "--steps", "0"], "recadam: steps is 0"),
        (["schedule", "--plot", "a\nb"], r"recadam: a\nb: unknown kind of picture"),
        (
            ["finetune", "digits", "--backend", "numpy", "--steps", "1", "--out", os.fsdecode(b"a\xff")],
            r"recadam: a\udcff: is no valid text; give a name in UTF-8",
        ),
        (["finetune", "digits", "--backend", "numpy", "--steps", "9" * 20], "recadam: "),
        (
            ["finetune", "digits", "--backend", "numpy", "--batch-size", "100000000"],
            "recadam: batch_size is 100000000; there are 100 training rows, give no more",
        ),
        (["finetune", "digits", "--backend", "numpy", "--seed", "9" * 400], "recadam: "),
        (
            ["seeds", "--count", "1024", "--steps", "100000000"],
            "recadam: 100,000,000 steps of 1024 seeds at once: needs ab",
        ),
        (
            ["trial", "steps=100000000", "batch_size=1000"],
            "recadam: trial: 100,000,000 steps with batch_size 1,000: needs",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.needs("jax", "torch", "transformers")
def test_odd_names_and_sizes_are_one_line(recadam, tmp_path, words, message):
    result = subprocess.run(
        [sys.executable, "-m", "recadam_core", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(message), result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_nobody_is_said(recadam, tmp_path):
    result = recadam("fetch", "snli", env={"RECADAM_CACHE": "~no-such-user/x"})
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("recadam: RECADAM_CACHE is '~no-such-user/x': ")


def test_a_picture_replaces_no_link_that_leads_nowhere(campaign, tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere")
    code, _, errors = campaign.call(["schedule", "--plot", str(tmp_path / "a.png")])
    assert (code, errors.endswith("a.png: is there already; give --overwrite or another name\n")) == (2, True)
    assert (tmp_path / "a.png").is_symlink()


def test_signs_that_the_terminal_lacks_are_escaped(recadam, run):
    odd = run.rename(run.with_name("r\u00fcn"))
    result = recadam(
        "report", odd, "--out", odd / "page", "--title", "\u03bb", env={"PYTHONIOENCODING": "ascii"}
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{odd}/page/report.html\n".encode("ascii", "backslashreplace").decode()
    printed = recadam("compare", odd, odd.parent / "nowhere", env={"PYTHONIOENCODING": "ascii"})
    assert (printed.returncode, printed.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_stream_that_is_closed_or_full_changes_no_exit_code(tmp_path, closed):
    commands = ["schedule --steps 0", "schedule --steps 1"]
    if ">&- 2" in closed or "full" in closed:
        commands.append(f"{' '.join(WORDS)} --out {tmp_path / 'run'}")
    ends = [
        subprocess.run(
            f"{sys.executable} -m recadam_core {words} {closed}",
            shell=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        for words in commands
    ]
    assert [end.returncode for end in ends] == [2, 0, 0][: len(ends)]
    assert len(ends) == 2 or load_run(tmp_path / "run").status["state"] == "complete"


def test_what_cannot_be_printed_is_said():
    command = [sys.executable, "-m", "recadam_core", "schedule"]
    with open("/dev/full", "w") as full:
        end = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    hint = "standard output: No space left on device; give a path that can be written and read"
    assert (end.returncode, end.stderr) == (2, f"recadam: {hint}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["schedule", "--overwrite"], "schedule: --overwrite is of --plot, which is not given; leave it out"),
        (
            ["compare", "a", "b", "c", "--bisect"],
            "compare: --bisect is for two runs, and 3 are given; leave it out",
        ),
    ],
    ids=["schedule", "compare"],
)
def test_an_option_that_would_be_ignored_is_refused(campaign, words, message):
    assert campaign.call(words) == (2, "", f"recadam: {message}\n")


def test_numbers_that_are_none_end_a_run_in_one_line(recadam, tmp_path):
    result = recadam(*WORDS, "--lr", "1e300", "--gamma", "0", "--out", tmp_path / "run")
    told = f"recadam: {tmp_path}/run: the distance is inf at step 1; lower lr, or raise eps\n"
    assert (result.returncode, result.stderr) == (2, told)


# A full disk.


def test_a_full_disk_names_the_file_and_leaves_nothing_beside(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/a\.txt'"),
        replacing(tmp_path / "new" / "a.txt"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


# Signals.


def test_signals_wait_for_a_check_and_no_longer():
    taken = []

    def steps():
        with deferred() as check:
            for step in range(3):
                check()
                signal.raise_signal(signal.SIGINT)
                taken.append(step)

    with pytest.raises(KeyboardInterrupt):
        steps()
    assert taken == [0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), deferred():
        signal.raise_signal(signal.SIGINT)  # and is not forgotten at the end


@pytest.mark.parametrize("error", ["ImportError('x')", "RecAdamError('x')", "SystemError"])
def test_what_a_library_makes_of_a_signal_is_still_an_interrupt(error):
    script = (
        "import signal, recadam_core.cli\n"
        "from recadam_core import RecAdamError\n"
        "def wait():\n"
        "    try: signal.raise_signal(signal.SIGTERM)\n"
        f"    except BaseException: raise {error}\n"
        "recadam_core.cli._run = wait; recadam_core.cli.main()\n"
    )
    end = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (end.returncode, end.stderr) == (143, "recadam: interrupted\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("place", ["finalizer", "collector"])
def test_a_signal_amid_a_finalizer_is_not_lost(number, code, place):
    """Where Python drops what is raised: JAX has such a callback."""
    script = (
        "import gc, signal, sys, time, recadam_core.cli\n"
        "class Mine:\n"
        f"    def __del__(self): signal.raise_signal({int(number)}); time.sleep(0)\n"
        "def collected(*_): gc.callbacks.clear(); Mine.__del__(None)\n"
        "def wait():\n"
        f"    if {place == 'finalizer'}: Mine()\n"
        "    else: gc.callbacks.append(collected); gc.collect()\n"
        "    for _ in range(1000): time.sleep(0.01)\n"
        "recadam_core.cli._run = wait; recadam_core.cli.main()\n"
    )
    began = time.monotonic()
    end = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (end.returncode, end.stderr) == (code, "recadam: interrupted\n")
    assert time.monotonic() - began < 9


def test_an_interrupt_while_a_pools_process_starts_is_its_parents(tmp_path):
    """A terminal sends it to all of them, and one that still imports would print a traceback."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if '--multiprocessing-fork' in sys.orig_argv: os.kill(os.getpid(), signal.SIGINT)\n"
    )
    script = (
        "import signal\n"
        "from recadam_harness.processes import pool\n"
        "with pool(1) as each: print(list(each(abs, [-7])))\n"
        "print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))\n"
    )
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    end = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert (end.returncode, end.stdout, end.stderr) == (0, "[(-7, 7)]\nFalse\n", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_run_at_once(tmp_path, number, code):
    """Though the first is not obeyed: as while a framework compiles."""
    script = (
        "import sys, time, recadam_core.cli, recadam_core.commands\n"
        "from recadam_core.interrupts import deferred\n"
        "def wait():\n"
        "    with deferred():\n"
        "        print('here', flush=True); time.sleep(60); time.sleep(60)\n"
        "recadam_core.cli._run = wait; recadam_core.cli.main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.send_signal(number)
        process.send_signal(number)  # as `timeout` does: this is still the first
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(number)
        errors = process.communicate(timeout=20)[1]
    assert (process.returncode, errors) == (code, "recadam: ended at once\n")


# A person's files beside all that the README shows.

PLANTED = (
    "notes.txt",
    ".hidden.swp",
    "weights/mine.safetensors",
    "logs/mine.log",
    "table.csv.bak",
    "mine.png",
)


def shown_commands():
    """The commands of the README's list, small: of whatever takes long, a few steps."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^\.venv/bin/recadam (.+?)(?:  +#.*)?$", text, flags=re.MULTILINE)
    small = {
        "finetune": ["--steps", "4"],
        "demo": ["--only", "digits"],
        "conformance": ["--backend", "numpy", "--level", "exact", "--claim", "manners"],
        "experiment": ["--arm", "adamw", "--seeds", "1"],
        "trial": ["rows=64", "steps=4"],
    }
    lines = [shlex.split(line) for line in found]
    return [[*line, *small.get(line[0], [])] for line in lines if "glue" not in line]


@pytest.mark.heavy
@pytest.mark.tree
@pytest.mark.needs("torch", "jax", "transformers")
def test_a_persons_files_survive_every_command_of_the_readme(campaign, encoders, tmp_path):
    shutil.copytree(Path(__file__).parents[1] / "golden", tmp_path / "tests" / "golden")
    commands = shown_commands()
    assert {line[0] for line in commands} >= {
        *("finetune", "compare", "report", "schedule", "conformance", "backends", "fetch", "demo"),
        *("experiment", "trial"),
    }  # fmt: skip
    commands.sort(key=lambda line: line[0] in ("compare", "report"))  # of runs that are there by then
    lost, ends = [], Counter()
    for again in ([], [], ["--overwrite"]):
        for line in commands:
            words = [*line, *(again if line[0] in ("finetune", "report", "seeds") else [])]
            words = [re.sub(r"^minilm-l6$", encoders["bert"], word) for word in words]
            words += ["--model", encoders["bert"]] if line[0] == "experiment" else []
            shell = f"{sys.executable} -m recadam_core " + " ".join(
                word if "*" in word else shlex.quote(word) for word in words
            )
            mine = plant(tmp_path)
            end = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
            ends[end.returncode] += 1
            assert end.returncode in (0, 1, 2), end.stderr
            assert "Traceback" not in end.stderr
            lost += [(line, path) for path in mine if not path.is_file() or path.read_text() != str(path)]
    assert lost == []
    assert ends[0] > 20


def plant(ground):
    """A file of every kind in every folder that is there; all of them, with those of before."""
    for folder in [path for path in ground.rglob("*") if path.is_dir() and path.name != "golden"]:
        for name in PLANTED:
            if (folder / name).parent.is_dir():
                (folder / name).write_text(str(folder / name))
    return [path for path in ground.rglob("*") if path.is_file() and any(
        path.as_posix().endswith(f"/{name}") for name in PLANTED
    )]  # fmt: skip
