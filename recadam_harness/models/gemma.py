"""A Gemma 3 decoder over any array namespace, with the parameter names of Hugging Face checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recadam_core.errors import RecAdamError, check_number, check_whole, shown
from recadam_core.files import parse_json

from ..memory import check_memory
from .bert import read_parameters
from .ops import Model, Ops, softmax

__all__ = ["Gemma", "GemmaConfig", "load_gemma"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class GemmaConfig:
    """The sizes of a decoder of text, as in a checkpoint's config.json.

    Args:
        full: which layers look at everything before a token; the others at `sliding_window` tokens.
        bases: of the rotary frequencies, in the layers that slide and in the others.
    """

    vocab_size: int
    hidden_size: int = 640
    num_hidden_layers: int = 18
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = 256
    intermediate_size: int = 2048
    sliding_window: int = 512
    query_pre_attn_scalar: float = 256.0
    rms_norm_eps: float = 1e-6
    full: tuple[bool, ...] = tuple(n % 6 == 5 for n in range(18))
    bases: tuple[float, float] = (10_000.0, 1_000_000.0)

    @classmethod
    def read(cls, where: str, values: Mapping[str, Any]) -> GemmaConfig:
        """The sizes in a config.json, if they are those of such a decoder."""
        others = {
            "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
            "tie_word_embeddings": True, "use_bidirectional_attention": False,
            "final_logit_softcapping": None, "attn_logit_softcapping": None,
        }  # fmt: skip
        for name, wanted in others.items():
            if (found := values.get(name, wanted)) != wanted:
                raise RecAdamError(
                    f"{where}: {name} is {shown(found)}; the harness trains those of {wanted!r}"
                )
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
                 "num_key_value_heads", "intermediate_size", "sliding_window", "query_pre_attn_scalar",
                 "rms_norm_eps")  # fmt: skip
        try:
            rotary = [values["rope_parameters"][f"{kind}_attention"] for kind in ("sliding", "full")]
            if any(some.get("rope_type", "default") != "default" for some in rotary):
                raise RecAdamError(
                    f"{where}: rotary positions are scaled; the harness trains those that are not"
                )
            full = tuple(kind == "full_attention" for kind in values["layer_types"])
            bases = (rotary[0]["rope_theta"], rotary[1]["rope_theta"])
            sizes = {name: values[name] for name in names}
        except (KeyError, TypeError) as error:
            raise RecAdamError(f"{where}: no {error}; give the config.json of a Gemma 3 decoder") from None
        for name, value in sizes.items():
            if name in ("query_pre_attn_scalar", "rms_norm_eps"):
                check_number(where, name, value, low=0.0, open_low=True)
            else:
                check_whole(f"{where}: {name}", value, 1)
        low, high = (check_number(where, "rope_theta", base, low=1.0, open_low=True) for base in bases)
        config = cls(**sizes, full=full, bases=(low, high))
        heads, keys = config.num_attention_heads, config.num_key_value_heads
        if heads % keys:
            raise RecAdamError(
                f"{where}: num_attention_heads is {heads}, of {keys} heads of keys; give a number that they "
                "divide"
            )
        if config.head_dim % 2:
            raise RecAdamError(f"{where}: head_dim is {config.head_dim}; rotary positions want an even one")
        if len(full) != config.num_hidden_layers:
            raise RecAdamError(
                f"{where}: layer_types has {len(full)} of {config.num_hidden_layers} layers; give files that "
                "belong together"
            )
        return config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter by its name in the checkpoint; the head is the embedding."""
        h, d = self.hidden_size, self.head_dim
        dense = {
            "self_attn.q_proj": (self.num_attention_heads * d, h),
            "self_attn.k_proj": (self.num_key_value_heads * d, h),
            "self_attn.v_proj": (self.num_key_value_heads * d, h),
            "self_attn.o_proj": (h, self.num_attention_heads * d),
            "mlp.gate_proj": (self.intermediate_size, h),
            "mlp.up_proj": (self.intermediate_size, h),
            "mlp.down_proj": (h, self.intermediate_size),
        }
        norms = {
            "self_attn.q_norm": (d,), "self_attn.k_norm": (d,), "input_layernorm": (h,),
            "post_attention_layernorm": (h,), "pre_feedforward_layernorm": (h,),
            "post_feedforward_layernorm": (h,),
        }  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, h)}
        for n in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{n}.{name}.weight": x for name, x in (dense | norms).items()}
        return {**shapes, "model.norm.weight": (h,)}


