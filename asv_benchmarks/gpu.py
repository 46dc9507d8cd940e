"""RecAdam on a GPU: is it right, how fast is it beside its peers, and does a CUDA graph hold it?

    python asv_benchmarks/gpu.py [PART ...] [--out FOLDER]

Takes under eight minutes. Each part is a process of its own, whose findings are written at once; of what is
there NAME.md is made at the end, NAME being the device's. Without a CUDA device it says so, claims nothing,
and ends well. `smoke.py` comes first: whether the kernel is right there.
"""

from __future__ import annotations

import datetime
import platform
import re
import statistics
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import parts

if __name__ == "__main__":  # as a part, or to start them, which says what is missing
    sys.path[:0] = [str(parts.ROOT), str(parts.ROOT / "backends")]

try:
    import torch
    from benchmarks.common import bert

    from recadam_core import Constant, Sigmoid
    from recadam_torch import RecAdam
    from recadam_torch.kernels import chosen_fused
except ImportError as error:
    sys.exit(parts.MISSING.format(name=error.name, script=Path(__file__).relative_to(parts.ROOT)))

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
        Contender("RecAdam", mine + size, lambda p, n: ours(p, n, fused="triton")),
        Contender("RecAdam, 16-bit anchors", mine + 2, lambda p, n: ours(p, n, anchor=B16, fused="triton")),
        Contender("RecAdam, anchors freed", mine, lambda p, n: ours(p, n, freed=True, fused="triton")),
        Contender(
            "RecAdam capturable", mine + size, lambda p, n: ours(p, n, capturable=True, fused="triton")
        ),
        Contender("RecAdam foreach", mine + size, lambda p, n: ours(p, n, foreach=True)),
    ]
    if dtype == B16:
        found.insert(
            5,
            Contender(
                "RecAdam, stochastic",
                mine + 2,
                lambda p, n: ours(p, n, rounding="stochastic", fused="triton"),
            ),
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
            kernel = "torch's"
            if isinstance(optimizer, RecAdam):
                kernel = chosen_fused(optimizer.param_groups[0], params[0].device) or "foreach"
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
            {"step": contender.name, "kernel": kernel, "ms": ms, "host_ms": host, "bytes": contender.bytes,
             "bytes_per_second": speed, "extra_bytes_per_parameter": extra}
        )  # fmt: skip
    return {"shapes": name, "dtype": str(dtype).removeprefix("torch."), "parameters": size, "rows": rows}


def beside_optax() -> dict[str, Any]:
    """JAX's step over optax's, if JAX has the GPU."""
    import jax

    if jax.default_backend() != "gpu":
        return {"left out": "JAX has no GPU here"}
    from benchmarks.common import ratio, turns
    from benchmarks.contenders import JAX
    from benchmarks.contenders import made as contenders_made

    return {
        "ratio": ratio(turns(contenders_made(list(JAX), SHAPES["BERT-base"])), "JAX RecAdam", "optax AdamW")
    }


BOUNDS = {"triton, exact": 0.0, "triton, capturable": 1e-5, "foreach": 1e-5}
"""How far a trajectory may come from the exact one, as a share of the way: coefficients that are computed on
the device differ in their last digits."""


def conformance() -> dict[str, Any]:
    """The optimizer on the device against the specification's bits on the host, over forms and dtypes."""
    flags: dict[str, dict[str, Any]] = {
        "triton, exact": {"fused": "triton"},
        "triton, capturable": {"fused": "triton", "capturable": True},
        "foreach": {"foreach": True, "fused": False},
    }
    rows: dict[str, float] = {}
    for level, settings in flags.items():
        found = [
            apart(form, dtype, settings)
            for form in ("decoupled", "released", "proximal")
            for dtype in (F32, torch.float64)
        ]
        rows[level] = max(found, key=lambda x: (x != x, x))  # NaN is worse than everything
    wrong = [f"{level}: {worst} of the way" for level, worst in rows.items() if not worst <= BOUNDS[level]]
    return {"rows": rows, "wrong": wrong}


STEPS = 200 if parts.device() == "cuda" else 10  # the interpreter takes its time


def apart(form, dtype, flags, steps=STEPS):
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
    for device, more in (("cpu", {"exact": True}), (parts.device(), flags)):
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
    return max(
        (((p - q.cpu()).norm() / (p - x).norm()).item() for p, q, x in pairs), key=lambda x: (x != x, x)
    )


