"""A BERT encoder over any array namespace, with the parameter names of Hugging Face checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from recadam_core.errors import RecAdamError, check_number, check_whole, shown
from recadam_core.files import parse_json

from ..memory import check_memory
from .ops import Model, Ops, gelu, layer_norm, linear, softmax

__all__ = ["Bert", "BertConfig", "load_checkpoint", "read_parameters"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT encoder, as in a checkpoint's config.json."""

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter by its name in the checkpoint, without the pooler."""
        h, i = self.hidden_size, self.intermediate_size
        dense = {
            "attention.self.query": (h, h),
            "attention.self.key": (h, h),
            "attention.self.value": (h, h),
            "attention.output.dense": (h, h),
            "intermediate.dense": (i, h),
            "output.dense": (h, i),
        }
        norms = ["embeddings.LayerNorm"]
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.word_embeddings.weight": (self.vocab_size, h),
            "embeddings.position_embeddings.weight": (self.max_position_embeddings, h),
            "embeddings.token_type_embeddings.weight": (self.type_vocab_size, h),
        }
        for n in range(self.num_hidden_layers):
            layer = f"encoder.layer.{n}."
            for name, shape in dense.items():
                shapes[f"{layer}{name}.weight"] = shape
                shapes[f"{layer}{name}.bias"] = shape[:1]
            norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
        for norm in norms:
            shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (h,)
        return shapes


@dataclass(frozen=True)
class Bert(Model):
    """BERT with mean pooling and a linear classifier, without dropout.

    Batches hold "ids" (rows, length) of int64, "mask" (rows, length) of floats that are 1 at tokens
    and 0 at padding, and "targets" (rows, classes).

    Source: arXiv 1810.04805; post-norm transformer layers with exact GELU.
    """

    config: BertConfig
    classes: int = 2
    kind = "bert"
    head = "classifier"

    def init_head(self, rng: np.random.Generator) -> dict[str, Array]:
        """A fresh classifier: normal weights of deviation 0.02, zero biases, float64."""
        weight = 0.02 * rng.standard_normal((self.classes, self.config.hidden_size))
        return {"classifier.weight": weight, "classifier.bias": np.zeros(self.classes)}

    def hidden(self, ops: Ops, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """The last layer's states, of shape (rows, length, hidden_size)."""
        xp, config = ops.xp, self.config
        rows, length = batch["ids"].shape
        heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads

        def dense(x: Any, name: str) -> Any:
            return linear(x, params[f"{name}.weight"], params[f"{name}.bias"])

        def norm(x: Any, name: str) -> Any:
            weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
            return layer_norm(ops, x, weight, bias, config.layer_norm_eps)

        def split(x: Any) -> Any:
            return xp.permute_dims(xp.reshape(x, (rows, length, heads, width)), (0, 2, 1, 3))

        words = xp.take(params["embeddings.word_embeddings.weight"], xp.reshape(batch["ids"], (-1,)), axis=0)
        x = xp.reshape(words, (rows, length, config.hidden_size))
        x = x + params["embeddings.position_embeddings.weight"][:length, :]
        x = norm(x + params["embeddings.token_type_embeddings.weight"][0, :], "embeddings.LayerNorm")
        # exp underflows to an exact zero at padding.
        bias = (batch["mask"][:, None, None, :] - 1.0) * 1e9
        for n in range(config.num_hidden_layers):
            layer = f"encoder.layer.{n}"
            query, key, value = (
                split(dense(x, f"{layer}.attention.self.{n_}")) for n_ in ("query", "key", "value")
            )
            scores = (query @ xp.permute_dims(key, (0, 1, 3, 2))) * (1.0 / width**0.5) + bias
            mixed = xp.permute_dims(softmax(ops, scores) @ value, (0, 2, 1, 3))
            mixed = dense(xp.reshape(mixed, (rows, length, -1)), f"{layer}.attention.output.dense")
            x = norm(x + mixed, f"{layer}.attention.output.LayerNorm")
            inner = dense(gelu(ops, dense(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
            x = norm(x + inner, f"{layer}.output.LayerNorm")
        return x

    def floats_a_row(self, rows: Mapping[str, Any]) -> int:
        """States and attention of every layer."""
        c, length = self.config, int(rows["ids"].shape[1])
        states = length * (10 * c.hidden_size + 3 * c.intermediate_size)
        return c.num_hidden_layers * (states + 3 * c.num_attention_heads * length**2)

    def features(self, ops: Ops, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """Sentence embeddings: the mean of the last layer over tokens, of shape (rows, hidden_size)."""
        mask = batch["mask"][:, :, None]
        summed = ops.xp.sum(self.hidden(ops, params, batch) * mask, axis=1)
        return summed / ops.xp.sum(mask, axis=1)


def load_checkpoint(folder: Path) -> tuple[BertConfig, dict[str, Array]]:
    """The encoder in a Hugging Face checkpoint folder (config.json and model.safetensors)."""
    try:
        text = (folder / "config.json").read_bytes()
    except FileNotFoundError:
        raise RecAdamError(f"{folder}: no config.json; give a Hugging Face checkpoint folder") from None
    config = _config_of(
        folder / "config.json", parse_json(folder / "config.json", text, dict, "fetch it again")
    )
    return config, read_parameters(folder / "model.safetensors", config.shapes(), "bert.")


def read_parameters(path: Path, shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> dict[str, Array]:
    """The parameters of these names and shapes in a file, in float32; a prefix of their names is left out."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        stored = load_file(path)
    except FileNotFoundError:
        raise RecAdamError(
            f"{path.parent}: no model.safetensors; save the checkpoint in that format"
        ) from None
    except (SafetensorError, ValueError, OSError) as error:
        raise RecAdamError(f"{path}: damaged ({error}); fetch it again") from None
    stored = {name.removeprefix(prefix): array for name, array in stored.items()}
    params = {}
    for name, shape in shapes.items():
        if name not in stored:
            raise RecAdamError(f"{path}: parameter {name!r} is missing; give a complete checkpoint")
        if stored[name].shape != shape:
            raise RecAdamError(
                f"{path}: parameter {name!r} has shape {stored[name].shape}, config.json says {shape}; "
                "give files that belong together"
            )
        if stored[name].dtype.kind != "f":
            raise RecAdamError(f"{path}: parameter {name!r} is {stored[name].dtype}; give floating numbers")
        params[name] = stored[name].astype(np.float32)
        if not np.isfinite(params[name]).all():
            raise RecAdamError(f"{path}: parameter {name!r} has numbers that are not finite; fetch it again")
    return params


def _config_of(path: Path, values: dict[str, Any]) -> BertConfig:
    """The sizes in a config.json, if they are those of a BERT encoder."""
    kind, activation = values.get("model_type"), values.get("hidden_act", "gelu")
    if kind != "bert" or activation != "gelu":
        raise RecAdamError(
            f"{path.parent}: model_type {shown(kind)} with {shown(activation)}; "
            "the harness trains BERT encoders with 'gelu'"
        )
    positions = values.get("position_embedding_type", "absolute")
    if positions != "absolute" or values.get("is_decoder") or values.get("add_cross_attention"):
        raise RecAdamError(
            f"{path}: a decoder, or position_embedding_type {shown(positions)}; the harness trains encoders "
            "with 'absolute'"
        )
    sizes = {f.name: values[f.name] for f in fields(BertConfig) if f.name in values}
    for name, value in sizes.items():
        if name == "layer_norm_eps":
            check_number(str(path), name, value, low=0.0, high=1.0, open_low=True)
        else:
            check_whole(f"{path}: {name}", value, 1)
    config = BertConfig(**sizes)
    if config.hidden_size % config.num_attention_heads:
        raise RecAdamError(
            f"{path}: hidden_size is {config.hidden_size}, of {config.num_attention_heads} attention heads; "
            "give a size that they divide"
        )
    check_memory(f"{path}: an encoder of these sizes", 4.0 * sum(map(math.prod, config.shapes().values())))
    return config
