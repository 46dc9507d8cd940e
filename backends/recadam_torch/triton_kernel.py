"""The kernel in Triton, each operation rounded as the specification rounds it.

With `TRITON_INTERPRET=1` set before this module is imported it runs on CPU tensors, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from recadam_core import Coefficients

__all__ = ["launch"]

BLOCK = 1024
BLOCK_INTERPRETED = 65536


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(
    theta_at: Any,
    grad_at: Any,
    m_at: Any,
    v_at: Any,
    anchor_at: Any,
    scalars_at: Any,
    size: Any,
    pulls: tl.constexpr,
    decays: tl.constexpr,
    block: tl.constexpr,
) -> None:
    beta1, rest1 = tl.load(scalars_at), tl.load(scalars_at + 1)
    beta2, rest2 = tl.load(scalars_at + 2), tl.load(scalars_at + 3)
    step, eps = tl.load(scalars_at + 4), tl.load(scalars_at + 5)
    recall, decay = tl.load(scalars_at + 6), tl.load(scalars_at + 7)
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = i < size
    theta = tl.load(theta_at + i, mask=inside)
    grad = tl.load(grad_at + i, mask=inside)
    m = beta1 * tl.load(m_at + i, mask=inside) + rest1 * grad
    v = beta2 * tl.load(v_at + i, mask=inside) + rest2 * (grad * grad)
    if theta.dtype == tl.float64:  # the _rn functions are float32's; float64's own are rounded so
        adam = step * (m / (tl.sqrt(v) + eps))
    else:
        adam = step * tl.div_rn(m, tl.sqrt_rn(v) + eps)
    if pulls:
        delta = recall * (tl.load(anchor_at + i, mask=inside) - theta) - adam
    else:
        delta = -adam
    if decays:
        delta = delta - decay * theta
    tl.store(theta_at + i, theta + delta, mask=inside)
    tl.store(m_at + i, m, mask=inside)
    tl.store(v_at + i, v, mask=inside)


def launch(theta: Tensor, grad: Tensor, m: Tensor, v: Tensor, anchor: Tensor | None, c: Coefficients) -> None:
    """One step, in place on `theta`, `m` and `v`.

    Args:
        theta: parameter, contiguous, float32 or float64; overwritten.
        grad: gradient, theta's shape and dtype, contiguous.
        m: first moment, the same; overwritten.
        v: second moment, the same; overwritten.
        anchor: pretrained value, the same; None where `c.recall` is 0.
        c: coefficients, Python floats.

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12.
    """
    if not theta.numel():
        return
    numbers = (c.beta1, 1 - c.beta1, c.beta2, 1 - c.beta2, c.step, c.eps, c.recall, c.decay)
    scalars = torch.tensor(numbers, dtype=theta.dtype, device=theta.device)
    block = BLOCK
    if not theta.is_cuda:  # the interpreter takes its time by the block
        block = triton.next_power_of_2(min(theta.numel(), BLOCK_INTERPRETED))
    star = grad if anchor is None else anchor
    options: dict[str, Any] = {"enable_fp_fusion": False} if theta.is_cuda else {}
    _kernel[(triton.cdiv(theta.numel(), block),)](
        theta,
        grad,
        m,
        v,
        star,
        scalars,
        theta.numel(),
        pulls=anchor is not None,
        decays=c.decay != 0,
        block=block,
        **options,
    )
