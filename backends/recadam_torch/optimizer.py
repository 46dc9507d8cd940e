"""RecAdam as a `torch.optim.Optimizer`."""

from __future__ import annotations

import contextlib
import difflib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

from recadam_core import Hyperparameters, RecAdamError, Sigmoid, coefficients
from recadam_core.annealing import annealed_weights
from recadam_core.arrays import check_named
from recadam_core.errors import check_flag, check_number, shown, unknown
from recadam_core.importance import check_weighable
from recadam_core.optimizer import check_anchors

from .anchors import Anchors, bare, check_made
from .checkpoints import (
    Entry,
    anchor_of,
    blank,
    checked,
    from_file,
    no_hash,
    resumed,
    states_of,
    take_hashes,
    weigh,
)
from .fused import chosen_fused, fused_kernel
from .kernel import kernel_
from .prepared import Prepared
from .settings import FLAGS, FROM, SETTINGS, Policies, Policy, check_parameter, named, rate_of, settled
from .shards import in_memory, is_sharded, is_wrapper, like, local, summed
from .sources import Mapped, is_wide, mapped_files
from .stepping import Work, check_alike, check_written, execute, looked_at
from .telemetry import Drift, drift_of, squares
from .zero import forget, is_flat_part, joined

__all__ = ["RecAdam"]

F32, F64 = torch.float32, torch.float64
_KNOWN = {"params", "param_names", "anchors", "importance", *SETTINGS}


