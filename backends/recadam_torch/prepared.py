"""A group that is stepped again: what was looked up before is only held against what is there now."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter, is_, itemgetter, methodcaller
from typing import Any

import torch
from torch import Tensor

from recadam_core import Hyperparameters, coefficients

from .stepping import Work

__all__ = ["Prepared"]

_FLAGS = ("maximize", "rounding", "fused", "foreach", "exact", "capturable", "differentiable", "anchored")


_dtype_and_device = attrgetter("dtype", "device")


def _residual(state: Mapping[str, Any]) -> Any:
    return state.get("residual")


class Prepared:
    """The work of a group's last step, for as long as its parameters and their states are the same objects.

    A thousand small parameters cost more to look up than to step. Step counts become views of one tensor, so
    that all are counted up, and read, at once.

    Args:
        group: the group.
        work: the last step's, of all of its parameters.
        states: their states.
    """

    def __init__(self, group: Mapping[str, Any], work: Work, states: list[dict[str, Any]]) -> None:
        with torch.inference_mode(False):  # these outlive it
            first = float(work.t or 0) - 1
            self._steps = torch.full((len(states),), first, dtype=torch.float32, device="cpu")
        for state, step in zip(states, self._steps.unbind(), strict=True):
            state["step"].data = step  # the tensor stays the same one, for those who hold it
        keys = ["step", "exp_avg", "exp_avg_sq", *(["anchor"] if work.anchored else [])]
        self._held: list[tuple[Any, list[Any]]] = [
            (methodcaller("get", key), [state[key] for state in states]) for key in keys
        ]
        self._held.append((_residual, list(map(_residual, states))))
        self._kind = {(p.dtype, p.device) for p in work.params}
        self._places = list(map(Tensor.data_ptr, self._held[0][1]))
        self._states, self._flags = states, itemgetter(*_FLAGS)(group)
        self._all: list[Any] = []
        self._work = work._replace(grads=[], steps=[self._steps])

    @staticmethod
    def may_be(group: Mapping[str, Any], work: Work) -> bool:
        """Whether this is work that can be kept: one pass over all parameters of the group, none sharded."""
        whole = len(work.params) == len(group["params"]) and all(map(is_, work.params, work.thetas))
        return whole and bool(work.fused) and work.t is not None

    def again(
        self, group: Mapping[str, Any], state: Mapping[Tensor, Any], hp: Hyperparameters, rate: Any
    ) -> Work | None:
        """The work of the next step; None when anything is not as it was.

        Args:
            group: the group.
            state: the optimizer's.
            hp: the group's policy.
            rate: its learning rate.
        """
        work, params = self._work, group["params"]
        if len(state) != len(self._all) or not all(map(is_, state.values(), self._all)):
            # Looking up a thousand tensors takes its time: so only where an entry is another one.
            if not all(map(is_, map(state.get, params), self._states)):
                return None
            self._all = list(state.values())
        same = (
            len(params) == len(work.params)
            and all(map(is_, params, work.params))
            and set(map(_dtype_and_device, params)) == self._kind
            and itemgetter(*_FLAGS)(group) == self._flags
            and all(all(map(is_, map(get, self._states), held)) for get, held in self._held)
            and list(map(Tensor.data_ptr, self._held[0][1])) == self._places
        )
        if not same:
            return None
        grads = [p.grad for p in params]
        steps = self._steps.numpy()
        if any(g is None for g in grads) or {g.layout for g in grads} != {torch.strided}:
            return None
        t = int(steps[0]) + 1
        if steps.min() != steps.max():
            return None
        c = coefficients(t, hp, rate, work.anchored)
        if c.recall and work.anchors is None:
            return None
        return work._replace(grads=grads, t=t, hp=hp, lr=rate, c=c)
