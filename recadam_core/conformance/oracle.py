r"""The oracle: the step in extended precision, and how far rounding may carry a backend from it.

A twin of the specification that shares no line with it: coefficients and kernel are written again,
element by element, in mpmath's arithmetic of 200 bits with unbounded exponents. The budget is the
derivation of docs/conformance.md as code: with $u$ half the spacing of the dtype at 1, every
operation is off by at most one $u$ of its result (the square root and the division by twice that,
since not every library rounds them correctly), and errors add.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..annealing import RECALL_FLOOR, Constant, Linear, Sigmoid
from ..arrays import NumpyArray
from ..coefficients import Coefficients
from ..errors import RecAdamError
from ..hyperparameters import Hyperparameters

try:
    import mpmath
except ModuleNotFoundError:
    raise RecAdamError("the kit needs 'mpmath'; pip install 'recadam-core[conformance]'") from None

__all__ = ["Exactly", "Spread", "budget", "exact_coefficients", "exact_step", "spread", "ulp"]

BITS = 200
DIGITS = {"float64": 53, "float32": 24, "bfloat16": 8, "float16": 11}
"""Binary digits of a number of each dtype."""

TINY = {"float64": 2.0**-1022, "float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-14}
"""Smallest normal number of each dtype."""

mpf = np.frompyfunc(mpmath.mpf, 1, 1)
root = np.frompyfunc(mpmath.sqrt, 1, 1)


class Exactly(NamedTuple):
    """One step without rounding: object arrays of mpmath numbers."""

    theta: Any
    m: Any
    v: Any


def exact_coefficients(t: int, hp: Hyperparameters, lr: float, anchored: bool = True) -> Coefficients:
    """The coefficients of step t as mpmath numbers, from the decimal values as Python's floats hold them.

    Example:
        >>> c = exact_coefficients(250, Hyperparameters(annealing=Sigmoid(k=0.1, t0=250)), 2e-5)
        >>> float(c.pull)
        0.05

    Source: arXiv 2004.12651, Algorithm 1 and eq. (9).
    """
    with mpmath.workprec(BITS):
        num = mpmath.mpf
        beta1, beta2 = map(num, hp.betas)
        eta, decay = num(lr), num(lr) * num(hp.weight_decay)
        task, recall = num(1), num(0)
        if anchored:
            task, recall = _exact_weights(hp.annealing, t)
            if recall < num(RECALL_FLOOR):
                recall = num(0)
        pull = eta * num(hp.gamma) * recall
        c1, c2 = (1 - beta1**t, 1 - beta2**t) if hp.bias_correction else (num(1), num(1))
        adam = eta * task * mpmath.sqrt(c2) / c1
        eps = num(hp.eps)
        if hp.form == "released":
            return Coefficients(beta1, beta2, (1 - decay) * (1 - pull) * adam, eps, (1 - decay) * pull, decay)
        eps *= mpmath.sqrt(c2)
        if hp.form == "proximal":
            whole = 1 + pull
            return Coefficients(beta1, beta2, adam / whole, eps, pull / whole, decay / whole)
        return Coefficients(beta1, beta2, adam, eps, pull, decay)


def _exact_weights(annealing: Any, t: int) -> tuple[Any, Any]:
    num = mpmath.mpf
    if isinstance(annealing, Sigmoid):
        e = mpmath.exp(num(annealing.k) * (t - num(annealing.t0)))
        return num(annealing.weight) * e / (1 + e), max(num(annealing.floor), num(annealing.weight) / (1 + e))
    if isinstance(annealing, Linear):
        done = min(num(1), t / num(annealing.t0))
        return num(annealing.weight) * done, max(num(annealing.floor), num(annealing.weight) * (1 - done))
    return num(annealing.task), num(annealing.recall)


def exact_step(
    theta: NumpyArray,
    grad: NumpyArray,
    m: NumpyArray,
    v: NumpyArray,
    anchor: NumpyArray | None,
    c: Coefficients,
    importance: NumpyArray | None = None,
) -> Exactly:
    """The kernel in extended precision: parameter and moments after a step from arrays of one shape.

    There is no pull without an anchor; an importance of None is 1.

    Example:
        >>> x = np.ones(1)
        >>> float(exact_step(x, x, 0 * x, 0 * x, 0 * x, Coefficients(0.9, 0.999, 0, 1e-8, 0.25, 0)).theta[0])
        0.75

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12.
    """
    with mpmath.workprec(BITS):
        b1, b2, step, eps, pull, decay = map(mpmath.mpf, c)
        theta, grad, m, v = (mpf(np.asarray(x, dtype=object)) for x in (theta, grad, m, v))
        star = theta if anchor is None else mpf(np.asarray(anchor, dtype=object))
        m = m * b1 + grad * (1 - b1)
        v = v * b2 + grad * grad * (1 - b2)
        weight = mpf(np.asarray(1.0 if importance is None else importance, dtype=object))
        new = theta + weight * ((star - theta) * pull) - m / (root(v) + eps) * step - theta * decay
        return Exactly(new, m, v)


class Spread(NamedTuple):
    """How far off each coefficient may be, absolutely."""

    step: Any
    eps: Any
    pull: Any
    decay: Any


def spread(t: Any, hp: Hyperparameters, lr: float, anchored: bool, dtype: str, c: Coefficients) -> Spread:
    """How far off the coefficients of a step, or of an array of them, may be when computed in this dtype.

    Example:
        >>> hp = Hyperparameters(gamma=0.0)
        >>> bool(spread(1, hp, 1e-3, False, "float64", exact_coefficients(1, hp, 1e-3, False)).decay < 1e-300)
        True
    """
    u, tiny = 2.0 ** -DIGITS[dtype], TINY[dtype]
    step, eps, pull, decay = (np.abs(np.asarray(x, dtype=np.float64)) for x in c[2:])
    weight, floor = _weight_error(hp.annealing, t, dtype) if anchored else (0.0, 0.0)
    # Roundings on the way, counted in u: 1 - beta^t is 6 (4 of them of expm1), its root 5, their ratio 13.
    adam, back, wane = 3 + weight + 13 * hp.bias_correction, 4 + weight, 3.0
    noise = 1 + 6 * (hp.bias_correction and hp.form != "released")
    cancelled = 0.0
    if hp.form == "released":  # (1 - pull) cancels where the pull is near 1
        strength = pull / (1 - decay)
        whole = step / ((1 - decay) * np.maximum(np.abs(1 - strength), u))
        cancelled = whole * strength * (back + 2)
        adam, back = adam + 8, back + 6
    elif hp.form == "proximal":
        adam, back, wane = adam + back + 4, 2 * back + 4, back + 7
    # Of the pull, where one side has released the anchor and the other not yet.
    released = lr * hp.gamma * floor
    return Spread(
        u * (step * adam + cancelled) + step * released + 4 * lr * tiny,
        u * eps * noise + tiny,
        u * pull * back + released + 4 * lr * hp.gamma * tiny,
        u * decay * wane + tiny,
    )


def _weight_error(annealing: Any, t: Any, dtype: str) -> tuple[Any, Any]:
    """Relative error of the annealing's weights in u, and the absolute one of a release that shifts."""
    u = 2.0 ** -DIGITS[dtype]
    if isinstance(annealing, Constant):
        return 1.0, 0.0
    if not isinstance(annealing, (Sigmoid, Linear)):
        raise TypeError(f"no bound is derived for {annealing!r}")
    inexact = dtype != "float64" and float(np.float32(annealing.t0)) != annealing.t0
    if isinstance(annealing, Linear):
        return 6 + inexact * annealing.t0 / np.maximum(np.abs(annealing.t0 - t), u), 0.0
    x = annealing.k * (t - annealing.t0)
    error = 3 * np.abs(x) + 9 + inexact * annealing.k * annealing.t0
    weight = annealing.weight / (1 + np.exp(np.clip(x, -700, 700)))
    return error, np.where(np.abs(weight / RECALL_FLOOR - 1) <= error * u, weight, 0.0)


