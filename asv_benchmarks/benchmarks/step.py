"""One optimizer step: beside its peers, in every variant, as it grows, in memory, at its start."""

from __future__ import annotations

import time

import numpy as np

from recadam_core import Hyperparameters

from .common import GIVING_BACK, SHAPES, OverBackends, in_a_process, ratio, turns
from .contenders import JAX, NUMPY, TORCH, compilations, made

HP = Hyperparameters(lr=1e-5, gamma=5000.0)


class BesideTorch:
    """Steps on the CPU over torch's fused AdamW."""

    params = (tuple(name for name in (*TORCH, *NUMPY) if name != "torch AdamW fused"),)
    param_names = ("contender",)
    unit = "ratio"
    timeout = 300

    def track_step(self, contender):
        steps = made(["torch AdamW fused", contender], SHAPES)
        return ratio(turns(steps), contender, "torch AdamW fused")


class BesideOptax:
    """JAX's step over optax's AdamW."""

    unit = "ratio"
    timeout = 300

    def track_step(self):
        return ratio(turns(made(list(JAX), SHAPES)), "JAX RecAdam", "optax AdamW")

    def track_compile(self):
        """Seconds to compile the step, over optax's, in turns."""
        seconds = {name: [] for name in JAX}
        for _ in range(9):
            for name, program in compilations(SHAPES).items():
                began = time.perf_counter()
                program()
                seconds[name].append(time.perf_counter() - began)
        return ratio(seconds, "JAX RecAdam", "optax AdamW")


class Variants(OverBackends):
    """Every variant over its backend's functional form."""

    unit = "ratio"
    timeout = 600

    def track_step(self, which, device):
        reference = f"{which.split()[0]} functional"
        if which == reference:
            return 1.0
        steps = {name: self.step(name, device, HP) for name in (which, reference)}
        return ratio(turns(steps, warm=1), which, reference)


class Growth:
    """RecAdam over torch's fused AdamW, by bytes of parameters and number of tensors."""

    params = ([10**4, 10**6, 10**8], [1, 100, 10_000])
    param_names = ("bytes", "tensors")
    unit = "ratio"
    timeout = 600

    def track_step(self, size, count):
        if size < 4 * count:
            raise NotImplementedError
        shapes = [(size // 4 // count,)] * count
        return ratio(turns(made(["torch AdamW fused", "RecAdam"], shapes)), "RecAdam", "torch AdamW fused")


class Memory:
    """Bytes a parameter that a step needs beyond what it keeps."""

    params = (tuple(name for name in (*TORCH, *NUMPY, *JAX) if name != "copy"),)
    param_names = ("contender",)
    unit = "bytes"
    timeout = 300

    def track_peak(self, contender):
        """In a process of its own, whose allocator gives back what is freed."""
        code = (
            "import numpy as np\nfrom benchmarks.common import SHAPES, extra_memory\n"
            f"from benchmarks.contenders import made\nname = {contender!r}\n"
            "step = made([name], SHAPES)[name]\n"
            "step()\nstep()\nprint(extra_memory(step) / sum(int(np.prod(shape)) for shape in SHAPES))"
        )
        return float(in_a_process(code, **GIVING_BACK).split()[-1])


class Start:
    """What comes before the first step."""

    unit = "seconds"
    timeout = 300

    def track_import(self):
        """Of `import recadam_torch` beyond torch's own; the median of seven processes."""
        code = (
            "import time, torch\nbegan = time.perf_counter()\nimport recadam_torch\n"
            "print(time.perf_counter() - began)"
        )
        return float(np.median([float(in_a_process(code)) for _ in range(7)]))

    def track_first_step(self):
        """Of the one-pass kernel with what it has compiled before on disk."""
        code = (
            "import time, torch\nfrom recadam_torch import RecAdam\np = torch.nn.Parameter(torch.ones(10))\n"
            "p.grad = torch.ones(10)\noptimizer = RecAdam([p], fused='numba')\nbegan = time.perf_counter()\n"
            "optimizer.step()\nprint(time.perf_counter() - began)"
        )
        return float(np.median([float(in_a_process(code)) for _ in range(4)][1:]))
