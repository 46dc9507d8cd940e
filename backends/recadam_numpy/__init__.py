"""RecAdam for NumPy arrays: the kernel in place, or in one pass over memory, by numba.

import recadam_core as rc

rc.get_backend("numpy")
"""

from .backend import NumpyBackend, backend
from .kernel import kernel

__all__ = ["NumpyBackend", "backend", "kernel"]
