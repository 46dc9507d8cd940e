"""Tensors as kernels that walk memory need them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from recadam_core import RecAdamError

__all__ = ["Laid", "cast", "is_capturing", "is_writable", "laid", "reshaped", "wide_dtype"]

_dtype, _device, _shape = map(attrgetter, ("dtype", "device", "shape"))


class Laid(NamedTuple):
    """Columns of tensors whose memory a one-pass kernel can walk side by side."""

    given: Sequence[list[Tensor] | None]
    columns: list[list[Tensor]]  # the very tensors that were given, or copies; of what was not, the first's
    places: list[list[int]]  # addresses

    def put_back(self, written: Iterable[int]) -> None:
        """Write what a kernel has written into copies to what these are of."""
        for k in written:
            old, new = self.given[k], self.columns[k]
            if old is None or old is new:
                continue
            pairs = [(x, y) for x, y in zip(old, new, strict=True) if x is not y]
            if pairs:
                torch._foreach_copy_([x for x, _ in pairs], [y for _, y in pairs])


def laid(
    given: Sequence[list[Tensor] | None],
    wide: torch.dtype,
    walkable: frozenset[torch.dtype],
    device: torch.device,
    written: Collection[int],
    ordered: bool = False,
) -> Laid:
    """Look at all that a kernel walks: tensors of a column in one dtype, those of a row laid out alike.

    Args:
        given: columns of as many tensors, the first of which is there; None for what is not read.
        wide: the dtype of copies of what is in none of `walkable`, or in several.
        walkable: the dtypes that the kernel reads.
        device: where it runs.
        written: places of the columns that it writes.
        ordered: whether elements have to lie in the order of their indices.

    Raises:
        RecAdamError: of what cannot be walked, without its name; nothing is changed then.
    """
    first = given[0]
    assert first is not None
    shapes = list(map(_shape, first))
    columns: list[list[Tensor]] = []
    places: list[list[int]] = []
    # Column by column: what is asked of a tensor a second time is in the caches then.
    for k, xs in enumerate(given):
        if xs is None:
            columns.append(columns[0])
            places.append(places[0])
            continue
        if list(map(_shape, xs)) != shapes:
            raise RecAdamError("a parameter, its gradient, moments and anchor have several shapes")
        tensors = _typed(xs, wide, walkable, device, k in written)
        columns.append(_straight(tensors, columns[0] if columns else None, ordered))
        places.append(list(map(Tensor.data_ptr, columns[-1])))
        if 0 in places[-1] and any(not at and x.numel() for at, x in zip(places[-1], xs, strict=True)):
            raise RecAdamError("there is no memory to step over (a freed storage, or the meta device)")
    return Laid(given, columns, places)


def _typed(
    tensors: list[Tensor],
    wide: torch.dtype,
    walkable: frozenset[torch.dtype],
    device: torch.device,
    is_written: bool,
) -> list[Tensor]:
    """The tensors on a device and in one dtype that can be read; the very list where they are."""
    dtypes, devices = set(map(_dtype, tensors)), set(map(_device, tensors))
    if any(place.type == "meta" for place in devices):
        raise RecAdamError("a parameter, its gradient, moments or anchor is on the meta device")
    negative = any(map(Tensor.is_neg, tensors))  # which only say that they are
    odd = is_written and (negative or not all(map(Tensor.is_contiguous, tensors)))
    if odd and not all(map(is_writable, tensors)):
        raise RecAdamError("a parameter, its gradient or a moment is a view that cannot be written to")
    if negative:
        tensors = [x.resolve_neg() for x in tensors]
    if len(dtypes) > 1 or not dtypes <= walkable:
        return [_sent(x, device, wide) for x in tensors]
    return [_sent(x, device, x.dtype) for x in tensors] if devices - {device} else tensors


def _sent(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor itself where it is already there and so."""
    if x.device == device and x.dtype == dtype:
        return x
    return x.detach().to(device, dtype, non_blocking=True)


def _straight(tensors: list[Tensor], first: list[Tensor] | None, ordered: bool) -> list[Tensor]:
    """The tensors in rows of memory, each laid out as its parameter; the very list where they are."""
    plain = first is None or all(map(Tensor.is_contiguous, first))
    if plain and all(map(Tensor.is_contiguous, tensors)):
        return tensors
    straight = []
    for i, x in enumerate(tensors):
        like = x if first is None else first[i]
        if like.is_contiguous() or (first is None and (ordered or not _is_dense(x))):
            straight.append(x if x.is_contiguous() else x.detach().contiguous())
        elif x.stride() == like.stride():
            straight.append(x)
        else:
            straight.append(torch.empty_like(like, dtype=x.dtype).copy_(x))
    return straight


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, in whatever order: as after a transposition."""
    size = 1
    for step, count in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if step != size:
            return False
        size *= count
    return True


def cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in another dtype: on a device in one launch for many of them."""
    if torch.compiler.is_compiling():  # whose own launches are fewer
        return [x.to(dtype, copy=True) for x in tensors]
    copies = [torch.empty_like(x, dtype=dtype, requires_grad=False) for x in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a tensor without moments is stepped: its own, at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def is_writable(x: Tensor) -> bool:
    """Whether each element of a dense tensor has a place of its own to be written to."""
    shared = x.numel() and any(step == 0 and n > 1 for step, n in zip(x.stride(), x.shape, strict=True))
    return not (shared or x.is_neg())


def is_capturing(tensors: Iterable[Tensor]) -> bool:
    """Whether a CUDA graph is being captured, which holds what is done with one of these, and its numbers."""
    return any(x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing()


def reshaped(name: str, theta: Tensor, what: str, other: Tensor) -> RecAdamError:
    """The error of what belongs to a parameter and has not its shape."""
    return RecAdamError(
        f"parameter {name!r} has shape {tuple(theta.shape)}, its {what} {tuple(other.shape)}: its shape was "
        "changed; make a new optimizer"
    )
