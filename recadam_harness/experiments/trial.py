"""A trial: one training of one method from one seed, and the line that repeats it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from recadam_core.annealing import Annealing, Constant, Sigmoid
from recadam_core.errors import RecAdamError, check_number, check_whole, unknown
from recadam_core.hyperparameters import Hyperparameters
from recadam_core.strength import gamma_for

from ..memory import check_memory
from .data import DECODER, TARGETS, kind_of

__all__ = ["METHODS", "Method", "Trial"]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Args:
        label: as tables and pictures name it.
        about: one line on what it does.
        settings: fields of `Trial` that it reads, besides those that all methods read.
        form: form of the update, for those that are RecAdam.
        constant: whether both weights are 1 throughout.
        sentences: whether it needs an encoder of sentences with a linear head, as GLUE's classifiers are not.
        trains: whether the encoder is trained, and fields in `TRAINING` are read.
        kinds: of targets that it is for; all where none is named.
        needs: what it asks for besides the new task's rows and the pretrained weights.

    Example:
        >>> METHODS["l2sp"].label
        'constant pull (L2-SP)'
    """

    label: str
    about: str
    settings: tuple[str, ...] = ()
    form: str = ""
    constant: bool = False
    sentences: bool = False
    trains: bool = True
    kinds: tuple[str, ...] = ()
    needs: str = ""


CLASSIFYING = ("head", "init", "dropout", "curve_every", "data")
TRAINING = ("lr", "warmup", "clip", "dropout", "curve_every")
ANNEALED = ("center", "width", "k", "t0", "floor")
PULLED = ("pull", *ANNEALED)

METHODS = {
    "adamw": Method("AdamW", "torch.optim.AdamW"),
    "recadam": Method("RecAdam", "Algorithm 1 of the paper", PULLED, "decoupled"),
    "recadam-released": Method("RecAdam, released form", "the published code's", PULLED, "released"),
    "recadam-proximal": Method("RecAdam, proximal form", "the pull taken implicitly", PULLED, "proximal"),
    "coupled": Method("coupled Adam", "Adam on the annealed objective, penalty in its moments", PULLED),
    "annealed": Method("λ(t) alone", "the annealed task weight without an anchor", ANNEALED, "decoupled"),
    "l2sp": Method(
        "constant pull (L2-SP)", "both weights 1 throughout", ("pull",), "decoupled", constant=True
    ),
    "recall": Method(
        "annealed pull alone", "the annealed recall weight, the task weight 1 throughout", PULLED, "decoupled"
    ),
    "budget": Method(
        "drift budget", "a pull whose strength holds a distance", ("pull", "budget"), "proximal",
        constant=True,
    ),
    "ewc": Method(
        "EWC", "the constant pull, weighted by the source task's Fisher information", ("pull",), "decoupled",
        constant=True, sentences=True, needs="old data",
    ),
    "ewc-dr": Method(
        "EWC-DR", "EWC, with the scores reversed while the Fisher information is found", ("pull",),
        "decoupled", constant=True, sentences=True, needs="old data",
    ),
    "feature-pull": Method(
        "feature-weighted pull", "the constant pull, weighted by what moves the target texts' features",
        ("pull",), "decoupled", constant=True, sentences=True,
    ),
    "muon-pull": Method("constant pull, Muon", "the pull around torch.optim.Muon", ("pull",)),
    "spd": Method("SPD", "selective projection decay: Adam, and back where it goes on away", ("pull",)),
    "mofo": Method("MoFO", "AdamW that moves the weights with the largest momentum alone", ("share",)),
    "half": Method("half fine-tuning", "AdamW on a random part of the matrices", ("share",)),
    "finch": Method("FINCH", "AdamW at a rate that is lower where the loss is high"),
    "lwf": Method(
        "LwF", "AdamW, and the divergence from what the pretrained weights say", ("weight",),
        sentences=True, needs="a second forward pass",
    ),
    "wiseft": Method("WiSE-FT", "AdamW, then a part of the way back to the pretrained weights", ("alpha",)),
    "fapm": Method("FAPM", "AdamW, then only a part of the change is kept, by its share", ("share",)),
    "lora": Method("LoRA", "AdamW on adapters of low rank (peft)", ("rank",), sentences=True),
    "osf": Method(
        "OSF", "AdamW on the lesser singular directions of each matrix (peft)", ("share",), sentences=True
    ),
    "replay": Method(
        "replay", "AdamW, and some of the batches are old data", ("share",), sentences=True, needs="old data"
    ),
    "self-replay": Method(
        "self-replay", "the same with texts that the pretrained model wrote", ("share",), sentences=True,
        kinds=("decoder",), needs="texts to be written",
    ),
    "frozen": Method(
        "frozen encoder", "logistic regression on its features", ("inverse_strength",),
        sentences=True, trains=False, kinds=("classification",),
    ),
    "multitask": Method(
        "multi-task", "AdamW on target and source data together", ("source_weight",), sentences=True,
        needs="old data",
    ),
}  # fmt: skip
"""The methods that are compared, by name."""


