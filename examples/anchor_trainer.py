"""Trainer with the optimizer that it makes, and one line more: the pull. A meter says what was forgotten.

python examples/anchor_trainer.py --steps 96
python examples/anchor_trainer.py --steps 96 --pull 0      # the same without
"""

from __future__ import annotations

import argparse
import tempfile
import time

from reviews import accuracy, headlines, load, sentence_embeddings
from transformers import Trainer, TrainingArguments

from recadam_torch import Forgetting
from recadam_torch.huggingface import AnchorCallback


def main() -> None:
    """Train, and print what was learnt and what was kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--pull", type=float, default=0.1)
    args = parser.parse_args()

    pretrained, model, train, test = load()
    callback = AnchorCallback(args.pull, pretrained, new=["classifier.*", "bert.pooler.*"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=16,
            learning_rate=3e-4,
            warmup_steps=5,
            logging_steps=32,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=train)
        trainer.add_callback(callback)
        seconds = trainer.train().metrics["train_runtime"] / args.steps
    few = Forgetting(model, callback, headlines(pretrained, 16), outputs=sentence_embeddings, embeddings=True)
    few()
    started = time.perf_counter()
    few()
    share = (time.perf_counter() - started) / seconds
    print(f"to measure 16 headlines takes {share:.2f} of the time of a step of 16 reviews")
    meter = Forgetting(model, callback, headlines(pretrained), outputs=sentence_embeddings, embeddings=True)
    print(f"headlines' embeddings turned by 1 - cosine = {meter().figure:.3f}")
    print(f"test accuracy: {accuracy(model.cpu(), test):.3f}")


if __name__ == "__main__":
    main()
