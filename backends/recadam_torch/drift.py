"""How far the weights are from their anchors, what pulls them, and the weights in between."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recadam_core import Coefficients, Hyperparameters, RecAdamError, coefficients
from recadam_core.annealing import annealed_weights
from recadam_core.arrays import check_named
from recadam_core.errors import check_number

from .anchors import anchor_of, from_file
from .memory import reshaped, wide_dtype
from .settings import named
from .shards import is_wrapper, local, summed

__all__ = ["Drift", "at_anchors", "drift_of", "exchanged", "weights_between"]


class Drift(NamedTuple):
    """How far a parameter is from its anchor, and what pulls it.

    Example:
        >>> from recadam_torch import RecAdam
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> RecAdam([("w", w)], anchors={"w": torch.tensor([4.0])}).drift().relative
        0.75
    """

    name: str  # of the parameter; empty for all together
    distance: float  # Euclidean, to the anchor; NaN where that was freed
    relative: float  # distance / norm of the anchor
    pull_share: float  # of the last update: norm of the pull / (that + norm of the task's step)
    task: float  # task weight of the last step
    recall: float  # recall weight of the last step
    rate: float  # lr * gamma
    parameters: Mapping[str, Drift] = {}  # each by name, in the figures of all together


def drift_of(
    pairs: Iterable[tuple[str, Tensor]],
    states: Mapping[Tensor, dict[str, Any]],
    last: Mapping[Tensor, tuple[Hyperparameters, float, bool]],
) -> Drift:
    """The drift of parameters, from their states and what they were last stepped with."""
    unknown = (math.nan, math.nan, math.nan)
    parts: list[Tensor] = []
    owners: list[Tensor] = []
    weights: list[tuple[str, float, float, float]] = []  # name, task, recall, rate
    for name, p in pairs:
        state = states[p]
        if state.get("anchor") is None:
            continue
        if state["anchor"].shape != p.shape:
            raise reshaped(name, p, "anchor", state["anchor"])
        if p.is_meta:
            raise RecAdamError(f"drift: parameter {name!r} is on the meta device and has no values")
        c, figures = None, unknown
        if p in last:
            t, (hp, lr, anchored) = int(state["step"]), last[p]
            task, recall = annealed_weights(hp.annealing, t) if anchored else (1.0, 0.0)
            figures = task, recall, lr * hp.gamma
            with contextlib.suppress(RecAdamError):  # one that diverges, as the device does not refuse
                c = coefficients(t, hp, lr, anchored)
        weights.append((name, *figures))
        parts += _squares(p, state, c)
        owners += [p] * 4
    if not weights:
        return Drift("", math.nan, math.nan, math.nan, *unknown)
    sums = torch.tensor([float(x) for x in summed(parts, owners)], dtype=torch.float64, device="cpu")
    rows = sums.reshape(-1, 4)
    each = {name: _figures(name, row, *some) for (name, *some), row in zip(weights, rows, strict=True)}
    stepped = next((tuple(some) for _, *some in weights if some[0] == some[0]), unknown)
    total = rows.sum(0) if stepped is unknown else rows.nansum(0)
    return _figures("", total, *stepped)._replace(parameters=each)


def _squares(p: Tensor, state: dict[str, Any], c: Coefficients | None) -> list[Tensor]:
    """Sums of squares over this process's part: distance, anchor, the last pull, the last task step."""
    like = local(state.get("exp_avg", p))
    dtype = wide_dtype(like)
    theta, star = (local(x).to(like.device, dtype) for x in (p, state["anchor"]))
    terms = [theta - star, star]
    if c is None or abs(1 - c.pull - c.decay) < 1e-3:  # too little is left of where it stood
        terms += [torch.full_like(theta, torch.nan)] * 2
    else:
        m, v = like, local(state["exp_avg_sq"])
        adam = c.step * (m / (v.sqrt() + c.eps))
        pull = c.pull * local(state["importance"]).to(m.dtype) if "importance" in state else c.pull
        before = (theta - pull * star + adam) / (1 - pull - c.decay)
        terms += [pull * (star - before), adam]
    return [x.square().sum(dtype=torch.float64) for x in terms]


