"""The table of ratios that `make bench` prints, with the floor of bytes beside each and every target.

    python asv_benchmarks/report.py [--growth PICTURE] [--json FILE]
    python asv_benchmarks/report.py --profile
    python asv_benchmarks/report.py --harness

RECADAM_BENCH=regular takes the shapes of BERT-base (16 GB of memory); fast a small model's.
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import json
import os
import platform
import statistics
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from benchmarks.common import (
    GIVING_BACK,
    MODEL,
    PROFILE,
    SHAPES,
    SIZE,
    in_a_process,
    interquartile,
    ratio,
    turns,
)
from benchmarks.contenders import JAX, NUMPY, TORCH, compiling, made
from benchmarks.step import PEER, Memory, importing

from recadam_core import Hyperparameters
from recadam_harness.engines import make_engine
from recadam_harness.models import Bert
from recadam_harness.models.bert import BertConfig

BASE = 109_482_240
TARGETS = (
    ("RecAdam over torch AdamW fused", "RecAdam", PEER, 1.25),
    ("NumPy in place over torch AdamW fused", "NumPy in place", PEER, 1.25),
    ("RecAdam, bfloat16 anchors, over torch AdamW fused", "RecAdam, bfloat16 anchors", PEER, 1.15),
    ("RecAdam, anchors freed, over torch AdamW fused", "RecAdam, anchors freed", PEER, 1.05),
    ("RecAdam, importance, over torch AdamW fused", "RecAdam, importance", PEER, 1.35),
    ("AdamW fused, pulled, over torch AdamW fused", "AdamW fused, pulled", PEER, 1.5),
    ("RecAdam over the loop", "RecAdam", "loop", 0.25),
    ("JAX RecAdam over optax AdamW", "JAX RecAdam", "optax AdamW", 1.12),
    ("optax AdamW, pulled, over optax AdamW", "optax AdamW, pulled", "optax AdamW", 1.2),
)


def processor() -> str:
    """The processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def rows(names, seconds, peer, contenders):
    for name in names:
        low, high = interquartile(seconds, name, peer)
        moved = contenders[name].bytes
        speed = moved * SIZE / statistics.median(seconds[name]) / 1e9
        yield (
            f"| {name} | {contenders[name].about} | {1e3 * statistics.median(seconds[name]):.1f} | "
            f"{ratio(seconds, name, peer):.2f} ({low:.2f} to {high:.2f}) | "
            f"{moved / contenders[peer].bytes:.2f} | {speed:.1f} |"
        )


def head(peer):
    return [
        f"| step | | ms | over {peer} (middle half) | floor by bytes | GB/s of those bytes |",
        "|---|---|---|---|---|---|",
    ]


def scaling() -> list[str]:
    """How RecAdam and a copy gain from threads."""
    import torch

    cores = torch.get_num_threads()
    counts = sorted({min(2**k, cores) for k in range(10)})
    lines = ["| threads | copy, GB/s | RecAdam, GB/s | of the copy's |", "|---|---|---|---|"]
    steps = made(["copy", "RecAdam"], SHAPES)
    for count in counts:
        torch.set_num_threads(count)
        seconds = turns(steps)
        copy, ours = (
            TORCH[name].bytes * SIZE / statistics.median(seconds[name]) / 1e9 for name in ("copy", "RecAdam")
        )
        lines.append(f"| {count} | {copy:.1f} | {ours:.1f} | {ours / copy:.2f} |")
    torch.set_num_threads(cores)
    return lines


