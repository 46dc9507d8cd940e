"""RecAdam for PyTorch: a drop-in for `torch.optim.AdamW` that remembers.

from recadam_torch import RecAdam

optimizer = RecAdam(model.named_parameters(), lr=2e-5)     # anchored where the model is now
"""

from .backend import TorchBackend, backend
from .kernel import kernel_
from .optimizer import RecAdam

__all__ = ["RecAdam", "TorchBackend", "backend", "kernel_"]
