"""The settings of a parameter group: plain scalars, checked, and the policy they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recadam_core import Hyperparameters, RecAdamError, annealing_from_dict, annealing_to_dict, release_step
from recadam_core.annealing import ANNEALINGS
from recadam_core.errors import unknown

from .fused import chosen_fused, fused_kernel
from .rounding import ROUNDINGS

__all__ = ["FLAGS", "FROM", "check_parameter", "check_settings", "group_policy", "named", "plain", "rate_of"]

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


_POLICY = ("betas", "eps", "weight_decay", "gamma", "bias_correction", "form")


def _policy(annealing: Any, values: tuple[Any, ...]) -> tuple[Hyperparameters, int | None]:
    if isinstance(annealing, tuple):
        annealing = annealing_from_dict(dict(annealing))
    hp = Hyperparameters(annealing=annealing, **dict(zip(_POLICY, values, strict=True)))
    return hp, release_step(annealing)


_cached_policy = lru_cache(maxsize=256)(_policy)


def group_policy(group: Mapping[str, Any]) -> tuple[Hyperparameters, int | None]:
    """The settings of a parameter group, and the step that releases its anchors."""
    annealing = group["annealing"]
    values = tuple(tuple(v) if isinstance(v, list) else v for v in map(group.get, _POLICY))
    if isinstance(annealing, dict):
        return _cached_policy(tuple(annealing.items()), values)
    return _policy(annealing, values)  # a stranger's object, which may change


def named(group: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The group's parameters with their names, or their places for want of those."""
    names = group.get("param_names") or [f"params[{i}]" for i in range(len(group["params"]))]
    return list(zip(names, group["params"], strict=True))


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise for a flag that is none, and for two that exclude one another."""
    for name in ("bias_correction", "anchored", "maximize", "exact", "capturable", "differentiable",
                 "save_anchors"):  # fmt: skip
        if not isinstance(settings[name], bool):
            raise RecAdamError(f"RecAdam: {name} is {settings[name]!r}; give True or False")
    for name in ("betas", "eps", "weight_decay", "gamma"):
        if any(isinstance(x, Tensor) for x in (settings[name], *_items(settings[name]))):
            raise RecAdamError(
                f"RecAdam: {name} is {settings[name]!r}; give plain numbers, only lr may be a tensor"
            )
    if settings["foreach"] not in (True, False, None):
        raise RecAdamError(f"RecAdam: foreach is {settings['foreach']!r}; give True, False or None")
    if settings["rounding"] not in ROUNDINGS:
        raise unknown("rounding", settings["rounding"], ROUNDINGS)
    together = {
        ("foreach", "fused"): "give one of them",
        ("capturable", "exact"): "coefficients of the device differ in their last bits; give one of them",
        ("differentiable", "fused"): "give one of them",
        ("differentiable", "foreach"): "give one of them",
        ("differentiable", "exact"): "give one of them",
    }
    for (one, other), remedy in together.items():
        if settings[one] and settings[other]:
            raise RecAdamError(f"RecAdam: {one} and {other} are both set; {remedy}")
    if settings["differentiable"] and settings["rounding"] != "nearest":
        raise RecAdamError("RecAdam: differentiable needs rounding='nearest'; give one of them")


def check_parameter(name: str, p: Tensor, settings: Mapping[str, Any]) -> None:
    """Raise for a parameter that cannot be stepped with these settings."""
    if not p.is_floating_point():
        raise RecAdamError(f"parameter {name!r} has dtype {p.dtype}; give a real floating tensor")
    if settings["fused"]:
        name = chosen_fused(settings, p.device)
        fused_kernel(name)
        if settings["capturable"] and name != "triton":
            raise RecAdamError(
                f"RecAdam: capturable and fused are both set, and fused={name!r} takes coefficients from the "
                "host; give one of them"
            )
    if settings["rounding"] == "stochastic" and p.dtype == torch.float16:
        raise RecAdamError(
            f"parameter {name!r} is float16; rounding='stochastic' is for bfloat16, give another"
        )


def _items(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, (tuple, list)) else ()


def rate_of(lr: Any, hp: Hyperparameters) -> float:
    """The learning rate as a checked number."""
    try:
        rate = float(lr.detach() if isinstance(lr, Tensor) else lr)
    except (TypeError, ValueError, RuntimeError):
        raise RecAdamError(f"RecAdam: lr is {lr!r}; give a number or a 0-d tensor") from None
    hp.replace(lr=rate)
    return rate


def plain(value: Any) -> Any:
    """A setting as plain scalars, which weights-only loading accepts; a stranger's annealing as it is."""
    if type(value) in ANNEALINGS.values():
        return {key: plain(x) for key, x in annealing_to_dict(value).items()}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(plain(x) for x in value)
    return value.item() if isinstance(value, np.generic) else value
