"""The states of an optimizer's parameters, and what others do to them between its making and its steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor

from recadam_core import RecAdamError
from recadam_core.arrays import check_named

from .anchors import Anchors, anchor_of, from_file, no_hash, take_hashes
from .checkpoints import Entry, blank, checked, states_of
from .importance import weigh
from .matching import check_made
from .plan import steps_taken
from .rounding import residual_of
from .settings import check_parameter, named
from .shards import in_memory, is_sharded, is_wrapper, like, local, summed
from .sources import Mapped, is_wide, mapped_files
from .stepping import Work
from .zero import forget, is_flat_part, joined

__all__ = ["Left", "States"]

_MOVING = ("step", "exp_avg", "exp_avg_sq", "residual")
"""What a step writes to in a state."""


@dataclass
class Left:
    """What an optimizer left behind for its next step, against which `optimizer.state` is held."""

    anchors: Mapping[str, Tensor] | None = None  # for groups without their own, while the optimizer is made
    importance: Any = None
    states: dict[Tensor, dict[str, Any]] = field(default_factory=dict)
    names: dict[Tensor, str] = field(default_factory=dict)
    copies: dict[Tensor, Tensor] = field(default_factory=dict)  # anchors that are copies of what is unstepped
    identities: dict[Tensor, tuple[Any, ...]] = field(default_factory=dict)  # of anchors, when hashed
    parts: dict[Tensor, list[Tensor]] = field(default_factory=dict)  # what ZeRO's flat tensors are parts of
    files: set[str] = field(default_factory=set)  # that the user took anchors from
    mapped: set[Mapped] | None = None  # files whose pages are anchors; None to look for them
    lent: bool = False  # whether someone may hold states from before the first step


class States:
    """An optimizer's groups and states as they are, beside what it left there.

    Others write there, too: wrappers put other parameters in place of the optimizer's, checkpoints come past
    `load_state_dict`, entries are set by hand.
    """

    def __init__(self, left: Left, groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]) -> None:
        self.left, self._groups, self._state = left, groups, state

    def add(self, group: dict[str, Any], anchors: Mapping[str, Tensor] | None, importance: Any) -> None:
        """Put in the states of a new group; raises before anything is put in."""
        anchors = self.left.anchors if anchors is None else anchors
        importance = self.left.importance if importance is None else importance
        if anchors is not None:
            check_named("anchors", anchors)
        if isinstance(anchors, Anchors) and group["anchored"] and "param_names" in group:
            group.update(_provenance(anchors, group))
        if anchors is not None and "param_names" not in group:
            raise RecAdamError(
                "anchors are matched by name; pass model.named_parameters() instead of model.parameters()"
            )
        states = [_initial(name, p, group, anchors) for name, p in named(group)]
        # Where the hash takes all processes it is taken now, when all of them are here.
        take_hashes([state for state in states if is_sharded(state.get("anchor"))])
        weigh(group, states, importance)
        for p, state in zip(group["params"], states, strict=True):
            self.put(p, state)
            if anchors is None and "anchor" in state:
                self.left.copies[p] = state["anchor"]
        self.left.files.add(group["anchor_source"])
        self.left.names.update(zip(group["params"], group.get("param_names", ()), strict=False))
        self.left.mapped = None

    def restore(self) -> None:
        """Take what `optimizer.state` holds, of a pickle, as what the optimizer left there."""
        self.left.states = {p: self._state[p] for g in self._groups for p in g["params"] if p in self._state}
        self.left.identities = {p: _identity(state.get("anchor")) for p, state in self.left.states.items()}
        self.left.names, self.left.mapped, self.left.lent = {}, None, False
        for state in self.left.states.values():
            if "anchor" in state:
                state.setdefault("anchor_hash", no_hash()["anchor_hash"])
        for group in self._groups:
            self.left.names.update(zip(group["params"], group.get("param_names", ()), strict=False))

    def put(self, p: Tensor, state: dict[str, Any]) -> None:
        """Give a parameter this state."""
        self._state[p] = self.left.states[p] = state
        self.left.identities[p] = _identity(state.get("anchor"))

    def begin(self, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Start anew with these states."""
        for p, state in states.items():
            self.put(p, state)
        self.left.lent, self.left.mapped = False, None

    def _drop(self, p: Tensor) -> dict[str, Any]:
        self._state.pop(p, None)
        self.left.names.pop(p, None)
        self.left.identities.pop(p, None)
        return self.left.states.pop(p)

    def check_files(self) -> None:
        """Raise if a file whose pages are anchors was written to."""
        if self.left.mapped is None or not all(file.intact() for file in self.left.mapped):
            groups = (group for group in self._groups if group.get("anchor_place") == "file")
            states = (self._state.get(p, {}) for group in groups for p in group["params"])
            self.left.mapped = mapped_files(s["anchor"] for s in states if s.get("anchor") is not None)
            for file in self.left.mapped:
                file.check()

    def settle(self) -> None:
        """Let every parameter have its state, whole, and the optimizer alone hold what was not stepped."""
        self.check_files()
        left, params = self.left.states, [p for group in self._groups for p in group["params"]]
        if not (
            len(left) == len(params) == len(self._state)
            and all(map(is_, left, params))
            and all(map(is_, left.values(), self._state.values()))
            and all(map(_whole, left.values()))
        ):
            self.adopt()
            self._complete()
        if self.left.lent:  # as AdamW's states, which are not there before the first step
            self.left.lent = False
            with torch.inference_mode(False), torch.no_grad():
                for state in filter(_unstepped, self.left.states.values()):
                    state.update({k: x.clone() for k, x in state.items() if k in _MOVING and x is not None})

    def adopt(self) -> None:
        """Give the states of parameters that are gone to those of the same names, sharded as those are."""
        current = {p for group in self._groups for p in group["params"]}
        orphans = {self.left.names.get(p): p for p in self.left.states if p not in current}
        for group in self._groups:
            lost = {name: orphans[name] for name in group.get("param_names", ()) if name in orphans}
            if is_flat_part(group["params"], list(lost.values())):
                flat = group["params"][0]
                name = next(iter(lost)) + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
                self.put(flat, joined(flat, {n: (p, self.left.states[p]) for n, p in lost.items()}))
                self.left.parts[flat] = list(lost.values())
                self._pass_on(flat, *lost.values())
                for p in lost.values():
                    self._drop(p)
                group["param_names"], self.left.names[flat] = [name], name
                continue
            if "param_names" in group and len(group["param_names"]) != len(group["params"]):
                raise RecAdamError(
                    f"a group was made of {len(group['param_names'])} parameters and has "
                    f"{len(group['params'])}: add some by add_param_group; or, if a wrapper flattened them, "
                    "use one that does not (FSDP2, ZeRO)"
                )
            for name, p in named(group):
                if p in self.left.states or self._state.get(p):
                    continue
                if name not in orphans:
                    raise RecAdamError(
                        f"parameter {name!r} has no state: the optimizer's parameters were replaced after it "
                        "was made; pass model.named_parameters(), or make it after the model is wrapped"
                    )
                old = self._drop(orphans[name])
                self.put(p, {key: _sharded_as(p, key, value) for key, value in old.items()})
                self.left.names[p] = name
                self._pass_on(p, orphans[name])

    def _pass_on(self, new: Tensor, *old: Tensor) -> None:
        """Parameters whose anchors are copies of them have another in their place."""
        if [p for p in old if self.left.copies.pop(p, None) is not None]:
            self.left.copies[new] = self._state[new]["anchor"]

    def _complete(self) -> None:
        """Give the states that others have put in what those left out; raise where there is none."""
        states: dict[Tensor, dict[str, Any]] = {}
        for group in self._groups:
            entries = []
            for place, (name, p) in enumerate(named(group)):
                state, left = self._state.get(p), self.left.states.get(p, {})
                if not state:
                    raise RecAdamError(
                        f"parameter {name!r} has no state: it was cleared, and its anchor went with it; to "
                        "start a new task call reset_moments(), with reanchor=True to anchor it here"
                    )
                if state is not left or not _whole(state):
                    saved = checked("optimizer.state", name, p, state)
                    entries.append(Entry(name, p, place, saved, left))
            states.update(states_of("optimizer.state", group, entries, self.left.files)[0])
        for p, state in states.items():
            self.put(p, state)
            self.left.mapped = None
        self.left.states = {p: self._state[p] for group in self._groups for p in group["params"]}

    @torch.no_grad()
    def anchor_anew(self) -> Any:
        """At the first step, anchor where they are now the parameters that were overwritten until then.

        Returns what `put_back` takes.
        """
        if not self.left.copies or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return None
        self.settle()
        pairs = [pair for group in self._groups for pair in named(group)]
        same = [(name, p) for name, p in pairs if self._comparable(name, p)]
        counts = [(local(self._state[p]["anchor"]).to(p.dtype) != local(p)).sum() for _, p in same]
        # Of a parameter that is spread over processes all have to say the same.
        totals = summed(counts, [p for _, p in same])
        moved = [pair for pair, total in zip(same, totals, strict=True) if int(total)]
        anchors = {p: anchor_of(None, name, p) for name, p in moved}
        olds = {p: (self._state[p]["anchor"], self._state[p]["anchor_hash"]) for p in anchors}
        before = dict(self.left.copies), olds
        for p, anchor in anchors.items():
            del self._state[p]["anchor"], self._state[p]["anchor_hash"]
            if anchor is not None:
                self._state[p].update({"anchor": anchor, **no_hash()})
            self.left.identities[p] = _identity(anchor)
        take_hashes([self._state[p] for p in anchors if is_sharded(p)])
        for _, p in pairs:
            self.left.copies.pop(p, None)
        if moved:
            which = f"{moved[0][0]!r} and {len(moved) - 1} more were" if moved[1:] else f"{moved[0][0]!r} was"
            warnings.warn(
                f"RecAdam: {which} overwritten after the optimizer was made (by a wrapper's broadcast, or by "
                "loading), and anchored anew at the first step; to pull elsewhere give anchors=...",
                stacklevel=2,
            )
        return before

    def put_back(self, before: Any) -> None:
        """After a first step that was refused, so that what is overwritten until the next is still seen."""
        if before:
            self.left.copies, olds = before
            for p, (anchor, number) in olds.items():
                self.put(p, {**self._state[p], "anchor": anchor, "anchor_hash": number})

    def _comparable(self, name: str, p: Tensor) -> bool:
        """Whether a parameter's anchor is its own copy still, and it was not stepped and can be compared."""
        state, copy = self._state[p], self.left.copies.get(p)
        anchor: Any = state.get("anchor")
        if copy is None or copy is not anchor or copy.shape != p.shape:
            return False
        if self.left.identities[p] != _identity(copy) or not (in_memory(p) and in_memory(copy)):
            return False
        return local(copy).device == local(p).device and not steps_taken(name, state["step"])

    def release(self, work: Iterable[Work]) -> bool:
        """Free the anchors that the annealing has released; whether there were any."""
        freed = False
        for some in work:
            at = None if some.anchors is None or some.ways["capturable"] else some.release
            if at is None or (some.t is not None and some.t < at):
                continue
            released = [p for p in some.params if int(self._state[p]["step"]) >= at]
            take_hashes(self._state[p] for p in released)
            for p in released:
                self._state[p]["anchor"] = None
                forget(self.left.parts.get(p, ()), "anchor")
            freed = freed or bool(released)
        return freed

    def ready(self) -> None:
        """Let every anchor have its hash, as what is saved needs it."""
        self.settle()
        for p, state in self.left.states.items():
            now = _identity(state.get("anchor"))
            if now and now != self.left.identities[p]:  # set by hand
                state["anchor_hash"].zero_()
                self.left.identities[p] = now
        take_hashes(self.left.states.values())

    def lend(self, saved: dict[str, Any]) -> bool:
        """Leave the anchors out of what is saved; whether someone holds states now that were not stepped."""
        groups = {index: group for group in saved["param_groups"] for index in group["params"]}
        for index, state in saved["state"].items():
            if index in groups:
                keep = groups[index]["save_anchors"] and state.get("anchor") is not None
                state = {key: value for key, value in state.items() if key != "anchor" or keep}
                # Copies: distributed checkpoints are loaded into what this returns.
                state.update({k: state[k].clone() for k in ("anchor_hash", "anchor_rows") if k in state})
                saved["state"][index] = state
        self.left.lent = self.left.lent or any(map(_unstepped, self.left.states.values()))
        return self.left.lent

    def anew(self, reanchor: bool) -> dict[Tensor, dict[str, Any]]:
        """Every parameter's state as before its first step, anchored as it was or where it is now."""
        self.adopt()
        states: dict[Tensor, dict[str, Any]] = {}
        for group in self._groups:
            freed = {}
            for place, (name, p) in enumerate(named(group)):
                state = self.left.states.get(p) or self._state.get(p, {})
                if not state:
                    if not reanchor or self.left.importance is not None:
                        raise RecAdamError(
                            f"reset_moments: the state of {name!r} was emptied, and its anchor is lost; "
                            "call it with reanchor=True, or make a new optimizer where there is an importance"
                        )
                    state = {"anchor": None} if group["anchored"] else {}
                states[p] = {**state, **blank(p, group)}
                if "anchor" in state and reanchor:
                    states[p].update(no_hash(), anchor=anchor_of(None, name, p))
                elif state.get("anchor", p) is None:
                    freed[p] = name, place
            again = from_file(group, [(p, place) for p, (_, place) in freed.items()], self.left.files)
            for p, (name, _) in freed.items():
                if p not in again or again[p]["anchor_hash"] != states[p]["anchor_hash"]:
                    raise RecAdamError(
                        f"reset_moments: the anchor of {name!r} was freed, and is not to be had again; "
                        "call it with reanchor=True, or make a new optimizer"
                    )
                states[p].update(again[p])
        take_hashes([state for state in states.values() if is_sharded(state.get("anchor"))])
        return states