def scaled() -> dict[str, Any]:
    """Does a GradScaler that finds infinity leave everything as it is, without asking the device?"""
    p = torch.nn.Parameter(torch.ones(5, device="cuda"))
    anchors = {"p": torch.zeros(5)}
    optimizer = RecAdam([("p", p)], anchors=anchors, capturable=True, fused="triton", lr=1e-2, gamma=10.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    before = p.detach().clone()
    scaler.scale((p * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    kept = bool(torch.equal(p, before)) and float(optimizer.state[p]["step"]) == 0
    return {"kept": kept, "wrong": [] if kept else ["infinite gradients have moved something"]}


def about() -> dict[str, Any]:
    """The device, and what a copy moves on it."""
    return {
        "device": torch.cuda.get_device_name(),
        "date": str(datetime.date.today()),
        "versions": versions(),
        "copy_bytes_per_second": bandwidth(),
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The page of what was found; what is not there is said."""
    here = found["about"]
    lines = [
        f"# {here['device']}",
        "",
        f"Measured {here['date']} by `python asv_benchmarks/gpu.py`: {here['versions']}. A copy moves "
        f"{here['copy_bytes_per_second'] / 1e9:,.0f} GB/s here, read and written.",
        "",
    ]
    missing = [name for name in PARTS if name not in found]
    wrong = [f"{name}: {line}" for name, part in found.items() for line in part.get("wrong", [])]
    lines += [f"Not measured: {', '.join(missing)}.", ""] if missing else []
    lines += ["**Wrong:**", "", *(f"- {line}" for line in wrong), ""] if wrong else []
    if "conformance" in found:
        lines += [
            "| held against the exact step on the host, 200 steps | largest difference, of the way |",
            "|---|---|",
        ]
        lines += [f"| {name} | {worst:.1e} |" for name, worst in found["conformance"]["rows"].items()]
    for name, part in found.items():
        if name in TABLES:
            lines += ["", *table_of(part, here["copy_bytes_per_second"])]
    if "ratio" in found.get("optax", {}):
        lines += ["", f"JAX: {found['optax']['ratio']:.2f} of optax.adamw at BERT-base shapes."]
    return "\n".join(lines) + "\n"


def table_of(part: Mapping[str, Any], copied: float) -> list[str]:
    """A table of contenders, as Markdown."""
    peer = part["rows"][0]
    lines = [
        f"## {part['shapes']}, {part['dtype']}: {part['parameters'] / 1e6:,.1f} million parameters",
        "",
        "| step | kernel | ms | over torch AdamW fused | floor by bytes | of the copy's bandwidth "
        "| ms on the host | more bytes a parameter |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        if row["ms"] is None:
            lines.append(f"| {row['step']} | | out of memory | | | | | |")
            continue
        over = row["ms"] / peer["ms"] if peer["ms"] else float("nan")
        floor, share = row["bytes"] / peer["bytes"], row["bytes_per_second"] / copied
        cells = [
            row["step"],
            row["kernel"],
            f"{row['ms']:.2f}",
            f"{over:.2f}",
            f"{floor:.2f}",
            f"{share:.0%}",
        ]
        cells += [f"{row['host_ms']:.2f}", f"{row['extra_bytes_per_parameter']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def finish(out: Path, found: Mapping[str, Any]) -> None:
    """Write the page."""
    if "about" not in found:
        return
    stem = re.sub(r"[^A-Za-z0-9]+", "-", found["about"]["device"]).strip("-").lower()
    (out / f"{stem}.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))
    print(out / f"{stem}.md")


def versions() -> str:
    names = {"torch": torch.__version__}
    for name in ("triton", "jax", "optax"):
        try:
            names[name] = version(name)
        except PackageNotFoundError:
            continue
    return ", ".join(f"{k} {v}" for k, v in {"Python": platform.python_version(), **names}.items())


TABLES = {f"{shapes} {str(dtype)[6:]}": (shapes, dtype) for dtype in (F32, B16) for shapes in SHAPES}
PARTS: dict[str, parts.Part] = {
    "about": about,
    "conformance": conformance,
    "scaler": scaled,
    **{name: lambda place=place: timed(*place) for name, place in TABLES.items()},
    "optax": beside_optax,
}

if __name__ == "__main__":
    parts.main(__file__, PARTS, __doc__.splitlines()[0], seconds=120, finish=finish)
