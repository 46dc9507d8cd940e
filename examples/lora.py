"""LoRA with peft: the anchor of a product of low rank is zero, so the pull leads back to the frozen weights.

python examples/lora.py --steps 96
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from reviews import accuracy, load
from torch.utils.data import DataLoader, RandomSampler

from recadam_core import Constant
from recadam_torch import RecAdam, lora_anchors, param_groups


def main() -> None:
    """Train with and without the pull, and print what each learnt and how far it went."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=96)
    steps = parser.parse_args().steps

    for gamma in (0.0, 20.0):
        _, model, train, test = load()
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier", "pooler"]
        )
        model = get_peft_model(model, config)
        anchors = lora_anchors(model)
        optimizer = RecAdam(
            param_groups(model, anchors), lr=2e-3, gamma=gamma, annealing=Constant(task=1.0, recall=1.0)
        )
        sampler = RandomSampler(train, num_samples=16 * steps, replacement=True,
                                generator=torch.Generator().manual_seed(0))  # fmt: skip
        for batch in DataLoader(train, batch_size=16, sampler=sampler):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        print(
            f"gamma {gamma:g}: the factors are {optimizer.drift().distance:.3f} from zero, "
            f"test accuracy: {accuracy(model, test):.3f}"
        )


if __name__ == "__main__":
    main()
