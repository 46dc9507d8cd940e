"""Eight devices, virtual ones on the CPU: MiniLM with its parameters, moments and anchors sharded alike.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/jax_sharded.py --steps 48
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from recadam_core import Linear, release_step
from recadam_harness.archives import model_folder
from recadam_harness.models import Bert, Ops
from recadam_harness.models.bert import load_checkpoint
from recadam_harness.tasks.movie_reviews import read_reviews, tokenize
from recadam_jax import load_anchor, recadam, release

OPS = Ops(jnp, jax.scipy.special.erf)
HEAD = ["classifier.weight", "classifier.bias"]


def main() -> None:
    """Train, and print what a device holds and what was learnt."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=48)
    args = parser.parse_args()

    folder = model_folder("minilm-l3")
    config, _ = load_checkpoint(folder)
    bert = Bert(config)
    texts, labels = read_reviews()
    targets = np.eye(2, dtype=np.float32)[labels]
    train, test = (tokenize(folder, texts[start : start + n], 32) for start, n in ((2000, 512), (0, 496)))

    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("devices",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("devices"))

    def layout(shape: tuple[int, ...]) -> NamedSharding:
        """Along the first axis that can be shared evenly."""
        axis = next((i for i, n in enumerate(shape) if n % count == 0), None)
        return NamedSharding(mesh, P() if axis is None else P(*[None] * axis, "devices"))

    shapes = {
        name: jax.ShapeDtypeStruct(s, "float32", sharding=layout(s)) for name, s in config.shapes().items()
    }
    # Each device reads its own part of the file.
    pretrained = load_anchor(folder / "model.safetensors", shapes)
    head = bert.init_head(np.random.default_rng(0))
    params = {
        **pretrained,
        **{n: jax.device_put(x.astype(np.float32), layout(x.shape)) for n, x in head.items()},
    }
    annealing = Linear(t0=max(1, args.steps * 3 // 4))
    tx = recadam(1e-4, gamma=2000.0, annealing=annealing, anchor={**pretrained, **dict.fromkeys(HEAD)})
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        grads = jax.grad(lambda p: bert.loss(OPS, p, batch))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def batch(where: Any) -> dict[str, Any]:
        part = {"ids": train["ids"][where].astype(np.int32), "mask": train["mask"][where].astype(np.float32)}
        return jax.device_put({**part, "targets": targets[2000 + where]}, rows)

    rng = np.random.default_rng(0)
    for t in range(1, args.steps + 1):
        if t == release_step(annealing):  # nothing reads them from here on
            state = release(state, annealing)
            print(f"step {t}: the anchors are released")
        params, state = step(params, state, batch(rng.integers(0, 512, 16)))

    everything = [x for tree in (params, state.mu, state.nu) for x in tree.values()]
    whole = sum(x.size for x in everything)
    held = sum(x.addressable_shards[0].data.size for x in everything)
    print(f"a device holds {held:,} of {whole:,} numbers")
    scores = jax.jit(lambda p, b: bert.logits(OPS, p, b))(
        params, {"ids": test["ids"].astype(np.int32), "mask": test["mask"].astype(np.float32)}
    )
    print(f"test accuracy: {float((scores.argmax(-1) == labels[:496]).mean()):.3f}")


if __name__ == "__main__":
    main()
