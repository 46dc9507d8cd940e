"""One trial of the experiments: a pretrained model, trained by one method and measured."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recadam_core import DriftBudget, RecAdamError

from .classification import Classification, source_before
from .data import kind_of
from .methods import (
    adapt,
    extra_for,
    freeze,
    importance_for,
    optimizer_for,
    prune,
    rate_for,
    replayed,
)
from .subject import Subject
from .subjects import subject_of
from .trial import METHODS, Trial

__all__ = ["run"]


def run(trial: Trial) -> dict[str, Any]:
    """Train and measure; see `recadam_harness.experiments.run_trial`."""
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Sums over more threads are other sums: a row is to be repeated wherever it was made.
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            return _run(trial, where)
    finally:
        torch.set_num_threads(threads)


def _run(trial: Trial, where: torch.device) -> dict[str, Any]:
    began = time.perf_counter()
    subject = subject_of(trial, where)
    before = _before(trial, str(where))
    figures: dict[str, Any] = {f"{name}_before": value for name, value in before.items()}
    probed = subject.probed() if before and trial.init == "pretrained" else {}
    with _multiplying(subject.precision):
        figures.update(_train(trial, subject))
    figures.update(subject.measure(trial.split))
    now = subject.probed() if probed else {}
    figures.update({name: subject.moved(said, now[name]) for name, said in probed.items()})
    if "lost" in figures:
        figures["forgotten"] = figures.pop("lost") - figures.pop("lost_before")
    return {**figures, "seconds": time.perf_counter() - began}


@contextmanager
def _multiplying(precision: str) -> Iterator[None]:
    """Matrix products of float32 in this precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _before(trial: Trial, device: str) -> Mapping[str, float]:
    """What the model knew before any training; nothing of GLUE's classifiers."""
    if trial.target.startswith("glue/"):
        return {}
    if kind_of(trial.target) == "classification":
        return source_before(trial.model, trial.split, trial.max_length, device)
    names = ("target", "model", "split", "max_length", "held_out")
    return _measured(Trial(**{name: getattr(trial, name) for name in names}), device)


@lru_cache(maxsize=4)
def _measured(trial: Trial, device: str) -> Mapping[str, float]:
    """Figures of a pretrained model."""
    return subject_of(trial, torch.device(device)).measure(trial.split)


def _train(trial: Trial, subject: Subject) -> dict[str, Any]:
    """Train the subject, in place."""
    trains = METHODS[trial.method].trains
    if isinstance(subject, Classification) and (trial.head == "probed" or not trains):
        subject.probe()
    if not trains:
        return {"distance": subject.distance(), "curve": []}
    replay = replayed(trial, subject)
    merge = adapt(trial, subject) if trial.method in ("lora", "osf") else None
    if trial.method == "half":
        freeze(subject, trial.share, trial.seed)
    optimizer = optimizer_for(trial, subject, importance_for(trial, subject))
    extra = extra_for(trial, subject, optimizer)
    rate_of = rate_for(trial, subject)
    control = DriftBudget(trial.budget, high=1.0 / trial.lr) if trial.method == "budget" else None
    module = subject.module
    trained = [p for p in module.parameters() if p.requires_grad]
    losses: list[float] = []
    curve: list[dict[str, float]] = []
    torch.manual_seed(trial.seed)  # of dropout, whatever was loaded and measured before

    def measure(step: int) -> None:
        assert isinstance(subject, Classification)
        forgotten = subject.source("curve")["snli_mnr"]
        curve.append({"step": step, "source_loss": forgotten, "distance": subject.distance()})
        if losses:  # the mean since the last point; there is none before the first step
            curve[-1]["loss"] = float(np.mean(losses[-trial.curve_every :]))
        module.train()

    module.train()
    if trial.curve_every:
        measure(0)
    for t in range(1, trial.steps + 1):
        old: Tensor | None = replay(t)
        loss = subject.loss(t) if old is None else old
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RecAdamError(f"{trial.command}: the loss is {value} at step {t}; lower lr")
        if old is None:
            losses.append(value)
        if extra is not None:
            loss = loss + extra(t)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(trained, trial.clip)
        if trial.method == "coupled":
            subject.couple(trial, t)
        rate = rate_of(t, value)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        if control is not None:
            group = optimizer.param_groups[0]
            group["gamma"] = control(group["gamma"], subject.distance())
        if trial.curve_every and (t % trial.curve_every == 0 or t == trial.steps):
            measure(t)
    if merge is not None:
        merge()
    if trial.method == "wiseft":
        subject.shrink(trial.alpha)
    elif trial.method == "fapm":
        prune(subject, trial.share)
    tail = losses[-max(1, trial.steps // 10) :]
    distance = subject.distance()
    if not math.isfinite(distance):
        raise RecAdamError(f"{trial.command}: no finite weights after step {trial.steps}; lower lr")
    return {"loss": float(np.mean(tail)), "distance": distance, "curve": curve}
