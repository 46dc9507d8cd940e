"""RecAdam as an optax gradient transformation.

The kernel is `recadam_core.update` itself, traced: XLA makes one loop of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from recadam_core import Hyperparameters, Moments, RecAdamError, update
from recadam_core.errors import shown, unknown
from recadam_core.importance import check_weighable

from .beside import check_called, check_released, laid
from .coefficients import (
    HostCoefficients,
    annealing_of,
    check_strength,
    host_coefficients,
    of_step,
    taken,
)
from .state import Anchoring, RecAdamState, Released

__all__ = [
    "HostCoefficients",
    "RecAdamState",
    "Released",
    "from_hyperparameters",
    "host_coefficients",
    "recadam",
    "scale_by_recadam",
]


def recadam(
    learning_rate: float | jax.Array | Callable[[Any], Any] = 2e-5,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    gamma: float = 5000.0,
    annealing: Any = None,
    anchor: Any = None,
    anchor_mask: Any = None,
    anchor_dtype: Any = None,
    anchor_memory: str | None = None,
    mu_dtype: Any = None,
    bias_correction: bool = True,
    form: str = "decoupled",
    importance: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with a pull towards pretrained weights that is annealed away.

    Math:
        $\theta \leftarrow \theta + r(\theta^* - \theta) - s\,m'/(\sqrt{v'}+\varepsilon) - d\,\theta$,
        with the coefficients of `recadam_core.coefficients` at step count + 1, traced.

    Args:
        learning_rate: a number, or a schedule of the count (from 0, as in optax).
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: under Adam's fraction.
        weight_decay: decoupled decay towards zero. It works against the anchor.
        gamma: strength of the pull; learning_rate * gamma is the share of the way home in one step.
        annealing: `Sigmoid`, `Linear`, `Constant`, or any object with their method `weights`; or a schedule
            of the count, as optax has them, that gives the task weight (then the recall weight is one minus
            it) or both; or a number, which is a constant schedule. None for `Sigmoid()`.
        anchor: pretrained values, a tree like the parameters with None for new heads; None may stand for
            a whole branch. It becomes part of the state as a copy, placed and sharded as its parameter
            is. None alone takes the parameters given to init.
        anchor_mask: tree of bools like the parameters or a prefix of it, or a function that makes one of
            them: True where a parameter is anchored. None anchors all.
        anchor_dtype: floating dtype in which anchors are kept; None for their own.
        anchor_memory: kind of memory in which anchors are kept, as "pinned_host"; None for the device's.
        mu_dtype: floating dtype of the first moments; None for the parameter's, at least float32.
        bias_correction: whether the moments are corrected for their start at zero.
        form: "decoupled", "released" or "proximal".
        importance: how much each weight matters to the old task: arrays in [0, 1] by which the pulls are
            multiplied, a tree like the parameters with an array wherever there is an anchor, as
            `importance_of` gives it. Anchoring where the anchors are; for the form "decoupled". None for 1.

    Returns:
        A transformation whose update needs the parameters. The updates are the whole step, to be
        added by `optax.apply_updates`; put clipping and the like before it in a chain, nothing after. They
        have the parameters' dtype, as optax's have: with 16-bit parameters that is one rounding more than
        the specification has. Update takes `coefficients`, those of `host_coefficients`, too; other
        extra arguments are left alone.

    Raises:
        RecAdamError: for a value outside its range, at once; for a tree that does not fit, naming the path,
            at init or while tracing; for an anchor that is not finite, an importance outside [0, 1] or a pull
            that diverges, at init (a schedule is sampled; settings that are traced cannot be checked).

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.ones(2), "head": jnp.zeros(1)}
        >>> tx = recadam(1e-3, gamma=100.0, anchor={"w": params["w"], "head": None})
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.ones(2), "head": jnp.ones(1)}, state, params)
        >>> int(state.count), state.anchor["head"] is None
        (1, True)

    Source: arXiv 2004.12651, Algorithm 1.
    """
    scheduled = callable(learning_rate)
    lr: Any = 0.0 if scheduled else learning_rate
    curve, corrected = annealing_of(annealing), _static("recadam", bias_correction)
    hp = Hyperparameters(lr, (b1, b2), eps, weight_decay, gamma, curve, corrected, form)
    anchoring = Anchoring(anchor, anchor_mask, anchor_dtype, anchor_memory, importance, mu_dtype)
    return _transformation("recadam", hp, learning_rate if scheduled else hp.lr, anchoring)


