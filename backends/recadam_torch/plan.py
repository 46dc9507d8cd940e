"""What a step has to do: lists of parameters that share their coefficients, all of it looked at before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

import torch
from torch import Tensor

from recadam_core import Hyperparameters, RecAdamError, coefficients
from recadam_core.errors import shown
from recadam_core.importance import check_weighable

from .kernels import chosen_fused, fused_kernel, kernel_
from .matching import bare
from .memory import is_capturing
from .rounding import residual_of
from .settings import Policies, Policy, named, rate_of
from .shards import is_wrapper, local
from .staging import Staging
from .stepping import Work, check_alike, check_written, looked_at

__all__ = ["Planner", "steps_taken"]


class Planner:
    """Which parameters are stepped together, and how; what was looked up for one step serves the next."""

    def __init__(self) -> None:
        self._policies = Policies()
        self._prepared: dict[int, LastStep] = {}
        self._seen: list[Any] = []
        self._kernels: dict[Any, Callable[..., None]] = {}
        self._staging: dict[torch.device, Staging] = {}
        # What was stepped last: of each list of parameters, by the first of them.
        self._last: dict[Tensor, tuple[list[Tensor], Hyperparameters, Any, bool]] = {}

    def __reduce__(self) -> Any:
        return Planner, ()  # copies look up everything anew

    def plan(
        self,
        groups: list[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        settle: Callable[[], None],
        compiling: bool,
        scaled: bool = False,
    ) -> list[Work]:
        """The parameters that have a gradient, in lists that share their coefficients; all of it checked.

        `settle` is called, once, before anything is looked up anew; `scaled` says that gradients are, still.
        """
        same = len(state) == len(self._seen) and all(map(is_, state.values(), self._seen))
        alike: dict[Any, tuple[Policy, float | None, list[dict[str, Any]]]] = {}
        capturing = not compiling and is_capturing(p for group in groups for p in group["params"][:1])
        for group, policy in zip(groups, self._policies.of(groups), strict=True):
            if capturing and not policy.ways["capturable"]:
                raise RecAdamError(
                    "RecAdam: a CUDA graph is being captured, and would take this one step again and again; "
                    "give capturable=True"
                )
            rate = rate_of(group["lr"], reads=not policy.ways["capturable"])
            learned = isinstance(group["lr"], Tensor) and group["lr"].requires_grad
            # Groups of one policy and rate are stepped as one; a rate that is on the device is a group's own.
            key = (id(policy), id(group) if rate is None or learned else rate)
            alike.setdefault(key, (policy, rate, []))[2].append(group)
        before, self._prepared = self._prepared, {}
        every: list[Work] = []
        settled = False
        for policy, rate, some in alike.values():
            prepared = None if compiling else before.get(id(some[0]))
            work = prepared.again(some, policy, rate, None if same else state) if prepared else None
            if prepared is not None and work is not None:
                self._prepared[id(some[0])] = prepared
                every.append(work)
                continue
            if not settled:
                settle()
                settled = True
            every += self._anew(some, policy, rate, state, compiling)
        self._seen = list(state.values())
        return every if compiling else [looked_at(work, scaled) for work in every]

    def remember(self, work: list[Work]) -> None:
        """Keep of a step what its figures are found from."""
        for some in work:
            # No tensors of the step: they would outlive it. The others' stay: DeepSpeed steps group by group.
            lr = some.lr.detach() if isinstance(some.lr, Tensor) else some.lr
            self._last.pop(some.params[0], None)
            self._last[some.params[0]] = some.params, some.hp, lr, some.anchored

    def last(self) -> dict[Tensor, tuple[Hyperparameters, float, bool]]:
        """Of each parameter that was stepped: its policy, its learning rate, and whether it was anchored."""
        return {p: (hp, float(lr), on) for params, hp, lr, on in self._last.values() for p in params}

    def forget(self) -> None:
        """Look up everything anew at the next step."""
        self._prepared.clear()

    def _anew(
        self,
        groups: list[dict[str, Any]],
        policy: Policy,
        rate: float | None,
        state: Mapping[Tensor, dict[str, Any]],
        compiling: bool,
    ) -> list[Work]:
        """The work of groups that share policy and rate, looked up anew."""
        hp, ways = policy.hp, policy.ways
        lr = groups[0]["lr"]
        learned = isinstance(lr, Tensor) and lr.requires_grad
        traced = compiling or ways["capturable"] or (ways["differentiable"] and learned)
        lists: dict[Any, tuple[list[str], list[Tensor]]] = {}
        for name, p in chain.from_iterable(map(named, groups)):
            if p.grad is None:
                continue
            _check_steppable(name, p, state[p], ways)
            t = None if ways["capturable"] else steps_taken(name, state[p]["step"]) + 1
            anchored = "anchor" in state[p] and ways["anchored"]
            freed = anchored and state[p]["anchor"] is None
            weighed = anchored and state[p].get("importance") is not None
            if weighed:
                check_weighable(hp.form)
            key = (t, anchored, freed, p.dtype, p.device, weighed, is_wrapper(p))
            names, params = lists.setdefault(key, ([], []))
            names.append(bare(name))
            params.append(p)
        if traced:
            lr = _double(lr)
        every = []
        for i, (key, (names, params)) in enumerate(lists.items()):
            t, anchored, freed, _, device, weighed, wrapper = key
            # On the host where that knows the step, also if the device computes its own: this raises.
            c = None if t is None else coefficients(t, hp, rate, anchored)
            if freed and c is not None and c.pull:
                raise RecAdamError(
                    f"step {t}: the anchor was freed when the annealing had released it; "
                    "make a new optimizer to pull again"
                )
            if traced:  # numbers that change would be compiled anew
                t = c = None
            fused = "" if compiling else chosen_fused(ways, device)
            if wrapper and fused:
                if ways["fused"]:
                    raise RecAdamError(
                        f"parameter {names[0]!r} is a {type(params[0]).__name__}, whose memory one pass "
                        "cannot walk; give fused=False"
                    )
                fused = ""
            if wrapper and ways["exact"] and not traced and device.type == "cpu":
                raise RecAdamError(
                    f"parameter {names[0]!r} is a {type(params[0]).__name__}, of which exact=True takes no "
                    "root; leave exact out"
                )
            if traced and fused != "triton":  # which alone takes coefficients from the device
                fused = ""
            kernel: Callable[..., None] = partial(kernel_, exact=ways["exact"] and not traced)
            if fused:
                kernel = self._kernel(fused, (id(groups[0]), i))
            states = [state[p] for p in params]
            work = Work(
                params=params,
                names=names,
                thetas=[local(p) for p in params],
                grads=[local(p.grad, p) for p in params if p.grad is not None],
                ms=[local(s["exp_avg"]) for s in states],
                vs=[local(s["exp_avg_sq"]) for s in states],
                anchors=[local(s["anchor"]) for s in states] if anchored and not freed else None,
                importances=[local(s["importance"]) for s in states] if weighed else None,
                residuals=[residual_of(p, s, ways) for p, s in zip(params, states, strict=True)],
                steps=[s["step"] for s in states],
                t=t,
                hp=hp,
                lr=lr if traced else rate,
                c=c,
                anchored=anchored,
                ways=ways,
                release=policy.release(),
                kernel=kernel,
                fused=fused,
                together=bool(fused or traced or _by_lists(ways, device)),
            )
            if work.anchors and device.type == "cuda" and not compiling and not work.anchors[0].is_cuda:
                if device not in self._staging:
                    self._staging[device] = Staging(device)
                work = work._replace(staging=self._staging[device])
            check_alike(work)
            check_written(work)
            if len(lists) == 1 and LastStep.may_be(groups, work):
                self._prepared[id(groups[0])] = LastStep(groups, policy, work, states)
            every.append(work)
        return every

    def _kernel(self, fused: str, key: Any) -> Callable[..., None]:
        """One-pass kernels remember the list that they step: in one step each list has its own."""
        if (fused, key) not in self._kernels:
            self._kernels[fused, key] = fused_kernel(fused)
        return self._kernels[fused, key]


class LastStep:
    """The work of the last step of groups, for as long as their parameters and states are the same objects.

    A thousand small parameters cost three times more to look up than to step.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], policy: Policy, work: Work, states: list[dict[str, Any]]
    ) -> None:
        keys = ("step", "exp_avg", "exp_avg_sq", "anchor", "importance", "residual")
        readers = [methodcaller("get", key) for key in keys]
        self._entries: list[tuple[Any, list[Any]]] = [(read, list(map(read, states))) for read in readers]
        self._dtypes = {p.dtype for p in work.params}
        self._groups, self._policy, self._states = list(groups), policy, states
        self._work = work._replace(grads=[])

    @staticmethod
    def may_be(groups: Sequence[Mapping[str, Any]], work: Work) -> bool:
        """Whether this is work that can be kept: one pass over all parameters of the groups, none sharded."""
        whole = len(work.params) == sum(len(group["params"]) for group in groups)
        rounding, turned = work.ways["rounding"], work.ways["maximize"]
        # Kernels that look at all that they get, which are the tensors themselves.
        looks = {
            "numba": rounding == "nearest" and not turned,
            "triton": rounding != "compensated" and not work.staging,
        }.get(work.fused, False)
        return whole and looks and all(map(is_, work.params, work.thetas))

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
            and all(all(map(is_, map(read, self._states), entries)) for read, entries in self._entries)
        )
        if not same:
            return None
        grads = list(map(_grad, params))
        if any(g is None for g in grads) or set(map(_layout, grads)) != {torch.strided}:
            return None
        if work.t is None:
            return work._replace(grads=grads, lr=_double(groups[0]["lr"]), release=policy.release())
        steps = set(map(Tensor.item, work.steps))
        if len(steps) > 1:
            return None
        t = int(steps.pop()) + 1
        c = coefficients(t, policy.hp, rate, work.anchored)
        if c.pull and work.anchors is None:
            return None
        return work._replace(grads=grads, t=t, lr=rate, c=c, release=policy.release())


