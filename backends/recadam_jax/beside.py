"""What a step reads beside each parameter, and what is refused before it."""

from __future__ import annotations

from typing import Any

import jax

from recadam_core import RecAdamError

from .coefficients import never_ends
from .placement import as_array, fetched, is_traced, typed
from .state import Released
from .trees import Parameters

__all__ = ["check_called", "check_released", "laid"]

TREES = {
    "gradient": "gradients",
    "update": "updates",
    "first moment": "the state's mu",
    "second moment": "the state's nu",
    "anchor": "the state's anchor",
    "importance": "the state's importance",
}


def check_called(name: str, params: Any, state: Any, kind: type) -> None:
    """Raise unless update has the parameters, and a state of its kind."""
    if params is None:
        raise RecAdamError(f"{name}: update needs the parameters; call update(grads, state, params)")
    if not isinstance(state, kind):
        raise RecAdamError(f"{name}: the state is a {type(state).__name__}; give what init returned")


def laid(
    name: str, params: Any, trees: dict[str, Any], annealing: Any
) -> tuple[Parameters, dict[str, list[Any]], bool]:
    """The parameters, what the trees have beside each, checked, and whether anchors are released."""
    ours = Parameters(params)
    ours.leaves = [fetched(as_array("parameter", path, p)) for path, p in ours.each()]
    lists = {}
    for what, tree in trees.items():
        lacks = tree is None and what == "importance"
        lists[what] = [None] * len(ours.leaves) if lacks else ours.beside(tree, TREES[what])
    released = any(isinstance(star, Released) for star in lists["anchor"])
    if released and never_ends(annealing):
        raise RecAdamError(f"{name}: the anchors are released, and {annealing!r} reads them in every step")
    parts = {what: [_beside(what, *each) for each in ours.each(xs)] for what, xs in lists.items()}
    return ours, parts, released


def _beside(what: str, path: str, p: Any, x: Any) -> Any:
    if x is None and what in ("anchor", "importance"):
        return None
    if isinstance(x, Released):
        return p  # the recall weight is zero: the same operations on what is there, so the same bits
    x = fetched(as_array(what, path, x, p))
    if x.shape != p.shape:
        raise RecAdamError(f"{what} {path!r} has shape {x.shape}, its parameter {p.shape}; give equal shapes")
    return x if what in ("gradient", "update") else typed(x, p)


def check_released(name: str, annealing: Any, count: jax.Array, pull: Any) -> None:
    """Refuse a step that reads anchors which are released."""
    if not is_traced(pull) and pull > 0:
        raise RecAdamError(
            f"{name}, step {int(count) + 1}: the anchors are released, and {annealing!r} still reads them"
        )