def scale_by_recadam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    gamma: float = 5000.0,
    annealing: Any = None,
    anchor: Any = None,
    anchor_mask: Any = None,
    anchor_dtype: Any = None,
    anchor_memory: str | None = None,
    mu_dtype: Any = None,
    bias_correction: bool = True,
    importance: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale gradients as Adam does, weighted by the annealing, and add the pull towards the anchor.

    Math:
        $u = \lambda_t\,\hat m/(\sqrt{\hat v}+\varepsilon) - \gamma\,\bar\lambda_t\,(\theta^* - \theta)$

    It is `recadam` in the form "decoupled" before the learning rate: in a chain with
    `optax.add_decayed_weights` and `optax.scale_by_learning_rate` after it, it is `recadam`, up to rounding.
    The other forms are no such product. Since it does not know the learning rate, a pull that diverges is
    not refused here.

    Args:
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: under Adam's fraction.
        gamma: strength of the pull.
        annealing: as in `recadam`.
        anchor: as in `recadam`.
        anchor_mask: as in `recadam`.
        anchor_dtype: as in `recadam`.
        anchor_memory: as in `recadam`.
        mu_dtype: as in `recadam`.
        bias_correction: as in `recadam`.
        importance: as in `recadam`.

    Returns:
        A transformation whose update needs the parameters.

    Raises:
        RecAdamError: as `recadam`, but for the pull.

    Example:
        >>> tx = optax.chain(scale_by_recadam(gamma=100.0, annealing=0.5), optax.scale_by_learning_rate(1e-3))
        >>> params = jax.numpy.ones(2)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates
        Array([-0.0005, -0.0005], dtype=float32)

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12.
    """
    curve, corrected = annealing_of(annealing), _static("scale_by_recadam", bias_correction)
    hp = Hyperparameters(1.0, (b1, b2), eps, 0.0, gamma, curve, corrected)
    anchoring = Anchoring(anchor, anchor_mask, anchor_dtype, anchor_memory, importance, mu_dtype)
    return _transformation("scale_by_recadam", hp, None, anchoring)


def from_hyperparameters(
    hp: Hyperparameters, learning_rate: Any = None, **anchoring: Any
) -> optax.GradientTransformationExtraArgs:
    """`recadam` with the settings that the other backends take.

    Args:
        hp: the settings.
        learning_rate: a number or a schedule in place of hp's.
        **anchoring: `anchor`, `anchor_mask`, `anchor_dtype`, `anchor_memory`, `mu_dtype` and `importance` of
            `recadam`.

    Returns:
        The transformation.

    Raises:
        RecAdamError: as `recadam`.

    Example:
        >>> tx = from_hyperparameters(Hyperparameters(lr=1e-4), anchor_mask=False)
        >>> tx.init(jax.numpy.ones(2)).anchor is None
        True
    """
    if not isinstance(hp, Hyperparameters):
        raise RecAdamError(f"from_hyperparameters: hp is {shown(hp)}; give Hyperparameters")
    for name in anchoring:
        if name not in Anchoring.__dataclass_fields__:
            raise unknown("argument of from_hyperparameters:", name, Anchoring.__dataclass_fields__)
    rate = hp.lr if learning_rate is None else learning_rate
    hp = hp.replace(lr=0.0 if callable(rate) else rate)
    return _transformation("recadam", hp, rate if callable(rate) else hp.lr, Anchoring(**anchoring))


def _static(where: str, bias_correction: Any) -> Any:
    """The flag, unless it is an array, as inject_hyperparams makes of arrays that it is given."""
    if not isinstance(bias_correction, jax.Array):
        return bias_correction
    raise RecAdamError(
        f"{where}: bias_correction is {shown(bias_correction)}; give True or False, and name bias_correction "
        "in static_args of inject_hyperparams"
    )


def _transformation(
    name: str, hp: Hyperparameters, learning_rate: Any, anchoring: Anchoring
) -> optax.GradientTransformationExtraArgs:
    """The step; without a learning rate, the direction that is to be multiplied by one and subtracted."""
    if anchoring.importance is not None:
        check_weighable(hp.form)

    def init(params: Any) -> RecAdamState:
        state = anchoring.init(params)
        if learning_rate is not None:
            check_strength(name, hp, learning_rate, bool(jax.tree.leaves(state.anchor)))
        return state

    def update_fn(
        updates: Any,
        state: RecAdamState,
        params: Any = None,
        *,
        coefficients: HostCoefficients | None = None,
        **_: Any,
    ) -> tuple[Any, RecAdamState]:
        check_called(name, params, state, RecAdamState)
        if coefficients is not None and learning_rate is None:
            raise RecAdamError(f"{name}: coefficients hold the learning rate; give them to recadam")
        trees = {
            "gradient": updates,
            "first moment": state.mu,
            "second moment": state.nu,
            "anchor": state.anchor,
            "importance": state.importance,
        }
        ours, parts, released = laid(name, params, trees, hp.annealing)
        if state.importance is not None:
            check_weighable(hp.form)
        count = taken(name, state.count)
        by_anchored = of_step(name, hp, learning_rate, count, coefficients)
        if released:
            check_released(name, hp.annealing, count, by_anchored[True].pull)
        new = []
        for theta, grad, m, v, star, weight in zip(ours.leaves, *parts.values(), strict=True):
            c = by_anchored[star is not None]
            new.append(update(theta, grad, Moments(m, v), star, c, weight))
        deltas = [delta if learning_rate is not None else -delta for delta, _ in new]
        deltas = [delta.astype(p.dtype) for delta, p in zip(deltas, ours.leaves, strict=True)]
        return ours.unflatten(deltas), RecAdamState(
            count=optax.safe_increment(count),
            mu=ours.unflatten([s.m for _, s in new]),
            nu=ours.unflatten([s.v for _, s in new]),
            anchor=state.anchor,
            importance=state.importance,
        )

    return optax.GradientTransformationExtraArgs(init, update_fn)
