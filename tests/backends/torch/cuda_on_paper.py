"""What a step would be on a CUDA device, without one: the kernel compiled for an H100, its launches counted.

    python tests/backends/torch/cuda_on_paper.py [--json]

prints the table of docs/benchmarks.md.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from fake_cuda import fake_cuda
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recadam_core import Constant
from recadam_torch import RecAdam, anchor
from recadam_torch.kernels.triton import CHUNK, THREADS, WARPS, _kernel, block_of

COLUMNS = ("theta", "grad", "m", "v", "anchor", "importance")
FLAGS = ("weighs", "decays", "chance", "negates", "scaled", "guarded")
WORDS = {
    "fma": r"\bfma\.",
    "ftz": r"\.ftz\b",
    "sqrt": r"\bsqrt\.rn",
    "div": r"\bdiv\.rn",
    "inexact": r"\b(?:div\.full|\w+\.approx)",
    "wide": r"\b(?:ld|st)\.global\.v[24]",
}
"""What is counted in the assembly; wide are reads and writes of several elements at once."""
TENSORS = 400
"""In the table; test_torch_cuda.py has other numbers of them."""
RATE = {"lr": 1e-5, "fused": "triton"}


class Case(NamedTuple):
    """A way to step: what is compiled, and the optimizer whose steps are counted."""

    types: dict[str, str] = {}  # noqa: RUF012  # of columns that are not float32
    flags: dict[str, bool] = {}  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012
    scaled: bool = False
    params: str = ""  # the parameters' dtype, where the kernel does not walk them

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameters."""
        names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
        return names.get(self.params or self.types.get("theta", ""), torch.float32)


HALF = dict.fromkeys(("theta", "grad", "anchor"), "bf16")
CASES = {
    "float32": Case(),
    "float32, weight decay": Case(flags={"decays": True}, options={"weight_decay": 0.01}),
    "float32, importance": Case(flags={"weighs": True}, options={"importance": True}),
    "float32, bfloat16 anchors": Case({"anchor": "bf16"}, options={"anchor_dtype": torch.bfloat16}),
    "float32, anchors freed": Case(flags={"pulls": False}, options={"freed": True}),
    "float32, capturable": Case(flags={"decays": True}, options={"capturable": True}),
    "float32, capturable, GradScaler": Case(
        flags={"decays": True, "scaled": True, "guarded": True}, options={"capturable": True}, scaled=True
    ),
    "bfloat16": Case(HALF),
    "bfloat16, stochastic": Case(HALF, {"chance": True}, {"rounding": "stochastic"}),
    "bfloat16, stochastic, capturable": Case(
        HALF, {"chance": True, "decays": True}, {"rounding": "stochastic", "capturable": True}
    ),
    "bfloat16, compensated": Case(
        dict.fromkeys(("grad", "anchor"), "bf16"), {}, {"rounding": "compensated"}, params="bf16"
    ),
    "float16": Case(dict.fromkeys(("theta", "grad", "anchor"), "fp16")),
    "float64": Case(dict.fromkeys((*COLUMNS, "scalars"), "fp64")),
    "the pull alone": Case(flags={"steps": False}),
}


def compiled(case: Case) -> Any:
    """The kernel for sm_90."""
    pointers = {f"{name}_like": f"*{case.types.get(name, 'fp32')}" for name in COLUMNS}
    scalars = case.types.get("scalars", "fp32")
    signature = {
        "table_at": "*i64", "chunks_at": "*i32", "scalars_at": f"*{scalars}", "keys_at": "*i64",
        "scale_at": "*fp32", "found_at": "*fp32", **pointers,
        **dict.fromkeys(("tensors", "programs", "stride"), "i32"),
    }  # fmt: skip
    known = {
        **dict.fromkeys(FLAGS, False), "steps": True, "pulls": True, "chunk": CHUNK, "narrow": THREADS,
        "block": block_of(torch.float64 if scalars == "fp64" else torch.float32), **case.flags,
    }  # fmt: skip
    names = _kernel.arg_names
    source = ASTSource(
        fn=_kernel,
        signature={**signature, **dict.fromkeys(known, "constexpr")},
        constexprs={(names.index(name),): value for name, value in known.items()},
    )
    options = {"enable_fp_fusion": False, "num_warps": WARPS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(kernel: Any) -> dict[str, int]:
    """Registers a thread, bytes of stack and of shared memory, by the tool that Triton brings."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", said)
    assert found, said
    return dict(zip(("registers", "stack", "shared"), map(int, found.groups()), strict=True))


def warps(registers: int) -> int:
    """How many warps find room on an H100's multiprocessor: 64, or what 65,536 registers suffice for."""
    a_warp = 32 * (-(-registers // 8) * 8)
    return min(64, 65536 // a_warp // WARPS * WARPS)


def counted(case: Case, tensors: int = TENSORS) -> dict[str, int]:
    """What one step launches, sends and waits for, once it is under way."""
    options = dict(case.options)
    with fake_cuda() as counts:
        size = {"device": "cuda", "dtype": case.dtype}
        params = [torch.nn.Parameter(torch.empty(100, 10, **size)) for _ in range(tensors)]
        for p in params:
            p.grad = torch.empty_like(p)
        named = [(str(i), p) for i, p in enumerate(params)]
        if case.flags.get("steps") is False:
            optimizer: Any = torch.optim.AdamW(named, lr=1e-5, fused=True)
            anchor(optimizer)
        else:
            if "anchor_dtype" in options:
                dtype = options.pop("anchor_dtype")
                options["anchors"] = {name: torch.empty_like(p, dtype=dtype) for name, p in named}
            if options.pop("importance", False):
                options["importance"] = {name: torch.empty_like(p) for name, p in named}
            if options.pop("freed", False):
                options["annealing"] = Constant(1.0, 0.0)
            if case.flags.get("decays"):
                options["weight_decay"] = 0.01
            optimizer = RecAdam(named, **{**RATE, **options})
        if case.scaled:
            optimizer.grad_scale, optimizer.found_inf = (torch.empty((), device="cuda") for _ in range(2))
        for _ in range(3):
            counts.clear()
            optimizer.step()
        if isinstance(optimizer, torch.optim.AdamW):  # its own
            counts.operations.subtract({"_fused_adamw_": 1, "_foreach_add_": 1})
        return {
            "launches": len(counts.launches),
            "operations": counts.operations.total(),
            "sent": sum(counts.sent.values()),
            "waits": sum(counts.waits.values()),
        }


def measured() -> dict[str, dict[str, int]]:
    """Every case."""
    found = {}
    for name, case in CASES.items():
        kernel = compiled(case)
        words = {word: len(re.findall(pattern, kernel.asm["ptx"])) for word, pattern in WORDS.items()}
        numbers = resources(kernel)
        found[name] = {
            **words,
            **numbers,
            "warps": warps(numbers["registers"]),
            "converted": kernel.asm["ttgir"].count("convert_layout"),
            **counted(case),
        }
    return found


def table(found: dict[str, dict[str, int]]) -> str:
    """As Markdown."""
    shown = {
        "registers": "registers", "warps": "warps of 64", "shared": "bytes of shared memory",
        "launches": "launches", "operations": "torch's operations", "sent": "copies to the device",
        "waits": "waits",
    }  # fmt: skip
    lines = [f"| | {' | '.join(shown.values())} |", "|---" * (len(shown) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(str(row[key]) for key in shown)} |" for name, row in found.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    found = measured()
    print(json.dumps(found) if "--json" in sys.argv else table(found))
