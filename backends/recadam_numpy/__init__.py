"""RecAdam for NumPy arrays: the kernel with its intermediate results in reused memory.

import recadam_core as rc

rc.get_backend("numpy")
"""

from .backend import NumpyBackend, backend
from .kernel import kernel

__all__ = ["NumpyBackend", "backend", "kernel"]
