"""The kernel in one pass over memory: by numba on the CPU, by Triton on CUDA, by inductor on both.

Each takes the arguments of `kernel_` but `exact`, and gives the specification's bits. Memory is walked by
address, so numba's and Triton's look first at all that they get.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from operator import attrgetter, truediv
from pathlib import Path
from shutil import which
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recadam_core import Coefficients, RecAdamError
from recadam_core.update import formula

from .kernel import kernel_
from .memory import regular

__all__ = ["FUSED", "NumbaKernel", "chosen_fused", "fused_kernel"]


def chosen_fused(group: Mapping[str, Any], device: torch.device) -> str:
    """The one-pass kernel that a group's settings come to, for parameters on a device."""
    name = group["fused"]
    if name is False:
        return ""
    if name is None:
        others = group["foreach"] is not None or any(
            group[name] for name in ("exact", "differentiable", "capturable")
        )
        return "numba" if device.type == "cpu" and _has_numba() and not others else ""
    if name is True:
        name = "triton" if device.type == "cuda" else "numba" if _has_numba() else "compiled"
    if not isinstance(name, str) or name not in FUSED:
        raise RecAdamError(f"RecAdam: fused is {name!r}; give True, False, or one of {', '.join(FUSED)}")
    serves = {"numba": ("cpu",), "compiled": ("cpu", "cuda"), "triton": ("cuda",)}[name]
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        serves = ("cpu", "cuda")
    if device.type not in serves:
        raise RecAdamError(f"RecAdam: fused={name!r} does not run on {device.type}; give fused=False there")
    return name


def fused_kernel(name: str) -> Callable[..., None]:
    """A new one-pass kernel of this name."""
    if name == "numba":
        from recadam_numpy import one_pass  # noqa: F401  # says what to install
    if name == "compiled" and not torch.cuda.is_available() and not (which("g++") or which("clang++")):
        raise RecAdamError("RecAdam: fused='compiled' needs a C++ compiler; install g++, or give fused=False")
    if name == "triton" and find_spec("triton") is None:
        raise RecAdamError("RecAdam: fused='triton' needs 'triton'; pip install triton")
    return FUSED[name]()


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


class NumbaKernel:
    """One step by numba, over all tensors in one call.

    Every tensor is asked every step where its memory is, how much, and of what kind: a stale address is
    somebody else's memory.
    """

    def __init__(self) -> None:
        self._table: Any = None
        self._shape: Any = None
        self._filled: Any = None

    def __call__(
        self,
        thetas: list[Tensor],
        grads: list[Tensor],
        ms: list[Tensor],
        vs: list[Tensor],
        anchors: list[Tensor] | None,
        c: Coefficients,
        importances: list[Tensor] | None = None,
    ) -> None:
        """As `kernel_`."""
        run = self.lay(thetas, grads, ms, vs, anchors, importances)
        if run is None:  # moments of several widths, say
            exact = ms[0].dtype in _walkable()
            kernel_(thetas, grads, ms, vs, anchors, c, importances, exact)
        else:
            run(c)

    def lay(
        self,
        thetas: list[Tensor],
        grads: list[Tensor],
        ms: list[Tensor],
        vs: list[Tensor],
        anchors: list[Tensor] | None,
        importances: list[Tensor] | None = None,
    ) -> Callable[[Coefficients], None] | None:
        """Look at all that a step reads and writes; what then takes it, None for dtypes that are not walked.

        Raises:
            RecAdamError: when something cannot be stepped; which parameter it is, the checks of a step say.
        """
        from recadam_numpy.one_pass import Table

        wide = ms[0].dtype
        walkable = _walkable().get(wide)
        if walkable is None or {*map(_dtype, ms), *map(_dtype, vs)} - {wide}:
            return None
        shapes = list(map(_shape, thetas))
        columns: list[list[Tensor]] = []
        places: list[list[int]] = []
        # List by list: what is asked of a tensor a second time is in the caches then.
        for xs in (thetas, grads, ms, vs, anchors, importances):
            if xs is None:  # never read
                columns.append(columns[1])
                places.append(places[1])
            else:
                columns.append(
                    regular(xs, wide, walkable, shapes, _HOST, is_written=len(columns) in (0, 2, 3))
                )
                places.append(list(map(Tensor.data_ptr, columns[-1])))
        sizes = list(map(Tensor.numel, thetas))
        names = [str(xs[0].dtype).removeprefix("torch.") for xs in columns]
        shape = names, torch.get_num_threads(), sizes
        if shape != self._shape:
            self._table, self._shape = Table(sizes, names, shape[1]), shape
            self._filled = np.array(sizes) > 0
        table = self._table
        table.addresses[:] = places
        if not table.addresses.all() and not table.addresses[:, self._filled].all():
            raise RecAdamError("there is no memory to step over (a freed storage, or the meta device)")

        def run(c: Coefficients) -> None:
            table.run(c, anchors is not None, torch_team(), importances is not None)
            for old, new in ((thetas, columns[0]), (ms, columns[2]), (vs, columns[3])):
                if new is not old:
                    torch._foreach_copy_(old, new)
            # Written behind autograd's back: say so, for graphs that still hold the old values.
            torch.autograd.graph.increment_version(thetas)

        return run


