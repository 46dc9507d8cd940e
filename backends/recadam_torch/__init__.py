"""RecAdam for PyTorch: a drop-in for `torch.optim.AdamW` that remembers.

from recadam_torch import RecAdam

optimizer = RecAdam(model.named_parameters(), lr=2e-5)     # anchored where the model is now
"""

from .anchors import Anchors, CoverageWarning, lora_anchors
from .backend import TorchBackend, backend
from .drift import Drift
from .forgetting import Forgetting, Forgotten
from .groups import param_groups
from .importance import feature_importance, importance_of
from .kernels import kernel_
from .matching import Coverage
from .optimizer import RecAdam
from .probing import probe_head
from .pulling import AnchorPull, anchor
from .reference import reference

__all__ = [
    "AnchorPull",
    "Anchors",
    "Coverage",
    "CoverageWarning",
    "Drift",
    "Forgetting",
    "Forgotten",
    "RecAdam",
    "TorchBackend",
    "anchor",
    "backend",
    "feature_importance",
    "importance_of",
    "kernel_",
    "lora_anchors",
    "param_groups",
    "probe_head",
    "reference",
]
