"""Anchors at both ends of a checkpoint: hashes go in, and at resume what is there is held against them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from recadam_core import RecAdamError
from recadam_core.errors import check_number
from recadam_core.importance import check_importance, check_weighable
from recadam_core.optimizer import check_anchors

from .anchors import Anchors, bare, more_rows, placed
from .settings import FROM, group_policy, named
from .shards import fingerprints, is_sharded, like, local, summed
from .sources import is_wide, open_source

__all__ = ["anchor_of", "check_saved", "from_file", "no_hash", "saved_anchors", "take_hashes", "weigh"]


def anchor_of(anchors: Mapping[str, Tensor] | None, name: str, p: Tensor) -> Tensor | None:
    """The anchor of a parameter, copied: where it is now without `anchors`; None when there is none."""
    if anchors is None:
        anchor: Tensor | None = p.detach().clone()
    elif isinstance(anchors, Anchors):
        anchor = anchors.part(name, p) if anchors.match(name).has_anchor else None
    elif name in anchors:
        given = anchors[name]
        check_anchors({name: p.shape}, {name: given})
        _check_kind(name, given)
        if is_sharded(given):
            anchor = given.detach().clone()
        else:
            if given.is_meta and not p.is_meta:
                raise RecAdamError(f"anchors: {name!r} is on the meta device; give the pretrained values")
            anchor = like(p, partial(_copied, given, p.device))
    else:
        anchor = None
    if anchor is None or anchor.is_meta:
        return anchor
    _check_kind(name, anchor)
    infinite = (~torch.isfinite(local(anchor))).sum()
    if not p.requires_grad:  # a mask, say, which nobody steps; in all processes alike
        return None if int(summed([infinite], [anchor])[0]) else anchor
    if int(infinite):
        remedy = "give the pretrained values"
        if anchors is None:
            remedy = "freeze it, or put it into a group that says 'anchored': False"
        raise RecAdamError(f"anchors: {name!r} holds NaN or infinity; {remedy}")
    return anchor


def _check_kind(name: str, anchor: Any) -> None:
    """Raise unless it is a dense tensor of floating numbers."""
    if not isinstance(anchor, Tensor) or not anchor.is_floating_point():
        raise RecAdamError(f"anchors: {name!r} is {getattr(anchor, 'dtype', anchor)}; give a floating tensor")
    if not is_wide(anchor):
        raise RecAdamError(f"anchors: {name!r} is {anchor.dtype}; give one of 16 bits or more")
    if anchor.layout != torch.strided:
        raise RecAdamError(f"anchors: {name!r} is sparse; give it as a dense tensor")


def _copied(given: Tensor, device: torch.device, where: tuple[slice, ...]) -> Tensor:
    return given.detach()[where].to(device, copy=True)


def weigh(group: Mapping[str, Any], states: list[dict[str, Any]], importance: Any) -> None:
    """Put each parameter's importance into its state: 0 for rows of a grown vocabulary that have no anchor.

    Args:
        group: a group with its parameters' names.
        states: their states.
        importance: tensors by parameter name; None for none.

    Raises:
        RecAdamError: when an anchored parameter has none, or one is no tensor in [0, 1] of its shape.
    """
    grown = [name for (name, _), state in zip(named(group), states, strict=True) if "anchor_rows" in state]
    if grown and (group["fused"] or group["form"] != "decoupled"):
        other = "fused" if group["fused"] else f"form={group['form']!r}"
        raise RecAdamError(
            f"RecAdam: {grown[0]!r} has rows without an anchor, with which {other} does not go; leave that "
            "out, or call the parameter new"
        )
    for (_, p), state in zip(named(group), states, strict=True):
        if "anchor_rows" in state:
            state["importance"] = like(p, partial(_first_rows, p, int(state["anchor_rows"])))
    if importance is None or not group["anchored"]:
        return
    if group["fused"]:
        raise RecAdamError("RecAdam: importance and fused are both set; give one of them")
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
        given = importance.get(name)
        check_importance(name, given, p.shape)
        if not isinstance(given, Tensor) or given.is_meta != p.is_meta:
            what = "without data" if isinstance(given, Tensor) else f"a {type(given).__name__}"
            raise RecAdamError(f"importance of {name!r} is {what}; give a tensor")
        sharded = is_sharded(given)
        weights = given.detach().clone() if sharded else like(p, partial(_copied, given, p.device))
        state["importance"] = weights * state["importance"] if "importance" in state else weights


def _first_rows(p: Tensor, rows: int, where: tuple[slice, ...]) -> Tensor:
    """1 in the first rows, then 0: in the memory of a column."""
    at = torch.arange(where[0].start, where[0].stop, dtype=torch.int64, device=p.device)
    mine = tuple(s.stop - s.start for s in where)
    return (at < rows).to(p.dtype).reshape(-1, *(1,) * (p.ndim - 1)).expand(mine)


def from_file(group: Mapping[str, Any], wanted: list[tuple[Tensor, int]]) -> dict[Tensor, dict[str, Any]]:
    """Anchors of a group's parameters, read again from the file that they came from.

    Args:
        group: the group's settings, which say where its anchors came from.
        wanted: parameters and their places in the group.

    Returns:
        By parameter, "anchor" and "anchor_hash" of those that could be read; the caller compares.
    """
    if not group["anchor_source"]:
        return {}
    try:
        source = open_source(group["anchor_source"])
    except RecAdamError:
        return {}
    dtype = getattr(torch, group["anchor_dtype"]) if group["anchor_dtype"] else None
    shapes = {name: source.shape(name) for name in set(source) & set(group["anchor_names"])}
    found = {}
    for p, index in wanted:
        stored = group["anchor_names"][index] if index < len(group["anchor_names"]) else ""
        shape = shapes.get(stored, ())
        if stored in shapes and (shape == tuple(p.shape) or more_rows(shape, tuple(p.shape))):
            anchor = placed(source, stored, p, dtype, group["anchor_place"])
            found[p] = {"anchor": anchor, **no_hash(shape[0] if shape != tuple(p.shape) else None)}
    take_hashes(found.values())
    return found


def no_hash(rows: int | None = None) -> dict[str, Tensor]:
    """What a state has of a hash that is still to be taken, of so many rows or all."""
    found = {"anchor_hash": torch.zeros((), dtype=torch.int64, device="cpu")}
    if rows is not None:
        found["anchor_rows"] = torch.tensor(rows, dtype=torch.int64, device="cpu")
    return found


def take_hashes(states: Iterable[dict[str, Any]]) -> None:
    """Put in the anchors' hashes where they are still to be taken."""
    states = [s for s in states if s.get("anchor") is not None and not int(s["anchor_hash"])]
    rows = [int(s["anchor_rows"]) if "anchor_rows" in s else None for s in states]
    for state, number in zip(states, fingerprints([s["anchor"] for s in states], rows), strict=True):
        state["anchor_hash"].fill_(number)


