"""RecAdam as an optax gradient transformation.

The kernel is `recadam_core.update` itself, traced: XLA makes one loop of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recadam_core import (
    Annealing,
    Hyperparameters,
    Moments,
    RecAdamError,
    Sigmoid,
    coefficients,
    release_step,
    update,
)
from recadam_core.coefficients import check_pull
from recadam_core.errors import check_number

__all__ = ["RecAdamState", "recadam"]


class RecAdamState(NamedTuple):
    """State of `recadam`.

    Example:
        >>> recadam(1e-4).init(jnp.ones(2)).anchor.shape
        (2,)
    """

    count: jax.Array  # type: ignore[assignment]  # shape (), int32: steps taken
    mu: optax.Updates  # first moments, the parameters' shapes, mu_dtype or at least float32
    nu: optax.Updates  # second moments, the parameters' shapes, at least float32
    anchor: optax.Params  # pretrained values, the parameters' shapes; None for new heads


def recadam(
    learning_rate: float | jax.Array | Callable[[Any], Any] = 2e-5,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    gamma: float = 5000.0,
    annealing: Annealing | None = None,
    anchor: Any = None,
    anchor_mask: Any = None,
    mu_dtype: Any = None,
    bias_correction: bool = True,
    form: str = "decoupled",
) -> optax.GradientTransformation:
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
        annealing: `Sigmoid`, `Linear`, `Constant`, or any object with their method `weights`.
        anchor: pretrained values, a tree like the parameters with None for new heads; None may stand for
            a whole branch. It becomes part of the state as a copy. None alone takes the parameters given
            to init.
        anchor_mask: tree of bools like the parameters or a prefix of it, or a function that makes one of
            them: True where a parameter is anchored. None anchors all.
        mu_dtype: floating dtype of the first moments; None for the parameter's, at least float32.
        bias_correction: whether the moments are corrected for their start at zero.
        form: "decoupled", "released" or "proximal".

    Returns:
        A transformation whose update needs the parameters. The updates are the whole step, to be
        added by `optax.apply_updates`; put clipping and the like before it in a chain, nothing after. They
        have the parameters' dtype, as optax's have: with 16-bit parameters that is one rounding more than
        the specification has.

    Raises:
        RecAdamError: for a value outside its range, at once; for a tree that does not fit, naming the path,
            at init or while tracing; for an anchor that is not finite or a pull that diverges, at init (a
            schedule is sampled; settings that are traced cannot be checked).

    Example:
        >>> params = {"w": jnp.ones(2), "head": jnp.zeros(1)}
        >>> tx = recadam(1e-3, gamma=100.0, anchor={"w": params["w"], "head": None})
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.ones(2), "head": jnp.ones(1)}, state, params)
        >>> int(state.count), state.anchor["head"] is None
        (1, True)

    Source: arXiv 2004.12651, Algorithm 1.
    """
    if mu_dtype is not None and not jnp.issubdtype(mu_dtype, jnp.floating):
        raise RecAdamError(f"recadam: mu_dtype is {mu_dtype}; give a floating dtype")
    hp = Hyperparameters(
        lr=0.0 if callable(learning_rate) else cast(float, learning_rate),
        betas=(b1, b2),
        eps=eps,
        weight_decay=weight_decay,
        gamma=gamma,
        annealing=Sigmoid() if annealing is None else annealing,
        bias_correction=bias_correction,
        form=form,
    )

    def init(params: Any) -> RecAdamState:
        leaves, tree = _flatten(params)
        paths = [_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for path, p in zip(paths, leaves, strict=True):
            if not jnp.issubdtype(jnp.result_type(p), jnp.floating):
                raise RecAdamError(
                    f"parameter {path!r} has dtype {jnp.result_type(p)}; give a floating array"
                )
        stars = leaves if anchor is None else _leaves(tree, anchor, "anchor")
        mask = anchor_mask(params) if callable(anchor_mask) else anchor_mask
        if mask is not None:
            keep = _leaves(tree, mask, "anchor_mask")
            stars = [star if kept else None for star, kept in zip(stars, keep, strict=True)]
        for path, p, star in zip(paths, leaves, stars, strict=True):
            if star is not None and jnp.shape(star) != jnp.shape(p):
                raise RecAdamError(
                    f"anchor {path!r} has shape {jnp.shape(star)}, its parameter {jnp.shape(p)}; "
                    "give the pretrained array of that parameter, or None for a new head"
                )
            if star is not None and not isinstance(star, jax.core.Tracer) and not np.isfinite(star).all():
                raise RecAdamError(f"anchor {path!r} holds NaN or infinity; give the pretrained values")
        if any(star is not None for star in stars):
            _check_strength(hp, learning_rate)
        moments = [Moments.zeros_like(jnp.asarray(p)) for p in leaves]
        return RecAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=tree.unflatten([s.m if mu_dtype is None else s.m.astype(mu_dtype) for s in moments]),
            nu=tree.unflatten([s.v for s in moments]),
            anchor=tree.unflatten([None if star is None else jnp.array(star, copy=True) for star in stars]),
        )

    def update_fn(updates: Any, state: RecAdamState, params: Any = None) -> tuple[Any, RecAdamState]:
        if params is None:
            raise RecAdamError("recadam: update needs the parameters; call update(grads, state, params)")
        thetas, tree = _flatten(params)
        grads = _leaves(tree, updates, "gradients", prefix=False)
        for (path, _), grad in zip(jax.tree_util.tree_leaves_with_path(params), grads, strict=True):
            if grad is None:
                raise RecAdamError(f"gradient {_path(path)!r} is None; give one, or use optax.masked")
        mus, nus, stars = (tree.flatten_up_to(x) for x in (state.mu, state.nu, state.anchor))
        count = optax.safe_increment(state.count)
        t = count.astype(jax.dtypes.canonicalize_dtype(jnp.float64))
        lr = learning_rate(state.count) if callable(learning_rate) else learning_rate
        by_anchored = {a: coefficients(t, hp, lr, a, xp=jnp) for a in (True, False)}
        new = [
            update(theta, grad, Moments(m, v), star, by_anchored[star is not None])
            for theta, grad, m, v, star in zip(thetas, grads, mus, nus, stars, strict=True)
        ]
        deltas = [delta.astype(theta.dtype) for theta, (delta, _) in zip(thetas, new, strict=True)]
        return tree.unflatten(deltas), RecAdamState(
            count=count,
            mu=tree.unflatten([s.m for _, s in new]),
            nu=tree.unflatten([s.v for _, s in new]),
            anchor=state.anchor,
        )

    return optax.GradientTransformation(init, update_fn)


