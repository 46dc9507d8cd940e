"""Ways to take a step on the CPU, ours and our peers', each with the bytes that it must move a parameter.

A maker takes shapes and returns the step. The tensors that optimizers of one library may share, they share.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import NamedTuple

from recadam_core import Constant, Hyperparameters, RecAdam
from recadam_core.variants import Variant

from .common import arrays

GAMMA = 100.0
CURVE = Constant(task=1.0, recall=1.0)
HP = Hyperparameters(lr=1e-5, gamma=GAMMA, annealing=CURVE)


class Contender(NamedTuple):
    """A way to take a step."""

    about: str
    bytes: int  # that one pass over float32 parameters would move, each
    make: Callable
    needs: tuple[str, ...] = ()  # modules beyond its library's
    programs: tuple[tuple[str, ...], ...] = ()  # one of each tuple


class Torch:
    """Parameters and gradients that torch's contenders share."""

    def __init__(self, shapes):
        import torch

        self.params = [torch.nn.Parameter(torch.from_numpy(x)) for x in arrays(shapes, 0)]
        for p, g in zip(self.params, arrays(shapes, 1), strict=True):
            p.grad = torch.from_numpy(g)
        self.named = [(str(i), p) for i, p in enumerate(self.params)]

    def adamw(self, **flags):
        import torch

        return torch.optim.AdamW(self.params, lr=1e-5, **flags).step

    def pulled(self):
        import torch

        from recadam_torch import anchor

        optimizer = torch.optim.AdamW(self.named, lr=1e-5, fused=True)
        self.handle = anchor(optimizer, {name: p.detach() for name, p in self.named}, pull=1e-3)
        return optimizer.step

    def pytorch_optimizer(self):
        from pytorch_optimizer import AdamW

        return AdamW(self.params, lr=1e-5).step

    def recadam(self, freed=False, anchor_dtype=None, weighed=False, **flags):
        from recadam_torch import RecAdam as TorchRecAdam

        # Named, since others step the same parameters before this optimizer does.
        anchors = {name: p.detach().to(anchor_dtype) for name, p in self.named}
        curve = Constant(task=1.0, recall=0.0) if freed else CURVE
        if weighed:
            flags["importance"] = {name: (p.detach() - p.detach().floor()) for name, p in self.named}
        optimizer = TorchRecAdam(self.named, lr=1e-5, gamma=GAMMA, annealing=curve, anchors=anchors, **flags)
        if freed:  # by the first step
            optimizer.step()
            assert all(state["anchor"] is None for state in optimizer.state.values())
        return optimizer.step

    def loop(self):
        """Five calls a tensor, as optimizers that are written in a loop have them."""
        import torch

        state = [(torch.zeros_like(p), torch.zeros_like(p), p.detach().clone()) for p in self.params]

        @torch.no_grad()
        def step():
            for p, (m, v, star) in zip(self.params, state, strict=True):
                m.mul_(0.9).add_(p.grad, alpha=0.1)
                v.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
                p.addcdiv_(m, v.sqrt().add_(1e-8), value=-1e-5)
                p.add_(p - star, alpha=-1e-5 * GAMMA)

        return step

    def copy(self):
        import torch

        with torch.no_grad():
            there = [p.detach().clone() for p in self.params]
        return lambda: [x.copy_(p.detach()) for x, p in zip(there, self.params, strict=True)]


def numpy_step(shapes, **flags):
    from recadam_numpy import NumpyBackend

    params = {str(i): x for i, x in enumerate(arrays(shapes, 0))}
    grads = {str(i): x for i, x in enumerate(arrays(shapes, 1))}
    optimizer = RecAdam(HP, NumpyBackend(**flags))
    held = [params, optimizer.init(params, params)]

    def step():
        held[:] = optimizer.step(held[0], grads, held[1])

    return step


def _train(tx):
    """The step of an optax transformation, jitted and donated."""
    import jax
    import optax

    def train(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(train, donate_argnums=(0, 1))


def jax_step(shapes, make):
    import jax
    import jax.numpy as jnp

    tx = make()
    grads = [jnp.array(x) for x in arrays(shapes, 1)]
    params = [jnp.array(x) for x in arrays(shapes, 0)]
    held = [params, tx.init(params)]
    compiled = _train(tx)

    def step():
        held[:] = compiled(*held, grads)
        jax.block_until_ready(held)

    return step


def compilations(shapes):
    """What compiles each of JAX's steps anew."""
    import jax
    import numpy as np

    params = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]

    def program(make):
        tx = make()
        state = jax.eval_shape(tx.init, params)
        return _train(tx).lower(params, state, params).compile

    makers = {"optax AdamW": _optax_adamw, "JAX RecAdam": _jax_recadam, "optax AdamW, pulled": _optax_pulled}
    return {name: program(make) for name, make in makers.items()}


