"""The kernel: the normative specification of one RecAdam step, over any array namespace."""

from __future__ import annotations

from collections.abc import Callable
from operator import truediv
from typing import Any, NamedTuple

import numpy as np

from .arrays import Array, check_arrays, kind_of
from .coefficients import Coefficients, is_zero, proximal
from .errors import RecAdamError, check_number, shown

__all__ = ["Moments", "accumulator_dtype", "apply", "formula", "pull", "pull_by", "scalars", "update"]


class Moments(NamedTuple):
    """Adam's moments of one array.

    Example:
        >>> import numpy as np
        >>> Moments.zeros_like(np.ones((2, 3), dtype=np.float16)).m.dtype
        dtype('float32')
    """

    m: Array  # first moment, the parameter's shape, at least float32
    v: Array  # second moment, the same

    @classmethod
    def zeros_like(cls, theta: Array) -> Moments:
        """Moments before the first step: zeros, float32 for 16-bit parameters."""
        xp = check_arrays([("Moments: theta", theta)])
        dtype = accumulator_dtype(xp, theta.dtype)
        return cls(xp.zeros_like(theta, dtype=dtype), xp.zeros_like(theta, dtype=dtype))


def accumulator_dtype(xp: Any, *dtypes: Any) -> Any:
    """The dtype in which arrays of these dtypes are updated: their common one, at least float32.

    Example:
        >>> import numpy as np
        >>> accumulator_dtype(np, np.float16) is np.float32
        True
    """
    dtype = xp.result_type(*dtypes)
    return xp.float32 if xp.finfo(dtype).bits < 32 else dtype


# Without annotations: Triton reads them as code. And numba leaves out a branch only where what is None is
# an argument: what the others need is there.
def formula(  # type: ignore[no-untyped-def]
    theta, grad, m, v, anchor, importance, beta1, rest1, beta2, rest2, step, eps, pull, decay, sqrt, divide
):
    r"""The step itself, in the only text of it: NumPy, numba, PyTorch, Triton, JAX and the others run this.

    Math:
        as in `update` and, without a gradient, in `pull`, operation for operation.

    Args:
        theta: parameter: an array, a list of tensors, a block of a kernel, or one element.
        grad: gradient; None for the pull alone, which reads no moments and needs none of their numbers.
        m: first moment.
        v: second moment.
        anchor: pretrained value; None for no pull.
        importance: by which the pull is multiplied; None for 1.
        beta1: decay rate of the first moment.
        rest1: 1 - beta1, taken in float64.
        beta2: decay rate of the second moment.
        rest2: 1 - beta2, taken in float64.
        step: factor of Adam's fraction.
        eps: under it.
        pull: factor of the way home.
        decay: factor of theta; None for none.
        sqrt: the square root, correctly rounded where bits are to be the specification's.
        divide: division, the same.

    Returns:
        What to add to theta, and the new moments, first and second.

    Example:
        >>> betas = (0.9, 0.1, 0.999, 0.001)
        >>> formula(1.0, 0.0, 0.0, 0.0, 0.0, None, *betas, 1.0, 1e-8, 0.25, None, lambda x: x**0.5, truediv)
        (-0.25, 0.0, 0.0)

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12; the importance after EWC, arXiv 1612.00796.
    """
    if grad is not None:
        m = beta1 * m + rest1 * grad
        v = beta2 * v + rest2 * (grad * grad)
        adam = step * divide(m, sqrt(v) + eps)
        if anchor is None:
            delta = -adam
    if anchor is not None:
        back = pull * (anchor - theta)
        if importance is not None:
            back = importance * back
        if grad is None:
            delta = back
        else:
            delta = back - adam
    if decay is not None:
        delta = delta - decay * theta
    return delta, m, v


