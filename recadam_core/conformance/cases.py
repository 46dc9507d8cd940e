"""The cases of the kit, declared as data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..annealing import Annealing, Constant, Linear, Sigmoid
from ..arrays import NumpyArray
from ..errors import RecAdamError, unknown
from ..hyperparameters import FORMS, Hyperparameters
from .replay import Group, Recording, to_bfloat16

__all__ = [
    "ANNEALINGS",
    "ARRAYS",
    "DENORMALS",
    "EXACT",
    "FAST",
    "PULLS",
    "SETTINGS",
    "WEIGHED",
    "Case",
    "Values",
]


ANNEALINGS: dict[str, Annealing] = {
    "sigmoid": Sigmoid(k=0.3, t0=20),
    "steep": Sigmoid(k=2.0, t0=5, weight=0.5),
    "slow": Sigmoid(k=0.05, t0=300),  # releases its anchors at step 855
    "linear": Linear(t0=40),
    "long": Linear(t0=600),
    "pull": Constant(1.0, 0.5),
    "free": Constant(1.0, 0.0),
}
"""Annealings by the name that a case has for them."""

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "undecayed": {"weight_decay": 0.0},
    "uncorrected": {"bias_correction": False},
    "quick": {"betas": (0.5, 0.9), "eps": 1e-3},
    "sign": {"betas": (0.0, 0.0)},
    "unpulled": {"gamma": 0.0},
    "bare": {"eps": 0.0, "weight_decay": 0.0},
}
"""Changes to the settings that all cases share: lr 1e-3, gamma 300, weight decay 0.01."""


@dataclass(frozen=True)
class Values:
    """One array of a case: shape, layout in memory, and what kind of numbers are in it.

    Args:
        shape: its shape.
        numbers: "usual", or the special ones that `draw` knows.
        layout: of parameter, gradient and anchor: "" (contiguous), "transposed" or "strided".
        anchored: whether it has an anchor.
        weighed: whether its pull is multiplied by an importance.
    """

    shape: tuple[int, ...]
    numbers: str = "usual"
    layout: tuple[str, str, str] = ("", "", "")
    anchored: bool = True
    weighed: bool = False

    def draw(
        self, rng: np.random.Generator, steps: int, dtype: str
    ) -> tuple[NumpyArray, NumpyArray, NumpyArray]:
        """Starting value, anchor, and gradients of shape (steps, ...), in float64.

        Example:
            >>> Values((2,), "zeros").draw(np.random.default_rng(0), 1, "float32")[0]
            array([0., 0.])
        """
        info = np.finfo("float32" if dtype == "bfloat16" else dtype)
        theta = np.asarray(0.05 * rng.standard_normal(self.shape))
        anchor = np.asarray(theta + 0.01 * rng.standard_normal(self.shape))
        shape = (steps, *self.shape)
        g = rng.standard_normal(shape)
        if self.numbers == "usual":  # eight decades, some of them exactly zero
            g = np.where(rng.random(shape) < 0.05, 0.0, g * 10.0 ** rng.integers(-6, 3, size=shape))
        elif self.numbers == "zeros":
            theta, g = np.zeros(self.shape), np.zeros(shape)
        elif self.numbers == "at anchor":
            anchor = theta.copy()
        elif self.numbers == "huge":  # squares that overflow
            g = g * float(info.max) ** 0.6
        elif self.numbers == "denormal":
            tiny = float(info.tiny)
            theta, anchor = theta * tiny, anchor * tiny
            g = g * np.where(rng.random(self.shape) < 0.5, tiny**0.5, tiny)  # second or first moments
            g[steps // 3 :] = 0.0
        else:
            raise unknown("numbers", self.numbers, ("usual", "zeros", "at anchor", "huge", "denormal"))
        return theta, anchor, g


ARRAYS: dict[str, dict[str, Values]] = {
    "one": {"matrix": Values((9, 5), layout=("transposed", "", ""))},
    "solo": {"scalar": Values(())},
    "few": {
        "scalar": Values(()),
        "vector": Values((40,)),
        "matrix": Values((9, 5), layout=("transposed", "", "")),
        "head": Values((5, 2), anchored=False),
    },
    "mixed": {  # few shapes, since compilers take their time for each
        "scalar": Values(()),
        "one": Values((1,)),
        "empty": Values((0, 3)),
        "cube": Values((3, 4, 5)),
        "matrix": Values((6, 4)),
        "transposed": Values((6, 4), layout=("transposed",) * 3),
        "strided": Values((6, 4), layout=("strided", "", "transposed")),
        "gradient transposed": Values((6, 4), layout=("", "transposed", "strided")),
        "zeros": Values((6,), "zeros"),
        "at anchor": Values((6,), "at anchor"),
        "huge gradients": Values((6,), "huge"),
        "head": Values((6, 4), anchored=False),
        "bias": Values((6,), anchored=False),
    },
    "wide": {"embedding": Values((2**14 + 3, 4))},
    "large": {"embedding": Values((2**18 + 3, 4))},
    "many": {f"w{i:03}": Values((3,), anchored=i % 10 > 0) for i in range(1000)},
    "denormal": {
        "vector": Values((40,), "denormal"),
        "matrix": Values((6, 5), "denormal", ("transposed", "", "")),
        "head": Values((5, 2), "denormal", anchored=False),
    },
    "weighed": {
        "scalar": Values((), weighed=True),
        "vector": Values((40,), weighed=True),
        "matrix": Values((9, 5), layout=("transposed", "", "strided"), weighed=True),
        "head": Values((5, 2), anchored=False),
    },
}
"""Sets of arrays by the name that a case has for them."""


@dataclass(frozen=True)
class Case:
    """Everything that determines a recording.

    Args:
        form: form of the update.
        annealing: a key of `ANNEALINGS`.
        settings: a key of `SETTINGS`.
        arrays: a key of `ARRAYS`.
        dtype: dtype of weights and gradients.
        steps: number of steps.

    Raises:
        RecAdamError: for a name that there is not, or an importance in another form than "decoupled".

    Example:
        >>> case = Case("proximal", steps=3)
        >>> case.name, Case.named(case.name) == case
        ('proximal/sigmoid/plain/few/float64/3', True)
    """

    form: str = "decoupled"
    annealing: str = "sigmoid"
    settings: str = "plain"
    arrays: str = "few"
    dtype: str = "float64"
    steps: int = 60

    def __post_init__(self) -> None:
        choices: Mapping[str, Any] = {
            "form": FORMS,
            "annealing": ANNEALINGS,
            "settings": SETTINGS,
            "arrays": ARRAYS,
            "dtype": ("float64", "float32", "bfloat16", "float16"),
        }
        for what, known in choices.items():
            if getattr(self, what) not in known:
                raise unknown(f"case: {what}", getattr(self, what), known)
        if self.arrays == "weighed" and self.form != "decoupled":
            raise RecAdamError(f"case: arrays 'weighed' in the form {self.form!r}; give 'decoupled'")
        if self.steps < 1:
            raise RecAdamError(f"case: {self.steps} steps; give 1 or more")

    @property
    def name(self) -> str:
        """The case as one word, which `named` reads."""
        parts = (self.form, self.annealing, self.settings, self.arrays, self.dtype, self.steps)
        return "/".join(map(str, parts))

    @classmethod
    def named(cls, name: str) -> Case:
        """The case of this name.

        Raises:
            RecAdamError: when it names none.

        Example:
            >>> Case.named("released/linear/plain/mixed/float32/30").steps
            30
        """
        parts = name.split("/")
        if len(parts) != 6 or not parts[5].isdecimal():
            raise RecAdamError(
                f"case {name!r}: not form/annealing/settings/arrays/dtype/steps; as in {cls().name!r}"
            )
        form, annealing, settings, arrays, dtype, steps = parts
        return cls(form, annealing, settings, arrays, dtype, int(steps))

    @property
    def hyperparameters(self) -> Hyperparameters:
        """The settings.

        Example:
            >>> Case(settings="unpulled").hyperparameters.gamma
            0.0
        """
        shared: dict[str, Any] = {"lr": 1e-3, "gamma": 300.0, "weight_decay": 0.01, "form": self.form}
        return Hyperparameters(annealing=ANNEALINGS[self.annealing], **{**shared, **SETTINGS[self.settings]})

    def recording(self) -> Recording:
        """Starting values, anchors, gradients, a rate that warms up and decays: the same on every machine.

        Example:
            >>> Case(steps=2).recording().lr
            array([0.00015, 0.0002 ])
        """
        rng = np.random.default_rng(0)
        theta0, anchors, grads, layouts, importance = {}, {}, {}, {}, {}
        for name, values in ARRAYS[self.arrays].items():
            drawn = (_round(x, self.dtype) for x in values.draw(rng, self.steps, self.dtype))
            theta0[name], anchors[name], grads[name] = drawn
            layouts[name] = values.layout
            if not values.anchored:
                del anchors[name]
            if values.weighed:  # zeros and ones among them
                drawn_weights = np.clip(1.5 * rng.random(values.shape) - 0.25, 0.0, 1.0)
                importance[name] = _round(np.asarray(drawn_weights), self.dtype)
        t = np.arange(1, self.steps + 1)
        lr = 1e-3 * np.minimum(t / 5, 1.0) * (1.0 - 0.5 * t / self.steps)
        group = Group(self.hyperparameters, theta0, anchors, grads, layouts=layouts, importance=importance)
        return Recording(self.name, self.dtype, lr, (group,))


def _round(x: NumpyArray, dtype: str) -> NumpyArray:
    with np.errstate(over="ignore", under="ignore"):
        return to_bfloat16(x) if dtype == "bfloat16" else x.astype(dtype)


CURVES = ("sigmoid", "steep", "linear", "pull", "free")
OTHERS = tuple(SETTINGS)[1:]
BOTH = ("float32", "float64")


def _exact(dtype: str) -> Iterator[Case]:
    whole = dtype == "float32"  # float64 need not repeat all combinations: there the forms take turns
    # A thousand steps, past the release of the anchors.
    form, annealing = ("decoupled", "slow") if whole else ("released", "long")
    yield Case(form, annealing, arrays="one", dtype=dtype, steps=1000)
    # Every form under every annealing, with every kind of array.
    for form, annealing in _pairs(CURVES, whole):
        yield Case(form, annealing, arrays="mixed", dtype=dtype, steps=8)
    # Every form with every other setting.
    for form, settings in _pairs(OTHERS, whole):
        yield Case(form, settings=settings, dtype=dtype, steps=8)
    yield Case(arrays="solo", dtype=dtype, steps=300)
    yield Case(arrays="large", dtype=dtype, steps=2)
    if whole:
        yield Case(arrays="many", dtype=dtype, steps=2)


def _fast(dtype: str) -> Iterator[Case]:
    # Where float32 has shown all annealings, three will do.
    for form, annealing in _pairs(CURVES if dtype == "float32" else CURVES[::2], False):
        yield Case(form, annealing, dtype=dtype, steps=45)
    if dtype in BOTH:
        for form, settings in _pairs(OTHERS[:-1], False):
            yield Case(form, settings=settings, dtype=dtype, steps=45 if dtype == "float32" else 15)
    yield Case(arrays="mixed", dtype=dtype, steps=4)
    yield Case(arrays="wide", dtype=dtype, steps=2)


def _pairs(others: tuple[str, ...], whole: bool) -> Iterator[tuple[str, str]]:
    """Every form with every other choice; or the forms in turn."""
    return itertools.product(FORMS, others) if whole else zip(itertools.cycle(FORMS), others, strict=False)


EXACT: dict[str, tuple[Case, ...]] = {dtype: tuple(_exact(dtype)) for dtype in BOTH}
"""Cases of the claim "the same bits", by dtype."""

DENORMALS: dict[str, tuple[Case, ...]] = {
    dtype: tuple(Case(form, arrays="denormal", dtype=dtype, steps=30) for form in FORMS) for dtype in BOTH
}
"""Cases of the claim "the same bits, of denormal numbers too", by dtype."""

WEIGHED: dict[str, tuple[Case, ...]] = {
    dtype: tuple(Case(annealing=x, arrays="weighed", dtype=dtype, steps=12) for x in CURVES[:count])
    for dtype, count in {"float32": 4, "float64": 4, "bfloat16": 1, "float16": 1}.items()
}
"""Cases of the claim "the same bits, where pulls are weighed", by dtype; the first is one of "step", too."""

PULLS: dict[str, tuple[str, float]] = {
    "none": ("few", 0.0),
    "light": ("few", 1e-6),
    "usual": ("mixed", 0.1),
    "even": ("few", 1.0),
    "strong": ("mixed", 300.0),
    "boundless": ("few", 1e300),
    "wide": ("wide", 0.1),
    "weighed": ("weighed", 0.1),
}
"""Cases of the claim "the same bits, of the pull alone": a key of `ARRAYS`, and the weight of the pull."""

FAST: dict[str, tuple[Case, ...]] = {dtype: tuple(_fast(dtype)) for dtype in (*BOTH, "bfloat16", "float16")}
"""Cases of the claims "every step within its bound" and "the same way", by dtype."""
