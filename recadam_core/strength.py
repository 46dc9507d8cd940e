"""How strong the pull is, in terms that survive a change of learning rate or length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .errors import RecAdamError, check_number

__all__ = ["DriftBudget", "gamma_for", "scheduled"]


def gamma_for(lr: float, *, pull: float | None = None, half_life: float | None = None) -> float:
    r"""The strength that gives a pull of this share a step, or of this half-life.

    Math:
        $\gamma = p / \eta$ with the pull $p$, or $p = 1 - 2^{-1/h}$ with the half-life $h$: without a
        gradient and at a recall weight of 1, a weight's distance to its anchor halves every $h$ steps.

    Args:
        lr: learning rate $\eta$, the peak of its schedule; > 0.
        pull: share of the way home in one step, $\eta\gamma$; >= 0.
        half_life: steps in which the pull alone halves a distance; > 0.

    Returns:
        $\gamma$ for `Hyperparameters` or an optimizer's `gamma`.

    Raises:
        RecAdamError: unless exactly one of pull and half_life is given, and each number is in range.

    Example:
        >>> gamma_for(1e-4, pull=0.2), round(gamma_for(1e-4, half_life=1))
        (2000.0, 5000)
    """
    lr = check_number("gamma_for", "lr", lr, low=0.0, open_low=True)
    if (pull is None) == (half_life is None):
        raise RecAdamError("gamma_for: give one of pull and half_life")
    if half_life is not None:
        half_life = check_number("gamma_for", "half_life", half_life, low=0.0, open_low=True)
        pull = -math.expm1(-math.log(2.0) / half_life)
    gamma: float = check_number("gamma_for", "pull", pull, low=0.0) / lr
    check_number("gamma_for", "pull / lr", gamma)
    return gamma


def scheduled(pull: float, recall: float, lr: Any, peak: Any) -> Any:
    r"""The weight of the pull in one step, which follows the learning rate's schedule as weight decay does.

    Math:
        $p_t = p\,\bar\lambda_t\,\eta_t/\max_{s \le t}\eta_s$

    Args:
        pull: its weight p at the peak of the learning rate.
        recall: recall weight of the step.
        lr: learning rate of the step; None where the optimizer has none.
        peak: the highest that it is known to have or to have had.

    Returns:
        What `recadam_core.pull` takes; 0 while the learning rate is 0.

    Example:
        >>> scheduled(0.1, 1.0, 1e-4, 2e-4), scheduled(0.1, 1.0, 0.0, 0.0), scheduled(0.1, 0.5, None, 0.0)
        (0.05, 0.0, 0.05)
    """
    if lr is None:
        return pull * recall
    if isinstance(lr, (int, float)) and lr == 0:
        return 0.0
    return pull * recall * (lr / peak)


@dataclass(frozen=True)
class DriftBudget:
    r"""Adapts the strength of the pull so that the distance to the anchor stays within a budget.

    Math:
        $\gamma \leftarrow \gamma\,2^{g\,\mathrm{clip}(d / b - 1,\,-1,\,1)}$ with the gain g and the budget b,
        kept in $[\mathrm{low}, \mathrm{high}]$. The distance $d$ may be any figure that grows as the model
        forgets: the Euclidean distance to the anchor, or the loss of the source task.

    Args:
        budget: the figure to hold; > 0.
        gain: doublings of gamma a step when the figure is twice the budget or more; > 0.
        low: smallest gamma; > 0, or the pull would never come back.
        high: largest gamma. lr * high should stay below 1.

    Raises:
        RecAdamError: when an argument is outside its range.

    Example:
        >>> control = DriftBudget(budget=0.5, gain=1.0)
        >>> control(1000.0, 1.0), control(1000.0, 0.5), control(1000.0, 0.0)
        (2000.0, 1000.0, 500.0)
    """

    budget: float
    gain: float = 0.25
    low: float = 1.0
    high: float = 1e6

    def __post_init__(self) -> None:
        for name in ("budget", "gain", "low", "high"):
            low = self.low if name == "high" else 0.0
            number = check_number("DriftBudget", name, getattr(self, name), low=low, open_low=name != "high")
            object.__setattr__(self, name, number)

    def __call__(self, gamma: float, figure: float) -> float:
        """The strength for the next step.

        Args:
            gamma: the present strength.
            figure: what was measured after the last step; >= 0.

        Returns:
            The next strength.

        Raises:
            RecAdamError: when the strength or the figure is no finite number >= 0.
        """
        gamma = check_number("DriftBudget", "gamma", gamma, low=0.0)
        figure = check_number("DriftBudget", "figure", figure, low=0.0)
        excess = min(1.0, max(-1.0, figure / self.budget - 1.0))
        doublings = min(1000.0, max(-1000.0, self.gain * excess))  # which leave any range of strengths
        stronger: float = min(self.high, max(self.low, gamma * 2.0**doublings))
        return stronger
