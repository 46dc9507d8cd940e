"""The pull towards the pretrained weights around any optimizer: after each of its steps."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer

from recadam_core import Hyperparameters, RecAdamError
from recadam_core.annealing import Constant, annealed_weights, annealing_from_dict
from recadam_core.arrays import check_named
from recadam_core.coefficients import Coefficients, proximal
from recadam_core.errors import check_number, shown
from recadam_core.optimizer import check_anchors
from recadam_core.strength import scheduled

from .anchors import Anchors, anchor_of, no_hash, take_hashes
from .drift import Drift, at_anchors, drift_of, weights_between
from .importance import weigh
from .kernels import fused_kernel, kernel_, one_pass_on
from .matching import check_made
from .memory import is_capturing, reshaped, wide_dtype
from .settings import named, named_apart
from .shards import is_sharded, is_wrapper, local, part_of, summed
from .sources import Mapped, is_wide, mapped_files
from .staging import Staging
from .zero import is_flat_part, joined

__all__ = ["AnchorPull", "anchor"]

STEP, PEAK, HASH, SOURCE, STRENGTH = KEYS = (
    "anchor_step", "anchor_peak", "anchor_hash", "anchor_source", "anchor_strength"
)  # fmt: skip
"""What a group of the optimizer says of the pull, and with it a checkpoint."""

AVERAGED = "z"
"""The entry of a schedule-free optimizer's state that is a weight, too: the parameter is a mean of such."""


