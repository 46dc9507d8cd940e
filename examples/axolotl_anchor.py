"""A plugin for Axolotl: the pull towards the pretrained weights, by two lines of its configuration.

plugins: [axolotl_anchor.AnchorPlugin]     # with this file on the Python path
anchor_pull: 0.1
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from recadam_torch.huggingface import AnchorCallback


class AnchorArgs(BaseModel):
    """What the configuration may say."""

    anchor_pull: float = 0.1
    anchor_weights: str | None = None  # where the pretrained weights are, if the model does not name them


class AnchorPlugin(BasePlugin):
    """Adds the callback to whatever trainer Axolotl makes."""

    def get_input_args(self) -> str:
        return "axolotl_anchor.AnchorArgs"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[AnchorCallback]:
        return [AnchorCallback(cfg.anchor_pull, cfg.anchor_weights)]
