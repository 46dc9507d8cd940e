"""The command line: output, exit codes, one line for bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from recadam_core import Hyperparameters, Linear, RecAdamError, Sigmoid, commands, console
from recadam_core.advice import schedule_advice
from recadam_core.variants import Variant
from recadam_harness import load_run

GOLDEN = Path(__file__).parents[1] / "golden"
ADAMW = ["finetune", "digits", "--optimizer", "adamw"]
UNREAD = "recadam: optimizer"


def test_finetune_prints_its_figures_and_its_directory(recadam, tmp_path):
    result = recadam(
        "finetune", "digits", "--backend", "numpy", "--steps", "5", "--annealing", "linear", "--t0", "4",
        "--form", "proximal", "--gamma", "1e6", "--out", tmp_path / "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(tmp_path / "run")
    assert "ten-digit accuracy (more is better)" in result.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["hp"]["annealing"] == {"name": "linear", "t0": 4.0, "weight": 1.0, "floor": 0.0}
    assert config["hp"]["form"] == "proximal"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "digit"], "recadam: unknown task 'digit': did you mean 'digits'? ("),
        (["finetune", "digits", "--backend", "tensorflow"], "recadam: unknown backend 'tensorflow'"),
        (["finetune", "digits", "--optimizer", "sgd"], "recadam: unknown optimizer 'sgd'"),
        (["finetune", "digits", "--form", "coupled"], "recadam: unknown form 'coupled'"),
        (["finetune", "digits", "--annealing", "cosine"], "recadam: unknown annealing 'cosine'"),
        (["finetune", "digits", "--annealing", "linear", "--k", "1"], "recadam: unknown argument of"),
        ([*ADAMW, "--gamma", "1e300"], f"{UNREAD} 'adamw' does not read gamma"),
        ([*ADAMW, "--annealing", "sigmoid"], f"{UNREAD} 'adamw' does not read annealing"),
        (["seeds", "--optimizer", "annealed", "--gamma", "1"], f"{UNREAD} 'annealed' does not read gamma"),
        (["finetune", "digits", "--lr", "nan"], "recadam: Hyperparameters: lr is nan;"),
        (["finetune", "digits", "--k", "-1"], "recadam: Sigmoid: k is -1.0; give a finite number > 0"),
        (["finetune", "digits", "--steps", "0"], "recadam: steps is 0; give a whole number from 1"),
        (["finetune", "digits", "--model", "x"], "recadam: unknown setting 'model'"),
        (["finetune", "digits", "--gamma", "5000"], "recadam: step 1: lr * gamma * recall = 8.78"),
        (["compare", "."], "recadam: compare: give two runs or more; the first is the reference"),
        (["compare", ".", "."], "recadam: .: no run here; give a directory that `recadam finetune` wrote"),
        (["report", "nowhere"], "recadam: nowhere: no run here"),
        (["finetune", "digits", "--train-rows", "0"], "recadam: train_rows is 0; give a whole number from 1"),
        (["finetune", "digits", "--steps", "abc"], "recadam: Invalid value for '--steps'"),
        (["finetune", "digits", "--out", "/proc/nope"], "recadam: /proc/nope"),
        (["finetune"], "recadam: Missing argument"),
        (["compare", "a", "b", "--tolerance", "nan"], "recadam: a: no run here"),
        (["schedule", "--plot", "x.foo"], "recadam: x.foo: unknown kind of picture"),
        (["nonsense"], "recadam: No such command 'nonsense'."),
        (["fetch", "imagenet"], "recadam: unknown archive 'imagenet'"),
        (["demo", "--only", "cifar"], "recadam: unknown task 'cifar'"),
        (["conformance", "--backend", "cupy"], "recadam: unknown backend 'cupy'"),
        (["schedule", "--form", "x"], "recadam: unknown form 'x'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(recadam, tmp_path, arguments, message):
    if arguments[0] == "finetune":
        arguments = [*arguments, "--backend", "numpy"] if "--backend" not in arguments else arguments
    result = recadam(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.strip().startswith(message)
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr
    started = list(tmp_path.glob("runs/*/status.json"))
    assert started == []  # nothing half written


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("jax", "functional, eager, optax, optax-host"),
        ("numpy", "functional, specification, fused"),
        ("torch", "functional, single, foreach"),
    ],
)
def test_backends_lists_what_is_installed(recadam, name, says):
    result = recadam("backends")
    assert result.returncode == 0
    rows = {line.split()[0]: line for line in result.stdout.splitlines()[1:]}
    assert set(rows) == {"jax", "numpy", "torch"}
    assert says in rows[name]


def test_conformance_table_and_json(recadam):
    command = ["conformance", "--backend", "numpy", "--claim", "golden", "--golden", GOLDEN]
    table = recadam(*command)
    assert table.returncode == 0, table.stderr
    rows = [line.split() for line in table.stdout.splitlines()[1:3]]
    assert [row[:7] for row in rows] == [
        ["numpy", "golden", dtype, "functional,", "fused,", "specification", cases]
        for dtype, cases in (("float64", "7"), ("float32", "1"))
    ]
    results = json.loads(recadam(*command, "--json").stdout)
    assert len(results) == 6
    assert all(r["worst"] <= r["bound"] and r["verdict"] == "yes" for r in results)
    markdown = recadam(*command, "--markdown").stdout
    assert markdown.splitlines()[1].startswith("| --- |")


def test_a_worst_case_is_shown_alone_by_its_command(recadam):
    arguments = ["--backend", "numpy", "--variant", "functional", "--claim", "step", "--level", "fast"]
    results = json.loads(recadam("conformance", *arguments, "--json").stdout)
    worst = next(r for r in results if r["claim"] == "step float32")
    alone = json.loads(recadam(*worst["command"].split()[1:], "--json").stdout)
    assert len(alone) == 1
    assert (alone[0]["worst"], alone[0]["where"]) == (worst["worst"], worst["where"])


def test_a_miss_exits_with_1_and_says_how_to_see_it(recadam, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, recadam_numpy\n"
        "module = sys.modules['recadam_numpy.backend']\n"
        "right = module.unchecked\n"
        "def wrong(theta, *rest):\n"
        "    right(theta, *rest)\n"
        "    theta *= 1.5\n"
        "module.unchecked = wrong\n"
    )
    arguments = ["--backend", "numpy", "--variant", "functional", "--claim", "exact", "--jobs", "1"]
    result = recadam("conformance", *arguments, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1
    assert "NO: recadam conformance --backend numpy --variant functional --level exact" in result.stdout


def test_schedule_prints_the_curve_and_writes_a_picture(recadam, tmp_path):
    result = recadam("schedule", "--steps", "1000", "--plot", tmp_path / "curve.png")
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["250", "0.5", "0.5", "0.05"] in rows
    assert "the anchor can be freed from step 528 on" in result.stdout
    assert "warning" not in result.stdout
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert (
        recadam("schedule", "--lr", "1e-3").stdout.count("warning: lr * gamma = 5 diverges from step 1 on")
        == 1
    )


@pytest.mark.parametrize(
    ("hp", "steps", "warning"),
    [
        (Hyperparameters(annealing=Sigmoid(k=0.5, t0=250)), 260, "training is frozen: the task weight is"),
        (Hyperparameters(annealing=Linear(t0=1000)), 500, "the task weight ends at 0.5"),
        (Hyperparameters(gamma=0.01), 1000, "the pull is inactive: it adds up to 5e-05"),
        (Hyperparameters(lr=3e-4), 1000, "lr * gamma = 1.5 overshoots from step 1 on (pull of more than 1)"),
    ],
    ids=lambda x: "",
)  # fmt: skip
def test_schedule_advice(hp, steps, warning):
    advice = schedule_advice(hp, steps)
    assert len(advice) == 1
    assert advice[0].startswith(warning)


def test_no_recall_weight_is_no_pull_however_strong(recadam):
    result = recadam("schedule", "--lr", "1e300", "--gamma", "1e300")
    assert result.returncode == 0
    assert result.stdout.splitlines()[-3].split()[-2:] == ["0", "0"]
    assert "warning: lr * gamma = inf diverges from step 1 on" in result.stdout


def test_more_steps_than_can_be_shown_are_refused(recadam):
    result = recadam("schedule", "--steps", 10**12)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1


def test_without_a_command_there_is_the_help_and_no_more(recadam):
    result = recadam()
    assert result.returncode == 2
    assert "schedule" in result.stdout
    assert "recadam:" not in result.stderr


@pytest.mark.heavy
def test_demo_of_the_quick_task(recadam, tmp_path):
    result = recadam("demo", "--only", "digits", "--out", tmp_path / "demo")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"report: {(tmp_path / 'demo' / 'report.html').resolve()}"
    assert (tmp_path / "demo" / "digits.png").exists()
    assert result.stdout.count(" yes ") == 4
    assert "annealed" in result.stdout
    again = recadam("demo", "--only", "digits", "--out", tmp_path / "demo")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_demo_that_ends_early_takes_its_runs_along(tmp_path, number):
    command = [sys.executable, "-m", "recadam_core", "demo", "--only", "digits", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (started := list(tmp_path.glob("*/status.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert stderr.strip().splitlines()[-1] == f"recadam: interrupted; the runs in {tmp_path} say so"
    while any(load_run(path.parent).status["state"] == "running" for path in started):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_printed_is_no_markup(monkeypatch, capsys):
    """An extra in brackets, or a message with a slash in them, is text."""
    monkeypatch.setattr(commands, "available_backends", list)
    commands.backends()
    assert "pip install 'recadam-core[jax]'" in capsys.readouterr().out
    table = commands.Table("[/x]")
    table.add_row("list[int] :smile:")
    console.show(table)
    assert "list[int] :smile:" in capsys.readouterr().out


@pytest.mark.heavy
@pytest.mark.needs("torch")
def test_runs_that_part_are_compared_in_json_too(tmp_path, recadam):
    for backend in ("numpy", "torch"):
        recadam("finetune", "digits", "--backend", backend, "--steps", 3, "--out", tmp_path / backend)
    result = recadam("compare", tmp_path / "numpy", tmp_path / "torch", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)[0]["parting"]["repeats"] is True


def test_nothing_tried_is_no_success(monkeypatch):
    monkeypatch.setattr(Variant, "lacks", lambda self: "numba")
    with pytest.raises(RecAdamError, match="nothing was tried; install numba"):
        commands.conformance(["numpy"], ["fused"], claim=["denormals"], jobs=1)
    with pytest.raises(RecAdamError, match="give one of them"):
        commands.conformance(as_json=True, as_markdown=True)
