"""RecAdam on a GPU: is it right, how fast is it beside its peers, and does a CUDA graph hold it?

    python asv_benchmarks/gpu.py [--out docs/benchmarks] [--quick]

Takes under eight minutes. Writes NAME.json and NAME.md, NAME being the device's, whole or not at all.
Without a CUDA device it says so, claims nothing, and ends well.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from benchmarks.common import bert

from recadam_core import Constant, Sigmoid
from recadam_core.files import replacing
from recadam_torch import RecAdam

CURVE = Constant(task=1.0, recall=1.0)
SETTINGS = {"lr": 1e-5, "gamma": 100.0, "annealing": CURVE}
F32, B16 = torch.float32, torch.bfloat16


def llama(layers: int, hidden: int, inner: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Shapes of a Llama's parameters."""
    layer = [*[(hidden, hidden)] * 4, *[(inner, hidden)] * 2, (hidden, inner), (hidden,), (hidden,)]
    return [(vocabulary, hidden), *layer * layers, (hidden,), (vocabulary, hidden)]


SHAPES = {
    "BERT-base": bert(12, 768, 30522),
    "BERT-large": bert(24, 1024, 30522),
    # A quarter of the layers of a 7B model, so that all the contenders' states fit beside one another.
    "7B-like": llama(8, 4096, 11008, 32000),
}


class Contender:
    """A step with the bytes that it must move a parameter."""

    def __init__(self, name: str, moved: int, make) -> None:
        self.name, self.bytes, self.make = name, moved, make


def contenders(dtype: torch.dtype) -> list[Contender]:
    """Ours and our peers' on parameters of a dtype; moments are float32 but for torch's own."""
    size = dtype.itemsize

    def adamw(params, named, **flags):
        return torch.optim.AdamW(params, lr=1e-5, **flags)

    def ours(params, named, anchor=None, freed=False, **flags):
        anchors = {n: p.detach().to(anchor) for n, p in named} if anchor else None
        curve = Constant(task=1.0, recall=0.0) if freed else CURVE
        return RecAdam(named, anchors=anchors, **{**SETTINGS, "annealing": curve}, **flags)

    theirs = 3 * size + 4 * size  # theta, gradient, theta; both moments read and written, in its dtype
    mine = 3 * size + 16
    found = [
        Contender("torch AdamW fused", theirs, lambda p, n: adamw(p, n, fused=True)),
        Contender("torch AdamW foreach", theirs, lambda p, n: adamw(p, n, foreach=True)),
        Contender("RecAdam", mine + size, lambda p, n: ours(p, n)),
        Contender("RecAdam, 16-bit anchors", mine + 2, lambda p, n: ours(p, n, anchor=B16)),
        Contender("RecAdam, anchors freed", mine, lambda p, n: ours(p, n, freed=True)),
        Contender("RecAdam capturable", mine + size, lambda p, n: ours(p, n, capturable=True)),
        Contender("RecAdam foreach", mine + size, lambda p, n: ours(p, n, foreach=True)),
    ]
    if dtype == B16:
        found.insert(
            5, Contender("RecAdam, stochastic", mine + 2, lambda p, n: ours(p, n, rounding="stochastic"))
        )
    return found


def made(shapes, dtype):
    """Parameters with gradients."""
    params = [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=dtype)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params, [(str(i), p) for i, p in enumerate(params)]


def milliseconds(step, rounds=9, calls=5):
    """The median time of a step on the device, by its own clock."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    found = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            step()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / calls)
    return statistics.median(found)


def bandwidth():
    """Bytes a second that a copy moves, read and written."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source)) / 1e3)


