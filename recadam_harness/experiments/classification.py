"""Classification: an encoder with a new head; what may be forgotten is which sentences belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recadam_core import RecAdamError
from recadam_torch import probe_head

from ..run import batch_order
from .classifiers import Batch, Classifier, Encoded, SentenceClassifier, renew, set_dropout
from .data import Source, target_of
from .subject import Old, Subject, drawn, grouped, ordered
from .trial import METHODS, Trial

__all__ = ["Classification", "PairBatches", "source_before"]

Array = np.ndarray[Any, Any]
SOURCE_BATCH = 16
PROBED = 64


class Classification(Subject):
    """A sentence encoder, or a checkpoint of GLUE's, that learns to classify."""

    adapted = ("query", "key", "value", "dense")

    def __init__(self, trial: Trial, device: torch.device) -> None:
        splits = target_of(trial.target, trial.data)
        special = METHODS[trial.method].sentences or trial.curve_every or trial.head == "probed"
        if trial.target.startswith("glue/") and special:
            raise RecAdamError(
                f"{trial.target}: method {trial.method!r}, head={trial.head}, "
                f"curve_every={trial.curve_every}: one of them is for encoders of sentences with a linear "
                "head, and GLUE's classifiers are none; give another target"
            )
        self._texts, self._splits = drawn(trial, splits.train), splits
        module, classes = _module(trial, splits.classes), splits.classes
        super().__init__(trial, module, module.new, device)
        if trial.init == "random":
            torch.manual_seed(trial.seed)  # whatever loading has drawn
            renew(self.module.body, self.module.body.modules())
        self._train = self.encoded(self._texts.first, self._texts.second)
        self._wanted = torch.tensor(self._texts.labels, device=device)
        self._loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
        if classes == 1:
            self._wanted, self._loss = self._wanted.float()[:, None], nn.functional.mse_loss
        if METHODS[trial.method].trains:
            self._rows = ordered(trial, self._train.lengths)

    @property
    def sentences(self) -> bool:
        """Whether it embeds sentences, so that the source tasks can be measured."""
        return isinstance(self.module, SentenceClassifier)

    def encoded(self, first: Sequence[str], second: Sequence[str] | None = None) -> Encoded:
        """Texts, or pairs of them, for this model."""
        return encoded(self.module, self.trial.max_length, self.device, first, second)

    def probe(self) -> None:
        """Let the head begin as a logistic regression on the pretrained features."""
        features = self._train.each(self.module.eval().features)
        probe_head(self.module.classifier, features, self._texts.labels, self.trial.inverse_strength)

    def loss(self, t: int) -> Tensor:
        """Cross-entropy; of grades the squared error."""
        rows = self._rows[t - 1]
        return self._loss(self.module(self._train.batch(rows)), self._wanted[rows])

    def old(self, seed: int, count: int) -> Old:
        """The source task's training pairs."""
        return PairBatches(self.encoded, self.module.features, seed, count)

    def features(self, t: int) -> Tensor:
        """Directions of the sentence embeddings."""
        return nn.functional.normalize(self.module.features(self._train.batch(self._rows[t - 1])), dim=1)

    def said(self, t: int) -> Tensor:
        """Of each text, which of the others is like it."""
        return likeness(self.features(t))

    def probed(self) -> dict[str, Array]:
        """Embeddings of held-out rows."""
        texts = self._splits.validation
        some = self.encoded(texts.first[:PROBED], texts.second and texts.second[:PROBED])
        return {"moved": some.each(self.module.eval().features)}

    @staticmethod
    def moved(before: Array, now: Array) -> float:
        """One minus the mean cosine of embeddings."""
        return turned(before, now)

    def measure(self, split: str) -> dict[str, float]:
        """Figures of the target task, and of the source tasks where it embeds sentences."""
        texts = getattr(self._splits, split)
        scores = self.encoded(texts.first, texts.second).each(self.module.eval())
        figures = self._splits.metrics(scores, texts.labels)
        if not self.sentences:
            return figures
        chance = 1.0 / self._splits.classes
        return {**figures, "learned": figures["accuracy"], "learned_before": chance, **self.source(split)}

    def source(self, split: str) -> dict[str, float]:
        """Figures of the source tasks."""
        return source_of(self.module, self.trial.max_length, self.device, split)

    def body(self) -> Any:
        """The encoder."""
        return self.module.body


def _module(trial: Trial, classes: int) -> Any:
    torch.manual_seed(trial.seed)
    module: Any
    if trial.target.startswith("glue/"):
        module = Classifier(trial.model, classes)
    else:
        module = SentenceClassifier(trial.model, classes, np.random.default_rng(trial.seed))
    set_dropout(module, trial.dropout)
    return module


def encoded(
    module: Any, length: int, device: torch.device, first: Sequence[str], second: Sequence[str] | None = None
) -> Encoded:
    """Texts, or pairs of them, for a model."""
    words = module.body.get_input_embeddings().num_embeddings
    return Encoded(module.tokenizer, first, second, length, words, device)


def source_of(module: Any, length: int, device: torch.device, split: str) -> dict[str, float]:
    """Figures of the source tasks."""
    module.eval()
    found = Source(split).measure(lambda texts: encoded(module, length, device, texts).each(module.features))
    return {**found, "lost": found["snli_mnr"]}


@lru_cache(maxsize=8)
def source_before(name: str, split: str, length: int, device: str) -> Mapping[str, float]:
    """What the encoder knew before any training."""
    where = torch.device(device)
    return source_of(_module(Trial(model=name), 2).to(where), length, where, split)


def likeness(directions: Tensor) -> Tensor:
    """Log-probabilities of the other rows by the cosine with each, scaled as in the source task's loss."""
    scores = 20.0 * directions @ directions.T
    return nn.functional.log_softmax(scores.fill_diagonal_(-torch.inf), dim=1)


def turned(before: Array, now: Array) -> float:
    """One minus the mean cosine."""
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(now, axis=1)
    return float(1.0 - np.mean(np.sum(before * now, axis=1, dtype=np.float64) / norms))


class PairBatches:
    """Batches of the source task's training pairs."""

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Encoded],
        features: Callable[[Batch], Tensor],
        seed: int,
        count: int,
    ) -> None:
        premises, entailed = Source.pairs()
        self._parts, self._features = (encode(premises), encode(entailed)), features
        rows = batch_order(len(premises), SOURCE_BATCH, count, seed + 10_000)
        self._rows = grouped(rows, self._parts[0].lengths, seed)

    def loss(self, t: int, sign: float = 1.0) -> Tensor:
        """In-batch negatives: each premise is to find the sentence that follows from it."""
        parts = (part.batch(self._rows[t - 1]) for part in self._parts)
        one, other = (nn.functional.normalize(self._features(x), dim=1) for x in parts)
        wanted = torch.arange(len(one), device=one.device)
        return nn.functional.cross_entropy(sign * 20.0 * one @ other.T, wanted)
