"""One of two processes with four devices each: `python jax_process.py RANK PORT`.

Trains a sharded model and says whether its own parts are those of one device.
"""

from __future__ import annotations

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from recadam_core import Linear
from recadam_jax import add_anchor_pull, recadam, release

ANNEALING = Linear(t0=8)
TXS = (
    recadam(1e-2, gamma=20.0, annealing=ANNEALING),
    optax.chain(optax.lion(1e-2), add_anchor_pull(0.5, annealing=ANNEALING)),
)


def draw(seed):
    return np.random.default_rng(seed).standard_normal((16, 8)).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(tx, place):
    params = place(draw(0))
    state = tx.init(params)
    for t in range(12):
        if t == 8:
            state = release(state, ANNEALING)
        params, state = step(tx, params, state, place(draw(t)))
    return params, state


def main(rank, port):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    sharding = NamedSharding(jax.make_mesh((8,), ("fsdp",)), P("fsdp"))
    spread = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda where: x[where])  # noqa: E731
    for tx in TXS:
        params, _ = train(tx, spread)
        with jax.default_device(jax.local_devices()[0]):
            alone = np.asarray(train(tx, jnp.asarray)[0])
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