def timed(name, dtype):
    """Every contender in these shapes."""
    params, named = made(SHAPES[name], dtype)
    size = sum(p.numel() for p in params)
    rows = []
    for contender in contenders(dtype):
        try:
            optimizer = contender.make(params, named)
            torch.cuda.reset_peak_memory_stats()
            for _ in range(2):
                optimizer.step()
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            ms = milliseconds(optimizer.step)
            extra = (torch.cuda.max_memory_allocated() - held) / size
            began = time.perf_counter()
            optimizer.step()
            host = 1e3 * (time.perf_counter() - began)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            rows.append({"step": contender.name, "ms": None})
            continue
        finally:
            optimizer = None
            torch.cuda.empty_cache()
        speed = contender.bytes * size / ms * 1e3
        rows.append(
            {"step": contender.name, "ms": ms, "host_ms": host, "bytes": contender.bytes,
             "bytes_per_second": speed, "extra_bytes_per_parameter": extra}
        )  # fmt: skip
    return {"shapes": name, "dtype": str(dtype).removeprefix("torch."), "parameters": size, "rows": rows}


def beside_optax(name):
    """JAX's step over optax's, if JAX has the GPU."""
    code = (
        "import json, jax\n"
        "assert jax.default_backend() == 'gpu'\n"
        "from benchmarks.common import ratio, turns\n"
        "from benchmarks.contenders import JAX, made\n"
        f"import gpu\nprint(json.dumps(ratio(turns(made(list(JAX), gpu.SHAPES[{name!r}])), 'JAX RecAdam', "
        "'optax AdamW')))"
    )
    folder = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False
    )
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else None


def conformance():
    """The kit on the CUDA device: exact and fast, and what did not hold."""
    # The steppers' tensors are on the CPU in the kit, so what is held here is the optimizer on the device
    # against the specification on the host, over the kit's settings.
    found = {}
    for level, flags in {
        "triton, exact": {"fused": "triton"},
        "triton, capturable": {"fused": "triton", "capturable": True},
        "foreach": {"foreach": True},
    }.items():
        worst = 0.0
        for form in ("decoupled", "released", "proximal"):
            for dtype in (F32, torch.float64):
                worst = max(worst, apart(form, dtype, flags))
        found[level] = worst
    return found