def update(
    theta: Array,
    grad: Array,
    state: Moments,
    anchor: Array | None,
    c: Coefficients,
    importance: Array | None = None,
) -> tuple[Array, Moments]:
    r"""One step of RecAdam for one array: what to add to the parameter, and the new moments.

    Math:
        $m' = \beta_1 m + (1-\beta_1) g$

        $v' = \beta_2 v + (1-\beta_2) g^2$

        $\delta = r(\theta^* - \theta) - s\,\frac{m'}{\sqrt{v'} + \varepsilon} - d\,\theta$

        with $s, \varepsilon, r, d$ = `c.step`, `c.eps`, `c.pull`, `c.decay`; with an importance $f$ the
        pull is $f\,(r(\theta^* - \theta))$. Every operation is
        elementwise, one of + - * / sqrt, and rounded once, in the order of `formula`: an
        implementation that does the same gets the same bits.

    Args:
        theta: parameter, any shape, real floating dtype.
        grad: gradient of the target task's loss, theta's shape.
        state: the moments before the step, theta's shape.
        anchor: pretrained value $\theta^*$, theta's shape; None when there is none or `c.pull` is 0.
        c: coefficients of this step: Python floats, or 0-d arrays.
        importance: how much each weight matters to the old task, theta's shape, in [0, 1], so that the
            bounds on the pull hold as they are; None for 1 everywhere. As EWC has the Fisher information.
            For the form "decoupled": in the others `c.step` and `c.decay` hold the whole pull, too.

    Returns:
        delta in the accumulator's dtype (float32 for 16-bit parameters), to be added to theta and
        rounded once, as `apply` does; and the new moments, in their old dtypes.

    Raises:
        RecAdamError: when shapes or libraries differ, one is no real floating array, a coefficient is no
            number, or the pull has a weight and there is no anchor.

    Example:
        >>> import numpy as np
        >>> import recadam_core as rc
        >>> theta, anchor = np.array([1.0, 2.0]), np.array([0.0, 2.0])
        >>> c = rc.Coefficients(beta1=0.9, beta2=0.999, step=0.0, eps=1e-8, pull=0.25, decay=0.0)
        >>> delta, state = rc.update(theta, np.array([1.0, -1.0]), rc.Moments.zeros_like(theta), anchor, c)
        >>> delta
        array([-0.25,  0.  ])

    Source: arXiv 2004.12651, Algorithm 1, lines 6 to 12; the importance after EWC, arXiv 1612.00796.
    """
    if not isinstance(state, Moments):
        raise RecAdamError(f"update: state is {type(state).__name__}; give Moments(m, v)")
    arrays = {"theta": theta, "grad": grad, "m": state.m, "v": state.v}
    arrays |= {what: x for what, x in (("anchor", anchor), ("importance", importance)) if x is not None}
    xp = _check_alike("update", arrays)
    dtype = accumulator_dtype(xp, theta.dtype, state.m.dtype, state.v.dtype)

    def cast(x: Any) -> Any:
        return _astype(xp, x, dtype)

    beta1, beta2, step, eps, pull, decay = scalars("update", c, _scalar_of(xp, dtype))
    if anchor is None and not is_zero(pull):
        raise RecAdamError(
            f"update: pull is {pull!r} but there is no anchor; use coefficients(..., anchored=False)"
        )
    # A weight that the host knows to be zero costs nothing and reads nothing.
    pulls = anchor is not None and not is_zero(pull)
    delta, m, v = formula(
        cast(theta),
        cast(grad),
        cast(state.m),
        cast(state.v),
        cast(anchor) if pulls else None,
        cast(importance) if pulls and importance is not None else None,
        *(beta1, 1 - beta1, beta2, 1 - beta2, step, eps, pull),
        None if is_zero(decay) else decay,
        xp.sqrt,
        truediv,
    )
    return delta, Moments(_astype(xp, m, state.m.dtype), _astype(xp, v, state.v.dtype))


def pull(theta: Array, anchor: Array, recall: Any, importance: Array | None = None) -> Array:
    r"""The pull alone, of a parameter that any optimizer has stepped: what to add to it.

    Math:
        $\delta = r\,(\theta^* - \theta)$ with $r = p/(1+p)$, the $p$ = `recall`;

    to the least of $\frac12\|\theta' - \theta\|^2 + \frac p2\|\theta' - \theta^*\|^2$, so stable at any
    $p$. With an importance $f$ it is $f\,(r(\theta^* - \theta))$. It is the pull of `update`, in its order
    of operations, without a gradient: an implementation that does the same gets the same bits.

    Args:
        theta: parameter, any shape, real floating dtype.
        anchor: pretrained value $\theta^*$, theta's shape.
        recall: weight $p$ of the penalty in this step, >= 0: a Python float, or a 0-d array. 0.1 brings a
            parameter an eleventh of the way home.
        importance: how much each weight matters to the old task, theta's shape, in [0, 1]; None for 1.

    Returns:
        delta in the accumulator's dtype (float32 for 16-bit parameters), to be added to theta and
        rounded once, as `apply` does.

    Raises:
        RecAdamError: when shapes or libraries differ, one is no real floating array, or recall is on the host
            and no finite number >= 0.

    Example:
        >>> import numpy as np
        >>> theta, anchor = np.array([1.0, 2.0]), np.array([0.0, 2.0])
        >>> pull(theta, anchor, 1.0)
        array([-0.5,  0. ])

    Source: arXiv 2004.12651, Algorithm 1, line 12, decoupled from Adam; Parikh and Boyd, Proximal
    algorithms, 2014, section 1.1.
    """
    arrays = {"theta": theta, "anchor": anchor}
    arrays |= {} if importance is None else {"importance": importance}
    xp = _check_alike("pull", arrays)
    dtype = accumulator_dtype(xp, theta.dtype)
    p = _scalar_of(xp, dtype, low=0.0)("pull", "recall", recall)
    if is_zero(p):
        return xp.zeros_like(theta, dtype=dtype)
    return pull_by(theta, anchor, proximal(p, xp)[1], importance)


