"""RecAdam as an optax gradient transformation.

The kernel is `recadam_core.update` itself, traced: XLA makes one loop of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from numbers import Real
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
from recadam_core.annealing import ANNEALINGS, Constant, annealed_weights
from recadam_core.arrays import PLAIN
from recadam_core.coefficients import check_stable, is_zero
from recadam_core.errors import check_number, shown, unknown
from recadam_core.importance import check_importance, check_weighable
from recadam_core.update import accumulator_dtype

__all__ = [
    "HostCoefficients",
    "RecAdamState",
    "Released",
    "from_hyperparameters",
    "host_coefficients",
    "paths",
    "place",
    "recadam",
    "scale_by_recadam",
    "unfit",
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
        bias_correction=_static("recadam", "bias_correction", bias_correction),
        form=form,
    )
    kept = _Kept(anchor, anchor_mask, anchor_dtype, anchor_memory, importance, mu_dtype)
    return _transformation("recadam", hp, learning_rate if callable(learning_rate) else hp.lr, kept)


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
        bias_correction=_static("scale_by_recadam", "bias_correction", bias_correction),
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
    if not isinstance(hp, Hyperparameters):
        raise RecAdamError(f"from_hyperparameters: hp is {shown(hp)}; give Hyperparameters")
    for given in kept:
        if given not in _Kept.__dataclass_fields__:
            raise unknown("argument of from_hyperparameters:", given, _Kept.__dataclass_fields__)
    rate = hp.lr if learning_rate is None else learning_rate
    hp = hp.replace(lr=0.0 if callable(rate) else rate)
    return _transformation("recadam", hp, rate if callable(rate) else hp.lr, _Kept(**kept))


@dataclass(frozen=True)
class Schedule:
    """An annealing of a schedule, as optax has them, or of a traced number."""

    function: Any

    def weights(self, t: Any, xp: Any = None) -> tuple[Any, Any]:
        found = self.function
        if callable(found):
            found = found((t - 1).astype(jnp.int32) if xp else int(t) - 1)
        if isinstance(found, (tuple, list)):
            return cast(tuple[Any, Any], found)
        if not (isinstance(found, (int, float)) or hasattr(found, "dtype")):
            return found, found  # which is then refused
        recall = 1 - found
        # A schedule in float32 may end a rounding above 1.
        where = (xp or jnp).where if hasattr(recall, "dtype") else lambda rounded, x, y: x if rounded else y
        return found, where((recall < 0) & (recall > -(2.0**-20)), 0.0 * recall, recall)


def _annealing(given: Any) -> Annealing:
    if given is None:
        return Sigmoid()
    if hasattr(given, "weights") or isinstance(given, type):
        return cast(Annealing, given)
    if callable(given):
        return Schedule(given)
    if not (isinstance(given, Real) or hasattr(given, "dtype")):
        return cast(Annealing, given)  # which is then refused
    task = check_number("recadam", "annealing", given, low=0.0, high=1.0)
    return Schedule(task) if isinstance(task, jax.core.Tracer) else Constant(task, 1 - task)


def _static(where: str, name: str, flag: Any) -> Any:
    """A flag, unless it is an array, as inject_hyperparams makes of arrays that it is given."""
    if isinstance(flag, jax.Array):
        raise RecAdamError(
            f"{where}: {name} is {shown(flag)}; give True or False, and name {name} in static_args of "
            "inject_hyperparams"
        )
    return flag


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
                wide = dtype is None or _is_wide(jnp.dtype(dtype))
            except (TypeError, ValueError):
                wide = False
            if not wide:
                raise RecAdamError(
                    f"recadam: {name} is {shown(dtype)}; give a floating dtype of 16 to 64 bits"
                )
        memory = self.anchor_memory
        if not (memory is None or (isinstance(memory, str) and memory in ("device", "pinned_host"))):
            raise RecAdamError(f"recadam: anchor_memory is {shown(memory)}; give 'pinned_host' or 'device'")

    def anchors(self, params: Any, names: list[str], leaves: list[Any]) -> list[Any]:
        """An anchor or None for each parameter, checked and copied."""
        if not leaves:  # optax asks so which parts of a state are trees of parameters
            return []
        stars = leaves if self.anchor is None else _leaves(params, self.anchor, "anchor", spread=False)
        return [
            self._anchor(path, p, star) if kept and star is not None else None
            for path, p, star, kept in zip(names, leaves, stars, self._mask(params, names), strict=True)
        ]

    def importances(
        self, params: Any, names: list[str], leaves: list[Any], stars: list[Any]
    ) -> list[Any] | None:
        """The importance of each anchor, checked and copied; None when there are none."""
        if self.importance is None:
            return None
        if not leaves:  # as in anchors
            return []
        given = _leaves(params, self.importance, "importance", spread=False)
        placed: list[Any] = []
        for path, p, star, x in zip(names, leaves, stars, given, strict=True):
            if star is None:
                placed.append(None)
                continue
            if x is not None:
                _check_array("importance", path, x)
            x = _portable(path, x, p)
            if isinstance(x, np.ndarray):  # of which bfloat16 is no dtype of its own
                x = jnp.asarray(x)
            with jax.ensure_compile_time_eval():  # within a trace, too
                check_importance(path, x, p.shape)
            placed.append(self._placed(x, p, jnp.result_type(x)))
        return placed

    def _mask(self, params: Any, names: list[str]) -> list[Any]:
        """Whether each parameter is anchored."""
        mask = self.anchor_mask
        if mask is None:
            return [True] * len(names)
        if callable(mask) and all(map(callable, jax.tree.leaves(mask))):  # and no module of bools
            mask = mask(params)
            if mask is None:
                raise RecAdamError("anchor_mask: the function gives None; have it give a tree of bools")
        keep = _leaves(params, mask, "anchor_mask", spread=True)
        for path, kept in zip(names, keep, strict=True):
            if not isinstance(kept, (bool, np.bool_)):
                raise RecAdamError(
                    f"anchor_mask {path!r} is {_kind(kept)}; give True or False, and name anchor_mask in "
                    "static_args of inject_hyperparams"
                )
        return keep

    def _anchor(self, path: str, p: Any, star: Any) -> Any:
        if isinstance(star, jax.ShapeDtypeStruct):
            raise RecAdamError(
                f"anchor {path!r} is a ShapeDtypeStruct, which has no values; give arrays, or trace: "
                "jax.eval_shape(tx.init, params)"
            )
        _check_array("anchor", path, star)
        if jnp.shape(star) != p.shape:
            raise RecAdamError(
                f"anchor {path!r} has shape {jnp.shape(star)}, its parameter {p.shape}; "
                "give the pretrained array of that parameter, or None for a new head"
            )
        star = _portable(path, star, p)
        dtype = jnp.result_type(star) if self.anchor_dtype is None else jnp.dtype(self.anchor_dtype)
        if not isinstance(star, jax.core.Tracer):
            if not _is_finite(star):
                raise RecAdamError(f"anchor {path!r} holds NaN or infinity; give the pretrained values")
            if dtype != getattr(star, "dtype", dtype) and not _is_finite(star, dtype):
                raise RecAdamError(
                    f"anchor {path!r} has values beyond {dtype}; give another anchor_dtype, or set "
                    "JAX_ENABLE_X64=1"
                )
        return self._placed(star, p, dtype)

    def _placed(self, star: Any, p: Any, dtype: Any) -> Any:
        """A copy of an anchor or an importance where its parameter is, part by part."""
        traced = isinstance(p, jax.core.Tracer)
        where = None if traced else place(p)
        here = p.devices() if where is None and isinstance(p, jax.Array) and not traced else ()
        star = _fetched(star) if where is None else jax.device_put(star, _on_device(where))
        with jax.default_device(next(iter(here))) if here else nullcontext():
            star = jnp.array(star, dtype=dtype, copy=True)
        if traced:
            star = _alike(star, p)
        away = _is_away(p) if self.anchor_memory is None else self.anchor_memory == "pinned_host"
        if not away:
            return star
        if isinstance(star, jax.core.Tracer):
            return jax.device_put(star, jax.memory.Space.Host)
        return jax.device_put(star, star.sharding.with_memory_kind("pinned_host"))


def _portable(path: str, x: Any, p: Any) -> Any:
    """The array; NumPy's, where it is committed to devices that JAX would not let it leave."""
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer) or isinstance(p, jax.ShapeDtypeStruct):
        return x
    if isinstance(p, jax.core.Tracer) or p.committed:
        mesh = jax.sharding.get_abstract_mesh()
        bound = AxisType.Explicit in mesh.axis_types and jax.typeof(x).sharding.mesh != mesh
        stays = x.committed and (bound or (isinstance(p, jax.core.Tracer) and _is_away(x)))
    else:
        stays = x.committed or x.devices() != p.devices()
    if stays and not x.is_fully_addressable:
        raise RecAdamError(f"anchor {path!r} is spread over processes, its parameter is not; place it alike")
    return np.asarray(x) if stays else x


