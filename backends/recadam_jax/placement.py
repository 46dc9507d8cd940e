"""Where arrays are: on which devices, laid out how, in which memory; eagerly and while tracing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from recadam_core import Moments, RecAdamError
from recadam_core.update import accumulator_dtype

from .trees import check_leaf

__all__ = ["as_array", "fetched", "is_traced", "place", "placed", "portable", "typed", "zeros_like"]


def is_traced(x: Any) -> bool:
    """Whether there is no value to look at."""
    return isinstance(x, jax.core.Tracer)


def place(p: Any) -> Any:
    """The sharding to which a parameter is committed, or is to be; None where that is not decided."""
    return getattr(p, "sharding", None) if getattr(p, "committed", True) else None


def _on_device(where: Any) -> Any:
    """A sharding in the devices' own memory."""
    return where.with_memory_kind(next(iter(where.device_set)).default_memory().kind)


def _is_away(x: Any) -> bool:
    """Whether an array is kept in the host's memory."""
    return isinstance(x, jax.Array) and jax.typeof(x).memory_space == jax.memory.Space.Host


def fetched(x: Any) -> Any:
    """An array in the device's memory, wherever it is kept."""
    if not _is_away(x):
        return x
    return jax.device_put(x, jax.memory.Space.Device if is_traced(x) else _on_device(x.sharding))


def as_array(what: str, path: str, x: Any, p: Any = None) -> Any:
    """A leaf as an array of JAX, checked; NumPy's goes to where its parameter is."""
    check_leaf(what, path, x)
    if isinstance(x, jax.Array):
        return x
    where = None if is_traced(p) else place(p)
    return jnp.asarray(x) if where is None else jax.device_put(x, _on_device(where))


def portable(path: str, x: Any, p: Any) -> Any:
    """The array; NumPy's, where it is committed to devices that JAX would not let it leave."""
    if not isinstance(x, jax.Array) or is_traced(x) or isinstance(p, jax.ShapeDtypeStruct):
        return x
    if is_traced(p) or p.committed:
        mesh = jax.sharding.get_abstract_mesh()
        bound = AxisType.Explicit in mesh.axis_types and jax.typeof(x).sharding.mesh != mesh
        bound = bound or (not mesh.empty and len(x.sharding.device_set) != mesh.size)
        stays = x.committed and (bound or (is_traced(p) and _is_away(x)))
    else:
        stays = x.committed or x.devices() != p.devices()
    if stays and not x.is_fully_addressable:
        raise RecAdamError(f"anchor {path!r} is spread over processes, its parameter is not; place it alike")
    return np.asarray(x) if stays else x


def placed(x: Any, p: Any, dtype: Any, memory: str | None) -> Any:
    """A copy of an anchor or an importance where its parameter is, part by part."""
    where = None if is_traced(p) else place(p)
    here = p.devices() if where is None and isinstance(p, jax.Array) and not is_traced(p) else ()
    x = fetched(x) if where is None else jax.device_put(x, _on_device(where))
    with jax.default_device(next(iter(here))) if here else nullcontext():
        x = jnp.array(x, dtype=dtype, copy=True)
    if is_traced(p):
        x = _alike(x, p)
    if not (_is_away(p) if memory is None else memory == "pinned_host"):
        return x
    host = jax.memory.Space.Host if is_traced(x) else x.sharding.with_memory_kind("pinned_host")
    return jax.device_put(x, host)


def zeros_like(p: Any) -> Moments:
    """Moments before the first step, sharded as the parameter is, while tracing, too."""
    if is_traced(p):
        return Moments(*(_alike(x, p) for x in Moments.zeros_like(p)))
    where, dtype = place(p), accumulator_dtype(jnp, p.dtype)
    device = None if where is None else _on_device(where)
    return Moments(*(jnp.zeros(p.shape, dtype, device=device) for _ in range(2)))


def typed(x: Any, p: Any) -> Any:
    """The array as the parameter is typed, on a mesh of explicit axes."""
    where, sharding = jax.typeof(p).sharding, cast(Any, jax.sharding)
    fits = AxisType.Explicit not in where.mesh.axis_types or jax.typeof(x).sharding == where
    return x if fits else sharding.reshard(x, where)


def _alike(x: Any, p: Any) -> Any:
    """While tracing: the array, to be sharded as the parameter is.

    On a mesh of explicit axes the types say how. Elsewhere the partitioner lays operands of one elementwise
    operation out alike, so x is chosen over p by a condition that the compiler may not fold before then.
    """
    lax: Any = jax.lax
    keep = lax.optimization_barrier(jnp.asarray(True))
    return lax.select_n(keep, fetched(p).astype(x.dtype), typed(x, p))