HELD = """
import json, pathlib, tempfile, torch
from benchmarks.common import SHAPES, arrays
from recadam_torch import Anchors, RecAdam
from recadam_core import Constant

def now():
    lines = dict(x.split(":", 1) for x in pathlib.Path("/proc/self/status").read_text().splitlines())
    return [int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")]

model = torch.nn.ParameterDict({{str(i): torch.nn.Parameter(torch.from_numpy(x))
                                 for i, x in enumerate(arrays(SHAPES, 0))}})
size = sum(p.numel() for p in model.parameters())
file = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
if {file}:
    from safetensors.torch import save_file
    save_file(dict(model.state_dict()), file)
warm = torch.nn.Parameter(torch.ones(3))
warm.grad = torch.ones(3)
optimizer = RecAdam([warm], fused="numba")
optimizer.step()
for p in model.parameters():
    p.grad = torch.ones_like(p)
before = now()
{make}
optimizer.step()
optimizer.step()
print(json.dumps([(b - a) / size for a, b in zip(before, now())]))
file.unlink(missing_ok=True)
"""
OURS = "optimizer = RecAdam(model.named_parameters(), lr=1e-5, gamma=100.0, annealing=Constant(1.0, {}){})"
HOLDERS = {
    "torch AdamW": (False, "optimizer = torch.optim.AdamW(model.parameters(), fused=True)"),
    "RecAdam": (False, OURS.format("1.0", "")),
    "RecAdam, bfloat16 anchors": (
        False, OURS.format("1.0", ", anchors=Anchors.of(model, dtype=torch.bfloat16)")
    ),
    'RecAdam, anchors in a file (place="file")': (
        True, OURS.format("1.0", ", anchors=Anchors.of(model, file, place='file')")
    ),
    "RecAdam, anchors freed": (False, OURS.format("0.0", "")),
}  # fmt: skip


def held() -> list[str]:
    """What optimizers keep, read off the process."""
    lines = ["| optimizer | bytes a parameter of its own | of the file's pages |", "|---|---|---|"]
    for name, (file, make) in HOLDERS.items():
        code = HELD.format(file=file, make=make)
        anonymous, mapped = json.loads(in_a_process(code, **GIVING_BACK).splitlines()[-1])
        lines.append(f"| {name} | {anonymous:.1f} | {max(0.0, mapped):.1f} |")
    return lines


