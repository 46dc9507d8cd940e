"""The methods of a trial, in PyTorch: optimizers, what is done around a step, and after the last one."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recadam_torch import RecAdam, anchor, feature_importance, importance_of

from ..schedules import learning_rate
from .data import kind_of
from .subject import Subject
from .subjects import subject_of
from .trial import METHODS, Trial

__all__ = [
    "adapt",
    "extra_for",
    "freeze",
    "importance_for",
    "optimizer_for",
    "prune",
    "rate_for",
    "replayed",
]

WEIGHING_BATCHES = 32
FINCH_HIGHEST, FINCH_DECAY = 2.5, 0.9


class _Both:
    """Two optimizers in the place of one."""

    def __init__(self, *both: torch.optim.Optimizer) -> None:
        self._both = both
        self.param_groups = [group for one in both for group in one.param_groups]

    def zero_grad(self) -> None:
        """As an optimizer's."""
        for one in self._both:
            one.zero_grad()

    def step(self) -> None:
        """As an optimizer's."""
        for one in self._both:
            one.step()


def optimizer_for(trial: Trial, subject: Subject, importance: Mapping[str, Tensor] | None) -> Any:
    """The optimizer of a trial's method."""
    named = [(name, p) for name, p in subject.module.named_parameters() if p.requires_grad]
    new = subject.new
    if trial.method == "muon-pull":
        return _muon(trial, subject, named)
    if not METHODS[trial.method].form:
        # In one pass, but where tables were written before that: to the digit they are repeated.
        fused = None if kind_of(trial.target) == "classification" else True
        optimizer = torch.optim.AdamW([p for _, p in named], lr=trial.lr, weight_decay=0.0, fused=fused)
        stars = {p: subject.anchors[name] for name, p in named if name in subject.anchors}
        if trial.method == "mofo":
            matrices = [p for p in stars if p.ndim > 1]
            _around(optimizer, matrices, lambda p, before: _filter(optimizer, p, before, trial.share))
        elif trial.method == "spd":
            _around(optimizer, list(stars), lambda p, before: _project(p, before, stars[p], trial.pull))
        return optimizer
    hp = trial.hp
    groups: list[dict[str, Any]] = [
        {"params": [x for x in named if x[0] not in new], "anchors": subject.anchors}
    ]
    if new:
        groups.append({"params": [x for x in named if x[0] in new], "anchored": False})
    if importance is not None:
        # Not in one pass, which rounds the root otherwise: so that the tables' rows repeat to the digit.
        groups[0].update(importance=importance, fused=False)
    return RecAdam(groups, lr=hp.lr, gamma=hp.gamma, annealing=hp.annealing, form=hp.form)


def _muon(trial: Trial, subject: Subject, named: Sequence[tuple[str, Any]]) -> _Both:
    """Muon for the matrices of the layers, AdamW for the rest, both pulled."""
    words = {id(m.weight) for m in subject.module.modules() if isinstance(m, nn.Embedding)}
    matrices = [x for x in named if x[1].ndim == 2 and id(x[1]) not in words and x[0] in subject.anchors]
    others = [x for x in named if x[0] not in dict(matrices)]
    muon = torch.optim.Muon(matrices, lr=trial.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=trial.lr, weight_decay=0.0)
    for optimizer, some in ((muon, matrices), (adamw, others)):
        known = {name: subject.anchors[name] for name, _ in some if name in subject.anchors}
        anchor(optimizer, known, pull=trial.pull)
    return _Both(muon, adamw)


def _around(
    optimizer: torch.optim.Optimizer, params: Sequence[Any], after: Callable[[Any, Tensor], None]
) -> None:
    """Let something be done to parameters after each step, with what they were before it."""
    before: dict[Any, Tensor] = {}

    def keep(*_: Any) -> None:
        before.update({p: p.detach().clone() for p in params if p.grad is not None})

    @torch.no_grad()
    def correct(*_: Any) -> None:
        for p, was in before.items():
            after(p, was)
        before.clear()

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(correct)


def _filter(optimizer: torch.optim.Optimizer, p: Any, before: Tensor, share: float) -> None:
    """MoFO: of a matrix only the entries with the largest first moments move."""
    p.copy_(torch.where(_greatest(optimizer.state[p]["exp_avg"].abs(), share), p, before))


def _greatest(scores: Tensor, share: float) -> Tensor:
    """Where the greatest scores are: this share of them, one at least, and what equals the last of these."""
    flat = scores.flatten().cpu().numpy()
    place = flat.size - max(1, int(share * flat.size))
    return scores >= float(np.partition(flat, place)[place])


def _project(p: Any, before: Tensor, star: Tensor, strength: float) -> None:
    """SPD: where the gradient leads back and the step away, some of the way back to the radius before it."""
    away = before - star
    if float((p.grad * away).sum()) <= 0.0:
        return
    radius, was = float((p - star).norm()), float(away.norm())
    share = min(1.0, max(0.0, (radius - was) / radius)) if radius else 0.0
    p.sub_(p - star, alpha=strength * share)