class Budget(NamedTuple):
    """Largest error that rounding may cause, and the largest operand, of each result."""

    theta: Any
    m: Any
    v: Any
    theta_operand: Any
    m_operand: Any
    v_operand: Any


def budget(
    theta: NumpyArray,
    grad: NumpyArray,
    m: NumpyArray,
    v: NumpyArray,
    anchor: NumpyArray | None,
    c: Coefficients,
    exact: Exactly,
    off: Spread,
    dtype: str,
    rounds_update: bool = False,
    importance: NumpyArray | None = None,
) -> Budget:
    r"""The derived bound of one step's error, element by element.

    Math:
        With $M = |\beta_1 m| + |(1-\beta_1) g|$, $A = s M / (\sqrt{v'}+\varepsilon)$,
        $P = f r|\theta^*-\theta|$ and $D = d|\theta|$:
        $|\Delta m'| \le 3uM$, $|\Delta v'| \le 4uv'$,
        $|\Delta\theta'| \le u(|\theta'| + 5P + 14A + 3D)$, plus what the coefficients are off by;
        $6P$ where there is an importance.

    The arrays are as in `exact_step`, `exact` what it gave for the exact coefficients c, `off` how far off
    these may be, `dtype` the parameter's, to which `rounds_update` rounds the update before it is added.

    Returns:
        Bounds and operands, float64 arrays of theta's shape.

    Example:
        >>> x = np.ones(1)
        >>> c = Coefficients(0.9, 0.999, 0.0, 1e-8, 0.25, 0.0)
        >>> e = exact_step(x, x, 0 * x, 0 * x, 0 * x, c)
        >>> budget(x, x, 0 * x, 0 * x, 0 * x, c, e, Spread(0, 0, 0, 0), "float32").theta * 2**24
        array([2.00000763])
    """
    inner = dtype if dtype in ("float64", "float32") else "float32"
    u, tiny = 2.0 ** -DIGITS[inner], TINY[inner]
    b1, _, step, eps, pull, decay = map(float, c)
    theta, grad, m, v = (np.asarray(x, dtype=np.float64) for x in (theta, grad, m, v))
    new, v_new, m_new = (np.abs(np.asarray(x, dtype=np.float64)) for x in (exact.theta, exact.v, exact.m))
    star = theta if anchor is None else np.asarray(anchor, dtype=np.float64)
    both = b1 * np.abs(m) + (1 - b1) * np.abs(grad)
    den = np.sqrt(v_new) + eps
    with np.errstate(divide="ignore", invalid="ignore"):
        over = np.where(den > 0, 1 / den, 0.0)
    weight = 1.0 if importance is None else np.asarray(importance, dtype=np.float64)
    away = weight * np.abs(star - theta)
    adam, back, wane = abs(step) * both * over, pull * away, decay * np.abs(theta)
    # Numbers below the smallest normal one may be lost on the way: a few of them in each result.
    lost = abs(step) * over * 3 * tiny + adam * over * np.sqrt(4 * tiny) + 4 * tiny
    error = u * (new + (5 + (importance is not None)) * back + 14 * adam + 3 * wane) + lost
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = off.step / abs(step) if step else 0.0
    error += adam * ratio + (0 if step else off.step * both * over)
    error += adam * over * off.eps + off.pull * away + off.decay * np.abs(theta)
    error *= 1 + 64 * u  # products of errors
    if inner != dtype:
        outer, least = 2.0 ** -DIGITS[dtype], 2.0 ** (1 - DIGITS[dtype]) * TINY[dtype]
        error += outer * (new + error) + least
        if rounds_update:
            error += outer * (adam + back + wane) * (1 + outer) + least
    return Budget(
        error,
        3 * u * both * (1 + 8 * u) + 3 * tiny,
        4 * u * v_new * (1 + 8 * u) + 4 * tiny,
        np.maximum.reduce([np.abs(theta), new, back, adam, wane]),
        np.maximum(both, m_new),
        v_new,
    )


def ulp(x: NumpyArray, dtype: str) -> NumpyArray:
    """The spacing of a dtype's numbers at x.

    Example:
        >>> float(ulp(np.array(1.5), "float32")) == 2.0**-23
        True
    """
    _, exponent = np.frexp(np.maximum(x, TINY[dtype]))
    return np.asarray(np.ldexp(1.0, exponent - DIGITS[dtype]))
