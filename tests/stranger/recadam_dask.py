"""RecAdam for dask arrays: every chunk is stepped where it lives."""

import contextlib

import dask
import dask.array as da
import numpy as np

import recadam_core as rc
from recadam_core.update import formula


def kernel(theta, grad, m, v, anchor=None, importance=None, c=None):
    """One chunk's step, in NumPy: parameter and moments, stacked."""
    scalars = (c.beta1, 1 - c.beta1, c.beta2, 1 - c.beta2, c.step, c.eps, c.pull, c.decay or None)
    delta, m, v = formula(theta, grad, m, v, anchor, importance, *scalars, np.sqrt, np.divide)
    return np.stack([theta + delta, m, v])


class DaskBackend:
    name = "dask"
    capabilities = rc.Capabilities(dtypes=("float32", "float64"))

    def owns(self, array):
        return isinstance(array, da.Array)

    def step(self, params, grads, moments, anchors, c, importances=None):
        new = []
        for i, theta in enumerate(params):
            like = [grads[i], *moments[i], *(xs[i] for xs in (anchors, importances) if xs is not None)]
            like = [array.rechunk(theta.chunks) for array in like]
            shape = {"new_axis": 0, "chunks": ((3,), *theta.chunks)}
            new.append(da.map_blocks(kernel, theta, *like, c=c, dtype=theta.dtype, **shape))
        # Computed now, or the graph would grow with every step.
        new = dask.persist(*new, scheduler="synchronous")
        return [x[0] for x in new], [rc.Moments(x[1], x[2]) for x in new]

    def from_numpy(self, array, dtype=None):
        return da.from_array(np.array(array, dtype=dtype))

    def to_numpy(self, array):
        return np.array(array.compute(scheduler="synchronous"))

    def copy(self, array):
        return array.copy()

    def precision(self, dtype):
        return contextlib.nullcontext()


backend = DaskBackend()
