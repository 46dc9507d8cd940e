"""What nobody should be able to corrupt is attacked, at random: runs, files, disks, command lines.

    python tests/harness/campaign.py --damages 1000 --kills 200 --stops 50 --pairs 200 --disks 99 --lines 1000

prints a table in Markdown, and what went wrong, each with a way to see it again. Counted are tracebacks (and
crashes, and errors of more than one line), silent passes (success on what is not what it was), and lost files
(of a user, or of a folder that a refused command had no business in).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from unittest import mock

import numpy as np

from recadam_core import RecAdamError, cli
from recadam_core.commands import whole
from recadam_harness import RunConfig, finetune, load_run
from recadam_harness.directory import COLUMNS
from recadam_harness.experiments.table import Entry, Results, Row
from recadam_harness.experiments.trial import Trial
from recadam_harness.report import write_report

# A shell's background jobs ignore interrupts, and what they start would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

RECADAM = [sys.executable, "-m", "recadam_core"]
COUNTS = ("tracebacks", "silent passes", "lost files")


class Tally:
    """What was tried, how it ended, and what went wrong."""

    def __init__(self, what):
        self.what, self.tried, self.ends, self.wrong = what, 0, Counter(), []

    def end(self, how):
        self.tried += 1
        self.ends[how] += 1

    def fault(self, kind, text):
        self.wrong.append((kind, text))
        print(f"{kind}: {text}", file=sys.stderr, flush=True)

    def row(self):
        ends = ", ".join(f"{n} {how}" for how, n in sorted(self.ends.items(), key=lambda x: -x[1]))
        kinds = Counter(kind for kind, _ in self.wrong)
        return [self.what, f"{self.tried:,}", ends, *(str(kinds[kind]) for kind in COUNTS)]


def call(arguments):
    """The command line in this process: exit code, output, errors."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    before = sys.argv, cli.obey
    sys.argv, cli.obey = ["recadam", *arguments], lambda: None  # this process keeps its own signals
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"
    finally:
        sys.argv, cli.obey = before
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8", "replace"))
    return code, *texts


