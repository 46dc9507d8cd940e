"""The kernel in Triton: all tensors in one launch, each operation rounded as the specification rounds it.

With `TRITON_INTERPRET=1` set before this module is imported it runs on CPU tensors, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from recadam_core import Coefficients
from recadam_core.update import formula

from ..memory import regular, wide_dtype
from ..shards import FIRST, SECOND

__all__ = ["CHUNK", "TritonKernel"]

CHUNK = 1 << 14
"""Elements that a program steps."""

WALKABLE = frozenset([torch.float32, torch.float64, torch.bfloat16, torch.float16])

BLOCK = 2048

_MIX_FIRST, _MIX_SECOND = tl.constexpr(FIRST), tl.constexpr(SECOND)


# Triton reads annotations as code: these have none.


@triton.jit
def _mix(x):
    """splitmix64's finalizer, as in `shards.mix`."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _at(address, like, aligned: tl.constexpr):
    pointer = address.to(like.dtype)
    return tl.multiple_of(pointer, 16) if aligned else pointer


@triton.jit
def _cut(x, more):
    """A float32 without the bits that bfloat16 lacks, after something was added to them."""
    cut = ((x.to(tl.int32, bitcast=True) + more) & -65536).to(tl.float32, bitcast=True)
    return tl.where((x == x) & (tl.abs(x) != float("inf")), cut, x)


