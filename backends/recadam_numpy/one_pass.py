"""The kernel in one pass over memory, compiled by numba, over many arrays at once and on all cores."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from operator import truediv
from typing import Any
from zlib import crc32

import numpy as np

from recadam_core import Coefficients, RecAdamError
from recadam_core.arrays import check_arrays
from recadam_core.update import formula

try:
    import llvmlite.binding
    import numba
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic
except ModuleNotFoundError as error:
    raise RecAdamError("the one-pass kernel needs 'numba'; pip install 'recadam-core[cpu]'") from error

__all__ = ["CODES", "COLUMNS", "Table", "check_apart", "has_half", "one_pass", "table_of", "threads"]

Array = np.ndarray[Any, Any]

# numba has no arithmetic in 16 bits: such arrays come as integers of 16 bits, and are widened by their bits.
CODES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.int16),
}
"""The dtype that stands for one by name in a `Table`."""

LEAST = 1 << 15
"""Elements below which another thread costs more than it brings."""

Team = Callable[[int, int, int], None]
"""Calls the C function at an address with a pointer, in so many threads at once, and waits for them."""

COLUMNS = ("theta", "grad", "m", "v", "anchor", "importance")
WRITTEN = ("theta", "m", "v")


class Table:
    """Where the arrays of a step lie in memory, and how they are shared out among threads.

    Args:
        sizes: elements of each parameter, of shape (n,).
        dtypes: names in `CODES`, of theta, grad, m, v, anchor and importance. The step is computed in that of
            m and v, "float32" or "float64"; theta's is the same, or has 16 bits. None of grad, m and v for
            the pull alone, which is computed in theta's dtype, in float32 for one of 16 bits.
        workers: threads to use at most.

    Example:
        >>> theta, grad, m, v = np.ones(2), np.ones(2), np.zeros(2), np.zeros(2)
        >>> table = Table([2], ["float64"] * 6)
        >>> table.addresses[:4, 0] = [x.ctypes.data for x in (theta, grad, m, v)]
        >>> table.run(Coefficients(0.9, 0.999, 0.5, 0.0, 0.0, 0.0), pulls=False)
        >>> theta.round(3)
        array([-0.581, -0.581])
    """

    def __init__(self, sizes: Sequence[int], dtypes: Sequence[str | None], workers: int = 1) -> None:
        theta, grad, m, v, *_ = dtypes
        wide = m if grad else "float64" if theta == "float64" else "float32"
        if wide not in ("float32", "float64") or (grad and m != v):
            raise RecAdamError(f"Table: moments are {m} and {v}; give both in 32 or 64 bits")
        ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
        self.addresses = np.zeros((len(COLUMNS), len(ends)), dtype=np.int64)
        """Of the first element of each array, by column and parameter: to be filled in before `run`."""
        self._sizes, self._dtypes = sizes, dtypes
        total = int(ends[-1]) if len(ends) else 0
        workers = max(1, min(workers, total // LEAST))
        # Long runs suit the memory best: a tensor is cut only where one thread ends and the next begins.
        cuts = np.arange(1, workers) * total // workers // 1024 * 1024
        stops = np.sort(np.concatenate((ends, cuts))) if workers > 1 else ends
        starts = np.concatenate([[0], stops[:-1]])
        starts, stops = starts[stops > starts], stops[stops > starts]
        owner = np.searchsorted(ends, starts, side="right")
        first = np.concatenate([[0], ends[:-1]])[owner]
        self._pieces = np.array([owner, starts - first, stops - starts], dtype=np.int64)
        self._shares = np.searchsorted(starts, np.concatenate([[0], cuts, [total]])).astype(np.int64)
        self._scalars = np.zeros(8, dtype=wide)
        self._entry = _compiled(wide, *dtypes)
        tables = (self.addresses, self._pieces, self._shares, self._scalars)
        places = [x.__array_interface__["data"][0] for x in tables]
        words = [0, len(ends), len(starts), 0, 0, *places, len(self._shares) - 1]
        self._words = np.array(words, dtype=np.int64)

    def bytes(self) -> Array:
        """The size of each array, as `addresses` has them."""
        itemsizes = [CODES[name].itemsize if name else 0 for name in self._dtypes]
        return np.multiply.outer(itemsizes, np.asarray(self._sizes, dtype=np.int64))

    def run(self, c: Coefficients, pulls: bool, team: Team | None = None, weighs: bool = False) -> None:
        """One step, in place on theta, m and v.

        Args:
            c: coefficients, Python floats.
            pulls: whether anchors are read.
            weighs: whether importances are read.
            team: calls a C function with a pointer in so many threads, and waits; None for threads of ours.
        """
        with np.errstate(over="ignore"):  # a float32 of it is infinite, as in every other kernel
            self._scalars[:] = c.beta1, 1 - c.beta1, c.beta2, 1 - c.beta2, c.step, c.eps, c.pull, c.decay
        # Which terms there are: each combination is compiled apart, without a branch in its loop.
        self._words[0], self._words[3], self._words[4] = 0, pulls + (pulls and weighs), c.decay != 0
        workers, words = len(self._shares) - 1, self._words.ctypes.data
        if workers == 1:
            self._entry.ctypes(words)
        elif team is not None:
            team(self._entry.address, words, workers)
        else:
            waiting = [_pool().submit(self._entry.ctypes, words) for _ in range(workers - 1)]
            self._entry.ctypes(words)
            for other in waiting:
                other.result()


@cache
def has_half() -> bool:
    """Whether this processor converts float16 by itself; LLVM's substitute for it is not always there."""
    host = llvmlite.binding.get_host_cpu_features()
    return bool(host.get("f16c") or "aarch64" in llvmlite.binding.get_process_triple())


