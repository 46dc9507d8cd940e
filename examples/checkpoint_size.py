"""What a checkpoint of the optimizer weighs, beside AdamW's of the same model.

python examples/checkpoint_size.py
"""

from __future__ import annotations

import io

import torch
from reviews import load

from recadam_torch import RecAdam


def main() -> None:
    """Print the sizes."""
    _, model, _, _ = load(train=1, test=1)
    optimizers = {
        "AdamW": torch.optim.AdamW(model.named_parameters()),
        "RecAdam": RecAdam(model.named_parameters()),
        "RecAdam(save_anchors=True)": RecAdam(model.named_parameters(), save_anchors=True),
    }
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    sizes = {}
    for name, optimizer in optimizers.items():
        optimizer.step()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        sizes[name] = file.getbuffer().nbytes
        print(f"{name}: {sizes[name]:,} bytes, {sizes[name] / sizes['AdamW']:.4f} of AdamW's")


if __name__ == "__main__":
    main()
