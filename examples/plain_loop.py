"""A loop of one's own: warmup, clipping, mixed precision, checkpoints that a kill cannot spoil.

python examples/plain_loop.py --steps 96
python examples/plain_loop.py --steps 96 --folder runs/loop      # killed? the same line goes on, bit for bit
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from reviews import accuracy, load
from torch.utils.data import DataLoader, RandomSampler

from recadam_core import Sigmoid
from recadam_torch import Anchors, RecAdam, param_groups


def main() -> None:
    """Train, and print what was learnt and what was kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--every", type=int, default=8, help="steps between checkpoints")
    parser.add_argument("--folder", type=Path, help="where checkpoints go; none without it")
    parser.add_argument(
        "--rounding", default="nearest", help="of bfloat16 weights; float32 weights without it"
    )
    parser.add_argument("--bfloat16", action="store_true", help="keep the weights in bfloat16")
    args = parser.parse_args()

    pretrained, model, train, test = load()
    if args.bfloat16:
        model.to(torch.bfloat16)
    anchors = Anchors.of(model, pretrained, new=["classifier.*", "bert.pooler.*"], strict=True)
    groups = param_groups(model, anchors, weight_decay=0.01)
    optimizer = RecAdam(
        groups, lr=1e-4, gamma=2000.0, annealing=Sigmoid(k=0.1, t0=args.steps / 2), rounding=args.rounding
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=5)

    step = 0
    latest = args.folder / "latest.pt" if args.folder else None
    if latest and latest.exists():
        saved = torch.load(latest, weights_only=True)
        step = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        warmup.load_state_dict(saved["scheduler"])
        print(f"resumed at step {step}", flush=True)

    model.eval()  # no dropout, so that no random state is to be kept
    while step < args.steps:
        # Each step's batch follows from its number.
        sampler = RandomSampler(train, num_samples=16, generator=torch.Generator().manual_seed(step))
        (batch,) = DataLoader(train, batch_size=16, sampler=sampler)
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        step += 1
        if step % 32 == 0:
            drift = optimizer.drift()
            print(
                f"step {step}: loss {loss.item():.3f}, task weight {drift.task:.2f}, "
                f"pull {drift.pull_share:.0%} of the update, distance {drift.distance:.3f}"
            )
        if latest and step % args.every == 0:
            latest.parent.mkdir(parents=True, exist_ok=True)
            state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "scheduler": warmup.state_dict()}, latest.with_suffix(".new"))
            os.replace(latest.with_suffix(".new"), latest)
    if latest:
        torch.save(model.state_dict(), latest.with_name("final.pt"))

    print(f"distance to the pretrained weights: {optimizer.drift().distance:.3f}")
    with optimizer.interpolated(0.5, anchors):
        print(f"test accuracy half way back: {accuracy(model, test):.3f}")
    print(f"test accuracy: {accuracy(model, test):.3f}")


if __name__ == "__main__":
    main()
