"""Anchors at both ends of a checkpoint: hashes go in, and at resume what is there is held against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from recadam_core import RecAdamError
from recadam_core.optimizer import check_anchors

from .anchors import Anchors, bare
from .settings import group_policy, named
from .shards import fingerprints, is_sharded, like, local
from .sources import Tensors

__all__ = ["anchor_of", "check_saved", "from_file", "saved_anchors", "take_hashes"]


def anchor_of(anchors: Mapping[str, Tensor], name: str, p: Tensor) -> Tensor | None:
    """The anchor of a parameter, copied; None when there is none."""
    if isinstance(anchors, Anchors):
        anchor = anchors.part(name, p) if name in anchors else None
    elif name in anchors:
        given = anchors[name]
        check_anchors({name: p.shape}, {name: given})
        check_values(name, given)
        if is_sharded(given):
            return given.detach().clone()
        anchor = like(p, lambda where: Tensors({name: given}).read(name, where).to(p.device, copy=True))
    else:
        anchor = None
    if anchor is not None:
        check_values(name, local(anchor))
    return anchor


def check_values(name: str, anchor: Any) -> None:
    if not isinstance(anchor, Tensor) or not anchor.is_floating_point():
        raise RecAdamError(f"anchors: {name!r} is {getattr(anchor, 'dtype', anchor)}; give a floating tensor")
    if not anchor.is_meta and not bool(torch.isfinite(anchor).all()):
        raise RecAdamError(f"anchors: {name!r} holds NaN or infinity; give the pretrained values")


def from_file(path: str, named: list[tuple[str, Tensor]]) -> dict[Tensor, Tensor]:
    """Anchors read again from the file that they came from; those that it has."""
    if not path:
        return {}
    try:
        anchors = Anchors.named(named, path)
    except RecAdamError:
        return {}
    return {p: anchors.part(name, p) for name, p in named if name in anchors}


def take_hashes(states: list[dict[str, Any]]) -> None:
    """Put in the anchors' hashes where they are still to be taken."""
    states = [state for state in states if not int(state["anchor_hash"])]
    for state, number in zip(states, fingerprints(state["anchor"] for state in states), strict=True):
        state["anchor_hash"].fill_(number)


def check_saved(param_groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Raise unless a checkpoint is of RecAdam and of parameters of these names and shapes."""
    saved_groups = state_dict["param_groups"]
    if any(name not in group for group in saved_groups for name in ("gamma", "annealing", "form")):
        raise RecAdamError("load_state_dict: the state is another optimizer's; give one that RecAdam saved")
    for saved_group, group in zip(saved_groups, param_groups, strict=False):
        theirs, ours = (
            [bare(name) for name in names] if (names := g.get("param_names")) else None
            for g in (saved_group, group)
        )
        if theirs is not None and ours is not None and theirs != ours:
            name, other = next(((a, b) for a, b in zip(ours, theirs, strict=False) if a != b), (ours, theirs))
            raise RecAdamError(
                f"load_state_dict: parameter {name!r} was saved as {other!r}; make the groups as then"
            )
        for index, p in zip(saved_group["params"], group["params"], strict=False):
            saved = state_dict["state"].get(index, {})
            if {"step", "exp_avg", "exp_avg_sq"} - saved.keys() or saved["exp_avg"].shape != p.shape:
                raise RecAdamError(
                    f"load_state_dict: no state for parameter {index} of shape {tuple(p.shape)}; "
                    "give one that was saved with this model"
                )


def saved_anchors(
    optimizer: Optimizer, state_dict: dict[str, Any], groups: list[dict[str, Any]]
) -> dict[Tensor, dict[str, Any]]:
    """The anchors of a checkpoint by parameter: what it has, ours, or those of the file that it names."""
    take_hashes([state for state in optimizer.state.values() if state.get("anchor") is not None])
    found: dict[Tensor, dict[str, Any]] = {}
    wanted: list[tuple[dict[str, Any], dict[str, Any], str, Tensor, int]] = []
    for group, ours in zip(groups, optimizer.param_groups, strict=True):
        _, release = group_policy(group)
        for index, (name, p) in zip(group["params"], named(ours), strict=True):
            saved, mine = state_dict["state"][index], optimizer.state[p]
            if "anchor" in saved and not isinstance(saved["anchor"], dict):
                kept = saved["anchor"]
                found[p] = {"anchor": None if kept is None else kept.to(p.device, copy=True)}
                found[p]["anchor_hash"] = saved.get("anchor_hash", torch.zeros((), dtype=torch.int64)).clone()
                continue
            if "anchor_hash" not in saved:
                if mine.get("anchor") is not None:
                    raise RecAdamError(
                        f"load_state_dict: {name!r} was saved without an anchor, as a new head; "
                        "leave it out of the anchors"
                    )
                continue
            sought = int(saved["anchor_hash"])
            if release is not None and int(saved["step"]) >= release:
                found[p] = {"anchor": None, "anchor_hash": saved["anchor_hash"].clone()}
            elif mine.get("anchor") is not None and int(mine["anchor_hash"]) == sought:
                found[p] = {key: mine[key] for key in ("anchor", "anchor_hash")}
                group["anchor_source"] = ours["anchor_source"]
            else:
                wanted.append((group, mine, name, p, sought))
    sources = {id(group): group["anchor_source"] for group, *_ in wanted}
    read = {path: from_file(path, [(n, p) for g, _, n, p, _ in wanted if g["anchor_source"] == path])
            for path in set(sources.values())}  # fmt: skip
    states = [
        {"anchor": read[sources[id(group)]].get(p), "anchor_hash": torch.zeros((), dtype=torch.int64)}
        for group, _, _, p, _ in wanted
    ]
    take_hashes([state for state in states if state["anchor"] is not None])
    for state, (group, mine, name, p, sought) in zip(states, wanted, strict=True):
        if state["anchor"] is None or state["anchor_hash"] != sought:
            path = group["anchor_source"]
            theirs = f"the checkpoint's ({path})" if path else "the checkpoint's"
            what = "is another than" if mine.get("anchor") is not None else "is missing here, unlike"
            raise RecAdamError(
                f"load_state_dict: the anchor of {name!r} {what} {theirs}; make the optimizer with the "
                "pretrained weights as anchors=..., or save with save_anchors=True"
            )
        found[p] = state
    return found