def apart(form, dtype, flags, steps=200):
    """Largest share of the way by which a trajectory on the device leaves the exact one on the host."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator, dtype=dtype) for s in ((300, 7), (1,), (65, 1025))]
    anchors = {str(i): torch.randn(x.shape, generator=generator, dtype=dtype) for i, x in enumerate(start)}
    settings = {
        "lr": 1e-2,
        "gamma": 10.0,
        "form": form,
        "weight_decay": 0.01,
        "annealing": Sigmoid(k=0.1, t0=60),
    }
    sides = []
    for device, more in (("cpu", {"exact": True}), ("cuda", flags)):
        params = [torch.nn.Parameter(x.clone().to(device)) for x in start]
        named = [(str(i), p) for i, p in enumerate(params)]
        optimizer = RecAdam(named, anchors=anchors, **settings, **more)
        sides.append((params, optimizer, device))
    for _ in range(steps):
        grads = [torch.randn(x.shape, generator=generator, dtype=dtype) for x in start]
        for params, optimizer, device in sides:
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(device)
            optimizer.step()
    pairs = list(zip(sides[0][0], sides[1][0], start, strict=True))
    return max(((p - q.cpu()).norm() / (p - x).norm()).item() for p, q, x in pairs)


def captured():
    """Does a CUDA graph replay the steps that are taken one by one? The largest difference."""
    sides = []
    for _ in range(2):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, device="cuda")) for s in ((100, 100), (7,))]
        named = [(str(i), p) for i, p in enumerate(params)]
        flags = {"lr": 1e-2, "gamma": 10.0, "annealing": Sigmoid(k=0.3, t0=10), "capturable": True}
        sides.append((params, RecAdam(named, **flags)))
    grads = [[torch.randn_like(p) for p in sides[0][0]] for _ in range(23)]
    static = [torch.zeros_like(p) for p in sides[0][0]]
    for p, g in zip(sides[0][0], static, strict=True):
        p.grad = g

    def feed(t):
        for g, new in zip(static, grads[t], strict=True):
            g.copy_(new)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for t in range(3):
            feed(t)
            sides[0][1].step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sides[0][1].step()
    for t in range(3, 23):
        feed(t)
        graph.replay()
    for t in range(23):
        for p, g in zip(sides[1][0], grads[t], strict=True):
            p.grad = g
        sides[1][1].step()
    return max((p - q).abs().max().item() for p, q in zip(sides[0][0], sides[1][0], strict=True))


def scaled():
    """Does a GradScaler that finds infinity leave everything as it is, without asking the device?"""
    p = torch.nn.Parameter(torch.ones(5, device="cuda"))
    anchors = {"p": torch.zeros(5)}
    optimizer = RecAdam([("p", p)], anchors=anchors, capturable=True, lr=1e-2, gamma=10.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    before = p.detach().clone()
    scaler.scale((p * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    return bool(torch.equal(p, before)) and float(optimizer.state[p]["step"]) == 0


def markdown(found) -> str:
    lines = [
        f"# {found['device']}",
        "",
        f"Measured {found['date']} by `python asv_benchmarks/gpu.py`: {found['versions']}. A copy moves "
        f"{found['copy_bytes_per_second'] / 1e9:,.0f} GB/s here, read and written.",
        "",
        "| held against the exact step on the host, 200 steps | largest difference, of the way |",
        "|---|---|",
        *(f"| {name} | {worst:.1e} |" for name, worst in found["conformance"].items()),
        "",
        f"A CUDA graph of the step against steps one by one: {found['graph_difference']:.1e} apart after 20 "
        f"replays. A GradScaler that found infinity changed {'nothing' if found['scaler'] else 'SOMETHING'}.",
    ]
    for table in found["tables"]:
        peer = table["rows"][0]
        lines += [
            "",
            f"## {table['shapes']}, {table['dtype']}: {table['parameters'] / 1e6:,.1f} million parameters",
            "",
            "| step | ms | over torch AdamW fused | floor by bytes | of the copy's bandwidth "
            "| ms on the host | more bytes a parameter |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in table["rows"]:
            if row["ms"] is None:
                lines.append(f"| {row['step']} | out of memory | | | | | |")
                continue
            over = row["ms"] / peer["ms"] if peer["ms"] else float("nan")
            share = row["bytes_per_second"] / found["copy_bytes_per_second"]
            lines.append(
                f"| {row['step']} | {row['ms']:.2f} | {over:.2f} | {row['bytes'] / peer['bytes']:.2f} | "
                f"{share:.0%} | {row['host_ms']:.2f} | {row['extra_bytes_per_parameter']:.1f} |"
            )
    if found["optax_ratio"] is not None:
        lines += ["", f"JAX: {found['optax_ratio']:.2f} of optax.adamw at BERT-base shapes."]
    return "\n".join(lines) + "\n"


def versions() -> str:
    names = {"torch": torch.__version__}
    for name in ("triton", "jax", "optax"):
        try:
            names[name] = version(name)
        except PackageNotFoundError:
            continue
    return ", ".join(f"{k} {v}" for k, v in {"Python": platform.python_version(), **names}.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder of what is written")
    parser.add_argument("--quick", action="store_true", help="BERT-base alone")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured, nothing is claimed")
        return
    name = torch.cuda.get_device_name()
    found = {
        "device": name,
        "date": str(datetime.date.today()),
        "versions": versions(),
        "copy_bytes_per_second": bandwidth(),
        "conformance": conformance(),
        "graph_difference": captured(),
        "scaler": scaled(),
        "tables": [],
    }
    plan = [("BERT-base", F32)] if options.quick else [(s, d) for d in (F32, B16) for s in SHAPES]
    for shapes, dtype in plan:
        print(f"{shapes}, {dtype}", file=sys.stderr, flush=True)
        found["tables"].append(timed(shapes, dtype))
    found["optax_ratio"] = beside_optax("BERT-base")
    stem = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
    for suffix, text in ((".json", json.dumps(found, indent=1) + "\n"), (".md", markdown(found))):
        with replacing(options.out / (stem + suffix)) as beside:
            beside.write_text(text, encoding="utf-8")
    print(markdown(found))
    print(options.out / (stem + ".md"))


if __name__ == "__main__":
    main()
