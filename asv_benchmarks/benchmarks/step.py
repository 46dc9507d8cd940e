"""One optimizer step: beside its peers, as it grows, in memory, at its start."""

from __future__ import annotations

from .common import GIVING_BACK, MODEL, PROFILE, ROUNDS, SHAPES, best, in_a_process, turns
from .contenders import JAX, NUMPY, TORCH, compiling, made, wanted

PEER = "torch AdamW fused"


class BesideTorch:
    """Steps on the CPU over torch's fused AdamW."""

    # The fast profile leaves out how peers compare with one another, which no change here makes slower.
    params = (
        [
            name
            for name in (*TORCH, *NUMPY)
            if name != PEER and (PROFILE != "fast" or name.startswith(("RecAdam", "NumPy")))
        ],
        MODEL,
    )
    param_names = ("contender", "parameters")
    unit = "times torch's fused AdamW"
    timeout = 300

    def setup(self, contender, _):
        wanted(PEER, contender)

    def track_step(self, contender, _):
        return best(turns(made([PEER, contender], SHAPES)), contender, PEER)

    track_step.pretty_name = "A step on the CPU"


class BesideOptax:
    """JAX's step over optax's AdamW."""

    params = (MODEL,)
    param_names = ("parameters",)
    unit = "times optax's AdamW"
    timeout = 300

    def setup(self, _):
        wanted(*JAX)

    def track_step(self, _):
        return best(turns(made(list(JAX), SHAPES)), "JAX RecAdam", "optax AdamW")

    track_step.pretty_name = "A step in JAX"

    def track_compile(self, _):
        return best(compiling(SHAPES, ROUNDS), "JAX RecAdam", "optax AdamW")

    track_compile.pretty_name = "Compiling a step in JAX"


class Growth:
    """RecAdam over torch's fused AdamW, by bytes of parameters and number of tensors."""

    params = (
        {"quick": [10**4], "fast": [10**4, 10**7], "regular": [10**4, 10**6, 10**8]}[PROFILE],
        [1, 100, 10_000],
    )
    param_names = ("bytes of parameters", "tensors")
    unit = "times torch's fused AdamW"
    timeout = 600

    def setup(self, size, count):
        wanted(PEER, "RecAdam")
        if size < 4 * count:
            raise NotImplementedError(f"{size} bytes are less than {count} float32 tensors")

    def track_step(self, size, count):
        shapes = [(size // 4 // count,)] * count
        return best(turns(made([PEER, "RecAdam"], shapes)), "RecAdam", PEER)

    track_step.pretty_name = "A step by bytes of parameters and number of tensors"


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

    track_peak.pretty_name = "Memory of a step at its peak, beyond what is kept"


class Start:
    """What comes before the first step: the best of some processes."""

    unit = "seconds"
    timeout = 300

    def setup(self):
        wanted("RecAdam")

    def track_import(self):
        return min(importing(ROUNDS))

    track_import.pretty_name = "import recadam_torch, after torch"

    def track_first_step(self):
        """Of the one-pass kernel with what it has compiled before on disk."""
        code = (
            "import time, torch\nfrom recadam_torch import RecAdam\np = torch.nn.Parameter(torch.ones(10))\n"
            "p.grad = torch.ones(10)\noptimizer = RecAdam([p], fused='numba')\nbegan = time.perf_counter()\n"
            "optimizer.step()\nprint(time.perf_counter() - began)"
        )
        return min(float(in_a_process(code)) for _ in range(min(ROUNDS, 3)))

    track_first_step.pretty_name = "The first step by numba, compiled before"


def importing(times):
    """Seconds of `import recadam_torch` beyond torch's own, each in a process of its own."""
    code = (
        "import time, torch\nbegan = time.perf_counter()\nimport recadam_torch\n"
        "print(time.perf_counter() - began)"
    )
    return [float(in_a_process(code)) for _ in range(times)]
