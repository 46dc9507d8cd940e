"""The settings of a parameter group: plain scalars, checked, and the policy they stand for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recadam_core import Hyperparameters, RecAdamError, annealing_from_dict, annealing_to_dict, release_step
from recadam_core.annealing import ANNEALINGS
from recadam_core.errors import check_flag, check_number, shown, unknown

from .kernels import chosen_fused, fused_kernel
from .rounding import ROUNDINGS
from .sources import is_wide

__all__ = [
    "FLAGS",
    "FROM",
    "SETTINGS",
    "Policies",
    "Policy",
    "check_parameter",
    "named",
    "named_apart",
    "policy_of",
    "rate_of",
    "settled",
]

FLAGS = {
    "exact": False,
    "capturable": False,
    "differentiable": False,
    "rounding": "nearest",
    "save_anchors": False,
    "anchor_source": "",
    "anchor_names": (),
    "anchor_dtype": "",
    "anchor_place": "device",
}
"""Settings that older states do not have."""

FROM = ("anchor_source", "anchor_names", "anchor_dtype", "anchor_place")
"""Where the anchors of a group came from: file, names there, and how they are kept."""

_POLICY = ("betas", "eps", "weight_decay", "gamma", "annealing", "bias_correction", "form")
_TRUTHS = (
    "bias_correction",
    "anchored",
    "exact",
    "maximize",
    "capturable",
    "differentiable",
    "save_anchors",
)
_WAYS = ("anchored", "foreach", "fused", "exact", "maximize", "capturable", "differentiable", "rounding")
_STEPPED = (*_POLICY, *_WAYS, "save_anchors")
SETTINGS = ("lr", *_STEPPED)
"""What a group says of a step."""


class Policy(NamedTuple):
    """What a group's settings come to, but for its learning rate."""

    hp: Hyperparameters  # its lr is the default, not the group's
    ways: Mapping[str, Any]  # how to step: the flags
    known: int | None  # the step that releases the anchors, of an annealing that says so for good

    def release(self) -> int | None:
        """The step from which the anchors are read no more."""
        ours = type(self.hp.annealing) in ANNEALINGS.values()
        return self.known if ours else release_step(self.hp.annealing)


def settled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A group's settings as plain scalars, which weights-only loading accepts, all of them checked.

    What a constructor takes, a group may hold in mid-training and a checkpoint may bring is decided here.
    """
    return _checked(settings)[0]


def policy_of(settings: Mapping[str, Any]) -> Policy:
    """The policy that a group's settings stand for; raises as `settled`."""
    return _checked(settings)[1]


def _checked(settings: Mapping[str, Any], reads: bool = True) -> tuple[dict[str, Any], Policy]:
    """Settings and policy; an lr on the device is only read where that is asked for."""
    plain = dict(settings)
    for name in ("lr", *_STEPPED):
        if name not in plain:
            raise RecAdamError(f"RecAdam: a group has no {name!r}; give one that RecAdam made")
    for name in _TRUTHS:
        plain[name] = check_flag("RecAdam", name, plain[name])
    for name in ("foreach", "fused"):
        if plain[name] is not None and not (name == "fused" and isinstance(plain[name], str)):
            plain[name] = check_flag("RecAdam", name, plain[name])
    if not isinstance(plain["rounding"], str) or plain["rounding"] not in ROUNDINGS:
        raise unknown("rounding", plain["rounding"], ROUNDINGS)
    for name in ("betas", "eps", "weight_decay", "gamma"):
        if any(isinstance(x, Tensor) for x in (plain[name], *_items(plain[name]))):
            raise RecAdamError(
                f"RecAdam: {name} is {shown(plain[name])}; give plain numbers, only lr may be a tensor"
            )
    if isinstance(plain["annealing"], Mapping):
        plain["annealing"] = annealing_from_dict(plain["annealing"])
    if not isinstance(plain["lr"], Tensor):
        plain["lr"] = rate_of(plain["lr"])
    else:
        rate_of(plain["lr"], reads)
    hp = Hyperparameters(**{name: plain[name] for name in _POLICY})
    plain.update({name: getattr(hp, name) for name in _POLICY})
    if type(hp.annealing) in ANNEALINGS.values():
        plain["annealing"] = annealing_to_dict(hp.annealing)
    together = {
        ("foreach", "fused"): "give one of them",
        ("capturable", "exact"): "coefficients of the device differ in their last bits; give one of them",
        ("differentiable", "fused"): "give one of them",
        ("differentiable", "foreach"): "give one of them",
        ("differentiable", "exact"): "give one of them",
    }
    for (one, other), remedy in together.items():
        if plain[one] and plain[other]:
            raise RecAdamError(f"RecAdam: {one} and {other} are both set; {remedy}")
    if plain["differentiable"] and plain["rounding"] != "nearest":
        raise RecAdamError("RecAdam: differentiable needs rounding='nearest'; give one of them")
    return plain, Policy(hp, {name: plain[name] for name in _WAYS}, release_step(hp.annealing))