def _figures(name: str, sums: Tensor, task: float, recall: float, rate: float) -> Drift:
    distance, norm, pull, adam = sums.sqrt().tolist()
    share = 0.0 if pull + adam == 0 else pull / (pull + adam)
    return Drift(name, distance, distance / norm if norm else float("inf"), share, task, recall, rate)


def weights_between(
    groups: Iterable[Mapping[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
    files: Collection[str],
    alpha: float,
    anchors: Mapping[str, Tensor] | None,
) -> dict[Tensor, Tensor]:
    """What `RecAdam.interpolate` returns, by parameter; freed anchors are read again from `files`."""
    check_number("interpolate", "alpha", alpha)
    if anchors is not None:
        check_named("anchors", anchors)
    between = {}
    for group in groups:
        pairs = named(group)
        freed = {p: i for i, (_, p) in enumerate(pairs) if states[p].get("anchor", p) is None}
        again: dict[Tensor, Tensor | None] = {}
        if anchors is not None:
            again = {p: anchor_of(anchors, pairs[i][0], p) for p, i in freed.items()}
        elif freed:
            read = from_file(group, list(freed.items()), files).items()
            again = {p: x["anchor"] for p, x in read if x["anchor_hash"] == states[p]["anchor_hash"]}
        for name, p in pairs:
            anchor = again.get(p) if p in freed else states[p].get("anchor")
            if p in freed and anchor is None:
                raise RecAdamError(
                    f"interpolate: the anchor of {name!r} was freed, and is not to be had again; "
                    "give the pretrained weights as anchors=..."
                )
            new = p.detach().clone()
            if anchor is not None:
                if anchor.shape != p.shape:
                    raise reshaped(name, p, "anchor", anchor)
                mine, star = local(new), local(anchor).to(p.device)
                wide = wide_dtype(p)
                if alpha != 1:  # at the ends exactly, whatever is at the other
                    part = alpha * mine.to(wide) if alpha else 0.0
                    mine.copy_((1 - alpha) * star.to(wide) + part)
            between[p] = new
    return between


@contextlib.contextmanager
def at_anchors(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Parameters with the values of their anchors, for as long as the context lasts."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RecAdamError("at_anchors: a CUDA graph is being captured, which would keep the weights' places")
    back: list[Callable[[], None]] = []
    try:
        for p, anchor in pairs:
            back.append(_placed(p, anchor))
        yield
    finally:
        for put in back:
            put()


@torch.no_grad()
def _placed(p: Tensor, anchor: Tensor) -> Callable[[], None]:
    """Put an anchor in its parameter's place; what puts the parameter back."""
    mine, star = local(p), local(anchor)
    alike = mine.dtype == star.dtype and mine.device == star.device
    if alike and p is mine and not is_wrapper(p) and mine.stride() == star.stride():
        own = p.data

        def put_back() -> None:
            p.data = own

        p.data = star
    elif alike:  # others, as FSDP, know where a part lies in memory

        @torch.no_grad()
        def put_back() -> None:
            before = mine.clone()
            mine.copy_(star)
            star.copy_(before)

        put_back()
    else:
        kept = mine.to(star.device, copy=True)

        @torch.no_grad()
        def put_back() -> None:
            mine.copy_(kept)

        mine.copy_(star)
    return put_back


@contextlib.contextmanager
def exchanged(weights: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Parameters with other weights, for as long as the context lasts."""
    olds = {p: local(p).detach().clone() for p in weights}
    try:
        _put(weights)
        yield
    finally:
        _put(olds)


@torch.no_grad()
def _put(weights: Mapping[Tensor, Tensor]) -> None:
    for p, x in weights.items():
        local(p).copy_(local(x))
