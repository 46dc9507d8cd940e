"""What is trained and measured in a trial: a model with its anchors, a task, and what it knew before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from recadam_core import RecAdamError

from ..engines import coupled_gradients
from ..run import batch_order
from .texts import Texts
from .trial import Trial

__all__ = ["Old", "Subject", "drawn", "few", "grouped", "ordered"]

Array = np.ndarray[Any, Any]
POOL = 8  # batches whose rows are sorted by length together


class Old(Protocol):
    """Old data in batches."""

    def loss(self, t: int, sign: float = 1.0) -> Tensor:
        """Loss of batch t, from 1; with the sign -1 that of reversed scores."""


class Subject:
    """A model in the course of a trial; its kinds say what is learned and what may be forgotten.

    Args:
        trial: what is done.
        module: the model, pretrained.
        new: names of its parameters that are new.
    """

    adapted: Sequence[str]  # how the linear layers that adapters go onto are called
    precision = "highest"  # of matrix products in training, as torch calls it
    module: Any

    def __init__(self, trial: Trial, module: nn.Module, new: set[str], device: torch.device) -> None:
        self.trial, self.device, self.new = trial, device, new
        self.module = module.to(device)
        self.anchors = {name: p.detach().clone() for name, p in module.named_parameters() if name not in new}

    @property
    def named(self) -> dict[str, Tensor]:
        """Parameters by name."""
        return dict(self.module.named_parameters())

    @property
    def anchored(self) -> dict[str, Tensor]:
        """Those of them that have an anchor."""
        return {name: p for name, p in self.named.items() if name in self.anchors}

    def loss(self, t: int) -> Tensor:
        """Loss of the new task on the batch of step t, from 1."""
        raise NotImplementedError

    def old(self, seed: int, count: int) -> Old:
        """So many batches of what the model was trained for before."""
        raise NotImplementedError

    def own(self, seed: int, count: int) -> Old:
        """The same of what the pretrained model itself says."""
        raise NotImplementedError

    def features(self, t: int) -> Tensor:
        """What the model makes of the rows of step t, of shape (rows, width), as importance is told by it."""
        raise NotImplementedError

    def said(self, t: int) -> Tensor:
        """Log-probabilities of the batch of step t, of shape (rows, choices), as distillation holds them."""
        raise NotImplementedError

    def probed(self) -> dict[str, Array]:
        """What the model says of a few held-out texts, for `moved`."""
        raise NotImplementedError

    @staticmethod
    def moved(before: Array, now: Array) -> float:
        """How far what is said has moved; 0 where it has not."""
        raise NotImplementedError

    def measure(self, split: str) -> dict[str, float]:
        """Figures by name; of the model before training, too."""
        raise NotImplementedError

    def body(self) -> Any:
        """The pretrained model inside the module."""
        return self.module

    @torch.no_grad()
    def distance(self) -> float:
        """Euclidean distance of the anchored parameters to their anchors."""
        named = self.named
        parts = [torch.linalg.vector_norm(named[name] - star) for name, star in self.anchors.items()]
        return float(torch.stack(parts).double().norm())

    @torch.no_grad()
    def shrink(self, alpha: float) -> None:
        """Go back to this share of the way from the anchors."""
        named = self.named
        for name, star in self.anchors.items():
            named[name].copy_(star + alpha * (named[name] - star))

    @torch.no_grad()
    def couple(self, trial: Trial, t: int) -> None:
        """Gradients of the annealed objective in the place of the target's."""
        named = self.named
        grads = {name: p.grad for name, p in named.items() if p.grad is not None}
        for name, grad in coupled_gradients(grads, named, self.anchors, trial.hp, t).items():
            named[name].grad = grad


def few(trial: Trial, rows: Any) -> Any:
    """As many held-out rows as are to be measured on."""
    return rows[: trial.held_out] if trial.held_out else rows


def drawn(trial: Trial, train: Texts) -> Texts:
    """The training rows that the seed draws."""
    if trial.rows > len(train):
        raise RecAdamError(f"{trial.target}: rows is {trial.rows}; there are {len(train)} to train on")
    if not trial.rows:
        return train
    rng = np.random.default_rng([trial.seed, 2])
    return train.pick(rng.permutation(len(train))[: trial.rows])


def ordered(trial: Trial, lengths: Array) -> Array:
    """The rows of each step's batch, of shape (steps, batch_size), by how long the rows are."""
    if trial.batch_size > len(lengths):
        raise RecAdamError(
            f"{trial.command}: batch_size is {trial.batch_size}; there are {len(lengths)} rows, give no more"
        )
    rows = batch_order(len(lengths), trial.batch_size, trial.steps, trial.seed)
    return grouped(rows, lengths, trial.seed)


def grouped(order: Array, lengths: Array, seed: int) -> Array:
    """Batches whose rows are of similar lengths, so that little is filled up; pools stay in their places."""
    rng = np.random.default_rng([seed, 3])
    pools = []
    for start in range(0, len(order), POOL):
        rows = order[start : start + POOL].ravel()
        batches = rows[np.argsort(lengths[rows], kind="stable")].reshape(-1, order.shape[1])
        pools.append(rng.permutation(batches))
    return np.concatenate(pools)
