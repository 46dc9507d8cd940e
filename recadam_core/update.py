"""The kernel: the normative specification of one RecAdam step, over any array namespace."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from .coefficients import Coefficients, is_zero
from .errors import RecAdamError

__all__ = ["Moments", "accumulator_dtype", "apply", "update"]


class Moments(NamedTuple):
    """Adam's moments of one array.

    Example:
        >>> import numpy as np
        >>> Moments.zeros_like(np.ones((2, 3), dtype=np.float16)).m.dtype
        dtype('float32')
    """

    m: Any  # first moment, the parameter's shape, at least float32
    v: Any  # second moment, the same

    @classmethod
    def zeros_like(cls, theta: Any) -> Moments:
        """Moments before the first step: zeros, float32 for 16-bit parameters."""
        xp = array_namespace(theta)
        dtype = accumulator_dtype(xp, theta.dtype)
        return cls(xp.zeros_like(theta, dtype=dtype), xp.zeros_like(theta, dtype=dtype))


def accumulator_dtype(xp: Any, *dtypes: Any) -> Any:
    """The dtype in which arrays of these dtypes are updated: their common one, at least float32.

    Args:
        xp: the arrays' namespace.
        *dtypes: floating dtypes of it.

    Returns:
        A dtype of `xp`.

    Example:
        >>> import numpy as np
        >>> accumulator_dtype(np, np.float16) is np.float32
        True
    """
    dtype = xp.result_type(*dtypes)
    return xp.float32 if xp.finfo(dtype).bits < 32 else dtype


def update(
    theta: Any, grad: Any, state: Moments, anchor: Any, c: Coefficients, importance: Any = None
) -> tuple[Any, Moments]:
    r"""One step of RecAdam for one array: what to add to the parameter, and the new moments.

    Math:
        $m' = \beta_1 m + (1-\beta_1) g$

        $v' = \beta_2 v + (1-\beta_2) g^2$

        $\delta = r(\theta^* - \theta) - s\,\frac{m'}{\sqrt{v'} + \varepsilon} - d\,\theta$

        with $s, \varepsilon, r, d$ = `c.step`, `c.eps`, `c.recall`, `c.decay`; with an importance $f$ the
        pull is $f\,(r(\theta^* - \theta))$. Every operation is
        elementwise, one of + - * / sqrt, and rounded once, in the order written here: an
        implementation that does the same gets the same bits.

    Args:
        theta: parameter, any shape, real floating dtype.
        grad: gradient of the target task's loss, theta's shape.
        state: the moments before the step, theta's shape.
        anchor: pretrained value $\theta^*$, theta's shape; None when there is none or `c.recall` is 0.
        c: coefficients of this step: Python floats, or 0-d arrays.
        importance: how much each weight matters to the old task, theta's shape, in [0, 1], so that the
            bounds on the pull hold as they are; None for 1 everywhere. As EWC has the Fisher information.
            For the form "decoupled": in the others `c.step` and `c.decay` hold the whole pull, too.

    Returns:
        delta in the accumulator's dtype (float32 for 16-bit parameters), to be added to theta and
        rounded once, as `apply` does; and the new moments, in their old dtypes.

    Raises:
        RecAdamError: when shapes differ, or the pull has a weight and there is no anchor.

    Example:
        >>> import numpy as np
        >>> import recadam_core as rc
        >>> theta, anchor = np.array([1.0, 2.0]), np.array([0.0, 2.0])
        >>> c = rc.Coefficients(beta1=0.9, beta2=0.999, step=0.0, eps=1e-8, recall=0.25, decay=0.0)
        >>> delta, state = rc.update(theta, np.array([1.0, -1.0]), rc.Moments.zeros_like(theta), anchor, c)
        >>> delta
        array([-0.25,  0.  ])

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12; the importance after EWC, arXiv 1612.00796.
    """
    for what, array in (
        ("grad", grad),
        ("m", state.m),
        ("v", state.v),
        ("anchor", anchor),
        ("importance", importance),
    ):
        if array is not None and array.shape != theta.shape:
            raise RecAdamError(
                f"update: {what} has shape {array.shape}, theta {theta.shape}; give equal shapes"
            )
    xp = array_namespace(theta, grad, state.m, state.v, *(x for x in (anchor, importance) if x is not None))
    dtype = accumulator_dtype(xp, theta.dtype, state.m.dtype, state.v.dtype)

    def cast(x: Any) -> Any:
        return xp.astype(x, dtype, copy=False) if hasattr(x, "dtype") else x

    # NumPy's scalars are numbers, whatever library the arrays are of.
    beta1, beta2, step, eps, recall, decay = (float(x) if isinstance(x, np.generic) else cast(x) for x in c)
    theta, grad = cast(theta), cast(grad)
    m = beta1 * cast(state.m) + (1 - beta1) * grad
    v = beta2 * cast(state.v) + (1 - beta2) * (grad * grad)
    adam = step * (m / (xp.sqrt(v) + eps))
    # A weight that the host knows to be zero costs nothing and reads nothing.
    if anchor is not None and not is_zero(recall):
        pull = recall * (cast(anchor) - theta)
        delta = (pull if importance is None else cast(importance) * pull) - adam
    elif anchor is None and not is_zero(recall):
        raise RecAdamError(
            f"update: recall is {recall!r} but there is no anchor; use coefficients(..., anchored=False)"
        )
    else:
        delta = -adam
    if not is_zero(decay):
        delta = delta - decay * theta
    return delta, Moments(xp.astype(m, state.m.dtype, copy=False), xp.astype(v, state.v.dtype, copy=False))


def apply(theta: Any, delta: Any) -> Any:
    """Theta + delta, summed in delta's dtype and rounded once to theta's.

    Args:
        theta: parameter, any shape.
        delta: what `update` returned for it.

    Returns:
        The new parameter, of theta's dtype.

    Example:
        >>> import numpy as np
        >>> apply(np.ones(2, dtype=np.float16), np.full(2, 0.25, dtype=np.float32))
        array([1.25, 1.25], dtype=float16)
    """
    xp = array_namespace(theta, delta)
    return xp.astype(xp.astype(theta, delta.dtype, copy=False) + delta, theta.dtype, copy=False)