def pull_by(theta: Array, anchor: Array, share: Any, importance: Array | None = None) -> Array:
    """`pull` of arrays that are known to fit, by a share of the way home.

    Example:
        >>> pull_by(np.ones(1), np.zeros(1), 0.25)
        array([-0.25])
    """
    xp, _ = kind_of(theta)
    dtype = accumulator_dtype(xp, theta.dtype)
    old, star, weight = (None if x is None else _astype(xp, x, dtype) for x in (theta, anchor, importance))
    factor = _astype(xp, share, dtype) if hasattr(share, "dtype") else share
    unread = (None,) * 6  # the moments' numbers
    delta, _, _ = formula(old, None, None, None, star, weight, *unread, factor, None, None, None)
    return delta


def apply(theta: Array, delta: Array) -> Array:
    """Theta + delta, summed in delta's dtype and rounded once to theta's.

    Args:
        theta: parameter, any shape.
        delta: what `update` returned for it.

    Returns:
        The new parameter, of theta's dtype.

    Raises:
        RecAdamError: when shapes or libraries differ, one is no real floating array, or delta has fewer bits
            than theta.

    Example:
        >>> import numpy as np
        >>> apply(np.ones(2, dtype=np.float16), np.full(2, 0.25, dtype=np.float32))
        array([1.25, 1.25], dtype=float16)
    """
    xp = check_arrays([("apply: theta", theta), ("apply: delta", delta)])
    if theta.shape != delta.shape or accumulator_dtype(xp, theta.dtype, delta.dtype) != delta.dtype:
        raise RecAdamError(
            f"apply: delta is {delta.dtype} of shape {delta.shape}, theta {theta.dtype} of {theta.shape}; "
            "give what update returned"
        )
    return _astype(xp, _astype(xp, theta, delta.dtype) + delta, theta.dtype)


def scalars(where: str, c: Any, scalar: Callable[[str, str, Any], Any] = check_number) -> Coefficients:
    """The coefficients as Python numbers, each checked; `scalar` makes a number of place, name and value.

    Example:
        >>> scalars("update", Coefficients(np.float32(0.5), 0.999, 0.0, 1e-8, 0.0, 0.0)).beta1
        0.5
    """
    if not isinstance(c, Coefficients):
        raise RecAdamError(f"{where}: c is {shown(c)}; give Coefficients")
    return Coefficients(*(scalar(where, name, x) for name, x in zip(Coefficients._fields, c, strict=True)))


def _check_alike(where: str, arrays: dict[str, Any]) -> Any:
    """The namespace of arrays by what they are, all of theta's shape."""
    xp = check_arrays((f"{where}: {what}", x) for what, x in arrays.items())
    shape = arrays["theta"].shape
    for what, array in arrays.items():
        if array.shape != shape:
            raise RecAdamError(f"{where}: {what} has shape {array.shape}, theta {shape}; give equal shapes")
    return xp


def _scalar_of(xp: Any, dtype: Any, **bounds: Any) -> Callable[[str, str, Any], Any]:
    """Makes a number of place, name and value: a library's own scalar may be traced, and stays one.

    NumPy's never is, and rounding it would change 1 - beta.
    """

    def scalar(where: str, name: str, x: Any) -> Any:
        is_scalar = kind_of(x)[0] is xp and not isinstance(x, np.generic | np.ndarray) and x.shape == ()
        return _astype(xp, x, dtype) if is_scalar else check_number(where, name, x, **bounds)

    return scalar


def _astype(xp: Any, x: Array, dtype: Any) -> Array:
    """The array in that dtype; itself where it is already. Not every library's `astype` knows `copy`."""
    return x if x.dtype == dtype else xp.astype(x, dtype)
