"""All scalar math of one step: from hyperparameters and t to the kernel's coefficients."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from ._scalars import host
from .annealing import annealed_weights
from .errors import RecAdamError, check_number
from .hyperparameters import Hyperparameters

__all__ = ["Coefficients", "InstabilityWarning", "check_pull", "coefficients", "is_zero"]


class InstabilityWarning(UserWarning):
    """The pull overshoots the anchor in every step (its coefficient is above 1).

    Example:
        >>> issubclass(InstabilityWarning, UserWarning)
        True
    """


class Coefficients(NamedTuple):
    """The six numbers that the kernel reads in one step.

    Example:
        >>> Coefficients(0.9, 0.999, 1e-3, 1e-8, 0.0, 0.0).step
        0.001
    """

    beta1: Any  # decay rate of the first moment
    beta2: Any  # decay rate of the second moment
    step: Any  # factor of m' / (sqrt(v') + eps)
    eps: Any  # added to sqrt(v')
    recall: Any  # factor of (anchor - theta)
    decay: Any  # factor of theta


def check_pull(pull: float, form: str, where: str) -> None:
    """Refuse a pull that diverges and warn of one that overshoots.

    The distance to the anchor is multiplied by (1 - pull) each step in the forms `decoupled` and
    `released`: it changes sign above 1 and grows from 2 on. `proximal` divides by (1 + pull) and is
    stable at any strength.

    Args:
        pull: lr * gamma * recall weight of one step.
        form: the form of the update.
        where: the place for the message, as in "step 12".

    Raises:
        RecAdamError: when pull >= 2 in a form that diverges.

    Warns:
        InstabilityWarning: when pull > 1 in such a form.

    Example:
        >>> check_pull(5.0, "decoupled", "step 1")
        Traceback (most recent call last):
        ...
        recadam_core.errors.RecAdamError: step 1: lr * gamma * recall = 5 diverges (2 or more); lower lr or
        gamma, or use form='proximal'
    """
    if form == "proximal" or pull <= 1.0:
        return
    remedy = "lower lr or gamma, or use form='proximal'"
    if pull >= 2.0:
        raise RecAdamError(f"{where}: lr * gamma * recall = {pull:g} diverges (2 or more); {remedy}")
    # One text for all steps, so that Python's default filter shows it once.
    warnings.warn(
        f"lr * gamma * recall is above 1: every step overshoots the anchor; {remedy}",
        InstabilityWarning,
        stacklevel=3,
    )


def coefficients(
    t: Any,
    hp: Hyperparameters,
    lr: Any = None,
    anchored: bool = True,
    xp: Any = None,
) -> Coefficients:
    r"""The kernel's coefficients for step t.

    Math:
        With $(\lambda, \bar\lambda)$ the annealing's weights, $c_i = 1 - \beta_i^t$ (1 without bias
        correction), $a = \eta \lambda \sqrt{c_2} / c_1$, $p = \eta \gamma \bar\lambda$ and
        $w = \eta \cdot$ weight_decay:

        | form | step | recall | decay | eps |
        |---|---|---|---|---|
        | decoupled | $a$ | $p$ | $w$ | $\varepsilon \sqrt{c_2}$ |
        | released | $(1-w)(1-p)a$ | $(1-w)p$ | $w$ | $\varepsilon$ |
        | proximal | $a/(1+p)$ | $p/(1+p)$ | $w/(1+p)$ | $\varepsilon \sqrt{c_2}$ |

        Without an anchor $\lambda = 1$ and $\bar\lambda = 0$: plain Adam(W). A recall weight below
        $2^{-40}$ counts as 0.

    Args:
        t: the step, from 1. On the host an int; traced, a 0-d floating array of namespace `xp`.
        hp: the settings; its numbers may be traced scalars too.
        lr: this step's learning rate; None for `hp.lr`.
        anchored: False for arrays without pretrained values (a new head).
        xp: array namespace for traced values; None computes in float64 on the host.

    Returns:
        The six coefficients: Python floats on the host, 0-d arrays when traced.

    Raises:
        RecAdamError: on the host, when t < 1, lr is no number >= 0, or the pull diverges.

    Warns:
        InstabilityWarning: on the host, when the pull overshoots.

    Example:
        >>> from recadam_core import Hyperparameters, Sigmoid
        >>> hp = Hyperparameters(lr=2e-5, gamma=5000.0, annealing=Sigmoid(k=0.1, t0=250))
        >>> c = coefficients(250, hp)
        >>> round(c.recall, 12), c.decay
        (0.05, 0.0)

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12; `released` after the authors' code.
    """
    lr = hp.lr if lr is None else lr
    traced = xp is not None
    if not traced:
        if t < 1:
            raise RecAdamError(f"coefficients: t is {t!r}; steps count from 1, after the increment")
        check_number(f"step {t}", "lr", lr, low=0.0)
    xp = xp if traced else host
    # Zeros that the host knows stay Python's: the kernel leaves their terms out, traced or not.
    task, pull, decay = 1.0, 0.0, 0.0
    if anchored:
        task, recall = annealed_weights(hp.annealing, t, xp)
        if not is_zero(hp.gamma):
            pull = lr * hp.gamma * recall
    if not is_zero(hp.weight_decay):
        decay = lr * hp.weight_decay
    beta1, beta2 = hp.betas
    if hp.bias_correction:
        # 1 - beta^t, as accurate for t = 1 in float32 as for t = 100,000.
        c1, c2 = (-xp.expm1(t * _log(beta, xp)) for beta in (beta1, beta2))
        root = xp.sqrt(c2)
        scale = root / c1
    else:
        root = scale = 1.0
    step = lr * task * scale
    if not traced:
        check_pull(pull, hp.form, f"step {t}")
    if hp.form == "released":
        keep = 1.0 - decay
        return Coefficients(beta1, beta2, keep * (1.0 - pull) * step, hp.eps, _scaled(pull, keep), decay)
    if hp.form == "proximal":
        shrink = 1.0 / (1.0 + pull)
        step, pull, decay = shrink * step, _scaled(pull, shrink), _scaled(decay, shrink)
    return Coefficients(beta1, beta2, step, hp.eps * root, pull, decay)


def is_zero(scalar: Any) -> bool:
    """Whether the host knows this coefficient to be zero; a traced one it does not."""
    return isinstance(scalar, (int, float)) and scalar == 0


def _scaled(x: Any, factor: Any) -> Any:
    return x if is_zero(x) else factor * x


def _log(beta: Any, xp: Any) -> Any:
    """log(beta), in float64 on the host wherever beta is a plain number."""
    return host.log(beta) if isinstance(beta, (int, float)) else xp.log(beta)
