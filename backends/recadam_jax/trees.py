"""Trees of parameters: their leaves, the paths that name them in messages, and which leaves will do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from recadam_core import RecAdamError
from recadam_core.arrays import PLAIN

__all__ = ["Parameters", "check_leaf", "is_wide", "paths", "unfit"]


def paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """The key path of each leaf, as `encoder/layer_3/kernel`."""
    keys = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]
    wrapped = jax.tree_util.GetAttrKey("value")
    if all(path and path[-1] == wrapped for path in keys):  # as each variable of flax.nnx holds its array
        keys = [path[:-1] for path in keys]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in keys]


class Parameters:
    """A tree of parameters, with its leaves and their paths, and what stands beside them in other trees."""

    def __init__(self, tree: Any) -> None:
        structure: Any  # JAX's stubs leave its methods out
        self.leaves, structure = jax.tree.flatten(tree)
        self.tree, self.paths = tree, paths(tree)
        self.unflatten, self._up_to = structure.unflatten, structure.flatten_up_to

    def each(self, *lists: Any) -> Any:
        """Path and leaf of each parameter, and its items of other lists."""
        return zip(self.paths, self.leaves, *lists, strict=True)

    def beside(self, other: Any, what: str, spread: bool | None = None) -> list[Any]:
        """The other tree's parts at the leaves; None, and what is spread, may stand for a branch."""
        try:
            return list(self._up_to(other)) if spread is None else _parts(self.tree, other, what, spread)
        except RecAdamError:
            raise
        except ValueError as error:
            ours, theirs = self.paths, paths(other, lambda x: x is None)
            lacking = [x for x in ours if not any(f"{x}/".startswith(f"{y}/") for y in theirs)]
            unknown = [y for y in theirs if y not in ours and not any(x.startswith(f"{y}/") for x in ours)]
            reason = " ".join(str(error).split())
            if unknown:
                reason = (
                    f"it has {unknown[0]!r}, which they have not" if unknown[0] else "it is a single leaf"
                )
            elif lacking:
                reason = f"it lacks {lacking[0]!r}; None stands for a new head"
            raise RecAdamError(
                f"{what}: not the parameters' tree ({reason}); give one of that structure"
            ) from None


def _parts(params: Any, other: Any, what: str, spread: bool) -> list[Any]:
    count = len(jax.tree.leaves(params))
    if not count:
        return []
    if jax.tree_util.all_leaves([params]):
        return [other]
    if other is None or jax.tree_util.all_leaves([other]):
        if not spread and other is not None:
            raise RecAdamError(
                f"{what}: an array stands where the parameters have a branch; give an array for each, or None"
            )
        return [other] * count
    children, tree = jax.tree.flatten(params, is_leaf=lambda x: x is not params)
    others = cast(Any, tree).flatten_up_to(other)
    return [
        x for child, part in zip(children, others, strict=True) for x in _parts(child, part, what, spread)
    ]


def is_wide(dtype: Any) -> bool:
    """Whether JAX has this floating dtype and may promote others to it."""
    if not jnp.issubdtype(dtype, jnp.floating) or not jnp.dtype(dtype).isnative:
        return False
    return 16 <= int(cast(Any, jnp.finfo)(dtype).bits) <= 64


def unfit(x: Any) -> str:
    """What is wrong with a leaf; nothing if it is a number, or a floating array of JAX or NumPy."""
    if x is None:
        return "is None"
    known = isinstance(x, (jax.Array, np.ndarray, np.generic, float)) or hasattr(x, "__jax_array__")
    if not known or (isinstance(x, np.ndarray) and type(x) not in PLAIN):  # whose mask would be lost
        return f"is a {type(x).__name__}"
    dtype = getattr(x, "dtype", jnp.float32)
    return "" if is_wide(dtype) else f"has dtype {dtype}"


def check_leaf(what: str, path: str, x: Any) -> None:
    """Refuse a leaf that is unfit."""
    if wrong := unfit(x):
        remedy = {
            "parameter": " alone, as eqx.filter(model, eqx.is_inexact_array) does",
            "gradient": ", or freeze the parameter by optax.masked",
        }.get(what, "")
        raise RecAdamError(f"{what} {path!r} {wrong}; give floating arrays of 16 to 64 bits{remedy}")
