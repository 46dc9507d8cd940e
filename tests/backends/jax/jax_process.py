"""One of two processes with four devices each: `python jax_process.py RANK PORT`.

Trains a sharded model and says whether its own parts are those of one device.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from recadam_core import Linear
from recadam_jax import recadam, release

ANNEALING = Linear(t0=8)
TX = recadam(1e-2, gamma=20.0, annealing=ANNEALING)


def draw(seed):
    return np.random.default_rng(seed).standard_normal((16, 8)).astype(np.float32)


@jax.jit
def step(params, state, grads):
    updates, state = TX.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(place):
    params = place(draw(0))
    state = TX.init(params)
    for t in range(12):
        if t == 8:
            state = release(state, ANNEALING)
        params, state = step(params, state, place(draw(t)))
    return params, state


def main(rank, port):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    sharding = NamedSharding(jax.make_mesh((8,), ("fsdp",)), P("fsdp"))
    params, _ = train(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda where: x[where]))
    with jax.default_device(jax.local_devices()[0]):
        alone = np.asarray(train(jnp.asarray)[0])
    assert jax.device_count() == 8
    assert len(params.addressable_shards) == 4
    for shard in params.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), alone[shard.index])
    total = float(jax.jit(jnp.sum)(params))  # over both processes
    np.testing.assert_allclose(total, alone.sum(), rtol=1e-5)
    jax.distributed.shutdown()
    print("the same bits")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
