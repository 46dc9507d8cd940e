"""All scalar math of one step: from hyperparameters and t to the kernel's coefficients."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np

from ._scalars import host
from .annealing import annealed_weights
from .errors import RecAdamError, check_number, shown
from .hyperparameters import Hyperparameters

__all__ = [
    "Coefficients",
    "InstabilityWarning",
    "check_stable",
    "coefficients",
    "coefficients_of",
    "is_zero",
    "proximal",
    "pull_alone",
]


class InstabilityWarning(UserWarning):
    """The pull, or weight decay, overshoots its goal in every step (its coefficient is above 1).

    Example:
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     check_stable(1.5, 0.0, "decoupled", "step 1")
        >>> caught[0].category.__name__
        'InstabilityWarning'
    """


class Coefficients(NamedTuple):
    """The six numbers that the kernel reads in one step.

    Example:
        >>> round(coefficients(1, Hyperparameters(lr=0.5), anchored=False).step, 6)
        0.158114
    """

    beta1: Any  # decay rate of the first moment
    beta2: Any  # decay rate of the second moment
    step: Any  # factor of m' / (sqrt(v') + eps)
    eps: Any  # added to sqrt(v')
    pull: Any  # factor of (anchor - theta)
    decay: Any  # factor of theta


def check_stable(pull: float, decay: float, form: str, where: str) -> None:
    """Refuse a pull or a decay that diverges and warn of one that overshoots.

    Without a gradient each step multiplies the distance to where both lead by 1 - pull - decay in the form
    `decoupled`, by (1 - pull)(1 - decay) in `released` and by (1 - decay)/(1 + pull) in `proximal`: it
    changes sign above 1 and grows from 2 on.

    Example:
        >>> check_stable(5.0, 0.0, "decoupled", "step 1")
        Traceback (most recent call last):
        ...
        recadam_core.errors.RecAdamError: step 1: lr * gamma * recall = 5 diverges (2 or more); lower lr or
        gamma, or use form='proximal'
    """
    proximal = form == "proximal"
    both = pull + decay if form == "decoupled" else 0.0
    if (pull <= 1.0 or proximal) and decay <= 1.0 and both <= 1.0:
        return
    damping = 1.0 + pull if proximal else 1.0
    terms = [
        ("lr * weight_decay", decay, "zero", "lower lr or weight_decay"),
        ("lr * (gamma * recall + weight_decay)", both, "its goal", "lower lr, gamma or weight_decay"),
    ]
    if not proximal:
        remedy = "lower lr or gamma, or use form='proximal'"
        terms.insert(0, ("lr * gamma * recall", pull, "the anchor", remedy))
    for what, size, _, remedy in terms:
        if not size - 1.0 < damping:
            raise RecAdamError(f"{where}: {what} = {size:g} diverges ({1 + damping:g} or more); {remedy}")
    for what, size, goal, remedy in terms:
        if size > 1.0:
            # One text for all steps, so that Python's default filter shows it once.
            text = f"{what} is above 1: every step overshoots {goal}; {remedy}"
            warnings.warn(text, InstabilityWarning, stacklevel=3)
            return


def coefficients(
    t: Any, hp: Hyperparameters, lr: Any = None, anchored: bool = True, xp: Any = None
) -> Coefficients:
    r"""The kernel's coefficients for step t.

    Math:
        With $(\lambda, \bar\lambda)$ the annealing's weights, $c_i = 1 - \beta_i^t$ (1 without bias
        correction), $a = \eta \lambda \sqrt{c_2} / c_1$, $p = \eta \gamma \bar\lambda$ and
        $w = \eta \cdot$ weight_decay:

        | form | step | pull | decay | eps |
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
        RecAdamError: on the host, when t < 1, lr is no number >= 0, the annealing gives weights that are
            none, the pull or the decay diverges, or a coefficient is beyond the range of numbers.

    Warns:
        InstabilityWarning: on the host, when the pull or the decay overshoots.

    Example:
        >>> from recadam_core import Hyperparameters, Sigmoid
        >>> hp = Hyperparameters(lr=2e-5, gamma=5000.0, annealing=Sigmoid(k=0.1, t0=250))
        >>> c = coefficients(250, hp)
        >>> round(c.pull, 12), c.decay
        (0.05, 0.0)

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12; `released` after the authors' code.
    """
    if not isinstance(hp, Hyperparameters):
        raise RecAdamError(f"coefficients: hp is {shown(hp)}; give Hyperparameters")
    lr = hp.lr if lr is None else lr
    traced = xp is not None
    if not traced:
        t = check_number("coefficients", "t", t)
        if t < 1:
            raise RecAdamError(f"coefficients: t is {t!r}; steps count from 1, after the increment")
        lr = check_number(f"step {t}", "lr", lr, low=0.0)
    xp = xp if traced else host
    # Zeros that the host knows stay Python's: the kernel leaves their terms out, traced or not.
    task, pull, decay = 1.0, 0.0, 0.0
    if anchored:
        task, recall = annealed_weights(hp.annealing, t, xp if traced else None)
        if not is_zero(hp.gamma) and not is_zero(recall):
            pull = lr * hp.gamma * recall
            if hasattr(recall, "dtype"):  # traced, where lr * gamma may be infinite
                pull = xp.where(recall == 0, 0.0 * recall, pull)
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
        check_stable(pull, decay, hp.form, f"step {t}")
    eps = hp.eps
    if hp.form == "released":
        keep = 1.0 - decay
        step, pull = keep * (1.0 - pull) * step, _scaled(pull, keep)
    elif hp.form == "proximal":
        shrink, pull = proximal(pull, xp)
        step, decay, eps = shrink * step, _scaled(decay, shrink), eps * root
    else:
        eps = eps * root
    c = Coefficients(beta1, beta2, step, eps, pull, decay)
    if not traced and not all(map(math.isfinite, c)):
        raise RecAdamError(f"step {t}: lr = {lr:g} gives coefficients beyond the range of numbers; lower it")
    return c


def coefficients_of(t: Any, hp: Hyperparameters, anchored: bool, dtype: str) -> Coefficients:
    """The host's coefficients of many steps, as arrays; in float64, whatever the dtype.

    Example:
        >>> coefficients_of(np.array([1, 2]), Hyperparameters(), False, "float64").pull
        array([0., 0.])
    """
    rows = [coefficients(int(x), hp, None, anchored) for x in t]
    return Coefficients(*map(np.array, zip(*rows, strict=True)))


def proximal(p: Any, xp: Any = host) -> tuple[Any, Any]:
    """What a penalty of weight p leaves of a step, 1/(1 + p), and its share of the way home, p/(1 + p).

    Example:
        >>> proximal(0.25)
        (0.8, 0.2)
    """
    shrink = 1.0 / (1.0 + p)
    if is_zero(p):
        return shrink, p
    # Beside a p so large the 1 is lost, and its reciprocal underflows.
    where = xp.where if hasattr(p, "dtype") else host.where
    return shrink, where(p > 2.0**60, 1.0 + 0.0 * shrink, shrink * p)


def pull_alone(recall: Any) -> Coefficients:
    """The coefficients of `recadam_core.pull`: the way home, and nothing of Adam.

    Example:
        >>> pull_alone(0.25).pull
        0.2
    """
    _, share = proximal(check_number("pull", "recall", recall, low=0.0))
    return Coefficients(0.0, 0.0, 0.0, 0.0, share, 0.0)


def is_zero(scalar: Any) -> bool:
    """Whether the host knows this coefficient to be zero; a traced one it does not."""
    return isinstance(scalar, (int, float)) and scalar == 0


def _scaled(x: Any, factor: Any) -> Any:
    return x if is_zero(x) else factor * x


def _log(beta: Any, xp: Any) -> Any:
    """log(beta), in float64 on the host wherever beta is a plain number."""
    return host.log(beta) if isinstance(beta, (int, float)) else xp.log(beta)