@dataclass(frozen=True)
class Gemma(Model):
    """Gemma 3, which answers each row with one of a few words, without dropout.

    Batches hold "ids" (rows, length) of int64, "mask" (rows, length) of floats that are 1 at tokens
    and 0 after them, and "targets" (rows, answers).

    Source: arXiv 2503.19786; RMSNorm before and after each part, rotary positions, grouped queries, sliding
    windows, gated GELU, and the embedding as head.
    """

    config: GemmaConfig
    answers: tuple[int, ...]  # the tokens of the answers
    kind = "gemma"
    head = ""

    def hidden(self, ops: Ops, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """The last layer's normalized states, of shape (rows, length, hidden_size)."""
        xp, c = ops.xp, self.config
        rows, length = batch["ids"].shape
        groups = c.num_attention_heads // c.num_key_value_heads

        def norm(x: Any, name: str) -> Any:
            scale = 1.0 / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + c.rms_norm_eps)
            return x * scale * (1.0 + params[f"{name}.weight"])

        def dense(x: Any, name: str) -> Any:
            return x @ params[f"{name}.weight"].T

        def split(x: Any) -> Any:
            """(rows, heads of keys, queries of each, length, head_dim)."""
            parts = xp.reshape(x, (rows, length, c.num_key_value_heads, -1, c.head_dim))
            return xp.permute_dims(parts, (0, 2, 3, 1, 4))

        # Places of tokens and of pairs, counted from what is there: of its dtype, on its device.
        place = xp.cumulative_sum(xp.ones_like(batch["mask"][0, :])) - 1.0
        pair = xp.cumulative_sum(xp.ones_like(params["model.norm.weight"][: c.head_dim // 2])) - 1.0
        apart = place[:, None] - place[None, :]

        def waves(base: float) -> tuple[Any, Any]:
            angles = place[:, None] * xp.exp(pair * (-2.0 * math.log(base) / c.head_dim))[None, :]
            angles = xp.concat([angles, angles], axis=-1)
            return xp.cos(angles), xp.sin(angles)

        def turned(x: Any, cos: Any, sin: Any) -> Any:
            first, second = x[..., : c.head_dim // 2], x[..., c.head_dim // 2 :]
            return x * cos + xp.concat([-second, first], axis=-1) * sin

        sight = {}
        for full in set(c.full):
            hidden = (apart < 0) if full else (apart < 0) | (apart >= c.sliding_window)
            # exp underflows to an exact zero.
            sight[full] = xp.where(hidden, xp.full_like(apart, -1e9), xp.zeros_like(apart))
        turns = {full: waves(c.bases[full]) for full in set(c.full)}
        words = params["model.embed_tokens.weight"]
        x = xp.reshape(xp.take(words, xp.reshape(batch["ids"], (-1,)), axis=0), (rows, length, c.hidden_size))
        x = x * c.hidden_size**0.5
        for n, full in enumerate(c.full):
            layer = f"model.layers.{n}"
            y = norm(x, f"{layer}.input_layernorm")
            query, key, value = (split(dense(y, f"{layer}.self_attn.{part}_proj")) for part in "qkv")
            query = turned(norm(query, f"{layer}.self_attn.q_norm"), *turns[full])
            key = turned(norm(key, f"{layer}.self_attn.k_norm"), *turns[full])
            scores = query @ xp.permute_dims(key, (0, 1, 2, 4, 3)) * c.query_pre_attn_scalar**-0.5
            mixed = xp.permute_dims(softmax(ops, scores + sight[full]) @ value, (0, 3, 1, 2, 4))
            mixed = xp.reshape(mixed, (rows, length, c.num_key_value_heads * groups * c.head_dim))
            x = x + norm(dense(mixed, f"{layer}.self_attn.o_proj"), f"{layer}.post_attention_layernorm")
            y = norm(x, f"{layer}.pre_feedforward_layernorm")
            y = _gelu(ops, dense(y, f"{layer}.mlp.gate_proj")) * dense(y, f"{layer}.mlp.up_proj")
            x = x + norm(dense(y, f"{layer}.mlp.down_proj"), f"{layer}.post_feedforward_layernorm")
        return norm(x, "model.norm")

    def floats_a_row(self, rows: Mapping[str, Any]) -> int:
        """States and attention of every layer, and scores of every word."""
        c, length = self.config, int(rows["ids"].shape[1])
        states = length * (12 * c.hidden_size + 4 * c.intermediate_size + 6 * c.head_dim)
        attention = 3 * c.num_attention_heads * length**2
        return c.num_hidden_layers * (states + attention) + 3 * c.vocab_size

    def features(self, ops: Ops, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """The state of each row's last token, of shape (rows, hidden_size)."""
        xp, mask = ops.xp, batch["mask"]
        last = mask * (1.0 - xp.concat([mask[:, 1:], xp.zeros_like(mask[:, :1])], axis=1))
        return xp.sum(self.hidden(ops, params, batch) * last[:, :, None], axis=1)

    def words(self, ops: Ops, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """Scores of every word after each row, of shape (rows, vocab_size)."""
        return self.features(ops, params, batch) @ params["model.embed_tokens.weight"].T

    def logits(self, ops: Ops, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """Scores of the answers, of shape (rows, answers)."""
        words = self.words(ops, params, batch)
        return ops.xp.stack([words[:, i] for i in self.answers], axis=1)

    def loss(self, ops: Ops, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """Cross-entropy of the right answer among all words, a scalar."""
        xp, words = ops.xp, self.words(ops, params, batch)
        right = sum(words[:, i] * batch["targets"][:, k] for k, i in enumerate(self.answers))
        return xp.mean(_log_sum(ops, words) - right)

    def nats(self, ops: Ops, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """What each row's tokens but the first cost, in nats, and how many they are: (rows, 2)."""
        xp, ids = ops.xp, batch["ids"]
        states = self.hidden(ops, params, batch)[:, :-1, :]
        scores = states @ params["model.embed_tokens.weight"].T
        told = xp.take_along_axis(scores, ids[:, 1:, None], axis=-1)[..., 0]
        counted = batch["mask"][:, 1:]
        costs = (_log_sum(ops, scores) - told) * counted
        return xp.stack([xp.sum(costs, axis=1), xp.sum(counted, axis=1)], axis=1)


def load_gemma(folder: Path) -> tuple[GemmaConfig, dict[str, Array]]:
    """The decoder in a Hugging Face checkpoint folder (config.json and model.safetensors)."""
    path = folder / "config.json"
    if not path.is_file():
        raise RecAdamError(f"{folder}: no config.json; give a Hugging Face checkpoint folder")
    config = GemmaConfig.read(str(path), parse_json(path, path.read_bytes(), dict, "fetch it again"))
    shapes = config.shapes()
    check_memory(f"{path}: a decoder of these sizes", 4.0 * sum(map(math.prod, shapes.values())))
    return config, read_parameters(folder / "model.safetensors", shapes)


def _log_sum(ops: Ops, x: Any) -> Any:
    """The logarithm of the sum of exponentials over the last axis."""
    xp = ops.xp
    most = xp.max(x, axis=-1, keepdims=True)
    return most[..., 0] + xp.log(xp.sum(xp.exp(x - most), axis=-1))


def _gelu(ops: Ops, x: Any) -> Any:
    """GELU by tanh, as Gemma has it."""
    return 0.5 * x * (1.0 + ops.xp.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