def tree(folder):
    """Every file and folder, with what is in it; links as they are."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        )
    return found


def judge(tally, seen, code, errors, before=None, folder=None):
    """The rules of every command: a known exit code, one line of error, nothing changed by a refusal."""
    lines = [line for line in errors.splitlines() if line.startswith("recadam: ")]
    if code not in (0, 1, 2) or "Traceback" in errors:
        tally.fault("tracebacks", f"{seen}: ended with {code}: {errors[-300:]}")
    elif code == 2 and (len(lines) != 1 or not errors.endswith(lines[0] + "\n")):
        tally.fault("tracebacks", f"{seen}: not one line of error: {errors!r}")
    if code == 2 and before is not None and (after := tree(folder)) != before:
        changed = sorted(x for x in before.keys() | after.keys() if before.get(x) != after.get(x))
        tally.fault("lost files", f"{seen}: refused, and changed {changed}: {errors}")


# Runs as they should be.


CONFIG = RunConfig.for_task("digits", "numpy", steps=24, snapshot_every=8, eval_every=8, t0=8.0)
OPTIONS = {"--steps": "24", "--snapshot-every": "8", "--eval-every": "8", "--t0": "8"}  # the same by command


def words(out, backend="numpy", seed=0, *more):
    return [
        "finetune",
        "digits",
        *chain(*OPTIONS.items()),
        "--backend",
        backend,
        "--seed",
        str(seed),
        "--out",
        str(out),
        *more,
    ]


def cut_short(config, out, at):
    def stop(step, text):
        if step == at and text.startswith("loss"):
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        finetune(config, out, progress=stop, checkpoint_every=5)


def same(run, wanted):
    """Whether a run is the other in every bit, but for its times."""
    if run.status["state"] != "complete" or run.evaluations != wanted.evaluations:
        return False
    if any(not np.array_equal(run.steps[c], wanted.steps[c]) for c in COLUMNS if c != "seconds"):
        return False
    if run.snapshots() != wanted.snapshots() or not np.array_equal(run.predictions(), wanted.predictions()):
        return False
    return all(
        np.array_equal(x, wanted.weights(step)[name])
        for step in run.snapshots()
        for name, x in run.weights(step).items()
    )


# Damaged folders.


def semantic(rng, data):
    """Another value somewhere in a JSON text, or None where it is none."""
    try:
        value = json.loads(data)
    except ValueError:
        return None
    nonsense = [
        *(None, True, -1, 0, 7, 1e308, -0.5, 10**400, float("nan")),
        *("x", "", "\ud800", "a\nb", [], {}, [[]], {"a": 1}),
    ]  # fmt: skip
    places = []

    def walk(parent, key, x):
        places.append((parent, key))
        for k, y in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
            walk(x, k, y)

    root = [value]
    walk(root, 0, value)
    parent, key = rng.choice(places)
    old = parent[key]
    parent[key] = rng.choice(nonsense)
    if rng.random() < 0.2 and isinstance(parent, dict):
        del parent[key]
    elif repr(parent[key]) == repr(old):
        return None
    return json.dumps(root[0], indent=2).encode()


def damaged(rng, path, others):
    """Damage a file in some way; which, or None where nothing has changed."""
    data = path.read_bytes()
    way = rng.choice(
        ["flip", "flip", "cut", "empty", "noise", "gone", "other", "json", "json", "line", "deep", "folder"]
    )
    if way == "gone":
        path.unlink()
        return way
    if way == "folder":
        path.unlink()
        path.mkdir()
        return way
    new = data
    if way == "flip" and data:
        at = rng.randrange(len(data))
        new = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    elif way == "cut":
        new = data[: rng.randrange(len(data) + 1)]
    elif way == "empty":
        new = b""
    elif way == "noise":
        new = rng.randbytes(rng.randrange(1, 400))
    elif way == "other":
        other = rng.choice(others)
        new = other.read_bytes()
    elif way == "deep":
        new = b"[" * 100_000 if rng.random() < 0.5 else b"1" * 5000
    elif way == "line":
        lines = data.splitlines(keepends=True)
        at = rng.randrange(len(lines) or 1)
        new = b"".join(lines[:at] + lines[at : at + 1] * rng.choice([0, 2, 4]) + lines[at + 1 :])
    elif way == "json":
        lines = data.splitlines(keepends=True)
        if path.suffix == ".jsonl" and lines:
            at = rng.randrange(len(lines))
            line = semantic(rng, lines[at])
            new = (
                data
                if line is None
                else b"".join([*lines[:at], b" ".join(line.split()) + b"\n", *lines[at + 1 :]])
            )
        else:
            new = semantic(rng, data) or data
    if new == data:
        return None
    path.write_bytes(new)
    return way


MINE = {
    "notes.txt": b"mine",
    "weights/1-my-best.safetensors": b"mine",
    ".config.json.swp": b"mine",
    ".lock": b"mine",
}


class Bases:
    """Folders that are whole, and what the commands say of them."""

    def __init__(self, folder):
        self.folder = folder
        self.whole = finetune(CONFIG, folder / "whole")
        self.other = finetune(
            RunConfig.for_task("digits", "numpy", steps=24, seed=1, snapshot_every=8), folder / "other"
        )
        cut_short(CONFIG, folder / "cut", 13)
        cut_short(
            RunConfig.for_task("digits", "numpy", steps=24, seed=1, snapshot_every=8),
            folder / "cut-other",
            13,
        )
        figures = {"accuracy": 0.5, "snli_mnr": 1.0, "snli_mnr_before": 0.4, "distance": 1.0, "seconds": 2.0}
        results = Results(folder / "table")
        for seed in range(3):
            curve = [{"step": 0.0, "source_loss": 0.5, "distance": 0.0}]
            results.add(Row(Entry("test", "AdamW", Trial(seed=seed, curve_every=5)), figures, curve))
        self.checks = {name: row.check for name, row in Results(folder / "table").rows.items()}
        write_report([self.whole], folder / "report")
        self.compared = call(["compare", str(folder / "whole"), str(folder / "whole")])


def page_of(folder):
    text = (folder / "report.html").read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"[^\s<>\"]*/(work|bases)/", "", text)
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d|id=\"\w+\"|#\w+|<dc:date>[^<]*", "", text)


def damages(count, rng, folder):
    tally = Tally("files of a folder damaged, then compared, reported, resumed, or read as a table")
    bases = Bases(folder / "bases")
    work = folder / "work"
    whole_page = None
    while tally.tried < count:
        shutil.rmtree(work, ignore_errors=True)
        kind = rng.choice(
            ["compare", "compare", "report", "resume", "resume", "resume", "overwrite", "table"]
        )
        base = {"resume": "cut", "overwrite": rng.choice(["whole", "cut"]), "table": "table"}.get(
            kind, "whole"
        )
        place = shutil.copytree(bases.folder / base, work / "whole")
        planted = {name: data for name, data in MINE.items() if kind != "table" and rng.random() < 0.3}
        for name, data in planted.items():
            (place / name).write_bytes(data)
        files = [
            path
            for path in sorted(place.rglob("*"))
            if path.is_file() and path.relative_to(place).as_posix() not in MINE
        ]
        path = rng.choice(files)
        others = [x for x in sorted(bases.folder.rglob("*")) if x.is_file() and x.name == path.name] or [path]
        way = damaged(rng, path, others)
        if way is None:
            continue
        name = path.relative_to(place)
        before = tree(place)
        seen = f"{kind}, {base}/{name} {way}"
        shutil.rmtree(folder / "out", ignore_errors=True)
        if kind == "table":
            try:
                rows = Results(place).rows
                how = "read" if len(rows) else "nothing there"
                if spoilt := [row for name, row in rows.items() if row.check != bases.checks.get(name)]:
                    tally.fault("silent passes", f"{seen}: {spoilt}")
            except (RecAdamError, OSError) as error:
                how = "refused"
                if "\n" in str(error):
                    tally.fault("tracebacks", f"{seen}: {error!r}")
            except Exception as error:
                how = "refused"
                tally.fault("tracebacks", f"{seen}: {error!r}")
            if tree(place) != before:
                tally.fault("lost files", seen)
            tally.end(how)
            continue
        if kind == "compare":
            code, said, errors = call(["compare", str(bases.folder / "whole"), str(place)])
            judge(tally, seen, code, errors, before, place)
            if code != 2 and (code, said.replace(str(work), "")) != (
                0,
                bases.compared[1].replace(str(bases.folder), ""),
            ):
                tally.fault("silent passes", f"{seen}: {said}")
            how = "refused" if code == 2 else "as before"
        elif kind == "report":
            code, said, errors = call(["report", str(place), "--out", str(folder / "out")])
            judge(tally, seen, code, errors, before, place)
            how = "refused" if code == 2 else "as before"
            if code == 0:
                if whole_page is None:
                    call(["report", str(bases.folder / "whole"), "--out", str(folder / "page")])
                    whole_page = page_of(folder / "page")
                unfinished = load_run(place).status["state"] != "complete"
                if not unfinished and page_of(folder / "out") != whole_page:
                    tally.fault("silent passes", f"{seen}: another page")
            elif (folder / "out").exists():
                tally.fault("lost files", f"{seen}: refused, and left {folder / 'out'}")
        else:
            code, said, errors = call(
                words(place, "numpy", 0, "--resume" if kind == "resume" else "--overwrite")
            )
            judge(tally, seen, code, errors, before, place)
            how = "refused" if code == 2 else "resumed" if kind == "resume" else "overwritten"
            if code != 2 and not same(load_run(place), bases.whole):
                tally.fault("silent passes", f"{seen}: another run")
        for planted_name, data in planted.items():
            there = place / planted_name
            if not there.is_file() or there.read_bytes() != data:
                tally.fault("lost files", f"{seen}: {planted_name} is gone")
        tally.end(how)
    return tally


# Kills and signals.


def writer_of(out):
    """The process that writes a run, None before there is one."""
    try:
        return json.loads((out / "status.json").read_text())["pid"]
    except FileNotFoundError:
        return None


def wait_until_up(process):
    """Until a command obeys signals: while Python starts, they are Python's own to handle."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        caught = re.search(r"^SigCgt:\s*(\w+)", status.read_text(), re.M)
        if caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.005)


