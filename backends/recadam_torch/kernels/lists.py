"""The kernel in PyTorch, in place, over lists of tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recadam_core import Coefficients
from recadam_core.update import formula

from ..memory import cast, wide_dtype

__all__ = ["kernel_"]


def kernel_(
    thetas: list[Tensor],
    grads: list[Tensor] | None,
    ms: list[Tensor] | None,
    vs: list[Tensor] | None,
    anchors: list[Tensor] | None,
    c: Coefficients,
    importances: list[Tensor] | None = None,
    exact: bool = False,
) -> None:
    r"""One step for tensors that share their coefficients, in place on `thetas`, `ms` and `vs`.

    That of `recadam_core.update` as `torch._foreach` calls: one fused launch
    an operation on CUDA, a loop over the list on CPU. None of torch's combined operations (`lerp`, `addcmul`,
    `addcdiv`, `add` with alpha) is used, since they round differently.

    Args:
        thetas: parameters; overwritten. 16-bit ones are summed in float32 and rounded once.
        grads: gradients, the parameters' shapes; None for the pull alone, `recadam_core.pull`, as moments
            are then.
        ms: first moments, at least float32; overwritten.
        vs: second moments, at least float32; overwritten.
        anchors: pretrained values, the parameters' shapes; None where `c.pull` is 0.
        c: coefficients: Python floats, or a list of 0-d tensors, one a parameter.
        importances: by which the pulls are multiplied, the parameters' shapes; None for 1.
        exact: whether to round the square root correctly, too, as torch's own does everywhere but on the
            CPU. There NumPy takes it then, on the tensors' memory and in one thread.

    Example:
        >>> theta, m, v = torch.ones(2), torch.zeros(2), torch.zeros(2)
        >>> c = Coefficients(0.9, 0.999, 0.0, 1e-8, 0.25, 0.0)
        >>> kernel_([theta], [torch.ones(2)], [m], [v], [torch.zeros(2)], c)
        >>> theta
        tensor([0.7500, 0.7500])

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12.
    """
    old = _wide(thetas) if ms is None else _like(thetas, ms)
    pulls = anchors is not None
    delta, m, v = formula(
        Lists(old),
        grads and Lists(_like(grads, old)),
        # Read once, by the formula's first lines: what these make of them may lie where they were.
        ms and Lists(ms, spent=True),
        vs and Lists(vs, spent=True),
        Lists(_like(anchors, old)) if anchors is not None else None,
        Lists(_like(importances, old)) if pulls and importances is not None else None,
        *(c.beta1, 1 - c.beta1, c.beta2, 1 - c.beta2, c.step, c.eps, c.pull, c.decay or None),
        lambda x: x.root(exact),
        Lists.over,
    )
    if old is thetas:
        torch._foreach_add_(thetas, delta.tensors)
    else:
        torch._foreach_copy_(thetas, list(torch._foreach_add(old, delta.tensors)))
    for xs, new in ((ms, m), (vs, v)):
        if xs is not None and new.tensors is not xs:
            torch._foreach_copy_(xs, new.tensors)


class Lists:
    """Tensors to compute with as with one number; results lie where an operand was that is needed no more."""

    def __init__(self, tensors: list[Tensor], spent: bool = False) -> None:
        self.tensors, self.spent = tensors, spent

    def _with(self, other: Any, name: str) -> Lists:
        ys = other.tensors if isinstance(other, Lists) else other
        if self.spent:
            getattr(torch, f"_foreach_{name}_")(self.tensors, ys)
            return self
        return Lists(list(getattr(torch, f"_foreach_{name}")(self.tensors, ys)), spent=True)

    def __mul__(self, other: Any) -> Lists:
        # A product is the same either way round.
        if isinstance(other, Lists) and other.spent and not self.spent:
            return other._with(self, "mul")
        return self._with(other, "mul")

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Lists:
        return self._with(other, "add")

    def __sub__(self, other: Any) -> Lists:
        return self._with(other, "sub")

    def __neg__(self) -> Lists:
        torch._foreach_neg_(self.tensors)
        return self

    def over(self, other: Lists) -> Lists:
        """The quotient, in new memory: what is divided is kept."""
        return Lists(list(torch._foreach_div(self.tensors, other.tensors)), spent=True)

    def root(self, exact: bool) -> Lists:
        """The square root, in new memory."""
        roots = [_sqrt(x) for x in self.tensors] if exact else list(torch._foreach_sqrt(self.tensors))
        return Lists(roots, spent=True)


def _sqrt(x: Tensor) -> Tensor:
    """The square root, correctly rounded."""
    if x.device.type != "cpu":
        return x.sqrt()
    root = torch.empty_like(x)
    np.sqrt(x.numpy(), out=root.numpy())
    return root


def _wide(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, in float32 at least; the very list when nothing is to be done."""
    dtypes = {x.dtype for x in tensors}
    if all(dtype == torch.promote_types(dtype, torch.float32) for dtype in dtypes):
        return tensors
    return cast(tensors, torch.float32) if len(dtypes) == 1 else [x.to(wide_dtype(x)) for x in tensors]


def _like(tensors: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """The tensors in the others' dtypes and devices; the very list when nothing is to be done."""
    places, kinds = ({(x.device, x.dtype) for x in xs} for xs in (tensors, others))
    if len(places) == len(kinds) == 1:
        ((device, dtype),) = kinds
        if places == kinds:
            return tensors
        if {place for place, _ in places} == {device}:
            return cast(tensors, dtype)
    return [x.to(y.device, y.dtype) for x, y in zip(tensors, others, strict=True)]
