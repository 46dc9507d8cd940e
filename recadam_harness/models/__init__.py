"""Models of the harness, written once as functions of (ops, parameters, batch)."""

from .bert import Bert, BertConfig
from .gemma import Gemma, GemmaConfig
from .mlp import MLP
from .ops import Model, Ops

__all__ = ["MLP", "Bert", "BertConfig", "Gemma", "GemmaConfig", "Model", "Ops"]
