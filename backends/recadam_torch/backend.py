"""PyTorch's backend: the kernel behind the protocol of recadam_core."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recadam_core import Capabilities, Coefficients, Hyperparameters, Moments
from recadam_core.coefficients import pull_alone
from recadam_core.optimizer import functional_over
from recadam_core.variants import Exact, Stepper, Variant

from .kernels import fused_kernel, kernel_
from .optimizer import RecAdam

__all__ = ["TorchBackend", "backend"]


BY_NUMPY = Exact("exact=True", "the square root in one thread on the CPU, by NumPy; nothing on CUDA")


def _stepping(**way: Any) -> Callable[..., Stepper]:
    """Makes `recadam_torch.RecAdam` in one of its ways to step."""

    def make(params: Any, anchors: Any, hp: Any, exact: bool = False, importance: Any = None) -> Stepper:
        can = exact and not way.get("capturable")
        return _Stepper(params, anchors, hp, exact=can, importance=importance, **way)

    return make


def _pulling(kernel: Callable[[], Callable[..., None]], together: bool = True) -> Callable[..., list[Tensor]]:
    """Takes the pull alone by a kernel, in place."""

    @torch.no_grad()
    def pull(
        params: list[Tensor], anchors: list[Tensor], recall: float, importances: list[Tensor] | None = None
    ) -> list[Tensor]:
        c, run = pull_alone(recall), kernel()
        count = len(params)
        for part in [slice(0, count)] if together else [slice(i, i + 1) for i in range(count)]:
            run(params[part], None, None, None, anchors[part], c, importances and importances[part])
        return params

    return pull


def _way(name: str, exact: Exact, pull: Any = None, **way: Any) -> Variant:
    """A variant by one flag of the optimizer's."""
    ((flag, value),) = way.items()
    return Variant(name, f"RecAdam(..., {flag}={value})", exact, make=_stepping(**way), pull=pull)


class TorchBackend:
    """The backend of PyTorch tensors.

    Args:
        exact: whether to give the specification's bits; see `RecAdam`.

    Example:
        >>> backend.owns(torch.ones(2))
        True
    """

    name = "torch"
    capabilities = Capabilities(
        dtypes=("bfloat16", "float16", "float32", "float64"),
        devices=("cpu", "cuda"),
        sharding=True,
        variants=(
            Variant(
                "functional",
                "recadam_core.RecAdam",
                Exact("TorchBackend(exact=True)", BY_NUMPY.price),
                make=functional_over(lambda exact: TorchBackend(exact)),
                pull=lambda *given: TorchBackend().pull(*given),
            ),
            _way("single", BY_NUMPY, _pulling(lambda: kernel_, together=False), foreach=False),
            _way("foreach", BY_NUMPY, _pulling(lambda: kernel_), foreach=True),
            # Coefficients come from the device's exp, square roots from torch.
            _way("capturable", Exact("never", ""), capturable=True),
            Variant(
                "fused",
                'RecAdam(..., fused="numba")',
                needs=("numba",),
                make=_stepping(fused="numba"),
                pull=_pulling(lambda: fused_kernel("numba")),
            ),
            Variant(
                "compiled",
                'RecAdam(..., fused="compiled")',
                programs=(("g++", "clang++"),),
                make=_stepping(fused="compiled"),
                pull=_pulling(lambda: fused_kernel("compiled")),
            ),
            Variant(
                "triton",
                'RecAdam(..., fused="triton")',
                needs=("triton",),
                environment={"TRITON_INTERPRET": "1"},
                make=_stepping(fused="triton"),
                pull=_pulling(lambda: fused_kernel("triton")),
            ),
        ),
    )

    def __init__(self, exact: bool = False) -> None:
        self._exact = exact

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
        importances: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Moments]]:
        """One step in new memory, outside of any gradient tape."""
        thetas, ms, vs = (
            [self.copy(x) for x in xs] for xs in (params, (s.m for s in moments), (s.v for s in moments))
        )
        stars, weights = (None if xs is None else list(xs) for xs in (anchors, importances))
        kernel_(thetas, list(grads), ms, vs, stars, c, weights, self._exact)
        return thetas, [Moments(m, v) for m, v in zip(ms, vs, strict=True)]

    def pull(
        self,
        params: Sequence[Tensor],
        anchors: Sequence[Tensor],
        recall: float,
        importances: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """The pull alone in new memory, outside of any gradient tape."""
        stars, weights = (xs if xs is None else list(xs) for xs in (anchors, importances))
        return _pulling(lambda: kernel_)([self.copy(x) for x in params], stars, recall, weights)

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


class _Stepper:
    """`recadam_torch.RecAdam` as the conformance kit drives it."""

    def __init__(self, params: dict[str, Any], anchors: dict[str, Any], hp: Hyperparameters, **way: Any):
        settings = {field.name: getattr(hp, field.name) for field in dataclasses.fields(hp)}
        self.params = params
        self.optimizer = RecAdam(params.items(), anchors=anchors, **settings, **way)

    def __call__(self, grads: dict[str, Tensor], lr: float) -> dict[str, Tensor]:
        for name, theta in self.params.items():
            theta.grad = grads[name]
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        return self.params

    def moments(self) -> dict[str, Moments]:
        states = ((name, self.optimizer.state[theta]) for name, theta in self.params.items())
        return {name: Moments(state["exp_avg"], state["exp_avg_sq"]) for name, state in states}


backend = TorchBackend()