def freeze(subject: Subject, share: float, seed: int) -> None:
    """Half fine-tuning: of each layer a random part of the matrices and of the norms is trained."""
    layers: dict[tuple[str, bool], dict[str, list[Any]]] = {}
    for name, p in subject.module.named_parameters():
        owner = name.rpartition(".")[0]
        layer = re.match(r".*?\.\d+(?=\.)", re.sub(r"^\d+\.", "", owner))
        if name in subject.new or layer is None or not p.requires_grad:
            continue  # embeddings, heads and what is outside of the layers are trained
        of = layers.setdefault((layer[0], "norm" in owner.lower()), {})
        of.setdefault(owner, []).append(p)
    rng = np.random.default_rng([seed, 4])
    for of in layers.values():
        owners = list(of)
        for i in rng.permutation(len(owners))[max(1, round(share * len(owners))) :]:
            for p in of[owners[i]]:
                p.requires_grad_(False)


def rate_for(trial: Trial, subject: Subject) -> Callable[[int, float], float]:
    """The learning rate of a step, from its number and its loss."""
    warmup = min(trial.warmup_steps, trial.steps - 1)
    if trial.method != "finch":
        return lambda t, loss: learning_rate(t, trial.steps, trial.lr, "linear", warmup)
    with torch.no_grad():
        count = min(trial.steps, WEIGHING_BATCHES)
        mean = float(np.mean([float(subject.loss(t)) for t in range(1, count + 1)]))

    def finch(t: int, loss: float) -> float:
        nonlocal mean
        mean = FINCH_DECAY * mean + (1.0 - FINCH_DECAY) * loss
        return min(trial.lr / math.sqrt(max(mean, 1e-12)), FINCH_HIGHEST * trial.lr)

    return finch


def extra_for(trial: Trial, subject: Subject, optimizer: Any) -> Callable[[int], Tensor] | None:
    """What is added to the loss of a step."""
    if trial.method == "multitask":
        old = subject.old(trial.seed, trial.steps)
        return lambda t: trial.source_weight * old.loss(t)
    if trial.method != "lwf":
        return None
    handle = anchor(optimizer, pull=0.0, names=subject.module.named_parameters())

    def divergence(t: int) -> Tensor:
        with torch.no_grad(), handle.at_anchors():
            before = subject.said(t)
        kl: Tensor = nn.functional.kl_div(subject.said(t), before, reduction="batchmean", log_target=True)
        return trial.weight * kl

    return divergence


def replayed(trial: Trial, subject: Subject) -> Callable[[int], Tensor | None]:
    """The loss on old data in the steps that have it in the place of the new."""
    if trial.method not in ("replay", "self-replay"):
        return lambda t: None
    count = max(1, math.ceil(trial.share * trial.steps))
    old = (subject.old if trial.method == "replay" else subject.own)(trial.seed, count)
    # Evenly, and not in the first steps, when nothing is forgotten, nor in the last, of small rates.
    steps = {int((i + 0.5) * trial.steps / count) + 1: i + 1 for i in range(count)}
    return lambda t: old.loss(steps[t]) if t in steps else None


def adapt(trial: Trial, subject: Subject) -> Callable[[], None]:
    """Put adapters of peft onto the linear layers, which alone and a head are trained; gives their end."""
    import peft

    config: Any
    torch.manual_seed(trial.seed)
    layers = list(subject.adapted)
    if trial.method == "lora":
        config = peft.LoraConfig(r=trial.rank, lora_alpha=2 * trial.rank, target_modules=layers)
    else:
        config = peft.OSFConfig(effective_rank=1.0 - trial.share, target_modules=layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what peft asks transformers for
        adapted: Any = peft.get_peft_model(subject.body(), config)  # in its place

    def merge() -> None:
        adapted.merge_and_unload()

    return merge


@torch.no_grad()
def prune(subject: Subject, share: float) -> None:
    """FAPM: of each tensor's change only a part is kept, the largest that is small beside the weight."""
    named = subject.named
    for name, star in subject.anchors.items():
        p, size = named[name], star.abs()
        change = (p - star).abs()
        score = change * (1.0 - size.mean() / size.clamp(min=1e-12))
        p.copy_(torch.where(_greatest(score, share), p, star))


def importance_for(trial: Trial, subject: Subject) -> dict[str, Tensor] | None:
    """How much each weight matters, for methods that weigh by it."""
    if trial.method in ("ewc", "ewc-dr"):
        sign = -1.0 if trial.method == "ewc-dr" else 1.0
        return _fisher(trial.target, trial.model, trial.max_length, str(subject.device), sign)
    if trial.method != "feature-pull":
        return None
    subject.module.eval()
    count = min(trial.steps, WEIGHING_BATCHES)
    return feature_importance(subject.anchored, map(subject.features, range(1, count + 1)), trial.seed)


@lru_cache(maxsize=2)
def _fisher(target: str, model: str, length: int, device: str, sign: float) -> dict[str, Tensor]:
    """Importance to what the model was trained for, by that loss at the pretrained weights."""
    trial = Trial(target=target, model=model, max_length=length, steps=WEIGHING_BATCHES)
    subject = subject_of(trial, torch.device(device))
    subject.module.eval()
    old = subject.old(0, WEIGHING_BATCHES)
    losses = (old.loss(t, sign) for t in range(1, WEIGHING_BATCHES + 1))
    return importance_of(subject.anchored, losses)