@dataclass(frozen=True)
class Trial:
    """Everything that determines a training and what is measured after it.

    Args:
        target: a name in `recadam_harness.experiments.data.TARGETS`, or "glue/TASK".
        model: "minilm-l3", "minilm-l6", a checkpoint folder, or "org/model" on the hub; of decoders
            "gemma-270m".
        method: a name in `METHODS`.
        rows: training rows, drawn by the seed; 0 for all.
        steps: steps of training.
        batch_size: rows a step.
        lr: peak of the learning rate, which rises over a tenth of the steps and falls to zero.
        warmup: steps of the rise; None for a tenth of them.
        seed: of the rows, the new head, and the order of the batches.
        split: "validation" or "test": where target and source task are measured.
        head: "new", random and small; or "probed", the logistic regression on the pretrained features.
        init: "pretrained", or "random" weights to start from; the anchors are pretrained either way.
        pull: lr * gamma at the peak: the share of the way to the anchor in a step; of `spd` its strength.
        center: middle of the annealing, as a share of the steps.
        width: share of the steps in which the task weight rises from a tenth to nine tenths.
        k: slope of the annealing per step; with `t0` instead of center and width.
        t0: its middle, in steps.
        floor: below which the recall weight does not fall.
        budget: Euclidean distance to the anchor that `budget` holds.
        alpha: share of the way from the pretrained to the tuned weights at which `wiseft` ends.
        rank: of the adapters of `lora`.
        inverse_strength: C of the logistic regression of `frozen`, or of a probed head.
        source_weight: weight of the source loss in `multitask`.
        share: of the weights that move in a step (`mofo`), of the matrices that are trained (`half`), of
            the change that is kept (`fapm`), of the directions that are trained (`osf`), or of the batches
            that are replayed (`replay`, `self-replay`).
        weight: of the divergence in `lwf`.
        dropout: in training; None for the model's own.
        clip: largest norm of the gradient.
        max_length: tokens a text is cut to.
        curve_every: measure along the way every so many steps; 0 for never.
        held_out: rows of each kind that are measured on, at most; 0 for all. Of embeddings and decoders.
        data: folder of the official GLUE files, or "hub"; for targets "glue/TASK".

    Raises:
        RecAdamError: for a name or a number that cannot be used, or a setting that the method does not read.

    Example:
        >>> Trial(method="l2sp", pull=0.2).command
        'recadam trial method=l2sp pull=0.2'
    """

    target: str = "movie-reviews"
    model: str = "minilm-l3"
    method: str = "adamw"
    rows: int = 1000
    steps: int = 100
    batch_size: int = 16
    lr: float = 1e-4
    warmup: int | None = None
    seed: int = 0
    split: str = "test"
    head: str = "new"
    init: str = "pretrained"
    pull: float = 0.1
    center: float = 0.25
    width: float = 0.5
    k: float | None = None
    t0: float | None = None
    floor: float = 0.0
    budget: float = 1.0
    alpha: float = 0.5
    rank: int = 8
    inverse_strength: float = 0.1
    source_weight: float = 1.0
    share: float = 0.1
    weight: float = 1.0
    dropout: float | None = 0.0
    clip: float = 1.0
    max_length: int = 48
    curve_every: int = 0
    held_out: int = 0
    data: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        choices: tuple[str, ...]
        for name, choices in (
            ("split", ("validation", "test")),
            ("head", ("new", "probed")),
            ("init", ("pretrained", "random")),
        ):
            if getattr(self, name) not in choices:
                raise unknown(name, getattr(self, name), choices)
        for name, low in (("rows", 0), ("steps", 1), ("batch_size", 1), ("seed", 0), ("rank", 1),
                          ("max_length", 4), ("curve_every", 0), ("held_out", 0), ("warmup", 0)):  # fmt: skip
            value = getattr(self, name)
            if name == "warmup" and value is None:
                continue
            check_whole(f"trial: {name}", value, low, 2**63 - 1 if name == "seed" else 10**8)
        batches = f"trial: {self.steps:,} steps with batch_size {self.batch_size:,}"
        check_memory(batches, 16.0 * self.steps * self.batch_size)
        for name in ("lr", "clip", "inverse_strength", "budget", "width"):
            check_number("trial", name, getattr(self, name), low=0.0, open_low=True)
        for name in ("pull", "center", "floor", "source_weight", "weight"):
            check_number("trial", name, getattr(self, name), low=0.0)
        check_number("trial", "alpha", self.alpha, low=0.0, high=1.0)
        check_number("trial", "share", self.share, low=0.0, high=1.0, open_low=True)
        if self.dropout is not None:
            check_number("trial", "dropout", self.dropout, low=0.0, high=1.0, open_high=True)
        if self.method in ("lora", "osf") and self.curve_every:
            raise RecAdamError(
                f"trial: {self.method} has no curve, since its adapters are merged at the end; leave it out"
            )
        self._check_kind()
        if self.init == "random" and (self.head == "probed" or self.method == "feature-pull"):
            raise RecAdamError(
                "trial: init=random goes with no probed head and no feature-pull, which read the pretrained "
                "encoder's features; leave one of them out"
            )
        if self.data and not self.target.startswith("glue/"):
            raise RecAdamError(f"trial: {self.target} reads no data; that is for targets glue/TASK")
        if self.k is not None and not {"center", "width"}.isdisjoint(self.changed):
            raise RecAdamError("trial: k and t0 stand for center and width; give the ones or the others")
        if (self.k is None) != (self.t0 is None):
            raise RecAdamError("trial: k and t0 go together; give both, or center and width instead")
        if self.k is not None:
            check_number("trial", "k", self.k, low=0.0, open_low=True)
            check_number("trial", "t0", self.t0, low=0.0)
        for name in self.changed:
            if name not in self.reads(self.method, self.head):
                reads = ", ".join(METHODS[self.method].settings) or "none of its kind"
                raise RecAdamError(f"trial: method {self.method!r} does not read {name} (it reads {reads})")

    def _check_kind(self) -> None:
        """What goes with the kind of the target."""
        kinds, kind = METHODS[self.method].kinds, kind_of(self.target)
        if kinds and kind not in kinds:
            raise RecAdamError(
                f"trial: method {self.method!r} is for {' and '.join(kinds)}; {self.target} is {kind}"
            )
        if (self.model == DECODER) != (kind == "decoder"):
            raise RecAdamError(
                f"trial: target {self.target} and model {self.model}; the targets of {DECODER}, and of no "
                f"other, are {', '.join(name for name in TARGETS if kind_of(name) == 'decoder')}"
            )
        if kind == "classification" and self.held_out:
            raise RecAdamError(f"trial: held_out is of embeddings and decoders, and {self.target} is {kind}")
        for name in CLASSIFYING if kind != "classification" else ():
            if name in self.changed:
                raise RecAdamError(f"trial: {name} is of classification, and {self.target} is {kind}")

    @classmethod
    def reads(cls, method: str, head: str = "new") -> set[str]:
        """The fields that a method reads, those that all methods read among them."""
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        special = {name for other in METHODS.values() for name in other.settings}
        if not METHODS[method].trains:
            special |= set(TRAINING)
        read = {f.name for f in dataclasses.fields(cls)} - special | set(METHODS[method].settings)
        return read | {"inverse_strength"} if head == "probed" else read

    @property
    def changed(self) -> dict[str, Any]:
        """The fields that are not at their default, in the order in which they are declared."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}

    @property
    def command(self) -> str:
        """The command that repeats it."""
        return shlex.join(["recadam", "trial", *self.pairs(self.changed)])

    def pairs(self, names: Iterable[str]) -> list[str]:
        """These fields as `name=value`, which `parse` reads."""
        return [f"{name}={getattr(self, name)}" for name in names]

    @property
    def key(self) -> str:
        """A name for its file: the method, and a hash of every field."""
        later = {"share", "weight", "held_out"} - self.changed.keys()  # fields that older keys are without
        values = {name: x for name, x in dataclasses.asdict(self).items() if name not in later}
        text = json.dumps(values, sort_keys=True)
        return f"{self.method}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        return max(1, self.steps // 10) if self.warmup is None else self.warmup

    @property
    def annealing(self) -> Annealing:
        """The annealing of the method."""
        if METHODS[self.method].constant:
            return Constant(1.0, 1.0)
        if self.k is not None and self.t0 is not None:
            curve = Sigmoid(k=self.k, t0=self.t0, floor=self.floor)
        else:
            curve = Sigmoid.over(self.steps, self.center, self.width, floor=self.floor)
        return TaskAtOne(curve) if self.method == "recall" else curve

    @property
    def hp(self) -> Hyperparameters:
        """Settings of the optimizer, for methods that are RecAdam or fed with its objective."""
        gamma = 0.0 if self.method == "annealed" else gamma_for(self.lr, pull=self.pull)
        form = METHODS[self.method].form or "decoupled"
        return Hyperparameters(lr=self.lr, gamma=gamma, annealing=self.annealing, form=form)

    @classmethod
    def parse(cls, pairs: Iterable[str]) -> Trial:
        """The trial that `name=value` pairs describe, as `command` prints them.

        Args:
            pairs: the pairs; what is not named is at its default.

        Returns:
            The trial.

        Raises:
            RecAdamError: for a pair that is none, an unknown name or a value of another kind.

        Example:
            >>> Trial.parse(["method=recadam", "lr=2e-5", "k=0.1", "t0=250"]).lr
            2e-05
        """
        kinds = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for pair in pairs:
            name, sign, text = pair.partition("=")
            if not sign:
                raise RecAdamError(f"trial: {pair!r} is no setting; give name=value, as lr=1e-4")
            if name not in kinds:
                raise unknown("setting of a trial", name, kinds)
            if name in values:
                raise RecAdamError(f"trial: {name} is given twice; give it once")
            values[name] = _parsed(name, text, kinds[name])
        return cls(**values)


def _parsed(name: str, text: str, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        if text == "None":
            return None
        kind = next(x for x in typing.get_args(kind) if x is not type(None))
    try:
        return kind(text)
    except ValueError:
        what = {int: "a whole number", float: "a number"}[kind]
        raise RecAdamError(f"trial: {name} is {text!r}; give {what}") from None


@dataclass(frozen=True)
class TaskAtOne:
    """An annealing's recall weight, beside a task weight of 1."""

    curve: Sigmoid

    def weights(self, t: Any, xp: Any = None) -> tuple[Any, Any]:
        """Task and recall weight of step t."""
        return 1.0 + 0.0 * t, self.curve.weights(t, xp)[1]

    def release_step(self) -> int | None:
        """The first step that needs no anchor."""
        from recadam_core.annealing import release_step

        return release_step(self.curve)
