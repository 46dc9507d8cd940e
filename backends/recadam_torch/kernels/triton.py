"""The kernel in Triton: all tensors in one launch, each operation rounded as the specification rounds it.

With `TRITON_INTERPRET=1` set before this module is imported it runs on CPU tensors, for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from recadam_core import Coefficients
from recadam_core.update import formula

from ..memory import Laid, is_capturing, laid, wide_dtype
from ..rounding import number_of
from ..shards import FIRST, SECOND, mix

__all__ = ["CHUNK", "THREADS", "WARPS", "TritonKernel", "block_of"]

CHUNK = 1 << 14
"""Elements that a program steps."""

WALKABLE = frozenset([torch.float32, torch.float64, torch.bfloat16, torch.float16])

BLOCK = 1024
"""Elements that a program steps at once: with more there are fewer warps to hide the memory's delay."""

WARPS = 8

THREADS = 32 * WARPS


def block_of(wide: torch.dtype) -> int:
    """Elements that a program steps at once, of numbers that are computed in a dtype."""
    return BLOCK * torch.float32.itemsize // wide.itemsize


WRITTEN = (0, 2, 3)
"""Columns that a step writes: theta, m and v."""

_MIX_FIRST, _MIX_SECOND = tl.constexpr(FIRST), tl.constexpr(SECOND)


# Triton reads annotations as code: these have none.


