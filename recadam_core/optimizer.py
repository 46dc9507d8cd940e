"""RecAdam over a dict of arrays of any one library: init and step, both pure."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .annealing import release_step
from .arrays import Array, check_arrays, check_named, fault, kind_of, not_plain
from .backends import Backend, Shared, backend_for
from .coefficients import coefficients
from .errors import RecAdamError, check_number, shown
from .hyperparameters import Hyperparameters
from .importance import check_importance, check_weighable
from .update import Moments
from .variants import Stepper, Variant

__all__ = ["Functional", "RecAdam", "State", "check_anchors", "functional_over", "stepper_of"]


class State(NamedTuple):
    """The optimizer's state.

    Example:
        >>> import numpy as np
        >>> RecAdam().init({"w": np.ones(2)}, {}).moments["w"].v
        array([0., 0.])
    """

    step: int  # steps taken
    moments: dict[str, Moments]  # one pair a parameter, its shape, at least float32
    anchors: dict[str, Array]  # pretrained values by name; None once freed; no entry for a new head
    importance: Mapping[str, Array] = {}  # of each anchored parameter, in [0, 1]; or empty


def check_anchors(shapes: Mapping[str, Any], anchors: Mapping[str, Array]) -> None:
    """Raise unless every anchor names a parameter and has its shape.

    Example:
        >>> import numpy as np
        >>> check_anchors({"w": (2,)}, {"w": np.zeros(3)})
        Traceback (most recent call last):
        ...
        recadam_core.errors.RecAdamError: anchors: 'w' has shape (3,), its parameter (2,); give the pretrained
        array of that parameter, or leave the name out for a new head
    """
    check_named("anchors", anchors)
    for name, anchor in anchors.items():
        if wrong := not_plain(anchor):
            raise RecAdamError(f"anchors: {name!r} {wrong}, or leave the name out for a new head")
        if name not in shapes:
            near = difflib.get_close_matches(name, shapes, n=1)
            hint = f"the nearest is {near[0]!r}; rename it" if near else "rename it"
            raise RecAdamError(f"anchors: {name!r} matches no parameter; {hint} or leave it out")
        if tuple(anchor.shape) != tuple(shapes[name]):
            raise RecAdamError(
                f"anchors: {name!r} has shape {tuple(anchor.shape)}, its parameter {tuple(shapes[name])}; "
                "give the pretrained array of that parameter, or leave the name out for a new head"
            )


class RecAdam:
    """RecAdam for named arrays of one library, found from the arrays themselves.

    Both methods are pure: they change none of their arguments and keep nothing, so a step can be
    replayed, and the optimizer object itself can be shared. The coefficients are computed on the host,
    so `step` is not for tracing: inside `jax.jit` use `recadam_jax.recadam`.

    Args:
        hp: the settings.
        backend: the backend to use; None finds the one that serves the arrays.

    Example:
        >>> import numpy as np
        >>> import recadam_core as rc
        >>> pretrained = {"w": np.array([1.0, -2.0]), "head": np.zeros(1)}
        >>> opt = rc.RecAdam(rc.Hyperparameters(lr=0.1, gamma=1.0))
        >>> state = opt.init(pretrained, anchors={"w": pretrained["w"]})
        >>> grads = {"w": np.array([0.3, 0.1]), "head": np.array([1.0])}
        >>> params, state = opt.step(pretrained, grads, state)
        >>> params["head"], state.step
        (array([-0.1]), 1)

    Source: arXiv 2004.12651, Algorithm 1.
    """

    def __init__(self, hp: Hyperparameters | None = None, backend: Backend | None = None) -> None:
        if not isinstance(hp, Hyperparameters | None):
            raise RecAdamError(
                f"RecAdam: hp is {type(hp).__name__}; give Hyperparameters, and arrays to init"
            )
        if not isinstance(backend, Backend | None):
            raise RecAdamError(
                f"RecAdam: backend is {shown(backend)}; give one, as get_backend('numpy'), or leave it out"
            )
        self.hp = Hyperparameters() if hp is None else hp
        self._backend = backend
        self._release = release_step(self.hp.annealing)

    def init(
        self,
        params: Mapping[str, Array],
        anchors: Mapping[str, Array],
        importance: Mapping[str, Array] | None = None,
    ) -> State:
        """The state before the first step.

        Args:
            params: parameters by name; real floating dtypes.
            anchors: pretrained values by name, copied here. A name that is missing is a new head: it
                gets plain Adam. `params` itself anchors everything where it is now.
            importance: how much each weight matters to the old task, by name: arrays in [0, 1] of the
                parameters' shapes by which the pulls are multiplied, copied here, as `importance_from`
                gives them. Every anchored parameter has one, or none has; those of new heads are not read.

        Returns:
            Zero moments, copied anchors and importances, step 0.

        Raises:
            RecAdamError: when there is no parameter, one is no floating array, an anchor matches none or has
                another shape, arrays are of several libraries or of another than the backend's, or an
                importance leaves [0, 1].
        """
        check_named("parameters", params)
        if not params:
            raise RecAdamError("parameters: there is none; give a dict of arrays by name")
        xp = check_arrays((f"parameter {name!r}", theta) for name, theta in params.items())
        backend = self._serving(params)
        check_anchors({name: theta.shape for name, theta in params.items()}, anchors)
        for name, anchor in anchors.items():
            if wrong := fault(anchor, xp):
                raise RecAdamError(f"anchor {name!r} {wrong}")
            try:
                finite = bool(xp.all(xp.isfinite(anchor)))
            except (TypeError, RuntimeError):
                finite = True  # traced, or without data: there is no value to look at
            if not finite:
                raise RecAdamError(f"anchor {name!r} holds NaN or infinity; give the pretrained values")
        weights = {} if importance is None else self._weights(params, anchors, importance, xp)
        moments = {name: Moments.zeros_like(theta) for name, theta in params.items()}
        stars, weights = ({name: backend.copy(x) for name, x in xs.items()} for xs in (anchors, weights))
        return State(0, moments, stars, weights)

    def _serving(self, params: Mapping[str, Array]) -> Backend:
        """The backend of these parameters, which are of one library."""
        name, theta = next(iter(params.items()))
        backend = self._backend or backend_for(theta)
        if not backend.owns(theta):
            raise RecAdamError(
                f"parameter {name!r} is none of the backend {backend.name!r}; give its arrays, or no backend"
            )
        return backend

    def _weights(
        self, params: Mapping[str, Array], anchors: Mapping[str, Array], importance: Any, xp: Any
    ) -> dict[str, Array]:
        """The importances of what is anchored, checked."""
        check_named("importance", importance)
        check_weighable(self.hp.form)
        for name in importance:
            if name not in params:
                raise RecAdamError(f"importance: {name!r} matches no parameter; rename it or leave it out")
        weights = {}
        for name in anchors:
            check_importance(name, importance.get(name), params[name].shape)
            if wrong := fault(importance[name], xp):
                raise RecAdamError(f"importance of {name!r} {wrong}")
            weights[name] = importance[name]
        return weights

    def step(
        self, params: Mapping[str, Array], grads: Mapping[str, Array], state: State, lr: float | None = None
    ) -> tuple[dict[str, Array], State]:
        """One step.

        Args:
            params: parameters by name.
            grads: gradients of the target task's loss by name; the same names and shapes.
            state: what `init` or the step before returned.
            lr: this step's learning rate; None for the settings' own.

        Returns:
            The new parameters, and the new state. Once the annealing has released the anchors the
            state no longer holds them.

        Raises:
            RecAdamError: when names, shapes or libraries differ, the state is none that fits, the pull
                diverges, or the backend cannot step the arrays; nothing is changed then.
        """
        t = self._check(params, grads, state)
        new_params = dict(params)
        new_moments = dict(state.moments)
        groups = []
        for anchored in (True, False):
            names = [name for name in params if (name in state.anchors) == anchored]
            if not names:
                continue
            c = coefficients(t, self.hp, lr, anchored)
            pulls = anchored and c.pull
            if pulls and any(state.anchors[name] is None for name in names):
                raise RecAdamError(
                    f"step {t}: the anchor was freed, but the annealing pulls again; keep it at 0"
                )
            thetas, slopes, moments = ([x[name] for name in names] for x in (params, grads, state.moments))
            stars = [state.anchors[name] for name in names] if pulls else None
            weights = [state.importance[name] for name in names] if pulls and state.importance else None
            groups.append(Shared(names, thetas, slopes, moments, stars, c, weights))
        if groups:
            backend: Any = self._serving(params)
            # One that writes in place looks at all groups before it writes into the first.
            together = getattr(backend, "step_groups", None)
            # Without importances as backends are called that know of none.
            columns = (group[1:] if group.importances else group[1:-1] for group in groups)
            stepped = together(groups) if together else [backend.step(*arguments) for arguments in columns]
            for group, (thetas, moments) in zip(groups, stepped, strict=True):
                new_params.update(zip(group.names, thetas, strict=True))
                new_moments.update(zip(group.names, moments, strict=True))
        anchors, importance = state.anchors, state.importance
        if self._release is not None and t >= self._release:
            anchors, importance = dict.fromkeys(anchors), {}
        return new_params, State(t, new_moments, anchors, importance)

    def _check(self, params: Any, grads: Any, state: Any) -> int:
        """The number of the step, if all that it takes fits together."""
        if not isinstance(state, State):
            raise RecAdamError(f"state: {type(state).__name__}; give what init or the step before returned")
        moments = ((f"{what} in the state", getattr(state, what)) for what in State._fields[1:])
        for what, arrays in (("parameters", params), ("gradients", grads), *moments):
            check_named(what, arrays)
        if state.importance:
            check_weighable(self.hp.form)
        taken = check_number("state", "step", state.step, low=0)
        if not isinstance(taken, int | float) or taken % 1:
            raise RecAdamError(f"state: step is {shown(state.step)}; give a whole number, not traced")
        for name in grads:
            if name not in params:
                raise RecAdamError(f"gradient {name!r} matches no parameter; leave it out")
        xp = None
        for name, theta in params.items():
            if name not in state.moments:
                raise RecAdamError(f"parameter {name!r} has no state; call init with it")
            if grads.get(name) is None:
                raise RecAdamError(f"parameter {name!r} has no gradient; give one, or leave it out of params")
            pair, star, weight = state.moments[name], state.anchors.get(name), state.importance.get(name)
            if not isinstance(pair, Moments):
                raise RecAdamError(f"moments of {name!r}: {type(pair).__name__}; give Moments(m, v)")
            if state.importance and star is not None and weight is None:
                raise RecAdamError(f"importance of {name!r} is missing in the state; give all, or none")
            arrays = [("parameter", theta), ("gradient of", grads[name]), ("moments of", pair.m)]
            arrays += [("moments of", pair.v), ("anchor of", star), ("importance of", weight)]
            shape = None
            for what, x in arrays[: 6 if weight is not None else 5 if star is not None else 4]:
                namespace, wrong = kind_of(x)
                xp = xp or namespace
                if (wrong or namespace is not xp) and (wrong := fault(x, xp)):
                    raise RecAdamError(f"{what} {name!r} {wrong}")
                shape = tuple(x.shape) if shape is None else shape
                if tuple(x.shape) == shape:
                    continue
                shapes = f"shape {tuple(x.shape)}, its parameter {shape}"
                if what == "gradient of":
                    raise RecAdamError(f"{what} {name!r} has {shapes}; give the gradient of that parameter")
                raise RecAdamError(
                    f"{what} {name!r} in the state: {shapes}; give the state that init made for it"
                )
        return int(taken) + 1


class Functional:
    """`recadam_core.RecAdam` over a backend, as a `Stepper`.

    Example:
        >>> import numpy as np
        >>> step = Functional(backend_for(np.ones(1)), {"w": np.ones(1)}, {}, Hyperparameters(lr=0.5))
        >>> step({"w": np.ones(1)}, 0.25)["w"]
        array([0.75])
    """

    def __init__(
        self,
        backend: Backend,
        params: dict[str, Array],
        anchors: dict[str, Array],
        hp: Hyperparameters,
        importance: dict[str, Array] | None = None,
    ) -> None:
        self.backend = backend
        self.optimizer = RecAdam(hp, backend)
        self.params, self.state = params, self.optimizer.init(params, anchors, importance)

    def __call__(self, grads: dict[str, Array], lr: float) -> dict[str, Array]:
        """Take one step; parameters by name after it."""
        self.params, self.state = self.optimizer.step(self.params, grads, self.state, lr)
        return self.params

    def moments(self) -> dict[str, Moments]:
        """The moments by name."""
        return self.state.moments


def functional_over(backend_of: Callable[[bool], Backend]) -> Callable[..., Functional]:
    """For `Variant.make`: `RecAdam` over the backend that is given for whether it is to be exact.

    Example:
        >>> import numpy as np
        >>> make = functional_over(lambda exact: backend_for(np.ones(1)))
        >>> make({"w": np.ones(1)}, {}, Hyperparameters(lr=0.5))({"w": np.ones(1)}, 0.25)["w"]
        array([0.75])
    """

    return lambda params, anchors, hp, exact=False, importance=None: Functional(
        backend_of(exact), params, anchors, hp, importance
    )


def stepper_of(
    backend: Backend,
    variant: Variant,
    params: dict[str, Array],
    anchors: dict[str, Array],
    hp: Hyperparameters,
    exact: bool = False,
    importance: dict[str, Array] | None = None,
) -> Stepper:
    """An optimizer of one of a backend's variants, as users meet it; `exact`: where it gives the exact bits.

    Example:
        >>> import numpy as np
        >>> backend = backend_for(np.ones(1))
        >>> step = stepper_of(backend, Variant("functional"), {"w": np.ones(1)}, {}, Hyperparameters(lr=0.5))
        >>> step({"w": np.ones(1)}, 0.25)["w"]
        array([0.75])
    """
    if variant.make is None:
        return Functional(backend, params, anchors, hp, importance)
    return variant.make(params, anchors, hp, exact, importance)
