"""The pull towards the pretrained weights around any transformation of optax: the last in its chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from recadam_core import Hyperparameters
from recadam_core.annealing import Constant, annealed_weights
from recadam_core.coefficients import is_zero, proximal
from recadam_core.errors import check_number
from recadam_core.strength import scheduled
from recadam_core.update import accumulator_dtype, pull_by

from .beside import check_called, check_released, laid
from .coefficients import annealing_of, check_pull, rate_of, taken
from .placement import is_traced
from .state import Anchoring, AnchorPullState

__all__ = ["AnchorPullState", "add_anchor_pull"]

NAME = "add_anchor_pull"


def add_anchor_pull(
    pull: float | jax.Array | Callable[[Any], Any] = 0.1,
    *,
    annealing: Any = None,
    learning_rate: float | jax.Array | Callable[[Any], Any] | None = None,
    anchor: Any = None,
    anchor_mask: Any = None,
    anchor_dtype: Any = None,
    anchor_memory: str | None = None,
    importance: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Add to any optimizer's updates a pull towards pretrained weights: put it last in a chain.

    Math:
        Of updates $u$ it makes $u + r(\theta^* - (\theta + u))$ with $r = p/(1+p)$ and
        $p = \text{pull} \cdot \bar\lambda_t\,\eta_t/\max_s\eta_s$: after the optimizer's own step the
        proximal step on $\frac p2\|\theta - \theta^*\|^2$, stable at any strength, outside of gradients,
        moments and clipping.

    Args:
        pull: the weight p at the peak of the learning rate, >= 0; or a schedule of the count (from 0). 0.1
            brings a weight an eleventh of the way home in a step. More where it forgets, less where it does
            not learn.
        annealing: as in `recadam`: its recall weight multiplies the pull, and its task weight the updates of
            what has an anchor. None pulls at one strength.
        learning_rate: the number or schedule that the chain's optimizer has, so that the pull follows it, as
            decoupled weight decay does. None pulls alike in every step.
        anchor: as in `recadam`.
        anchor_mask: as in `recadam`.
        anchor_dtype: as in `recadam`.
        anchor_memory: as in `recadam`.
        importance: as in `recadam`.

    Returns:
        A transformation whose update needs the parameters. Nothing but what leaves updates alone goes after
        it. In `optax.contrib.schedule_free` put it into the chain that is the base optimizer.

    Raises:
        RecAdamError: for a value outside its range, at once; for a tree that does not fit, naming the path,
            at init or while tracing; for an anchor that is not finite or an importance outside [0, 1], at
            init.

    Example:
        >>> tx = optax.chain(optax.lion(1e-2), add_anchor_pull(1.0))
        >>> params = jnp.zeros(2)
        >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
        >>> updates
        Array([-0.005, -0.005], dtype=float32)

    Source: arXiv 2004.12651, Algorithm 1, line 12; Parikh and Boyd, Proximal algorithms, 2014, section 1.1.
    """
    curve = Constant(1.0, 1.0) if annealing is None else annealing_of(annealing)
    Hyperparameters(annealing=curve)  # which refuses what is none
    if not callable(pull):
        pull = check_number(NAME, "pull", pull, low=0.0)
    if not (callable(learning_rate) or learning_rate is None):
        learning_rate = check_number(NAME, "learning_rate", learning_rate, low=0.0)
    anchoring = Anchoring(anchor, anchor_mask, anchor_dtype, anchor_memory, importance)

    def init(params: Any) -> AnchorPullState:
        _, stars, weights = anchoring.anchored(params)
        peak = check_pull(NAME, pull, curve, learning_rate)
        return AnchorPullState(jnp.zeros([], jnp.int32), jnp.asarray(peak, _float()), stars, weights)

    def update_fn(
        updates: Any, state: AnchorPullState, params: Any = None, **_: Any
    ) -> tuple[Any, AnchorPullState]:
        check_called(NAME, params, state, AnchorPullState)
        trees = {"update": updates, "anchor": state.anchor, "importance": state.importance}
        ours, parts, released = laid(NAME, params, trees, curve)
        count = taken(NAME, state.count)
        task, recall = annealed_weights(curve, optax.safe_increment(count).astype(_float()), jnp)
        peak, p = _weight(pull, recall, learning_rate, count, state.peak)
        if released:
            check_released(NAME, curve, count, p)
        share = proximal(p, jnp)[1]
        new = []
        for theta, u, star, weight in zip(ours.leaves, *parts.values(), strict=True):
            new.append(u if star is None else _pulled(theta, u, star, weight, task, share))
        return ours.unflatten(new), state._replace(count=optax.safe_increment(count), peak=peak)

    return optax.GradientTransformationExtraArgs(init, update_fn)


def _float() -> Any:
    return jax.dtypes.canonicalize_dtype(jnp.float64)


def _weight(pull: Any, recall: Any, learning_rate: Any, count: jax.Array, peak: Any) -> tuple[jax.Array, Any]:
    """The highest learning rate up to this step, and the weight of its pull."""
    peak = jnp.asarray(peak, _float())
    lr = rate_of(NAME, learning_rate, count)
    p = rate_of(NAME, pull, count, "pull")
    if lr is not None:
        peak = jnp.maximum(peak, jnp.asarray(lr, _float()))
    weight = scheduled(p, recall, lr, peak)
    if hasattr(weight, "dtype") and lr is not None:
        weight = jnp.where(peak > 0, weight, 0.0)  # which else is 0/0
    if not is_traced(weight):
        where = NAME if is_traced(count) else f"{NAME}, step {int(count) + 1}"
        check_number(where, "the pull", weight, low=0.0)
    return peak, weight


def _pulled(theta: Any, u: Any, star: Any, weight: Any, task: Any, share: Any) -> Any:
    """The update with the pull of what it leads to."""
    wide = accumulator_dtype(jnp, theta.dtype, u.dtype)
    u = u.astype(wide) if is_one(task) else task * u.astype(wide)
    if not is_zero(share):
        u = u + pull_by(theta.astype(wide) + u, star, share, weight)
    return u.astype(theta.dtype)


def is_one(task: Any) -> bool:
    """Whether the host knows that the updates stay whole."""
    return isinstance(task, (int, float)) and task == 1