class RecAdam(Optimizer):
    r"""Adam with a pull towards pretrained weights that is annealed away; a drop-in for AdamW.

    Math:
        $\theta \leftarrow \theta + r(\theta^* - \theta) - s\,m'/(\sqrt{v'}+\varepsilon) - d\,\theta$,
        with the coefficients of `recadam_core.coefficients`.

    Args:
        params: parameters, groups of them (as `param_groups` makes), or `model.named_parameters()`.
        lr: learning rate; a float or a 0-d tensor. Schedulers set it as in every torch optimizer.
        betas: decay rates of Adam's moments.
        eps: under Adam's fraction.
        weight_decay: decoupled decay towards zero. It works against the anchor: keep 0 for
            pretrained weights.
        gamma: strength of the pull; lr * gamma is the share of the way home in one step.
        annealing: `Sigmoid`, `Linear`, `Constant`, or any object with their method `weights`.
        anchors: pretrained values by parameter name: `Anchors`, or a state dict, which is copied. A
            parameter without one is a new head and gets plain Adam(W). None anchors every parameter
            where training starts, except in groups that say `"anchored": False`: where it is now; or at
            the first step, with a warning, if it was overwritten before, as by DDP's broadcast.
        importance: how much each weight matters to the old task, by parameter name: tensors in [0, 1] of
            the parameters' shapes, by which the pull is multiplied (as EWC has the Fisher information). Every
            anchored parameter has one, or none does.
        bias_correction: whether the moments are corrected for their start at zero.
        form: "decoupled" (the paper's algorithm), "released" (the authors' code) or "proximal"
            (stable at any lr * gamma).
        foreach: whether to step over lists of tensors; None does so on CUDA. Costs memory for two
            more copies of the parameters, changes no bit.
        fused: whether to step in one pass over memory: by Triton on CUDA, by numba or else torch.compile on
            the CPU; or one of "triton", "numba", "compiled". None does so by numba, where it is installed and
            no other flag asks for another way. Changes no bit of what `exact` gives.
        exact: whether to give the bits of `recadam_core.update`: on the CPU, where torch's square root is
            not correctly rounded, NumPy takes it. Slower there; on other devices and with `fused` free.
        maximize: whether to climb instead of descend; the pull stays a pull.
        capturable: whether step counts and coefficients stay on the parameters' device, so that a CUDA
            graph can hold the step. Anchors are not freed then, and a diverging pull is not refused.
        differentiable: whether autograd may go through the step, as in meta-learning.
        rounding: of 16-bit parameters: "nearest"; "stochastic" (bfloat16: up or down by chance, right on
            average); or "compensated" (what is lost is kept in the state, two bytes a parameter).
        save_anchors: whether checkpoints hold the anchors. Otherwise they hold a hash of each, and the
            name of the file it came from.

    Every argument but `anchors` and `params` may differ from group to group.

    Raises:
        RecAdamError: for a value outside its range, an anchor that matches no parameter or has
            another shape, complex or integer parameters, sparse gradients, or a diverging pull. A
            step that is refused so has changed nothing.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = RecAdam(model.named_parameters(), lr=1e-3, gamma=100.0)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['anchor', 'anchor_hash', 'exp_avg', 'exp_avg_sq', 'step']

    Source: arXiv 2004.12651, Algorithm 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma: float = 5000.0,
        annealing: Any = None,
        anchors: Mapping[str, Tensor] | None = None,
        importance: Mapping[str, Tensor] | None = None,
        bias_correction: bool = True,
        form: str = "decoupled",
        foreach: bool | None = None,
        fused: bool | str | None = None,
        exact: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        rounding: str = "nearest",
        save_anchors: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "gamma": gamma,
            "annealing": Sigmoid() if annealing is None else annealing,
            "bias_correction": bias_correction,
            "form": form,
            "anchored": True,
            "foreach": foreach,
            "fused": fused,
            "exact": exact,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "rounding": rounding,
            "save_anchors": save_anchors,
            **{name: FLAGS[name] for name in FROM},
        }
        defaults = settled(defaults)
        # Read by add_param_group, which the base class calls for each group.
        self._anchors, self._importance = anchors, importance
        self._names: dict[Tensor, str] = {}
        self._parts: dict[Tensor, list[Tensor]] = {}
        # The parameters' states as they were left, which `state` is held against: others write there, too.
        self._held: dict[Tensor, dict[str, Any]] = {}
        self._lent = False  # whether someone may hold states from before the first step
        self._files: set[str] = set()  # that the user took anchors from
        # Anchors that are copies of their parameters, until these are stepped.
        self._own: dict[Tensor, Tensor] = {}
        self._hashed: dict[Tensor, tuple[Any, ...]] = {}  # what each anchor was when it got its hash
        self._mapped: set[Mapped] | None = None  # files whose pages are anchors; None to look for them
        self._interpolates = False  # whether the weights are others for now
        self._forget()
        super().__init__(params, defaults)
        self._anchors = self._importance = None
        if anchors is not None:
            anchored = [group for group in self.param_groups if group["anchored"]]
            names = list(chain.from_iterable(group["param_names"] for group in anchored))
            shapes = [p.shape for group in anchored for p in group["params"]]
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise RecAdamError(f"anchors: two parameters are named {twice!r}; give the groups full names")
            if not isinstance(anchors, Anchors):
                check_anchors(dict(zip(names, shapes, strict=True)), anchors)

    def __getstate__(self) -> dict[str, Any]:
        """What pickles and copies hold."""
        self._check_files()
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_own": self._own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle."""
        super().__setstate__(state)
        self._anchors = self._importance = None
        self._forget()
        # Loading a state, which calls this too, changes nothing of these.
        self._parts = self.__dict__.get("_parts", {})
        self._own = self.__dict__.get("_own", {})
        self._interpolates = self.__dict__.get("_interpolates", False)
        self._files = self.__dict__.get("_files", {g.get("anchor_source", "") for g in self.param_groups})
        self._names, self._lent, self._mapped = {}, False, None
        self._held = {p: self.state[p] for g in self.param_groups for p in g["params"] if p in self.state}
        self._hashed = {p: _identity(held.get("anchor")) for p, held in self._held.items()}
        for held in self._held.values():
            if "anchor" in held:
                held.setdefault("anchor_hash", no_hash()["anchor_hash"])
        for group in self.param_groups:
            for name, value in {"fused": None, **FLAGS}.items():
                group.setdefault(name, value)
            self._names.update(zip(group["params"], group.get("param_names", ()), strict=False))

    def _forget(self) -> None:
        """Start without anything that steps leave behind for those after them."""
        # What was stepped last: of each list of parameters, by the first of them.
        self._last: dict[Tensor, tuple[list[Tensor], Hyperparameters, Any, bool]] = {}
        self._policies = Policies()
        self._prepared: dict[int, Prepared] = {}
        self._states: list[Any] = []
        self._kernels: dict[Any, Callable[..., None]] = {}

    @torch.inference_mode(False)  # what is made here outlives it
    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, anchored where they are now unless the group says `"anchored": False`.

        Args:
            param_group: "params" and any setting of the constructor. With "anchors", pretrained
                values by name.

        Raises:
            RecAdamError: as the constructor; then nothing is added.
        """
        if not isinstance(param_group, Mapping) or "params" not in param_group:
            raise RecAdamError(
                f"RecAdam: a group is {shown(param_group)}; give a dict with its parameters under 'params'"
            )
        group = dict(param_group)
        for name in group.keys() - _KNOWN:  # others may keep words of their own in a group
            if isinstance(name, str) and difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.8):
                raise unknown("setting of a group:", name, _KNOWN)
        own, importance = group.pop("anchors", None), group.pop("importance", self._importance)
        settings = settled({**self.defaults, **group})
        group.update({name: settings[name] for name in group})
        for what, given in (("anchors", own), ("an importance", param_group.get("importance"))):
            if given is not None and not settings["anchored"]:
                raise RecAdamError(f"RecAdam: a group has {what} and says 'anchored': False; leave one out")
        anchors = self._anchors if own is None else own
        if anchors is not None:
            check_named("anchors", anchors)
        super().add_param_group(group)
        group = self.param_groups[-1]
        try:
            if isinstance(anchors, Anchors) and group["anchored"] and "param_names" in group:
                group.update(_provenance(anchors, group))
            states = self._initial_states(group, anchors)
            weigh(group, states, importance)
            if own is not None and not isinstance(own, Anchors):
                shapes = [p.shape for p in group["params"]]
                check_anchors(dict(zip(group["param_names"], shapes, strict=True)), own)
        except BaseException:
            self.param_groups.pop()
            raise
        for p, state in zip(group["params"], states, strict=True):
            self._put(p, state)
        self._files.add(group["anchor_source"])
        self._names.update(zip(group["params"], group.get("param_names", ()), strict=False))
        self._mapped = None
        if anchors is None:
            held = zip(group["params"], states, strict=True)
            self._own.update((p, state["anchor"]) for p, state in held if "anchor" in state)

    def _initial_states(self, group: dict[str, Any], anchors: Mapping[str, Tensor] | None) -> list[Any]:
        if anchors is not None and "param_names" not in group:
            raise RecAdamError(
                "anchors are matched by name; pass model.named_parameters() instead of model.parameters()"
            )
        states = [self._initial_state(name, p, group, anchors) for name, p in named(group)]
        # Where the hash takes all processes it is taken now, when all of them are here.
        take_hashes([state for state in states if is_sharded(state.get("anchor"))])
        return states

    def _initial_state(
        self, name: str, p: Tensor, group: dict[str, Any], anchors: Mapping[str, Tensor] | None
    ) -> dict[str, Any]:
        check_made(name, p)
        if not p.requires_grad and not is_wide(p):  # quantized weights
            raise RecAdamError(
                f"parameter {name!r} is frozen and has dtype {p.dtype}; leave it out, as param_groups does"
            )
        check_parameter(name, p, group)
        state = blank(p, group)
        _residual(p, state, group)
        anchor = anchor_of(anchors, name, p) if group["anchored"] else None
        if anchor is not None:
            rows = anchors.match(name).rows if isinstance(anchors, Anchors) else None
            state.update({"anchor": anchor, **no_hash(rows)})
        return state

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned; None without one.

        Raises:
            RecAdamError: when a gradient is sparse or the pull diverges; nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = self._plan(torch.compiler.is_compiling())
        # A GradScaler leaves these to optimizers that say they see to them.
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for some in work:
            execute(some, scale, found)
        self._finish(work)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler may leave to the step what it does without: no word of it goes to the host."""
        return all(
            group["capturable"]
            and group["rounding"] == "nearest"
            and chosen_fused(group, p.device) == "triton"
            for group in self.param_groups
            for p in group["params"]
        )

    # A compiler steps over these two: they look into dictionaries, which change. Torch marks its own methods
    # so; torch.compiler.disable would take two seconds of every import.

    @_disable_dynamo
    def _plan(self, compiling: bool) -> list[Work]:
        """The parameters that have a gradient, in lists that share their coefficients; all of it checked."""
        if self._interpolates:
            raise RecAdamError("RecAdam: the weights are interpolated; step after the context has ended")
        before = self._own and self._anchor_anew()
        try:
            return self._checked(compiling)
        except BaseException:
            if before:  # so that what is overwritten until the next is still seen
                self._own, anchors = before
                for p, (anchor, number) in anchors.items():
                    self._put(p, {**self.state[p], "anchor": anchor, "anchor_hash": number})
            raise

    def _checked(self, compiling: bool) -> list[Work]:
        self._check_files()
        same = len(self.state) == len(self._states) and all(map(is_, self.state.values(), self._states))
        alike: dict[Any, tuple[Policy, float | None, list[dict[str, Any]]]] = {}
        for group, policy in zip(self.param_groups, self._policies.of(self.param_groups), strict=True):
            rate = rate_of(group["lr"], reads=not policy.ways["capturable"])
            learned = isinstance(group["lr"], Tensor) and group["lr"].requires_grad
            # Groups of one policy and rate are stepped as one; a rate that is on the device is a group's own.
            key = (id(policy), id(group) if rate is None or learned else rate)
            alike.setdefault(key, (policy, rate, []))[2].append(group)
        before, self._prepared = self._prepared, {}
        found: list[Work] = []
        whole = False
        for policy, rate, groups in alike.values():
            prepared = None if compiling else before.get(id(groups[0]))
            work = prepared.again(groups, policy, rate, None if same else self.state) if prepared else None
            if prepared is not None and work is not None:
                self._prepared[id(groups[0])] = prepared
                found.append(work)
            else:
                if not whole:  # once for all of the groups
                    self._settle()
                whole = True
                found += self._planned(groups, policy, rate, compiling)
        self._states = list(self.state.values())
        return found if compiling else list(map(looked_at, found))

    @_disable_dynamo
    def _finish(self, work: list[Work]) -> None:
        """Free the anchors that the annealing has released."""
        for some in work:
            release = None if some.anchors is None or some.ways["capturable"] else some.release
            if release is None or (some.t is not None and some.t < release):
                continue
            released = [p for p in some.params if int(self.state[p]["step"]) >= release]
            take_hashes(self.state[p] for p in released)
            if released:
                self._prepared.clear()  # which hold them
            for p in released:
                self.state[p]["anchor"] = None
                forget(self._parts.get(p, ()), "anchor")
        for some in work:
            # No tensors of the step: they would outlive it. The others' stay: DeepSpeed steps group by group.
            lr = some.lr.detach() if isinstance(some.lr, Tensor) else some.lr
            self._last.pop(some.params[0], None)
            self._last[some.params[0]] = some.params, some.hp, lr, some.anchored

    def _kernel(self, fused: str, key: Any) -> Callable[..., None]:
        """One-pass kernels remember the list that they step: in one step each list has its own."""
        if (fused, key) not in self._kernels:
            self._kernels[fused, key] = fused_kernel(fused)
        return self._kernels[fused, key]

    def _planned(
        self, groups: list[dict[str, Any]], policy: Policy, rate: float | None, compiling: bool
    ) -> list[Work]:
        """The work of groups that share policy and rate, looked up anew."""
        hp, ways = policy.hp, policy.ways
        given = groups[0]["lr"]
        learned = isinstance(given, Tensor) and given.requires_grad
        traced = compiling or ways["capturable"] or (ways["differentiable"] and learned)
        lists: dict[Any, tuple[list[str], list[Tensor]]] = {}
        for name, p in chain.from_iterable(map(named, groups)):
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                what = "sparse" if p.grad.is_sparse else f"of layout {p.grad.layout}"
                raise RecAdamError(f"gradient of {name!r} is {what}; RecAdam needs dense gradients")
            state = self.state[p]
            if ways["differentiable"] and p.is_leaf and p.requires_grad and torch.is_grad_enabled():
                raise RecAdamError(
                    f"parameter {name!r} is a leaf, which autograd lets nobody step; give what clone() "
                    "makes of it, or leave differentiable out"
                )
            if p.dtype == torch.float64 != state["exp_avg"].dtype or not p.is_floating_point():
                raise RecAdamError(
                    f"parameter {name!r} is {p.dtype} and was {state['exp_avg'].dtype}; make a new optimizer"
                )
            t = None if ways["capturable"] else _taken(name, state["step"]) + 1
            anchored = "anchor" in state and ways["anchored"]
            freed = anchored and state["anchor"] is None
            weighed = anchored and state.get("importance") is not None
            if weighed:
                check_weighable(hp.form)
            key = (t, anchored, freed, p.dtype, p.device, weighed, is_wrapper(p))
            names, params = lists.setdefault(key, ([], []))
            names.append(bare(name))
            params.append(p)
        lr: Any = rate
        if traced:
            lr = given.double() if isinstance(given, Tensor) else torch.tensor(given, dtype=F64, device="cpu")
        found = []
        for i, ((t, anchored, freed, _, device, weighed, wrapper), (names, params)) in enumerate(
            lists.items()
        ):
            # On the host where that knows the step, also if the device computes its own: this raises.
            c = None if t is None else coefficients(t, hp, rate, anchored)
            if freed and c is not None and c.recall:
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
            if traced and fused != "triton":  # which alone takes coefficients from the device
                fused = ""
            kernel: Callable[..., None] = partial(kernel_, exact=ways["exact"] and not traced)
            if fused:
                kernel = self._kernel(fused, (id(groups[0]), i))
            lists_of_all = ways["foreach"] or (ways["foreach"] is None and device.type == "cuda")
            states = [self.state[p] for p in params]
            work = Work(
                params=params,
                names=names,
                thetas=[local(p) for p in params],
                grads=[local(p.grad, p) for p in params if p.grad is not None],
                ms=[local(state["exp_avg"]) for state in states],
                vs=[local(state["exp_avg_sq"]) for state in states],
                anchors=[local(state["anchor"]) for state in states] if anchored and not freed else None,
                importances=[local(state["importance"]) for state in states] if weighed else None,
                residuals=[_residual(p, state, ways) for p, state in zip(params, states, strict=True)],
                steps=[state["step"] for state in states],
                t=t,
                hp=hp,
                lr=lr,
                c=c,
                anchored=anchored,
                ways=ways,
                release=policy.release(),
                kernel=kernel,
                fused=fused,
                together=bool(fused or traced or lists_of_all),
            )
            check_alike(work)
            check_written(work)
            if len(lists) == 1 and Prepared.may_be(groups, work):
                self._prepared[id(groups[0])] = Prepared(groups, policy, work, states)
            found.append(work)
        return found

    # What others do to parameters and files between the making of the optimizer and its steps.

    @torch.no_grad()
    def _anchor_anew(self) -> Any:
        """At the first step, anchor where they are now the parameters that were overwritten until then.

        Returns what a step that is refused puts back: the anchors that were their parameters', and those that
        were taken anew, with their hashes.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        self._settle()
        pairs = [pair for group in self.param_groups for pair in named(group)]
        kept = [(n, p) for n, p in pairs if self._hashed[p] == _identity(self.state[p].get("anchor"))]
        held = [(name, p) for name, p in kept if _comparable(name, self._own.get(p), self.state[p], p)]
        counts = [(local(self.state[p]["anchor"]).to(p.dtype) != local(p)).sum() for _, p in held]
        # Of a parameter that is spread over processes all have to say the same.
        totals = summed(counts, [p for _, p in held])
        moved = [pair for pair, total in zip(held, totals, strict=True) if int(total)]
        anchors = {p: anchor_of(None, name, p) for name, p in moved}
        before = (
            dict(self._own),
            {p: (self.state[p]["anchor"], self.state[p]["anchor_hash"]) for p in anchors},
        )
        for p, anchor in anchors.items():
            del self.state[p]["anchor"], self.state[p]["anchor_hash"]
            if anchor is not None:
                self.state[p].update({"anchor": anchor, **no_hash()})
            self._hashed[p] = _identity(anchor)
        take_hashes([self.state[p] for p in anchors if is_sharded(p)])
        for _, p in pairs:
            self._own.pop(p, None)
        if moved:
            which = f"{moved[0][0]!r} and {len(moved) - 1} more were" if moved[1:] else f"{moved[0][0]!r} was"
            warnings.warn(
                f"RecAdam: {which} overwritten after the optimizer was made (by a wrapper's broadcast, or by "
                "loading), and anchored anew at the first step; to pull elsewhere give anchors=...",
                stacklevel=2,
            )
        return before

    def _check_files(self) -> None:
        """Raise if a file whose pages are anchors was written to."""
        if self._mapped is None or not all(file.intact() for file in self._mapped):
            groups = (group for group in self.param_groups if group.get("anchor_place") == "file")
            states = (self.state.get(p, {}) for group in groups for p in group["params"])
            self._mapped = mapped_files(s["anchor"] for s in states if s.get("anchor") is not None)
            for file in self._mapped:
                file.check()

    def _settle(self) -> None:
        """Let every parameter have its state, whole, and the optimizer alone hold what was not stepped."""
        self._check_files()
        held, params = self._held, [p for group in self.param_groups for p in group["params"]]
        if not (
            len(held) == len(params) == len(self.state)
            and all(map(is_, held, params))
            and all(map(is_, held.values(), self.state.values()))
            and all(map(_whole, held.values()))
        ):
            self._adopt()
            self._complete()
        if self._lent:  # as AdamW's states, which are not there before the first step
            self._lent = False
            with torch.inference_mode(False), torch.no_grad():
                for state in filter(_unstepped, self._held.values()):
                    state.update({k: x.clone() for k, x in state.items() if k in _MOVING and x is not None})

    def _adopt(self) -> None:
        """Give the states of parameters that are gone to those of the same names, sharded as those are."""
        current = {p for group in self.param_groups for p in group["params"]}
        orphans = {self._names.get(p): p for p in self._held if p not in current}
        for group in self.param_groups:
            lost = {name: orphans[name] for name in group.get("param_names", ()) if name in orphans}
            if is_flat_part(group["params"], list(lost.values())):
                flat = group["params"][0]
                name = next(iter(lost)) + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
                self._put(flat, joined(flat, {n: (p, self._held[p]) for n, p in lost.items()}))
                self._parts[flat] = list(lost.values())
                self._keep_own(flat, *lost.values())
                for p in lost.values():
                    self._drop(p)
                group["param_names"], self._names[flat] = [name], name
                continue
            if "param_names" in group and len(group["param_names"]) != len(group["params"]):
                raise RecAdamError(
                    f"a group was made of {len(group['param_names'])} parameters and has "
                    f"{len(group['params'])}: add some by add_param_group; or, if a wrapper flattened them, "
                    "use one that does not (FSDP2, ZeRO)"
                )
            for name, p in named(group):
                if p in self._held or self.state.get(p):
                    continue
                if name not in orphans:
                    raise RecAdamError(
                        f"parameter {name!r} has no state: the optimizer's parameters were replaced after it "
                        "was made; pass model.named_parameters(), or make it after the model is wrapped"
                    )
                old = self._drop(orphans[name])
                self._put(p, {key: _sharded_as(p, key, value) for key, value in old.items()})
                self._names[p] = name
                self._keep_own(p, orphans[name])

    def _keep_own(self, new: Tensor, *old: Tensor) -> None:
        """What takes the place of parameters that are their own anchors is its own, too."""
        if [p for p in old if self._own.pop(p, None) is not None]:
            self._own[new] = self.state[new]["anchor"]

    def _put(self, p: Tensor, state: dict[str, Any]) -> None:
        self.state[p] = self._held[p] = state
        self._hashed[p] = _identity(state.get("anchor"))

    def _drop(self, p: Tensor) -> dict[str, Any]:
        self.state.pop(p, None)
        self._names.pop(p, None)
        self._hashed.pop(p, None)
        return self._held.pop(p)

    def _complete(self) -> None:
        """Give the states that others have put in what those left out; raise where there is none."""
        found: dict[Tensor, dict[str, Any]] = {}
        for group in self.param_groups:
            entries = []
            for place, (name, p) in enumerate(named(group)):
                state, held = self.state.get(p), self._held.get(p, {})
                if not state:
                    raise RecAdamError(
                        f"parameter {name!r} has no state: it was cleared, and its anchor went with it; to "
                        "start a new task call reset_moments(), with reanchor=True to anchor it here"
                    )
                if state is not held or not _whole(state):
                    saved = checked("optimizer.state", name, p, state)
                    entries.append(Entry(name, p, place, saved, held))
            found.update(states_of("optimizer.state", group, entries, self._files)[0])
        for p, state in found.items():
            self._put(p, state)
            self._mapped = None
        self._held = {p: self.state[p] for group in self.param_groups for p in group["params"]}

    @torch.inference_mode(False)
    @torch.no_grad()
    def reset_moments(self, *, reanchor: bool = False) -> None:
        """Start anew from the weights as they are: moments, step counts and with them the annealing.

        What is done between tasks that follow one another; an optimizer whose state was cleared has no
        anchors, and its step is refused.

        Args:
            reanchor: whether anchored parameters are pulled to where they are now, as is right after a task
                that is to be kept. Otherwise their anchors stay, and freed ones are read again from the file
                that they came from. New heads stay without.

        Raises:
            RecAdamError: when an anchor was freed and cannot be read again, or a weight that is to be one is
                not finite; nothing is changed then.

        Example:
            >>> w = torch.nn.Parameter(torch.zeros(1))
            >>> optimizer = RecAdam([w])
            >>> w.data += 2  # the first task
            >>> optimizer.reset_moments(reanchor=True)
            >>> optimizer.state[w]["anchor"]
            tensor([2.])
        """
        check_flag("reset_moments", "reanchor", reanchor)
        if self._interpolates:
            raise RecAdamError(
                "reset_moments: the weights are interpolated; call it after the context has ended"
            )
        self._adopt()
        found: dict[Tensor, dict[str, Any]] = {}
        for group in self.param_groups:
            states = [self._held.get(p) or self.state.get(p, {}) for p in group["params"]]
            freed = {}
            for place, ((name, p), state) in enumerate(zip(named(group), states, strict=True)):
                if not state:
                    raise RecAdamError(
                        f"reset_moments: the state of {name!r} was emptied, and its anchor is lost; "
                        "make a new optimizer"
                    )
                found[p] = {**state, **blank(p, group)}
                if "anchor" in state and reanchor:
                    found[p].update(no_hash(), anchor=anchor_of(None, name, p))
                elif state.get("anchor", p) is None:
                    freed[p] = name, place
            again = from_file(group, [(p, place) for p, (_, place) in freed.items()], self._files)
            for p, (name, _) in freed.items():
                if p not in again or again[p]["anchor_hash"] != found[p]["anchor_hash"]:
                    raise RecAdamError(
                        f"reset_moments: the anchor of {name!r} was freed, and is not to be had again; "
                        "call it with reanchor=True, or make a new optimizer"
                    )
                found[p].update(again[p])
        take_hashes([state for state in found.values() if is_sharded(state.get("anchor"))])
        for p, state in found.items():
            self._put(p, state)
        for group in self.param_groups if reanchor else ():
            group.update({key: FLAGS[key] for key in FROM})
        self._last, self._prepared, self._lent, self._mapped = {}, {}, False, None

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """The state as plain tensors and scalars; for each anchor a hash, unless `save_anchors` is set.

        As AdamW's, it is no copy: what has been stepped moves on in it, and what has not been stays.
        """
        # As the last hook before and the first one after, so that users' hooks see what is saved.
        before = self.register_state_dict_pre_hook(lambda _: self._ready())
        after = self.register_state_dict_post_hook(lambda _, saved: self._lend(saved), prepend=True)
        try:
            return super().state_dict()
        finally:
            before.remove()
            after.remove()

    def _ready(self) -> None:
        self._settle()
        for p, state in self._held.items():
            now = _identity(state.get("anchor"))
            if now and now != self._hashed[p]:  # set by hand
                state["anchor_hash"].zero_()
                self._hashed[p] = now
        take_hashes(self._held.values())

    def _lend(self, saved: dict[str, Any]) -> None:
        """Leave the anchors out of what is saved, and remember that someone has it."""
        groups = {index: group for group in saved["param_groups"] for index in group["params"]}
        for index, state in saved["state"].items():
            if index in groups:
                keep = groups[index]["save_anchors"] and state.get("anchor") is not None
                state = {key: value for key, value in state.items() if key != "anchor" or keep}
                # Copies: distributed checkpoints are loaded into what this returns.
                state.update(
                    {key: state[key].clone() for key in ("anchor_hash", "anchor_rows") if key in state}
                )
                saved["state"][index] = state
        if any(map(_unstepped, self._held.values())):
            self._lent = True
            self._prepared.clear()  # whose steps do not settle first

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume where `state_dict()` was taken, bit for bit.

        Moments keep the dtype they were saved in; the base class would round the float32 ones of a 16-bit
        parameter. Anchors are this optimizer's own, if they are those of the checkpoint; else they are read
        again from the file that this optimizer's came from, or taken from the checkpoint if it has them. A
        file that the checkpoint alone names is not opened.

        Args:
            state_dict: what `state_dict()` returned. Frozen parameters may be missing.

        Raises:
            RecAdamError: when it is damaged, another optimizer's, of other parameters or of other anchors;
                nothing is loaded then.

        Warns:
            UserWarning: naming parameters that are trained, of which nothing was saved and others were.
        """
        if not isinstance(state_dict, Mapping):
            raise RecAdamError(
                f"load_state_dict: {type(state_dict).__name__}; give what RecAdam's state_dict() returned"
            )
        self._adopt()
        found: list[dict[Tensor, dict[str, Any]]] = []
        missing: dict[Tensor, str] = {}

        def check(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            groups, states, without = resumed(self, saved, self._held, self._files)
            found.append(states)
            missing.update(without)
            # All is checked, and made: the base class puts in the groups.
            return {"state": {}, "param_groups": groups}

        def fill(_: Optimizer) -> None:
            for p, state in found[-1].items():
                self._put(p, state)
            for p in missing:  # which may be tuned already
                self._own.pop(p, None)

        # As the last hook before and the first one after, so that users' hooks see and change what counts.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(fill, prepend=True)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            before.remove()
            after.remove()
        if missing:
            names = list(map(repr, missing.values()))
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            warnings.warn(
                f"load_state_dict: nothing was saved of {', '.join(names[:4])}{more}; "
                "moments and step counts start anew there",
                stacklevel=2,
            )

    # Telemetry.

    @torch.no_grad()
    def drift(self) -> Drift:
        r"""How far the weights are from their anchors, and what share the pull had in the last update.

        Math:
            The last step's pull $r(\theta^*-\theta)$ is found from where it led: with
            $a = s\,m'/(\sqrt{v'}+\varepsilon)$ it was $\theta = (\theta' - r\theta^* + a) / (1 - r - d)$, so
            that the step itself keeps no record and waits for nothing. The share is
            $\|r(\theta^*-\theta)\| / (\|r(\theta^*-\theta)\| + \|a\|)$.

        Returns:
            The figures of all anchored parameters together, and in `parameters` of each.

        Example:
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> optimizer = RecAdam([("w", w)], anchors={"w": torch.tensor([3.0, 4.0])})
            >>> optimizer.drift().distance
            5.0
        """
        self._settle()
        nothing = (math.nan, math.nan, math.nan)
        parts: list[Tensor] = []
        owners: list[Tensor] = []
        figures: list[tuple[str, tuple[float, float, float]]] = []
        last = {p: (hp, float(lr), on) for params, hp, lr, on in self._last.values() for p in params}
        for name, p in self._everything():
            state = self.state[p]
            if state.get("anchor") is None:
                continue
            _check_shape(name, p, state["anchor"])
            if p.is_meta:
                raise RecAdamError(f"drift: parameter {name!r} is on the meta device and has no values")
            c, figure = None, nothing
            if p in last:
                t, (hp, lr, anchored) = int(state["step"]), last[p]
                weights = annealed_weights(hp.annealing, t) if anchored else (1.0, 0.0)
                figure = (*weights, lr * hp.gamma)
                with contextlib.suppress(RecAdamError):  # one that diverges, as the device does not refuse
                    c = coefficients(t, hp, lr, anchored)
            parts += squares(p, state, c)
            owners += [p] * 4
            figures.append((name, figure))
        if not figures:
            return Drift("", math.nan, math.nan, math.nan, *nothing)
        told = [float(x) for x in summed(parts, owners)]
        sums = torch.tensor(told, dtype=F64, device="cpu").reshape(-1, 4)
        found = {
            name: drift_of(name, row, *figure) for (name, figure), row in zip(figures, sums, strict=True)
        }
        known = next((figure for _, figure in figures if figure[0] == figure[0]), nothing)
        total = sums.sum(0) if known is nothing else sums.nansum(0)
        return drift_of("", total, *known)._replace(parameters=found)

    def _everything(self) -> list[tuple[str, Tensor]]:
        """All parameters, each under a name of its own: as given, or numbered where that is not one."""
        pairs = [pair for group in self.param_groups for pair in named(group)]
        count = Counter(name for name, _ in pairs)
        return [(name if count[name] == 1 else f"{name} ({i})", p) for i, (name, p) in enumerate(pairs)]

    @torch.no_grad()
    def interpolate(self, alpha: float, anchors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        r"""Weights between the anchors and where they are now, as in WiSE-FT.

        Math:
            $(1-\alpha)\,\theta^* + \alpha\,\theta$; what has no anchor stays $\theta$.

        Args:
            alpha: 0 is the anchor, 1 the tuned weights.
            anchors: pretrained values by name, for anchors that were freed. None reads those from the file
                they came from.

        Returns:
            New tensors by parameter name, in the parameters' dtypes, sharded as they are.

        Raises:
            RecAdamError: when an anchor was freed and cannot be read again, or a parameter has no name.

        Example:
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> RecAdam([("w", w)], anchors={"w": torch.zeros(2)}).interpolate(0.25)["w"]
            tensor([0.2500, 0.2500])

        Source: arXiv 2109.01903, eq. (1).
        """
        pairs = [pair for group in self.param_groups for pair in named(group)]
        given = all("param_names" in group for group in self.param_groups)
        if not given or len({name for name, _ in pairs}) < len(pairs):
            raise RecAdamError(
                "interpolate: parameters need names, each its own; pass model.named_parameters()"
            )
        between = self._between(alpha, anchors)
        return {name: between[p] for name, p in pairs}

    def _between(self, alpha: float, anchors: Mapping[str, Tensor] | None) -> dict[Tensor, Tensor]:
        check_number("interpolate", "alpha", alpha)
        if anchors is not None:
            check_named("anchors", anchors)
        self._settle()
        if self._parts:
            raise RecAdamError(
                "interpolate: ZeRO's flat parts are not the model's weights; gather both checkpoints and "
                "interpolate those"
            )
        found = {}
        for group in self.param_groups:
            pairs = named(group)
            freed = {p: i for i, (_, p) in enumerate(pairs) if self.state[p].get("anchor", p) is None}
            again: dict[Tensor, Tensor | None] = {}
            if anchors is not None:
                again = {p: anchor_of(anchors, pairs[i][0], p) for p, i in freed.items()}
            elif freed:
                read = from_file(group, list(freed.items()), self._files).items()
                again = {p: x["anchor"] for p, x in read if x["anchor_hash"] == self.state[p]["anchor_hash"]}
            for name, p in pairs:
                anchor = again.get(p) if p in freed else self.state[p].get("anchor")
                if p in freed and anchor is None:
                    raise RecAdamError(
                        f"interpolate: the anchor of {name!r} was freed, and is not to be had again; "
                        "give the pretrained weights as anchors=..."
                    )
                new = p.detach().clone()
                if anchor is not None:
                    _check_shape(name, p, anchor)
                    mine, star = local(new), local(anchor).to(p.device)
                    wide = torch.promote_types(p.dtype, torch.float32)
                    if alpha != 1:  # at the ends exactly, whatever is at the other
                        part = alpha * mine.to(wide) if alpha else 0.0
                        mine.copy_((1 - alpha) * star.to(wide) + part)
                found[p] = new
        return found

    @contextmanager
    def interpolated(self, alpha: float, anchors: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """The model with interpolated weights, for as long as the context lasts.

        Args:
            alpha: as in `interpolate`.
            anchors: as in `interpolate`.

        Example:
            >>> w = torch.nn.Parameter(torch.ones(1))
            >>> with RecAdam([("w", w)], anchors={"w": torch.zeros(1)}).interpolated(0.5):
            ...     print(w.item())
            0.5
            >>> w.item()
            1.0
        """
        between = self._between(alpha, anchors)
        held = {p: local(p).detach().clone() for p in between}
        outer, self._interpolates = self._interpolates, True
        try:
            _put(between)
            yield
        finally:
            _put(held)
            self._interpolates = outer


def _identity(anchor: Tensor | None) -> tuple[Any, ...]:
    """What changes when an anchor is set by hand, in place or otherwise; empty without one."""
    if anchor is None or anchor.is_meta:
        return ()
    mine = local(anchor)
    version = 0 if mine.is_inference() else mine._version
    return id(anchor), version, 0 if is_wrapper(anchor) else mine.data_ptr()


def _comparable(name: str, own: Tensor | None, state: Mapping[str, Any], p: Tensor) -> bool:
    """Whether a parameter has its own anchor still, was not stepped, and can be held against it."""
    kept = own is not None and own is state.get("anchor")
    if own is None or not kept or own.shape != p.shape or not (in_memory(p) and in_memory(own)):
        return False
    return local(own).device == local(p).device and not _taken(name, state["step"])


def _check_shape(name: str, p: Tensor, anchor: Tensor) -> None:
    if anchor.shape != p.shape:
        raise RecAdamError(
            f"parameter {name!r} has shape {tuple(p.shape)}, its anchor {tuple(anchor.shape)}: its shape was "
            "changed; make a new optimizer"
        )


@torch.no_grad()
def _put(weights: Mapping[Tensor, Tensor]) -> None:
    for p, x in weights.items():
        local(p).copy_(local(x))


def _provenance(anchors: Anchors, group: Mapping[str, Any]) -> dict[str, Any]:
    """Where a group's anchors come from, as plain scalars; nothing for anchors in memory."""
    if not anchors.source.path:
        return {}
    matches = [anchors.match(name) for name in group["param_names"]]
    return {
        "anchor_source": anchors.source.path,
        "anchor_names": [match.stored if match.has_anchor else "" for match in matches],
        "anchor_dtype": "" if anchors.dtype is None else str(anchors.dtype).removeprefix("torch."),
        "anchor_place": anchors.place,
    }


_MOVING = ("step", "exp_avg", "exp_avg_sq", "residual")
"""What a step writes to in a state."""


def _whole(state: Mapping[str, Any]) -> bool:
    """Whether all entries are there, and of their kind; `checked` says what is wrong."""
    anchor, number = state.get("anchor"), state.get("anchor_hash")
    hashed = isinstance(number, Tensor) if "anchor" in state else number is None
    moving: list[Any] = [state.get(key) for key in ("step", "exp_avg", "exp_avg_sq")]
    others = [x for x in (anchor, state.get("importance"), state.get("residual")) if x is not None]
    dense = hashed and all(map(_is_dense, moving + others)) and not moving[0].ndim
    return dense and min(x.element_size() for x in moving) >= 4


def _is_dense(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.layout is torch.strided


def _taken(name: str, step: Tensor) -> int:
    """The steps that a parameter has taken."""
    try:
        return int(step)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise RecAdamError(
            f"optimizer.state: the step of {name!r} is {shown(step)}, no count; make a new optimizer"
        ) from None


def _unstepped(state: Mapping[str, Any]) -> bool:
    step = state["step"]
    return bool(step.is_meta) or not int(step)


def _sharded_as(p: Tensor, key: str, value: Any) -> Any:
    """An entry of the state of a parameter whose place another, sharded one has taken."""
    if value is None or key in ("step", "anchor_hash", "anchor_rows"):
        return value if value is None else value.clone()  # what others hold stays as the rest of it does
    device = value.device if key == "anchor" and value.device.type == "cpu" else p.device
    return like(p, lambda where: local(value)[where].to(device, copy=True))


def _residual(p: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor | None:
    """This process's part of what rounding has left over; None where that is not kept."""
    if group["rounding"] != "compensated" or p.dtype not in (torch.bfloat16, torch.float16):
        return None
    if "residual" not in state:
        state["residual"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return local(state["residual"])
