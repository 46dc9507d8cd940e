"""States made again from what was saved of them: all of it checked, anchors held against their hashes."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from recadam_core import RecAdamError
from recadam_core.errors import check_number, shown
from recadam_core.importance import check_importance

from .anchors import PLACES, from_file, hashes_of, no_hash, rows_of, take_hashes
from .matching import bare
from .memory import wide_dtype
from .settings import FLAGS, FROM, check_parameter, named, policy_of, settled
from .shards import is_sharded, local

__all__ = ["Entry", "blank", "checked", "resumed", "states_of"]


def blank(p: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter that has not been stepped, but for its anchor."""
    dtype = wide_dtype(p)
    return {
        "step": torch.zeros((), dtype=torch.float32, device=p.device if group["capturable"] else "cpu"),
        "exp_avg": torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format),
    }


class Entry(NamedTuple):
    """A parameter, and what its state is to be made of again."""

    name: str
    p: Tensor
    place: int  # in its group
    saved: Mapping[str, Any] | None
    mine: Mapping[str, Any]  # its state until now; empty where it has none


_LOAD = "load_state_dict"
_ANCHORED = ("anchor", "anchor_hash", "anchor_rows")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COUNTED = 2**24
"""How far float32 counts steps one by one."""


def resumed(
    optimizer: Optimizer, saved: Any, left: Mapping[Tensor, dict[str, Any]], files: Collection[str]
) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]], dict[Tensor, str]]:
    """What a checkpoint makes of an optimizer, which is not changed here."""
    try:
        groups = _groups(optimizer, saved)
        entries, missing = _entries(optimizer, groups, saved, left)
    except (RecAdamError, MemoryError):
        raise
    except Exception as error:  # what a file may hold has no end
        raise RecAdamError(
            f"{_LOAD}: the state is damaged ({shown(error)}); give one that RecAdam saved"
        ) from error
    states: dict[Tensor, dict[str, Any]] = {}
    for group, ours, some in zip(groups, optimizer.param_groups, entries, strict=True):
        said = group["anchor_source"] if group["anchor_source"].isprintable() else ""
        group.update({key: ours[key] for key in ("anchor_source", "anchor_names")})
        of_group, others = states_of(_LOAD, group, some, files, said)
        states.update(of_group)
        if not others:
            group.update({key: ours[key] for key in FROM})
    return groups, states, missing


def _groups(optimizer: Optimizer, saved: Any) -> list[dict[str, Any]]:
    """The groups of a checkpoint, checked; what older ones do not say stays as it was chosen here."""
    theirs = saved.get("param_groups") if isinstance(saved, Mapping) else None
    if not isinstance(theirs, (list, tuple)) or not isinstance(saved.get("state"), Mapping):
        raise RecAdamError(
            f"{_LOAD}: a state has a dict 'state' and a list 'param_groups'; give one that RecAdam saved"
        )
    for group in theirs:
        if isinstance(group, Mapping) and "lr" in group:
            check_number(_LOAD, "lr", group["lr"], low=0.0)
        if not isinstance(group, Mapping) or not {"params", "lr", "gamma", "annealing", "form"} <= set(group):
            raise RecAdamError(f"{_LOAD}: the state is another optimizer's; give one that RecAdam saved")
    if len(theirs) != len(optimizer.param_groups):
        raise RecAdamError(
            f"{_LOAD}: the state has {len(theirs)} groups and the optimizer has "
            f"{len(optimizer.param_groups)}; make the groups as then"
        )
    checked_groups = []
    for group, ours in zip(theirs, optimizer.param_groups, strict=True):
        chosen = {**{key: ours[key] for key in ("fused", *FLAGS)}, **group}
        names, here = ([bare(name) for name in g.get("param_names") or ()] for g in (group, ours))
        if names and here and names != here:
            pairs = zip(here, names, strict=False)
            name, other = next(((a, b) for a, b in pairs if a != b), (here, names))
            raise RecAdamError(
                f"{_LOAD}: parameter {shown(name)} was saved as {shown(other)}; make the groups as then"
            )
        sizes = {len(chosen["params"]), len(names or chosen["params"])} - {len(ours["params"])}
        if sizes:
            raise RecAdamError(
                f"{_LOAD}: a group was saved with {sizes.pop()} parameters and has {len(ours['params'])}; "
                "make the groups as then"
            )
        if here:  # as wrappers call them now
            chosen["param_names"] = ours["param_names"]
        chosen = settled(chosen)
        for name, p in named(ours):
            check_parameter(name, p, chosen)
        source, dtype, place = (chosen[key] for key in ("anchor_source", "anchor_dtype", "anchor_place"))
        known = place in PLACES and (dtype == "" or getattr(torch, dtype, None) in _FLOATS)
        if not isinstance(source, str) or not known:
            where = source, dtype, place
            raise RecAdamError(
                f"{_LOAD}: anchors were kept as {shown(where)}; give a state that RecAdam saved"
            )
        checked_groups.append(chosen)
    return checked_groups