def _double(lr: Any) -> Tensor:
    """A learning rate as a tensor: a number that changed would be compiled anew."""
    rate: Tensor = lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu")
    return rate.double()


_dtype, _layout, _grad = map(attrgetter, ("dtype", "layout", "grad"))


def _check_steppable(name: str, p: Tensor, state: Mapping[str, Any], ways: Mapping[str, Any]) -> None:
    """Raise for a parameter whose gradient, place in a graph, or dtype lets it not be stepped."""
    grad: Any = p.grad
    if grad.layout != torch.strided:
        what = "sparse" if grad.is_sparse else f"of layout {grad.layout}"
        raise RecAdamError(f"gradient of {name!r} is {what}; RecAdam needs dense gradients")
    if ways["differentiable"] and p.is_leaf and p.requires_grad and torch.is_grad_enabled():
        raise RecAdamError(
            f"parameter {name!r} is a leaf, which autograd lets nobody step; give what clone() "
            "makes of it, or leave differentiable out"
        )
    if p.dtype == torch.float64 != state["exp_avg"].dtype or not p.is_floating_point():
        raise RecAdamError(
            f"parameter {name!r} is {p.dtype} and was {state['exp_avg'].dtype}; make a new optimizer"
        )


def _by_lists(ways: Mapping[str, Any], device: torch.device) -> bool:
    """Whether the kernel gets all tensors at once, as it does by default on CUDA."""
    return bool(ways["foreach"] or (ways["foreach"] is None and device.type == "cuda"))


def steps_taken(name: str, step: Tensor) -> int:
    """The steps that a parameter has taken."""
    try:
        return int(step)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise RecAdamError(
            f"optimizer.state: the step of {name!r} is {shown(step)}, no count; make a new optimizer"
        ) from None
