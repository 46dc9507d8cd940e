"""A loop under the pull that goes on from its last checkpoint: `python pulled_worker.py FOLDER STEPS`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from recadam_core import Sigmoid
from recadam_torch import anchor


def main(folder: Path, steps: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim == 2]
    others = [(n, p) for n, p in model.named_parameters() if p.ndim != 2]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.02, fused=True)]
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=steps) for o in optimizers]
    for optimizer in optimizers:  # at the pretrained weights, before a checkpoint is loaded
        anchor(optimizer, pull=0.3, annealing=Sigmoid(k=0.2, t0=steps / 2))
    parts = {"model": model, **{f"o{i}": o for i, o in enumerate(optimizers)}}
    parts |= {f"s{i}": s for i, s in enumerate(schedules)}
    latest, step = folder / "latest.pt", 0
    if latest.exists():
        saved = torch.load(latest, weights_only=True)
        step = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    print(f"at {step}", flush=True)
    while step < steps:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        (model(x) - x[:, :4].sin()).square().mean().backward()
        for one in (*optimizers, *schedules):
            one.step()
        step += 1
        torch.save({"step": step, **{n: part.state_dict() for n, part in parts.items()}}, folder / "new.pt")
        os.replace(folder / "new.pt", latest)
        time.sleep(0.01)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
