"""A loop of one's own with Muon for the matrices, AdamW for the rest, and the pull around both.

python examples/anchor_muon.py --steps 96
python examples/anchor_muon.py --steps 96 --pull 0      # the same without
"""

from __future__ import annotations

import argparse

import torch
from reviews import accuracy, headlines, load, sentence_embeddings
from torch.utils.data import DataLoader, RandomSampler

from recadam_torch import Anchors, Forgetting, anchor


def main() -> None:
    """Train, and print what was learnt and what was kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--pull", type=float, default=0.1)
    args = parser.parse_args()

    pretrained, model, train, test = load()
    anchors = Anchors.of(model, pretrained, new=["classifier.*", "bert.pooler.*"])
    named = dict(model.named_parameters())
    matrices = {n: p for n, p in named.items() if p.ndim == 2 and ".layer." in n}
    rest = {n: p for n, p in named.items() if n not in matrices}
    optimizers = [
        torch.optim.Muon(matrices.items(), lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest.items(), lr=3e-4, weight_decay=0.0, fused=True),
    ]
    handles = [anchor(optimizer, anchors, pull=args.pull) for optimizer in optimizers]
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=args.steps) for o in optimizers]

    model.train()
    sampler = RandomSampler(train, True, 16 * args.steps, generator=torch.Generator().manual_seed(0))
    for batch in DataLoader(train, batch_size=16, sampler=sampler):
        model(**batch).loss.backward()
        for one in (*optimizers, *schedules):
            one.step()
        model.zero_grad()

    print(f"distance to the pretrained matrices: {handles[0].drift().distance:.3f}")
    probe = headlines(pretrained)
    meter = Forgetting(model, handles, probe, outputs=sentence_embeddings, embeddings=True)
    print(f"headlines' embeddings turned by 1 - cosine = {meter().figure:.3f}")
    print(f"test accuracy: {accuracy(model, test):.3f}")


if __name__ == "__main__":
    main()
