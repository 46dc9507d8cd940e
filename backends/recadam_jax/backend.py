"""JAX's backend: the specification, compiled, behind the protocol of recadam_core."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recadam_core import Capabilities, Coefficients, Hyperparameters, Moments, RecAdamError, apply, update
from recadam_core.backends import Stepper, functional_stepper

from .transformation import recadam

__all__ = ["JaxBackend", "backend"]


# The moments' decay rates are static: 1 - beta is then taken in float64, as on every other backend.
@partial(jax.jit, static_argnames=("beta1", "beta2", "decays"))
def _step(
    params: Any,
    grads: Any,
    moments: Any,
    anchors: Any,
    scalars: Any,
    beta1: float,
    beta2: float,
    decays: bool,
) -> tuple[list[Any], list[Moments]]:
    step, eps, recall, decay = scalars
    c = Coefficients(beta1, beta2, step, eps, 0.0 if anchors is None else recall, decay if decays else 0.0)
    stars = [None] * len(params) if anchors is None else anchors
    new: list[tuple[Any, Moments]] = [
        update(*arrays, c) for arrays in zip(params, grads, moments, stars, strict=True)
    ]
    return [apply(theta, delta) for theta, (delta, _) in zip(params, new, strict=True)], [s for _, s in new]


def transformation(hp: Hyperparameters) -> Callable[..., optax.GradientTransformation]:
    """`recadam` with the settings of a `Hyperparameters` bound; takes the learning rate first."""
    return partial(
        recadam,
        b1=hp.betas[0],
        b2=hp.betas[1],
        eps=hp.eps,
        weight_decay=hp.weight_decay,
        gamma=hp.gamma,
        annealing=hp.annealing,
        bias_correction=hp.bias_correction,
        form=hp.form,
    )


class JaxBackend:
    """The backend of JAX arrays.

    Example:
        >>> backend.owns(jnp.ones(2))
        True
    """

    name = "jax"
    capabilities = Capabilities(
        dtypes=("bfloat16", "float16", "float32", "float64"),
        devices=("cpu", "cuda"),
        variants=("functional", "optax"),
        finetunes=("mlp", "bert"),
    )

    def owns(self, array: Any) -> bool:
        """Whether the object is a JAX array, concrete or traced."""
        return isinstance(array, jax.Array)

    def step(
        self,
        params: Sequence[jax.Array],
        grads: Sequence[jax.Array],
        moments: Sequence[Moments],
        anchors: Sequence[jax.Array] | None,
        c: Coefficients,
    ) -> tuple[list[jax.Array], list[Moments]]:
        """One compiled step."""
        stepped: tuple[list[jax.Array], list[Moments]] = _step(
            list(params),
            list(grads),
            list(moments),
            None if anchors is None else list(anchors),
            tuple(c[2:]),
            c.beta1,
            c.beta2,
            c.decay != 0,
        )
        return stepped

    def stepper(
        self, variant: str, params: dict[str, Any], anchors: dict[str, Any], hp: Hyperparameters
    ) -> Stepper:
        """`recadam_jax.recadam` in one compiled step with traced coefficients; or the functional one."""
        if variant == "functional":
            return functional_stepper(self, params, anchors, hp)
        make = transformation(hp)
        state = make(hp.lr, anchor={name: anchors.get(name) for name in params}).init(params)

        @jax.jit
        def train(params: Any, grads: Any, state: Any, lr: Any) -> Any:
            updates, state = make(lr).update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def step(grads: dict[str, jax.Array], lr: float) -> dict[str, jax.Array]:
            nonlocal params, state
            params, state = train(params, grads, state, lr)
            return params

        return step

    def from_numpy(self, array: np.ndarray[Any, Any], dtype: str | None = None) -> jax.Array:
        """A copy on the default device; refuses float64 while JAX would silently make it float32."""
        dtype = dtype or array.dtype.name
        held = jax.dtypes.canonicalize_dtype(dtype).name
        if held != dtype:
            raise RecAdamError(f"JAX would make {dtype} into {held}; set JAX_ENABLE_X64=1")
        return jnp.array(array, dtype=dtype)

    def to_numpy(self, array: jax.Array) -> np.ndarray[Any, Any]:
        """A copy in NumPy; bfloat16, which NumPy lacks, as float32."""
        return np.array(array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array)

    def copy(self, array: jax.Array) -> jax.Array:
        """A copy in new memory."""
        return jnp.array(array, copy=True)

    def precision(self, dtype: str) -> contextlib.AbstractContextManager[Any]:
        """64-bit types on for float64, as they are otherwise."""
        return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()

    @property
    def engine(self) -> Any:
        """The engine that trains the harness's models with JAX."""
        from .engine import JaxEngine

        return JaxEngine


backend = JaxBackend()
