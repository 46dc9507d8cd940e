r"""Annealings: how the objective shifts from remembering to learning.

An annealing maps the step t to two weights, $(\lambda_t, \bar\lambda_t)$ = (task, recall): the
first multiplies the target task's step, the second the pull towards the anchor.

| annealing | task weight | recall weight |
|---|---|---|
| `Sigmoid(k, t0)`, `Sigmoid.over(steps)` | $\sigma(k(t - t_0))$ | $\sigma(-k(t - t_0))$ |
| `Linear(t0)` | $\min(1, t/t_0)$ | $\max(0, (t_0 - t)/t_0)$ |
| `Constant(task, recall)` | task | recall |

`Sigmoid` and `Linear` take a floor under the recall weight: they then never let go of the anchor altogether.

The recall weight is computed as such, never as one minus the task weight: near the end of the
annealing that difference would have no correct digit left.

Steps count from 1, after the optimizer's increment. Any object with a method
`weights(t, xp=None) -> (task, recall)` is an annealing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from ._scalars import host
from .errors import RecAdamError, check_number, shown, unknown

__all__ = [
    "ANNEALINGS",
    "RECALL_FLOOR",
    "Annealing",
    "Constant",
    "Linear",
    "Sigmoid",
    "annealed_weights",
    "annealing_from_dict",
    "annealing_to_dict",
    "release_step",
]

RECALL_FLOOR = 2.0**-40
"""Recall weights below this are exactly zero, by definition and in every backend."""


@runtime_checkable
class Annealing(Protocol):
    """Anything that gives the task and the recall weight of a step.

    Example:
        >>> class Warmup:
        ...     def weights(self, t, xp=None):
        ...         return 1.0, 1.0 / t
        >>> isinstance(Warmup(), Annealing)
        True
    """

    def weights(self, t: Any, xp: Any = None) -> tuple[Any, Any]:
        """Task and recall weight of step `t` (a number, or a floating array of namespace `xp`)."""
        ...


def _settle(annealing: Any, positive: tuple[str, ...] = ()) -> None:
    """Check an annealing's fields, none of which may be negative, and make Python numbers of them."""
    for field in dataclasses.fields(annealing):
        value = getattr(annealing, field.name)
        number = check_number(
            type(annealing).__name__, field.name, value, low=0.0, open_low=field.name in positive
        )
        object.__setattr__(annealing, field.name, number)


@dataclass(frozen=True)
class Sigmoid:
    r"""Sigmoid annealing, the paper's: $\lambda_t = w\,\sigma(k(t - t_0))$.

    Math:
        task $= w / (1 + e^{-k(t-t_0)})$, recall $= \max(f, w / (1 + e^{k(t-t_0)}))$.

    Args:
        k: slope of the sigmoid, per step; > 0. Large k turns the annealing into a switch.
        t0: step at which both weights are w/2; >= 0.
        weight: w, the sum of both weights; >= 0.
        floor: f, below which the recall weight does not fall; >= 0. Above 0 the anchor is needed to the end.

    Raises:
        RecAdamError: when an argument is outside its range.

    Example:
        >>> Sigmoid(k=0.1, t0=250).weights(250)
        (0.5, 0.5)

    Source: arXiv 2004.12651, eq. (9).
    """

    k: float = 0.1
    t0: float = 250
    weight: float = 1.0
    floor: float = 0.0
    name: ClassVar[str] = "sigmoid"

    def __post_init__(self) -> None:
        _settle(self, positive=("k",))

    @classmethod
    def over(
        cls, steps: int, center: float = 0.25, width: float = 0.5, weight: float = 1.0, floor: float = 0.0
    ) -> Sigmoid:
        r"""The sigmoid that fits a training of so many steps, wherever that is long or short.

        Math:
            $t_0 = \mathrm{center} \cdot \mathrm{steps}$,
            $k = 2 \ln 9 / (\mathrm{width} \cdot \mathrm{steps})$

        Args:
            steps: number of steps of the training; >= 1.
            center: share of the training after which both weights are equal; >= 0.
            width: share of the training in which the task weight rises from a tenth to nine tenths; > 0.
            weight: sum of both weights.
            floor: below which the recall weight does not fall.

        Returns:
            The annealing.

        Raises:
            RecAdamError: when an argument is outside its range.

        Example:
            >>> curve = Sigmoid.over(1000, center=0.25, width=0.4)
            >>> [round(curve.weights(t)[0], 3) for t in (50, 250, 450)]
            [0.1, 0.5, 0.9]
        """
        steps = check_number("Sigmoid.over", "steps", steps, low=1)
        center = check_number("Sigmoid.over", "center", center, low=0.0)
        width = check_number("Sigmoid.over", "width", width, low=0.0, open_low=True)
        return cls(k=2 * math.log(9) / (width * steps), t0=center * steps, weight=weight, floor=floor)

    def weights(self, t: Any, xp: Any = None) -> tuple[Any, Any]:
        """Task and recall weight of step `t`, each accurate to the last digits at both ends.

        Args:
            t: the step, from 1: a number, or a floating array of namespace `xp`.
            xp: array namespace of `t`; None for numbers.

        Returns:
            (task, recall), of t's shape and type.
        """
        xp = xp or host
        x = self.k * (t - self.t0)
        e = xp.exp(-abs(x))
        high, low = self.weight / (1.0 + e), self.weight * e / (1.0 + e)
        rising = x >= 0
        return xp.where(rising, high, low), _floored(xp.where(rising, low, high), self.floor, xp)