@triton.jit
def _put(at, x, inside):
    """Store a number, rounded to the nearest; the interpreter's own cast to bfloat16 would cut it."""
    if at.dtype.element_ty == tl.bfloat16:
        odd = (x.to(tl.int32, bitcast=True) >> 16) & 1
        x = _cut(x, 0x7FFF + odd)
    tl.store(at, x.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _sqrt(x):
    if x.dtype == tl.float64:  # the _rn functions are float32's; float64's own are rounded so
        root = tl.sqrt(x)
    else:
        root = tl.sqrt_rn(x)
    return root


@triton.jit
def _divide(x, y):
    if x.dtype == tl.float64:
        quotient = x / y
    else:
        quotient = tl.div_rn(x, y)
    return quotient


# Triton looks for its language among a function's globals.
_formula = triton.jit(FunctionType(formula.__code__, globals(), "formula"))


# Rows of arguments that belong together.
# fmt: off


@triton.jit
def _block(
    theta_at, grad_at, m_at, v_at, anchor_at, importance_at, scale_at, key, i, size,
    beta1, rest1, beta2, rest2, step, eps, pull, decay,
    steps: tl.constexpr, pulls: tl.constexpr, weighs: tl.constexpr, decays: tl.constexpr,
    chance: tl.constexpr, negates: tl.constexpr, scaled: tl.constexpr, masked: tl.constexpr,
):
    """A block of elements; without a mask, which alone is read and written in words of 16 bytes."""
    wide = beta1.dtype
    inside = i < size if masked else None
    theta = tl.load(theta_at + i, mask=inside).to(wide)
    grad = None
    m = None
    v = None
    if steps:
        grad = tl.load(grad_at + i, mask=inside)
        if scaled:
            grad = tl.div_rn(grad.to(tl.float32), tl.load(scale_at))
            tl.store(grad_at + i, grad.to(grad_at.dtype.element_ty), mask=inside)
        grad = grad.to(wide)
        if negates:
            grad = -grad
        m = tl.load(m_at + i, mask=inside).to(wide)
        v = tl.load(v_at + i, mask=inside).to(wide)
    anchor = None
    importance = None
    factor = None
    if pulls:
        anchor = tl.load(anchor_at + i, mask=inside).to(wide)
    if weighs:
        importance = tl.load(importance_at + i, mask=inside).to(wide)
    if decays:
        factor = decay
    delta, m, v = _formula(
        theta, grad, m, v, anchor, importance,
        beta1, rest1, beta2, rest2, step, eps, pull, factor, _sqrt, _divide,
    )
    new = theta + delta
    if chance:
        bits = (_mix(i + key) & 0xFFFF).to(tl.int32)
        new = _cut(new, bits)
    _put(theta_at + i, new, inside)
    if steps:
        _put(m_at + i, m, inside)
        _put(v_at + i, v, inside)


@triton.jit
def _kernel(
    table_at,  # int64, (7, tensors): addresses of theta, grad, m, v, anchor and importance; elements
    chunks_at,  # int32, (2, programs): tensor, and chunk of it
    scalars_at,  # (8, 1) or (8, tensors)
    keys_at,  # int64, (tensors,): of the chance that rounds
    scale_at,  # float32: by which gradients were multiplied
    found_at,  # float32: not 0 where a gradient is not finite
    theta_like, grad_like, m_like, v_like, anchor_like, importance_like,
    tensors, programs, stride,
    steps: tl.constexpr, pulls: tl.constexpr, weighs: tl.constexpr, decays: tl.constexpr,
    chance: tl.constexpr, negates: tl.constexpr, scaled: tl.constexpr, guarded: tl.constexpr,
    aligned: tl.constexpr, chunk: tl.constexpr, block: tl.constexpr,
):
    if guarded:  # noqa: SIM102  # the one is known when this is compiled, the other is not
        if tl.load(found_at) != 0:
            return
    program = tl.program_id(0)
    tensor = tl.load(chunks_at + program)
    start = tl.load(chunks_at + programs + program).to(tl.int64) * chunk
    theta_at = _at(tl.load(table_at + tensor), theta_like, aligned)
    grad_at = _at(tl.load(table_at + tensors + tensor), grad_like, aligned)
    m_at = _at(tl.load(table_at + 2 * tensors + tensor), m_like, aligned)
    v_at = _at(tl.load(table_at + 3 * tensors + tensor), v_like, aligned)
    anchor_at = _at(tl.load(table_at + 4 * tensors + tensor), anchor_like, aligned)
    importance_at = _at(tl.load(table_at + 5 * tensors + tensor), importance_like, aligned)
    size = tl.load(table_at + 6 * tensors + tensor)
    scalar_at = scalars_at + stride * tensor
    step_by = stride * tensors + (1 - stride)
    beta1, rest1 = tl.load(scalar_at), tl.load(scalar_at + step_by)
    beta2, rest2 = tl.load(scalar_at + 2 * step_by), tl.load(scalar_at + 3 * step_by)
    step, eps = tl.load(scalar_at + 4 * step_by), tl.load(scalar_at + 5 * step_by)
    pull, decay = tl.load(scalar_at + 6 * step_by), tl.load(scalar_at + 7 * step_by)
    key = tl.load(keys_at + tensor)
    if start + chunk <= size:
        for offset in range(0, chunk, block):
            i = start + offset + tl.arange(0, block)
            _block(
                theta_at, grad_at, m_at, v_at, anchor_at, importance_at, scale_at, key, i, size,
                beta1, rest1, beta2, rest2, step, eps, pull, decay,
                steps, pulls, weighs, decays, chance, negates, scaled, False,
            )
    else:
        for offset in range(0, chunk, block):
            i = start + offset + tl.arange(0, block)
            _block(
                theta_at, grad_at, m_at, v_at, anchor_at, importance_at, scale_at, key, i, size,
                beta1, rest1, beta2, rest2, step, eps, pull, decay,
                steps, pulls, weighs, decays, chance, negates, scaled, True,
            )


# fmt: on


class TritonKernel:
    """One step by Triton, over all tensors in one launch; keeps on the device where they are."""

    def __init__(self, joins: bool = False) -> None:
        self._joins = joins
        self._shape: Any = None
        self._chunk = CHUNK
        self._chunks: Any = None
        self._places: Any = None
        self._table: Any = None
        self._captured: list[Tensor] = []

    def __call__(
        self,
        thetas: list[Tensor],
        grads: list[Tensor] | None,
        ms: list[Tensor] | None,
        vs: list[Tensor] | None,
        anchors: list[Tensor] | None,
        c: Coefficients,
        importances: list[Tensor] | None = None,
        negates: bool = False,
        keys: Tensor | None = None,
        scale: Tensor | None = None,
        found: Tensor | None = None,
    ) -> None:
        """One step, in place on `thetas`, `ms` and `vs`; on `grads` where there is a scale.

        Without gradients the pull alone, as `kernel_`; a scale is then none of it.

        Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12.
        """
        if not any(map(Tensor.numel, thetas)):
            return
        device = thetas[0].device
        wide = wide_dtype(thetas[0] if ms is None else ms[0])
        given = [thetas, grads, ms, vs, anchors, importances]
        shapes = [x.shape for x in thetas]
        # What is not given is not read.
        columns = [
            regular(thetas if xs is None else xs, wide, WALKABLE, shapes, device, is_written=k < 4)
            for k, xs in enumerate(given)
        ]
        if self._joins and len(thetas) > 1 and keys is None and not any(isinstance(x, Tensor) for x in c):
            sizes = list(map(Tensor.numel, thetas))
            flats = [[torch.cat([x.detach().reshape(-1) for x in xs])] for xs in columns]
            theta, *others = flats
            grad, m, v, star, weight = (x and y for x, y in zip(given[1:], others, strict=True))
            self(theta, grad, m, v, star, c, weight, negates, None, scale, found)
            for old, flat in zip(given[:4], flats, strict=False):
                if old is not None:
                    parts = torch.split(flat[0], sizes)
                    torch._foreach_copy_(old, [x.view(y.shape) for x, y in zip(parts, old, strict=True)])
            return
        self._locate(columns, device)
        scalars = self._scalars(c, len(thetas), wide, device)
        programs = self._chunks.shape[1]
        interpreted = device.type != "cuda"
        options: dict[str, Any] = {} if interpreted else {"enable_fp_fusion": False, "num_warps": 8}
        _kernel[(programs,)](
            self._table,
            self._chunks,
            scalars,
            self._table if keys is None else keys,
            scalars if scale is None else scale,
            scalars if found is None else found,
            *(xs[0] for xs in columns),
            len(thetas),
            programs,
            int(scalars.shape[1] > 1),
            steps=grads is not None,
            pulls=anchors is not None,
            weighs=anchors is not None and importances is not None,
            decays=not (isinstance(c.decay, float) and c.decay == 0),
            chance=keys is not None,
            negates=negates,
            scaled=scale is not None,
            guarded=found is not None,
            aligned=not bool((self._places[:6] % 16).any()),
            chunk=self._chunk,
            block=self._chunk if interpreted else BLOCK,
            **options,
        )
        for old, new in zip(given[:4], columns, strict=False):
            if new is not old and old is not None:
                torch._foreach_copy_(old, new)
        # Written behind autograd's back: say so, for graphs that still hold the old values.
        torch.autograd.graph.increment_version(thetas)

    def _locate(self, columns: Sequence[list[Tensor]], device: torch.device) -> None:
        """Bring the table of addresses, and the chunks, to the device where they have changed."""
        sizes = list(map(Tensor.numel, columns[0]))
        places = np.array([*(list(map(Tensor.data_ptr, xs)) for xs in columns), sizes], dtype=np.int64)
        if (sizes, device) != self._shape:
            # The interpreter takes its time by the operation, and for the elements of a whole block.
            self._chunk = CHUNK if device.type == "cuda" else min(CHUNK, triton.next_power_of_2(max(sizes)))
            counts = -(-places[6] // self._chunk)
            owner = np.repeat(np.arange(len(sizes)), counts)
            chunk = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
            self._chunks = self._sent(np.stack([owner, chunk]).astype(np.int32), device)
            self._shape, self._places = (sizes, device), None
        if self._places is None or not np.array_equal(places, self._places):
            self._table, self._places = self._sent(places, device), places
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured += [self._table, self._chunks]  # which the graph reads at every replay

    def _scalars(self, c: Coefficients, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        numbers = (c.beta1, 1 - c.beta1, c.beta2, 1 - c.beta2, c.step, c.eps, c.pull, c.decay)
        if not any(isinstance(x, Tensor) for x in numbers):
            return self._sent(np.array(numbers, dtype=str(dtype).removeprefix("torch."))[:, None], device)
        # Filled, not copied: a graph that is being captured waits for no copy from the host.
        return torch.stack(
            [
                x.to(device, dtype).expand(count)
                if isinstance(x, Tensor)
                else torch.full((count,), x, dtype=dtype, device=device)
                for x in numbers
            ]
        )

    def _sent(self, array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
        """The array on the device, without waiting for it."""
        tensor = torch.from_numpy(array)
        if device.type != "cuda":
            return tensor
        tensor = tensor.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            self._captured.append(tensor)  # a graph copies it again at every replay
        return tensor.to(device, non_blocking=True)