def kills(count, rng, folder):
    backends = ("numpy", "torch", "jax")[: 1 + count // 10]  # ten kills a run, one backend after the other
    tally = Tally(
        f"runs ended by SIGKILL, SIGTERM or SIGINT at random, over {', '.join(backends)}, and resumed"
    )
    alone = {
        b: finetune(
            RunConfig.for_task("digits", b, steps=24, snapshot_every=8, eval_every=8, t0=8.0),
            folder / f"alone-{b}",
        )
        for b in backends
    }
    seeds = [rng.random() for _ in range(count)]

    def killed(first):
        """Several kills of one run, and then it may end."""
        mine = random.Random(seeds[first])
        backend = backends[first % len(backends)]
        out = folder / f"killed-{first}"
        left = min(10, count - first)
        ends = []
        while True:
            command = [*RECADAM, *words(out, backend, 0, "--resume", "--checkpoint-every", "1")]
            number = mine.choice(
                [signal.SIGKILL, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT]
            )
            seen = f"{backend}, {number.name}, out {out}"
            with subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            ) as process:
                if left > 0:
                    if mine.random() < 0.7:  # while it trains, or soon after
                        while process.poll() is None and writer_of(out) != process.pid:
                            time.sleep(0.005)
                        time.sleep(mine.random() ** 3 * (0.1 if backend == "numpy" else 1.0))
                    else:
                        wait_until_up(process)
                        time.sleep(mine.random() * 3)
                    if process.poll() is None:
                        process.send_signal(number)
                        told = time.monotonic()
                errors = process.communicate(timeout=180)[1]
            code = process.returncode
            if left > 0:
                allowed = {0, -number} if number == signal.SIGKILL else {0, 128 + number, -number}
                if code not in allowed or "Traceback" in errors:
                    tally.fault("tracebacks", f"{seen}: ended with {code}: {errors[-500:]}")
                if code not in (0, -9) and time.monotonic() - told > 30:
                    tally.fault("silent passes", f"{seen}: ended only after {time.monotonic() - told:.0f} s")
                if code > 128 and (out / "config.json").exists():
                    state = load_run(out, strict=False).status["state"]
                    if state not in ("interrupted", "complete"):
                        tally.fault("silent passes", f"{seen}: the folder says {state}")
                if code:
                    ends.append(f"by {number.name}")
                    left -= 1
                else:  # all steps were taken before: another run
                    if not same(load_run(out), alone[backend]):
                        tally.fault("silent passes", f"{seen}: another run after kills")
                    shutil.rmtree(out)
                continue
            if code or not same(load_run(out), alone[backend]):
                tally.fault("silent passes", f"{seen}: {code}, another run after kills: {errors[-300:]}")
            elif hidden := [x.name for x in out.rglob(".*")]:
                tally.fault("lost files", f"{seen}: {hidden} stayed")
            shutil.rmtree(out)
            return ends

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for ends in pool.map(killed, range(0, count, 10)):
            for how in ends:
                tally.end(how)
    return tally


