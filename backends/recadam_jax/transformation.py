"""RecAdam as an optax gradient transformation.

The kernel is `recadam_core.update` itself, traced: XLA makes one loop of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

from recadam_core import (
    Annealing,
    Coefficients,
    Hyperparameters,
    Moments,
    RecAdamError,
    Sigmoid,
    coefficients,
    release_step,
    update,
)
from recadam_core.annealing import ANNEALINGS
from recadam_core.coefficients import check_stable, is_zero
from recadam_core.errors import check_number
from recadam_core.importance import check_importance, check_weighable

__all__ = [
    "HostCoefficients",
    "RecAdamState",
    "Released",
    "from_hyperparameters",
    "host_coefficients",
    "paths",
    "recadam",
    "scale_by_recadam",
]


class Released(NamedTuple):
    """Stands in a state where an anchor was, before its recall weight came to zero for good.

    Example:
        >>> jax.tree.leaves(Released())
        []
    """


class RecAdamState(NamedTuple):
    """State of `recadam` and `scale_by_recadam`.

    Example:
        >>> recadam(1e-4).init(jnp.ones(2)).anchor.shape
        (2,)
    """

    count: jax.Array  # type: ignore[assignment]  # shape (), int32: steps taken
    mu: optax.Updates  # first moments, the parameters' shapes, mu_dtype or at least float32
    nu: optax.Updates  # second moments, the parameters' shapes, at least float32
    anchor: optax.Params  # pretrained values, the parameters' shapes; None for new heads, or Released()
    importance: Any = None  # of each anchor, its shape, in [0, 1]; None for 1 everywhere


class HostCoefficients(NamedTuple):
    """One step's coefficients as the host computes them, in float64: arguments of a compiled step.

    Example:
        >>> HostCoefficients((1e-3, 1e-8, 0.0, 0.0), (1e-3, 1e-8, 0.0, 0.0)).new[0]
        0.001
    """

    anchored: tuple[float, float, float, float]  # step, eps, recall, decay of anchored parameters
    new: tuple[float, float, float, float]  # the same of new heads


def host_coefficients(t: int, hp: Hyperparameters, lr: float | None = None) -> HostCoefficients:
    """The coefficients of a step, to be given to `update` in place of those that it would compute traced.

    With them, and without contraction of operations (see `recadam_jax.FLAG`), a compiled step has the bits
    of the specification; a pull that diverges is refused at the step at which it does.

    Args:
        t: the step, from 1.
        hp: the settings that the transformation was made of, by `from_hyperparameters`.
        lr: this step's learning rate; None for hp's.

    Returns:
        Python floats, by whether a parameter is anchored.

    Raises:
        RecAdamError: when t < 1, lr is no number >= 0, or the pull diverges.

    Example:
        >>> hp = Hyperparameters(lr=1e-3, gamma=100.0)
        >>> tx, params = from_hyperparameters(hp), jnp.ones(2)
        >>> state, grads = tx.init(params), jnp.ones(2)
        >>> updates, state = tx.update(grads, state, params, coefficients=host_coefficients(1, hp))
        >>> int(state.count)
        1

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12.
    """
    anchored, new = (coefficients(t, hp, lr, by)[2:] for by in (True, False))
    return HostCoefficients(
        cast(tuple[float, float, float, float], anchored), cast(tuple[float, float, float, float], new)
    )


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
            `importance_of` gives it. Kept where the anchors are; for the form "decoupled". None for 1.

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
        >>> params = {"w": jnp.ones(2), "head": jnp.zeros(1)}
        >>> tx = recadam(1e-3, gamma=100.0, anchor={"w": params["w"], "head": None})
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.ones(2), "head": jnp.ones(1)}, state, params)
        >>> int(state.count), state.anchor["head"] is None
        (1, True)

    Source: arXiv 2004.12651, Algorithm 1.
    """
    hp = Hyperparameters(
        lr=0.0 if callable(learning_rate) else cast(float, learning_rate),
        betas=(b1, b2),
        eps=eps,
        weight_decay=weight_decay,
        gamma=gamma,
        annealing=_annealing(annealing),
        bias_correction=bias_correction,
        form=form,
    )
    kept = _Kept(anchor, anchor_mask, anchor_dtype, anchor_memory, importance, mu_dtype)
    return _transformation("recadam", hp, learning_rate, kept)


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
        >>> tx = optax.chain(scale_by_recadam(gamma=100.0), optax.scale_by_learning_rate(1e-3))
        >>> params = jnp.ones(2)
        >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
        >>> updates.shape
        (2,)

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12.
    """
    hp = Hyperparameters(
        lr=1.0,
        betas=(b1, b2),
        eps=eps,
        gamma=gamma,
        annealing=_annealing(annealing),
        bias_correction=bias_correction,
    )
    kept = _Kept(anchor, anchor_mask, anchor_dtype, anchor_memory, importance, mu_dtype)
    return _transformation("scale_by_recadam", hp, None, kept)


def from_hyperparameters(
    hp: Hyperparameters, learning_rate: Any = None, **kept: Any
) -> optax.GradientTransformationExtraArgs:
    """`recadam` with the settings that the other backends take.

    Args:
        hp: the settings.
        learning_rate: a number or a schedule in place of hp's.
        **kept: `anchor`, `anchor_mask`, `anchor_dtype`, `anchor_memory`, `mu_dtype` and `importance` of
            `recadam`.

    Returns:
        The transformation.

    Raises:
        RecAdamError: as `recadam`.

    Example:
        >>> tx = from_hyperparameters(Hyperparameters(lr=1e-4), anchor_mask=False)
        >>> tx.init(jnp.ones(2)).anchor is None
        True
    """
    rate = hp.lr if learning_rate is None else learning_rate
    hp = hp.replace(lr=0.0 if callable(rate) else rate)
    return _transformation("recadam", hp, rate, _Kept(**kept))


@dataclass(frozen=True)
class _Schedule:
    """An annealing of a schedule, as optax has them."""

    function: Any

    def weights(self, t: Any, xp: Any = None) -> tuple[Any, Any]:
        if not callable(self.function):
            found = self.function
        else:
            found = self.function((t - 1).astype(jnp.int32) if xp else int(t) - 1)
        if found is None or (isinstance(found, (tuple, list)) and len(found) != 2):
            raise RecAdamError(
                f"recadam: the annealing gives {found!r}; have it give the task weight, or both"
            )
        task, recall = found if isinstance(found, (tuple, list)) else (found, 1 - found)
        return (task, recall) if xp else (float(task), float(recall))


def _annealing(given: Any) -> Annealing:
    if given is None:
        return Sigmoid()
    number = isinstance(given, (int, float, jax.Array, np.ndarray)) and not isinstance(given, bool)
    known = hasattr(given, "weights") or isinstance(given, type)
    return _Schedule(given) if number or (callable(given) and not known) else cast(Annealing, given)


@dataclass(frozen=True)
class _Kept:
    """What the state holds, and how."""

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
                floating = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
            except TypeError:
                floating = False
            if not floating:
                raise RecAdamError(f"recadam: {name} is {dtype}; give a floating dtype")
        if self.anchor_memory not in (None, "device", "pinned_host"):
            raise RecAdamError(
                f"recadam: anchor_memory is {self.anchor_memory!r}; give 'pinned_host' or 'device'"
            )

    def anchors(self, params: Any) -> list[Any]:
        """An anchor or None for each parameter, checked and copied."""
        leaves = jax.tree.leaves(params)
        if not leaves:  # optax asks so which parts of a state are trees of parameters
            return []
        names = paths(params)
        stars = leaves if self.anchor is None else _leaves(params, self.anchor, "anchor")
        given = len(jax.tree.leaves(leaves if self.anchor is None else self.anchor))
        if given != sum(star is not None for star in stars):
            raise RecAdamError(
                "anchor: an array stands where the parameters have a branch; give an array for each, or None"
            )
        mask = self.anchor_mask(params) if callable(self.anchor_mask) else self.anchor_mask
        if mask is not None:
            keep = _leaves(params, mask, "anchor_mask")
            for path, kept in zip(names, keep, strict=True):
                if not isinstance(kept, (bool, np.bool_)):
                    raise RecAdamError(
                        f"anchor_mask {path!r} is {_kind(kept)}; give True or False, and name anchor_mask in "
                        "static_args of inject_hyperparams"
                    )
            stars = [star if kept else None for star, kept in zip(stars, keep, strict=True)]
        for path, p, star in zip(names, leaves, stars, strict=True):
            if star is None:
                continue
            if jnp.shape(star) != jnp.shape(p):
                raise RecAdamError(
                    f"anchor {path!r} has shape {jnp.shape(star)}, its parameter {jnp.shape(p)}; "
                    "give the pretrained array of that parameter, or None for a new head"
                )
            if not jnp.issubdtype(jnp.result_type(star), jnp.floating):
                raise RecAdamError(
                    f"anchor {path!r} has dtype {jnp.result_type(star)}; give the pretrained values"
                )
            if not isinstance(star, jax.core.Tracer) and not _is_finite(star):
                raise RecAdamError(f"anchor {path!r} holds NaN or infinity; give the pretrained values")
        placed = [
            None if star is None else self._placed(star, p, self.anchor_dtype)
            for star, p in zip(stars, leaves, strict=True)
        ]
        for path, star in zip(names, placed, strict=True):
            concrete = star is not None and not isinstance(star, jax.core.Tracer)
            if concrete and self.anchor_dtype is not None and not _is_finite(star):
                dtype = jnp.dtype(self.anchor_dtype)
                raise RecAdamError(f"anchor {path!r} has values beyond anchor_dtype {dtype}; give another")
        return placed

    def importances(self, params: Any, stars: list[Any]) -> list[Any] | None:
        """The importance of each anchor, checked and copied; None when there are none."""
        if self.importance is None:
            return None
        if not stars:  # as in anchors
            return []
        given = _leaves(params, self.importance, "importance")
        jax.tree.map(_is_alone, self.importance, params, is_leaf=lambda x: x is None)
        placed: list[Any] = []
        for path, p, star, x in zip(paths(params), jax.tree.leaves(params), stars, given, strict=True):
            if star is None:
                placed.append(None)
                continue
            if isinstance(x, np.ndarray):  # of which bfloat16 is no dtype of its own
                x = jnp.asarray(x)
            with jax.ensure_compile_time_eval():  # within a trace, too
                check_importance(path, x, jnp.shape(p))
            placed.append(self._placed(x, p))
        return placed

    def _placed(self, star: Any, p: Any, dtype: Any = None) -> Any:
        """A copy of an anchor or an importance where its parameter is, part by part."""
        dtype = jnp.result_type(star) if dtype is None else dtype
        if isinstance(p, jax.Array) and not isinstance(p, jax.core.Tracer) and p.committed:
            star = jax.device_put(star, p.sharding)
        star = jnp.array(star, dtype=dtype, copy=True)
        if isinstance(p, jax.core.Tracer):
            star = _alike(star, p)
        if self.anchor_memory is None:
            return star
        if isinstance(star, jax.core.Tracer):
            space = jax.memory.Space.Host if "host" in self.anchor_memory else jax.memory.Space.Device
            return jax.device_put(star, space)
        return jax.device_put(star, star.sharding.with_memory_kind(self.anchor_memory))


def _is_alone(importance: Any, part: Any) -> None:
    if (
        importance is not None
        and jax.tree.leaves(part)
        and not jax.tree_util.treedef_is_leaf(jax.tree.structure(part))
    ):
        raise RecAdamError(
            "importance: an array stands where the parameters have a branch; give an array for each, or None"
        )


def _alike(x: Any, p: jax.Array) -> Any:
    """While tracing: the array, to be sharded as the parameter is.

    On a mesh of explicit axes the types say how. Elsewhere the partitioner lays operands of one elementwise
    operation out alike, so x is chosen over p by a condition that the compiler may not fold before then.
    """
    place, lax, sharding = jax.typeof(p).sharding, cast(Any, jax.lax), cast(Any, jax.sharding)
    if AxisType.Explicit in place.mesh.axis_types:
        x = sharding.reshard(x, place)
    keep = lax.optimization_barrier(jnp.asarray(True))
    return lax.select_n(keep, p.astype(x.dtype), x)


def _zeros_like(p: jax.Array) -> Moments:
    """Moments before the first step, sharded as the parameter is, while tracing, too."""
    zeros = Moments.zeros_like(p)
    return Moments(*(_alike(x, p) for x in zeros)) if isinstance(p, jax.core.Tracer) else zeros


def _is_finite(star: Any) -> bool:
    with jax.ensure_compile_time_eval():  # within a trace, too
        finite = np.isfinite(star) if isinstance(star, np.ndarray) else jnp.isfinite(star)
        return bool(finite.all())


def _kind(x: Any) -> str:
    """A value, for a message; an array by its shape."""
    return f"of shape {jnp.shape(x)}" if hasattr(x, "shape") else repr(x)


def _transformation(
    name: str, hp: Hyperparameters, learning_rate: Any, kept: _Kept
) -> optax.GradientTransformationExtraArgs:
    """The step; without a learning rate, the direction that is to be multiplied by one and subtracted."""
    if kept.importance is not None:
        check_weighable(hp.form)

    def init(params: Any) -> RecAdamState:
        leaves, tree = _flatten(params)
        for path, p in zip(paths(params), leaves, strict=True):
            if not jnp.issubdtype(jnp.result_type(p), jnp.floating):
                raise RecAdamError(
                    f"parameter {path!r} has dtype {jnp.result_type(p)}; give a floating array"
                )
        stars = kept.anchors(params)
        weights = kept.importances(params, stars)
        if learning_rate is not None and any(star is not None for star in stars):
            _check_strength(hp, learning_rate)
        moments = [_zeros_like(jnp.asarray(p)) for p in leaves]
        mu_dtype = kept.mu_dtype
        return RecAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=tree.unflatten([s.m if mu_dtype is None else s.m.astype(mu_dtype) for s in moments]),
            nu=tree.unflatten([s.v for s in moments]),
            anchor=tree.unflatten(stars),
            importance=None if weights is None else tree.unflatten(weights),
        )

    def update_fn(
        updates: Any,
        state: RecAdamState,
        params: Any = None,
        *,
        coefficients: HostCoefficients | None = None,
        **_: Any,
    ) -> tuple[Any, RecAdamState]:
        if params is None:
            raise RecAdamError(f"{name}: update needs the parameters; call update(grads, state, params)")
        if not isinstance(state, RecAdamState):
            raise RecAdamError(f"{name}: the state is a {type(state).__name__}; give what init returned")
        if coefficients is not None and learning_rate is None:
            raise RecAdamError(f"{name}: coefficients hold the learning rate; give them to recadam")
        thetas, tree = _flatten(params)
        grads, mus, nus, stars = (
            _leaves(params, x, what, prefix=False)
            for what, x in (
                ("gradients", updates),
                ("the state's mu", state.mu),
                ("the state's nu", state.nu),
                ("the state's anchor", state.anchor),
            )
        )
        weights = [None] * len(thetas)
        if state.importance is not None:
            weights = _leaves(params, state.importance, "the state's importance", prefix=False)
        for path, theta, grad, m in zip(paths(params), thetas, grads, mus, strict=True):
            _check_step(path, theta, grad, m)
        if any(isinstance(star, Released) for star in stars) and _never_ends(hp.annealing):
            raise RecAdamError(
                f"{name}: the anchors are released, and {hp.annealing!r} reads them in every step"
            )
        count = optax.safe_increment(state.count)
        by_anchored = _coefficients(hp, learning_rate, state.count, coefficients)
        new = []
        for theta, grad, m, v, star, weight in zip(thetas, grads, mus, nus, stars, weights, strict=True):
            c = by_anchored[star is not None]
            if isinstance(star, Released):
                # The recall weight is zero: the same operations on what is there, so the same bits.
                star = jnp.asarray(theta)
            elif star is not None and kept.anchor_memory is not None:
                star, weight = (
                    x if x is None else jax.device_put(x, jax.memory.Space.Device) for x in (star, weight)
                )
            new.append(update(jnp.asarray(theta), jnp.asarray(grad), Moments(m, v), star, c, weight))
        deltas = [delta if learning_rate is not None else -delta for delta, _ in new]
        return tree.unflatten([d.astype(p.dtype) for d, p in zip(deltas, thetas, strict=True)]), RecAdamState(
            count=count,
            mu=tree.unflatten([s.m for _, s in new]),
            nu=tree.unflatten([s.v for _, s in new]),
            anchor=state.anchor,
            importance=state.importance,
        )

    return optax.GradientTransformationExtraArgs(init, update_fn)


def _never_ends(annealing: Any) -> bool:
    """Whether its recall weight is known never to come to zero for good."""
    try:
        return type(annealing) in ANNEALINGS.values() and release_step(annealing) is None
    except jax.errors.JAXTypeError:  # traced
        return False


def _rate(learning_rate: Any, count: Any) -> Any:
    """The learning rate of a step."""
    rate = learning_rate(count) if callable(learning_rate) else learning_rate
    if callable(learning_rate) and rate is None:
        raise RecAdamError("recadam: the learning rate's schedule gives None; have it give a number")
    return rate


def _coefficients(
    hp: Hyperparameters, learning_rate: Any, count: jax.Array, given: HostCoefficients | None
) -> dict[bool, Coefficients]:
    """A step's coefficients by whether a parameter is anchored: the host's, or traced."""
    if given is None:
        t = optax.safe_increment(count).astype(jax.dtypes.canonicalize_dtype(jnp.float64))
        lr = _rate(learning_rate, count)
        return {a: coefficients(t, hp, lr, a, xp=jnp) for a in (True, False)}
    if not isinstance(given, HostCoefficients):
        raise RecAdamError(
            f"recadam: coefficients are {type(given).__name__}; give those of host_coefficients(t, hp)"
        )
    by_anchored = {}
    for anchored, (step, eps, recall, decay) in ((True, given.anchored), (False, given.new)):
        recall = 0.0 if not anchored or is_zero(hp.gamma) else recall
        by_anchored[anchored] = Coefficients(
            *hp.betas, step, eps, recall, 0.0 if is_zero(hp.weight_decay) else decay
        )
    return by_anchored


def _check_step(path: str, theta: Any, grad: Any, m: Any) -> None:
    if grad is None:
        raise RecAdamError(f"gradient {path!r} is None; give one, or use optax.masked")
    for what, x in (("gradient", grad), ("moment", m)):
        if jnp.shape(x) != jnp.shape(theta):
            raise RecAdamError(
                f"{what} {path!r} has shape {jnp.shape(x)}, its parameter {jnp.shape(theta)}; "
                "give equal shapes"
            )
    if not jnp.issubdtype(jnp.result_type(grad), jnp.floating):
        raise RecAdamError(f"gradient {path!r} has dtype {jnp.result_type(grad)}; give a floating array")


def _flatten(params: Any) -> tuple[list[Any], Any]:
    """Leaves and tree; the tree untyped, since JAX's stubs leave its methods out."""
    return jax.tree.flatten(params)


def paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """The key path of each leaf, as `encoder/layer_3/kernel`."""
    found = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]
    wrapped = jax.tree_util.GetAttrKey("value")
    if all(path and path[-1] == wrapped for path in found):  # as each variable of flax.nnx holds its array
        found = [path[:-1] for path in found]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in found]


def _leaves(params: Any, other: Any, what: str, prefix: bool = True) -> list[Any]:
    """The other tree's parts at the parameters; as a prefix, what stops early stands for all below it."""
    _, tree = _flatten(params)
    given = other
    try:
        if prefix:
            whole = tree.unflatten(range(tree.num_leaves))
            given = jax.tree.broadcast(other, whole, is_leaf=lambda x: x is None)
        return list(tree.flatten_up_to(given))
    except ValueError as error:
        ours, theirs = paths(params), paths(other, lambda x: x is None)
        lacking = [x for x in ours if not any(f"{x}/".startswith(f"{y}/") for y in theirs)]
        unknown = [y for y in theirs if y not in ours and not any(x.startswith(f"{y}/") for x in ours)]
        reason = " ".join(str(error).split())
        if unknown:
            reason = f"it has {unknown[0]!r}, which they have not"
        elif lacking:
            reason = f"it lacks {lacking[0]!r}; None stands for a new head"
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
                rate = float(_rate(learning_rate, jnp.asarray(t - 1)))
                check_number(f"recadam, step {t}", "learning rate", rate, low=0.0)
                weights = [float(x) for x in hp.annealing.weights(t)]
                for what, weight in zip(("task weight", "recall weight"), weights, strict=True):
                    check_number(f"recadam, step {t}", what, weight)
                pulls.append((rate * float(hp.gamma) * weights[1], rate * float(hp.weight_decay)))
    except jax.errors.JAXTypeError:
        return  # traced settings
    worst = max(range(len(steps)), key=lambda i: pulls[i])
    check_stable(*pulls[worst], hp.form, f"recadam, step {steps[worst]}")
