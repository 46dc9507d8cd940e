"""The kernel in PyTorch, in place, over lists of tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recadam_core import Coefficients

__all__ = ["kernel_"]


def kernel_(
    thetas: list[Tensor],
    grads: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    anchors: list[Tensor] | None,
    c: Coefficients,
    exact: bool = False,
    importances: list[Tensor] | None = None,
) -> None:
    r"""One step for tensors that share their coefficients, in place on `thetas`, `ms` and `vs`.

    Operation for operation that of `recadam_core.update`, as `torch._foreach` calls: one fused launch
    a line on CUDA, a loop over the list on CPU. None of torch's combined operations (`lerp`, `addcmul`,
    `addcdiv`, `add` with alpha) is used, since they round differently. With a list of one it is the
    single-tensor step, so the formula stands here once.

    Args:
        thetas: parameters; overwritten. 16-bit ones are summed in float32 and rounded once.
        grads: gradients, the parameters' shapes.
        ms: first moments, at least float32; overwritten.
        vs: second moments, at least float32; overwritten.
        anchors: pretrained values, the parameters' shapes; None where `c.recall` is 0.
        c: coefficients, Python floats.
        exact: whether to round the square root correctly, too, as torch's own does everywhere but on the
            CPU. There NumPy takes it then, on the tensors' memory and in one thread.
        importances: by which the pulls are multiplied, the parameters' shapes; None for 1.

    Example:
        >>> theta, m, v = torch.ones(2), torch.zeros(2), torch.zeros(2)
        >>> c = Coefficients(0.9, 0.999, 0.0, 1e-8, 0.25, 0.0)
        >>> kernel_([theta], [torch.ones(2)], [m], [v], [torch.zeros(2)], c)
        >>> theta
        tensor([0.7500, 0.7500])

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12.
    """
    old = _like(thetas, ms)
    grads = _like(grads, ms)
    torch._foreach_mul_(ms, c.beta1)
    torch._foreach_add_(ms, list(torch._foreach_mul(grads, 1 - c.beta1)))
    torch._foreach_mul_(vs, c.beta2)
    work = list(torch._foreach_mul(grads, grads))
    torch._foreach_mul_(work, 1 - c.beta2)
    torch._foreach_add_(vs, work)
    work = [_sqrt(v) for v in vs] if exact else list(torch._foreach_sqrt(vs))
    torch._foreach_add_(work, c.eps)
    delta = list(torch._foreach_div(ms, work))
    torch._foreach_mul_(delta, c.step)
    if anchors is None:
        torch._foreach_neg_(delta)
    else:
        pull = list(torch._foreach_sub(_like(anchors, ms), old))
        torch._foreach_mul_(pull, c.recall)
        if importances is not None:
            torch._foreach_mul_(pull, _like(importances, ms))
        torch._foreach_sub_(pull, delta)
        delta = pull
    if c.decay:
        torch._foreach_sub_(delta, list(torch._foreach_mul(old, c.decay)))
    if old is thetas:
        torch._foreach_add_(thetas, delta)
    else:
        torch._foreach_copy_(thetas, list(torch._foreach_add(old, delta)))


def _sqrt(x: Tensor) -> Tensor:
    """The square root, correctly rounded."""
    if x.device.type != "cpu":
        return x.sqrt()
    root = torch.empty_like(x)
    np.sqrt(x.numpy(), out=root.numpy())
    return root


def _like(tensors: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """The tensors in the others' dtypes and devices; the very list when nothing is to be done."""
    if all(x.dtype == y.dtype and x.device == y.device for x, y in zip(tensors, others, strict=True)):
        return tensors
    return [x.to(y.device, y.dtype) for x, y in zip(tensors, others, strict=True)]
