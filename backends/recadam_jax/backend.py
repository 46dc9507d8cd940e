"""JAX's backend: the specification, compiled, behind the protocol of recadam_core."""

from __future__ import annotations

import contextlib
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recadam_core import Capabilities, Coefficients, Hyperparameters, Moments, RecAdamError, coefficients
from recadam_core.backends import Specification
from recadam_core.coefficients import pull_alone
from recadam_core.optimizer import functional_over
from recadam_core.update import apply, pull_by
from recadam_core.variants import Exact, Variant

from .coefficients import host_coefficients
from .transformation import from_hyperparameters

__all__ = ["FLAG", "JaxBackend", "backend"]


# The moments' decay rates are static: 1 - beta is then taken in float64, as on every other backend.
@partial(jax.jit, static_argnames=("beta1", "beta2", "decays"))
def _step(arrays: Any, scalars: Any, beta1: float, beta2: float, decays: bool) -> Any:
    step, eps, pull, decay = scalars
    params, grads, moments, anchors, weights = arrays
    c = Coefficients(beta1, beta2, step, eps, 0.0 if anchors is None else pull, decay if decays else 0.0)
    return Specification(jnp).step(params, grads, moments, anchors, c, weights)


@jax.jit
def _pulled(params: Any, anchors: Any, weights: Any, share: Any) -> Any:
    weights = [None] * len(params) if weights is None else weights
    return [apply(x, pull_by(x, star, share, w)) for x, star, w in zip(params, anchors, weights, strict=True)]


# LLVM fuses a multiplication and an addition into one rounding wherever the processor can, and only
# this flag keeps it from doing so: without AVX2 there is no such instruction.
FLAG = "--xla_cpu_max_isa=AVX"
FLAGGED = Exact(
    f"XLA_FLAGS={FLAG}", "no AVX2 in the whole process; to be set before JAX starts", {"XLA_FLAGS": FLAG}
)
FLUSHED = {"denormals": "XLA's CPU client flushes denormal numbers to zero, whatever its flags"}
TRACED = "coefficients are computed traced, in the weights' precision and by XLA's own exp"


@cache
def _contracts(dtype: str) -> bool:
    """Whether compiled code rounds a * b - c once, as no operation of the specification is."""
    with jax.enable_x64(True):
        a = jnp.full(64, 1 + 2.0**-12 if dtype == "float32" else 1 + 2.0**-27, dtype)
        return bool(jnp.any(jax.jit(lambda x, y, z: x * y - z)(a, a, a * a) != 0))


def _traced(t: np.ndarray[Any, Any], hp: Hyperparameters, anchored: bool, dtype: str) -> Coefficients:
    """The coefficients of many steps as compiled code computes them, as arrays or numbers in NumPy."""
    with backend.precision(dtype):
        compiled = jax.jit(lambda x: coefficients(x, hp, None, anchored, jnp)[2:])
        values = compiled(jnp.asarray(t, dtype=dtype))
        return Coefficients(*hp.betas, *(np.asarray(x) for x in values))


class _OptaxStepper:
    """`recadam_jax.recadam` as the conformance kit drives it."""

    def __init__(
        self,
        host: bool,
        params: Any,
        anchors: Any,
        hp: Hyperparameters,
        exact: bool = False,
        importance: Any = None,
    ) -> None:
        stars = {name: anchors.get(name) for name in params}
        weights = importance and {name: importance.get(name) for name in params}
        self.params: dict[str, jax.Array] = params
        self.hp, self.host = hp, host
        self.state: Any = from_hyperparameters(hp, anchor=stars, importance=weights).init(params)

        @jax.jit
        def train(params: Any, grads: Any, state: Any, lr: Any, on_host: Any) -> Any:
            tx = from_hyperparameters(hp, lr)
            updates, state = tx.update(grads, state, params, coefficients=on_host)
            return optax.apply_updates(params, updates), state

        self.train = train

    def __call__(self, grads: dict[str, jax.Array], lr: float) -> dict[str, jax.Array]:
        on_host = host_coefficients(int(self.state.count) + 1, self.hp, lr) if self.host else None
        self.params, self.state = self.train(self.params, grads, self.state, lr, on_host)
        return self.params

    def moments(self) -> dict[str, Moments]:
        return {name: Moments(self.state.mu[name], self.state.nu[name]) for name in self.params}


