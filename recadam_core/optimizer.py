"""RecAdam over a dict of arrays of any one library: init and step, both pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from array_api_compat import array_namespace, is_array_api_obj

from .annealing import release_step
from .backends import Backend, backend_for
from .coefficients import coefficients
from .errors import RecAdamError
from .hyperparameters import Hyperparameters
from .importance import check_importance, check_weighable
from .update import Moments

__all__ = ["RecAdam", "State", "check_anchors"]


class State(NamedTuple):
    """The optimizer's state.

    Example:
        >>> State(0, {}, {}).step
        0
    """

    step: int  # steps taken
    moments: dict[str, Moments]  # one pair a parameter, its shape, at least float32
    anchors: dict[str, Any]  # pretrained values by name; None once freed; no entry for a new head
    importance: Mapping[str, Any] = {}  # of each anchored parameter, in [0, 1]; or empty


def check_anchors(shapes: Mapping[str, Any], anchors: Mapping[str, Any], where: str = "anchors") -> None:
    """Raise unless every anchor names a parameter and has its shape.

    Args:
        shapes: shape by parameter name.
        anchors: anchor by parameter name; may lack names (new heads).
        where: the place for the message.

    Raises:
        RecAdamError: naming the anchor and the remedy.

    Example:
        >>> import numpy as np
        >>> check_anchors({"w": (2,)}, {"w": np.zeros(3)})
        Traceback (most recent call last):
        ...
        recadam_core.errors.RecAdamError: anchors: 'w' has shape (3,), its parameter (2,); give the pretrained
        array of that parameter, or leave the name out for a new head
    """
    if not isinstance(anchors, Mapping):
        raise RecAdamError(f"{where}: {type(anchors).__name__}; give a dict of arrays by parameter name")
    for name, anchor in anchors.items():
        if not is_array_api_obj(anchor):
            raise RecAdamError(
                f"{where}: {name!r} is {type(anchor).__name__}; leave the name out for a new head"
            )
        if name not in shapes:
            near = difflib.get_close_matches(name, shapes, n=1)
            hint = f"the nearest is {near[0]!r}; rename it" if near else "rename it"
            raise RecAdamError(f"{where}: {name!r} matches no parameter; {hint} or leave it out")
        if tuple(anchor.shape) != tuple(shapes[name]):
            raise RecAdamError(
                f"{where}: {name!r} has shape {tuple(anchor.shape)}, its parameter {tuple(shapes[name])}; "
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
        self.hp = Hyperparameters() if hp is None else hp
        self._backend = backend
        self._release = release_step(self.hp.annealing)

    def init(
        self,
        params: Mapping[str, Any],
        anchors: Mapping[str, Any],
        importance: Mapping[str, Any] | None = None,
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
            RecAdamError: when an anchor matches no parameter or has another shape, a parameter is no
                floating array, an importance leaves [0, 1], or the backend takes none.
        """
        _check_arrays("parameter", params)
        check_anchors({name: theta.shape for name, theta in params.items()}, anchors)
        _check_arrays("anchor", anchors)
        for name, anchor in anchors.items():
            xp = array_namespace(anchor)
            try:
                finite = bool(xp.all(xp.isfinite(anchor)))
            except (TypeError, RuntimeError):
                finite = True  # traced, or without data: there is no value to look at
            if not finite:
                raise RecAdamError(f"anchor {name!r} holds NaN or infinity; give the pretrained values")
            if xp is not array_namespace(params[name]):
                raise RecAdamError(
                    f"anchor {name!r} is of another library than its parameter; give both of one"
                )
        moments = {name: Moments.zeros_like(theta) for name, theta in params.items()}
        weights = self._weights(params, anchors, importance) if importance is not None else {}
        return State(0, moments, self._copied(anchors), self._copied(weights))

    def _copied(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {name: (self._backend or backend_for(x)).copy(x) for name, x in arrays.items()}

    def _weights(
        self, params: Mapping[str, Any], anchors: Mapping[str, Any], importance: Any
    ) -> dict[str, Any]:
        """The importances of what is anchored, checked."""
        if not isinstance(importance, Mapping):
            raise RecAdamError(
                f"importance: {type(importance).__name__}; give a dict of arrays by parameter name"
            )
        check_weighable(self.hp.form)
        for name in importance:
            if name not in params:
                raise RecAdamError(f"importance: {name!r} matches no parameter; rename it or leave it out")
        found = {}
        for name in anchors:
            check_importance(name, importance.get(name), params[name].shape)
            backend = self._backend or backend_for(params[name])
            if not any(v.name == "functional" and v.weighs for v in backend.capabilities.variants):
                raise RecAdamError(f"importance: the backend {backend.name!r} takes none; leave it out")
            if array_namespace(importance[name]) is not array_namespace(params[name]):
                raise RecAdamError(
                    f"importance of {name!r} is of another library than its parameter; give both of one"
                )
            found[name] = importance[name]
        return found

    def step(
        self,
        params: Mapping[str, Any],
        grads: Mapping[str, Any],
        state: State,
        lr: float | None = None,
    ) -> tuple[dict[str, Any], State]:
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
            RecAdamError: when names or shapes differ, or the pull diverges.
        """
        for name, theta in params.items():
            if name not in state.moments:
                raise RecAdamError(f"parameter {name!r} has no state; call init with it")
            if grads.get(name) is None:
                raise RecAdamError(f"parameter {name!r} has no gradient; give one, or leave it out of params")
            if tuple(grads[name].shape) != tuple(theta.shape):
                raise RecAdamError(
                    f"gradient of {name!r} has shape {tuple(grads[name].shape)}, its parameter "
                    f"{tuple(theta.shape)}; give the gradient of that parameter"
                )
            m, v = state.moments[name]
            held = ("anchor", state.anchors.get(name)), ("importance", state.importance.get(name))
            for what, x in (("moments", m), ("moments", v), *held):
                if x is not None and tuple(x.shape) != tuple(theta.shape):
                    raise RecAdamError(
                        f"{what} of {name!r} in the state: shape {tuple(x.shape)}, its parameter "
                        f"{tuple(theta.shape)}; give the state that init made for it"
                    )
        for name in grads:
            if name not in params:
                raise RecAdamError(f"gradient {name!r} matches no parameter; leave it out")
        t = state.step + 1
        new_params = dict(params)
        new_moments = dict(state.moments)
        for anchored in (True, False):
            names = [name for name in params if (name in state.anchors) == anchored]
            if not names:
                continue
            c = coefficients(t, self.hp, lr, anchored)
            backend = self._backend or backend_for(params[names[0]])
            stars = [state.anchors[name] for name in names] if anchored and c.recall else None
            if stars and any(star is None for star in stars):
                raise RecAdamError(
                    f"step {t}: the anchor was freed, but the annealing pulls again; keep it at 0"
                )
            # A backend that takes no importance need not know the argument.
            more = {"importances": [state.importance[n] for n in names]} if stars and state.importance else {}
            thetas, moments = backend.step(
                [params[name] for name in names],
                [grads[name] for name in names],
                [state.moments[name] for name in names],
                stars,
                c,
                **more,
            )
            new_params.update(zip(names, thetas, strict=True))
            new_moments.update(zip(names, moments, strict=True))
        anchors, importance = state.anchors, state.importance
        if self._release is not None and t >= self._release:
            anchors, importance = dict.fromkeys(anchors), {}
        return new_params, State(t, new_moments, anchors, importance)


def _check_arrays(what: str, arrays: Mapping[str, Any]) -> None:
    if not isinstance(arrays, Mapping):
        raise RecAdamError(f"{what}s: {type(arrays).__name__}; give a dict of arrays by parameter name")
    for name, array in arrays.items():
        if not is_array_api_obj(array):
            raise RecAdamError(f"{what} {name!r} is {type(array).__name__}; give an array")
        if not array_namespace(array).isdtype(array.dtype, "real floating"):
            raise RecAdamError(f"{what} {name!r} has dtype {array.dtype}; give a real floating array")
