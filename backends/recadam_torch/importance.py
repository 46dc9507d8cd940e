"""How much each weight matters to what the model knows: what the pull may be multiplied by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recadam_core import RecAdamError, importance_from
from recadam_core.errors import shown
from recadam_core.importance import check_importance, check_weighable

from .matching import check_made
from .memory import wide_dtype
from .settings import named
from .shards import like, part_of

__all__ = ["feature_importance", "importance_of", "weigh"]


def importance_of(
    params: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], losses: Iterable[Tensor]
) -> dict[str, Tensor]:
    r"""Weigh parameters by their squared gradients, as EWC does with the old task's loss.

    Math:
        $F_i = \sum_b (\partial L_b / \partial\theta_i)^2$ over batches b, scaled by
        `recadam_core.importance_from`; with batches of one row EWC's empirical Fisher information

    Args:
        params: the anchored parameters by name, or as `named_parameters()` has them, at their pretrained
            values. What needs no gradient has no importance.
        losses: a scalar of each batch, made as they are asked for, so that one graph at a time is in memory.
            A few dozen small batches do.

    Returns:
        For `RecAdam(importance=...)`: a tensor in [0, 1] of each parameter's shape, dtype and device.

    Raises:
        RecAdamError: when a loss is no scalar, is not finite or has no gradient, a gradient is not finite, or
            no loss depends on any parameter.

    Example:
        >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> importance_of({"w": w}, [(w * torch.tensor([1.0, 2.0, 0.0])).sum()])["w"]
        tensor([0.2703, 1.0000, 0.0000])

    Source: elastic weight consolidation, arXiv 1612.00796, equation 3.
    """
    params = _by_name(params)
    sums = {  # at least float32: squares leave the range of float16
        name: torch.zeros_like(p, dtype=wide_dtype(p), requires_grad=False) for name, p in params.items()
    }
    wanted = {name: p for name, p in params.items() if p.requires_grad}
    for batch, loss in enumerate(_tensors(losses, "losses")):
        if loss.ndim:
            shape = tuple(loss.shape)
            raise RecAdamError(f"importance: the loss of batch {batch} has shape {shape}; give a scalar")
        if not bool(torch.isfinite(loss)):
            raise RecAdamError(
                f"importance: the loss of batch {batch} is {float(loss.detach())}; leave it out"
            )
        if not loss.requires_grad:
            raise RecAdamError(
                f"importance: the loss of batch {batch} has no gradient; make it outside of torch.no_grad"
            )
        grads: Any  # None for what the loss does not depend on
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True) if wanted else ()
        for name, grad in zip(wanted, grads, strict=True):
            if grad is None:
                continue
            if not bool(torch.isfinite(grad).all()):
                raise RecAdamError(
                    f"importance: the gradient of {name!r} in batch {batch} is not finite; leave the batch "
                    "out, or scale its loss down"
                )
            sums[name] += grad.to(sums[name].dtype).square()
    return {name: x.to(params[name].dtype) for name, x in importance_from(sums).items()}


def feature_importance(
    params: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], features: Iterable[Tensor], seed: int = 0
) -> dict[str, Tensor]:
    r"""Weigh parameters by how far each moves the features of some texts or images; no labels, no old data.

    Math:
        $E_u[(\partial\, u \cdot f(x) / \partial\theta_i)^2]$ over normal u: the curvature of
        $\|f_\theta(x) - f_{\theta^*}(x)\|^2$ in $\theta_i$ at the anchor; scaled as in `importance_of`

    Args:
        params: as of `importance_of`.
        features: what the encoder makes of each batch, of shape (rows, width), with its graph.
        seed: of the u.

    Returns:
        As `importance_of`.

    Raises:
        RecAdamError: as `importance_of`.

    Example:
        >>> w = torch.tensor([[1.0, 0.0], [0.0, 0.1]], requires_grad=True)
        >>> found = feature_importance({"w": w}, [torch.ones(4, 2) @ w])
        >>> found["w"].shape, float(found["w"].max())
        (torch.Size([2, 2]), 1.0)

    Source: memory aware synapses, arXiv 1711.09601, weigh by the gradient of $\|f(x)\|^2$.
    """
    generator = torch.Generator("cpu").manual_seed(seed)  # on the host: the same u on every device

    def projected(rows: Tensor) -> Tensor:
        rows = rows.to(wide_dtype(rows))
        # Of float32 whatever the default is: the same u in every program, too.
        u = torch.randn(rows.shape, generator=generator, dtype=torch.float32, device="cpu")
        return (rows * u.to(rows)).sum()

    return importance_of(params, map(projected, _tensors(features, "features")))


def _by_name(params: Any) -> dict[str, Tensor]:
    """A dict, or the pairs of `named_parameters()`."""
    try:
        by_name = dict(params)
    except (TypeError, ValueError):
        by_name = {}
    if not by_name or not all(isinstance(p, Tensor) for p in by_name.values()):
        raise RecAdamError(
            f"importance: the parameters are a {type(params).__name__}; give model.named_parameters() or a "
            "dict of tensors by name"
        )
    for name, p in by_name.items():
        check_made(name, p)
    return by_name


def _tensors(batches: Iterable[Any], what: str) -> Iterator[Tensor]:
    if isinstance(batches, Tensor):
        raise RecAdamError(f"importance: the {what} are one tensor; give a list or generator of one a batch")
    if not isinstance(batches, Iterable):
        raise RecAdamError(
            f"importance: the {what} are {shown(batches)}; give a list or generator of tensors"
        )
    for batch, x in enumerate(batches):
        if not isinstance(x, Tensor):
            raise RecAdamError(
                f"importance: the {what} of batch {batch} are a {type(x).__name__}; give a tensor"
            )
        yield x


def weigh(group: Mapping[str, Any], states: list[dict[str, Any]], importance: Any) -> None:
    """Put each parameter's importance into its state: 0 for rows of a grown vocabulary without an anchor."""
    grown = [name for (name, _), state in zip(named(group), states, strict=True) if "anchor_rows" in state]
    if grown and group["form"] != "decoupled":
        raise RecAdamError(
            f"RecAdam: {grown[0]!r} has rows without an anchor, with which form={group['form']!r} does not "
            "go; leave that out, or call the parameter new"
        )
    for (_, p), state in zip(named(group), states, strict=True):
        if "anchor_rows" in state:
            state["importance"] = like(p, partial(_first_rows, p, int(state["anchor_rows"])))
    if importance is None or not group["anchored"]:
        return
    check_weighable(group["form"])
    if not isinstance(importance, Mapping):
        raise RecAdamError(
            f"importance: {type(importance).__name__}; give a dict of tensors by parameter name"
        )
    if "param_names" not in group:
        raise RecAdamError(
            "importance is matched by name; pass model.named_parameters() instead of model.parameters()"
        )
    for (name, p), state in zip(named(group), states, strict=True):
        if "anchor" not in state:
            continue
        factors = importance.get(name)
        check_importance(name, factors, p.shape)
        if not isinstance(factors, Tensor) or factors.is_meta != p.is_meta:
            what = "without data" if isinstance(factors, Tensor) else f"a {type(factors).__name__}"
            raise RecAdamError(f"importance of {name!r} is {what}; give a tensor")
        mine = part_of(factors, p)
        state["importance"] = mine * state["importance"] if "importance" in state else mine


def _first_rows(p: Tensor, rows: int, where: tuple[slice, ...]) -> Tensor:
    """1 in the first rows, then 0: in the memory of a column."""
    at = torch.arange(where[0].start, where[0].stop, dtype=torch.int64, device=p.device)
    mine = tuple(s.stop - s.start for s in where)
    return (at < rows).to(p.dtype).reshape(-1, *(1,) * (p.ndim - 1)).expand(mine)