def _entries(
    optimizer: Optimizer,
    groups: list[dict[str, Any]],
    saved: Mapping[str, Any],
    left: Mapping[Tensor, dict[str, Any]],
) -> tuple[list[list[Entry]], dict[Tensor, str]]:
    """What was saved of each parameter, group by group; and the trained ones of which nothing was."""
    counts = Counter(index for group in groups for index in group["params"])
    for index, count in counts.items():
        if count > 1:
            raise RecAdamError(f"{_LOAD}: {shown(index)} are {count} parameters; make the groups as then")
    for index in saved["state"]:
        if index not in counts:
            raise RecAdamError(
                f"{_LOAD}: a state of {shown(index)}, which no group has; make the groups as then"
            )
    by_group: list[list[Entry]] = []
    missing: dict[Tensor, str] = {}
    first: Any = None
    for group, theirs, ours in zip(groups, saved["param_groups"], optimizer.param_groups, strict=True):
        entries = []
        for place, (index, (name, p)) in enumerate(zip(group["params"], named(ours), strict=True)):
            state = saved["state"].get(index)
            if state is not None:
                state = checked(_LOAD, index, p, state)
                # States of the first release have anchors and no hashes.
                if "save_anchors" in theirs and "anchor" in state and not int(state.get("anchor_hash", 0)):
                    raise _none(_LOAD, index, p, "its anchor has no hash")
            elif p.requires_grad:  # torch's distributed checkpoints leave out what is not
                first = index if not missing else first
                missing[p] = name
            entries.append(Entry(name, p, place, state, left.get(p, {})))
        by_group.append(entries)
    if missing and all(e.saved is None or not e.p.requires_grad for some in by_group for e in some):
        raise _none(_LOAD, first, next(iter(missing)), "nothing was saved")
    return by_group, missing


def _none(where: str, index: Any, p: Tensor, why: str) -> RecAdamError:
    return RecAdamError(
        f"{where}: no state for parameter {shown(index)} of shape {tuple(p.shape)} ({why}); "
        "give one that was saved with this model"
    )


def checked(where: str, index: Any, p: Tensor, saved: Any) -> dict[str, Any]:
    """What was saved of a parameter, checked; without the empty entries of flattened checkpoints."""
    if not isinstance(saved, Mapping):
        raise _none(where, index, p, f"it is {shown(saved)}")
    state = {key: x for key, x in saved.items() if not (isinstance(x, dict) and not x)}
    step = state.get("step")
    if not isinstance(step, Tensor) or not (_counts(step) or (step.is_meta and p.is_meta)):
        raise _none(where, index, p, f"its step is {shown(step)}, no count")
    for key in ("exp_avg", "exp_avg_sq", "residual", "anchor"):
        optional = key in ("residual", "anchor") and state.get(key) is None
        if not optional and (why := _misfit(state.get(key), p)):
            raise _none(where, index, p, f"its {key} {why}")
    if p.dtype == torch.float64 != state["exp_avg"].dtype:
        raise _none(where, index, p, f"its moments are {state['exp_avg'].dtype}, the parameter is {p.dtype}")
    if not p.is_meta and bool((local(state["exp_avg_sq"]) < 0).any()):
        raise _none(where, index, p, "its exp_avg_sq has numbers below 0")
    for key in state.keys() - _KNOWN:
        if isinstance(state[key], Tensor) and state[key].is_meta and not p.is_meta:
            raise _none(where, index, p, f"its {shown(key)} is without data")
    if state.get("importance") is not None and (why := _misfit(state["importance"], p)):
        raise _none(where, index, p, f"its importance {why}")
    for key in ("anchor_hash", "anchor_rows"):
        number = state.get(key, no_hash()["anchor_hash"])
        if not isinstance(number, Tensor) or number.dtype != torch.int64 or number.ndim or number.is_meta:
            raise _none(where, index, p, f"its {key} is {shown(number)}")
    if "anchor_rows" in state and not 0 < int(state["anchor_rows"]) < p.shape[0]:
        raise _none(where, index, p, f"its anchor_rows is {shown(state['anchor_rows'])}")
    return state


_KNOWN = {"step", "exp_avg", "exp_avg_sq", "residual", "anchor", "anchor_hash", "anchor_rows", "importance"}


def _counts(step: Tensor) -> bool:
    try:
        number: float = check_number(_LOAD, "step", step, low=0.0, high=_COUNTED)
    except RecAdamError:
        return False
    return number == math.floor(number)


