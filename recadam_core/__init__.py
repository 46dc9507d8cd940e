"""RecAdam (arXiv 2004.12651) as one array-API kernel, with policy as scalars.

    import recadam_core as rc

    hp = rc.Hyperparameters(lr=2e-5, gamma=5000.0, annealing=rc.Sigmoid(k=0.1, t0=250))
    opt = rc.RecAdam(hp)
    state = opt.init(params, anchors)               # dicts of arrays of one library
    params, state = opt.step(params, grads, state)

PyTorch's and JAX's own idioms are in `recadam_torch` and `recadam_jax`.
"""

from .annealing import (
    Annealing,
    Constant,
    Linear,
    Sigmoid,
    annealing_from_dict,
    annealing_to_dict,
    release_step,
)
from .backends import Backend, available_backends, backend_for, get_backend
from .coefficients import Coefficients, InstabilityWarning, coefficients
from .errors import RecAdamError
from .hyperparameters import Hyperparameters
from .importance import importance_from
from .optimizer import RecAdam, State
from .strength import DriftBudget, gamma_for
from .update import Moments, apply, pull, update
from .variants import Capabilities

__version__ = "0.1.0"

__all__ = [
    "Annealing",
    "Backend",
    "Capabilities",
    "Coefficients",
    "Constant",
    "DriftBudget",
    "Hyperparameters",
    "InstabilityWarning",
    "Linear",
    "Moments",
    "RecAdam",
    "RecAdamError",
    "Sigmoid",
    "State",
    "__version__",
    "annealing_from_dict",
    "annealing_to_dict",
    "apply",
    "available_backends",
    "backend_for",
    "coefficients",
    "gamma_for",
    "get_backend",
    "importance_from",
    "pull",
    "release_step",
    "update",
]