def _initial(
    name: str, p: Tensor, group: dict[str, Any], anchors: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """The state of a parameter that is new to the optimizer."""
    check_made(name, p)
    if not p.requires_grad and not is_wide(p):  # quantized weights
        raise RecAdamError(
            f"parameter {name!r} is frozen and has dtype {p.dtype}; leave it out, as param_groups does"
        )
    check_parameter(name, p, group)
    state = blank(p, group)
    residual_of(p, state, group)
    anchor = anchor_of(anchors, name, p) if group["anchored"] else None
    if anchor is not None:
        rows = anchors.match(name).rows if isinstance(anchors, Anchors) else None
        state.update({"anchor": anchor, **no_hash(rows)})
    return state


def _identity(anchor: Tensor | None) -> tuple[Any, ...]:
    """What changes when an anchor is set by hand, in place or otherwise; empty without one."""
    if anchor is None or anchor.is_meta:
        return ()
    mine = local(anchor)
    version = 0 if mine.is_inference() else mine._version
    return id(anchor), version, 0 if is_wrapper(anchor) else mine.data_ptr()


def _provenance(anchors: Anchors, group: Mapping[str, Any]) -> dict[str, Any]:
    """Where a group's anchors come from, as plain scalars; nothing for anchors in memory."""
    if not anchors.source.path:
        return {}
    matches = [anchors.match(name) for name in group["param_names"]]
    return {
        "anchor_source": anchors.source.path,
        "anchor_names": [match.stored if match.has_anchor else "" for match in matches],
        "anchor_dtype": "" if anchors.dtype is None else str(anchors.dtype).removeprefix("torch."),
        "anchor_place": anchors.place,
    }


def _whole(state: Mapping[str, Any]) -> bool:
    """Whether all entries are there, and of their kind; `checked` says what is wrong."""
    anchor, number = state.get("anchor"), state.get("anchor_hash")
    hashed = isinstance(number, Tensor) if "anchor" in state else number is None
    moving: list[Any] = [state.get(key) for key in ("step", "exp_avg", "exp_avg_sq")]
    others = [x for x in (anchor, state.get("importance"), state.get("residual")) if x is not None]
    dense = hashed and all(map(_is_dense, moving + others)) and not moving[0].ndim
    return dense and min(x.element_size() for x in moving) >= 4


def _is_dense(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.layout is torch.strided


def _unstepped(state: Mapping[str, Any]) -> bool:
    step = state["step"]
    return bool(step.is_meta) or not int(step)


def _sharded_as(p: Tensor, key: str, value: Any) -> Any:
    """An entry of the state of a parameter whose place another, sharded one has taken."""
    if value is None or key in ("step", "anchor_hash", "anchor_rows"):
        return value if value is None else value.clone()  # what others hold stays as the rest of it does
    device = value.device if key == "anchor" and value.device.type == "cpu" else p.device
    return like(p, lambda where: local(value)[where].to(device, copy=True))
