"""Anchors that are kept on the host, brought to the device a bucket at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["BUCKET", "Staging"]

BUCKET = 1 << 26
"""Bytes that are copied at once; a larger tensor is a bucket of its own."""

WORD = 16
"""Bytes to whose multiples a kernel likes its tensors to be placed."""


class Staging:
    """Two buffers on a device and a stream: one is filled while the step reads the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: list[Tensor | None] = [None, None]
        self._captured: list[Tensor] = []

    def __reduce__(self) -> tuple[type[Staging], tuple[torch.device]]:
        return Staging, (self._device,)

    def parts(self, anchors: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
        """Which anchors, and these on the device, until the next are asked for."""
        main = torch.cuda.current_stream(self._device)
        parts = buckets([_words(x) for x in anchors])
        sizes = [sum(_words(x) for x in anchors[part]) for part in parts]
        self._make(sizes)
        read: list[torch.cuda.Event] = []

        def copy(k: int) -> tuple[list[Tensor], torch.cuda.Event]:
            if k < 2:  # after all that was done with the buffers before
                self._stream.wait_stream(main)
            else:
                self._stream.wait_event(read[k - 2])
            buffer = self._buffers[k % 2]
            assert buffer is not None
            with torch.cuda.stream(self._stream):
                return _filled(buffer, anchors[parts[k]]), self._stream.record_event()

        ahead = copy(0)
        for k, part in enumerate(parts):
            stars, copied = ahead
            if k + 1 < len(parts):
                ahead = copy(k + 1)
            main.wait_event(copied)
            yield part, stars
            read.append(main.record_event())

    def _make(self, sizes: Sequence[int]) -> None:
        """Let the buffers be large enough; what a graph reads stays as it is."""
        for side in (0, 1):
            needed, buffer = max(sizes[side::2], default=0), self._buffers[side]
            if needed and (buffer is None or buffer.numel() < needed):
                self._buffers[side] = torch.empty(needed, dtype=torch.uint8, device=self._device)
        if torch.cuda.is_current_stream_capturing():
            self._captured += [x for x in self._buffers if x is not None]


def buckets(sizes: Sequence[int]) -> list[slice]:
    """Runs of tensors that fit into a bucket, by their bytes."""
    cuts, filled = [0], 0
    for i, size in enumerate(sizes):
        if filled and filled + size > BUCKET:
            cuts.append(i)
            filled = 0
        filled += size
    return [slice(*cut) for cut in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]


def _words(x: Tensor) -> int:
    return -(-x.nbytes // WORD) * WORD


def _filled(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors, one after another in a buffer."""
    copies = []
    for start, x in zip(accumulate((_words(x) for x in tensors), initial=0), tensors, strict=False):
        place = buffer.narrow(0, start, x.nbytes).view(x.dtype).view(x.shape)
        copies.append(place.copy_(x, non_blocking=True))
    return copies
