"""What the examples share: MiniLM with three layers, movie reviews, and the figures they end with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from recadam_harness.archives import model_folder
from recadam_harness.tasks.movie_reviews import read_bbc, read_reviews, tokenize

LENGTH = 32


class Reviews(Dataset[dict[str, Any]]):
    """Sentences and whether they are kind, as a BERT takes them."""

    def __init__(self, folder: Path, start: int, count: int) -> None:
        texts, labels = read_reviews()
        rows = tokenize(folder, texts[start : start + count], LENGTH)
        self.ids, self.mask = torch.tensor(rows["ids"]), torch.tensor(rows["mask"]).long()
        self.labels = torch.tensor(labels[start : start + count])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "attention_mask": self.mask[i], "labels": self.labels[i]}


def load(train: int = 512, test: int = 500) -> tuple[Path, PreTrainedModel, Reviews, Reviews]:
    """The encoder's folder, the model with a new head, and rows to train and to test on."""
    folder = model_folder("minilm-l3")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return folder, model, Reviews(folder, 2000, train), Reviews(folder, 0, test)


def headlines(folder: Path, count: int = 256) -> list[dict[str, Any]]:
    """Headlines of the news, of which no review speaks: what the encoder is to know afterwards, too."""
    titles, _ = read_bbc(count)
    rows = tokenize(folder, titles, LENGTH)
    ids, mask = torch.tensor(rows["ids"]), torch.tensor(rows["mask"]).long()
    parts = zip(ids.split(64), mask.split(64), strict=True)
    return [{"input_ids": some, "attention_mask": kept} for some, kept in parts]


def sentence_embeddings(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """The means of the encoder's last hidden states."""
    hidden = model.base_model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def accuracy(model: torch.nn.Module, rows: Reviews) -> float:
    """Share of the rows that the model gets right."""
    was, right = model.training, 0
    model.eval()
    for start in range(0, len(rows), 100):
        part = slice(start, start + 100)
        logits = model(input_ids=rows.ids[part], attention_mask=rows.mask[part]).logits
        right += int((logits.argmax(-1) == rows.labels[part]).sum())
    model.train(was)
    return right / len(rows)
