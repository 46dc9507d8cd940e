"""The state of the transformation: what it holds, and how anchors and importances come into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recadam_core import RecAdamError
from recadam_core.errors import shown
from recadam_core.importance import check_importance

from .placement import as_array, is_traced, placed, portable, zeros_like
from .trees import Parameters, check_leaf, is_wide

__all__ = ["AnchorPullState", "Anchoring", "RecAdamState", "Released"]


class Released(NamedTuple):
    """Stands in a state where an anchor was, before its recall weight came to zero for good.

    Example:
        >>> jax.tree.leaves(Released())
        []
    """


class RecAdamState(NamedTuple):
    """State of `recadam` and `scale_by_recadam`.

    Example:
        >>> from recadam_jax import recadam
        >>> recadam(1e-4).init(jnp.ones(2)).anchor.shape
        (2,)
    """

    count: jax.Array  # type: ignore[assignment]  # shape (), int32: steps taken
    mu: optax.Updates  # first moments, the parameters' shapes, mu_dtype or at least float32
    nu: optax.Updates  # second moments, the parameters' shapes, at least float32
    anchor: optax.Params  # pretrained values, the parameters' shapes; None for new heads, or Released()
    importance: Any = None  # of each anchor, its shape, in [0, 1]; None for 1 everywhere


class AnchorPullState(NamedTuple):
    """State of `add_anchor_pull`.

    Example:
        >>> from recadam_jax import add_anchor_pull
        >>> add_anchor_pull(0.1).init(jnp.ones(2)).anchor.shape
        (2,)
    """

    count: jax.Array  # type: ignore[assignment]  # shape (), int32: steps taken
    peak: jax.Array  # shape (), float: the highest learning rate that is known; 0 without one
    anchor: optax.Params  # pretrained values, the parameters' shapes; None for new heads, or Released()
    importance: Any = None  # of each anchor, its shape, in [0, 1]; None for 1 everywhere


@dataclass(frozen=True)
class Anchoring:
    """What the state holds, and how: arguments of `recadam`."""

    anchor: Any = None
    anchor_mask: Any = None
    anchor_dtype: Any = None
    anchor_memory: str | None = None
    importance: Any = None
    mu_dtype: Any = None

    def __post_init__(self) -> None:
        for name in ("anchor_dtype", "mu_dtype"):
            dtype = getattr(self, name)
            try:
                wide = dtype is None or is_wide(jnp.dtype(dtype))
            except (TypeError, ValueError):
                wide = False
            if not wide:
                raise RecAdamError(
                    f"recadam_jax: {name} is {shown(dtype)}; give a floating dtype of 16 to 64 bits"
                )
        memory = self.anchor_memory
        if not (memory is None or (isinstance(memory, str) and memory in ("device", "pinned_host"))):
            raise RecAdamError(
                f"recadam_jax: anchor_memory is {shown(memory)}; give 'pinned_host' or 'device'"
            )

    def init(self, params: Any) -> RecAdamState:
        """The state of `recadam` before the first step."""
        ours, anchor, importance = self.anchored(params)
        moments = [zeros_like(p) for p in ours.leaves]
        return RecAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=ours.unflatten([m if self.mu_dtype is None else m.astype(self.mu_dtype) for m, _ in moments]),
            nu=ours.unflatten([v for _, v in moments]),
            anchor=anchor,
            importance=importance,
        )

    def anchored(self, params: Any) -> tuple[Parameters, Any, Any]:
        """The parameters, checked, and the trees of their anchors and of the importances."""
        ours = Parameters(params)
        ours.leaves = [
            p if isinstance(p, jax.ShapeDtypeStruct) and is_wide(p.dtype) else as_array("parameter", path, p)
            for path, p in ours.each()
        ]
        stars = self._anchors(ours)
        weights = self._importances(ours, stars)
        return ours, ours.unflatten(stars), None if weights is None else ours.unflatten(weights)

    def _anchors(self, ours: Parameters) -> list[Any]:
        """An anchor or None for each parameter, checked and copied."""
        if not ours.leaves:  # optax asks so which parts of a state are trees of parameters
            return []
        stars = ours.leaves if self.anchor is None else ours.beside(self.anchor, "anchor", spread=False)
        return [
            self._anchor(path, p, star) if keeps and star is not None else None
            for path, p, star, keeps in ours.each(stars, self._mask(ours))
        ]

    def _mask(self, ours: Parameters) -> list[Any]:
        """Whether each parameter is anchored."""
        mask = True if self.anchor_mask is None else self.anchor_mask
        if callable(mask) and all(map(callable, jax.tree.leaves(mask))):  # and no module of bools
            mask = mask(ours.tree)
            if mask is None:
                raise RecAdamError("anchor_mask: the function gives None; have it give a tree of bools")
        keep = ours.beside(mask, "anchor_mask", spread=True)
        for path, _, keeps in ours.each(keep):
            if not isinstance(keeps, (bool, np.bool_)):
                what = f"of shape {jnp.shape(keeps)}" if hasattr(keeps, "shape") else repr(keeps)
                raise RecAdamError(
                    f"anchor_mask {path!r} is {what}; give True or False, and name anchor_mask in "
                    "static_args of inject_hyperparams"
                )
        return keep

    def _anchor(self, path: str, p: Any, star: Any) -> Any:
        if isinstance(star, jax.ShapeDtypeStruct):
            raise RecAdamError(
                f"anchor {path!r} is a ShapeDtypeStruct, which has no values; give arrays, or trace: "
                "jax.eval_shape(tx.init, params)"
            )
        check_leaf("anchor", path, star)
        if jnp.shape(star) != p.shape:
            raise RecAdamError(
                f"anchor {path!r} has shape {jnp.shape(star)}, its parameter {p.shape}; "
                "give the pretrained array of that parameter, or None for a new head"
            )
        star = portable(path, star, p)
        dtype = jnp.result_type(star) if self.anchor_dtype is None else jnp.dtype(self.anchor_dtype)
        if not is_traced(star):
            if not _is_finite(star):
                raise RecAdamError(f"anchor {path!r} holds NaN or infinity; give the pretrained values")
            if dtype != getattr(star, "dtype", dtype) and not _is_finite(star, dtype):
                raise RecAdamError(
                    f"anchor {path!r} has values beyond {dtype}; give another anchor_dtype, or set "
                    "JAX_ENABLE_X64=1"
                )
        return placed(star, p, dtype, self.anchor_memory)

    def _importances(self, ours: Parameters, stars: list[Any]) -> list[Any] | None:
        """The importance of each anchor, checked and copied; None when there are none."""
        if self.importance is None or not ours.leaves:
            return None if self.importance is None else []
        importances = ours.beside(self.importance, "importance", spread=False)
        return [
            None if star is None else self._importance(path, p, x)
            for path, p, star, x in ours.each(stars, importances)
        ]

    def _importance(self, path: str, p: Any, x: Any) -> Any:
        if x is not None:
            check_leaf("importance", path, x)
        x = portable(path, x, p)
        if isinstance(x, np.ndarray):  # of which bfloat16 is no dtype of its own
            x = jnp.asarray(x)
        with jax.ensure_compile_time_eval():  # within a trace, too
            check_importance(path, x, p.shape)
        return placed(x, p, jnp.result_type(x), self.anchor_memory)


def _is_finite(x: Any, dtype: Any = None) -> bool:
    """Whether all of its values are finite, as another dtype has them if one is given."""
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    with jax.ensure_compile_time_eval(), np.errstate(over="ignore"):  # within a trace, too
        return bool(xp.isfinite(xp.asarray(x, dtype)).all())
