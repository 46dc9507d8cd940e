"""The kernel in one pass over memory: numba or inductor on the CPU, Triton on CUDA.

Each takes the arguments of `kernel_` and gives the specification's bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from torch import Tensor

from recadam_core import Coefficients, RecAdamError

from .kernel import kernel_

__all__ = ["FUSED", "fused_kernel"]


def fused_kernel(name: str | bool, device: torch.device) -> Callable[..., None]:
    """The one-pass kernel of this name, or for this device.

    Args:
        name: one of `FUSED`; True for Triton on CUDA and under Triton's interpreter, else numba where
            it is installed, else inductor.
        device: where the tensors are.

    Returns:
        A function with the arguments of `kernel_`.

    Raises:
        RecAdamError: when the name is unknown, or there is none for this device.

    Example:
        >>> fused_kernel(True, torch.device("cpu")).__name__
        'numba_'
    """
    if name is True:
        if device.type == "cuda":
            name = "triton"
        else:
            name = "numba" if find_spec("numba") else "compiled"
    if not isinstance(name, str) or name not in FUSED:
        raise RecAdamError(f"RecAdam: fused is {name!r}; give True, False, or one of {', '.join(FUSED)}")
    serves = {"numba": ("cpu",), "compiled": ("cpu", "cuda"), "triton": ("cuda",)}[name]
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        serves = ("cpu", "cuda")
    if device.type not in serves:
        raise RecAdamError(f"RecAdam: fused={name!r} does not run on {device.type}; give fused=False there")
    if name == "numba":
        from recadam_numpy import one_pass  # noqa: F401  # says what to install
    if name == "compiled" and device.type == "cpu" and not (which("g++") or which("clang++")):
        raise RecAdamError("RecAdam: fused='compiled' needs a C++ compiler; install g++, or give fused=False")
    if name == "triton" and find_spec("triton") is None:
        raise RecAdamError("RecAdam: fused='triton' needs 'triton'; pip install triton")
    return FUSED[name]


def numba_(
    thetas: list[Tensor],
    grads: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    anchors: list[Tensor] | None,
    c: Coefficients,
) -> None:
    """One step by numba, tensor by tensor."""
    from recadam_numpy.one_pass import one_pass

    stars = [None] * len(thetas) if anchors is None else anchors
    for theta, grad, m, v, star in zip(thetas, grads, ms, vs, stars, strict=True):
        work = theta.to(m.dtype)  # theta itself unless it has 16 bits
        t, g, m_new, v_new = (x.detach().numpy() for x in (work, grad.to(m.dtype), m, v))
        one_pass(t, g, m_new, v_new, None if star is None else star.to(m.dtype).numpy(), c)
        if work is not theta:
            theta.copy_(work)
        # Written behind autograd's back: say so, for graphs that still hold the old values.
        torch.autograd.graph.increment_version([theta, m, v])


def compiled_(
    thetas: list[Tensor],
    grads: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    anchors: list[Tensor] | None,
    c: Coefficients,
) -> None:
    """One step by inductor, over all tensors in one flat one."""
    if sum(theta.numel() for theta in thetas) < 2:  # inductor would compile sizes 0 and 1 apart
        kernel_(thetas, grads, ms, vs, anchors, c, exact=True)
        return

    def run(flat: list[Tensor], star: Tensor | None) -> list[Tensor]:
        # 0-d tensors: another number each step compiles nothing anew.
        scalars: list[Any] = [flat[0].new_tensor(x) for x in (c.step, c.eps, c.recall, c.decay)]
        if not c.decay:
            scalars[3] = None
        arguments: list[Any] = [*flat, star, c.beta1, c.beta2, *scalars]
        return list(_compiled()(*arguments))

    _over_flat(run, thetas, grads, ms, vs, anchors)


def triton_(
    thetas: list[Tensor],
    grads: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    anchors: list[Tensor] | None,
    c: Coefficients,
) -> None:
    """One step by Triton, over all tensors in one flat one."""
    from .triton_kernel import launch

    def run(flat: list[Tensor], star: Tensor | None) -> list[Tensor]:
        theta, grad, m, v = flat
        launch(theta, grad, m, v, star, c)
        return [theta, m, v]

    _over_flat(run, thetas, grads, ms, vs, anchors)


FUSED: dict[str, Callable[..., None]] = {"numba": numba_, "compiled": compiled_, "triton": triton_}
"""One-pass kernels by name."""


def _formula(
    theta: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    anchor: Tensor | None,
    beta1: float,
    beta2: float,
    step: Tensor,
    eps: Tensor,
    recall: Tensor,
    decay: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula of `recadam_core.update`, for a compiler that rounds each operation by itself."""
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * (grad * grad)
    adam = step * (m / (v.sqrt() + eps))
    delta = -adam if anchor is None else recall * (anchor - theta) - adam
    if decay is not None:
        delta = delta - decay * theta
    return theta + delta, m, v


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_formula, dynamic=True)


def _over_flat(
    run: Callable[[list[Tensor], Tensor | None], list[Tensor]],
    thetas: list[Tensor],
    grads: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    anchors: list[Tensor] | None,
) -> None:
    """Join the tensors, run, and write theta, m and v back where they came from."""
    if not thetas:
        return
    dtype = ms[0].dtype

    def join(tensors: list[Tensor]) -> Tensor:
        return torch.cat([x.detach().reshape(-1).to(dtype) for x in tensors])

    new = run([join(xs) for xs in (thetas, grads, ms, vs)], None if anchors is None else join(anchors))
    sizes = [x.numel() for x in thetas]
    for xs, flat in zip((thetas, ms, vs), new, strict=True):
        for x, part in zip(xs, torch.split(flat, sizes), strict=True):
            x.copy_(part.view(x.shape))
