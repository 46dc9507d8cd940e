"""Training that may be killed at any time: `python killed_worker.py FOLDER STEPS`.

Digits, an anchored body from a file, a new head. Says each step when it is taken, leaves a checkpoint every
few steps and the final weights in FOLDER/final.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

from recadam_core import Sigmoid
from recadam_torch import Anchors, RecAdam, param_groups

EVERY = 7


def main(folder, steps):
    folder, steps = Path(folder), int(steps)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 2)).to(torch.bfloat16)
    pretrained = folder / "pretrained.safetensors"
    if not pretrained.exists():
        beside = pretrained.with_suffix(f".{os.getpid()}")
        save_file({"0.weight": model[0].weight.detach(), "0.bias": model[0].bias.detach()}, beside)
        os.replace(beside, pretrained)
    latest, step, saved = folder / "latest.pt", 0, None
    if latest.exists():  # as trainers do: the tuned weights first
        saved = torch.load(latest, weights_only=True)
        model.load_state_dict(saved["model"])
        step = saved["step"]
    anchors = Anchors.of(model, pretrained, new=["2.*"])
    optimizer = RecAdam(
        param_groups(model, anchors, weight_decay=0.01), lr=1e-3, gamma=200.0, rounding="stochastic",
        annealing=Sigmoid(k=0.3, t0=steps / 2),
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16).to(torch.bfloat16), torch.tensor(y >= 5).long()
    while step < steps:
        rows = torch.randint(len(x), (32,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        scheduler.step()
        step += 1
        if step % EVERY == 0:
            state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "scheduler": scheduler.state_dict()}, latest.with_suffix(".new"))
            os.replace(latest.with_suffix(".new"), latest)
        print(step, flush=True)
    torch.save(model.state_dict(), folder / "final.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
