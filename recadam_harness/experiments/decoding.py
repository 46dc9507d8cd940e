"""A decoder learns to answer; what becomes of other text, and of answers that nobody taught?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recadam_core import RecAdamError

from ..decoders import Vocabulary, cut_decoder, decoder_folder, quiet, tokenizer_of
from ..run import batch_order
from ..tasks.reviews_decoder import review_prompt
from .data import TARGETS, news, posts, target_of
from .subject import Old, Subject, drawn, few, ordered
from .texts import Texts, accuracy_of
from .trial import Trial

__all__ = ["Decoding"]

Array = np.ndarray[Any, Any]
POOL = 3000  # rows that training draws from: the vocabulary has their words
ANSWERED = {"validation": 300, "test": 500}  # held-out rows that are answered
ARTICLES = {"validation": slice(0, 32), "test": slice(32, 96)}
TITLES = {"validation": slice(0, 120), "test": slice(120, 360)}
OLD = slice(360, 880)  # articles to train on
WORDS, LENGTH, PROBED = 60, 64, 8
TOPICS = (" business", " entertainment", " politics", " sport", " technology")


@dataclass(frozen=True)
class _Material:
    """A decoder, cut to the words of a target task and of what is measured, and all of that in tokens."""

    model: Any
    rows: dict[str, list[list[int]]]
    labels: dict[str, Array]
    answers: list[int]
    topics: list[int]
    news: list[list[int]]
    titles: list[list[int]]
    subjects: Array
    posts: list[list[int]]
    begin: int


@lru_cache(maxsize=1)
def _material(target: str) -> _Material:
    from transformers import AutoModelForCausalLM

    folder = decoder_folder()
    tokenizer, splits, words = tokenizer_of(folder), target_of(target), TARGETS[target].words
    parts = {
        "train": splits.train.part(slice(0, POOL)),
        **{name: getattr(splits, name).part(slice(0, count)) for name, count in ANSWERED.items()},
    }
    prompts = {name: _prompts(texts) for name, texts in parts.items()}
    titles, bodies, subjects = news()
    bodies = [" ".join(body.split()[:WORDS]) for body in bodies[: OLD.stop]]
    asked = [f"{title.strip()}\nThis article is about" for title in titles[: TITLES["test"].stop]]
    others = [" ".join(post.split()[:WORDS]) for post in posts(ARTICLES["test"].stop)]
    vocabulary = Vocabulary(
        tokenizer,
        [*(x for some in prompts.values() for x in some), *bodies, *asked, *others, *words, *TOPICS],
    )
    begin = vocabulary.new(tokenizer.bos_token_id)
    assert begin is not None
    kind: Any = AutoModelForCausalLM
    with quiet():
        model = kind.from_pretrained(cut_decoder(folder, vocabulary), dtype=torch.float32)
    return _Material(
        model=model.eval(),
        rows={name: vocabulary(some) for name, some in prompts.items()},
        labels={name: texts.labels for name, texts in parts.items()},
        answers=[row[-1] for row in vocabulary(words)],
        topics=[row[-1] for row in vocabulary(TOPICS)],
        news=[row[:LENGTH] for row in vocabulary(bodies)],
        titles=vocabulary(asked),
        subjects=np.array(subjects[: TITLES["test"].stop]),
        posts=[row[:LENGTH] for row in vocabulary(others)],
        begin=begin,
    )


def _prompts(texts: Texts) -> list[str]:
    """Rows as text that the answer ends."""
    if texts.second is None:
        return [review_prompt(text) for text in texts.first]
    pairs = zip(texts.first, texts.second, strict=True)
    return [f"{first.strip()}\nQuestion: {second.strip()}\nAnswer:" for first, second in pairs]


class Decoding(Subject):
    """Gemma 3 270M, cut to the words of the texts, that learns which word answers."""

    precision = "medium"  # bfloat16 where the processor has it, as decoders are trained; measured in float32
    adapted = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __init__(self, trial: Trial, device: torch.device) -> None:
        self._with = _material(trial.target)
        torch.manual_seed(trial.seed)
        super().__init__(trial, copy.deepcopy(self._with.model), set(), device)
        if trial.rows > POOL:
            raise RecAdamError(
                f"{trial.target}: rows is {trial.rows}; a decoder draws from {POOL}, give no more"
            )
        numbers = drawn(trial, Texts([str(i) for i in range(POOL)], None, self._with.labels["train"]))
        self._train = [self._with.rows["train"][int(i)][-trial.max_length :] for i in numbers.first]
        self._wanted = torch.tensor([self._with.answers[label] for label in numbers.labels], device=device)
        self._rows = ordered(trial, np.array([len(row) for row in self._train]))

    def _states(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The last layer's states, and their mask. What fills a row up stands after it, where none looks."""
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        longest = int(lengths.max())
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self.device)
        states: Tensor = self.module.model(input_ids=ids).last_hidden_state
        return states, torch.arange(longest, device=self.device) < lengths[:, None]

    def _last(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits of the word after each row."""
        states, mask = self._states(rows)
        logits: Tensor = self.module.lm_head(states[torch.arange(len(rows)), mask.sum(1) - 1])
        return logits

    def _tokens(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Logits of every token but the first, and these tokens."""
        states, mask = self._states(rows)
        within = mask[:, 1:]
        ids = torch.tensor([i for row in rows for i in row[1:]], device=self.device)
        return self.module.lm_head(states[:, :-1][within]), ids

    def nats(self, rows: Sequence[Sequence[int]], sign: float = 1.0) -> Tensor:
        """Nats a token."""
        logits, ids = self._tokens(rows)
        return nn.functional.cross_entropy(sign * logits, ids)

    def _batch(self, t: int) -> list[list[int]]:
        return [self._train[i] for i in self._rows[t - 1]]

    def loss(self, t: int) -> Tensor:
        """Cross-entropy of the answers."""
        return nn.functional.cross_entropy(self._last(self._batch(t)), self._wanted[self._rows[t - 1]])

    def old(self, seed: int, count: int) -> Old:
        """Articles of the news."""
        return _Articles(self, self._with.news[OLD], seed, count)

    def own(self, seed: int, count: int) -> Old:
        """Texts that the pretrained model writes."""
        torch.manual_seed(seed)
        ids = torch.full((count * self.trial.batch_size, 1), self._with.begin, device=self.device)
        with torch.no_grad():
            written = self.module.eval().generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                min_new_tokens=LENGTH - 1, max_new_tokens=LENGTH - 1,
            )  # fmt: skip
        return _Articles(self, written.tolist(), seed, count)

    def features(self, t: int) -> Tensor:
        """Directions of the mean states."""
        states, mask = self._states(self._batch(t))
        weights = mask[..., None].to(states.dtype)
        return nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=1)

    def said(self, t: int) -> Tensor:
        """Of every token of the questions, which it is."""
        return nn.functional.log_softmax(self._tokens(self._batch(t))[0], dim=1)

    @torch.no_grad()
    def probed(self) -> dict[str, Array]:
        """Log-probabilities of the tokens of held-out questions, and of news."""
        self.module.eval()
        texts = {"moved": self._with.rows["validation"], "kl": self._with.news[ARTICLES["validation"]]}
        return {
            name: nn.functional.log_softmax(self._tokens(rows[:PROBED])[0], dim=1).cpu().numpy()
            for name, rows in texts.items()
        }

    @staticmethod
    def moved(before: Array, now: Array) -> float:
        """Divergence from before, nats a token."""
        return float(np.mean(np.sum(np.exp(before) * (before - now), axis=1, dtype=np.float64)))

    @torch.no_grad()
    def measure(self, split: str) -> dict[str, float]:
        """Accuracy of answers; nats a token of news and of posts; accuracy of topics, which nobody taught."""
        self.module.eval()
        known, trial = self._with, self.trial

        def accuracy(rows: Sequence[Sequence[int]], wanted: Array, answers: Sequence[int]) -> float:
            some = [row[-trial.max_length :] for row in few(trial, rows)]
            return accuracy_of(self._scores(some, answers), few(trial, wanted))["accuracy"]

        learned = accuracy(known.rows[split], known.labels[split], known.answers)
        topics = accuracy(known.titles[TITLES[split]], known.subjects[TITLES[split]], known.topics)
        news, posts = (self._mean(few(trial, part[ARTICLES[split]])) for part in (known.news, known.posts))
        return {
            "accuracy": learned,
            "topics_accuracy": topics,
            "news_nats": news,
            "posts_nats": posts,
            "learned": learned,
            "lost": (news + posts) / 2,
        }

    def _scores(self, rows: Sequence[Sequence[int]], answers: Sequence[int]) -> Array:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = np.zeros((len(rows), len(answers)))
        for start in range(0, len(rows), 32):
            some = order[start : start + 32]
            scores[some] = self._last([rows[i] for i in some])[:, list(answers)].cpu().numpy()
        return scores

    def _mean(self, rows: Sequence[Sequence[int]]) -> float:
        parts = [rows[i : i + 16] for i in range(0, len(rows), 16)]
        weights = [sum(len(row) - 1 for row in part) for part in parts]
        return float(np.average([float(self.nats(part)) for part in parts], weights=weights))


class _Articles:
    """Texts in batches."""

    def __init__(self, subject: Decoding, rows: Sequence[Sequence[int]], seed: int, count: int) -> None:
        self._subject, self._rows = subject, rows
        self._order = batch_order(len(rows), subject.trial.batch_size, count, seed + 10_000)

    def loss(self, t: int, sign: float = 1.0) -> Tensor:
        """Nats a token."""
        return self._subject.nats([self._rows[i] for i in self._order[t - 1]], sign)