@dataclass(frozen=True)
class Linear:
    r"""Linear annealing: the task weight rises from 0 to `weight` over `t0` steps.

    Math:
        task $= w \min(1, t/t_0)$, recall $= \max(f, w (t_0 - t)/t_0)$.

    Args:
        t0: number of steps; > 0.
        weight: w, the sum of both weights; >= 0.
        floor: f, below which the recall weight does not fall; >= 0.

    Raises:
        RecAdamError: when an argument is outside its range.

    Example:
        >>> Linear(t0=100).weights(25)
        (0.25, 0.75)

    Source: the authors' released optimizer; the paper's ablation.
    """

    t0: float = 250
    weight: float = 1.0
    floor: float = 0.0
    name: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        _settle(self, positive=("t0",))

    def weights(self, t: Any, xp: Any = None) -> tuple[Any, Any]:
        """Task and recall weight of step `t`; arguments and returns as in `Sigmoid.weights`."""
        xp = xp or host
        rising = t < self.t0
        task, recall = self.weight * (t / self.t0), self.weight * ((self.t0 - t) / self.t0)
        zero = 0.0 * t
        return xp.where(rising, task, zero + self.weight), _floored(
            xp.where(rising, recall, zero), self.floor, xp
        )


def _floored(recall: Any, floor: Any, xp: Any) -> Any:
    """The recall weight, not below the floor; without one it is not touched."""
    if isinstance(floor, (int, float)) and not floor:
        return recall
    return xp.where(recall < floor, 0.0 * recall + floor, recall)


@dataclass(frozen=True)
class Constant:
    r"""Weights that do not change: L2-SP at (1, 1), plain Adam at (1, 0).

    Args:
        task: weight of the target task's step; >= 0.
        recall: weight of the pull; >= 0.

    Raises:
        RecAdamError: when an argument is outside its range.

    Example:
        >>> Constant(task=1.0, recall=0.5).weights(7)
        (1.0, 0.5)

    Source: L2-SP is arXiv 1802.01483, eq. (2). The released RecAdam's option `constant` has no pull
    at all; here that is `Constant(task=w, recall=0.0)`.
    """

    task: float = 1.0
    recall: float = 1.0
    name: ClassVar[str] = "constant"

    def __post_init__(self) -> None:
        _settle(self)

    def weights(self, t: Any, xp: Any = None) -> tuple[Any, Any]:
        """The two weights, whatever the step; arguments and returns as in `Sigmoid.weights`."""
        zero = 0.0 * t
        return zero + self.task, zero + self.recall


