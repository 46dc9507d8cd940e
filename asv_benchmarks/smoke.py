"""The first ten minutes on a CUDA device: is the kernel right there, before it is timed?

    python asv_benchmarks/smoke.py [bits small sync graphs blocks host] [--out FOLDER]

Each part is a process of its own and writes what it has found at once. Ends with 1 where a bit differs, a NaN
comes up or a part fails. Without a CUDA device it says so, claims nothing, and ends well; with
TRITON_INTERPRET=1 the parts that can do so run on the CPU.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import parts

SHAPES = ((300, 300), (7,), (3, 5), (), (1,), (0,), (2, (1 << 14) + 1))
MANY = 10_000


# What differs.


def differing(xs: list[Any], ys: list[Any]) -> int:
    """How many numbers have other bits; NaNs count where the others are none."""
    import torch

    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = 0
    for x, y in zip(xs, ys, strict=True):
        x, y = x.detach().cpu().reshape(-1), y.detach().cpu().reshape(-1)
        same = x.view(words[x.element_size()]) == y.view(words[y.element_size()])
        total += int((~same & ~(x.isnan() & y.isnan())).sum())
    return total


def columns(dtype: Any, anchor: Any, shapes: Any, seed: int = 0) -> list[Any]:
    """Theta, gradient, moments, anchor and importance on the CPU."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    drawn = lambda to: [torch.randn(s, generator=generator).to(to) for s in shapes]  # noqa: E731
    theta, grad, m, v, star, weight = (drawn(d) for d in (dtype, dtype, wide, wide, anchor, torch.float32))
    return [theta, grad, m, [x.abs() for x in v], star, [x.abs() for x in weight]]


def sent(lists: list[Any], odd: bool) -> list[Any]:
    """The same on the device, at odd addresses where that is asked for."""
    import torch

    def there(x: Any) -> Any:
        if not odd:
            return x.clone().to(parts.device())
        return torch.cat([x.new_zeros(1), x.reshape(-1)]).to(parts.device())[1:].view(x.shape)

    return [[there(x) for x in xs] for xs in lists]


def bits() -> dict[str, Any]:
    """Every way to call the kernel against the exact step on the CPU: differing bits."""
    import torch

    from recadam_core import Coefficients
    from recadam_torch import kernel_
    from recadam_torch.kernels.triton import TritonKernel
    from recadam_torch.rounding import noise, round_

    f32, b16 = torch.float32, torch.bfloat16
    kinds = [
        (f32, f32),
        (f32, b16),
        (torch.float64, torch.float64),
        (b16, b16),
        (b16, f32),
        (torch.float16,) * 2,
    ]
    flags = ("pulls", "decays", "weighs", "chance", "negates", "scaled", "odd")
    rows, wrong = {}, []
    for (dtype, anchor), chosen in itertools.product(
        kinds, itertools.product((False, True), repeat=len(flags))
    ):
        on = dict(zip(flags, chosen, strict=True))
        if (on["weighs"] and not on["pulls"]) or (on["chance"] and dtype != b16):
            continue
        if sum(chosen) > 3 and not all(chosen[:1] + chosen[4:]) and parts.device() == "cpu":
            continue  # the interpreter takes its time
        theirs = columns(dtype, anchor, SHAPES)
        ours = sent(theirs, on["odd"])
        c = Coefficients(0.9, 0.999, 1e-3, 1e-8, 0.25 if on["pulls"] else 0.0, 0.01 if on["decays"] else 0.0)
        theta, grad, m, v, star, weight = theirs
        more: dict[str, Any] = {"negates": on["negates"]}
        wide = grad
        if on["scaled"]:
            more["scale"] = torch.tensor(8.0, device=parts.device())
            wide = [g.to(m_.dtype) / 8.0 for g, m_ in zip(grad, m, strict=True)]
        if on["negates"]:
            wide = [-g for g in wide]
        names = [f"p{i}" for i in range(len(SHAPES))]
        stars, weights = (star, weight if on["weighs"] else None) if on["pulls"] else (None, None)
        if on["chance"]:
            more["chance"] = names, 7
            sums = [x.float() for x in theta]
            kernel_(sums, wide, m, v, stars, c, weights, exact=True)
            chances = [noise(x, name, 7) for x, name in zip(theta, names, strict=True)]
            round_(theta, sums, [], chances)
        else:
            kernel_(theta, wide, m, v, stars, c, weights, exact=True)
        kernel = TritonKernel()
        kernel(*ours[:4], ours[4] if on["pulls"] else None, c, ours[5] if on["weighs"] else None, **more)
        name = f"{str(dtype)[6:]}, {str(anchor)[6:]} anchors: " + (
            " ".join(k for k in flags if on[k]) or "plain"
        )
        apart = sum(differing(ours[k], theirs[k]) for k in (0, 2, 3))
        rows[name] = apart
        if apart:
            wrong.append(f"{name}: {apart} numbers differ")
    for capturable in (False, True):
        apart = trajectory(capturable, many=parts.device() == "cuda")
        name = f"{MANY} tensors, capturable={capturable}"
        rows[name] = apart
        # Computed on the device, coefficients are other ones in their last digits.
        if not apart <= (1e-5 if capturable else 0.0):
            wrong.append(f"{name}: {apart} of the way apart")
    return {"rows": rows, "wrong": wrong}


