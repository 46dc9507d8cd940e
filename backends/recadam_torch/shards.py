"""Tensors that may be spread over processes: their local parts, and hashes that no sharding changes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "FIRST",
    "SECOND",
    "SHARED",
    "fingerprints",
    "in_memory",
    "is_sharded",
    "is_wrapper",
    "like",
    "local",
    "mix",
    "part",
    "part_of",
    "positions",
    "summed",
]

SHARED = "_recadam_shared"
"""The attribute of a plain parameter that is one process's part: the processes that have the others."""

_SEED = -0x61C8864680B583EB  # splitmix64's increment, as a signed number
FIRST, SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_CHUNK, _LAUNCHED = 2**16, 2**22  # elements at once: what a core's cache holds; what is worth a launch


def is_sharded(x: Any) -> bool:
    """Whether the tensor is a DTensor, without importing what would be slow to import."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(x, tensors.DTensor)


def is_wrapper(x: Tensor) -> bool:
    """Whether this process's part of a tensor is of a class that has no memory of its own to walk."""
    return type(local(x)).__torch_dispatch__ is not Tensor.__torch_dispatch__


def in_memory(x: Tensor) -> bool:
    """Whether there are values to read: not of a freed storage, nor on the meta device."""
    return not x.numel() or is_wrapper(x) or bool(local(x).data_ptr())


def local(x: Tensor, like: Tensor | None = None) -> Tensor:
    """This process's part of a tensor, not a copy; redistributed where `like` is sharded otherwise."""
    if not is_sharded(x):
        return x
    sharded: Any = x
    target: Any = like
    if target is not None and sharded.placements != target.placements:
        sharded = sharded.redistribute(target.device_mesh, target.placements)
    part: Tensor = sharded._local_tensor
    return part


def part(p: Tensor) -> tuple[slice, ...]:
    """Where this process's part of a parameter lies in the whole."""
    if not is_sharded(p):
        return tuple(slice(0, n) for n in p.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = p
    sizes, offsets = compute_local_shape_and_global_offset(
        sharded.shape, sharded.device_mesh, sharded.placements
    )
    return tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))


def like(p: Tensor, read: Callable[[tuple[slice, ...]], Tensor]) -> Tensor:
    """A tensor that is sharded as a parameter is, from what reads parts of the whole."""
    mine = read(part(p))
    if not is_sharded(p):
        return mine
    from torch.distributed.tensor import DTensor

    sharded: Any = p
    whole = {"shape": sharded.shape, "stride": sharded.stride()}
    return DTensor.from_local(mine, sharded.device_mesh, sharded.placements, run_check=False, **whole)


def part_of(whole: Tensor, p: Tensor) -> Tensor:
    """A copy of what belongs to a parameter, sharded as it is; of a sharded tensor as that is."""
    if is_sharded(whole):
        return whole.detach().clone()
    return like(p, lambda where: whole.detach()[where].to(p.device, copy=True))


def mix(x: Tensor) -> Tensor:
    """Thoroughly mixed bits (splitmix64's finalizer), elementwise.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014.
    """
    for shift, factor in ((30, FIRST), (27, SECOND)):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Bits moved right, zeros coming in: int64 has the arithmetic shift only."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def positions(where: Sequence[slice], shape: Sequence[int], device: torch.device) -> Tensor:
    """Positions in the flattened whole of a part's elements."""
    at = torch.zeros((), dtype=torch.int64, device=device)
    stride = 1
    for axis in reversed(range(len(shape))):
        along = torch.arange(where[axis].start, where[axis].stop, dtype=torch.int64, device=device) * stride
        at = at + along.reshape(-1, *(1,) * (len(shape) - 1 - axis))
        stride *= shape[axis]
    return at


def _hash(x: Tensor, where: Sequence[slice], shape: Sequence[int]) -> Tensor:
    """The sum over the part's elements of a hash of position and value, mod 2^64."""
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    if not shape:
        return mix(x.double().view(torch.int64) + _SEED)
    rows = max(1, (_CHUNK if x.device.type == "cpu" else _LAUNCHED) // max(1, x[:1].numel()))
    for start in range(0, x.shape[0], rows):
        values = x[start : start + rows].contiguous()
        first = where[0].start + start
        block = (slice(first, first + values.shape[0]), *where[1:])
        at = positions(block, shape, x.device)
        total += mix(values.double().view(torch.int64) + _SEED * (at + 1)).sum()
    return total


@torch.no_grad()
def fingerprints(tensors: Iterable[Tensor], rows: Iterable[int | None] | None = None) -> list[int]:
    r"""Content hashes of tensors, the same however they are sharded and in whatever dtype they fit.

    Math:
        $\sum_i h(i, x_i) \bmod 2^{64}$, with $h$ a mix of the position and the value's float64 bits. A sum
        takes no order, so each process adds up its own part.

    A checkpoint that pulls towards other weights is found out by it; an adversary is not.
    """
    tensors = list(tensors)
    counts = [None] * len(tensors) if rows is None else list(rows)
    parts = []
    for x, count in zip(tensors, counts, strict=True):
        mine, where = local(x), part(x)
        if count is not None:
            mine = mine[: max(0, count - where[0].start)]
        parts.append(_hash(mine, where, x.shape))
    return [int(total) or 1 for total in summed(parts, tensors)]


def summed(parts: Sequence[Tensor], owners: Sequence[Tensor]) -> list[Tensor]:
    """Sums over the processes among which tensors are spread."""
    sums = [x.cpu() for x in parts]
    shared: dict[Any, list[int]] = {}
    for index, x in enumerate(owners):
        groups: tuple[Any, ...] = (getattr(x, SHARED),) if hasattr(x, SHARED) else ()
        if is_sharded(x):
            sharded: Any = x
            dims = (d for d, place in enumerate(sharded.placements) if place.is_shard())
            groups = tuple(sharded.device_mesh.get_group(d) for d in dims)
        if groups:
            shared.setdefault((groups, x.device), []).append(index)
    for (groups, device), indices in shared.items():
        together = torch.stack([sums[i] for i in indices]).to(device)
        for group in groups:
            torch.distributed.all_reduce(together, group=group)
        for i, total in zip(indices, together.cpu(), strict=True):
            sums[i] = total
    return sums
