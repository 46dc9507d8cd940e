"""A meter of forgetting: what the model says now of some texts against what its anchors say."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recadam_core import DriftBudget, RecAdamError
from recadam_core.errors import check_number, check_whole, shown

from .matching import check_module
from .reference import evaluating, together, warn_of_others

__all__ = ["Forgetting", "Forgotten", "Watch"]

TEXTS = 16
"""How many texts make a batch."""

ROWS = 512
"""Of how many tokens at once the log-probabilities are held beside the logits."""


class Forgotten(NamedTuple):
    """How much of what the anchors say the model says no longer.

    Example:
        >>> Forgotten(kl=0.02, cosine=float("nan"), distance=1.5).figure
        0.02
    """

    kl: float  # of the anchors' distribution to the present one, nats a token or a row; NaN for embeddings
    cosine: float  # of the anchors' embeddings with the present ones, mean; NaN for distributions
    distance: float  # of all weights to their anchors, Euclidean; NaN where nobody knows

    @property
    def figure(self) -> float:
        """What grows as the model forgets: the divergence, or one minus the cosine."""
        return self.kl if self.kl == self.kl else 1.0 - self.cosine


class Forgetting:
    r"""Measures what a model has forgotten: its answers now against those of its anchors, on a few batches.

    Math:
        For logits, of a decoder's tokens or a classifier's rows, the mean in nats of the divergence
        $\sum_y p_{\theta^*}(y)\,(\log p_{\theta^*}(y) - \log p_\theta(y))$; for embeddings the mean of
        $\cos(f_{\theta^*}(x), f_\theta(x))$. What is padded does not count.

    A measurement is two forward passes over the probe, in evaluation mode and without gradients, and needs no
    second model. In several processes each measures the probe that it was given.

    Args:
        model: the model that is trained.
        anchored: what knows its anchors: the handle of `anchor`, a `RecAdam`, a callback, or a list of such.
        probe: batches as the model takes them (mappings, tuples or tensors); or texts. Some of the new task
            tell how far behaviour has moved, others what became of it elsewhere.
        tokenizer: for texts; of sentence-transformers' models their own.
        length: tokens of a text at most.
        outputs: of the model and a batch the logits, or embeddings of two dimensions with `embeddings=True`.
            By default the output's `logits`, or else sentence embeddings, or else the means of
            `last_hidden_state`; a bare tensor is taken for logits.
        embeddings: whether `outputs` gives embeddings.

    Raises:
        RecAdamError: when the model is no module, the probe is empty, or texts have no tokenizer; when it is
            called, for outputs of which nothing can be told, or that are not finite.

    Example:
        >>> from recadam_torch import anchor
        >>> model = nn.Linear(2, 2, bias=False)
        >>> handle = anchor(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> meter = Forgetting(model, handle, [torch.eye(2)])
        >>> meter().kl
        0.0
        >>> _ = model.weight.data.add_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        >>> 0 < meter().kl < 1
        True

    Source: KL as what predicts forgetting, arXiv 2509.04259, section 4.
    """

    def __init__(
        self,
        model: nn.Module,
        anchored: Any,
        probe: Iterable[Any],
        *,
        tokenizer: Any = None,
        length: int = 128,
        outputs: Callable[[nn.Module, Any], Tensor] | None = None,
        embeddings: bool = False,
    ) -> None:
        check_module("Forgetting", model)
        self.model, self.anchored = model, together("Forgetting", anchored)
        self._outputs, self._embeddings = outputs, embeddings
        warn_of_others("Forgetting", model, anchored)
        self._batches = _batches(model, check_probe("Forgetting", probe), tokenizer, length)

    def __call__(self) -> Forgotten:
        """Measure now."""
        return self._measured(self._batches)

    def check(self) -> None:
        """Raise what a measurement would raise, by its first batch."""
        self._measured(self._batches[:1])

    def _measured(self, batches: list[Any]) -> Forgotten:
        total, count, kind = 0.0, 0.0, ""
        with torch.no_grad(), evaluating(self.model):
            device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
            for number, batch in enumerate(batches):
                try:
                    batch = _moved(batch, device)
                    with self.anchored.at_anchors():
                        kind, before = self._said(batch)
                    _, now = self._said(batch)
                except RecAdamError:
                    raise
                except Exception as error:  # whatever a model raises at what it does not take
                    told = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    raise RecAdamError(
                        f"Forgetting: the model does not take batch {number} of the probe ({told}); give "
                        "batches as it takes them"
                    ) from error
                mask = self._counted(batch)
                some, of = _divergence(before, now, mask) if kind == "kl" else _cosine(before, now)
                if not math.isfinite(some):
                    raise RecAdamError(f"Forgetting: batch {number} of the probe gives {some}; leave it out")
                total, count = total + some, count + of
        if not count:
            raise RecAdamError("Forgetting: of the probe every token is padding; give texts")
        mean = total / count
        distance = self.anchored.drift().distance if hasattr(self.anchored, "drift") else math.nan
        return Forgotten(*((mean, math.nan) if kind == "kl" else (math.nan, mean)), distance)

    def _counted(self, batch: Any) -> Tensor | None:
        """Which of the tokens that the model speaks of are not padding."""
        if not isinstance(batch, Mapping):
            return None
        if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            mask: Tensor | None = batch.get("attention_mask")
            return mask
        labels, mask = batch.get("labels"), batch.get("decoder_attention_mask")
        return labels != -100 if mask is None and labels is not None else mask

    def _said(self, batch: Any) -> tuple[str, Tensor]:
        """What the model says of a batch, and whether that is logits."""
        if self._outputs is not None:
            return "cosine" if self._embeddings else "kl", _checked(self._outputs(self.model, batch))
        if isinstance(batch, Mapping):
            output = self.model(dict(batch)) if _is_of_sentences(self.model) else self.model(**batch)
        else:
            output = self.model(*batch) if isinstance(batch, (tuple, list)) else self.model(batch)
        if isinstance(output, Tensor):
            return "kl", _checked(output)
        names = ("logits", "sentence_embedding", "last_hidden_state")
        has = output if isinstance(output, Mapping) else vars(output) if hasattr(output, "__dict__") else {}
        logits, sentences, hidden = (has.get(name) for name in names)
        if logits is not None:
            return "kl", _checked(logits)
        if sentences is not None:
            return "cosine", _checked(sentences)
        if hidden is None:
            raise RecAdamError(
                f"Forgetting: the model's output is a {type(output).__name__} without logits or embeddings; "
                "give outputs=, a function of the model and a batch"
            )
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        mask = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden.dtype)
        return "cosine", (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def check_probe(where: str, probe: Any) -> list[Any]:
    """The probe as a list, if it can be one."""
    if isinstance(probe, (str, Mapping, Tensor)) or not isinstance(probe, Iterable):
        raise RecAdamError(f"{where}: the probe is {shown(probe)}; give a list of batches, or of texts")
    items = list(probe)
    if not items:
        raise RecAdamError(f"{where}: the probe is empty; give batches or texts")
    return items


def _batches(model: nn.Module, items: list[Any], tokenizer: Any, length: int) -> list[Any]:
    """The probe as a list of batches."""
    texts = [isinstance(item, str) for item in items]
    if not any(texts):
        return items
    if not all(texts):
        raise RecAdamError("Forgetting: the probe is texts and batches; give one kind")
    parts = [items[i : i + TEXTS] for i in range(0, len(items), TEXTS)]
    if _is_of_sentences(model):
        made: Any = getattr(model, "preprocess", None) or model.tokenize
        return [made(part) for part in parts]
    if tokenizer is None:
        raise RecAdamError("Forgetting: the probe is texts; give tokenizer=, or batches")
    cut = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    return [dict(tokenizer(part, **cut)) for part in parts]


def _is_of_sentences(model: nn.Module) -> bool:
    library: Any = sys.modules.get("sentence_transformers")
    return library is not None and isinstance(model, library.SentenceTransformer)


def _moved(x: Any, device: torch.device) -> Any:
    """A batch whose tensors are on the model's device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, Mapping):
        return {key: _moved(value, device) for key, value in x.items()}
    return [_moved(value, device) for value in x] if isinstance(x, (tuple, list)) else x


def _checked(x: Any) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[-1] < 2 or not x.is_floating_point():
        what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else shown(x)
        raise RecAdamError(
            f"Forgetting: the model gives {what}; have outputs= give floating rows of two numbers or more"
        )
    return x


def _divergence(before: Tensor, now: Tensor, mask: Tensor | None) -> tuple[float, float]:
    """The sum of the divergences of rows, and their number; some rows at once, for the memory's sake."""
    rows, total = before.shape[-1], 0.0
    counts = before.new_ones(before.shape[:-1], dtype=torch.bool)
    if mask is not None and mask.shape == counts.shape:
        counts = mask.bool()
    chosen = counts.reshape(-1).nonzero().reshape(-1)
    p, q = before.reshape(-1, rows), now.reshape(-1, rows)
    for start in range(0, len(chosen), ROWS):
        part = chosen[start : start + ROWS]
        a, b = (torch.log_softmax(x[part].float(), -1) for x in (p, q))
        # What a model rules out, as by a mask of -inf, counts nothing where both do.
        terms = torch.where(a == -torch.inf, 0.0, a.exp() * (a - b))
        total += float(terms.sum(dtype=torch.float64))
    return max(total, 0.0) if total == total else total, float(len(chosen))


def _cosine(before: Tensor, now: Tensor) -> tuple[float, float]:
    x, y = (t.reshape(-1, t.shape[-1]).double() for t in (before, now))
    return float(torch.cosine_similarity(x, y).sum()), float(len(x))


class Watch:
    """What the trainers' callbacks do with the meter: look every so many steps, hold a budget, stop.

    Args:
        probe: as in `Forgetting`; None measures nothing.
        every: steps between two measurements.
        budget: the figure to hold: after each measurement the pull's strength follows it, by a
            `recadam_core.DriftBudget`; a number makes one from a sixteenth of the pull to 64 times it.
        stop_at: the figure at which training ends.
    """

    def __init__(
        self,
        probe: Iterable[Any] | None,
        every: int,
        budget: float | DriftBudget | None,
        stop_at: float | None,
        pull: float,
    ) -> None:
        self.every = check_whole("AnchorCallback: every", every, low=1)
        if probe is None and not (budget is None and stop_at is None):
            raise RecAdamError("AnchorCallback: a budget or stop_at needs a probe; give texts or batches")
        if stop_at is not None:
            stop_at = check_number("AnchorCallback", "stop_at", stop_at, low=0.0)
        if budget is not None and pull == 0:
            raise RecAdamError("AnchorCallback: a budget changes the pull, which is 0; give pull=0.1")
        if budget is not None and not isinstance(budget, DriftBudget):
            figure = check_number("AnchorCallback", "budget", budget, low=0.0, open_low=True)
            budget = DriftBudget(figure, low=pull / 16, high=pull * 64)
        if budget is not None and not budget.low <= pull <= budget.high:
            raise RecAdamError(
                f"AnchorCallback: the pull is {pull:g}, and the budget keeps it from {budget.low:g} to "
                f"{budget.high:g}; give a DriftBudget whose low and high are around it, or a number"
            )
        self.probe = None if probe is None else check_probe("AnchorCallback", probe)
        self.budget, self.stop_at = budget, stop_at
        self.last: Forgotten | None = None
        self._meter: Forgetting | None = None

    def begin(self, model: nn.Module, handles: list[Any], tokenizer: Any, steps: float) -> None:
        """When training starts: what a measurement would raise is raised now."""
        if self.probe is None:
            return
        if steps < self.every:
            warnings.warn(
                f"AnchorCallback: it measures every {self.every} steps of {steps:.0f}; give a lower every",
                stacklevel=3,
            )
        self._meter = Forgetting(model, handles, self.probe, tokenizer=tokenizer)
        self._meter.check()

    def look(self, handles: list[Any], step: int) -> bool:
        """Measure if it is time; whether training has to end."""
        if self._meter is None or step % self.every:
            return False
        self.last = self._meter()
        if self.budget is not None:
            for handle in handles:
                handle.strength = self.budget(handle.pull * handle.strength, self.last.figure) / handle.pull
        return self.stop_at is not None and self.last.figure >= self.stop_at

    def figures(self) -> dict[str, float]:
        """The last measurement, for a log."""
        if self.last is None:
            return {}
        name = "kl" if self.last.kl == self.last.kl else "cosine"
        return {f"anchor/{name}": getattr(self.last, name)}
