"""One optimizer step beside its peers."""

from __future__ import annotations

import os

from recadam_core import Hyperparameters, RecAdam, available_backends, get_backend
from recadam_core.conformance.claims import LEVELS
from recadam_core.conformance.run import environment

from .common import arrays, ratio

HP = Hyperparameters(lr=1e-5, gamma=5000.0)


class Torch:
    """A step of `recadam_torch.RecAdam` over one of torch's AdamW, on the CPU."""

    params = (["single", "foreach"], ["fused", "foreach"])
    param_names = ("recadam", "adamw")
    unit = "ratio"

    def track_step(self, ours, peer):
        import torch

        from recadam_torch import RecAdam as TorchRecAdam

        def step(make):
            tensors = [torch.nn.Parameter(torch.tensor(x)) for x in arrays(0)]
            for p, g in zip(tensors, arrays(1), strict=True):
                p.grad = torch.tensor(g)
            return make(tensors).step

        mine = step(lambda tensors: TorchRecAdam(tensors, lr=1e-5, foreach=ours == "foreach"))
        other = step(lambda tensors: torch.optim.AdamW(tensors, lr=1e-5, **{peer: True}))
        return ratio(mine, other)


class Jax:
    """A step of `recadam_jax.recadam` over one of optax's AdamW, both jitted and donated."""

    unit = "ratio"

    def track_step(self):
        import jax
        import jax.numpy as jnp
        import optax

        from recadam_jax import recadam

        grads = [jnp.array(x) for x in arrays(1)]

        def step(tx):
            held = [[jnp.array(x) for x in arrays(0)]]
            held.append(tx.init(held[0]))

            def train(params, state):
                updates, state = tx.update(grads, state, params)
                return optax.apply_updates(params, updates), state

            compiled = jax.jit(train, donate_argnums=(0, 1))

            def take():
                held[:] = compiled(*held)
                jax.block_until_ready(held)

            return take

        return ratio(step(recadam(1e-5)), step(optax.adamw(1e-5)))


class Functional:
    """A step of `recadam_core.RecAdam` over NumPy arrays, with an anchor over without."""

    unit = "ratio"

    def track_anchor(self):
        backend = get_backend("numpy")
        params = {str(i): x for i, x in enumerate(arrays(0))}
        grads = {str(i): x for i, x in enumerate(arrays(1))}
        optimizer = RecAdam(HP, backend)
        anchored, free = optimizer.init(params, params), optimizer.init(params, {})
        return ratio(
            lambda: optimizer.step(params, grads, anchored), lambda: optimizer.step(params, grads, free)
        )


class Variants:
    """A step of every variant of every backend over one of its backend's default, in either level's setting.

    The backends' capabilities say which there are; what is not installed, or needs an environment that this
    process has not, is skipped.
    """

    params = (
        [
            f"{name} {variant.name}"
            for name in available_backends()
            for variant in get_backend(name).capabilities.variants
        ],
        LEVELS,
    )
    param_names = ("variant", "level")
    unit = "ratio"
    timeout = 300

    def track_variant(self, which, level):
        name, chosen = which.split()
        backend = get_backend(name)
        variant = backend.capabilities.variant(chosen)
        needed = environment(variant, level).items()
        if variant.lacks() or any(value not in os.environ.get(key, "").split() for key, value in needed):
            return float("nan")
        if level == "exact" and "exact" in variant.misses:
            return float("nan")

        def step(way, exact):
            params = {str(i): backend.from_numpy(x) for i, x in enumerate(arrays(0))}
            grads = {str(i): backend.from_numpy(x) for i, x in enumerate(arrays(1))}
            anchors = {str(i): backend.from_numpy(x) for i, x in enumerate(arrays(0))}
            stepper = backend.stepper(way, params, anchors, HP, exact)

            def take():
                new = stepper(grads, 1e-5)
                getattr(new["0"], "block_until_ready", lambda: None)()

            return take

        rounds = 5 if chosen == "eager" else 15
        return ratio(step(chosen, level == "exact"), step("functional", False), rounds=rounds)