def trajectory(capturable: bool, many: bool, steps: int = 20) -> float:
    """How far an optimizer on the device comes from the exact one on the host, as a share of the way."""
    import torch

    from recadam_core import Sigmoid
    from recadam_torch import RecAdam

    shapes = [(11,)] * MANY if many else [(11,), (3, 4)]
    flags = {"fused": "triton", "capturable": capturable}
    settings = {"lr": 1e-2, "gamma": 10.0, "weight_decay": 0.01, "annealing": Sigmoid(k=0.5, t0=9.0)}
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator) for s in shapes]
    sides = []
    for where, more in (("cpu", {"exact": True}), (parts.device(), flags)):
        params = [torch.nn.Parameter(x.clone().to(where)) for x in start]
        sides.append(
            (where, params, RecAdam([(str(i), p) for i, p in enumerate(params)], **settings, **more))
        )
    for _ in range(steps):
        drawn = torch.randn(sum(map(torch.Tensor.numel, start)), generator=generator)
        grads = torch.split(drawn, [x.numel() for x in start])
        for where, params, optimizer in sides:
            for p, g in zip(params, grads, strict=True):
                p.grad = g.view(p.shape).to(where)
            optimizer.step()
    ours, theirs, first = (
        torch.cat([x.detach().cpu().reshape(-1) for x in xs]) for xs in (sides[1][1], sides[0][1], start)
    )
    return float((ours - theirs).norm() / (theirs - first).norm())