def place(p: Any) -> Any:
    """The sharding to which a parameter is committed, or is to be; None where that is not decided."""
    return getattr(p, "sharding", None) if getattr(p, "committed", True) else None


def _on_device(where: Any) -> Any:
    """A sharding in the devices' own memory."""
    return where.with_memory_kind(next(iter(where.device_set)).default_memory().kind)


def _is_away(x: Any) -> bool:
    """Whether an array is kept in the host's memory."""
    return isinstance(x, jax.Array) and jax.typeof(x).memory_space == jax.memory.Space.Host


def _fetched(x: Any) -> Any:
    """An array in the device's memory, wherever it is kept."""
    if not _is_away(x):
        return x
    traced = isinstance(x, jax.core.Tracer)
    return jax.device_put(x, jax.memory.Space.Device if traced else _on_device(x.sharding))


def _typed(x: Any, p: Any) -> Any:
    """The array as the parameter is typed, on a mesh of explicit axes."""
    where, sharding = jax.typeof(p).sharding, cast(Any, jax.sharding)
    typed = AxisType.Explicit not in where.mesh.axis_types or jax.typeof(x).sharding == where
    return x if typed else sharding.reshard(x, where)


def _alike(x: Any, p: Any) -> Any:
    """While tracing: the array, to be sharded as the parameter is.

    On a mesh of explicit axes the types say how. Elsewhere the partitioner lays operands of one elementwise
    operation out alike, so x is chosen over p by a condition that the compiler may not fold before then.
    """
    lax: Any = jax.lax
    keep = lax.optimization_barrier(jnp.asarray(True))
    return lax.select_n(keep, _fetched(p).astype(x.dtype), _typed(x, p))