def threads() -> int:
    """The cores that this process may use; fewer where OMP_NUM_THREADS says so."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(int(asked), cores) if asked.isdigit() and int(asked) else cores


_pools: list[ThreadPoolExecutor] = []
if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads
    os.register_at_fork(after_in_child=_pools.clear)


def _pool() -> ThreadPoolExecutor:
    if not _pools:
        _pools.append(ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="recadam"))
    return _pools[0]


def one_pass(
    thetas: Sequence[Array],
    grads: Sequence[Array] | None,
    ms: Sequence[Array] | None,
    vs: Sequence[Array] | None,
    anchors: Sequence[Array] | None,
    c: Coefficients,
    importances: Sequence[Array] | None = None,
) -> None:
    """One step, in place on `thetas`, `ms` and `vs`: the numbers of `kernel`, without temporary arrays.

    Args:
        thetas: parameters of one dtype, float32 or float64, in C order as both moments; overwritten.
        grads: gradients, of the parameters' shapes and dtype, as all the lists; None for the pull alone, as
            moments are then.
        ms: first moments; overwritten.
        vs: second moments; overwritten.
        anchors: pretrained values; None where `c.pull` is 0.
        c: coefficients, Python floats.
        importances: by which the pulls are multiplied; None for 1.

    Raises:
        RecAdamError: when lengths, shapes or dtypes differ, or what is to be overwritten cannot be, or shares
            memory with another array; nothing is changed then.

    Example:
        >>> theta, m, v = np.ones(2), np.zeros(2), np.zeros(2)
        >>> c = Coefficients(0.9, 0.999, 0.0, 1e-8, 0.25, 0.0)
        >>> one_pass([theta], [np.ones(2)], [m], [v], [np.zeros(2)], c)
        >>> theta
        array([0.75, 0.75])

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12.
    """
    if not len(thetas):
        return
    table, arrays = table_of(thetas, grads, ms, vs, anchors, importances)
    check_apart([table], range(len(thetas)), "one_pass")
    table.run(c, anchors is not None, weighs=importances is not None)
    del arrays  # not earlier


def table_of(
    thetas: Sequence[Array],
    grads: Sequence[Array] | None,
    ms: Sequence[Array] | None,
    vs: Sequence[Array] | None,
    anchors: Sequence[Array] | None,
    importances: Sequence[Array] | None = None,
) -> tuple[Table, list[Any]]:
    """The table of a step, checked; arguments and what is raised as in `one_pass`."""
    given: list[Sequence[Array] | None] = [thetas, grads, ms, vs, anchors, importances]
    lengths = {len(xs) for xs in given if xs is not None}
    if len(lengths) > 1:
        raise RecAdamError(f"one_pass: lists of {sorted(lengths)} arrays; give as many of each")
    # What follows goes by addresses alone.
    dtype: Any = getattr(thetas[0], "dtype", None)
    for i, theta in enumerate(thetas):
        for what, xs in zip(COLUMNS, given, strict=True):
            if xs is None:
                continue
            x = xs[i]
            if type(x) is not np.ndarray:
                check_arrays([(f"one_pass: {what} {i}", x)], np)
            if x.shape != theta.shape or x.dtype != dtype:
                raise RecAdamError(
                    f"one_pass: {what} {i} is {x.dtype} of shape {x.shape}, theta {dtype} of "
                    f"{theta.shape}; give equal ones"
                )
            if what in WRITTEN:
                flags = x.flags
                if not (flags.writeable and flags.c_contiguous and dtype.isnative):
                    raise RecAdamError(
                        f"one_pass: {what} {i} is read-only, not in C order or of other byte order; give a "
                        "copy"
                    )
    # In another layout these may be copied: they are only read.
    columns = [
        xs if xs is None or what in WRITTEN else [np.ascontiguousarray(x) for x in xs]
        for what, xs in zip(COLUMNS, given, strict=True)
    ]
    table = Table([x.size for x in thetas], [None if xs is None else dtype.name for xs in columns], threads())
    for row, xs in zip(table.addresses, columns, strict=True):
        row[:] = 0 if xs is None else [x.__array_interface__["data"][0] for x in xs]
    return table, columns


def check_apart(tables: Sequence[Table], names: Sequence[Any], where: str) -> None:
    """Raise where an array that is to be overwritten shares memory with another."""
    starts = np.concatenate([table.addresses for table in tables], axis=1)
    stops = starts + np.concatenate([table.bytes() for table in tables], axis=1)
    order = starts.argsort(axis=None)
    if (stops.take(order[:-1]) <= starts.take(order[1:])).all():
        return  # as nearly always, told quickly; else two that are only read may be the same

    def spans(rows: list[int]) -> tuple[Array, Array, Array]:
        index = np.add.outer(np.multiply(rows, len(names)), np.arange(len(names))).ravel()
        start, stop = starts[rows].ravel(), stops[rows].ravel()
        some = start < stop
        return index[some], start[some], stop[some]

    def refuse(*indices: int) -> None:
        one, other = (f"{COLUMNS[i // len(names)]} of {names[i % len(names)]!r}" for i in indices)
        raise RecAdamError(f"{where}: {one} and {other} share memory; give a copy of one")

    index, start, stop = spans([0, 2, 3])
    order = np.argsort(start, kind="stable")
    index, start, stop = index[order], start[order], stop[order]
    for k in np.flatnonzero(stop[:-1] > start[1:])[:1]:
        refuse(index[k], index[k + 1])
    read, begin, end = spans([1, 4, 5])
    at = np.searchsorted(start, end) - 1
    for k in np.flatnonzero((at >= 0) & (stop[at] > begin))[:1]:
        refuse(index[at[k]], read[k])


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), build


@intrinsic
def _widened(typing: Any, x: Any) -> Any:
    """An element as a number to compute with."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (x,) = arguments
        if signature.args[0] == types.uint16:  # bfloat16: the upper half of a float32
            bits = builder.shl(builder.zext(x, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(bits, ir.FloatType())
        if signature.args[0] == types.int16:
            return builder.fpext(builder.bitcast(x, ir.HalfType()), ir.FloatType())
        return x

    return (types.float32 if isinstance(x, types.Integer) else x)(x), build


@intrinsic
def _rounded(typing: Any, x: Any, like: Any) -> Any:
    """A number as an element, rounded to the nearest, ties to even."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x = arguments[0]
        if signature.args[1] == types.uint16:
            word, half = ir.IntType(32), ir.IntType(16)
            bits, sixteen = builder.bitcast(x, word), ir.Constant(word, 16)
            upper = builder.lshr(bits, sixteen)
            odd = builder.and_(upper, ir.Constant(word, 1))
            up = builder.add(builder.add(bits, odd), ir.Constant(word, 0x7FFF))
            quiet = builder.or_(upper, ir.Constant(word, 64))  # NaN stays NaN
            is_nan = builder.fcmp_unordered("uno", x, x)
            return builder.trunc(builder.select(is_nan, quiet, builder.lshr(up, sixteen)), half)
        if signature.args[1] == types.int16:
            return builder.bitcast(builder.fptrunc(x, ir.HalfType()), ir.IntType(16))
        return x

    return like(types.float32 if isinstance(like, types.Integer) else like, like), build


# Neither fastmath nor contraction: each operation is rounded as NumPy rounds it.
_formula = numba.njit(error_model="numpy", nogil=True)(formula)


@numba.njit(error_model="numpy", nogil=True)
def _loop(theta: Any, grad: Any, m: Any, v: Any, anchor: Any, importance: Any, x: Any, decay: Any) -> None:
    """The formula, element by element; what is None is no term of it."""
    for i in range(theta.size):
        old = _widened(theta[i])
        star = None if anchor is None else _widened(anchor[i])
        weight = None if importance is None else _widened(importance[i])
        delta, m[i], v[i] = _formula(
            old, _widened(grad[i]), m[i], v[i], star, weight,
            x[0], x[1], x[2], x[3], x[4], x[5], x[6], decay, math.sqrt, truediv,
        )  # fmt: skip
        theta[i] = _rounded(old + delta, theta[i])


@numba.njit(error_model="numpy", nogil=True)
def _pull_loop(theta: Any, anchor: Any, importance: Any, share: Any) -> None:
    """The formula without a gradient, element by element."""
    unread = (None, None, None, None, None, None)
    for i in range(theta.size):
        old = _widened(theta[i])
        weight = None if importance is None else _widened(importance[i])
        delta, _, _ = _formula(
            old, None, None, None, _widened(anchor[i]), weight, *unread, share, None, None, None
        )
        theta[i] = _rounded(old + delta, theta[i])


@intrinsic
def _ticket(typing: Any, counter: Any) -> Any:
    """Count one up, among threads, and give what was there."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", at, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.voidptr), build


@cache
def _compiled(wide: str, *dtypes: str | None) -> Any:
    """A C function of a pointer to a table's words: steps shares that nobody has taken, while there are."""
    # What is not given is not read: its code is none, or that of a term which there is not.
    like_x, like_theta, *likes = (CODES[name or "float32"] for name in (wide, *dtypes))
    like_grad, like_m, like_v, like_anchor, like_importance = likes
    sizes = (like_theta.itemsize, *(like.itemsize for like in likes))
    steps = dtypes[1] is not None
    # What is kept on disk is looked up by this file and by what `entry` refers to: by the formula's text, so.
    text = crc32(formula.__code__.co_code + repr(formula.__code__.co_consts).encode())

    def entry(at: Any) -> None:
        words = numba.carray(at, (10,), np.int64)
        params, count, terms, decays = words[1], words[2], words[3], words[4] != 0
        addresses = numba.carray(_pointer(words[5]), (6, params), np.int64)
        pieces = numba.carray(_pointer(words[6]), (3, count), np.int64)
        shares = numba.carray(_pointer(words[7]), (words[9] + 1,), np.int64)
        x = numba.carray(_pointer(words[8]), (8,), like_x)
        scalars = (x[0], x[1], x[2], x[3], x[4], x[5], x[6])
        share = _ticket(at) + 0 * text
        while share < words[9]:  # there may be fewer threads than were asked for
            for k in range(shares[share], shares[share + 1]):
                p, start, size = pieces[0, k], pieces[1, k], pieces[2, k]
                theta = numba.carray(_pointer(addresses[0, p] + start * sizes[0]), (size,), like_theta)
                grad = numba.carray(_pointer(addresses[1, p] + start * sizes[1]), (size,), like_grad)
                m = numba.carray(_pointer(addresses[2, p] + start * sizes[2]), (size,), like_m)
                v = numba.carray(_pointer(addresses[3, p] + start * sizes[3]), (size,), like_v)
                star = numba.carray(_pointer(addresses[4, p] + start * sizes[4]), (size,), like_anchor)
                weight = numba.carray(_pointer(addresses[5, p] + start * sizes[5]), (size,), like_importance)
                if not steps:
                    if terms == 2:
                        _pull_loop(theta, star, weight, x[6])
                    else:
                        _pull_loop(theta, star, None, x[6])
                elif terms == 2:
                    if decays:
                        _loop(theta, grad, m, v, star, weight, scalars, x[7])
                    else:
                        _loop(theta, grad, m, v, star, weight, scalars, None)
                elif terms == 1:
                    if decays:
                        _loop(theta, grad, m, v, star, None, scalars, x[7])
                    else:
                        _loop(theta, grad, m, v, star, None, scalars, None)
                elif decays:
                    _loop(theta, grad, m, v, None, None, scalars, x[7])
                else:
                    _loop(theta, grad, m, v, None, None, scalars, None)
            share = _ticket(at)

    signature = types.void(types.voidptr)
    try:
        return numba.cfunc(signature, error_model="numpy", cache=True)(entry)
    except RuntimeError:  # nowhere to keep what was compiled
        return numba.cfunc(signature, error_model="numpy")(entry)
