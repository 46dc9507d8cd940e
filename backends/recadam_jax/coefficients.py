"""A step's coefficients, from the host or traced, and what can be refused before a compiled step runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recadam_core import (
    Annealing,
    Coefficients,
    Hyperparameters,
    RecAdamError,
    Sigmoid,
    coefficients,
    release_step,
)
from recadam_core.annealing import ANNEALINGS, Constant, annealed_weights
from recadam_core.coefficients import check_stable, is_zero
from recadam_core.errors import check_number, shown

from .placement import is_traced

__all__ = [
    "HostCoefficients",
    "annealing_of",
    "check_pull",
    "check_strength",
    "host_coefficients",
    "never_ends",
    "of_step",
    "rate_of",
    "taken",
]


class HostCoefficients(NamedTuple):
    """One step's coefficients as the host computes them, in float64: arguments of a compiled step.

    Example:
        >>> round(host_coefficients(1, Hyperparameters(lr=1e-5)).new[0], 9)
        3.162e-06
    """

    anchored: tuple[float, float, float, float]  # step, eps, pull, decay of anchored parameters
    new: tuple[float, float, float, float]  # the same of new heads


def host_coefficients(t: int, hp: Hyperparameters, lr: float | None = None) -> HostCoefficients:
    """The coefficients of a step, to be given to `update` in place of those that it would compute traced.

    With them, and without contraction of operations (see `recadam_jax.FLAG`), a compiled step has the bits
    of the specification; a pull that diverges is refused at the step at which it does.

    Args:
        t: the step, from 1.
        hp: the settings that the transformation was made of, by `from_hyperparameters`.
        lr: this step's learning rate; None for hp's.

    Returns:
        Python floats, by whether a parameter is anchored.

    Raises:
        RecAdamError: when t < 1, lr is no number >= 0, or the pull diverges.

    Example:
        >>> from recadam_jax import from_hyperparameters
        >>> hp = Hyperparameters(lr=1e-3, gamma=100.0)
        >>> tx, params = from_hyperparameters(hp), jnp.ones(2)
        >>> state, grads = tx.init(params), jnp.ones(2)
        >>> updates, state = tx.update(grads, state, params, coefficients=host_coefficients(1, hp))
        >>> int(state.count)
        1

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12.
    """
    anchored, new = (cast(Any, coefficients(t, hp, lr, by)[2:]) for by in (True, False))
    return HostCoefficients(anchored, new)


@dataclass(frozen=True)
class Schedule:
    """An annealing of a schedule, as optax has them, or of a traced number."""

    function: Any

    def weights(self, t: Any, xp: Any = None) -> tuple[Any, Any]:
        """Both weights of a step, as `Annealing` has them."""
        task = self.function
        if callable(task):
            task = task((t - 1).astype(jnp.int32) if xp else int(t) - 1)
        if isinstance(task, (tuple, list)):
            return cast(tuple[Any, Any], task)
        if not (isinstance(task, (int, float)) or hasattr(task, "dtype")):
            return task, task  # which is then refused
        recall = 1 - task
        # A schedule in float32 may end a rounding above 1.
        where = (xp or jnp).where if hasattr(recall, "dtype") else lambda rounded, x, y: x if rounded else y
        return task, where((recall < 0) & (recall > -(2.0**-20)), 0.0 * recall, recall)


def annealing_of(annealing: Any) -> Annealing:
    """The annealing that an argument stands for."""
    if annealing is None:
        return Sigmoid()
    if hasattr(annealing, "weights") or isinstance(annealing, type):
        return cast(Annealing, annealing)
    if callable(annealing):
        return Schedule(annealing)
    if not (isinstance(annealing, Real) or hasattr(annealing, "dtype")):
        return cast(Annealing, annealing)  # which is then refused
    task = check_number("recadam", "annealing", annealing, low=0.0, high=1.0)
    return Schedule(task) if is_traced(task) else Constant(task, 1 - task)


def never_ends(annealing: Any) -> bool:
    """Whether its recall weight is known never to come to zero for good."""
    try:
        return type(annealing) in ANNEALINGS.values() and release_step(annealing) is None
    except jax.errors.JAXTypeError:  # traced
        return False


def taken(name: str, count: Any) -> jax.Array:
    """The steps taken, whatever kind of integer a restored state has them in."""
    try:
        fits = jnp.issubdtype(jnp.result_type(count), jnp.integer) and jnp.shape(count) == ()
        steps = jnp.asarray(count, jnp.int32) if fits else None
    except (TypeError, ValueError, OverflowError):
        steps = None
    # Its own value: while something else is traced, a comparison would be traced, too.
    if steps is None or (not is_traced(count) and int(count) < 0):
        raise RecAdamError(f"{name}: the state's count is {shown(count)}; give what init returned")
    return steps


def rate_of(name: str, rate: Any, count: Any, what: str = "learning rate") -> Any:
    """The number of a step, of a number or a schedule."""
    if not callable(rate):
        return rate
    number = rate(count)
    return (
        number if hasattr(number, "dtype") else check_number(name, f"the schedule's {what}", number, low=0.0)
    )


def of_step(
    name: str, hp: Hyperparameters, learning_rate: Any, count: jax.Array, on_host: HostCoefficients | None
) -> dict[bool, Coefficients]:
    """A step's coefficients by whether a parameter is anchored: the host's, or traced."""
    if on_host is None:
        t = optax.safe_increment(count).astype(jax.dtypes.canonicalize_dtype(jnp.float64))
        lr = rate_of(name, learning_rate, count)
        by_anchored = {a: coefficients(t, hp, lr, a, xp=jnp) for a in (True, False)}
        for c in by_anchored.values():
            _check(name, t, c, hp.form)
        return by_anchored
    if not isinstance(on_host, HostCoefficients) or any(
        not isinstance(row, (tuple, list)) or len(row) != 4 for row in on_host
    ):
        raise RecAdamError(
            f"recadam: coefficients are {shown(on_host)}; give those of host_coefficients(t, hp)"
        )
    by_anchored = {}
    for anchored, (step, eps, pull, decay) in ((True, on_host.anchored), (False, on_host.new)):
        pull = 0.0 if not anchored or is_zero(hp.gamma) else pull
        decay = 0.0 if is_zero(hp.weight_decay) else decay
        by_anchored[anchored] = Coefficients(*hp.betas, step, eps, pull, decay)
    return by_anchored


def _check(name: str, t: jax.Array, c: Coefficients, form: str) -> None:
    """Refuse what a schedule or an annealing gave, as far as it is known: not traced, or no scalar at all."""
    for x in c[2:]:
        if jnp.shape(x) != () or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise RecAdamError(
                f"{name}: the learning rate or the annealing gives {jnp.result_type(x)} of shape "
                f"{jnp.shape(x)}; have it give a real number"
            )
    known = [float(x) for x in c[2:] if not is_traced(x)]
    # In the form "released" a pull that overshoots turns the step around.
    if not all(map(math.isfinite, known)) or (form != "released" and min(known, default=0.0) < 0.0):
        where = name if is_traced(t) else f"{name}, step {int(t)}"
        raise RecAdamError(
            f"{where}: the learning rate or the annealing is negative or not finite; give finite numbers >= 0"
        )


def check_strength(name: str, hp: Hyperparameters, learning_rate: Any, anchored: bool) -> None:
    """Refuse a pull or a decay that diverges, as far as the host can tell: compiled steps cannot raise.

    A schedule is asked at up to 200 steps, evenly over the annealing and thinner after it.
    """
    strengths = []
    largest = float(np.finfo(jax.dtypes.canonicalize_dtype(jnp.float64)).max)
    try:
        check_number(name, "eps", hp.eps, low=0.0, high=largest)
        with jax.ensure_compile_time_eval():
            for t in _some_steps(hp.annealing):
                where = f"{name}, step {t}"
                rate = rate_of(where, learning_rate, jnp.asarray(t - 1))
                rate = float(check_number(where, "the learning rate", rate, low=0.0, high=largest))
                recall = float(annealed_weights(hp.annealing, t)[1]) if anchored else 0.0
                pull = rate * float(hp.gamma) * recall if recall else 0.0  # however strong
                strengths.append((pull, rate * float(hp.weight_decay), where))
    except jax.errors.JAXTypeError:
        return  # traced settings
    for size in (lambda x: x[0], lambda x: x[1], lambda x: x[0] + x[1]):
        pull, decay, where = max(strengths, key=size)
        check_stable(pull, decay, hp.form, where)


def check_pull(name: str, pull: Any, annealing: Any, learning_rate: Any) -> float:
    """The highest learning rate at the steps at which `check_strength` looks; numbers there are checked."""
    peak = 0.0
    try:
        with jax.ensure_compile_time_eval():
            for t in _some_steps(annealing):
                where, count = f"{name}, step {t}", jnp.asarray(t - 1)
                annealed_weights(annealing, t)
                check_number(where, "the pull", rate_of(where, pull, count, "pull"), low=0.0)
                if learning_rate is not None:
                    rate = rate_of(where, learning_rate, count)
                    peak = max(peak, float(check_number(where, "the learning rate", rate, low=0.0)))
    except jax.errors.JAXTypeError:
        pass  # traced settings
    return peak


def _some_steps(annealing: Any) -> list[int]:
    """Up to 200 steps, evenly over the annealing and thinner after it."""
    last = min(release_step(annealing) or 10_000, 2**31 - 2)
    return sorted({*map(int, np.linspace(1, last, 100)), *map(int, np.geomspace(1, last, 100))})
