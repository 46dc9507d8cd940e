"""How much each weight matters to what the model knows: what the pull may be multiplied by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from recadam_core import RecAdamError, importance_from
from recadam_core.errors import shown

from .trees import Parameters, unfit

__all__ = ["feature_importance", "importance_of"]


def importance_of(loss: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any]) -> Any:
    r"""Weigh parameters by their squared gradients, as EWC does with the old task's loss.

    Math:
        $F_i = \sum_b (\partial L_b / \partial\theta_i)^2$ over batches b, scaled by
        `recadam_core.importance_from`; with batches of one row EWC's empirical Fisher information

    Args:
        loss: of the parameters and a batch, a scalar; it is compiled.
        params: the anchored parameters, a tree of floating arrays at their pretrained values.
        batches: trees of arrays, the old task's; a few dozen small ones do.

    Returns:
        For `recadam(importance=...)`: a tree like the parameters, of arrays in [0, 1] and their dtypes.

    Raises:
        RecAdamError: when a parameter is no floating array, a loss is no scalar, a loss, a gradient or
            the sum of its squares is not finite, or no loss depends on any parameter.

    Example:
        >>> found = importance_of(lambda w, x: (w * x).sum(), jnp.ones(3), [jnp.array([1.0, 2.0, 0.0])])
        >>> [round(x, 2) for x in found.tolist()]
        [0.27, 1.0, 0.0]

    Source: elastic weight consolidation, arXiv 1612.00796, equation 3.
    """
    ours = Parameters(params)
    if not ours.leaves:
        raise RecAdamError("importance: no parameters; give the anchored ones")
    if len(set(ours.paths)) < len(ours.paths):
        raise RecAdamError("importance: two parameters have one path; rename one of them")
    for name, p in ours.each():
        wrong = unfit(p) or ("" if hasattr(p, "dtype") else f"is a {type(p).__name__}")
        if wrong:
            raise RecAdamError(f"importance: {name!r} {wrong}; give the floating arrays alone")

    def scalar(params_: Any, batch: Any) -> Any:
        told = loss(params_, batch)
        if getattr(told, "shape", None) != ():
            what = f"has shape {told.shape}" if hasattr(told, "shape") else f"is a {type(told).__name__}"
            raise RecAdamError(f"importance: the loss {what}; give a scalar")
        return told

    @partial(jax.jit, donate_argnums=0)
    def add(sums: list[Any], params_: Any, batch: Any) -> Any:
        told, grads = jax.value_and_grad(scalar)(params_, batch)
        found = jax.tree.leaves(grads)
        finite = jnp.stack([jnp.isfinite(g).all() for g in found])
        return [x + jnp.square(g.astype(x.dtype)) for x, g in zip(sums, found, strict=True)], told, finite

    if not isinstance(batches, Iterable):
        raise RecAdamError(f"importance: the batches are {shown(batches)}; give a list or generator of them")
    # At least float32: squares leave the range of float16.
    sums: list[Any] = [jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32)) for p in ours.leaves]
    for number, batch in enumerate(batches):
        sums, told, finite = add(sums, params, batch)
        if not math.isfinite(told):
            raise RecAdamError(f"importance: the loss of batch {number} is {float(told)}; leave it out")
        if not finite.all():
            name = ours.paths[int(jnp.argmin(finite))]
            raise RecAdamError(
                f"importance: the gradient of {name!r} in batch {number} is not finite; leave the batch out, "
                "or scale its loss down"
            )
    scaled = importance_from(dict(zip(ours.paths, sums, strict=True)))
    return ours.unflatten([x.astype(p.dtype) for _, p, x in ours.each(scaled.values())])


def feature_importance(
    features: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any], seed: int = 0
) -> Any:
    r"""Weigh parameters by how far each moves the features of some texts or images; no labels, no old data.

    Math:
        $E_u[(\partial\, u \cdot f(x) / \partial\theta_i)^2]$ over normal u: the curvature of
        $\|f_\theta(x) - f_{\theta^*}(x)\|^2$ in $\theta_i$ at the anchor; scaled as in `importance_of`

    Args:
        features: of the parameters and a batch, what the encoder makes of it, of shape (rows, width).
        params: as in `importance_of`.
        batches: the new task's, or any.
        seed: of the u.

    Returns:
        As `importance_of`.

    Raises:
        RecAdamError: as `importance_of`.

    Example:
        >>> w = jnp.array([[1.0, 0.0], [0.0, 0.1]])
        >>> found = feature_importance(lambda w, x: x @ w, w, [jnp.ones((4, 2))])
        >>> found.shape, float(found.max())
        ((2, 2), 1.0)

    Source: memory aware synapses, arXiv 1711.09601, weigh by the gradient of $\|f(x)\|^2$.
    """

    def projected(held: Any, drawn: Any) -> Any:
        key, batch = drawn
        found = features(held, batch)
        if not hasattr(found, "shape"):
            raise RecAdamError(f"importance: the features are a {type(found).__name__}; give an array")
        found = found.astype(jnp.promote_types(found.dtype, jnp.float32))
        return (found * jax.random.normal(key, found.shape, found.dtype)).sum()

    first = jax.random.key(seed)
    return importance_of(
        projected, params, ((jax.random.fold_in(first, b), x) for b, x in enumerate(batches))
    )
