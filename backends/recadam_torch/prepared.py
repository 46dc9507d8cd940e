"""Groups that are stepped again: what was looked up before is only held against what is there now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

import torch
from torch import Tensor

from recadam_core import coefficients

from .settings import Policy
from .stepping import Work

__all__ = ["Prepared"]

_dtype = attrgetter("dtype")
_layout = attrgetter("layout")
_grad = attrgetter("grad")


class Prepared:
    """The work of the last step of groups, for as long as their parameters and states are the same objects.

    A thousand small parameters cost more to look up than to step.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], policy: Policy, work: Work, states: list[dict[str, Any]]
    ) -> None:
        keys = ("step", "exp_avg", "exp_avg_sq", "anchor", "importance", "residual")
        entries = [methodcaller("get", key) for key in keys]
        self._held: list[tuple[Any, list[Any]]] = [(entry, list(map(entry, states))) for entry in entries]
        self._dtypes = {p.dtype for p in work.params}
        self._groups, self._policy, self._states = list(groups), policy, states
        self._work = work._replace(grads=[])

    @staticmethod
    def may_be(groups: Sequence[Mapping[str, Any]], work: Work) -> bool:
        """Whether this is work that can be kept: one pass over all parameters of the groups, none sharded."""
        whole = len(work.params) == sum(len(group["params"]) for group in groups)
        # Kernels that look at all that they get, which are the tensors themselves.
        looks = work.fused in ("numba", "triton") and work.ways["rounding"] == "nearest"
        plain = looks and not work.ways["maximize"] and all(map(is_, work.params, work.thetas))
        return whole and plain and work.t is not None

    def again(
        self,
        groups: Sequence[Mapping[str, Any]],
        policy: Policy,
        rate: float | None,
        state: Mapping[Tensor, Any] | None,
    ) -> Work | None:
        """The work of the next step; None when anything is not as it was."""
        work = self._work
        params = list(chain.from_iterable(group["params"] for group in groups))
        same = (
            policy is self._policy
            and len(groups) == len(self._groups)
            and all(map(is_, groups, self._groups))
            and len(params) == len(work.params)
            and all(map(is_, params, work.params))
            and set(map(_dtype, params)) == self._dtypes
            and (state is None or all(map(is_, map(state.get, params), self._states)))
            and all(all(map(is_, map(get, self._states), held)) for get, held in self._held)
        )
        if not same:
            return None
        grads = list(map(_grad, params))
        if any(g is None for g in grads) or set(map(_layout, grads)) != {torch.strided}:
            return None
        steps = set(map(Tensor.item, work.steps))
        if len(steps) > 1:
            return None
        t = int(steps.pop()) + 1
        c = coefficients(t, policy.hp, rate, work.anchored)
        if c.recall and work.anchors is None:
            return None
        return work._replace(grads=grads, t=t, lr=rate, c=c, release=policy.release())
