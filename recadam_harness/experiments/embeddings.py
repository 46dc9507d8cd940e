"""Embeddings: an encoder learns which passages belong together in a domain; what of retrieval elsewhere?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..archives import model_folder
from ..decoders import quiet
from ..run import batch_order
from ..tasks.movie_reviews import read_bbc, retrieval_figures
from .classification import likeness, turned
from .classifiers import set_dropout
from .data import Source, target_of
from .subject import Old, Subject, drawn, few, grouped, ordered
from .trial import Trial

__all__ = ["Embeddings"]

Array = np.ndarray[Any, Any]
ARTICLES = {"validation": slice(256, 512), "test": slice(0, 256)}
BODY = 96  # tokens of an article
PROBED = 128


class Embeddings(Subject):
    """A sentence-transformers model, trained by that library's own contrastive loss."""

    adapted = ("query", "key", "value", "dense")

    def __init__(self, trial: Trial, device: torch.device) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        folder, settings = str(model_folder(trial.model)), {"add_pooling_layer": False}
        with quiet():
            encoder = Transformer(folder, max_seq_length=trial.max_length, model_kwargs=settings)
        pooling = Pooling(encoder.auto_model.config.hidden_size)
        module = SentenceTransformer(modules=[encoder, pooling], device=str(device))
        set_dropout(module, 0.0)
        super().__init__(trial, module, set(), device)
        self._splits = target_of(trial.target)
        texts = drawn(trial, self._splits.train)
        self._pairs = texts.first, texts.second or []
        self._rows = ordered(trial, np.array([len(second) for second in self._pairs[1]]))
        self._loss = MultipleNegativesRankingLoss(module)

    def _read(self, texts: Sequence[str]) -> dict[str, Any]:
        read = self.module.preprocess(list(texts))
        return {name: x.to(self.device) if isinstance(x, Tensor) else x for name, x in read.items()}

    def _embedded(self, texts: Sequence[str]) -> Tensor:
        found: Tensor = self.module(self._read(texts))["sentence_embedding"]
        return found

    def _batch(self, t: int) -> list[list[str]]:
        return [[column[i] for i in self._rows[t - 1]] for column in self._pairs]

    def _pair_loss(self, pair: Sequence[Sequence[str]]) -> Tensor:
        none: Any = None
        loss: Tensor = self._loss([self._read(texts) for texts in pair], none)
        return loss

    def loss(self, t: int) -> Tensor:
        """In-batch negatives: each beginning is to find its passage."""
        return self._pair_loss(self._batch(t))

    def old(self, seed: int, count: int) -> Old:
        """SNLI's training pairs, of the kind that the encoders were trained on."""
        return _Pairs(self, seed, count)

    def features(self, t: int) -> Tensor:
        """Directions of the embeddings of both sides."""
        return torch.cat([nn.functional.normalize(self._embedded(x), dim=1) for x in self._batch(t)])

    def said(self, t: int) -> Tensor:
        """Of each passage, which of the others is like it."""
        return likeness(nn.functional.normalize(self._embedded(self._batch(t)[1]), dim=1))

    @torch.no_grad()
    def each(self, texts: Sequence[str]) -> Array:
        """Embeddings of texts."""
        found: Array = self.module.eval().encode(list(texts), batch_size=64, show_progress_bar=False)
        return found

    def _few(self, texts: Sequence[str]) -> Array:
        return self.each(few(self.trial, texts))

    def probed(self) -> dict[str, Array]:
        """Embeddings of held-out passages."""
        return {"moved": self.each((self._splits.validation.second or [])[:PROBED])}

    @staticmethod
    def moved(before: Array, now: Array) -> float:
        """One minus the mean cosine."""
        return turned(before, now)

    def measure(self, split: str) -> dict[str, float]:
        """Retrieval of the new pairs, of SNLI's, and of BBC's articles by their titles."""
        texts, source = getattr(self._splits, split), Source(split)
        sides = [self._few(texts.first), self._few(texts.second or [])]
        new = {**retrieval_figures(*sides), "mrr": reciprocal_rank(*sides)}
        snli = [self._few(part) for part in (source.premises, source.entailed, source.contradicted)]
        titles, bodies = (part[ARTICLES[split]] for part in read_bbc(512))
        bbc = retrieval_figures(self._few(titles), self._few(bodies))
        figures = {**new, **{f"snli_{name}": x for name, x in retrieval_figures(*snli).items()}}
        figures |= {f"bbc_{name}": x for name, x in bbc.items()}
        return {**figures, "learned": new["mrr"], "lost": (figures["snli_mnr"] + bbc["mnr"]) / 2}

    def body(self) -> Any:
        """The encoder."""
        return self.module[0].auto_model


def reciprocal_rank(queries: Array, answers: Array) -> float:
    """Mean of one over the rank, by cosine, of the answer that belongs to each query."""
    q, a = (x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, answers))
    similarity = q @ a.T
    ranks = 1 + np.sum(similarity > np.diag(similarity)[:, None], axis=1)
    return float(np.mean(1.0 / ranks))


class _Pairs:
    """Batches of SNLI's training pairs."""

    def __init__(self, subject: Embeddings, seed: int, count: int) -> None:
        self._subject, self._pairs = subject, Source.pairs()
        rows = batch_order(len(self._pairs[0]), subject.trial.batch_size, count, seed + 10_000)
        self._rows = grouped(rows, np.array([len(text) for text in self._pairs[0]]), seed)

    def loss(self, t: int, sign: float = 1.0) -> Tensor:
        """The encoder's own loss; with reversed scores, of those."""
        pair = [[column[i] for i in self._rows[t - 1]] for column in self._pairs]
        if sign > 0:
            return self._subject._pair_loss(pair)
        one, other = (nn.functional.normalize(self._subject._embedded(x), dim=1) for x in pair)
        return nn.functional.cross_entropy(sign * 20.0 * one @ other.T, torch.arange(len(one)))