class JaxBackend(Specification):
    """The backend of JAX arrays.

    Args:
        jit: whether the step is compiled; without, each operation runs by itself, which gives the
            specification's bits at many times the cost.
        exact: whether to refuse to step where the compiler would contract operations.

    Raises:
        RecAdamError: with `exact`, when the process was started without the flag that it takes.

    Example:
        >>> backend.owns(jnp.ones(2))
        True
    """

    capabilities = Capabilities(
        dtypes=("bfloat16", "float16", "float32", "float64"),
        devices=("cpu", "cuda"),
        jit=True,
        sharding=True,
        variants=(
            Variant(
                "functional",
                "recadam_core.RecAdam",
                FLAGGED,
                make=functional_over(lambda exact: JaxBackend(exact=exact)),
                pull=lambda *given: JaxBackend().pull(*given),
                misses=FLUSHED,
            ),
            Variant(
                "eager",
                "RecAdam(hp, JaxBackend(jit=False))",
                Exact(price="one dispatch an operation"),
                make=functional_over(lambda exact: JaxBackend(jit=False)),
                pull=lambda *given: JaxBackend(jit=False).pull(*given),
                misses=FLUSHED,
            ),
            Variant(
                "optax",
                "recadam_jax.recadam",
                Exact("never", "give it host_coefficients, as optax-host does"),
                traced=True,
                coefficients=_traced,
                make=partial(_OptaxStepper, False),
                rounds_update=True,
                misses={"exact": TRACED, "denormals": TRACED},
            ),
            Variant(
                "optax-host",
                "recadam_jax.recadam, coefficients=host_coefficients(t, hp)",
                FLAGGED,
                make=partial(_OptaxStepper, True),
                rounds_update=True,
                misses=FLUSHED,
            ),
        ),
    )

    def __init__(self, jit: bool = True, exact: bool = False) -> None:
        super().__init__(jnp)
        self.name = "jax"
        self._jit, self._exact = jit, exact and jit

    def owns(self, array: Any) -> bool:
        """Whether the object is a JAX array, concrete or traced."""
        return isinstance(array, jax.Array)

    def step(
        self, params: Any, grads: Any, moments: Any, anchors: Any, c: Coefficients, importances: Any = None
    ) -> tuple[list[jax.Array], list[Moments]]:
        """One compiled step."""
        if not self._jit:
            return super().step(params, grads, moments, anchors, c, importances)
        if self._exact and any(_contracts(p.dtype.name) for p in params if p.dtype.itemsize >= 4):
            raise RecAdamError(
                f"JAX contracts operations on this processor; start the process with XLA_FLAGS={FLAG}"
            )
        arrays = tuple(
            xs if xs is None else list(xs) for xs in (params, grads, moments, anchors, importances)
        )
        stepped: tuple[list[jax.Array], list[Moments]]
        stepped = _step(arrays, tuple(c[2:]), c.beta1, c.beta2, c.decay != 0)
        return stepped

    def pull(self, params: Any, anchors: Any, recall: float, importances: Any = None) -> list[jax.Array]:
        """`recadam_core.pull` and `apply`, compiled."""
        if not self._jit:
            return super().pull(params, anchors, recall, importances)
        lists = (xs if xs is None else list(xs) for xs in (params, anchors, importances))
        pulled: list[jax.Array] = _pulled(*lists, pull_alone(recall).pull)
        return pulled

    def from_numpy(self, array: np.ndarray[Any, Any], dtype: str | None = None) -> jax.Array:
        """A copy on the default device; refuses float64 while JAX would silently make it float32."""
        dtype = dtype or array.dtype.name
        canonical = jax.dtypes.canonicalize_dtype(dtype).name
        if canonical != dtype:
            raise RecAdamError(f"JAX would make {dtype} into {canonical}; set JAX_ENABLE_X64=1")
        return jnp.array(array, dtype=dtype)

    def precision(self, dtype: str) -> contextlib.AbstractContextManager[Any]:
        """64-bit types on for float64, as they are otherwise."""
        return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


backend = JaxBackend()
