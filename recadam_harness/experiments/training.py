"""One trial of the experiments: a Hugging Face encoder, trained by one method and measured."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recadam_core import DriftBudget, RecAdamError
from recadam_torch import RecAdam, feature_importance, importance_of, probe_head

from ..engines import coupled_gradients
from ..run import batch_order
from ..schedules import learning_rate
from .classifiers import Batch, Classifier, Encoded, SentenceClassifier, renew, set_dropout
from .data import Source, target_of
from .texts import Texts
from .trial import METHODS, Trial

__all__ = ["run"]

Array = np.ndarray[Any, Any]
SOURCE_BATCH = 16
POOL = 8  # batches whose rows are sorted by length together
WEIGHING_BATCHES = 32


def run(trial: Trial) -> dict[str, Any]:
    """Train and measure; see `recadam_harness.experiments.run_trial`."""
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Sums over more threads are other sums: a row is to be repeated wherever it was made.
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            return _run(trial, where)
    finally:
        torch.set_num_threads(threads)


def _run(trial: Trial, where: torch.device) -> dict[str, Any]:
    began = time.perf_counter()
    splits = target_of(trial.target, trial.data)
    special = METHODS[trial.method].sentences or trial.curve_every or trial.head == "probed"
    if trial.target.startswith("glue/") and special:
        raise RecAdamError(
            f"{trial.target}: method {trial.method!r}, head={trial.head}, curve_every={trial.curve_every}: "
            "one of them is for encoders of sentences with a linear head, and GLUE's classifiers are none; "
            "give another target"
        )
    texts, measured = _rows(trial, splits.train), getattr(splits, trial.split)
    subject = _Subject(trial, splits.classes, where)
    train = subject.encoded(texts.first, texts.second)
    figures: dict[str, Any] = {}
    if subject.sentences:
        before = _source_before(trial.model, trial.split, trial.max_length, str(where))
        figures.update({f"{name}_before": value for name, value in before.items()})
    after = subject.encoded(measured.first, measured.second)
    figures.update(_train(trial, subject, train, texts, splits.classes))
    scores = after.each(subject.module.eval())
    figures.update(splits.metrics(scores, measured.labels))
    if subject.sentences:
        figures.update(subject.source(trial.split))
    return {**figures, "seconds": time.perf_counter() - began}


class _Subject:
    """The model of a trial, what its anchored parameters were, and texts as it reads them."""

    def __init__(self, trial: Trial, classes: int, device: torch.device) -> None:
        torch.manual_seed(trial.seed)
        self.device, self.length, self.seed = device, trial.max_length, trial.seed
        self.module: Any
        if trial.target.startswith("glue/"):
            self.module = Classifier(trial.model, classes)
        else:
            self.module = SentenceClassifier(trial.model, classes, np.random.default_rng(trial.seed))
        self.module.to(device)
        set_dropout(self.module, trial.dropout)
        self.anchors = {
            name: p.detach().clone()
            for name, p in self.module.named_parameters()
            if name not in self.module.new
        }
        if trial.init == "random":
            torch.manual_seed(trial.seed)  # whatever loading has drawn
            renew(self.module.body, self.module.body.modules())

    @property
    def sentences(self) -> bool:
        """Whether it embeds sentences, so that the source tasks can be measured."""
        return isinstance(self.module, SentenceClassifier)

    @property
    def named(self) -> dict[str, Tensor]:
        """Parameters by name."""
        return dict(self.module.named_parameters())

    @property
    def anchored(self) -> dict[str, Tensor]:
        """Those of them that have an anchor."""
        return {name: p for name, p in self.named.items() if name in self.anchors}

    def encoded(self, first: Sequence[str], second: Sequence[str] | None = None) -> Encoded:
        """Texts, or pairs of them, for this model."""
        words = self.module.body.get_input_embeddings().num_embeddings
        return Encoded(self.module.tokenizer, first, second, self.length, words, self.device)

    def source(self, split: str) -> dict[str, float]:
        """Figures of the source tasks."""
        self.module.eval()
        return Source(split).measure(lambda texts: self.encoded(texts).each(self.module.features))

    @torch.no_grad()
    def distance(self) -> float:
        """Euclidean distance of the anchored parameters to their anchors."""
        named = self.named
        parts = [torch.linalg.vector_norm(named[name] - star) for name, star in self.anchors.items()]
        return float(torch.stack(parts).double().norm())

    @torch.no_grad()
    def shrink(self, alpha: float) -> None:
        """Go back to this share of the way from the anchors."""
        named = self.named
        for name, star in self.anchors.items():
            named[name].copy_(star + alpha * (named[name] - star))

    @torch.no_grad()
    def couple(self, trial: Trial, t: int) -> None:
        """Gradients of the annealed objective in the place of the target's."""
        named = self.named
        grads = {name: p.grad for name, p in named.items() if p.grad is not None}
        for name, grad in coupled_gradients(grads, named, self.anchors, trial.hp, t).items():
            named[name].grad = grad


