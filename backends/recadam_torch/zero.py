"""DeepSpeed's ZeRO 1 and 2: each process steps a flat part of a group, made of many parameters' parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recadam_core import RecAdamError

from .shards import SHARED

__all__ = ["forget", "is_flat_part", "joined"]

_JOINED = ("exp_avg", "exp_avg_sq", "anchor", "importance")


def is_flat_part(params: Sequence[Tensor], lost: Sequence[Tensor]) -> bool:
    """Whether a group's one parameter is a flat part of others, which DeepSpeed has linked to it."""
    flat = len(params) == 1 and params[0].ndim == 1
    return flat and bool(lost) and all(hasattr(p, "_hp_mapping") for p in lost)


def joined(flat: Tensor, states: Mapping[str, tuple[Tensor, dict[str, Any]]]) -> dict[str, Any]:
    """The state of a flat part, from the states of the parameters that it is made of."""
    anchored = {name for name, (_, state) in states.items() if "anchor_hash" in state}
    if anchored and len(anchored) < len(states):
        new = next(name for name in states if name not in anchored)
        raise RecAdamError(
            f"DeepSpeed: {next(iter(anchored))!r} is anchored, {new!r} in the same group is new, and ZeRO "
            "makes one tensor of both; make the groups with param_groups"
        )
    first = next(iter(states.values()))[1]
    whole: dict[str, Any] = {"step": first["step"].clone()}
    for key in _JOINED:
        parts = [state[key] for _, state in states.values() if state.get(key) is not None]
        if parts:
            dtype = max((x.dtype for x in parts), key=lambda d: d.itemsize)
            on_host = key == "anchor" and parts[0].device.type == "cpu"
            whole[key] = torch.zeros(flat.shape, dtype=dtype, device="cpu" if on_host else flat.device)
        elif key in first:
            whole[key] = None  # freed
    if anchored:
        whole["anchor_hash"] = torch.zeros((), dtype=torch.int64, device="cpu")
    for p, state in states.values():
        mapping: Any = getattr(p, "_hp_mapping", None)
        if mapping is None:  # all of it is in other processes' parts
            continue
        its, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        for key in _JOINED:
            if whole.get(key) is not None:
                source = state[key].reshape(-1)[its.start : its.start + its.numel]
                whole[key][here.start : here.start + here.numel].copy_(source)
    setattr(flat, SHARED, getattr(next(iter(states.values()))[0], "_dp_group", torch.distributed.group.WORLD))
    return whole


def forget(params: Sequence[Tensor], key: str) -> None:
    """Drop DeepSpeed's own views of an entry of the state, which would keep its memory."""
    for p in params:
        fragments: Any = getattr(getattr(p, "_hp_mapping", None), "optim_fragment", None) or {}
        fragments.pop(key, None)
