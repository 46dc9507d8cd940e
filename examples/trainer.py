"""Hugging Face's Trainer: the optimizer comes from a factory, and its figures are in the logs.

python examples/trainer.py --steps 96
"""

from __future__ import annotations

import argparse
import tempfile

from reviews import accuracy, load
from transformers import Trainer, TrainingArguments

from recadam_core import Sigmoid
from recadam_torch.huggingface import RecAdamCallback, RecAdamFactory


def main() -> None:
    """Train, and print the test accuracy."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=96)
    steps = parser.parse_args().steps

    pretrained, model, train, test = load()
    settings = {
        "anchors": pretrained,
        "new": ["classifier.*", "bert.pooler.*"],
        "weight_decay": 0.01,
        "lr": 1e-4,
        "gamma": 2000.0,
        "annealing": Sigmoid(k=0.1, t0=steps / 2),
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            warmup_steps=5,
            logging_steps=32,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            model, arguments, train_dataset=train, optimizer_cls_and_kwargs=(RecAdamFactory, settings)
        )
        RecAdamCallback.add_to(trainer)
        trainer.train()
    print(f"test accuracy: {accuracy(model.cpu(), test):.3f}")


if __name__ == "__main__":
    main()
