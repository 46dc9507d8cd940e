"""One step over parameters that share their settings: lists of tensors, so that a compiler can follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recadam_core import Coefficients, Hyperparameters, Moments, RecAdamError, apply, coefficients, update
from recadam_core.errors import shown

from .memory import is_writable, reshaped, wide_dtype
from .rounding import noise, round_, widened
from .shards import in_memory, is_sharded
from .staging import Staging

__all__ = ["Work", "check_alike", "check_written", "execute", "looked_at"]


class Work(NamedTuple):
    """Parameters that share their settings, and what a step needs of them: each process's own part."""

    params: list[Tensor]  # the optimizer's own, which may be sharded
    names: list[str]
    thetas: list[Tensor]
    grads: list[Tensor]
    ms: list[Tensor]
    vs: list[Tensor]
    anchors: list[Tensor] | None  # None where there are none, or they are freed
    importances: list[Tensor] | None  # None where every weight matters alike
    residuals: list[Tensor | None]
    steps: list[Tensor]  # step counts before the step
    t: int | None  # the step, which all share; None where only the device knows
    hp: Hyperparameters
    lr: Any
    c: Coefficients | None  # on the device where only that knows the step; None while a compiler follows
    anchored: bool
    ways: Mapping[str, Any]  # how to step: the flags of the parameters' groups
    release: int | None  # the step from which the anchors are read no more
    kernel: Callable[..., None]
    fused: str  # name of the one-pass kernel; Triton's takes what only the device knows, and rounds by chance
    together: bool  # whether the kernel gets all of them at once, or one by one
    staging: Staging | None = None  # where anchors are kept on the host, and the parameters are not
    run: Callable[..., None] | None = None  # of a kernel that has looked at them


_shape = attrgetter("shape")


def check_alike(work: Work) -> None:
    """Raise unless everything that belongs to a parameter has its shape."""
    shapes = list(map(_shape, work.thetas))
    for what, xs in _columns(work):
        if list(map(_shape, xs)) != shapes:
            i = next(i for i, x in enumerate(xs) if x.shape != shapes[i])
            raise reshaped(work.names[i], work.thetas[i], what, xs[i])


def check_written(work: Work) -> None:
    """Raise unless what a step writes can be written, and lies where its parameter does."""
    for name, theta, *moments in zip(work.names, work.thetas, work.ms, work.vs, strict=True):
        for what, x in (("data", theta), *zip(("first moment", "second moment"), moments, strict=True)):
            if x.device != theta.device:
                raise RecAdamError(
                    f"parameter {name!r} is on {theta.device}, its moments on {x.device}: it was moved; make "
                    "a new optimizer and load the state into it"
                )
            wrong = ""
            if not x.is_floating_point():
                wrong = f"has dtype {x.dtype}"
            elif x.layout != torch.strided:
                wrong = f"has layout {x.layout}"
            elif not is_writable(x):
                wrong = "is a view that cannot be written to (expanded, or negative)"
            elif x.is_inference() and not work.fused and not torch.is_inference_mode_enabled():
                wrong = "was made in inference mode"
            if wrong:
                raise RecAdamError(
                    f"parameter {name!r}: its {what} {wrong}; give a copy, as clone() makes it"
                )


def check_memory(work: Work) -> None:
    """Raise unless every tensor has values to read."""
    for what, xs in (("data", work.thetas), *_columns(work)):
        if 0 in map(Tensor.data_ptr, xs):
            for name, x in zip(work.names, xs, strict=True):
                if not in_memory(x):
                    raise RecAdamError(
                        f"parameter {name!r}: its {what} is not in memory (a freed storage, or the meta "
                        "device); make a new optimizer"
                    )


