"""Hugging Face encoders with a new head, and texts as batches for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recadam_core import RecAdamError
from recadam_core.errors import shown

from ..archives import model_folder
from ..decoders import quiet

__all__ = ["Batch", "Classifier", "Encoded", "SentenceClassifier", "renew", "set_dropout"]

Array = np.ndarray[Any, Any]
Batch = dict[str, Tensor]


class Classifier(nn.Module):
    """A checkpoint with a new head, of the kind that its own library gives it, as GLUE is done.

    Where the checkpoint has a head already, of another task, it is not taken.
    """

    def __init__(self, name: str, classes: int) -> None:
        super().__init__()
        from transformers import AutoModelForSequenceClassification

        kind: Any = AutoModelForSequenceClassification
        self.tokenizer, (model, info) = _loaded(
            name, kind, num_labels=classes, output_loading_info=True, ignore_mismatched_sizes=True
        )
        self.body: Any = model
        encoder = {id(p) for p in model.base_model.parameters()}
        head = {parameter for parameter, p in model.named_parameters() if id(p) not in encoder}
        for parameter, *_ in info["mismatched_keys"]:
            if parameter not in head:
                raise RecAdamError(
                    f"model {name!r}: {parameter!r} is not of the shape that config.json says; save it again"
                )
        renew(model, (m for m in model.modules() if {id(p) for p in m.parameters(recurse=False)} - encoder))
        self.new = {f"body.{parameter}" for parameter in head | set(info["missing_keys"])}

    def forward(self, batch: Batch) -> Tensor:
        """Scores, of shape (rows, classes)."""
        scores: Tensor = self.body(**batch).logits
        return scores


class SentenceClassifier(nn.Module):
    """An encoder, the mean of its last layer over tokens, and a linear head."""

    def __init__(self, name: str, classes: int, rng: np.random.Generator) -> None:
        super().__init__()
        from transformers import AutoModel

        self.tokenizer, self.body = _loaded(name, AutoModel, add_pooling_layer=False)
        self.new = {"classifier.weight", "classifier.bias"}
        width = self.body.config.hidden_size
        self.classifier = nn.Linear(width, classes)
        with torch.no_grad():
            self.classifier.weight.copy_(torch.tensor(0.02 * rng.standard_normal((classes, width))))
            self.classifier.bias.zero_()

    def features(self, batch: Batch) -> Tensor:
        """Sentence embeddings, of shape (rows, width)."""
        hidden: Tensor = self.body(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, batch: Batch) -> Tensor:
        """Scores, of shape (rows, classes)."""
        scores: Tensor = self.classifier(self.features(batch))
        return scores


def renew(model: Any, modules: Iterable[Any]) -> None:
    """Draw the own parameters of modules of a Hugging Face model anew, whatever was loaded."""
    for module in modules:
        for p in module.parameters(recurse=False):
            p._is_hf_initialized = False  # or what was loaded would stay
        model._init_weights(module)


def _loaded(name: str, kind: Any, **settings: Any) -> tuple[Any, Any]:
    folder = model_folder(name)
    try:
        # Anew for each trial, which takes no time beside training: none gets what another has changed.
        with quiet():
            model = kind.from_pretrained(folder, dtype=torch.float32, **settings)
        return _tokenizer(folder), model
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecAdamError(
            f"model {name!r}: {reason}; give a folder of an encoder and its tokenizer"
        ) from error


@lru_cache(maxsize=2)
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoConfig, AutoTokenizer

    kind: Any = AutoTokenizer
    tokenizer = kind.from_pretrained(folder)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up, where the folder has none
        raise ValueError("it has no vocabulary of a tokenizer")
    config = AutoConfig.from_pretrained(folder)
    positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.model_max_length = min(positions, tokenizer.model_max_length)
    return tokenizer


def set_dropout(model: nn.Module, share: float | None) -> None:
    """Set the dropout of every layer; None leaves it as it is."""
    if share is None:
        return
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        # Attention may have it as a number of its own.
        for name in ("dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, share)


class Encoded:
    """Texts as token numbers, made into batches on the model's device."""

    def __init__(
        self,
        tokenizer: Any,
        first: Sequence[str],
        second: Sequence[str] | None,
        length: int,
        vocabulary: int,
        device: torch.device,
    ) -> None:
        if length > tokenizer.model_max_length:
            limit = tokenizer.model_max_length
            raise RecAdamError(
                f"max_length is {length}; the encoder reads up to {limit} tokens, give no more"
            )
        self._tokenizer, self._device = tokenizer, device
        pairs = [list(first)] if second is None else [list(first), list(second)]
        self._columns = dict(tokenizer(*pairs, truncation=True, max_length=length))
        largest = max((max(x, default=0) for x in self._columns["input_ids"]), default=0)
        if largest >= vocabulary:
            raise RecAdamError(
                f"tokenizer: token {largest} is beyond the encoder's vocabulary of {vocabulary}; "
                "give files that belong together"
            )
        self.lengths = np.array([len(x) for x in self._columns["input_ids"]])
        if not self.lengths.all():
            empty = shown(first[int(np.argmin(self.lengths))])
            raise RecAdamError(f"tokenizer: gives no token for {empty}; give the tokenizer of the checkpoint")

    def batch(self, rows: Sequence[int] | Array) -> Batch:
        """These rows, filled up to the longest."""
        chosen = {name: [column[i] for i in rows] for name, column in self._columns.items()}
        padded = self._tokenizer.pad(chosen, return_tensors="pt")
        return {name: x.to(self._device) for name, x in padded.items()}

    @torch.no_grad()
    def each(self, function: Callable[[Batch], Tensor]) -> Array:
        """A function of every row, computed in batches of similar lengths, without a tape."""
        order = np.argsort(self.lengths, kind="stable")
        parts = [
            function(self.batch(order[i : i + 64])).float().cpu().numpy() for i in range(0, len(order), 64)
        ]
        return np.concatenate(parts)[np.argsort(order, kind="stable")]