def anchor(
    optimizer: Any,
    anchors: Mapping[str, Tensor] | None = None,
    *,
    pull: float = 0.1,
    annealing: Any = None,
    importance: Mapping[str, Tensor] | None = None,
    names: Iterable[tuple[str, Tensor]] | None = None,
) -> AnchorPull:
    r"""Let any optimizer pull towards the pretrained weights: decoupled, after each of its steps.

    Math:
        After the optimizer has taken $\theta_t$ to $\theta'$,
        $\theta_{t+1} = \theta' + r(\theta^* - \theta')$ with $r = p/(1+p)$ and
        $p = \text{pull} \cdot \bar\lambda_t\,\eta_t/\max_s\eta_s$: the proximal step on
        $\frac p2\|\theta - \theta^*\|^2$, stable at any strength, outside of gradients, moments, clipping.

    The optimizer stays what it was: its class, its schedulers, its state. Its groups get four entries, so
    that its checkpoints say which step it is and which anchors it had; they are loaded with the pull or
    without.

    Args:
        optimizer: a `torch.optim.Optimizer`, or a wrapper that has it as `.optimizer`.
        anchors: pretrained values by parameter name: `Anchors`, or a state dict, which is copied. A
            parameter without one is a new head and is not pulled. None anchors every parameter where it is
            now, or at the first step, with a warning, if it was overwritten before, as by DDP's broadcast.
        pull: the weight p at the peak of the learning rate; >= 0. 0.1 brings a weight an eleventh of the way
            home in a step. More where it forgets, less where it does not learn.
        annealing: what the pull is multiplied by over the steps, and where its task weight is below 1 the
            learning rate: `Sigmoid`, `Linear`, `Constant` or any object with their method `weights`. None
            pulls at one strength, which follows the learning rate.
        importance: how much each weight matters to the old task, by parameter name, in [0, 1].
        names: `model.named_parameters()`, where the optimizer was made from `model.parameters()`.

    Returns:
        The handle, with `drift`, `interpolate`, `at_anchors` and `remove`.

    Raises:
        RecAdamError: for a value outside its range, an anchor that matches no parameter or has another shape,
            or an optimizer that pulls already.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = anchor(optimizer, pull=0.1)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> round(handle.drift().distance, 4)  # of 0.1732 without
        0.1575

    Source: arXiv 2004.12651, Algorithm 1, line 12; Parikh and Boyd, Proximal algorithms, 2014, section 1.1.
    """
    optimizer = unwrapped(optimizer)
    from .optimizer import RecAdam

    if isinstance(optimizer, RecAdam):
        raise RecAdamError("anchor: RecAdam pulls by itself; give it anchors=..., or another optimizer")
    hooks = optimizer._optimizer_step_post_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), AnchorPull) for hook in hooks):
        raise RecAdamError("anchor: this optimizer pulls already; call remove() of the other handle first")
    return AnchorPull(optimizer, anchors, pull, annealing, importance, names)


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer in wrappers: of accelerate, DeepSpeed and others."""
    while not isinstance(optimizer, Optimizer) or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        if not hasattr(optimizer, "optimizer"):
            raise RecAdamError(f"anchor: the optimizer is {shown(optimizer)}; give a torch.optim.Optimizer")
        optimizer = optimizer.optimizer
    return optimizer


def check_settings(pull: Any, annealing: Any) -> tuple[float, Any]:
    """The settings of a pull, checked."""
    pull = check_number("anchor", "pull", pull, low=0.0)
    if isinstance(annealing, Mapping):
        annealing = annealing_from_dict(annealing)
    annealing = Constant(1.0, 1.0) if annealing is None else annealing
    Hyperparameters(annealing=annealing)  # which refuses what is none
    return pull, annealing


class AnchorPull:
    """What pulls an optimizer's parameters towards their anchors; made by `anchor`.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> handle = anchor(torch.optim.SGD([w], lr=0.1), pull=1.0)
        >>> handle.remove()
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        optimizer: Optimizer,
        anchors: Mapping[str, Tensor] | None,
        pull: float,
        annealing: Any,
        importance: Mapping[str, Tensor] | None,
        names: Iterable[tuple[str, Tensor]] | None,
    ) -> None:
        self.pull, self.annealing = check_settings(pull, annealing)
        self._counts = not isinstance(self.annealing, Constant)  # whether it matters which step this is
        self._optimizer, self._anchors, self._importance = optimizer, anchors, importance
        self._names = _by_parameter(names)
        self._states: dict[Tensor, dict[str, Any]] = {}
        self._copies: dict[Tensor, Tensor] = {}  # anchors that are copies of what is unstepped
        self._kernels: dict[Any, Callable[..., None]] = {}
        self._staging: dict[torch.device, Staging] = {}
        self._rates: list[tuple[dict[str, Any], Any]] = []  # what the task weight has scaled
        self._had_gradient: set[Tensor] = set()
        self._elsewhere = False  # whether the weights are others for now
        self._shares: list[Any] = []  # of the way home in this step, by group
        averages = "schedulefree" in type(optimizer).__name__.lower()
        self._entries = ("", AVERAGED) if averages else ("",)
        self._order = [list(group["params"]) for group in optimizer.param_groups]
        self._flat = False  # whether DeepSpeed steps parts of its own in the weights' place
        self._mapped: set[Mapped] | None = None  # files whose pages are anchors, once they are looked for
        groups = [self._view(group) for group in optimizer.param_groups]
        if anchors is not None:
            self._check_names(groups, anchors)
        made = [self._made(group) for group in groups]
        take_hashes([s for states in made for s in states.values() if is_sharded(s["anchor"])])
        for states in made:
            self._states.update(states)
        if not self._states:
            warnings.warn(
                "anchor: nothing is pulled, since no parameter of the optimizer has an anchor; give anchors "
                "that have their names",
                stacklevel=5,
            )
        self._check_said(optimizer.param_groups, "anchor")  # by a state that was loaded before
        if anchors is None:
            self._copies = {p: state["anchor"] for p, state in self._states.items()}
        self._put_keys()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_pre_hook(self._saving),
            optimizer.register_load_state_dict_pre_hook(self._loading),
            optimizer.register_load_state_dict_post_hook(self._put_keys),
        ]

    # What is pulled where to.

    def _view(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group as those that look for anchors know it, under the names that were given."""
        view = {"params": group["params"], "form": "decoupled", "anchored": True}
        if self._names is not None:
            for i, p in enumerate(group["params"]):
                if p not in self._names:
                    raise RecAdamError(
                        f"anchor: the optimizer's parameter {i} of shape {tuple(p.shape)} has no name in "
                        "names; give the whole model's named_parameters()"
                    )
            view["param_names"] = [self._names[p] for p in group["params"]]
        elif len(own := group.get("param_names") or []) == len(group["params"]):  # ZeRO makes one of all
            view["param_names"] = own
        return view

    def _check_names(self, groups: list[dict[str, Any]], anchors: Mapping[str, Tensor]) -> None:
        check_named("anchors", anchors)
        if not all("param_names" in group for group in groups):
            raise RecAdamError("anchors are matched by name; give names=model.named_parameters()")
        if not isinstance(anchors, Anchors):
            shapes = {name: p.shape for group in groups for name, p in named(group)}
            others = {name: p.shape for p, name in (self._names or {}).items()}  # frozen, and not stepped
            check_anchors({**others, **shapes}, anchors)

    def _made(self, group: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """The states of a group's parameters that have an anchor."""
        states: dict[Tensor, dict[str, Any]] = {}
        for name, p in named(group):
            check_made(name, p)
            if not p.is_floating_point() or not is_wide(p):
                raise RecAdamError(
                    f"anchor: parameter {name!r} has dtype {p.dtype}; give a floating one of 16 bits or more"
                )
            star = anchor_of(self._anchors, name, p)
            if star is not None:
                rows = self._anchors.match(name).rows if isinstance(self._anchors, Anchors) else None
                states[p] = {"anchor": star, **no_hash(rows)}
        weigh(group, [states.get(p, {}) for p in group["params"]], self._importance)
        return states

    def _put_keys(self, _: Any = None) -> None:
        """Let every group have the numbers of the pull."""
        source = self._anchors.source.path if isinstance(self._anchors, Anchors) else ""
        for group in self._optimizer.param_groups:
            for key, value in zip(KEYS, (0, 0.0, 0, source, 1.0), strict=True):
                group.setdefault(key, value)

    # A step.

    # A compiler of the step calls both hooks as they are: what they look up changes.

    @_disable_dynamo
    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        """The hook before a step: all is checked, and a task weight scales the learning rate."""
        if self._elsewhere:
            raise RecAdamError("anchor: the weights are at their anchors; step after the context has ended")
        self._settle(first=True)
        groups = self._optimizer.param_groups
        if self._counts and is_capturing(p for group in groups for p in group["params"][:1]):
            raise RecAdamError(
                "anchor: a CUDA graph is being captured, and would take this one step of the annealing again "
                "and again; leave annealing out"
            )
        weights = [annealed_weights(self.annealing, group[STEP] + 1) for group in groups]
        found = [self._share(group, recall) for group, (_, recall) in zip(groups, weights, strict=True)]
        self._shares = [share for _, share in found]
        self._had_gradient = {p for p in self._states if p.grad is not None}
        for group, (peak, _), (task, _) in zip(groups, found, weights, strict=True):
            group[PEAK] = peak
            if (
                task != 1.0
                and group.get("lr") is not None
                and not self._states.keys().isdisjoint(group["params"])
            ):
                rate = group["lr"]
                self._rates.append((group, rate.clone() if isinstance(rate, Tensor) else rate))
                group["lr"] = rate.mul_(task) if isinstance(rate, Tensor) else rate * task

    @_disable_dynamo
    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        """The hook after a step: the pull."""
        self._put_back_rates()
        infinite = getattr(self._optimizer, "found_inf", None)  # a GradScaler's: of 1 nothing was stepped
        if infinite is not None and (self._counts or infinite.device.type == "cpu"):
            if bool(infinite):
                return
            infinite = None
        for number, (group, share) in enumerate(zip(self._optimizer.param_groups, self._shares, strict=True)):
            group[STEP] += 1
            if isinstance(share, float) and share == 0:
                continue
            for key, params in self._alike(group).items():
                self._pull(number, key, params, share, infinite)

    def _put_back_rates(self) -> None:
        """The learning rates as they were; after a step that raised, too."""
        for group, rate in self._rates:
            if isinstance(rate, Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
        self._rates.clear()

    def _share(self, group: Mapping[str, Any], recall: float) -> tuple[Any, Any]:
        """The peak of a group's learning rate, and the share of the way home in the step that is to come.

        Numbers; or on the device, where the learning rate is.
        """
        lr: Any = group.get("lr")
        pull = self.pull * check_number("anchor", STRENGTH, group[STRENGTH], low=0.0)
        known = [group[PEAK], *(group[key] for key in ("initial_lr", "max_lr") if group.get(key) is not None)]
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            # Numbers are not sent: a graph that is being captured waits for no copy from the host.
            peak = lr.clamp(min=max((float(x) for x in known if not _is_there(x, lr)), default=0.0))
            for x in known:
                peak = torch.maximum(peak, x) if _is_there(x, lr) else peak
            if _is_there(group[PEAK], lr):  # where a graph looks for it again
                peak = group[PEAK].copy_(peak)
            p = torch.where(lr > 0, scheduled(pull, recall, lr, peak), 0.0)
            return peak, proximal(p, torch)[1]
        if lr is not None:
            lr = check_number("anchor", "lr", lr, low=0.0)
        highest = max(float(x) for x in (*known, lr or 0.0))
        weight = check_number("anchor", "pull", scheduled(pull, recall, lr, highest), low=0.0)
        return highest, proximal(weight)[1]

    def _alike(self, group: Mapping[str, Any]) -> dict[Any, list[Tensor]]:
        """A group's anchored parameters that were stepped, by what one kernel can take at once."""
        alike: dict[Any, list[Tensor]] = {}
        for p in group["params"]:
            state = self._states.get(p)
            if state is None or (p.grad is None and p not in self._had_gradient):
                continue
            key = p.dtype, p.device, is_wrapper(p), "importance" in state
            alike.setdefault(key, []).append(p)
        return alike

    def _pull(self, number: int, key: Any, params: list[Tensor], share: Any, infinite: Tensor | None) -> None:
        """Pull parameters that are alike, and what an optimizer averages beside them."""
        _, device, wrapped, weighed = key
        states = [self._states[p] for p in params]
        stars = [local(state["anchor"]) for state in states]
        weights = [local(state["importance"]) for state in states] if weighed else None
        if infinite is not None:
            share = (1 - infinite.to(device, wide_dtype(params[0])).reshape(())) * share
        own = self._optimizer.state
        for entry in self._entries:
            xs = [local(own[p][entry]) if entry else local(p) for p in params]
            name = (
                "" if wrapped or (isinstance(share, Tensor) and device.type == "cpu") else one_pass_on(device)
            )
            kernel = self._kernels.get((number, key, entry, name))
            if kernel is None:
                kernel = self._kernels[number, key, entry, name] = fused_kernel(name) if name else kernel_
            for part, some in self._streamed(stars, device):
                of_kernel = [share] * len(some) if isinstance(share, Tensor) and not name else share
                c = Coefficients(0.0, 0.0, 0.0, 0.0, of_kernel, 0.0)
                kernel(xs[part], None, None, None, some, c, weights and weights[part])

    def _streamed(self, stars: list[Tensor], device: torch.device) -> Iterable[tuple[slice, list[Tensor]]]:
        """Anchors on the parameters' device, some at a time where they are kept on the host."""
        if device.type != "cuda" or stars[0].is_cuda:
            return [(slice(0, len(stars)), stars)]
        if device not in self._staging:
            self._staging[device] = Staging(device)
        return self._staging[device].parts(stars)

    # What others do to the optimizer between its steps.

    def _settle(self, first: bool) -> None:
        """Let every parameter that is there now have its anchor, at the first step one anew."""
        self._put_back_rates()
        self._check_files()
        groups = self._optimizer.param_groups
        if not all(STEP in group for group in groups):
            self._put_keys()
        order = [list(group["params"]) for group in groups]
        if len(order) != len(self._order) or not all(map(_are_same, order, self._order)):
            self._adopt(order)
        if first and self._copies:
            self._anchor_anew()
        for p, state in self._states.items():
            if state["anchor"].shape != p.shape:
                raise reshaped("of a group", p, "anchor", state["anchor"])

    def _check_files(self) -> None:
        """Raise if a file whose pages are anchors was written to."""
        if self._mapped is None:
            self._mapped = mapped_files(state["anchor"] for state in self._states.values())
        for file in self._mapped:
            file.check()

    def _adopt(self, order: list[list[Tensor]]) -> None:
        """Give the states of parameters that are gone to those in their places; anchor what is new."""
        current, before = ({*chain.from_iterable(some)} for some in (order, self._order))
        states: dict[Tensor, dict[str, Any]] = {}
        passed: dict[Tensor, Tensor] = {}  # parameters whose places others have taken, by those
        for old, params in zip(self._order, order, strict=False):
            lost = {p: i for i, p in enumerate(old) if p not in current}
            if is_flat_part(params, list(lost)):
                states.update(self._flattened(params[0], list(lost)))
                before.add(params[0])
                continue
            for p, i in lost.items():
                if i >= len(params) or params[i] in before or params[i].shape != p.shape:
                    raise RecAdamError(
                        f"anchor: the optimizer's parameter {i} of shape {tuple(p.shape)} was replaced by "
                        "others after anchor() was called; call it after the model is wrapped"
                    )
                passed[params[i]] = p
                self._pass_on(params[i], [p])
                if p in self._states:
                    state = self._states[p]
                    parts = {key: state[key] for key in ("anchor", "importance") if key in state}
                    states[params[i]] = {**state, **{key: part_of(x, params[i]) for key, x in parts.items()}}
        for view in map(self._view, self._optimizer.param_groups):
            seen = before | {*states, *passed}
            some = [(name, p) for name, p in named(view) if p not in seen]
            if some:
                more = {"param_names": [name for name, _ in some]} if "param_names" in view else {}
                states.update(self._made({**view, "params": [p for _, p in some], **more}))
        copied = {new: states[new]["anchor"] for new, old in passed.items() if old in self._copies}
        self._copies = {p: star for p, star in {**self._copies, **copied}.items() if p in current}
        kept = {p: state for p, state in self._states.items() if p in current}
        self._states, self._order, self._mapped = {**kept, **states}, order, None

    def _pass_on(self, new: Tensor, old: list[Tensor]) -> None:
        """Give a parameter the name of those in whose place it is."""
        if self._names is not None:
            self._names[new] = " and ".join(self._names[p] for p in old[:2])

    def _flattened(self, flat: Tensor, lost: list[Tensor]) -> dict[Tensor, dict[str, Any]]:
        """The state of what DeepSpeed has made of a group."""
        self._pass_on(flat, lost)
        self._flat = True
        for p in lost:
            self._copies.pop(p, None)
        count = torch.zeros((), dtype=torch.float32, device="cpu")
        parts = {str(i): (p, {"step": count, **self._states.get(p, {})}) for i, p in enumerate(lost)}
        state = joined(flat, parts)
        return {flat: {key: x for key, x in state.items() if key != "step"}} if "anchor" in state else {}

    def _anchor_anew(self) -> None:
        """At the first step, anchor where they are now the parameters that were overwritten until then."""
        copies, self._copies = self._copies, {}
        copies = {p: star for p, star in copies.items() if star.shape == p.shape}
        counts = [(local(star).to(p.dtype) != local(p)).sum() for p, star in copies.items()]
        totals = summed(counts, list(copies))
        moved = [p for p, total in zip(copies, totals, strict=True) if int(total)]
        for p in moved:
            star = anchor_of(None, "a parameter", p)
            self._states[p].update({"anchor": star, **no_hash()})
        take_hashes([self._states[p] for p in moved if is_sharded(p)])
        if moved:
            views = map(self._view, self._optimizer.param_groups)
            names = {p: name for view in views for name, p in named(view)}
            which = repr(names.get(moved[0], "a parameter"))
            which += f" and {len(moved) - 1} more were" if moved[1:] else " was"
            warnings.warn(
                f"anchor: {which} overwritten after it was called (by a wrapper's broadcast, or by loading), "
                "and anchored anew at the first step; to pull elsewhere give anchors=...",
                stacklevel=2,
            )

    # Checkpoints.

    @torch.no_grad()
    def _saving(self, *_: Any) -> None:
        """The hook before a state is saved: each group says the hash of its anchors."""
        self._settle(first=False)
        self.said()

    def said(self) -> list[dict[str, Any]]:
        """The optimizer's groups, with what a checkpoint is to know of the pull."""
        for group, number in zip(self._optimizer.param_groups, self._hashes(), strict=True):
            group[HASH] = number
        return self._optimizer.param_groups

    def _hashes(self) -> list[int]:
        """A number for each group's anchors, which others would not have."""
        take_hashes(self._states.values())
        return [
            sum(int(self._states[p]["anchor_hash"]) for p in group["params"] if p in self._states) % 2**62
            for group in self._optimizer.param_groups
        ]

    def _loading(self, _: Any, saved: Any) -> None:
        """The hook before a state is loaded: it has to be of these anchors."""
        groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
        if not isinstance(groups, (list, tuple)) or len(groups) != len(self._optimizer.param_groups):
            return  # which the optimizer says
        said = [group for group in groups if isinstance(group, Mapping) and HASH in group]
        if not said:
            warnings.warn(
                "anchor: the state was saved without the pull; its steps are counted from 0", stacklevel=2
            )
            return
        self._settle(first=False)
        for index, (ours, theirs) in enumerate(zip(self._optimizer.param_groups, groups, strict=True)):
            names = [group.get("param_names") or [] for group in (ours, theirs)]
            if names[0] != names[1] and sorted(names[0]) == sorted(names[1]):
                one, other = next(pair for pair in zip(*names, strict=True) if pair[0] != pair[1])
                raise RecAdamError(
                    f"load_state_dict: group {index} has {one!r} where the state has {other!r}, and states "
                    "are loaded by place; give the optimizer its parameters in the order of the saved one"
                )
        self._check_said(groups, "load_state_dict")
        if any(group[STEP] for group in groups):  # else accelerate loads what it has just saved
            self._copies.clear()  # what is loaded with it may be tuned

    def _check_said(self, groups: Sequence[Mapping[str, Any]], where: str) -> None:
        """Raise unless what the groups of a state say of a pull, if anything, is true of this one."""
        if not any(group.get(HASH) for group in groups):
            return
        for index, (group, number) in enumerate(zip(groups, self._hashes(), strict=True)):
            check_number(where, STEP, group.get(STEP), low=0.0)
            check_number(where, PEAK, group.get(PEAK), low=0.0)
            check_number(where, STRENGTH, group.get(STRENGTH, 1.0), low=0.0)
            if group.get(HASH) != number:
                source = f" (from {group[SOURCE]})" if group.get(SOURCE) else ""
                raise RecAdamError(
                    f"{where}: group {index} was pulled towards other anchors{source}; give those as "
                    "anchors=..., or call anchor() before the tuned weights are loaded; for another pull, "
                    "which begins anew, take the entries anchor_* out of the optimizer's groups first"
                )

    # What a user asks.

    @property
    def strength(self) -> float:
        """What the pull is multiplied by, 1 at first: for control in mid-run. Checkpoints have it."""
        strength: float = self._optimizer.param_groups[0].get(STRENGTH, 1.0)
        return strength

    @strength.setter
    def strength(self, value: float) -> None:
        value = check_number("anchor", "strength", value, low=0.0)
        if STRENGTH not in self._optimizer.param_groups[0]:
            raise RecAdamError("anchor: the pull was removed and has no strength; call anchor() again")
        for group in self._optimizer.param_groups:
            group[STRENGTH] = value

    def __repr__(self) -> str:
        """Its settings, and how much it pulls."""
        kind = type(self._optimizer).__name__
        return f"AnchorPull({kind}, {len(self._states)} parameters, pull={self.pull:g})"

    def __reduce__(self) -> Any:
        raise RecAdamError(
            "AnchorPull: a handle is its optimizer's, and neither copied nor pickled; save the optimizer's "
            "state_dict(), and call anchor() again"
        )

    def is_of(self, optimizer: Any) -> bool:
        """Whether it pulls this optimizer's parameters, or did before `remove`."""
        return unwrapped(optimizer) is self._optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self._optimizer.param_groups

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that are pulled."""
        return list(self._states)

    @property
    def anchors(self) -> dict[str, Tensor]:
        """The anchors by parameter name, as they are kept: to be saved, if a checkpoint is to have them.

        Raises:
            RecAdamError: when a parameter has no name.

        Example:
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> anchor(torch.optim.SGD([("w", w)], lr=0.1)).anchors
            {'w': tensor([1., 1.])}
        """
        return {name: self._states[p]["anchor"] for name, p in self._named("anchors") if p in self._states}

    @torch.no_grad()
    def drift(self) -> Drift:
        """How far the weights are from their anchors.

        Returns:
            The figures of all anchored parameters together, and in `parameters` of each: `rate` is the weight
            of the last step's pull, and `pull_share`, of which nobody keeps a record here, is NaN.

        Example:
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> optimizer = torch.optim.SGD([("w", w)], lr=0.1)
            >>> anchor(optimizer, {"w": torch.tensor([3.0, 4.0])}).drift().distance
            5.0
        """
        self._check_files()
        views = [self._view(group) for group in self._optimizer.param_groups]
        pairs = [(name, p) for name, p in named_apart(views) if p in self._states]
        drift = drift_of(pairs, self._states, {})
        shares = map(float, self._shares or [math.nan] * len(views))
        rates = {
            p: math.inf if share == 1 else share / (1 - share)  # the p of p/(1 + p)
            for view, share in zip(views, shares, strict=False)
            for p in view["params"]
        }
        each = {name: drift.parameters[name]._replace(rate=rates.get(p, math.nan)) for name, p in pairs}
        rate = next((x.rate for x in each.values()), math.nan)
        return drift._replace(rate=rate, parameters=each)

    @torch.no_grad()
    def interpolate(self, alpha: float) -> dict[str, Tensor]:
        r"""Weights between the anchors and where they are now, as in WiSE-FT.

        Math:
            $(1-\alpha)\,\theta^* + \alpha\,\theta$; what has no anchor stays $\theta$.

        Args:
            alpha: 0 is the anchor, 1 the tuned weights.

        Returns:
            New tensors by parameter name, in the parameters' dtypes, sharded as they are.

        Raises:
            RecAdamError: when alpha is no finite number, or a parameter has no name.

        Example:
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = torch.optim.SGD([("w", w)], lr=0.1)
            >>> anchor(optimizer, {"w": torch.zeros(2)}).interpolate(0.25)["w"]
            tensor([0.2500, 0.2500])

        Source: arXiv 2109.01903, eq. (1).
        """
        pairs = self._named("interpolate")
        states = {p: self._states.get(p, {}) for _, p in pairs}
        views = map(self._view, self._optimizer.param_groups)
        between = weights_between(views, states, (), alpha, None)
        return {name: between[p] for name, p in pairs}

    def _named(self, where: str) -> list[tuple[str, Tensor]]:
        """The optimizer's parameters, each with a name of its own."""
        self._check_whole(where)
        self._check_files()
        views = [self._view(group) for group in self._optimizer.param_groups]
        pairs = list(chain.from_iterable(map(named, views)))
        if not all("param_names" in view for view in views) or len(dict(pairs)) < len(pairs):
            raise RecAdamError(f"{where}: parameters need names, each its own; give names to anchor()")
        return pairs

    @contextmanager
    def at_anchors(self) -> Iterator[None]:
        """The model with its pretrained weights, for as long as the context lasts: a reference for free.

        Anchors of the parameters' dtype and device take their place, so that nothing is copied. Of sharded
        parameters the contents are exchanged, part by part. For others the weights are kept where the anchor
        is, on the host perhaps. What has no anchor stays as it is, as buffers do. In the context load no
        weights, and let no gradient flow back through what was computed before it.

        Raises:
            RecAdamError: within a step, or while a CUDA graph is captured.

        Example:
            >>> w = torch.nn.Parameter(torch.ones(1))
            >>> with anchor(torch.optim.SGD([("w", w)], lr=0.1), {"w": torch.zeros(1)}).at_anchors():
            ...     print(w.item())
            0.0
            >>> w.item()
            1.0
        """
        if _is_stepping(self._optimizer):
            raise RecAdamError("at_anchors: the optimizer is within a step; call it before or after")
        if self._elsewhere:
            yield
            return
        self._settle(first=False)
        self._check_whole("at_anchors")
        self._elsewhere = True
        try:
            with at_anchors((p, state["anchor"]) for p, state in self._states.items()):
                yield
        finally:
            self._elsewhere = False

    def _check_whole(self, where: str) -> None:
        if self._flat:
            raise RecAdamError(
                f"{where}: ZeRO's flat parts are not the model's weights; gather a checkpoint and use that"
            )

    def remove(self) -> None:
        """Let the optimizer be as it was before: no pull, and nothing of it in its groups."""
        self._put_back_rates()
        for hook in self._hooks:
            hook.remove()
        for group in self._optimizer.param_groups:
            for key in KEYS:
                group.pop(key, None)


def _by_parameter(names: Any) -> dict[Tensor, str] | None:
    """Names by parameter, from pairs of name and parameter."""
    if names is None:
        return None
    pairs = names.items() if isinstance(names, Mapping) else names
    try:
        found = {p: name for name, p in pairs}
    except (TypeError, ValueError):
        raise RecAdamError(f"anchor: names is {shown(names)}; give model.named_parameters()") from None
    if not all(isinstance(p, Tensor) and isinstance(name, str) for p, name in found.items()):
        raise RecAdamError(f"anchor: names is {shown(names)}; give model.named_parameters()")
    return found


def _is_stepping(optimizer: Optimizer) -> bool:
    """Whether what calls is called from the optimizer's step: no flag would outlive a step that raises."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "step" and frame.f_locals.get("self") is optimizer:
            return True
    return False


def _is_there(x: Any, lr: Tensor) -> bool:
    """Whether a number is on the device of the learning rate."""
    return isinstance(x, Tensor) and x.device == lr.device


def _are_same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two lists hold the same tensors."""
    return len(one) == len(other) and all(map(is_, one, other))