def _columns(work: Work) -> list[tuple[str, list[Tensor]]]:
    """What belongs to each parameter."""
    columns = [("gradient", work.grads), ("first moment", work.ms), ("second moment", work.vs)]
    columns += [("anchor", work.anchors)] if work.anchors else []
    columns += [("importance", work.importances)] if work.importances else []
    residuals = [x for x in work.residuals if x is not None]
    return columns + ([("residual", residuals)] if len(residuals) == len(work.thetas) else [])


def looked_at(work: Work, scaled: bool) -> Work:
    """The work, when all that it reads and writes was looked at: before any of it is written."""
    lay = getattr(work.kernel, "lay", None)
    more = {"ordered": _rounding(work) == "stochastic", "scaled": scaled} if _does_all(work) else {}
    copied = not more and (work.ways["maximize"] or _rounding(work) != "nearest")
    try:
        run = None
        c = work.c or _traced(work)
        work = work._replace(c=c)
        _check_known(work)
        if lay and not copied and not work.staging:
            anchors = work.anchors if _pulls(c) else None
            importances = work.importances if anchors else None
            run = lay(work.thetas, work.grads, work.ms, work.vs, anchors, importances, **more)
        if run is None:
            check_memory(work)
        return work._replace(run=run)
    except RecAdamError:
        for check in (check_alike, check_written, check_memory):
            check(work)
        raise


def _pulls(c: Coefficients) -> bool:
    """Whether there is a pull, or the device alone knows."""
    return not isinstance(c.pull, (int, float)) or c.pull != 0


def _does_all(work: Work) -> bool:
    """Whether the kernel itself turns and unscales gradients, and rounds by chance."""
    rounding = _rounding(work)
    by_chance = rounding == "stochastic" and not any(map(is_sharded, work.params))
    return work.fused == "triton" and (rounding == "nearest" or by_chance)


def _rounding(work: Work) -> str:
    """How sums are rounded: only 16-bit parameters have another way than to the nearest."""
    narrow = work.thetas[0].dtype in (torch.bfloat16, torch.float16)
    return str(work.ways["rounding"]) if narrow else "nearest"


def execute(work: Work, scale: Tensor | None = None, infinite: Tensor | None = None) -> None:
    """Take the step, in place on parameters, moments, residuals and step counts."""
    anchors, c = work.anchors, work.c or _traced(work)
    if anchors is None or not _pulls(c):
        anchors, c = None, c._replace(pull=0.0)
    if work.run is not None:
        work.run(c, **_more(work, scale, infinite))
    elif anchors is not None and work.staging is not None and work.together:
        for part, stars in work.staging.parts(anchors):
            _step(_part_of(work, part), stars, _pick(c, part), scale, infinite)
    else:
        _step(work, anchors, c, scale, infinite)
    if infinite is not None:
        more = 1 - infinite.to(work.steps[0].device, non_blocking=True)
        torch._foreach_add_(work.steps, [more] * len(work.steps))
    elif work.t is None:
        torch._foreach_add_(work.steps, 1)
    else:  # on the host a number would be made into a tensor for each of them
        torch._foreach_add_(work.steps, torch.ones((), dtype=torch.float32, device="cpu"), alpha=1.0)


def _part_of(work: Work, part: slice) -> Work:
    """Some of the parameters' work."""
    lists: dict[str, Any] = {name: x[part] for name, x in work._asdict().items() if isinstance(x, list)}
    return work._replace(**lists)


def _more(work: Work, scale: Tensor | None, infinite: Tensor | None) -> dict[str, Any]:
    """What a kernel that does all takes beside the coefficients."""
    if not _does_all(work):
        return {}
    by_chance = _rounding(work) == "stochastic"
    return {
        "negates": work.ways["maximize"],
        "chance": (work.names, work.steps if work.t is None else work.t) if by_chance else None,
        "scale": scale,
        "found_inf": infinite,
    }


