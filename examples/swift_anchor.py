"""A plugin for ms-swift: the pull towards the pretrained weights, by two options of its command line.

ANCHOR_PULL=0.1 swift sft --external_plugins examples/swift_anchor.py --callbacks anchor ...
"""

from __future__ import annotations

import os
from typing import Any

from swift.callbacks import callbacks_map

from recadam_torch.huggingface import AnchorCallback


def anchored(args: Any, trainer: Any) -> AnchorCallback:
    """The callback, as ms-swift makes one."""
    return AnchorCallback(float(os.environ.get("ANCHOR_PULL", "0.1")), os.environ.get("ANCHOR_WEIGHTS"))


callbacks_map["anchor"] = anchored