@triton.jit
def _mix(x):
    """splitmix64's finalizer, as in `shards.mix`."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _at(address, like):
    return address.to(like.dtype)


@triton.jit
def _even(address, like):
    """The same where it is known to be a multiple of 16: memory is then read in words of 16 bytes."""
    return tl.multiple_of(address.to(like.dtype), 16)


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
            grad = _divide(grad.to(wide), tl.load(scale_at).to(wide))
            _put(grad_at + i, grad, inside)
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
    chunk: tl.constexpr, block: tl.constexpr, narrow: tl.constexpr,
):
    if guarded:  # noqa: SIM102  # the one is known when this is compiled, the other is not
        if tl.load(found_at) != 0:
            return
    program = tl.program_id(0)
    tensor = tl.load(chunks_at + program)
    start = tl.load(chunks_at + programs + program).to(tl.int64) * chunk
    theta_at = tl.load(table_at + tensor)
    grad_at = tl.load(table_at + tensors + tensor)
    m_at = tl.load(table_at + 2 * tensors + tensor)
    v_at = tl.load(table_at + 3 * tensors + tensor)
    anchor_at = tl.load(table_at + 4 * tensors + tensor)
    importance_at = tl.load(table_at + 5 * tensors + tensor)
    uneven = (theta_at | grad_at | m_at | v_at | anchor_at | importance_at) & 15
    size = tl.load(table_at + 6 * tensors + tensor)
    scalar_at = scalars_at + stride * tensor
    step_by = stride * tensors + (1 - stride)
    beta1, rest1 = tl.load(scalar_at), tl.load(scalar_at + step_by)
    beta2, rest2 = tl.load(scalar_at + 2 * step_by), tl.load(scalar_at + 3 * step_by)
    step, eps = tl.load(scalar_at + 4 * step_by), tl.load(scalar_at + 5 * step_by)
    pull, decay = tl.load(scalar_at + 6 * step_by), tl.load(scalar_at + 7 * step_by)
    key = tl.load(keys_at + tensor)
    # Of ends, and of what lies at odd addresses, a thread takes one element at a time.
    if (start + chunk <= size) & (uneven == 0):
        for offset in range(0, chunk, block):
            i = start + offset + tl.arange(0, block)
            _block(
                _even(theta_at, theta_like), _even(grad_at, grad_like), _even(m_at, m_like),
                _even(v_at, v_like), _even(anchor_at, anchor_like), _even(importance_at, importance_like),
                scale_at, key, i, size,
                beta1, rest1, beta2, rest2, step, eps, pull, decay,
                steps, pulls, weighs, decays, chance, negates, scaled, False,
            )
    else:
        for offset in range(0, chunk, narrow):
            i = start + offset + tl.arange(0, narrow)
            _block(
                _at(theta_at, theta_like), _at(grad_at, grad_like), _at(m_at, m_like),
                _at(v_at, v_like), _at(anchor_at, anchor_like), _at(importance_at, importance_like),
                scale_at, key, i, size,
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
        **more: Any,
    ) -> None:
        """One step, in place on `thetas`, `ms` and `vs`; on `grads` where there is a scale.

        Without gradients the pull alone, as `kernel_`. `more` is that of what `lay` returns.

        Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12.
        """
        given = (thetas, grads, ms, vs, anchors, importances)
        ordered, scaled = more.get("chance") is not None, more.get("scale") is not None
        self.lay(*given, ordered=ordered, scaled=scaled)(c, **more)

    def lay(
        self,
        thetas: list[Tensor],
        grads: list[Tensor] | None,
        ms: list[Tensor] | None,
        vs: list[Tensor] | None,
        anchors: list[Tensor] | None,
        importances: list[Tensor] | None = None,
        *,
        ordered: bool = False,
        scaled: bool = False,
    ) -> Callable[..., None]:
        """Look at all that a step reads and writes; what then takes it.

        Args:
            thetas: parameters, on one device, as all the rest; see `kernel_`.
            grads: gradients.
            ms: first moments.
            vs: second moments.
            anchors: pretrained values.
            importances: by which the pulls are multiplied.
            ordered: whether sums will be rounded by `chance`, which goes by the order of a tensor's elements.
            scaled: whether there will be a `scale`, by which gradients are divided in place.

        Returns:
            What takes coefficients and, by name, `negates`, whether gradients lead uphill; `chance`, the
            parameters' names and the step, or their step counts before it, where sums are rounded so; a
            GradScaler's `scale` and `found_inf`, of one element, on any device.

        Raises:
            RecAdamError: when something cannot be stepped; which parameter it is, the checks of a step say.
        """
        device = thetas[0].device
        wide = wide_dtype(thetas[0] if ms is None else ms[0])
        written = (*WRITTEN, 1) if scaled else WRITTEN
        given = (thetas, grads, ms, vs, anchors, importances)
        found = laid(given, wide, WALKABLE, device, written, ordered)
        return partial(self._run, found, wide, written)

    def _run(
        self,
        found: Laid,
        wide: torch.dtype,
        written: Sequence[int],
        c: Coefficients,
        negates: bool = False,
        chance: tuple[Sequence[str], int | Sequence[Tensor]] | None = None,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Take the step."""
        thetas, grads, _, _, anchors, importances = found.given
        assert thetas is not None
        if not any(map(Tensor.numel, thetas)):
            return
        device = thetas[0].device
        if self._joins and len(thetas) > 1 and chance is None and not any(isinstance(x, Tensor) for x in c):
            self._run_joined(found, c, negates, scale, found_inf)
            return
        interpreted = device.type != "cuda"
        options: dict[str, Any] = {} if interpreted else {"enable_fp_fusion": False, "num_warps": WARPS}
        # Triton launches on the device that is current, wherever the addresses lead.
        with nullcontext() if interpreted else torch.cuda.device(device):
            self._locate(found, device)
            scalars = self._scalars(c, len(thetas), wide, device)
            scale, found_inf = (
                x if x is None else x.to(device, non_blocking=True) for x in (scale, found_inf)
            )
            keys = None if chance is None else self._keys(*chance, device)
            programs = self._chunks.shape[1]
            _kernel[(programs,)](
                self._table,
                self._chunks,
                scalars,
                self._table if keys is None else keys,
                scalars if scale is None else scale,
                scalars if found_inf is None else found_inf,
                *(xs[0] for xs in found.columns),
                len(thetas),
                programs,
                int(scalars.shape[1] > 1),
                steps=grads is not None,
                pulls=anchors is not None,
                weighs=anchors is not None and importances is not None,
                decays=not (isinstance(c.decay, float) and c.decay == 0),
                chance=chance is not None,
                negates=negates,
                scaled=scale is not None,
                guarded=found_inf is not None,
                chunk=self._chunk,
                block=self._chunk if interpreted else block_of(wide),
                narrow=self._chunk if interpreted else THREADS,
                **options,
            )
        found.put_back(written)
        # Written behind autograd's back: say so, for graphs that still hold the old values.
        torch.autograd.graph.increment_version(thetas)

    def _run_joined(self, found: Laid, c: Coefficients, *more: Any) -> None:
        """The same over all tensors as one: the interpreter takes its time by the tensor."""
        given = [xs if xs is None else ys for xs, ys in zip(found.given, found.columns, strict=True)]
        flat = [xs and [torch.cat([x.detach().reshape(-1) for x in xs])] for xs in given]
        negates, scale, found_inf = more
        run = self.lay(*flat, scaled=scale is not None)  # type: ignore[arg-type]
        run(c, negates=negates, scale=scale, found_inf=found_inf)
        for old, new in zip(found.given[:4], flat, strict=False):
            if old is not None and new is not None:
                parts = torch.split(new[0], list(map(Tensor.numel, old)))
                torch._foreach_copy_(old, [x.view(y.shape) for x, y in zip(parts, old, strict=True)])

    def _locate(self, found: Laid, device: torch.device) -> None:
        """Bring the table of addresses, and the chunks, to the device where they have changed."""
        sizes = list(map(Tensor.numel, found.columns[0]))
        places = np.array([*found.places, sizes], dtype=np.int64)
        is_same = (sizes, device) == self._shape
        if not is_same:
            # The interpreter takes its time by the operation, and for the elements of a whole block.
            self._chunk = CHUNK if device.type == "cuda" else min(CHUNK, triton.next_power_of_2(max(sizes)))
            counts = -(-places[6] // self._chunk)
            owner = np.repeat(np.arange(len(sizes)), counts)
            chunk = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
            self._chunks = self._sent(np.stack([owner, chunk]).astype(np.int32), device)
            self._shape, self._places = (sizes, device), None
        if self._places is None or not np.array_equal(places, self._places):
            self._table, self._places = self._sent(places, device), places
            is_same = False
        if is_capturing(found.columns[0][:1]):
            self._captured += [self._table, self._chunks]  # which the graph reads at every replay
            if not is_same:  # what is sent while capturing is there once the graph is replayed, not before
                self._shape = self._places = None

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

    def _keys(self, names: Sequence[str], t: int | Sequence[Tensor], device: torch.device) -> Tensor:
        """For each parameter what `key_of` is."""
        numbers = np.array(list(map(number_of, names)), dtype=np.int64)
        if isinstance(t, int):
            return self._sent(mix(torch.from_numpy(numbers + t)).numpy(), device)
        return mix(torch.stack(list(t)).long() + 1 + self._sent(numbers, device))

    def _sent(self, array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
        """The array on the device, without waiting for it."""
        tensor = torch.from_numpy(array)
        if device.type != "cuda":
            return tensor
        tensor = tensor.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            self._captured.append(tensor)  # a graph copies it again at every replay
        return tensor.to(device, non_blocking=True)