def check_saved(param_groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Raise unless a checkpoint is of RecAdam and of parameters of these names and shapes."""
    saved_groups = state_dict["param_groups"]
    for group in saved_groups:
        check_number("load_state_dict", "lr", group.get("lr"), low=0.0)
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
        if len(saved_group["params"]) != len(group["params"]):
            raise RecAdamError(
                f"load_state_dict: a group was saved with {len(saved_group['params'])} parameters and has "
                f"{len(group['params'])}; make the groups as then"
            )
        for index, p in zip(saved_group["params"], group["params"], strict=True):
            saved = state_dict["state"].get(index, {})
            tensors = [saved.get(key) for key in ("step", "exp_avg", "exp_avg_sq")]
            whole = all(isinstance(x, Tensor) and x.is_floating_point() for x in tensors)
            if not whole or any(x.shape != p.shape for x in (*tensors[1:], saved.get("residual", p))):
                raise RecAdamError(
                    f"load_state_dict: no state for parameter {index} of shape {tuple(p.shape)}; "
                    "give one that was saved with this model"
                )


def saved_anchors(
    optimizer: Optimizer, state_dict: dict[str, Any], groups: list[dict[str, Any]]
) -> dict[Tensor, dict[str, Any]]:
    """The anchors of a checkpoint by parameter: what it has, ours, or those of the file that it names."""
    take_hashes(optimizer.state.values())
    found: dict[Tensor, dict[str, Any]] = {}
    for group, ours in zip(groups, optimizer.param_groups, strict=True):
        _, release = group_policy(group)
        wanted: list[tuple[str, Tensor, int, int]] = []
        for place, (index, (name, p)) in enumerate(zip(group["params"], named(ours), strict=True)):
            saved, mine = state_dict["state"][index], optimizer.state[p]
            shapes = [getattr(state.get("importance"), "shape", None) for state in (saved, mine)]
            if shapes[0] != shapes[1]:
                said, here = ("no importance" if x is None else f"one of shape {tuple(x)}" for x in shapes)
                raise RecAdamError(
                    f"load_state_dict: {name!r} was saved with {said} and has {here}; make it as then"
                )
            if "anchor" in saved and not isinstance(saved["anchor"], dict):
                kept = saved["anchor"]
                if kept is not None and kept.shape != p.shape:
                    raise RecAdamError(
                        f"load_state_dict: the anchor of {name!r} was saved as {tuple(kept.shape)}, its "
                        f"parameter is {tuple(p.shape)}; give the state of this model"
                    )
                found[p] = {"anchor": None if kept is None else kept.to(p.device, copy=True)}
                number = saved.get("anchor_hash", no_hash()["anchor_hash"])
                found[p]["anchor_hash"] = number.clone()
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
            else:
                wanted.append((name, p, place, sought))
        again = from_file(group, [(p, place) for _, p, place, _ in wanted])
        for name, p, _, sought in wanted:
            if p not in again or again[p]["anchor_hash"] != sought:
                path = group["anchor_source"]
                theirs = f"the checkpoint's ({path})" if path else "the checkpoint's"
                had = optimizer.state[p].get("anchor") is not None
                what = "is another than" if had else "is missing here, unlike"
                raise RecAdamError(
                    f"load_state_dict: the anchor of {name!r} {what} {theirs}; make the optimizer with the "
                    "pretrained weights as anchors=..., or save with save_anchors=True"
                )
            found[p] = again[p]
        if ours["anchor_source"] and not wanted:  # where ours came from is at hand
            group.update({key: ours[key] for key in FROM})
    return found