def growth(picture: Path) -> list[str]:
    """RecAdam over torch's fused AdamW by size and number of tensors, as a table and a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = [10**k for k in range(4, 10)]
    counts = (1, 10, 100, 1000, 10_000)
    lines = ["| tensors | " + " | ".join(f"10^{k} bytes" for k in range(4, 10)) + " |", "|---" * 7 + "|"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for count in counts:
        found = []
        for size in sizes:
            if size < 16 * count:
                found.append((float("nan"), float("nan")))
                continue
            rounds = 15 if size < 10**8 else 5
            seconds = turns(made([PEER, "RecAdam"], [(size // 4 // count,)] * count), rounds=rounds)
            found.append((ratio(seconds, "RecAdam", PEER), statistics.median(seconds["RecAdam"])))
        shown = (f"{x:.2f}" if x == x else "" for x, _ in found)
        lines.append(f"| {count:,} | " + " | ".join(shown) + " |")
        label = f"{count:,} tensor" + "s" * (count > 1)
        left.plot(sizes, [x for x, _ in found], marker="o", label=label)
        right.plot(sizes, [1e3 * s for _, s in found], marker="o", label=label)
    left.axhline(32 / 28, color="black", linestyle=":", label="floor by bytes")
    left.set(xscale="log", yscale="log", xlabel="bytes of parameters", ylabel="over torch's fused AdamW")
    right.set(xscale="log", yscale="log", xlabel="bytes of parameters", ylabel="ms a step")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    return lines


def profile() -> None:
    """Where the time of a step over a thousand small tensors goes."""
    step = made(["RecAdam"], [(1000,)] * 1000)["RecAdam"]
    step()
    step()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(100):
        step()
    profiler.disable()
    found = sorted(((entry.inlinetime, entry.code) for entry in profiler.getstats()), key=lambda x: -x[0])
    total = sum(own for own, _ in found)
    print(f"| of {10 * total:.1f} ms a step | ms | share |\n|---|---|---|")
    for own, code in found[:8]:
        place = code if isinstance(code, str) else f"{Path(code.co_filename).name} {code.co_qualname}"
        print(f"| `{place}` | {10 * own:.2f} | {own / total:.0%} |")


def harness() -> None:
    """Print what a step of fine-tuning MiniLM takes, forward and backward pass and all, by framework."""
    bert = Bert(BertConfig(), classes=2)
    rng = np.random.default_rng(0)
    params = {name: 0.02 * rng.standard_normal(shape) for name, shape in bert.config.shapes().items()}
    params |= bert.init_head(rng)
    hp = Hyperparameters(lr=1e-5, gamma=100.0)
    batch = {
        "ids": rng.integers(0, bert.config.vocab_size, (16, 32)),
        "mask": np.ones((16, 32)),
        "targets": np.eye(2)[rng.integers(0, 2, 16)],
    }
    anchored = frozenset(bert.config.shapes())
    engines = {
        name: make_engine(name, bert, params, anchored, "recadam", hp, "float32") for name in ("torch", "jax")
    }
    seconds = turns({name: partial(engine.step, batch, 1e-5) for name, engine in engines.items()}, rounds=21)
    print("| step of the harness | ms | over torch (middle half) |\n|---|---|---|")
    for name in engines:
        low, high = interquartile(seconds, name, "torch")
        middle = 1e3 * statistics.median(seconds[name])
        print(f"| {name} | {middle:.0f} | {ratio(seconds, name, 'torch'):.2f} ({low:.2f} to {high:.2f}) |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--growth", type=Path, help="draw how the cost grows into this picture, too")
    parser.add_argument("--json", type=Path, help="write every round of every contender into this file, too")
    parser.add_argument("--growth-alone", type=Path, metavar="PICTURE", help="do that, and no more")
    parser.add_argument("--profile", action="store_true", help="profile a thousand small tensors, no more")
    parser.add_argument("--harness", action="store_true", help="time the harness's step, no more")
    options = parser.parse_args()
    if options.harness:
        harness()
        return
    if options.profile:
        profile()
        return
    if options.growth_alone:
        print("\n".join(growth(options.growth_alone)))
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "jax", "numpy", "numba"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{processor()}, {cores} cores; {packages}; {datetime.date.today()}.")
    shapes = "BERT-base" if SIZE == BASE else "a small BERT"
    print(f"{SIZE / 1e6:.1f} million float32 parameters in the shapes of {shapes}.\n")
    seconds = turns(made([*TORCH, *NUMPY], SHAPES))
    print("\n".join([*head(PEER), *rows([*TORCH, *NUMPY], seconds, PEER, {**TORCH, **NUMPY})]), flush=True)
    of_jax = turns(made(list(JAX), SHAPES))
    print("\n".join(["", *head("optax AdamW"), *rows(list(JAX), of_jax, "optax AdamW", JAX)]), flush=True)
    both = {**seconds, **of_jax}
    if options.json:
        options.json.write_text(json.dumps(both) + "\n")
    many = turns(made(["RecAdam", PEER], [(1000,)] * 1000), rounds=15)
    one = turns(made(["RecAdam", PEER], [(1_000_000,)]), rounds=15)
    spread = {
        name: statistics.median(many[name]) / statistics.median(one[name]) for name in ("RecAdam", PEER)
    }
    targets = [(what, ratio(both, ours, peer), bound) for what, ours, peer, bound in TARGETS]
    targets += [
        (
            "JAX RecAdam: compiling over optax AdamW's",
            ratio(compiling(SHAPES, 9), "JAX RecAdam", "optax AdamW"),
            1.2,
        ),
        ("a thousand tensors of a thousand over one of a million", spread["RecAdam"], 2.0),
        ("import recadam_torch beyond torch, seconds", statistics.median(importing(7)), 0.15),
    ]
    print("\n| target | measured | at most | |\n|---|---|---|---|")
    for what, measured, bound in targets:
        print(f"| {what} | {measured:.2f} | {bound:.2f} | {'holds' if measured <= bound else 'missed'} |")
    print(f"\n(Of torch's fused AdamW, the thousand small tensors take {spread[PEER]:.1f} times the one.)")
    print("\n| step | bytes a parameter beyond what it keeps, at the peak |\n|---|---|", flush=True)
    for name in (*TORCH, *NUMPY, *JAX):
        if name != "copy":
            print(f"| {name} | {Memory().track_peak(name, *MODEL):.1f} |", flush=True)
    print("\n".join(["", *held(), "", *scaling()]), flush=True)
    if options.growth:
        print()
        print("\n".join(growth(options.growth)))
    if PROFILE == "fast":
        print("\nThe caches hold a part of these; RECADAM_BENCH=regular does not fit.")


if __name__ == "__main__":
    main()
