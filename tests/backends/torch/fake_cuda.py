"""CUDA tensors without a device or memory: what a step would launch, copy and wait for, counted."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Counts", "fake_cuda"]

READERS = {"__bool__": True, "__float__": 1.0, "__int__": 0, "item": 1.0, "tolist": []}
"""Ways to ask a tensor for its values, and what a fake one says."""


class Counts(TorchDispatchMode):
    """Counts what is done to tensors of a fake device, where it is entered.

    Attributes:
        launches: calls of a Triton kernel: the grid, the arguments, and the device that was current.
        operations: torch's operations that launch something on a device, by name.
        sent: copies from the host to a device, by name of the operation.
        waits: questions that the host asks a device, and has to wait for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Any, dict[str, Any], int | None]] = []
        self.operations: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.current: int | None = None
        self.capturing = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = kwargs.get("device")
        fake = device is not None and torch.device(device).type == "cuda"
        if fake or any(x.is_cuda for x in inputs):
            faked = lambda x: self.fakes.from_tensor(x) if isinstance(x, Tensor) else x  # noqa: E731
            with self.fakes:
                result = function(*tree_map(faked, args), **tree_map(faked, kwargs))
        else:
            result = function(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)] or inputs
        views = function.is_view or function is torch.ops.aten.detach.default
        if views or not any(x.is_cuda for x in (*inputs, *outputs)):
            return result
        name = function.overloadpacket.__name__
        copies = "copy" in name
        if copies and any(not x.is_cuda for x in outputs):
            self.waits[name] += 1
        elif copies and any(not x.is_cuda for x in inputs):
            self.sent[name] += 1
        elif "empty" not in name and name != "device":
            self.operations[name] += 1
        return result

    def __getitem__(self, grid: Any) -> Any:
        """As a Triton kernel is called."""

        def launch(*args: Any, **constants: Any) -> None:
            self.launches.append((grid, constants, self.current))

        return launch

    def clear(self) -> None:
        """Begin anew."""
        self.launches.clear()
        for counter in (self.operations, self.sent, self.waits):
            counter.clear()


@contextlib.contextmanager
def fake_cuda() -> Iterator[Counts]:
    """Tensors on "cuda" are fake ones, and Triton's kernel counts its calls, for as long as this lasts."""
    import recadam_torch.kernels as kernels
    import recadam_torch.kernels.triton as module

    counts, whole = Counts(), Tensor.__getitem__

    @contextlib.contextmanager
    def current(device: Any) -> Iterator[None]:
        before, counts.current = counts.current, torch.device(device).index or 0
        try:
            yield
        finally:
            counts.current = before

    def part(x: Tensor, key: Any) -> Tensor:
        if not isinstance(x, FakeTensor):
            return whole(x, key)
        axis = 0
        for one in key if isinstance(key, tuple) else (key,):
            if isinstance(one, int):
                x = x.select(axis, one)
            else:
                start, stop, step = one.indices(x.shape[axis])
                x = torch.ops.aten.slice.Tensor(x, axis, start, stop, step)
                axis += 1
        return x

    def asked(name: str, answer: Any, ours: Any) -> Any:
        def read(x: Tensor) -> Any:
            if not isinstance(x, FakeTensor):
                return ours(x)
            counts.waits[name] += x.is_cuda  # of a copy on the host the device was asked before
            return answer

        return read

    with contextlib.ExitStack() as stack:
        put = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        put(module, "_kernel", counts)
        put(kernels, "triton_fault", lambda: "")
        put(torch.cuda, "is_current_stream_capturing", lambda: counts.capturing)
        put(torch.cuda, "device", current)
        put(torch.cuda, "is_available", lambda: True)
        put(torch.cuda, "_lazy_init", lambda: None)
        put(Tensor, "pin_memory", lambda x: x)
        put(Tensor, "is_pinned", lambda x: True)
        place = Tensor.data_ptr
        put(Tensor, "data_ptr", lambda x: 16 * (id(x) % 2**40) if x.is_cuda and x.numel() else place(x))
        # These ask for a device before they are dispatched.
        put(Tensor, "__invert__", lambda x: torch.bitwise_not(x))
        put(Tensor, "copy_", lambda x, *y, **z: torch.ops.aten.copy_.default(x, *y, **z))
        put(Tensor, "__getitem__", part)
        for other in [m for name, m in sys.modules.items() if name.startswith("recadam_torch")]:
            if hasattr(other, "is_wrapper"):
                put(other, "is_wrapper", lambda x: False)  # as a tensor of a real device is none
        for name, answer in READERS.items():
            put(Tensor, name, asked(name, answer, getattr(Tensor, name)))
        yield stack.enter_context(counts)
