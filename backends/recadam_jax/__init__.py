"""RecAdam for JAX: a gradient transformation for optax.

from recadam_jax import recadam

tx = recadam(learning_rate=2e-5)        # anchored at the parameters given to init
state = tx.init(params)
updates, state = tx.update(grads, state, params)
params = optax.apply_updates(params, updates)
"""

from .backend import JaxBackend, backend
from .transformation import RecAdamState, recadam

__all__ = ["JaxBackend", "RecAdamState", "backend", "recadam"]
