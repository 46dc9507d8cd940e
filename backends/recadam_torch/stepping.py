"""One step over parameters that share their settings: lists of tensors, so that a compiler can follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recadam_core import Coefficients, Hyperparameters, Moments, RecAdamError, apply, coefficients, update
from recadam_core.errors import shown

from .memory import is_writable, reshaped, wide_dtype
from .rounding import key_of, noise, round_, widened
from .shards import in_memory, is_sharded

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
    run: Callable[[Coefficients], None] | None = None  # of a kernel that has looked at them


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


def looked_at(work: Work) -> Work:
    """The work, when all that it reads and writes was looked at: before any of it is written."""
    lay = getattr(work.kernel, "lay", None)
    copied = work.ways["maximize"] or _rounding(work) != "nearest"
    try:
        run = None
        if work.c is None:
            work = work._replace(c=_traced(work))
            _check_known(work)
        elif lay and not copied:
            anchors = work.anchors if work.c.pull else None
            importances = work.importances if anchors else None
            run = lay(work.thetas, work.grads, work.ms, work.vs, anchors, importances)
        if run is None:
            check_memory(work)
        return work._replace(run=run)
    except RecAdamError:
        for check in (check_alike, check_written, check_memory):
            check(work)
        raise


def _rounding(work: Work) -> str:
    """How sums are rounded: only 16-bit parameters have another way than to the nearest."""
    narrow = work.thetas[0].dtype in (torch.bfloat16, torch.float16)
    return str(work.ways["rounding"]) if narrow else "nearest"


def execute(work: Work, scale: Tensor | None = None, infinite: Tensor | None = None) -> None:
    """Take the step, in place on parameters, moments, residuals and step counts."""
    ways, anchors = work.ways, work.anchors
    count = len(work.params)
    c = work.c or _traced(work)
    if c.pull == 0 if isinstance(c.pull, float) else anchors is None:
        anchors, c = None, c._replace(pull=0.0)
    rounding = _rounding(work)
    if work.run is not None:
        work.run(c)
    elif work.fused == "triton" and (
        rounding == "nearest" or (rounding == "stochastic" and not any(map(is_sharded, work.params)))
    ):
        keys = None
        if rounding == "stochastic":
            t = [step + 1 for step in work.steps] if work.t is None else [work.t] * count
            keys = torch.stack([key_of(*x) for x in zip(work.params, work.names, t, strict=True)])
        options: dict[str, Any] = {"negates": ways["maximize"], "scale": scale, "found": infinite}
        for part, stars in _streamed(anchors, count, work.thetas[0].device):
            lists = [xs[part] for xs in (work.thetas, work.grads, work.ms, work.vs)]
            c_part = Coefficients(*(x[part] if isinstance(x, Tensor) and x.ndim else x for x in c))
            weights = work.importances and work.importances[part] if stars else None
            options["keys"] = None if keys is None else keys[part]
            work.kernel(*lists, stars, c_part, weights, **options)
    else:
        _step(work, rounding, anchors, c)
    if infinite is not None:
        torch._foreach_add_(work.steps, 1 - infinite)
    elif work.t is None:
        torch._foreach_add_(work.steps, 1)
    else:  # on the host a number would be made into a tensor for each of them
        torch._foreach_add_(work.steps, torch.ones((), dtype=torch.float32, device="cpu"), alpha=1.0)


def _step(work: Work, rounding: str, anchors: list[Tensor] | None, c: Coefficients) -> None:
    """As `execute`, by kernels that know of nothing but the formula."""
    ways = work.ways
    grads = list(torch._foreach_neg(work.grads)) if ways["maximize"] else work.grads
    more: dict[str, Any] = {} if work.importances is None else {"importances": work.importances}
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
        pairs = zip(work.thetas, work.residuals, strict=True)
        wide = [widened(theta, residual) for theta, residual in pairs]
        work.kernel(wide, grads, work.ms, work.vs, anchors, c, **more)
        for i, theta in enumerate(work.thetas):
            chance = None
            if rounding == "stochastic":
                t = work.steps[i] + 1 if work.t is None else work.t
                chance = noise(work.params[i], work.names[i], t)
            round_(theta, wide[i], work.residuals[i], chance)
    elif work.together:
        work.kernel(work.thetas, grads, work.ms, work.vs, anchors, c, **more)
    else:
        for part in (slice(i, i + 1) for i in range(len(work.thetas))):
            lists = (work.thetas[part], grads[part], work.ms[part], work.vs[part])
            of_part = {name: xs[part] for name, xs in more.items()}
            work.kernel(*lists, anchors and anchors[part], c, **of_part)


BUCKET = 1 << 26
"""Bytes of anchors that are copied from the host at once."""


def _streamed(
    anchors: list[Tensor] | None, count: int, device: torch.device
) -> Iterator[tuple[slice, list[Tensor] | None]]:
    """Anchors on the device, some at a time if they are kept on the host: the next are copied meanwhile."""
    if anchors is None or device.type != "cuda" or all(x.is_cuda for x in anchors):
        yield slice(0, count), anchors
        return
    cuts, size = [0], 0
    for i, x in enumerate(anchors):
        size += x.nbytes
        if size >= BUCKET or i == count - 1:
            cuts.append(i + 1)
            size = 0
    parts = [slice(*cut) for cut in pairwise(cuts)]
    main, copies = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    used: list[torch.cuda.Event] = []

    def copy(k: int) -> tuple[list[Tensor], torch.cuda.Event]:
        if k >= 2:  # no more than two buckets of memory
            copies.wait_event(used[k - 2])
        else:
            copies.wait_stream(main)
        with torch.cuda.stream(copies):
            return [x.to(device, non_blocking=True) for x in anchors[parts[k]]], copies.record_event()

    ahead = copy(0)
    for k, part in enumerate(parts):
        stars, copied = ahead
        main.wait_event(copied)
        for x in stars:
            x.record_stream(main)
        yield part, stars
        used.append(main.record_event())
        if k + 1 < len(parts):
            ahead = copy(k + 1)


def _traced(work: Work) -> Coefficients:
    """Coefficients computed on the device: of shape (parameters,), or numbers where they do not change."""
    t = torch.stack(work.steps) + 1
    t = t.to(torch.float32 if t.device.type == "mps" else torch.float64)  # which has no other
    m, count = work.ms[0], len(work.steps)
    dtype = wide_dtype(m)
    c = coefficients(t, work.hp, work.lr, work.anchored, xp=torch)
    return Coefficients(*(x.to(m.device, dtype).expand(count) if isinstance(x, Tensor) else x for x in c))


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


def _pick(c: Coefficients, index: int) -> Coefficients:
    """The coefficients of one parameter."""
    return Coefficients(*(x[index] if isinstance(x, list) else x for x in c))