def _misfit(x: Any, p: Tensor) -> str:
    """Why it is no tensor for a parameter's state; empty when it is one."""
    if not isinstance(x, Tensor):
        return f"is {shown(x)}"
    if x.is_nested or x.layout != torch.strided:
        return "is sparse or nested"
    if x.dtype not in _FLOATS:
        return f"is {x.dtype}"
    if x.shape != p.shape:
        return f"has shape {tuple(x.shape)}"
    if x.is_meta != p.is_meta:
        return "is without data" if x.is_meta else "has data, which the parameter has not"
    if is_sharded(x) != is_sharded(p) or local(x).shape != local(p).shape:
        return "is sharded otherwise: torch.distributed.checkpoint.state_dict sees to that"
    return ""


@torch.inference_mode(False)
@torch.no_grad()
def states_of(
    where: str, group: Mapping[str, Any], entries: list[Entry], files: Collection[str], said: str = ""
) -> tuple[dict[Tensor, dict[str, Any]], bool]:
    """States of a group's parameters, from what was saved of them."""
    take_hashes(entry.mine for entry in entries if "anchor_hash" in entry.mine)
    release = policy_of(group).release()
    states: dict[Tensor, dict[str, Any]] = {}
    brought: list[tuple[Entry, Tensor, int]] = []
    wanted: list[tuple[Entry, int]] = []
    for entry in entries:
        name, p, _, saved, mine = entry
        states[p] = _moments(where, group, entry)
        state = mine if saved is None else saved
        if "anchor" not in state and "anchor_hash" not in state:
            if "anchor" in mine:
                raise RecAdamError(
                    f"{where}: {name!r} was saved without an anchor, as a new head; "
                    "leave it out of the anchors"
                )
            continue
        anchor, here, sought = state.get("anchor"), mine.get("anchor"), int(state.get("anchor_hash", 0))
        states[p].update(no_hash(rows_of(state)), anchor=None)
        states[p]["anchor_hash"].fill_(sought)
        if anchor is not None and anchor is not here:
            brought.append((entry, anchor, sought))
        elif release is not None and saved is not None and not p.is_meta and int(saved["step"]) >= release:
            pass  # freed
        elif here is not None and (anchor is here or int(mine["anchor_hash"]) == sought):
            states[p]["anchor"] = here
        else:
            wanted.append((entry, sought))
    hashed = [x for x in brought if x[2]]
    numbers = hashes_of([{**states[entry.p], "anchor": anchor} for entry, anchor, _ in hashed])
    for (entry, _, sought), number in zip(hashed, numbers, strict=True):
        if number != sought:
            raise RecAdamError(
                f"{where}: the saved anchor of {entry.name!r} is not the one that its hash is of; "
                "the state is damaged, give another"
            )
    for entry, anchor, sought in brought:
        if not sought and not bool(torch.isfinite(local(anchor)).all()):
            raise RecAdamError(
                f"{where}: the anchor of {entry.name!r} holds NaN or infinity; give another state"
            )
        states[entry.p]["anchor"] = anchor.detach().to(entry.p.device, copy=True)
    again = from_file(group, [(entry.p, entry.place) for entry, _ in wanted], files)
    for entry, sought in wanted:
        if entry.p not in again or again[entry.p]["anchor_hash"] != sought:
            theirs = f"the checkpoint's ({said})" if said else "the checkpoint's"
            what = "is another than" if entry.mine.get("anchor") is not None else "is missing here, unlike"
            raise RecAdamError(
                f"{where}: the anchor of {entry.name!r} {what} {theirs}; make the optimizer with the "
                "pretrained weights as anchors=..., or save with save_anchors=True"
            )
        states[entry.p].update(again[entry.p])
    return states, bool(brought or wanted)


def _moments(where: str, group: Mapping[str, Any], entry: Entry) -> dict[str, Any]:
    """A parameter's state but for its anchor; of what was not saved, as before its first step."""
    name, p, _, saved, mine = entry
    if saved is None:
        return {**blank(p, group), **{key: mine[key] for key in ("residual", "importance") if key in mine}}
    shapes = [getattr(state.get("importance"), "shape", None) for state in (saved, mine or saved)]
    if shapes[0] != shapes[1]:
        said, here = ("no importance" if x is None else f"one of shape {tuple(x)}" for x in shapes)
        raise RecAdamError(f"{where}: {name!r} was saved with {said} and has {here}; make it as then")
    state: dict[str, Any] = {}
    for key, x in saved.items():
        if key in _ANCHORED:
            continue
        if key == "importance":
            check_importance(name, x, p.shape)
        if key in ("exp_avg", "exp_avg_sq"):
            state[key] = x.detach().to(p.device, wide_dtype(x), copy=True)
        elif key == "step":
            state[key] = x.detach().to(p.device if group["capturable"] else "cpu", torch.float32, copy=True)
        elif isinstance(x, Tensor):  # in its own dtype: the base class would round it to the parameter's
            state[key] = x.detach().to(p.device, copy=True)
        else:
            state[key] = copy.deepcopy(x)
    return state
