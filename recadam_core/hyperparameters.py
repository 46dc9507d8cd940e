"""Hyperparameters: everything a run may choose, frozen and checked."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from .annealing import ANNEALINGS, Annealing, Sigmoid, annealing_from_dict, annealing_to_dict
from .errors import RecAdamError, check_flag, check_number, shown, unknown

__all__ = ["FORMS", "Hyperparameters"]

FORMS = ("decoupled", "released", "proximal")
"""The three forms of the update; `coefficients` says how they differ."""


@dataclass(frozen=True)
class Hyperparameters:
    r"""Settings of RecAdam, validated when made.

    Args:
        lr: learning rate $\eta$; >= 0. A schedule passes each step's own to `coefficients`.
        betas: decay rates $(\beta_1, \beta_2)$ of Adam's moments; each in [0, 1).
        eps: $\varepsilon$ under Adam's fraction; >= 0. The released optimizer's default is 1e-6.
        weight_decay: decoupled decay towards zero, as in AdamW; >= 0. It works against the anchor,
            so 0 is right for pretrained weights.
        gamma: strength $\gamma$ of the quadratic penalty $\tfrac12\gamma\|\theta-\theta^*\|^2$; >= 0.
            Each step moves the weights by $\eta\gamma\bar\lambda_t$ of the way home: keep that below 1.
        annealing: gives $(\lambda_t, \bar\lambda_t)$ for each step.
        bias_correction: whether Adam's moments are corrected for their start at zero.
        form: "decoupled", "released" or "proximal".

    Raises:
        RecAdamError: when a value is outside its range.

    Example:
        >>> Hyperparameters(lr=1e-4, annealing=Sigmoid(k=0.2, t0=100)).gamma
        5000.0

    Source: arXiv 2004.12651, Algorithm 1.
    """

    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    gamma: float = 5000.0
    annealing: Annealing = field(default_factory=Sigmoid)
    bias_correction: bool = True
    form: str = "decoupled"

    def __post_init__(self) -> None:
        where = "Hyperparameters"
        settled: dict[str, Any] = {
            name: check_number(where, name, getattr(self, name), low=0.0)
            for name in ("lr", "eps", "weight_decay", "gamma")
        }
        try:
            beta1, beta2 = () if isinstance(self.betas, (Set, Mapping)) else self.betas
        except Exception:  # whatever iterating over it raises
            raise RecAdamError(
                f"{where}: betas is {shown(self.betas)}; give two numbers, as (0.9, 0.999)"
            ) from None
        settled["betas"] = tuple(
            check_number(where, name, beta, low=0.0, high=1.0, open_high=True)
            for name, beta in (("betas[0]", beta1), ("betas[1]", beta2))
        )
        settled["bias_correction"] = check_flag(where, "bias_correction", self.bias_correction)
        weights = getattr(self.annealing, "weights", None)
        if isinstance(self.annealing, type) or not callable(weights):
            raise RecAdamError(
                f"{where}: annealing is {shown(self.annealing)}; give one, as Sigmoid(k=0.1, t0=250)"
            )
        if type(self.annealing) not in ANNEALINGS.values() and not _takes(weights, 1, None):
            raise RecAdamError(
                f"{where}: weights of {type(self.annealing).__name__} takes other arguments; define it as "
                "weights(self, t, xp=None)"
            )
        if not isinstance(self.form, str) or self.form not in FORMS:
            raise unknown("form", self.form, FORMS)
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    def replace(self, **changes: Any) -> Hyperparameters:
        """A copy with some values changed, checked again.

        Example:
            >>> Hyperparameters().replace(gamma=100.0).gamma
            100.0
        """
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain scalars, lists and dicts, ready for JSON.

        Example:
            >>> Hyperparameters.from_dict(Hyperparameters().to_dict()) == Hyperparameters()
            True
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "betas": list(self.betas), "annealing": annealing_to_dict(self.annealing)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Hyperparameters:
        """The settings that `to_dict` described.

        Raises:
            RecAdamError: for an unknown key or a value outside its range.

        Example:
            >>> Hyperparameters.from_dict({"lr": 1e-4}).lr
            0.0001
        """
        if not isinstance(values, Mapping):
            raise RecAdamError(f"Hyperparameters: {shown(values)}; give a dict of settings by name")
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise unknown("hyperparameter", key, known)
        values = dict(values)
        if "annealing" in values:
            values["annealing"] = annealing_from_dict(values["annealing"])
        return cls(**values)


def _takes(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a function can be called so, as far as it says."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # a compiled one that has no signature
        pass
    return True
