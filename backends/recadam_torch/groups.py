"""Parameter groups for fine-tuning: anchored or new, decayed or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from recadam_core.optimizer import check_anchors

from .anchors import Anchors
from .matching import check_made, check_module

__all__ = ["param_groups"]


def param_groups(
    model: nn.Module,
    anchors: Mapping[str, Tensor] | None = None,
    *,
    lr: float | None = None,
    new_lr: float | None = None,
    weight_decay: float = 0.0,
    anchored_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """A model's trainable parameters in up to four groups: anchored or new, decayed or not.

    Biases and the parameters of norms are not decayed, nor, by default, anchored weights: decay towards zero
    works against the pull towards the anchor. A weight that several modules share comes once.

    Args:
        model: the model.
        anchors: `Anchors`, or pretrained values by name; what has none is new. None anchors every
            parameter where it is now.
        lr: learning rate; None leaves it to the optimizer.
        new_lr: learning rate of new parameters; None for `lr`.
        weight_decay: of new weights.
        anchored_weight_decay: of anchored weights.

    Returns:
        Groups for `RecAdam`, with names and anchors in them; empty ones are left out.

    Raises:
        RecAdamError: when anchors are of another model, or a parameter is still to be made by a lazy module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1))
        >>> groups = param_groups(model, Anchors.of(model, new=["2.*"]), weight_decay=0.01)
        >>> for group in groups:
        ...     print(group["anchored"], group["weight_decay"], [name for name, _ in group["params"]])
        True 0.0 ['0.weight', '0.bias', '1.weight', '1.bias']
        False 0.01 ['2.weight']
        False 0.0 ['2.bias']
    """
    check_module("param_groups", model)
    norms = {
        id(p)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for p in module.parameters(recurse=False)
    }
    for name, p in model.named_parameters():
        check_made(name, p)
    if anchors is not None and not isinstance(anchors, Anchors):
        check_anchors({name: p.shape for name, p in model.named_parameters()}, anchors)
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        named_there = (
            anchors.match(name).has_anchor if isinstance(anchors, Anchors) else name in (anchors or ())
        )
        anchored = anchors is None or named_there
        decays = p.ndim > 1 and id(p) not in norms and not name.endswith("bias")
        decay = (anchored_weight_decay if anchored else weight_decay) if decays else 0.0
        group = groups.setdefault(
            (anchored, decay), {"params": [], "anchored": anchored, "weight_decay": decay}
        )
        group["params"].append((name, p))
        rate = lr if anchored or new_lr is None else new_lr
        if rate is not None:
            group["lr"] = rate
        if anchored and isinstance(anchors, Anchors):
            group["anchors"] = anchors
        elif anchored and anchors is not None:
            group.setdefault("anchors", {})[name] = anchors[name]
    # Anchored before new, decayed before not: always the same order.
    return [groups[key] for key in sorted(groups, reverse=True)]
