"""Which subject a trial is of."""

from __future__ import annotations

import torch

from .data import kind_of
from .subject import Subject
from .trial import Trial

__all__ = ["subject_of"]


def subject_of(trial: Trial, where: torch.device) -> Subject:
    """What a trial trains: a classifier, embeddings or a decoder."""
    kind = kind_of(trial.target)
    if kind == "classification":
        from .classification import Classification

        return Classification(trial, where)
    if kind == "embeddings":
        from .embeddings import Embeddings

        return Embeddings(trial, where)
    from .decoding import Decoding

    return Decoding(trial, where)