class Policies:
    """The policies of an optimizer's groups: a setting is checked again when it is another object."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, tuple[Any, ...], Policy]] = {}
        self._known: dict[Any, Policy] = {}

    def of(self, groups: Iterable[dict[str, Any]]) -> list[Policy]:
        """The policies, one object for equal settings; new settings are made plain in their groups."""
        policies, changed = [], []
        for group in groups:
            values = _values(group)
            seen = self._seen.get(id(group))
            if seen is None or len(seen[1]) != len(values) or not all(map(is_, seen[1], values)):
                plain, policy = _checked(group, reads=group.get("capturable") is not True)
                changed.append((group, plain))
                seen = self._seen[id(group)] = group, _values(plain), self._one(plain, policy)
            policies.append(seen[2])
        for group, plain in changed:
            group.update({name: plain[name] for name in ("lr", *_STEPPED)})
        return policies

    def _one(self, plain: dict[str, Any], policy: Policy) -> Policy:
        """One object for settings that are equal."""
        if len(self._known) > 2 * len(self._seen) + 16:  # settings of long ago
            self._known.clear()
        try:
            return self._known.setdefault(_typed([plain[name] for name in (*_POLICY, *_WAYS)]), policy)
        except TypeError:  # a stranger's annealing that has no hash
            return policy


_stepped = itemgetter(*_STEPPED)


def _values(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The objects that a group's settings are, those within an annealing and betas too."""
    try:
        values: tuple[Any, ...] = _stepped(group)
        group["lr"]
    except KeyError:
        return ()  # something is missing
    annealing, betas = group["annealing"], group["betas"]
    if type(annealing) is dict:
        values += tuple(annealing.values())
    return values + tuple(betas) if type(betas) is list else values


def _typed(x: Any) -> Any:
    """A setting as a key that tells 1 from True, and one annealing object from another."""
    if isinstance(x, dict):
        return tuple((name, _typed(value)) for name, value in x.items())
    if isinstance(x, (tuple, list)):
        return tuple(map(_typed, x))
    return type(x), x


def named(group: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The group's parameters with their names, or their places for want of those."""
    names = group.get("param_names") or [f"params[{i}]" for i in range(len(group["params"]))]
    if len(names) != len(group["params"]):
        raise RecAdamError(
            f"RecAdam: a group has {len(names)} names and {len(group['params'])} parameters; "
            "use add_param_group for more"
        )
    return list(zip(names, group["params"], strict=True))


def named_apart(groups: Iterable[Mapping[str, Any]]) -> list[tuple[str, Tensor]]:
    """All parameters, each under a name of its own: as given, or numbered where that is not one."""
    pairs = [pair for group in groups for pair in named(group)]
    count = Counter(name for name, _ in pairs)
    return [(name if count[name] == 1 else f"{name} ({i})", p) for i, (name, p) in enumerate(pairs)]


def check_parameter(name: str, p: Tensor, settings: Mapping[str, Any]) -> None:
    """Raise for a parameter that cannot be stepped with these settings."""
    if not p.is_floating_point():
        raise RecAdamError(f"parameter {name!r} has dtype {p.dtype}; give a real floating tensor")
    if not is_wide(p):
        raise RecAdamError(f"parameter {name!r} has dtype {p.dtype}; give one of 16 bits or more")
    if settings["fused"]:
        kernel = chosen_fused(settings, p.device)
        fused_kernel(kernel)
        if settings["capturable"] and kernel != "triton":
            raise RecAdamError(
                f"RecAdam: capturable and fused are both set, and fused={kernel!r} takes coefficients from "
                "the host; give one of them"
            )
    if settings["rounding"] == "stochastic" and p.dtype == torch.float16:
        raise RecAdamError(
            f"parameter {name!r} is float16; rounding='stochastic' is for bfloat16, give another"
        )


def _items(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, (tuple, list)) else ()


def rate_of(lr: Any, reads: bool = True) -> float | None:
    """A learning rate as a checked number; None for a tensor that is to stay on its device."""
    if isinstance(lr, Tensor):
        if not reads:
            if lr.ndim or lr.is_complex():
                raise RecAdamError(f"RecAdam: lr is {shown(lr)}; give a number, or a real 0-d tensor")
            return None
        lr = lr.detach()
    rate: float = check_number("Hyperparameters", "lr", lr, low=0.0)
    return rate
