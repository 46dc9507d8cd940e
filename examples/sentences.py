"""sentence-transformers and one line more: MiniLM learns newsgroups; does it still find what it found before?

python examples/sentences.py --steps 100
python examples/sentences.py --steps 100 --pull 0      # the same without
"""

from __future__ import annotations

import argparse
import tempfile

import numpy as np
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from recadam_core import Linear
from recadam_harness.archives import model_folder
from recadam_harness.experiments.data import Source, target_of
from recadam_torch.huggingface import AnchorCallback


def halves(texts: list[str]) -> tuple[list[str], list[str]]:
    """The beginnings and the middles of posts that are long enough."""
    words = [text.split() for text in texts]
    long = [row for row in words if len(row) > 70]
    return [" ".join(row[:12]) for row in long], [" ".join(row[25:70]) for row in long]


def found(model: SentenceTransformer, queries: list[str], passages: list[str]) -> float:
    """Recall at 1: how often the passage that belongs to a query is the nearest."""
    a, b = (model.encode(texts, normalize_embeddings=True) for texts in (queries, passages))
    return float(np.mean((a @ b.T).argmax(1) == np.arange(len(a))))


def main() -> None:
    """Train, and print what was learnt and what was kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pull", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--annealed", action="store_true", help="let the pull go by the end")
    args = parser.parse_args()

    folder = str(model_folder("minilm-l6"))
    model = SentenceTransformer(modules=[Transformer(folder, max_seq_length=64), Pooling(384)], device="cpu")
    posts, source = target_of("topics"), Source("test")
    new = [part[:500] for part in halves(posts.test.first)]
    old, news = (source.premises[:500], source.entailed[:500]), (source.titles, source.bodies)

    def say(when: str) -> None:
        scores = [found(model, *pairs) for pairs in (new, old, news)]
        words = ", ".join(f"{x:.3f} of {y}" for x, y in zip(scores, ("posts", "SNLI", "news"), strict=True))
        print(f"{when}: finds {words}", flush=True)

    say("before")
    first, second = (part[: 32 * args.steps] for part in halves(posts.train.first))
    annealing = Linear(t0=args.steps) if args.annealed else None
    with tempfile.TemporaryDirectory() as runs:
        arguments = SentenceTransformerTrainingArguments(
            runs,
            max_steps=args.steps,
            per_device_train_batch_size=32,
            learning_rate=args.lr,
            warmup_steps=args.steps // 10,
            logging_steps=args.steps // 2,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = SentenceTransformerTrainer(
            model,
            args=arguments,
            train_dataset=Dataset.from_dict({"anchor": first, "positive": second}),
            loss=MultipleNegativesRankingLoss(model),
        )
        trainer.add_callback(AnchorCallback(args.pull, annealing=annealing))
        trainer.train()
    say("after")


if __name__ == "__main__":
    main()
