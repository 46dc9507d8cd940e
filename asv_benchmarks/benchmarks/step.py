"""One optimizer step: beside its peers, as it grows, in memory, at its start."""

from __future__ import annotations

import time

import numpy as np

from .common import GIVING_BACK, MODEL, PROFILE, ROUNDS, SHAPES, in_a_process, ratio, turns
from .contenders import JAX, NUMPY, TORCH, compilations, made, wanted

PEER = "torch AdamW fused"


class BesideTorch:
    """Steps on the CPU over torch's fused AdamW."""

    params = ([name for name in (*TORCH, *NUMPY) if name != PEER], MODEL)
    param_names = ("contender", "parameters")
    pretty_name = "A step on the CPU: time over torch's fused AdamW"
    unit = "times"
    timeout = 300

    def setup(self, contender, _):
        wanted(PEER, contender)

    def track_step(self, contender, _):
        return ratio(turns(made([PEER, contender], SHAPES)), contender, PEER)


class BesideOptax:
    """JAX's step over optax's AdamW."""

    params = (MODEL,)
    param_names = ("parameters",)
    unit = "times"
    timeout = 300

    def setup(self, _):
        wanted(*JAX)

    def track_step(self, _):
        return ratio(turns(made(list(JAX), SHAPES)), "JAX RecAdam", "optax AdamW")

    track_step.pretty_name = "JAX, a step: time over optax's AdamW"

    def track_compile(self, _):
        """Seconds to compile the step, over optax's, in turns."""
        seconds = {name: [] for name in JAX}
        for _round in range(ROUNDS):
            for name, program in compilations(SHAPES).items():
                began = time.perf_counter()
                program()
                seconds[name].append(time.perf_counter() - began)
        return ratio(seconds, "JAX RecAdam", "optax AdamW")

    track_compile.pretty_name = "JAX, compiling a step: time over optax's AdamW"


class Growth:
    """RecAdam over torch's fused AdamW, by bytes of parameters and number of tensors."""

    params = (
        {"quick": [10**4], "fast": [10**4, 10**7], "regular": [10**4, 10**6, 10**8]}[PROFILE],
        [1, 100, 10_000],
    )
    param_names = ("bytes of parameters", "tensors")
    pretty_name = "A step by size: time over torch's fused AdamW"
    unit = "times"
    timeout = 600

    def setup(self, size, count):
        wanted(PEER, "RecAdam")
        if size < 4 * count:
            raise NotImplementedError(f"{size} bytes are less than {count} float32 tensors")

    def track_step(self, size, count):
        shapes = [(size // 4 // count,)] * count
        return ratio(turns(made([PEER, "RecAdam"], shapes)), "RecAdam", PEER)


class Memory:
    """Bytes a parameter that a step needs beyond what it keeps."""

    params = (
        {
            "quick": ["RecAdam", "NumPy", "JAX RecAdam"],
            "fast": ["RecAdam", "RecAdam compiled", "RecAdam foreach", *NUMPY, "JAX RecAdam"],
            "regular": [name for name in (*TORCH, *NUMPY, *JAX) if name != "copy"],
        }[PROFILE],
        MODEL,
    )
    param_names = ("contender", "parameters")
    pretty_name = "Memory: what a step needs at its peak beyond what it keeps"
    unit = "bytes a parameter"
    timeout = 300

    def setup(self, contender, _):
        wanted(contender)

    def track_peak(self, contender, _):
        """In a process of its own, whose allocator gives back what is freed."""
        code = (
            "from benchmarks.common import SHAPES, SIZE, extra_memory\n"
            f"from benchmarks.contenders import made\nname = {contender!r}\n"
            "step = made([name], SHAPES)[name]\n"
            "step()\nstep()\nprint(extra_memory(step) / SIZE)"
        )
        return round(float(in_a_process(code, **GIVING_BACK).split()[-1]), 1)  # 0.02 is no worse than 0


class Start:
    """What comes before the first step."""

    unit = "seconds"
    timeout = 300

    def setup(self):
        wanted("RecAdam")

    def track_import(self):
        """Of `import recadam_torch` beyond torch's own; the median of some processes."""
        code = (
            "import time, torch\nbegan = time.perf_counter()\nimport recadam_torch\n"
            "print(time.perf_counter() - began)"
        )
        return float(np.median([float(in_a_process(code)) for _ in range(ROUNDS)]))

    track_import.pretty_name = "import recadam_torch: time beyond torch's own import"

    def track_first_step(self):
        """Of the one-pass kernel with what it has compiled before on disk."""
        code = (
            "import time, torch\nfrom recadam_torch import RecAdam\np = torch.nn.Parameter(torch.ones(10))\n"
            "p.grad = torch.ones(10)\noptimizer = RecAdam([p], fused='numba')\nbegan = time.perf_counter()\n"
            "optimizer.step()\nprint(time.perf_counter() - began)"
        )
        return float(np.median([float(in_a_process(code)) for _ in range(min(ROUNDS, 3))][1:]))

    track_first_step.pretty_name = "The first step by numba, compiled before: time"