def _zeros_like(p: Any) -> Moments:
    """Moments before the first step, sharded as the parameter is, while tracing, too."""
    if isinstance(p, jax.core.Tracer):
        return Moments(*(_alike(x, p) for x in Moments.zeros_like(p)))
    where, dtype = place(p), accumulator_dtype(jnp, p.dtype)
    zeros = partial(jnp.zeros, p.shape, dtype, device=None if where is None else _on_device(where))
    return Moments(zeros(), zeros())


def _is_wide(dtype: Any) -> bool:
    """Whether JAX has this floating dtype and may promote others to it."""
    if not jnp.issubdtype(dtype, jnp.floating) or not jnp.dtype(dtype).isnative:
        return False
    bits: int = cast(Any, jnp.finfo)(dtype).bits
    return 16 <= bits <= 64


def unfit(x: Any) -> str:
    """What is wrong with a leaf; nothing if it is a number, or a floating array of JAX or NumPy."""
    if x is None:
        return "is None"
    known = isinstance(x, (jax.Array, np.ndarray, np.generic, float)) or hasattr(x, "__jax_array__")
    if not known or (isinstance(x, np.ndarray) and type(x) not in PLAIN):  # whose mask would be lost
        return f"is a {type(x).__name__}"
    dtype = getattr(x, "dtype", jnp.float32)
    return "" if _is_wide(dtype) else f"has dtype {dtype}"


def _check_array(what: str, path: str, x: Any) -> None:
    wrong = unfit(x)
    if wrong:
        remedy = {
            "parameter": " alone, as eqx.filter(model, eqx.is_inexact_array) does",
            "gradient": ", or freeze the parameter by optax.masked",
        }.get(what, "")
        raise RecAdamError(f"{what} {path!r} {wrong}; give floating arrays of 16 to 64 bits{remedy}")


def _array(what: str, path: str, x: Any, p: Any = None) -> Any:
    """A leaf as an array of JAX, checked; NumPy's goes to where its parameter is."""
    _check_array(what, path, x)
    if isinstance(x, jax.Array):
        return x
    where = None if isinstance(p, jax.core.Tracer) else place(p)
    return jnp.asarray(x) if where is None else jax.device_put(x, _on_device(where))