def annealed_weights(annealing: Annealing, t: Any, xp: Any = None) -> tuple[Any, Any]:
    """Task and recall weight as every step uses them: a recall weight below `RECALL_FLOOR` is 0.

    Args:
        annealing: the annealing.
        t: the step, from 1: a number, or a floating array of namespace `xp`.
        xp: array namespace of `t`; None for numbers.

    Returns:
        (task, recall); Python numbers on the host.

    Raises:
        RecAdamError: when the annealing gives no two numbers; on the host, when one is negative or not
            finite.

    Example:
        >>> annealed_weights(Sigmoid(k=0.1, t0=250), 528)[1]
        0.0
    """
    weights = annealing.weights(t, xp)
    place = type(annealing).__name__ + (f", step {shown(t)}" if xp is None else "")
    if not isinstance(weights, (tuple, list)) or len(weights) != 2:
        raise RecAdamError(
            f"{place}: weights gives {shown(weights)}; have it give two numbers, (task, recall)"
        )
    task, recall = (
        weight
        if xp is not None and _is_like(weight, t)
        else check_number(place, f"the {what} weight", weight, low=0.0)
        for what, weight in zip(("task", "recall"), weights, strict=True)
    )
    where = xp.where if hasattr(recall, "dtype") else host.where
    return task, where(abs(recall) < RECALL_FLOOR, 0.0 * recall, recall)


def _is_like(weight: Any, t: Any) -> bool:
    """Whether it is an array as `t` is: one of another library is as good as a number of Python's."""
    ours, theirs = (type(x).__module__.partition(".")[0].removesuffix("lib") for x in (weight, t))
    return hasattr(weight, "dtype") and ours == theirs and weight.shape in ((), t.shape)


ANNEALINGS: dict[str, type[Any]] = {cls.name: cls for cls in (Sigmoid, Linear, Constant)}
"""Annealings by name, for configuration files and the command line."""


def annealing_to_dict(annealing: Any) -> dict[str, Any]:
    """A named annealing as plain scalars, ready for JSON or an optimizer's parameter group.

    Args:
        annealing: an instance of a class in `ANNEALINGS`.

    Returns:
        Its name under "name", and its fields.

    Raises:
        RecAdamError: for an annealing of another class.

    Example:
        >>> annealing_to_dict(Linear(t0=100))
        {'name': 'linear', 't0': 100, 'weight': 1.0, 'floor': 0.0}
    """
    for name, known in ANNEALINGS.items():
        if type(annealing) is known:
            return {"name": name, **dataclasses.asdict(annealing)}
    raise RecAdamError(f"annealing {annealing!r} has no name to save it by; add its class to ANNEALINGS")


def annealing_from_dict(fields: Mapping[str, Any]) -> Any:
    """The annealing that `annealing_to_dict` described.

    Args:
        fields: "name" and the arguments of that class.

    Returns:
        The annealing.

    Raises:
        RecAdamError: for an unknown name or argument.

    Example:
        >>> annealing_from_dict({"name": "sigmoid", "k": 0.2})
        Sigmoid(k=0.2, t0=250, weight=1.0, floor=0.0)
    """
    if not isinstance(fields, Mapping):
        raise RecAdamError(
            f"annealing: {shown(fields)}; give its name and arguments, as {{'name': 'sigmoid'}}"
        )
    name = fields.get("name")
    if not isinstance(name, str) or name not in ANNEALINGS:
        raise unknown("annealing", name, ANNEALINGS)
    arguments = {key: value for key, value in fields.items() if key != "name"}
    known = {field.name for field in dataclasses.fields(ANNEALINGS[name])}
    for key in arguments:
        if key not in known:
            raise unknown(f"argument of annealing {name!r}:", key, known)
    return ANNEALINGS[name](**arguments)


def release_step(annealing: Annealing) -> int | None:
    """The first step from which the anchor is never read again, so that it can be freed.

    Args:
        annealing: one of `ANNEALINGS`, whose recall weights never rise; or any other that has a method
            `release_step()` of its own.

    Returns:
        The first step t whose recall weight is below `RECALL_FLOOR`; None when there is none up to
        2^48, or when nothing says that the weight will not rise again.

    Example:
        >>> release_step(Sigmoid(k=0.1, t0=250)), release_step(Linear(t0=100)), release_step(Constant())
        (528, 100, None)
    """
    if type(annealing) not in ANNEALINGS.values():
        says = getattr(annealing, "release_step", None)
        step = None if says is None else says()
        if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 1):
            raise RecAdamError(
                f"{type(annealing).__name__}: release_step gives {shown(step)}; have it give a step from 1, "
                "or None"
            )
        return step

    def released(t: int) -> bool:
        return bool(annealing.weights(float(t))[1] < RECALL_FLOOR)  # an array may hold no such int

    high = 1
    while not released(high):
        high *= 2
        if high > 2**48:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if released(middle) else (middle, high)
    return high