_HOST = torch.device("cpu")
_dtype, _shape = map(attrgetter, ("dtype", "shape"))


@cache
def _walkable() -> dict[torch.dtype, frozenset[torch.dtype]]:
    """The dtypes that can be widened to one to compute in, by that."""
    from recadam_numpy.one_pass import has_half

    narrow = {torch.float32, torch.bfloat16, *([torch.float16] if has_half() else [])}
    return {torch.float32: frozenset(narrow), torch.float64: frozenset([torch.float64])}


@cache
def torch_team() -> Callable[[int, int, int], None] | None:
    """Torch's own threads for a compiled function; None where its OpenMP is not found.

    After an operation they wait for the next one awake, and would keep other threads from their cores.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"/\S*/torch/lib/lib(gomp|iomp5|omp)\S*\.so\S*", maps)
    try:
        parallel = ctypes.CDLL(found.group()).GOMP_parallel if found else None
    except (OSError, AttributeError):
        return None
    if parallel is None:
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return lambda function, pointer, workers: parallel(function, pointer, workers, 0)


def compiled_(
    thetas: list[Tensor],
    grads: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    anchors: list[Tensor] | None,
    c: Coefficients,
    importances: list[Tensor] | None = None,
) -> None:
    """One step by inductor: large tensors one by one in their places, small ones joined."""
    columns = [thetas, grads, ms, vs, *(xs for xs in (anchors, importances if anchors else None) if xs)]
    small = []
    for i, own in enumerate(zip(*columns, strict=True)):
        if own[0].numel() < SMALL or not all(map(Tensor.is_contiguous, own)):
            small.append(i)
        else:
            _inductor(c, *(x.detach().view(-1) for x in own))
    if not small:
        return
    wide = ms[0].dtype
    flat = [torch.cat([xs[i].detach().reshape(-1).to(wide) for i in small]) for xs in columns]
    if flat[0].numel() < 2:  # inductor would compile sizes 0 and 1 apart
        theta, grad, m, v, *others = ([x] for x in flat)
        star, weight, *_ = *others, None, None
        kernel_(theta, grad, m, v, star, c, weight, exact=True)
    else:
        _inductor(c, *flat)
    sizes = [thetas[i].numel() for i in small]
    for xs, new in zip((thetas, ms, vs), (flat[0], flat[2], flat[3]), strict=True):
        for i, part in zip(small, torch.split(new, sizes), strict=True):
            xs[i].copy_(part.view(xs[i].shape))


SMALL = 1 << 15
"""Elements below which a call of a compiled function costs more than joining the tensor to others."""


def _inductor(c: Coefficients, *columns: Tensor) -> None:
    # 0-d tensors: another number each step compiles nothing anew.
    number = columns[2].new_tensor
    decay = number(c.decay) if c.decay else None
    run = _compiled(*(x.dtype for x in columns), decay is None)
    run(columns, c.beta1, c.beta2, number(c.step), number(c.eps), number(c.recall), decay)


def triton_() -> Callable[..., None]:
    """One step by Triton, over all tensors in one launch."""
    from .triton_kernel import TritonKernel

    return TritonKernel(joins=os.environ.get("TRITON_INTERPRET") == "1")


FUSED: dict[str, Callable[[], Callable[..., None]]] = {
    "numba": NumbaKernel,
    "compiled": lambda: compiled_,
    "triton": triton_,
}
"""Makers of one-pass kernels by name."""


def _in_place(
    columns: tuple[Tensor, ...],
    beta1: float,
    beta2: float,
    step: Tensor,
    eps: Tensor,
    recall: Tensor,
    decay: Tensor | None,
) -> None:
    """The formula over whole tensors, for a compiler that rounds each operation by itself."""
    wide = columns[2].dtype
    old, grad, m, v, *others = (x.to(wide) for x in columns)
    anchor, importance, *_ = *others, None, None
    betas = beta1, 1 - beta1, beta2, 1 - beta2
    delta, m, v = formula(
        old, grad, m, v, anchor, importance, *betas, step, eps, recall, decay, torch.sqrt, truediv
    )
    for x, new in zip((columns[0], columns[2], columns[3]), (old + delta, m, v), strict=True):
        x.copy_(new)


@cache
def _compiled(*kind: Any) -> Callable[..., Any]:
    """The formula, compiled for one kind of arguments; a copy, since one is compiled only so often."""
    return torch.compile(FunctionType(_in_place.__code__.replace(), _in_place.__globals__), dynamic=True)
