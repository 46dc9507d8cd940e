"""NumPy's backend: the kernel behind the protocol of recadam_core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recadam_core import Capabilities, Coefficients, Moments, RecAdamError
from recadam_core.arrays import check_arrays
from recadam_core.backends import Shared, Specification, pulled
from recadam_core.coefficients import coefficients_of, pull_alone
from recadam_core.errors import check_flag
from recadam_core.optimizer import functional_over
from recadam_core.update import scalars
from recadam_core.variants import Variant

from .kernel import unchecked

__all__ = ["NumpyBackend", "backend"]

Array = np.ndarray[Any, Any]
WHAT = ("theta", "m", "v", "grad", "anchor", "importance")


class NumpyBackend(Specification):
    """The backend of NumPy arrays.

    Args:
        fused: whether to step in one pass over memory, on all cores, which needs numba. Changes no bit.
        in_place: whether a step may write into the arrays of parameters and state that it is given, and
            return them. Needs `fused`. Otherwise it is pure, and spends most of its time on new memory.

    Example:
        >>> backend.owns(np.ones(2))
        True
    """

    capabilities = Capabilities(
        dtypes=("float16", "float32", "float64"),
        variants=(
            Variant("functional", "recadam_core.RecAdam", pull=pulled),
            Variant(
                "specification",
                "recadam_core.update",
                make=functional_over(lambda exact: Specification(np)),
                pull=pulled,
                coefficients=coefficients_of,
            ),
            Variant(
                "fused",
                "RecAdam(hp, NumpyBackend(fused=True))",
                needs=("numba",),
                make=functional_over(lambda exact: NumpyBackend(fused=True)),
                pull=lambda *given: NumpyBackend(fused=True).pull(*given),
            ),
        ),
    )

    def __init__(self, fused: bool = False, in_place: bool = False) -> None:
        super().__init__(np)
        for name, flag in (("fused", fused), ("in_place", in_place)):
            check_flag("NumpyBackend", name, flag)
        self._one_pass: Any = None
        self._in_place = in_place
        if in_place and not fused:
            raise RecAdamError("NumpyBackend: in_place needs fused=True; give both")
        if fused:
            from . import one_pass

            self._one_pass = one_pass

    def owns(self, array: Any) -> bool:
        """Whether the object is an array or a scalar of NumPy."""
        return isinstance(array, (np.ndarray, np.generic))

    def step(
        self,
        params: Sequence[Array],
        grads: Sequence[Array],
        moments: Sequence[Moments],
        anchors: Sequence[Array] | None,
        c: Coefficients,
        importances: Sequence[Array] | None = None,
    ) -> tuple[list[Array], list[Moments]]:
        """One step, in new memory unless `in_place`; 16-bit parameters are summed in float32."""
        names = range(len(params))
        return self.step_groups([Shared(names, params, grads, moments, anchors, c, importances)])[0]

    def pull(
        self,
        params: Sequence[Array],
        anchors: Sequence[Array],
        recall: float,
        importances: Sequence[Array] | None = None,
    ) -> list[Array]:
        """The pull alone, in new memory unless `in_place`."""
        if self._one_pass is None:
            return super().pull(params, anchors, recall, importances)
        c, weighs = pull_alone(recall), importances is not None
        weights = [None] * len(params) if importances is None else importances
        by_dtype: dict[Any, list[list[Any]]] = {}
        new = []
        for i, (old, star, weight) in enumerate(zip(params, anchors, weights, strict=True)):
            optional = (*WHAT[1:4], *(() if weighs else WHAT[5:]))
            self._check(f"{i}", (old, None, None, None, star, weight), optional)
            dtype = np.result_type(old, np.float32)
            copy = None if self._in_place else True
            new.append(np.array(old, dtype=dtype, copy=copy, order="C"))
            read = (None if x is None else np.asarray(x, dtype=dtype) for x in (star, weight))
            columns = by_dtype.setdefault(dtype, [[], [], [], []])
            for column, x in zip(columns, (i, new[-1], *read), strict=True):
                column.append(x)
        laid = [
            self._one_pass.table_of(thetas, None, None, None, stars, some if weighs else None)
            for _, thetas, stars, some in by_dtype.values()
        ]
        if self._in_place and laid:
            names = [i for indices, *_ in by_dtype.values() for i in indices]
            self._one_pass.check_apart([table for table, _ in laid], names, "NumpyBackend")
        for table, _ in laid:
            table.run(c, pulls=True, weighs=weighs)
        return [_as_was(*pair) for pair in zip(params, new, strict=True)]

    def step_groups(self, groups: Sequence[Shared]) -> list[tuple[list[Array], list[Moments]]]:
        """One step of several groups: all are checked, and copied where they must be, before one changes."""
        numbers = [scalars("NumpyBackend", group.c) for group in groups]
        laid = [self._laid(group, c.pull != 0) for group, c in zip(groups, numbers, strict=True)]
        runs = [(c, columns) for c, (_, lists) in zip(numbers, laid, strict=True) for columns in lists]
        if self._one_pass is None:
            for c, (_, *columns) in runs:
                for theta, g, m, v, star, weight in zip(*columns, strict=True):
                    unchecked(theta, g, m, v, star, c, weight)
        elif runs:
            names = [name for _, columns in runs for name in columns[0]]
            # Whole columns, or none: of parameters that are pulled alike all have what one has.
            columns_of = [[None if xs[0] is None else xs for xs in columns] for _, (_, *columns) in runs]
            tables, arrays = zip(*(self._one_pass.table_of(*columns) for columns in columns_of), strict=True)
            if self._in_place:
                self._one_pass.check_apart(tables, names, "NumpyBackend")
            for (c, _), table, (*_, stars, weights) in zip(runs, tables, columns_of, strict=True):
                table.run(c, stars is not None, weighs=weights is not None)
            del arrays  # not earlier: the tables hold addresses only
        return [
            (
                [_as_was(old, x) for old, (x, *_) in zip(group.params, new, strict=True)],
                [
                    Moments(_as_was(old.m, m), _as_was(old.v, v))
                    for old, (_, m, v) in zip(group.moments, new, strict=True)
                ],
            )
            for group, (new, _) in zip(groups, laid, strict=True)
        ]

    def _laid(
        self, group: Shared, pulls: bool
    ) -> tuple[list[tuple[Array, Array, Array]], list[list[list[Any]]]]:
        """A group's arrays, checked and in the dtype of their step: those to write, and all by that dtype."""
        if pulls and group.anchors is None:
            raise RecAdamError(f"NumpyBackend: pull is {group.c.pull!r} but there are no anchors; give them")
        count = len(group.params)
        pulled = (group.anchors, group.importances) if pulls else (None, None)
        stars, weights = ([None] * count if xs is None else xs for xs in pulled)
        if any(len(xs) != count for xs in (group.grads, group.moments, stars, weights)):
            raise RecAdamError("NumpyBackend: lists of several lengths; give as many arrays of each")
        new = []
        by_dtype: dict[Any, list[list[Any]]] = {}
        for name, old, grad, pair, star, weight in zip(
            group.names, group.params, group.grads, group.moments, stars, weights, strict=True
        ):
            if not isinstance(pair, Moments):
                raise RecAdamError(f"NumpyBackend: moments of {name!r} are none; give Moments(m, v)")
            m, v = pair
            self._check(name, (old, m, v, grad, star, weight), optional=WHAT[5:] if pulls else WHAT[4:])
            dtype = np.result_type(old, m, v)
            if dtype.itemsize < 4:
                dtype = np.dtype(np.float32)
            copy = None if self._in_place else True
            theta, m, v = (np.array(x, dtype=dtype, copy=copy, order="C") for x in (old, m, v))
            g, *pull = (None if x is None else np.asarray(x, dtype=dtype) for x in (grad, star, weight))
            columns = by_dtype.setdefault(dtype, [[] for _ in range(7)])
            for column, x in zip(columns, (name, theta, g, m, v, *pull), strict=True):
                column.append(x)
            new.append((theta, m, v))
        return new, list(by_dtype.values())

    def _check(self, name: str, arrays: Sequence[Any], optional: Sequence[str]) -> None:
        """Raise unless the arrays of one parameter can be stepped."""
        shape = getattr(arrays[0], "shape", None)
        for what, x in zip(WHAT, arrays, strict=True):
            if type(x) is np.ndarray and x.dtype.kind == "f" and x.shape == shape:
                continue  # as nearly all are, told quickly
            if x is None and what in optional:
                continue
            check_arrays([(f"NumpyBackend: {what} of {name!r}", x)], np)
            if x.shape != shape:
                raise RecAdamError(
                    f"NumpyBackend: {what} of {name!r} has shape {x.shape}, theta {shape}; give equal shapes"
                )
        for what, x in zip(WHAT, arrays[:3], strict=False) if self._in_place else ():
            if x is not None and not x.flags.writeable:
                raise RecAdamError(
                    f"NumpyBackend: {what} of {name!r} is read-only; give a copy, or leave in_place out"
                )


def _as_was(old: Array, new: Array) -> Array:
    """The new values in the old array's dtype; in its memory only where that is the new one's already."""
    return new.astype(old.dtype, copy=False)


backend = NumpyBackend()