def small() -> dict[str, Any]:
    """A few steps under compute-sanitizer: no read or write beyond what is a tensor's."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"rows": {}, "left out": "compute-sanitizer is not installed here"}
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import smoke; print(smoke.few())"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = result.stdout.strip().splitlines()
    return {"rows": {"exit": result.returncode}, "wrong": lines[-5:] if result.returncode else []}


def few() -> float:
    """Steps of odd sizes, as `small` has them watched."""
    return trajectory(False, many=False, steps=3) + trajectory(True, many=False, steps=3)


def optimizer_of(**flags: Any) -> tuple[list[Any], Any]:
    """A small model on the device, and its optimizer."""
    import torch

    from recadam_core import Sigmoid
    from recadam_torch import RecAdam

    torch.manual_seed(0)
    dtype = torch.bfloat16 if flags.get("rounding") else torch.float32
    params = [
        torch.nn.Parameter(torch.randn(s, device=parts.device(), dtype=dtype)) for s in ((100, 100), (7,))
    ]
    settings = {"lr": 1e-2, "gamma": 10.0, "annealing": Sigmoid(k=0.3, t0=10.0), "fused": "triton"}
    optimizer = RecAdam([(str(i), p) for i, p in enumerate(params)], **{**settings, **flags})
    return params, optimizer


def sync() -> dict[str, Any]:
    """No step may wait for the device."""
    import torch

    rows, wrong = {}, []
    cases = {
        "plain": {}, "weight decay": {"weight_decay": 0.01}, "maximize": {"maximize": True},
        "capturable": {"capturable": True},
        "capturable, weight decay": {"capturable": True, "weight_decay": 0.01},
        "stochastic": {"rounding": "stochastic"}, "compensated": {"rounding": "compensated"},
        "stochastic, capturable": {"rounding": "stochastic", "capturable": True}, "foreach": {"fused": False},
    }  # fmt: skip
    for name, flags in cases.items():
        params, optimizer = optimizer_of(**flags)
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(2):
            optimizer.step()
        if parts.device() == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
            rows[name] = "waits for nothing"
        except RuntimeError as error:
            rows[name] = str(error).splitlines()[0]
            wrong.append(f"{name}: {rows[name]}")
        finally:
            if parts.device() == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return {"rows": rows, "wrong": wrong}


def graphs() -> dict[str, Any]:
    """Steps that a CUDA graph replays against the same ones taken one by one: differing bits."""

    if parts.device() != "cuda":
        return {"rows": {}, "left out": "graphs are CUDA's"}
    rows, wrong = {}, []
    cases = {
        f"decay {decay}, {rate} lr, {grads} gradients, {graphs} graph(s)": (decay, rate, grads, graphs)
        for decay, rate, grads, graphs in itertools.product(
            (0.0, 0.01), ("float", "tensor"), ("static", "captured"), (1, 2)
        )
    }
    for name, case in cases.items():
        try:
            rows[name] = replayed(*case)
        except RuntimeError as error:
            rows[name] = str(error).splitlines()[0]
        if rows[name] != 0:
            wrong.append(f"{name}: {rows[name]}")
    return {"rows": rows, "wrong": wrong}


def replayed(decay: float, rate: str, grads: str, count: int, steps: int = 12) -> int:
    """Numbers that differ when steps are replayed, from graphs in turn, the second one first."""
    import torch

    flags = {"capturable": True, "weight_decay": decay}
    lr = lambda: torch.full((), 1e-2, device="cuda") if rate == "tensor" else 1e-2  # noqa: E731
    params, optimizer = optimizer_of(lr=lr(), **flags)
    others, reference = optimizer_of(lr=lr(), **flags)
    fed = [[torch.randn_like(p) for p in params] for _ in range(steps)]
    source = [torch.zeros_like(p) for p in params]

    def step() -> None:
        for p, g in zip(params, source, strict=True):
            p.grad = g if grads == "static" else 2.0 * g - g
        optimizer.step()

    def feed(t: int) -> None:
        for g, new in zip(source, fed[t], strict=True):
            g.copy_(new)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for t in range(3):
            feed(t)
            step()
    torch.cuda.current_stream().wait_stream(side)
    made = []
    for _ in range(count):
        made.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(made[-1]):
            step()
    for t in range(3, steps):
        feed(t)
        made[-1 - t % count].replay()
    for t in range(steps):
        for p, g in zip(others, fed[t], strict=True):
            p.grad = g if grads == "static" else 2.0 * g - g
        reference.step()
    return differing(params, others)


def blocks() -> dict[str, Any]:
    """Block sizes and warps beside a copy and AdamW, for 335 million parameters: milliseconds."""
    import torch

    if parts.device() != "cuda":
        return {"rows": {}, "left out": "there is nothing to time"}
    from benchmarks.common import bert
    from gpu import made, milliseconds

    import recadam_torch.kernels.triton as module
    from recadam_core import Coefficients

    rows: dict[str, Any] = {}
    params, _ = made(bert(24, 1024, 30522), torch.float32)
    theta, grad = [p.detach() for p in params], [p.grad for p in params]
    m, v, star = ([torch.zeros_like(x) for x in theta] for _ in range(3))
    rows["copy"] = milliseconds(lambda: torch._foreach_copy_(star, theta))
    c = Coefficients(0.9, 0.999, 1e-5, 1e-8, 1e-3, 0.0)
    for block, warps in itertools.product((512, 1024, 2048), (4, 8, 16)):
        module.BLOCK, module.WARPS, module.THREADS = block, warps, 32 * warps
        kernel = module.TritonKernel()
        rows[f"block {block}, {warps} warps"] = milliseconds(lambda k=kernel: k(theta, grad, m, v, star, c))
    adamw = torch.optim.AdamW(params, lr=1e-5, fused=True)
    rows["torch AdamW fused"] = milliseconds(adamw.step)
    return {"rows": rows}


def host() -> dict[str, Any]:
    """Two billion bfloat16 parameters with anchors in pinned memory: the memory at the peak of 40 steps."""
    import torch

    if parts.device() != "cuda":
        return {"rows": {}, "left out": "there is one memory alone"}
    from recadam_core import Constant
    from recadam_torch import RecAdam

    size = {"device": "cuda", "dtype": torch.bfloat16}
    params = [torch.nn.Parameter(torch.zeros(4096, 4096, **size)) for _ in range(119)]
    for p in params:
        p.grad = torch.ones_like(p)
    named = [(str(i), p) for i, p in enumerate(params)]
    settings = {"lr": 1e-5, "gamma": 1000.0, "annealing": Constant(1.0, 1.0)}
    optimizer = RecAdam(named, **settings, fused="triton", rounding="stochastic")
    for state in optimizer.state.values():
        state["anchor"] = torch.zeros(4096, 4096, dtype=torch.bfloat16).pin_memory()
    optimizer.step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    peaks = []
    for _ in range(40):
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - held)
    most = 2 * (1 << 26)
    rows = {"parameters": sum(p.numel() for p in params), "peak beyond what is held, bytes": max(peaks)}
    return {
        "rows": rows,
        "wrong": [] if max(peaks) <= most else [f"a step took {max(peaks):,} bytes, not {most:,}"],
    }


if __name__ == "__main__":
    every = {f.__name__: f for f in (bits, small, sync, graphs, blocks, host)}
    parts.main(__file__, every, __doc__.splitlines()[0], seconds=300)