def _beside(what: str, path: str, x: Any, p: Any) -> Any:
    """What a step reads beside a parameter, checked."""
    if x is None and what in ("anchor", "importance"):
        return None
    if isinstance(x, Released):
        return p  # the recall weight is zero: the same operations on what is there, so the same bits
    x = _fetched(_array(what, path, x, p))
    if x.shape != p.shape:
        raise RecAdamError(f"{what} {path!r} has shape {x.shape}, its parameter {p.shape}; give equal shapes")
    return x if what == "gradient" else _typed(x, p)


def _is_finite(star: Any, dtype: Any = None) -> bool:
    """Whether all of its values are finite, as another dtype has them if one is given."""
    with jax.ensure_compile_time_eval(), np.errstate(over="ignore"):  # within a trace, too
        if not isinstance(star, np.ndarray):
            star = jnp.asarray(star, dtype)
            return bool(jnp.isfinite(star).all())
        return bool(np.isfinite(star if dtype is None else star.astype(dtype)).all())


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
        given, tree = _flatten(params)
        names = paths(params)
        leaves = [
            p if isinstance(p, jax.ShapeDtypeStruct) and _is_wide(p.dtype) else _array("parameter", path, p)
            for path, p in zip(names, given, strict=True)
        ]
        stars = kept.anchors(params, names, leaves)
        weights = kept.importances(params, names, leaves, stars)
        if learning_rate is not None and any(star is not None for star in stars):
            _check_strength(name, hp, learning_rate)
        moments = [_zeros_like(p) for p in leaves]
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
        given, tree = _flatten(params)
        names = paths(params)
        thetas = [_fetched(_array("parameter", path, p)) for path, p in zip(names, given, strict=True)]
        parts = {
            "gradient": _leaves(params, updates, "gradients"),
            "first moment": _leaves(params, state.mu, "the state's mu"),
            "second moment": _leaves(params, state.nu, "the state's nu"),
            "anchor": _leaves(params, state.anchor, "the state's anchor"),
            "importance": [None] * len(thetas)
            if state.importance is None
            else _leaves(params, state.importance, "the state's importance"),
        }
        released = any(isinstance(star, Released) for star in parts["anchor"])
        if state.importance is not None:
            check_weighable(hp.form)
        if released and _never_ends(hp.annealing):
            raise RecAdamError(
                f"{name}: the anchors are released, and {hp.annealing!r} reads them in every step"
            )
        for what, leaves in parts.items():
            parts[what] = [
                _beside(what, path, x, theta) for path, x, theta in zip(names, leaves, thetas, strict=True)
            ]
        count = _count(name, state.count)
        by_anchored = _coefficients(name, hp, learning_rate, count, coefficients)
        recall = by_anchored[True].recall
        if released and not isinstance(recall, jax.core.Tracer) and recall > 0:
            raise RecAdamError(
                f"{name}, step {int(count) + 1}: the anchors are released, and {hp.annealing!r} still "
                "reads them"
            )
        new = []
        for theta, grad, m, v, star, weight in zip(thetas, *parts.values(), strict=True):
            c = by_anchored[star is not None]
            new.append(update(theta, grad, Moments(m, v), star, c, weight))
        deltas = [delta if learning_rate is not None else -delta for delta, _ in new]
        return tree.unflatten([d.astype(p.dtype) for d, p in zip(deltas, thetas, strict=True)]), RecAdamState(
            count=optax.safe_increment(count),
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


def _count(name: str, count: Any) -> jax.Array:
    """The steps taken, whatever kind of integer a restored state has them in."""
    try:
        fits = jnp.issubdtype(jnp.result_type(count), jnp.integer) and jnp.shape(count) == ()
        found = jnp.asarray(count, jnp.int32) if fits else None
    except (TypeError, ValueError, OverflowError):
        found = None
    # Its own value: while something else is traced, a comparison would be traced, too.
    if found is None or (not isinstance(count, jax.core.Tracer) and int(count) < 0):
        raise RecAdamError(f"{name}: the state's count is {shown(count)}; give what init returned")
    return found


def _rate(name: str, learning_rate: Any, count: Any) -> Any:
    """The learning rate of a step."""
    if not callable(learning_rate):
        return learning_rate
    rate = learning_rate(count)
    return (
        rate if hasattr(rate, "dtype") else check_number(name, "the schedule's learning rate", rate, low=0.0)
    )


def _coefficients(
    name: str, hp: Hyperparameters, learning_rate: Any, count: jax.Array, given: HostCoefficients | None
) -> dict[bool, Coefficients]:
    """A step's coefficients by whether a parameter is anchored: the host's, or traced."""
    if given is None:
        t = optax.safe_increment(count).astype(jax.dtypes.canonicalize_dtype(jnp.float64))
        lr = _rate(name, learning_rate, count)
        by_anchored = {a: coefficients(t, hp, lr, a, xp=jnp) for a in (True, False)}
        for c in by_anchored.values():
            _check_coefficients(name, t, c, hp.form)
        return by_anchored
    if not isinstance(given, HostCoefficients) or any(
        not isinstance(row, (tuple, list)) or len(row) != 4 for row in given
    ):
        raise RecAdamError(
            f"recadam: coefficients are {shown(given)}; give those of host_coefficients(t, hp)"
        )
    by_anchored = {}
    for anchored, (step, eps, recall, decay) in ((True, given.anchored), (False, given.new)):
        recall = 0.0 if not anchored or is_zero(hp.gamma) else recall
        by_anchored[anchored] = Coefficients(
            *hp.betas, step, eps, recall, 0.0 if is_zero(hp.weight_decay) else decay
        )
    return by_anchored


def _check_coefficients(name: str, t: jax.Array, c: Coefficients, form: str) -> None:
    """Refuse what a schedule or an annealing gave, as far as it is known: not traced, or no scalar at all."""
    for x in c[2:]:
        if jnp.shape(x) != () or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise RecAdamError(
                f"{name}: the learning rate or the annealing gives {jnp.result_type(x)} of shape "
                f"{jnp.shape(x)}; have it give a real number"
            )
    known = [float(x) for x in c[2:] if not isinstance(x, jax.core.Tracer)]
    # In the form "released" a pull that overshoots turns the step around.
    if not all(map(math.isfinite, known)) or (form != "released" and min(known, default=0.0) < 0.0):
        where = name if isinstance(t, jax.core.Tracer) else f"{name}, step {int(t)}"
        raise RecAdamError(
            f"{where}: the learning rate or the annealing is negative or not finite; give finite numbers >= 0"
        )


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


def _leaves(params: Any, other: Any, what: str, spread: bool | None = None) -> list[Any]:
    """The other tree's parts at the parameters."""
    try:
        if spread is None:
            return list(_flatten(params)[1].flatten_up_to(other))
        return _parts(params, other, what, spread)
    except RecAdamError:
        raise
    except ValueError as error:
        ours, theirs = paths(params), paths(other, lambda x: x is None)
        lacking = [x for x in ours if not any(f"{x}/".startswith(f"{y}/") for y in theirs)]
        unknown = [y for y in theirs if y not in ours and not any(x.startswith(f"{y}/") for x in ours)]
        reason = " ".join(str(error).split())
        if unknown:
            reason = f"it has {unknown[0]!r}, which they have not" if unknown[0] else "it is a single leaf"
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


def _check_strength(name: str, hp: Hyperparameters, learning_rate: Any) -> None:
    """Refuse a pull that diverges, as far as the host can tell: compiled steps cannot raise.

    A schedule is asked at up to 200 steps, evenly over the annealing and thinner after it.
    """
    found = []
    try:
        last = min(release_step(hp.annealing) or 10_000, 2**31 - 2)
        steps = sorted({*map(int, np.linspace(1, last, 100)), *map(int, np.geomspace(1, last, 100))})
        with jax.ensure_compile_time_eval():
            for t in steps:
                where = f"{name}, step {t}"
                rate = _rate(where, learning_rate, jnp.asarray(t - 1))
                rate = float(check_number(where, "the learning rate", rate, low=0.0))
                recall = float(annealed_weights(hp.annealing, t)[1])
                found.append((rate * float(hp.gamma) * recall, rate * float(hp.weight_decay), where))
    except jax.errors.JAXTypeError:
        return  # traced settings
    for size in (lambda x: x[0], lambda x: x[1], lambda x: x[0] + x[1]):
        pull, decay, where = max(found, key=size)
        check_stable(pull, decay, hp.form, where)
