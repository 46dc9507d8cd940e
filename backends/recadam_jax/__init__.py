"""RecAdam for JAX: a gradient transformation for optax.

from recadam_jax import recadam

tx = recadam(learning_rate=2e-5)        # anchored at the parameters given to init
state = tx.init(params)
updates, state = tx.update(grads, state, params)
params = optax.apply_updates(params, updates)
"""

from .anchors import load_anchor, release
from .backend import FLAG, JaxBackend, backend
from .importance import feature_importance, importance_of
from .pulling import AnchorPullState, add_anchor_pull
from .transformation import (
    HostCoefficients,
    RecAdamState,
    Released,
    from_hyperparameters,
    host_coefficients,
    recadam,
    scale_by_recadam,
)

__all__ = [
    "FLAG",
    "AnchorPullState",
    "HostCoefficients",
    "JaxBackend",
    "RecAdamState",
    "Released",
    "add_anchor_pull",
    "backend",
    "feature_importance",
    "from_hyperparameters",
    "host_coefficients",
    "importance_of",
    "load_anchor",
    "recadam",
    "release",
    "scale_by_recadam",
]