def _step(
    work: Work, anchors: list[Tensor] | None, c: Coefficients, scale: Tensor | None, infinite: Tensor | None
) -> None:
    """As `execute`, by a kernel that has looked at nothing."""
    if _does_all(work):
        columns = (work.thetas, work.grads, work.ms, work.vs, anchors)
        work.kernel(*columns, c, work.importances if anchors else None, **_more(work, scale, infinite))
    else:
        _step_by_formula(work, anchors, c)


def _step_by_formula(work: Work, anchors: list[Tensor] | None, c: Coefficients) -> None:
    """By kernels that know of nothing but the formula."""
    ways, rounding = work.ways, _rounding(work)
    grads = list(torch._foreach_neg(work.grads)) if ways["maximize"] else work.grads
    weights: dict[str, Any] = {} if work.importances is None else {"importances": work.importances}
    if not work.fused:  # the formula takes a coefficient of the device for each parameter
        c = Coefficients(*(list(x.unbind()) if isinstance(x, Tensor) else x for x in c))
    if ways["differentiable"]:
        for i, theta in enumerate(work.thetas):
            moments = Moments(work.ms[i], work.vs[i])
            importance = work.importances and work.importances[i]
            delta, new = update(theta, grads[i], moments, anchors and anchors[i], _pick(c, i), importance)
            work.ms[i].copy_(new.m)
            work.vs[i].copy_(new.v)
            theta.copy_(apply(theta, delta))
    elif rounding != "nearest":
        # The kernel steps float32 copies; what is special is how they are made and rounded.
        wide = widened(work.thetas, work.residuals)
        work.kernel(wide, grads, work.ms, work.vs, anchors, c, **weights)
        noises = None
        if rounding == "stochastic":
            ts = [step + 1 for step in work.steps] if work.t is None else [work.t] * len(work.params)
            noises = map(noise, work.params, work.names, ts)
        round_(work.thetas, wide, work.residuals, noises)
    elif work.together:
        work.kernel(work.thetas, grads, work.ms, work.vs, anchors, c, **weights)
    else:
        for part in (slice(i, i + 1) for i in range(len(work.thetas))):
            lists = (work.thetas[part], grads[part], work.ms[part], work.vs[part])
            of_part = {name: xs[part] for name, xs in weights.items()}
            work.kernel(*lists, anchors and anchors[part], c, **of_part)


def _traced(work: Work) -> Coefficients:
    """Coefficients computed on the device: of shape (parameters,), or numbers where they do not change."""
    t = torch.stack(work.steps) + 1
    t = t.to(torch.float32 if t.device.type == "mps" else torch.float64)  # which has no other
    m, count = work.ms[0], len(work.steps)
    dtype = wide_dtype(m)
    c = coefficients(t, work.hp, work.lr, work.anchored, xp=torch)

    def there(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.device != m.device and x.device.type == "cpu" and not torch.compiler.is_compiling():
            # A copy from the host would be waited for, and cannot be captured.
            return torch.full((count,), x.item(), dtype=dtype, device=m.device)
        return x.to(m.device, dtype).expand(count)

    return Coefficients(*map(there, c))


def _check_known(work: Work) -> None:
    """Raise where the device is the host, and the coefficients in its tensors are none."""
    if work.c is None or work.thetas[0].device.type != "cpu":
        return
    signed = work.hp.form == "released"  # where one that overshoots turns the other's sign
    for x in (x.detach() for x in (work.c.step, work.c.pull) if isinstance(x, Tensor)):
        if not bool((x.isfinite() & (signed | (x >= 0))).all()):
            raise RecAdamError(
                f"step {int(work.steps[0]) + 1}: {type(work.hp.annealing).__name__} and lr give the "
                f"coefficients {shown(x.tolist())}; have them give finite numbers >= 0"
            )


def _pick(c: Coefficients, at: int | slice) -> Coefficients:
    """The coefficients of one parameter, or of some."""
    each = (isinstance(x, list) or (isinstance(x, Tensor) and x.ndim > 0) for x in c)
    return Coefficients(*(x[at] if of_one else x for x, of_one in zip(c, each, strict=True)))