def _flatten(params: Any) -> tuple[list[Any], Any]:
    """Leaves and tree; the tree untyped, since JAX's stubs leave its methods out."""
    return jax.tree.flatten(params)


def _path(path: Any) -> str:
    """A key path as `encoder/layer_3/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaves(tree: Any, other: Any, what: str, prefix: bool = True) -> list[Any]:
    """The other tree's parts at the leaves of `tree`; as a prefix, what stops early stands for all below."""
    try:
        if prefix:
            whole = tree.unflatten(range(tree.num_leaves))
            other = jax.tree.broadcast(other, whole, is_leaf=lambda x: x is None)
        return list(tree.flatten_up_to(other))
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise RecAdamError(
            f"{what}: not the parameters' tree ({reason}); give one of that structure"
        ) from None


def _check_strength(hp: Hyperparameters, learning_rate: Any) -> None:
    """Refuse a pull that diverges, as far as the host can tell: compiled steps cannot raise.

    A schedule is asked at up to 200 steps, evenly over the annealing and thinner after it.
    """
    try:
        last = min(release_step(hp.annealing) or 10_000, 2**31 - 2)
        steps = sorted({*map(int, np.linspace(1, last, 100)), *map(int, np.geomspace(1, last, 100))})
        with jax.ensure_compile_time_eval():
            pulls = []
            for t in steps:
                rate = learning_rate(jnp.asarray(t - 1)) if callable(learning_rate) else learning_rate
                check_number(f"recadam, step {t}", "learning rate", float(rate), low=0.0)
                pulls.append(float(rate) * float(hp.gamma) * float(hp.annealing.weights(t)[1]))
    except (jax.errors.ConcretizationTypeError, TypeError):
        return  # traced settings
    worst = max(range(len(steps)), key=lambda i: pulls[i])
    check_pull(pulls[worst], hp.form, f"recadam, step {steps[worst]}")