def compiling(shapes, rounds):
    """Seconds to compile each of JAX's steps, in turns."""
    seconds = {name: [] for name in JAX}
    for _ in range(rounds):
        for name, program in compilations(shapes).items():
            began = time.perf_counter()
            program()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def _jax_recadam():
    from recadam_jax import recadam

    return recadam(1e-5, gamma=GAMMA, annealing=CURVE)


def _optax_adamw():
    import optax

    return optax.adamw(1e-5)


def _optax_pulled():
    import optax

    from recadam_jax import add_anchor_pull

    return optax.chain(optax.adamw(1e-5), add_anchor_pull(1e-3))


def _bfloat16():
    import torch

    return torch.bfloat16


TORCH = {
    "copy": Contender("a copy of the parameters", 8, lambda t: t.copy()),
    "torch AdamW fused": Contender("torch.optim.AdamW(fused=True)", 28, lambda t: t.adamw(fused=True)),
    "torch AdamW foreach": Contender("torch.optim.AdamW(foreach=True)", 28, lambda t: t.adamw(foreach=True)),
    "pytorch_optimizer AdamW": Contender(
        "its AdamW", 28, lambda t: t.pytorch_optimizer(), ("pytorch_optimizer",)
    ),
    "RecAdam": Contender("recadam_torch.RecAdam: numba", 32, lambda t: t.recadam(fused="numba"), ("numba",)),
    "RecAdam, bfloat16 anchors": Contender(
        "anchors of two bytes",
        30,
        lambda t: t.recadam(fused="numba", anchor_dtype=_bfloat16()),
        ("numba",),
    ),
    "RecAdam, anchors freed": Contender(
        "after annealing", 28, lambda t: t.recadam(freed=True, fused="numba"), ("numba",)
    ),
    "RecAdam, importance": Contender(
        "a pull weighted by an importance", 36, lambda t: t.recadam(fused="numba", weighed=True), ("numba",)
    ),
    "AdamW fused, pulled": Contender(
        "anchor(torch.optim.AdamW(fused=True))", 40, lambda t: t.pulled(), ("numba",)
    ),
    "RecAdam compiled": Contender(
        'RecAdam(fused="compiled")',
        32,
        lambda t: t.recadam(fused="compiled"),
        programs=(("g++", "clang++"),),
    ),
    "RecAdam foreach": Contender("RecAdam(foreach=True)", 32, lambda t: t.recadam(foreach=True)),
    "loop": Contender("five calls a tensor", 32, lambda t: t.loop()),
}
"""Steps over shared torch tensors: each maker takes `Torch`."""

NUMPY = {
    "NumPy in place": Contender(
        "NumpyBackend(fused=True, in_place=True)",
        32,
        lambda s: numpy_step(s, fused=True, in_place=True),
        ("numba",),
    ),
    "NumPy": Contender("NumpyBackend(fused=True), pure", 32, lambda s: numpy_step(s, fused=True), ("numba",)),
}
JAX = {
    "optax AdamW": Contender("optax.adamw, jitted and donated", 28, lambda s: jax_step(s, _optax_adamw)),
    "JAX RecAdam": Contender("recadam_jax.recadam, the same", 32, lambda s: jax_step(s, _jax_recadam)),
    "optax AdamW, pulled": Contender(
        "chain(adamw, add_anchor_pull), the same", 32, lambda s: jax_step(s, _optax_pulled)
    ),
}
"""Steps over arrays of their own: each maker takes shapes."""


def wanted(*names):
    """Skip the benchmark, when called from its setup, if what a contender needs is not installed."""
    for name in names:
        contender = {**TORCH, **NUMPY, **JAX}[name]
        library = ("torch",) if name in TORCH else ("jax", "optax") if name in JAX else ()
        lacks = Variant(name, needs=(*library, *contender.needs), programs=contender.programs).lacks()
        if lacks:
            raise NotImplementedError(f"{name} needs {lacks}")


def made(names, shapes):
    """Steps by name; of torch over tensors that they share."""
    shared = Torch(shapes) if any(name in TORCH for name in names) else None
    found = {}
    for name in names:
        if name in TORCH:
            found[name] = TORCH[name].make(shared)
        else:
            found[name] = {**NUMPY, **JAX}[name].make(shapes)
    gc.collect()
    return found
