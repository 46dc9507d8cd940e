"""RecAdam as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from recadam_core import (
    Coefficients,
    Hyperparameters,
    RecAdamError,
    Sigmoid,
    annealing_from_dict,
    annealing_to_dict,
    coefficients,
    release_step,
)
from recadam_core.annealing import ANNEALINGS
from recadam_core.optimizer import check_anchors

from .fused import fused_kernel
from .kernel import kernel_

__all__ = ["RecAdam"]

_POLICY = ("betas", "eps", "weight_decay", "gamma", "bias_correction", "form")


def _policy(annealing: Any, values: tuple[Any, ...]) -> tuple[Hyperparameters, int | None]:
    if isinstance(annealing, tuple):
        annealing = annealing_from_dict(dict(annealing))
    hp = Hyperparameters(annealing=annealing, **dict(zip(_POLICY, values, strict=True)))
    return hp, release_step(annealing)


_cached_policy = lru_cache(maxsize=256)(_policy)


def _group_policy(group: Mapping[str, Any]) -> tuple[Hyperparameters, int | None]:
    """The settings of a parameter group, and the step that releases its anchors."""
    annealing = group["annealing"]
    values = tuple(tuple(v) if isinstance(v, list) else v for v in map(group.get, _POLICY))
    if isinstance(annealing, dict):
        return _cached_policy(tuple(annealing.items()), values)
    return _policy(annealing, values)  # a stranger's object, which may change


class RecAdam(Optimizer):
    r"""Adam with a pull towards pretrained weights that is annealed away; a drop-in for AdamW.

    Math:
        $\theta \leftarrow \theta + r(\theta^* - \theta) - s\,m'/(\sqrt{v'}+\varepsilon) - d\,\theta$,
        with the coefficients of `recadam_core.coefficients`.

    Args:
        params: parameters, groups of them, or `model.named_parameters()`.
        lr: learning rate; a float or a 0-d tensor. Schedulers set it as in every torch optimizer.
        betas: decay rates of Adam's moments.
        eps: under Adam's fraction.
        weight_decay: decoupled decay towards zero. It works against the anchor: keep 0 for
            pretrained weights.
        gamma: strength of the pull; lr * gamma is the share of the way home in one step.
        annealing: `Sigmoid`, `Linear`, `Constant`, or any object with their method `weights`.
        anchors: pretrained values by parameter name, copied. A parameter without one is a new head
            and gets plain Adam(W). None anchors every parameter where it is now, except in groups
            that say `"anchored": False`.
        bias_correction: whether the moments are corrected for their start at zero.
        form: "decoupled" (the paper's algorithm), "released" (the authors' code) or "proximal"
            (stable at any lr * gamma).
        foreach: whether to step over lists of tensors; None does so on CUDA. Costs memory for two
            more copies of the parameters, changes no bit.
        fused: True steps in one pass over memory: by Triton on CUDA, by numba or else torch.compile on the
            CPU; or one of "triton", "numba", "compiled". Changes no bit of what `exact` gives.
        exact: whether to give the bits of `recadam_core.update`: on the CPU, where torch's square root is
            not correctly rounded, NumPy takes it. Slower there; on other devices and with `fused` free.
        maximize: whether to climb instead of descend; the pull stays a pull.

    Every argument but `anchors`, `params` and `maximize` may differ from group to group.

    Raises:
        RecAdamError: for a value outside its range, an anchor that matches no parameter or has
            another shape, complex or integer parameters, sparse gradients, or a diverging pull. A
            step that raises has changed nothing.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = RecAdam(model.named_parameters(), lr=1e-3, gamma=100.0)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['anchor', 'exp_avg', 'exp_avg_sq', 'step']

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
        bias_correction: bool = True,
        form: str = "decoupled",
        foreach: bool | None = None,
        fused: bool | str = False,
        exact: bool = False,
        maximize: bool = False,
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
        }
        defaults = {name: _plain(value) for name, value in defaults.items()}
        # Read by add_param_group, which the base class calls for each group.
        self._anchors = anchors
        super().__init__(params, defaults)
        self._anchors = None
        if anchors is not None:
            anchored = [group for group in self.param_groups if group["anchored"]]
            names = list(chain.from_iterable(group["param_names"] for group in anchored))
            shapes = [p.shape for group in anchored for p in group["params"]]
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise RecAdamError(f"anchors: two parameters are named {twice!r}; give the groups full names")
            check_anchors(dict(zip(names, shapes, strict=True)), anchors)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle."""
        super().__setstate__(state)
        self._anchors = None
        for group in self.param_groups:
            for name in ("fused", "exact"):
                group.setdefault(name, False)

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, anchored where they are now unless the group says `"anchored": False`.

        Args:
            param_group: "params" and any setting of the constructor. With "anchors", pretrained
                values by name.

        Raises:
            RecAdamError: as the constructor; then nothing is added.
        """
        group = {key: _plain(value) for key, value in param_group.items()}
        own = group.pop("anchors", None)
        settings = {**self.defaults, **group}
        hp, _ = _group_policy(settings)
        _rate(settings["lr"], hp)
        for name in ("bias_correction", "anchored", "maximize", "exact"):
            if not isinstance(settings[name], bool):
                raise RecAdamError(f"RecAdam: {name} is {settings[name]!r}; give True or False")
        if settings["foreach"] not in (True, False, None):
            raise RecAdamError(f"RecAdam: foreach is {settings['foreach']!r}; give True, False or None")
        if settings["foreach"] and settings["fused"]:
            raise RecAdamError("RecAdam: foreach and fused are both set; give one of them")
        if own is not None and not settings["anchored"]:
            raise RecAdamError("RecAdam: a group has anchors and says 'anchored': False; leave one out")
        super().add_param_group(group)
        group = self.param_groups[-1]
        try:
            states = self._initial_states(group, self._anchors if own is None else own)
            if own is not None:
                shapes = [p.shape for p in group["params"]]
                check_anchors(dict(zip(group["param_names"], shapes, strict=True)), own)
        except BaseException:
            self.param_groups.pop()
            raise
        for p, state in zip(group["params"], states, strict=True):
            self.state[p] = state

    def _initial_states(self, group: dict[str, Any], anchors: Mapping[str, Tensor] | None) -> list[Any]:
        names = group.get("param_names")
        if anchors is not None and names is None:
            raise RecAdamError(
                "anchors are matched by name; pass model.named_parameters() instead of model.parameters()"
            )
        states = []
        for index, p in enumerate(group["params"]):
            name = names[index] if names else f"params[{index}]"
            if not p.is_floating_point():
                raise RecAdamError(f"parameter {name!r} has dtype {p.dtype}; give a real floating tensor")
            if group["fused"]:
                fused_kernel(group["fused"], p.device)
            dtype = torch.promote_types(p.dtype, torch.float32)
            state: dict[str, Any] = {
                "step": torch.tensor(0.0, dtype=torch.float32),
                "exp_avg": torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format),
            }
            if group["anchored"]:
                if anchors is None:
                    state["anchor"] = p.detach().clone()
                elif name in anchors:
                    check_anchors({name: p.shape}, {name: anchors[name]})
                    _check_anchor(name, anchors[name])
                    state["anchor"] = anchors[name].detach().to(p.device, copy=True)
            states.append(state)
        return states

    @torch.no_grad()
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
        for plan in [plan for group in self.param_groups for plan in self._plans(group)]:
            self._execute(*plan)
        return loss

    def _plans(
        self, group: dict[str, Any]
    ) -> Iterable[tuple[dict[str, Any], list[Tensor], Coefficients, bool, Callable[..., None]]]:
        """The group's parameters in lists that share their coefficients."""
        hp, release = _group_policy(group)
        lists: dict[Any, list[Tensor]] = {}
        for index, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                name = group["param_names"][index] if "param_names" in group else f"params[{index}]"
                raise RecAdamError(f"gradient of {name!r} is sparse; RecAdam needs dense gradients")
            state = self.state[p]
            key = (int(state["step"]) + 1, "anchor" in state, p.dtype, p.device)
            lists.setdefault(key, []).append(p)
        lr = _rate(group["lr"], hp)
        for (t, anchored, _, _), params in lists.items():
            c = coefficients(t, hp, lr, anchored)
            if anchored and c.recall and any(self.state[p]["anchor"] is None for p in params):
                raise RecAdamError(
                    f"step {t}: the anchor was freed when the annealing had released it; "
                    "make a new optimizer to pull again"
                )
            kernel: Callable[..., None] = partial(kernel_, exact=group["exact"])
            if group["fused"]:
                kernel = fused_kernel(group["fused"], params[0].device)
            yield group, params, c, anchored and release is not None and t >= release, kernel

    def _execute(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        c: Coefficients,
        release: bool,
        kernel: Callable[..., None],
    ) -> None:
        foreach = group["foreach"]
        if foreach is None:
            foreach = params[0].is_cuda
        if group["fused"]:
            foreach = True
        for part in [params] if foreach else [[p] for p in params]:
            states = [self.state[p] for p in part]
            grads = [p.grad for p in part if p.grad is not None]
            if group["maximize"]:
                grads = list(torch._foreach_neg(grads))
            kernel(
                part,
                grads,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["anchor"] for state in states] if c.recall else None,
                c,
            )
            for state in states:
                state["step"] += 1
                if release:
                    state["anchor"] = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume where `state_dict()` was taken, bit for bit.

        The base class casts all floating state to the parameter's dtype, which would round the
        float32 moments and anchors of a 16-bit parameter; here they keep the dtype they were saved in.

        Args:
            state_dict: what `state_dict()` returned.

        Raises:
            RecAdamError: when it is another optimizer's, or of other parameters; nothing is loaded then.
        """
        hooked: list[dict[str, Any]] = []

        def check(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            self._check_saved(saved)
            # What older states do not say stays as it was chosen here.
            pairs = zip(self.param_groups, saved["param_groups"], strict=False)
            chosen = [{**{k: group[k] for k in ("fused", "exact")}, **theirs} for group, theirs in pairs]
            hooked.append({**saved, "param_groups": chosen + saved["param_groups"][len(chosen) :]})
            return hooked[0]

        # As the last hook before and the first one after, so that users' hooks see and change what counts.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(lambda _: self._restore(hooked[0]), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _restore(self, state_dict: dict[str, Any]) -> None:
        """Put back the tensors that the base class has cast, in the dtypes they were saved in."""
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, p in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    # Step counts stay where they are; the base class would share them, too.
                    device = value.device if key == "step" else p.device
                    self.state[p][key] = value.to(device, copy=True)

    def _check_saved(self, state_dict: dict[str, Any]) -> None:
        saved_groups = state_dict["param_groups"]
        if any(name not in group for group in saved_groups for name in ("gamma", "annealing", "form")):
            raise RecAdamError(
                "load_state_dict: the state is another optimizer's; give one that RecAdam saved"
            )
        for saved_group, group in zip(saved_groups, self.param_groups, strict=False):
            theirs, ours = (
                [_bare(name) for name in names] if (names := g.get("param_names")) else None
                for g in (saved_group, group)
            )
            if theirs is not None and ours is not None and theirs != ours:
                name, other = next(
                    ((a, b) for a, b in zip(ours, theirs, strict=False) if a != b), (ours, theirs)
                )
                raise RecAdamError(
                    f"load_state_dict: parameter {name!r} was saved as {other!r}; make the groups as then"
                )
            for index, p in zip(saved_group["params"], group["params"], strict=False):
                saved = state_dict["state"].get(index, {})
                if {"step", "exp_avg", "exp_avg_sq"} - saved.keys() or saved["exp_avg"].shape != p.shape:
                    raise RecAdamError(
                        f"load_state_dict: no state for parameter {index} of shape {tuple(p.shape)}; "
                        "give one that was saved with this model"
                    )


def _rate(lr: Any, hp: Hyperparameters) -> float:
    """The learning rate as a checked number."""
    try:
        rate = float(lr)
    except (TypeError, ValueError, RuntimeError):
        raise RecAdamError(f"RecAdam: lr is {lr!r}; give a number or a 0-d tensor") from None
    hp.replace(lr=rate)
    return rate


def _check_anchor(name: str, anchor: Any) -> None:
    if not isinstance(anchor, Tensor) or not anchor.is_floating_point():
        raise RecAdamError(f"anchors: {name!r} is {getattr(anchor, 'dtype', anchor)}; give a floating tensor")
    if not anchor.is_meta and not bool(torch.isfinite(anchor).all()):
        raise RecAdamError(f"anchors: {name!r} holds NaN or infinity; give the pretrained values")


def _bare(name: str) -> str:
    """A parameter's name without what wrappers of the model put into it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _plain(value: Any) -> Any:
    """A setting as plain scalars, which weights-only loading accepts; a stranger's annealing as it is."""
    if type(value) in ANNEALINGS.values():
        return {key: _plain(x) for key, x in annealing_to_dict(value).items()}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_plain(x) for x in value)
    return value.item() if isinstance(value, np.generic) else value
