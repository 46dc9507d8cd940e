"""PyTorch's backend: the kernel behind the protocol of recadam_core."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recadam_core import Capabilities, Coefficients, Hyperparameters, Moments
from recadam_core.backends import Stepper, functional_stepper

from .kernel import kernel_
from .optimizer import RecAdam

__all__ = ["TorchBackend", "backend"]


class TorchBackend:
    """The backend of PyTorch tensors.

    Example:
        >>> backend.owns(torch.ones(2))
        True
    """

    name = "torch"
    capabilities = Capabilities(
        dtypes=("bfloat16", "float16", "float32", "float64"),
        devices=("cpu", "cuda"),
        variants=("functional", "single", "foreach"),
        finetunes=("mlp", "bert"),
    )

    def owns(self, array: Any) -> bool:
        """Whether the object is a tensor."""
        return isinstance(array, Tensor)

    @torch.no_grad()
    def step(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        moments: Sequence[Moments],
        anchors: Sequence[Tensor] | None,
        c: Coefficients,
    ) -> tuple[list[Tensor], list[Moments]]:
        """One step in new memory, outside of any gradient tape."""
        thetas, ms, vs = (
            [self.copy(x) for x in xs] for xs in (params, (s.m for s in moments), (s.v for s in moments))
        )
        kernel_(thetas, list(grads), ms, vs, None if anchors is None else list(anchors), c)
        return thetas, [Moments(m, v) for m, v in zip(ms, vs, strict=True)]

    def stepper(
        self, variant: str, params: dict[str, Any], anchors: dict[str, Any], hp: Hyperparameters
    ) -> Stepper:
        """`recadam_torch.RecAdam`, stepping tensor by tensor or over lists; or the functional one."""
        if variant == "functional":
            return functional_stepper(self, params, anchors, hp)
        settings = {field.name: getattr(hp, field.name) for field in dataclasses.fields(hp)}
        optimizer = RecAdam(params.items(), anchors=anchors, foreach=variant == "foreach", **settings)

        def step(grads: dict[str, Tensor], lr: float) -> dict[str, Tensor]:
            for name, theta in params.items():
                theta.grad = grads[name]
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            return params

        return step

    def from_numpy(self, array: np.ndarray[Any, Any], dtype: str | None = None) -> Tensor:
        """A copy on the CPU."""
        return torch.tensor(array, dtype=getattr(torch, dtype or array.dtype.name))

    def to_numpy(self, array: Tensor) -> np.ndarray[Any, Any]:
        """A copy in NumPy; bfloat16, which NumPy lacks, as float32."""
        array = array.detach().cpu()
        return (array.float() if array.dtype is torch.bfloat16 else array).numpy().copy()

    def copy(self, array: Tensor) -> Tensor:
        """A detached clone."""
        return array.detach().clone()

    def precision(self, dtype: str) -> contextlib.AbstractContextManager[Any]:
        """Nothing to switch."""
        return contextlib.nullcontext()

    @property
    def engine(self) -> Any:
        """The engine that trains the harness's models with PyTorch."""
        from .engine import TorchEngine

        return TorchEngine


backend = TorchBackend()
