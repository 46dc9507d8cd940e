"""Training that is killed again and again ends where one that is left alone does, in every bit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from recadam_core import RecAdamError
from recadam_harness import RunConfig, finetune, load_run
from recadam_harness.checkpoints import _digest
from recadam_harness.directory import identity_of
from recadam_harness.folders import Folder
from recadam_harness.weights import packed, unpacked

WORKER = Path(__file__).with_name("killed_worker.py")


def points(steps, count):
    return sorted(random.Random(0).sample(range(1, steps), count))


# A loop of its own, with all that makes a resume hard: bfloat16, stochastic rounding, a scheduler, anchors
# from a file, and the tuned weights loaded before the optimizer is made.


def start(folder, steps):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", WORKER, folder, str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def run(folder, steps, kills):
    """Kill at each of these steps, or as soon after as the process notices, then let it end."""
    for kill in kills:
        with start(folder, steps) as process:
            for line in process.stdout:
                if int(line) >= kill:
                    process.send_signal(signal.SIGKILL)
                    break
            process.stdout.read()
        assert process.returncode == -signal.SIGKILL
    with start(folder, steps) as process:
        process.communicate(timeout=120)
    assert process.returncode == 0
    return torch.load(folder / "final.pt")


@pytest.mark.heavy
@pytest.mark.parametrize(("steps", "count"), [(60, 1), (1000, 10)])
def test_kills_at_random_points_change_no_bit(tmp_path, steps, count):
    """Some before the anchors are released and some after; with stochastic rounding, which is no chance."""
    # A checkpoint may not be reached between two kills: then the same steps are taken once more.
    alone = run(tmp_path / "alone", steps, [])
    killed = run(tmp_path / "killed", steps, points(steps, count))
    for name, weights in alone.items():
        assert torch.equal(weights, killed[name])


# The harness.


def harness(out, config, kills):
    """`recadam finetune --resume`, killed when its records have come to each of these steps."""
    command = [sys.executable, "-m", "recadam_core", "finetune", config.task, "--backend", config.backend]
    command += ["--optimizer", config.optimizer, "--steps", str(config.steps)]
    command += ["--t0", str(config.steps / 3)] if config.optimizer == "recadam" else []
    command += ["--eval-every", "40", "--out", str(out), "--resume", "--checkpoint-every", "7"]
    records, status = out / "steps.jsonl", out / "status.json"
    for kill in [*kills, None]:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            while kill is not None and process.poll() is None:
                mine = status.exists() and json.loads(status.read_text())["pid"] == process.pid
                if mine and records.exists() and records.read_bytes().count(b"\n") >= kill:
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.002)
            error = process.communicate(timeout=120)[1].decode()
        assert process.returncode == (0 if kill is None else -signal.SIGKILL), error
    return load_run(out)


SOME = [("numpy", "recadam", 2)]
ALL = [("torch", "recadam", 20), ("torch", "adamw", 3), ("jax", "recadam", 5), ("jax", "adamw", 3)]


@pytest.mark.parametrize(
    ("backend", "optimizer", "count"), [*SOME, *(pytest.param(*x, marks=pytest.mark.heavy) for x in ALL)]
)
def test_a_killed_run_of_the_harness_is_the_uninterrupted_one(tmp_path, backend, optimizer, count):
    steps = 100 * count
    curve = {"t0": steps / 3} if optimizer == "recadam" else {}
    config = RunConfig.for_task("digits", backend, optimizer, steps=steps, eval_every=40, **curve)
    alone = finetune(config, tmp_path / "alone")
    killed = harness(tmp_path / "killed", config, points(steps, count))
    assert len(killed.provenance["resumed"]) >= 1
    for column, values in alone.steps.items():
        if column != "seconds":
            np.testing.assert_array_equal(killed.steps[column], values)
    assert killed.evaluations == alone.evaluations
    weights = killed.weights()
    for name, values in alone.weights().items():
        np.testing.assert_array_equal(weights[name], values)
    assert [path.name for path in sorted((tmp_path / "killed").rglob("*")) if path.is_file()] == [
        path.name for path in sorted((tmp_path / "alone").rglob("*")) if path.is_file()
    ]


def cut_short(out, config, at=7):
    """A run that was interrupted after a step."""

    def stop(step, text):
        if step == at and text.startswith("loss"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(config, out, progress=stop, checkpoint_every=3)
    assert load_run(out).status == {**load_run(out).status, "state": "interrupted", "step": at}


CONFIG = RunConfig.for_task("digits", "numpy", steps=10, snapshot_every=1)


@pytest.mark.parametrize(
    ("backend", "optimizer"),
    [
        pytest.param(b, o, marks=[] if b == "numpy" or o == "recadam" else pytest.mark.heavy)
        for b in ("numpy", "torch", "jax")
        for o in ("recadam", "annealed", "adamw", "coupled")
    ],
)
def test_every_engine_resumes(tmp_path, backend, optimizer):
    config = RunConfig.for_task("digits", backend, optimizer, steps=10, snapshot_every=1)
    cut_short(tmp_path / "run", config)
    again = finetune(config, tmp_path / "run", resume=True)
    alone = finetune(config, tmp_path / "alone")
    assert again.snapshots() == alone.snapshots() == list(range(1, 11))
    for step in again.snapshots():
        theirs = alone.weights(step)
        for name, values in again.weights(step).items():
            np.testing.assert_array_equal(values, theirs[name])
    assert [x["step"] for x in again.provenance["resumed"]] == [6]
    assert finetune(config, tmp_path / "run", resume=True).provenance == again.provenance  # is complete


class Killed(BaseException):
    """As a kill: nothing that a run does when it is interrupted is done."""


@pytest.mark.parametrize("count", range(1, 9))
def test_a_kill_amid_putting_a_run_back_or_clearing_it_is_resumed(tmp_path, monkeypatch, count):
    """Before each change of a file."""
    alone = finetune(CONFIG, tmp_path / "alone")
    for checkpoint in (True, False):
        out = tmp_path / f"run-{checkpoint}"
        cut_short(out, CONFIG)
        if not checkpoint:
            Folder(out, "run").remove(["checkpoint.safetensors"])
        left = [count]

        def dies(act, left=left):
            def acts(*args, **options):
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                return act(*args, **options)

            return acts

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dies(Path.replace))
            patch.setattr(Path, "unlink", dies(Path.unlink))
            patch.setattr("recadam_harness.run._status", lambda *_: contextlib.nullcontext({"step": 0}))
            with contextlib.suppress(Killed):
                finetune(CONFIG, out, resume=True)
        again = finetune(CONFIG, out, resume=True)
        assert again.evaluations == alone.evaluations
        for step in alone.snapshots():
            name = f"weights/{step:06d}.safetensors"
            assert (out / name).read_bytes() == (alone.path / name).read_bytes()


def damage_checkpoint(out):
    (out / "checkpoint.safetensors").write_bytes(b"nothing")


def other_checkpoint(out):
    (out / "checkpoint.safetensors").write_bytes(packed({"weights.w": np.zeros(2)}, {"step": "6"}))


def other_start(out):
    folder = Folder(out, "run")
    provenance = json.loads((out / "provenance.json").read_text())
    folder.begin([], identity_of(CONFIG, "0"))
    folder.write_json("provenance.json", {**provenance, "start_sha256": "0"})


def lost_records(out):
    (out / "steps.jsonl").write_text("")


def no_evaluations(out):
    (out / "evaluations.json").write_text("[1]")


def poor_evaluations(out):
    (out / "evaluations.json").write_text('[{"step": 0}]')


def repeated_records(out):
    """A step four times."""
    lines = (out / "steps.jsonl").read_text().splitlines(keepends=True)
    (out / "steps.jsonl").write_text("".join([*lines[:3], *lines[2:3] * 3, *lines[3:]]))


def altered_record(out):
    text = (out / "steps.jsonl").read_text()
    (out / "steps.jsonl").write_text(text.replace('"lr": 0.002', '"lr": 0.003', 1))


def altered_weights(out):
    path = out / "weights" / "000002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def weights_of_another_step(out):
    shutil.copy(out / "weights" / "000001.safetensors", out / "weights" / "000002.safetensors")


def flipped_bit(out, at=-1):
    """One bit of the checkpoint, the last of a moment or a digit of what the file says of itself."""
    path = out / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    at = data.index(at) if isinstance(at, bytes) else at
    data[at] ^= 1
    path.write_bytes(data)


def checkpoint_of_another_run(out):
    other = out.parent / "other"
    if not other.exists():
        cut_short(other, dataclasses.replace(CONFIG, seed=1))
    shutil.copy(other / "checkpoint.safetensors", out)


def change_checkpoint(out, step=6, dtype=None, name=None):
    """Another checkpoint, that vouches for itself."""
    path = out / "checkpoint.safetensors"
    held, about = unpacked(path)
    about = {**about, "step": str(step), "records": str(step)}
    about.pop("sha256")
    if dtype:
        held = {key: x.astype(dtype) for key, x in held.items()}
    if name:
        held[name] = np.zeros(1)
    path.write_bytes(packed(held, {**about, "sha256": _digest(held, about)}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_checkpoint, r"checkpoint.safetensors: damaged \(.*\); delete it, or give --overwrite"),
        (other_checkpoint, r"checkpoint.safetensors: damaged \(its sha256 is not that of what is in it\)"),
        (
            flipped_bit,
            r"checkpoint.safetensors: damaged \(its sha256 is not that of .*\); delete it, or",
        ),
        (partial(flipped_bit, at=rb"6\""), r"checkpoint.safetensors: damaged \("),
        (partial(flipped_bit, at=b"target_acc"), r"checkpoint.safetensors: damaged \("),
        (checkpoint_of_another_run, r"checkpoint.safetensors: damaged \(it is of another run\); delete it"),
        (repeated_records, r"steps.jsonl: damaged in line 4 \(step 3 stands there\); run it again"),
        (altered_record, r"steps.jsonl: damaged \(its first 6 records are not those of checkpoint"),
        (altered_weights, r"weights/000002.safetensors: damaged \(not what the run wrote: its sha256"),
        (weights_of_another_step, r"weights/000002.safetensors: damaged \(not what the run wrote"),
        (other_start, "cannot resume: another model or other data; give --overwrite"),
        (lost_records, r"steps.jsonl: damaged \(its first 6 records are not those of checkpoint.safetensors"),
        (no_evaluations, r"evaluations.json: damaged \(no evaluation, or none of a later step: 1\)"),
        (poor_evaluations, r"evaluations.json: damaged \(not what the run wrote: its sha256"),
        (partial(change_checkpoint, step=-5), r"damaged \(its step is -5 of 10, with -5 records\)"),
        (partial(change_checkpoint, step=10), r"damaged \(its step is 10 of 10, with 10 records\)"),
        (partial(change_checkpoint, dtype=np.float32), r"is float32 .*, not float64"),
        (partial(change_checkpoint, name="m.head.bias"), r"head.bias is float64 \(1,\), not float64 \(2,\)"),
    ],
)
def test_what_cannot_be_resumed_is_left_as_it_is(tmp_path, damage, message):
    out = tmp_path / "run"
    cut_short(out, CONFIG)
    damage(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RecAdamError, match=message):
        finetune(CONFIG, out, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert finetune(CONFIG, out, overwrite=True).status["state"] == "complete"


def test_a_complete_run_that_is_damaged_is_not_taken_for_whole(tmp_path):
    out = tmp_path / "run"
    finetune(CONFIG, out)
    (out / "predictions.npy").unlink()
    with pytest.raises(RecAdamError, match=r"predictions\.npy"):
        finetune(CONFIG, out, resume=True)
    text = (out / "steps.jsonl").read_text().splitlines(keepends=True)
    (out / "steps.jsonl").write_text("".join([*text[:3], "\n", *text[3:]]))
    with pytest.raises(RecAdamError, match=r"steps\.jsonl: damaged in line 4"):
        finetune(CONFIG, out, resume=True)
    assert finetune(CONFIG, out, overwrite=True).status["state"] == "complete"


def test_another_configuration_is_not_resumed(tmp_path, recadam):
    out = tmp_path / "run"
    cut_short(out, CONFIG)
    other = dataclasses.replace(CONFIG, hp=CONFIG.hp.replace(gamma=7.0))
    with pytest.raises(RecAdamError, match=r"cannot resume: hp.gamma was .* and is 7.0; give the settings"):
        finetune(other, out, resume=True)
    with pytest.raises(RecAdamError, match="overwrite and resume exclude one another"):
        finetune(CONFIG, out, resume=True, overwrite=True)
    result = recadam("finetune", "digits", "--backend", "numpy", "--out", out)
    assert "holds a run already; give --overwrite, --resume or another directory" in result.stderr
    (out / "checkpoint.safetensors").unlink()
    words = ["--backend", "numpy", "--steps", "10", "--snapshot-every", "1", "--resume"]
    result = recadam("finetune", "digits", *words, "--out", out)
    assert result.returncode == 0
    assert "no checkpoint to resume from: from the start" in result.stderr
    without = tmp_path / "without"
    again = finetune(CONFIG, without, resume=True, checkpoint_every=4)  # nothing to resume: a new run
    assert again.status["step"] == 10
    assert not (without / "checkpoint.safetensors").exists()
