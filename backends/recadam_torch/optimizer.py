"""RecAdam as a `torch.optim.Optimizer`."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

from recadam_core import RecAdamError, Sigmoid
from recadam_core.arrays import check_named
from recadam_core.errors import check_flag, shown, unknown
from recadam_core.optimizer import check_anchors

from .anchors import Anchors
from .checkpoints import resumed
from .drift import Drift, at_anchors, drift_of, exchanged, weights_between
from .kernels import chosen_fused
from .plan import Planner
from .settings import FLAGS, FROM, SETTINGS, named, named_apart, settled
from .states import Left, States
from .stepping import Work, execute

__all__ = ["RecAdam"]

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

    Every argument but `params` may differ from group to group.

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
        # The base class calls add_param_group for each group.
        self._left, self._planner = Left(anchors, importance), Planner()
        self._interpolates = False  # whether the weights are others for now
        super().__init__(params, defaults)
        self._left.anchors = self._left.importance = None
        if anchors is not None:
            anchored = [group for group in self.param_groups if group["anchored"]]
            names = list(chain.from_iterable(group["param_names"] for group in anchored))
            shapes = [p.shape for group in anchored for p in group["params"]]
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise RecAdamError(f"anchors: two parameters are named {twice!r}; give the groups full names")
            if not isinstance(anchors, Anchors):
                check_anchors(dict(zip(names, shapes, strict=True)), anchors)

    @property
    def _states(self) -> States:
        return States(self._left, self.param_groups, self.state)

    def __getstate__(self) -> dict[str, Any]:
        """What pickles and copies hold."""
        self._states.check_files()
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_own": self._left.copies}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle; loading a state, which calls this too, changes no settings of its own."""
        super().__setstate__({key: value for key, value in state.items() if key != "_own"})
        if "_left" not in self.__dict__:
            files = {group.get("anchor_source", "") for group in self.param_groups}
            self._left = Left(copies=state.get("_own", {}), files=files)
            self._interpolates = False
        self._planner = Planner()
        self._states.restore()
        for group in self.param_groups:
            for name, value in {"fused": None, **FLAGS}.items():
                group.setdefault(name, value)

    @torch.inference_mode(False)  # what is made here outlives it
    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, anchored where they are now unless the group says `"anchored": False`.

        Args:
            param_group: "params" and any setting of the constructor. With "anchors", pretrained
                values by name; with "importance", weights by name.

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
        anchors, importance = group.pop("anchors", None), group.pop("importance", None)
        settings = settled({**self.defaults, **group})
        group.update({name: settings[name] for name in group})
        for what, value in (("anchors", anchors), ("an importance", importance)):
            if value is not None and not settings["anchored"]:
                raise RecAdamError(f"RecAdam: a group has {what} and says 'anchored': False; leave one out")
        if anchors is not None:
            check_named("anchors", anchors)
        super().add_param_group(group)
        group = self.param_groups[-1]
        try:
            if anchors is not None and not isinstance(anchors, Anchors) and "param_names" in group:
                shapes = [p.shape for p in group["params"]]
                check_anchors(dict(zip(group["param_names"], shapes, strict=True)), anchors)
            self._states.add(group, anchors, importance)
        except BaseException:
            self.param_groups.pop()
            raise

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
        # A GradScaler leaves these to optimizers that say they see to them.
        scale, infinite = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        work = self._plan(torch.compiler.is_compiling(), scale, infinite)
        for some in work:
            execute(some, scale, infinite)
        self._finish(work)
        return loss

    # A compiler steps over these two: they look into dictionaries, which change. Torch marks its own methods
    # so; torch.compiler.disable would take two seconds of every import.

    @_disable_dynamo
    def _plan(self, compiling: bool, scale: Tensor | None, infinite: Tensor | None) -> list[Work]:
        """What the step has to do; all of it is checked, and what is refused has changed nothing."""
        if compiling and not (scale is None and infinite is None):
            raise RecAdamError(
                "RecAdam: a compiled step does not unscale what a GradScaler has scaled; compile the step "
                "without capturable=True, or call it as it is"
            )
        if self._interpolates:
            raise RecAdamError("RecAdam: the weights are interpolated; step after the context has ended")
        states = self._states
        before = states.anchor_anew()
        try:
            states.check_files()
            return self._planner.plan(
                self.param_groups, self.state, states.settle, compiling, scale is not None
            )
        except BaseException:
            states.put_back(before)
            raise

    @_disable_dynamo
    def _finish(self, work: list[Work]) -> None:
        if self._states.release(work):
            self._planner.forget()  # which holds the anchors
        self._planner.remember(work)

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
        states = self._states.anew(reanchor)
        self._states.begin(states)
        self._planner = Planner()
        for group in self.param_groups if reanchor else ():
            group.update({key: FLAGS[key] for key in FROM})

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """The state as plain tensors and scalars; for each anchor a hash, unless `save_anchors` is set.

        As AdamW's, it is no copy: what has been stepped moves on in it, and what has not been stays.
        """
        # As the last hook before and the first one after, so that users' hooks see what is saved.
        before = self.register_state_dict_pre_hook(lambda _: self._states.ready())
        after = self.register_state_dict_post_hook(lambda _, saved: self._lend(saved), prepend=True)
        try:
            return super().state_dict()
        finally:
            before.remove()
            after.remove()

    def _lend(self, saved: dict[str, Any]) -> None:
        if self._states.lend(saved):
            self._planner.forget()  # whose steps do not settle first

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
        self._states.adopt()
        resumed_states: list[dict[Tensor, dict[str, Any]]] = []
        missing: dict[Tensor, str] = {}

        def check(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            groups, states, without = resumed(self, saved, self._left.states, self._left.files)
            resumed_states.append(states)
            missing.update(without)
            # All is checked, and made: the base class puts in the groups.
            return {"state": {}, "param_groups": groups}

        def fill(_: Optimizer) -> None:
            for p, state in resumed_states[-1].items():
                self._states.put(p, state)
            for p in missing:  # which may be tuned already
                self._left.copies.pop(p, None)

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

    # How far the weights have come.

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
        self._states.settle()
        return drift_of(named_apart(self.param_groups), self.state, self._planner.last())

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
        have_names = all("param_names" in group for group in self.param_groups)
        if not have_names or len({name for name, _ in pairs}) < len(pairs):
            raise RecAdamError(
                "interpolate: parameters need names, each its own; pass model.named_parameters()"
            )
        between = self._between(alpha, anchors)
        return {name: between[p] for name, p in pairs}

    @contextmanager
    def at_anchors(self) -> Iterator[None]:
        """The model with its pretrained weights, for as long as the context lasts: a reference for free.

        As `AnchorPull.at_anchors`; where anchors were freed, weights are copied as by `interpolated`.

        Raises:
            RecAdamError: while a CUDA graph is captured; when an anchor was freed and cannot be read again.

        Example:
            >>> w = torch.nn.Parameter(torch.ones(1))
            >>> with RecAdam([("w", w)], anchors={"w": torch.zeros(1)}).at_anchors():
            ...     print(w.item())
            0.0
        """
        self._states.settle()
        if self._interpolates or any(s.get("anchor", s) is None for s in self.state.values()):
            with self.interpolated(0.0):
                yield
            return
        pairs = [(p, s["anchor"]) for p, s in self.state.items() if "anchor" in s]
        self._interpolates = True
        try:
            with at_anchors(pairs):
                yield
        finally:
            self._interpolates = False

    def _between(self, alpha: float, anchors: Mapping[str, Tensor] | None) -> dict[Tensor, Tensor]:
        self._states.settle()
        if self._left.parts:
            raise RecAdamError(
                "interpolate: ZeRO's flat parts are not the model's weights; gather both checkpoints and "
                "interpolate those"
            )
        return weights_between(self.param_groups, self.state, self._left.files, alpha, anchors)

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
        outer, self._interpolates = self._interpolates, True
        try:
            with exchanged(between):
                yield
        finally:
            self._interpolates = outer