def _rows(trial: Trial, train: Texts) -> Texts:
    """The training rows that the seed draws."""
    if trial.rows > len(train):
        raise RecAdamError(f"{trial.target}: rows is {trial.rows}; there are {len(train)} to train on")
    if not trial.rows:
        return train
    rng = np.random.default_rng([trial.seed, 2])
    return train.pick(rng.permutation(len(train))[: trial.rows])


@lru_cache(maxsize=8)
def _source_before(name: str, split: str, length: int, device: str) -> dict[str, float]:
    """What the encoder knew before any training."""
    return _Subject(Trial(model=name, max_length=length), 2, torch.device(device)).source(split)


def _grouped(order: Array, lengths: Array, seed: int) -> Array:
    """Batches whose rows are of similar lengths, so that little is filled up; pools stay in their places."""
    rng = np.random.default_rng([seed, 3])
    pools = []
    for start in range(0, len(order), POOL):
        rows = order[start : start + POOL].ravel()
        batches = rows[np.argsort(lengths[rows], kind="stable")].reshape(-1, order.shape[1])
        pools.append(rng.permutation(batches))
    return np.concatenate(pools)


def _train(trial: Trial, subject: _Subject, train: Encoded, texts: Texts, classes: int) -> dict[str, Any]:
    """Train the subject, in place."""
    trains = METHODS[trial.method].trains
    if trial.head == "probed" or not trains:
        features = train.each(subject.module.eval().features)
        probe_head(subject.module.classifier, features, texts.labels, trial.inverse_strength)
    if not trains:
        return {"distance": subject.distance(), "curve": []}
    if trial.batch_size > len(texts):
        raise RecAdamError(
            f"{trial.command}: batch_size is {trial.batch_size}; there are {len(texts)} rows, give no more"
        )
    wanted = torch.tensor(texts.labels, device=subject.device)
    loss_of: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    if classes == 1:
        wanted, loss_of = wanted.float()[:, None], nn.functional.mse_loss
    rows = batch_order(len(texts), trial.batch_size, trial.steps, trial.seed)
    rows = _grouped(rows, train.lengths, trial.seed)
    source = _SourceBatches(subject, trial.seed, trial.steps) if trial.method == "multitask" else None
    if trial.method == "lora":
        _adapt(subject, trial.rank)
    module = subject.module
    importance = None
    if trial.method == "ewc":
        importance = _fisher(trial.model, trial.max_length, str(subject.device))
    elif trial.method == "feature-pull":
        importance = _importance_of_features(subject, train, rows)
    optimizer = _optimizer(trial, subject, importance)
    control = DriftBudget(trial.budget, high=1.0 / trial.lr) if trial.method == "budget" else None
    trained = [p for p in module.parameters() if p.requires_grad]
    warmup = min(trial.warmup_steps, trial.steps - 1)
    losses: list[float] = []
    curve: list[dict[str, float]] = []
    torch.manual_seed(trial.seed)  # of dropout, whatever was loaded and measured before

    def measure(step: int) -> None:
        forgotten = subject.source("curve")["snli_mnr"]
        curve.append({"step": step, "source_loss": forgotten, "distance": subject.distance()})
        if losses:  # the mean since the last point; there is none before the first step
            curve[-1]["loss"] = float(np.mean(losses[-trial.curve_every :]))
        module.train()

    module.train()
    if trial.curve_every:
        measure(0)
    for t in range(1, trial.steps + 1):
        loss = loss_of(module(train.batch(rows[t - 1])), wanted[rows[t - 1]])
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise RecAdamError(f"{trial.command}: the loss is {losses[-1]} at step {t}; lower lr")
        if source is not None:
            loss = loss + trial.source_weight * source.loss(module, t)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(trained, trial.clip)
        if trial.method == "coupled":
            subject.couple(trial, t)
        rate = learning_rate(t, trial.steps, trial.lr, "linear", warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        if control is not None:
            group = optimizer.param_groups[0]
            group["gamma"] = control(group["gamma"], subject.distance())
        if trial.curve_every and (t % trial.curve_every == 0 or t == trial.steps):
            measure(t)
    if trial.method == "lora":
        module.body = module.body.merge_and_unload()
    if trial.method == "wiseft":
        subject.shrink(trial.alpha)
    tail = losses[-max(1, trial.steps // 10) :]
    distance = subject.distance()
    if not math.isfinite(distance):
        raise RecAdamError(f"{trial.command}: no finite weights after step {trial.steps}; lower lr")
    return {"loss": float(np.mean(tail)), "distance": distance, "curve": curve}


def _optimizer(
    trial: Trial, subject: _Subject, importance: Mapping[str, Tensor] | None
) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in subject.module.named_parameters() if p.requires_grad]
    if not METHODS[trial.method].form:
        return torch.optim.AdamW([p for _, p in named], lr=trial.lr, weight_decay=0.0)
    hp, new = trial.hp, subject.module.new
    groups: list[dict[str, Any]] = [
        {"params": [x for x in named if x[0] not in new], "anchors": subject.anchors},
        {"params": [x for x in named if x[0] in new], "anchored": False},
    ]
    if importance is not None:
        # Not in one pass, which rounds the root otherwise: so that the tables' rows repeat to the digit.
        groups[0].update(importance=importance, fused=False)
    return RecAdam(groups, lr=hp.lr, gamma=hp.gamma, annealing=hp.annealing, form=hp.form)


def _adapt(subject: _Subject, rank: int) -> None:
    """Adapters of low rank on every linear layer of the encoder, which alone and the head are trained."""
    from peft import LoraConfig, get_peft_model

    layers = ["query", "key", "value", "dense"]
    torch.manual_seed(subject.seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what peft asks transformers for
        subject.module.body = get_peft_model(subject.module.body, config)


def _pair_loss(module: Any, premises: Batch, entailed: Batch) -> Tensor:
    """In-batch negatives: each premise is to find the sentence that follows from it."""
    one, other = (nn.functional.normalize(module.features(x), dim=1) for x in (premises, entailed))
    return nn.functional.cross_entropy(20.0 * one @ other.T, torch.arange(len(one), device=one.device))


class _SourceBatches:
    """Batches of the source task's training pairs."""

    def __init__(self, subject: _Subject, seed: int, count: int) -> None:
        premises, entailed = Source.pairs()
        self._parts = subject.encoded(premises), subject.encoded(entailed)
        rows = batch_order(len(premises), SOURCE_BATCH, count, seed + 10_000)
        self._rows = _grouped(rows, self._parts[0].lengths, seed)

    def loss(self, module: nn.Module, t: int) -> Tensor:
        """The source task's loss on the batch of step t."""
        one, other = (part.batch(self._rows[t - 1]) for part in self._parts)
        return _pair_loss(module, one, other)


@lru_cache(maxsize=2)
def _fisher(name: str, length: int, device: str) -> dict[str, Tensor]:
    """Importance to the source task, by its loss at the pretrained weights."""
    subject = _Subject(Trial(model=name, max_length=length), 2, torch.device(device))
    module = subject.module.eval()
    batches = _SourceBatches(subject, 0, WEIGHING_BATCHES)
    losses = (batches.loss(module, t) for t in range(1, WEIGHING_BATCHES + 1))
    return importance_of(subject.anchored, losses)


def _importance_of_features(subject: _Subject, train: Encoded, rows: Array) -> dict[str, Tensor]:
    """Importance to the features of the target's own texts."""
    module = subject.module.eval()
    features = (module.features(train.batch(chosen)) for chosen in rows[:WEIGHING_BATCHES])
    directions = (nn.functional.normalize(x, dim=1) for x in features)
    return feature_importance(subject.anchored, directions, subject.seed)
