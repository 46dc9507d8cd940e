"""What a backend says of itself: the ways to take a step, what each promises, and how each is made."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .arrays import Array
from .coefficients import Coefficients
from .errors import RecAdamError, unknown
from .hyperparameters import Hyperparameters
from .update import Moments

__all__ = ["Capabilities", "Exact", "Stepper", "Variant", "installed"]


class Stepper(Protocol):
    """An optimizer that remembers its parameters, as the conformance kit drives it."""

    def __call__(self, grads: dict[str, Array], lr: float) -> dict[str, Array]:
        """Take one step; parameters by name after it."""
        ...

    def moments(self) -> dict[str, Moments]:
        """The moments by name."""
        ...


@dataclass(frozen=True)
class Exact:
    """How a variant gives the specification's bits.

    Args:
        how: what a user does to have them; "always" or "never" where nothing does. Of what is never exact
            no bits are claimed, unless as a declared miss.
        price: what it costs.
        environment: variables that must be set before the process starts.

    Example:
        >>> Exact("never").promised
        False
    """

    how: str = "always"
    price: str = "nothing"
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def promised(self) -> bool:
        """Whether there is a setting that gives the bits."""
        return self.how != "never"


@dataclass(frozen=True)
class Variant:
    """One way to take a step with a backend, and what it promises.

    Args:
        name: its name, for tables and the command line.
        about: what a user writes to get it.
        exact: how it gives the specification's bits.
        needs: modules that must be installed.
        programs: programs that must be on the path, one of each tuple.
        environment: variables that must be set before the process starts, whatever the level.
        make: makes an optimizer of it, from (params, anchors, hp, exact, importance); arrays by name. None
            for `recadam_core.RecAdam` over the backend.
        traced: whether its coefficients are computed in the parameters' precision, on the device.
        coefficients: a function of (t, hp, anchored, dtype) that gives those of an array of steps in NumPy,
            for the claim on them; None where there is nothing to claim.
        pull: takes the pull alone: a function of (params, anchors, recall, importances), lists of arrays and
            a number, that gives the new parameters, for the claim on it; None where nothing is claimed.
        rounds_update: whether the update is rounded to the parameter's dtype before it is added.
        misses: claims of the conformance kit that it is known to miss, and why; of a kind ("exact") or one
            alone ("exact float32"). A claim that is
            listed and holds fails, too.

    Example:
        >>> Variant("mine", programs=(("no_such_compiler", "no_other"),)).lacks()
        'no_such_compiler'
    """

    name: str
    about: str = "recadam_core.RecAdam"
    exact: Exact = Exact()
    needs: tuple[str, ...] = ()
    programs: tuple[tuple[str, ...], ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    make: Callable[..., Stepper] | None = None
    traced: bool = False
    coefficients: Callable[[Any, Hyperparameters, bool, str], Coefficients] | None = None
    pull: Callable[..., Sequence[Array]] | None = None
    rounds_update: bool = False
    misses: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("needs", "programs"):
            if isinstance(getattr(self, name), str):
                raise RecAdamError(f"Variant {self.name!r}: {name} is a string; give a tuple of names")

    def lacks(self) -> str:
        """What must be installed before this variant runs here; empty when nothing.

        Example:
            >>> Variant("fused", needs=("no_such_module",)).lacks()
            'no_such_module'
        """
        missing = [name for name in self.needs if not installed(name)]
        missing += [names[0] for names in self.programs if not any(shutil.which(name) for name in names)]
        return ", ".join(missing)


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do, declared once: tables, tests and benchmarks read it here.

    Args:
        dtypes: parameter dtypes, by name.
        devices: kinds of device.
        jit: whether the step can be traced and compiled with the user's own code.
        sharding: whether arrays may be spread over devices.
        variants: the ways to take a step; the first is `recadam_core.RecAdam` over this backend.

    Example:
        >>> [variant.name for variant in Capabilities().variants]
        ['functional']
    """

    dtypes: tuple[str, ...] = ("float32", "float64")
    devices: tuple[str, ...] = ("cpu",)
    jit: bool = False
    sharding: bool = False
    variants: tuple[Variant, ...] = (Variant("functional"),)

    def variant(self, name: str) -> Variant:
        """The variant of this name.

        Raises:
            RecAdamError: when there is none.

        Example:
            >>> Capabilities().variant("functional").name
            'functional'
        """
        by_name = {variant.name: variant for variant in self.variants}
        if name not in by_name:
            raise unknown("variant", name, by_name)
        return by_name[name]


def installed(module: str) -> bool:
    """Whether a module can be imported; nothing is.

    Example:
        >>> installed("numpy")
        True
    """
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a part of a package that is not there
        return False
