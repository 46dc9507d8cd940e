"""The kernel in one pass over memory by numba: all tensors in one call, on torch's own threads."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recadam_core import Coefficients

from ..memory import laid, wide_dtype
from .lists import kernel_

__all__ = ["NumbaKernel", "torch_team"]

WRITTEN = (0, 2, 3)
"""Columns that a step writes: theta, m and v."""


class NumbaKernel:
    """One step by numba, over all tensors in one call.

    Every tensor is asked every step where its memory is, how much, and of what kind: a stale address is
    somebody else's memory.
    """

    def __init__(self) -> None:
        self._table: Any = None
        self._shape: Any = None

    def __call__(
        self,
        thetas: list[Tensor],
        grads: list[Tensor] | None,
        ms: list[Tensor] | None,
        vs: list[Tensor] | None,
        anchors: list[Tensor] | None,
        c: Coefficients,
        importances: list[Tensor] | None = None,
    ) -> None:
        """As `kernel_`."""
        run = self.lay(thetas, grads, ms, vs, anchors, importances)
        if run is None:  # moments of several widths, say
            exact = ms is not None and ms[0].dtype in _walkable()
            kernel_(thetas, grads, ms, vs, anchors, c, importances, exact)
        else:
            run(c)

    def lay(
        self,
        thetas: list[Tensor],
        grads: list[Tensor] | None,
        ms: list[Tensor] | None,
        vs: list[Tensor] | None,
        anchors: list[Tensor] | None,
        importances: list[Tensor] | None = None,
    ) -> Callable[[Coefficients], None] | None:
        """Look at all that a step reads and writes; what then takes it, None for dtypes that are not walked.

        Raises:
            RecAdamError: when something cannot be stepped; which parameter it is, the checks of a step say.
        """
        from recadam_numpy.one_pass import Table

        wide = wide_dtype(thetas[0]) if ms is None else ms[0].dtype
        walkable = _walkable().get(wide)
        if walkable is None or {*map(_dtype, ms or ()), *map(_dtype, vs or ())} - {wide}:
            return None
        columns = (thetas, grads, ms, vs, anchors, importances)
        found = laid(columns, wide, walkable, _HOST, WRITTEN)
        names = [
            None if xs is None and k < 4 else str(found.columns[k][0].dtype).removeprefix("torch.")
            for k, xs in enumerate(columns)
        ]
        sizes = list(map(Tensor.numel, thetas))
        shape = names, torch.get_num_threads(), sizes
        if shape != self._shape:
            self._table, self._shape = Table(sizes, names, shape[1]), shape
        table = self._table
        table.addresses[:] = found.places

        def run(c: Coefficients) -> None:
            table.run(c, anchors is not None, torch_team(), importances is not None)
            found.put_back(WRITTEN)
            # Written behind autograd's back: say so, for graphs that still hold the old values.
            torch.autograd.graph.increment_version(thetas)

        return run


_HOST = torch.device("cpu")
_dtype = attrgetter("dtype")


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
    library = re.search(r"/\S*/torch/lib/lib(gomp|iomp5|omp)\S*\.so\S*", maps)
    try:
        parallel = ctypes.CDLL(library.group()).GOMP_parallel if library else None
    except (OSError, AttributeError):
        return None
    if parallel is None:
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return lambda function, pointer, workers: parallel(function, pointer, workers, 0)