def stops(count, rng, folder):
    tally = Tally("other commands told to end at random: seeds, compare, conformance, a demo, an experiment")
    runs = [finetune(RunConfig.for_task("digits", b, steps=24), folder / b).path for b in ("torch", "jax")]
    seconds = {"seeds": 7, "compare": 7, "conformance": 15, "demo": 9, "experiment": 20}
    for number in range(count):
        out = folder / f"out-{number}"
        name = list(seconds)[number % len(seconds)]
        words = {
            "seeds": ["--count", "8", "--steps", "200", "--out", out],
            "compare": runs,
            "conformance": ["--backend", "jax"],
            "demo": ["--only", "digits", "--out", out],
            "experiment": ["comparison", "--quick", "--out", out],
        }[name]
        sent = rng.choice([signal.SIGTERM, signal.SIGINT])
        delay = rng.random() * seconds[name]
        command = [*RECADAM, name, *map(str, words)]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            wait_until_up(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(delay)
            if process.poll() is None:  # as a terminal does, or a supervisor
                (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
            told = time.monotonic()
            errors = process.communicate(timeout=120)[1]
        took, code = time.monotonic() - told, process.returncode
        seen = f"{name}, {sent.name} after {delay:.2f} s"
        said = [line for line in errors.splitlines() if line.startswith("recadam: ")]
        ends = {0: "ended before", 128 + sent: f"by {sent.name}"}
        if code not in ends or "Traceback" in errors or len(said) != (code != 0):
            tally.fault("tracebacks", f"{seen}: ended with {code}: {errors[-500:]}")
        if took > 30:
            tally.fault("silent passes", f"{seen}: ended only after {took:.0f} s")
        with contextlib.suppress(ProcessLookupError):
            for _ in range(80):  # until the system has buried all of them
                os.killpg(process.pid, 0)
                time.sleep(0.1)
            tally.fault("silent passes", f"{seen}: a process of it goes on")
        if locks := list(out.rglob(".recadam.lock")):
            tally.fault("lost files", f"{seen}: {locks} stayed")
        tally.end(ends.get(code, "else"))
        shutil.rmtree(out, ignore_errors=True)
    return tally


# Two at once.


def pairs(count, rng, folder):
    tally = Tally("pairs of processes on one folder, at random delays")
    alone = [
        finetune(
            RunConfig.for_task("digits", "numpy", steps=24, snapshot_every=8, eval_every=8, t0=8.0, seed=s),
            folder / f"alone-{s}",
        )
        for s in (0, 1)
    ]
    for number in range(count):
        out = folder / f"pair-{number}"
        ways = [rng.choice([[], [], ["--overwrite"], ["--resume"]]) for _ in range(2)]
        if rng.random() < 0.3:
            finetune(alone[0].config, out)
        mine = {"notes.txt": b"mine"} if out.exists() else {}
        for name, data in mine.items():
            (out / name).write_bytes(data)
        two = []
        for seed, way in enumerate(ways):
            command = [*RECADAM, *words(out, "numpy", seed, *way)]
            two.append(
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            )
            time.sleep(rng.choice([0.0, 0.01, 0.3 * rng.random(), 1.5 * rng.random()]))
        ends = [(process, process.communicate(timeout=120)[1]) for process in two]
        seen = f"{ways}, out {out}"
        for process, errors in ends:
            judge(tally, seen, process.returncode, errors)
        won = [seed for seed, (process, _) in enumerate(ends) if process.returncode == 0]
        run = load_run(out)
        if not any(same(run, alone[seed]) for seed in (won or [0])):
            tally.fault("silent passes", f"{seen}: neither run, {[e for _, e in ends]}")
        if len(won) == 2 and not ways[0] + ways[1] and run.config.seed == 1:
            tally.fault("silent passes", f"{seen}: both ended well")
        for name, data in mine.items():
            if (out / name).read_bytes() != data:
                tally.fault("lost files", f"{seen}: {name}")
        if hidden := [x.name for x in out.rglob(".*")]:
            tally.fault("lost files", f"{seen}: {hidden} stayed")
        tally.end({0: "both refused", 1: "one refused", 2: "one after the other"}[len(won)])
        shutil.rmtree(out)
    return tally


# A full disk.


def disks(count, rng, folder):
    tally = Tally("runs on a disk of 1 to 1,200 KiB that fills up, and resumed on another")
    alone = finetune(CONFIG, folder / "alone")
    script = (
        'mount -t tmpfs -o size="$1"k none "$2" || exit 99; at="$2"; copy="$3"; shift 3; '
        '"$@"; code=$?; cp -a "$at" "$copy"; exit $code'
    )
    for number in range(count):
        disk, copy = folder / f"disk-{number}", folder / f"copy-{number}"
        disk.mkdir()
        size = round(1200 ** rng.random())
        command = ["unshare", "-rm", "sh", "-c", script, "sh", str(size), str(disk), str(copy)]
        command += [*RECADAM, *words(disk / "run", "numpy", 0, "--checkpoint-every", "3")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 99:
            raise RuntimeError(f"no tmpfs can be mounted here: {result.stderr}")
        seen = f"{size} KiB"
        judge(tally, seen, result.returncode, result.stderr)
        if result.returncode == 2 and not re.search(
            r"recadam: .*run.*: (No space|Disk quota)", result.stderr
        ):
            tally.fault("tracebacks", f"{seen}: names no file: {result.stderr}")
        run = copy / "run"
        if left := [str(x) for x in copy.rglob(".*")]:
            tally.fault("lost files", f"{seen}: {left} stayed")
        if result.returncode == 0:
            good = same(load_run(run), alone)
        else:
            code, _, errors = call(words(run, "numpy", 0, "--resume"))
            judge(tally, f"{seen}, resumed", code, errors)
            if code == 2:
                code, _, errors = call(words(run, "numpy", 0, "--overwrite"))
            good = code == 0 and same(load_run(run), alone)
        if not good:
            tally.fault("silent passes", f"{seen}: another run after the disk was full")
        tally.end("had room" if result.returncode == 0 else "ended by one line, and resumed")
        shutil.rmtree(copy)
    return tally


# Command lines.


NONSENSE = (
    *(
        "",
        " ",
        "x",
        "-1",
        "0",
        "nan",
        "inf",
        "1e400",
        "-1e400",
        "99999999999999999999",
        "1" * 400,
        "0x10",
        "1_0",
        "--",
        "-",
    ),
    *(
        "a\nb",
        "a\tb",
        "\x1b[31mred",
        "na\u00efve",
        "\u65e5\u672c",
        "\U0001f600",
        "[bold]",
        "%s",
        "{0}",
        "../..",
        "/",
        ".",
    ),
    *(
        "file.txt",
        "folder",
        "missing/deep",
        "run",
        "cut",
        "nul\udcff",
        "x" * 300,
        "~",
        "$HOME",
        "*",
        "None",
        "True",
    ),
)
# Values with which a command does something in a moment.
FINE = {
    "--backend": ["numpy", "numpy", "numpy", "jax"],
    "--optimizer": ["recadam", "adamw", "annealed", "coupled"],
    "--form": ["decoupled", "proximal"],
    "--annealing": ["linear", "constant"],
    "--schedule": ["linear"],
    "--dtype": ["float32"],
    "--out": ["new", "run", "folder/new"],
    "--plot": ["p.png", "p.svg"],
    "--title": ["a title"],
    **{key: ["1", "3", "5"] for key in ("--steps", "--seed")},
    **{key: ["2"] for key in ("--t0", "--eval-every", "--snapshot-every")},
    **{key: ["50"] for key in ("--train-rows", "--test-rows")},
    **{key: ["1e-3"] for key in ("--k", "--lr")},
    **{key: ["4"] for key in ("--gamma", "--batch-size")},
}
ARGUMENTS = {
    "finetune": ["digits"],
    "seeds": ["digits"],
    "experiment": ["comparison", "forgetting"],
    "trial": ["lr=1e-3", "method=recadam", "pull=0.2"],
    "fetch": ["snli"],
}
LONG = (
    *("recadam_core.commands.certify", "recadam_harness.demo.pool", "recadam_harness.experiments.run.pool"),
    *("recadam_harness.experiments.run_trial", "recadam_harness.seeds.batch_order"),
    "recadam_harness.archives._download",
)
"""What takes minutes, and begins after everything was checked: here a command is stopped by an error."""


def stopped(*arguments, **options):
    raise RecAdamError("here it would begin")


def lines(count, rng, folder):
    tally = Tally("random command lines")
    import typer.main

    commands = {name: c.params for name, c in typer.main.get_command(whole()).commands.items()}
    ground = folder / "ground"
    (ground / "folder").mkdir(parents=True)
    (ground / "file.txt").write_text("mine")
    finetune(RunConfig.for_task("digits", "numpy", steps=3), ground / "run")
    cut_short(RunConfig.for_task("digits", "numpy", steps=24), ground / "cut", 7)
    was, here = tree(ground), Path.cwd()
    work = folder / "work"
    os.environ["COLUMNS"] = "200"
    while tally.tried < count:
        name = rng.choice(list(commands))
        arguments = [name]
        for param in commands[name]:
            flag = next((x for x in param.opts if x.startswith("--")), None)
            usual = name == "finetune" and flag in ("--backend", "--steps", "--out")
            if flag == "--help" or rng.random() > (0.95 if flag is None or usual else 0.15):
                continue
            if getattr(param, "is_flag", False):
                arguments.append(flag)
                continue
            fine = ARGUMENTS.get(name, ["run", "cut"]) if flag is None else FINE.get(flag, ["x"])
            value = rng.choice(fine if rng.random() < 0.75 else NONSENSE)
            arguments += [value] if flag is None else [flag, value]
        if rng.random() < 0.1:
            arguments.insert(rng.randrange(len(arguments) + 1), rng.choice(NONSENSE))
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(ground, work, symlinks=True)
        before = tree(work)
        os.chdir(work)
        try:
            with contextlib.ExitStack() as stack:
                for place in LONG:
                    stack.enter_context(mock.patch(place, stopped))
                code, _said, errors = call(arguments)
        finally:
            os.chdir(here)
        seen = f"recadam {arguments}"
        judge(tally, seen, code, errors, before, work)
        after = tree(work)
        for path, data in was.items():
            mine = path in ("file.txt", "folder") or (
                "--overwrite" not in arguments and "--resume" not in arguments
            )
            if mine and after.get(path, 0) != data:
                tally.fault("lost files", f"{seen}: {path}")
        tally.end({0: "done", 1: "exit 1", 2: "refused"}.get(code, "else"))
    return tally


PARTS = {
    "damages": damages,
    "kills": kills,
    "stops": stops,
    "pairs": pairs,
    "disks": disks,
    "lines": lines,
}


def campaign(counts, seed=0, folder=None):
    """Tallies of the parts, by name."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        tallies = []
        for name, count in counts.items():
            (part := Path(place) / name).mkdir()
            tallies.append(PARTS[name](count, random.Random(f"{seed} {name}"), part))
            print(f"{name}: {tallies[-1].row()}", file=sys.stderr, flush=True)
        return tallies


def table(tallies):
    rows = [["what", "tried", "how they ended", *COUNTS], ["---"] * 6, *(tally.row() for tally in tallies)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in PARTS:
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = campaign({name: getattr(given, name) for name in PARTS if getattr(given, name)}, given.seed)
    print(table(found))
    sys.exit(any(tally.wrong for tally in found))
