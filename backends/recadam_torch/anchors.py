"""Anchors: pretrained values by parameter name, where they are kept, and what tells them from others."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recadam_core import RecAdamError
from recadam_core.errors import check_flag, shown
from recadam_core.optimizer import check_anchors

from .matching import Coverage, Match, bare, check_made, check_module, matched, more_rows, some_of
from .shards import fingerprints, is_sharded, like, local, part_of, summed
from .sources import Files, Source, Tensors, is_wide, open_source

__all__ = [
    "PLACES",
    "Anchors",
    "CoverageWarning",
    "anchor_of",
    "from_file",
    "hashes_of",
    "lora_anchors",
    "no_hash",
    "rows_of",
    "take_hashes",
]

PLACES = ("device", "host", "file")
"""Where anchors may be kept."""


class CoverageWarning(UserWarning):
    """Some parameters have no anchor, and nobody said that they are new.

    Example:
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     anchors = Anchors.of(nn.Linear(2, 1), {"weight": torch.ones(1, 2)})
        >>> print(caught[0].category.__name__, caught[0].message)
        CoverageWarning anchors: no anchor for bias; name them in new=[...] if they are new
    """


class Anchors(Mapping[str, Tensor]):
    """Pretrained values by parameter name, read from their source when they are asked for.

    Made by `Anchors.of`. As a mapping it gives whole tensors (of a grown vocabulary the rows that the source
    has); `RecAdam` takes each process's part.

    Args:
        source: where they are read from.
        coverage: what was matched.
        dtype: the dtype to keep them in; None for the source's own.
        place: "device" (each parameter's), "host" (pinned where there is CUDA; copied over step by step) or
            "file" (pages of the file, read by the operating system when a step needs them; in memory
            where a vocabulary has grown).
    """

    def __init__(
        self, source: Source, coverage: Coverage, dtype: torch.dtype | None = None, place: str = "device"
    ) -> None:
        if place not in PLACES:
            raise RecAdamError(f"anchors: place is {place!r}; give one of {', '.join(PLACES)}")
        if dtype is not None and not (
            isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
        ):
            raise RecAdamError(
                f"anchors: dtype is {shown(dtype)}; give a floating one of 16 bits or more, as torch.bfloat16"
            )
        if place == "file" and not source.mapped:
            raise RecAdamError("anchors: place='file' needs a .safetensors file; save the weights as one")
        if place == "file" and dtype is not None:
            raise RecAdamError("anchors: place='file' keeps the file's dtype; leave out one of them")
        self.source, self.coverage, self.dtype, self.place = source, coverage, dtype, place
        self._matches = {bare(m.parameter): m for m in coverage.matches}
        self._matches.update({m.parameter: m for m in coverage.matches})

    @classmethod
    def of(
        cls,
        model: nn.Module,
        source: str | Path | Mapping[str, Tensor] | nn.Module | None = None,
        *,
        new: Iterable[str] = (),
        dtype: torch.dtype | None = None,
        place: str = "device",
        strict: bool = False,
    ) -> Anchors:
        """Anchors of a model's trainable parameters.

        Names match exactly, or but for what wrappers put into them (`module.`, `_orig_mod.`), but for the
        prefix of a base model on either side (`bert.`), under another name of a tied weight, or as peft saves
        them. Of a vocabulary that has grown the first rows match: an `nn.Embedding` with more rows than in
        the source, and whatever has grown from as many rows to as many.

        Args:
            model: the model that is to be trained. Parameters that need no gradient need no anchor.
            source: what `recadam_torch.sources.open_source` takes; None for the model as it is now, which
                is copied.
            new: names of new parameters, or patterns as "classifier.*": no anchor, and no surprise.
            dtype: the dtype to keep anchors in; None for the source's own.
            place: "device", "host" or "file".
            strict: whether a parameter that has no anchor and is not called new is an error. Otherwise
                it is a warning.

        Returns:
            The anchors; `.coverage` says what was matched.

        Raises:
            RecAdamError: when nothing matches, a pattern in `new` matches no parameter, a parameter is still
                to be made by a lazy module, or `strict` asks.

        Warns:
            CoverageWarning: naming parameters without an anchor.

        Example:
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
            >>> anchors = Anchors.of(model, new=["1.*"])
            >>> sorted(anchors)
            ['0.bias', '0.weight']
        """
        check_module("anchors", model)
        check_flag("anchors", "strict", strict)
        patterns = (new,) if isinstance(new, str) else tuple(new) if isinstance(new, Iterable) else (new,)
        if any(not isinstance(pattern, str) for pattern in patterns):
            raise RecAdamError(
                f"anchors: new is {shown(new)}; give names of parameters, or patterns as 'classifier.*'"
            )
        for name, p in model.named_parameters():
            check_made(name, p)
        if source is None:
            copies = {n: p.detach().clone() for n, p in model.named_parameters()}
            opened: Source = Tensors(copies)
        else:
            opened = open_source(source)
            if isinstance(opened, Tensors):
                opened.part_from(model.parameters())
        coverage = matched(model, opened, patterns)
        if not coverage.having("anchored", "ambiguous") and coverage.having("new", "shape"):
            raise RecAdamError(
                f"anchors: nothing in {opened.path or 'the state dict'} matches a parameter; it has "
                f"{some_of(list(opened))}, the model {some_of([m.parameter for m in coverage.matches])}"
            )
        anchors = cls(opened, coverage, dtype, place)
        if coverage.surprises:
            lacking = some_of([m.parameter + (f" ({m.note})" if m.note else "") for m in coverage.surprises])
            text = f"anchors: no anchor for {lacking}; name them in new=[...] if they are new"
            if strict:
                raise RecAdamError(text)
            warnings.warn(text, CoverageWarning, stacklevel=2)
        return anchors

    def with_new(self, parameters: Iterable[tuple[str, Tensor]]) -> Anchors:
        """The same, and parameters of other modules, which have no anchor: those of a loss, say.

        Example:
            >>> both = Anchors.of(nn.Linear(2, 1)).with_new([("loss.scale", torch.ones(1))])
            >>> both.match("loss.scale").status
            'new'
        """
        more = tuple(Match(name, tuple(p.shape), p.numel(), "new") for name, p in parameters)
        coverage = replace(self.coverage, matches=(*self.coverage.matches, *more))
        return Anchors(self.source, coverage, self.dtype, self.place)

    def match(self, name: str) -> Match:
        """What was found for a parameter, under its name or what a wrapper made of it.

        Raises:
            RecAdamError: when the model that was matched has no such parameter.
        """
        match = self._found(name)
        if match is None:
            near = difflib.get_close_matches(name, self._matches, n=1)
            hint = f" (the nearest is {near[0]!r})" if near else ""
            raise RecAdamError(
                f"anchors: they were matched to a model without a parameter {name!r}{hint}; "
                "give the model's own names, or Anchors.of this model"
            )
        return match

    def _found(self, name: str) -> Match | None:
        return self._matches.get(name) or self._matches.get(bare(name))

    def __contains__(self, name: object) -> bool:
        match = self._found(name) if isinstance(name, str) else None
        return match is not None and match.has_anchor

    def __getitem__(self, name: str) -> Tensor:
        match = self._found(name)
        if match is None or not match.has_anchor:
            raise KeyError(name)
        whole = tuple(slice(0, n) for n in self.source.shape(match.stored))
        tensor = self.source.read(match.stored, whole)
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return (m.parameter for m in self.coverage.matches if m.has_anchor)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def part(self, name: str, p: Tensor) -> Tensor:
        """The anchor of a parameter, sharded as it is, in its place.

        Args:
            name: the parameter's name, one of this mapping.
            p: the parameter.

        Returns:
            A tensor that nobody else writes to: in memory of its own, or on the file's pages.
        """
        match = self.match(name)
        if match.shape != tuple(p.shape):
            raise RecAdamError(
                f"anchors: {name!r} was matched as {match.shape}, and is {tuple(p.shape)} now; "
                "make them from the model as it is"
            )
        return placed(self.source, match.stored, p, self.dtype, self.place)


def check_new(where: str, anchors: Any, new: Any) -> tuple[str, ...]:
    """The names of new parameters; raises for what can be no anchors, and for names beside matched ones."""
    names = (new,) if isinstance(new, str) else tuple(new) if isinstance(new, Iterable) else (new,)
    if not all(isinstance(name, str) for name in names):
        raise RecAdamError(f"{where}: new is {shown(new)}; give a list of names, or of patterns as 'head.*'")
    if not (anchors is None or isinstance(anchors, (str, Path, Mapping, nn.Module))):
        raise RecAdamError(f"{where}: anchors is {shown(anchors)}; give a path, a state dict or Anchors")
    if isinstance(anchors, Anchors) and names:
        raise RecAdamError(f"{where}: new and Anchors are both given; say new to Anchors.of")
    return names


def lora_anchors(model: nn.Module) -> dict[str, Tensor]:
    r"""Anchors of a model with LoRA adapters: zero for the factor that starts at zero.

    Math:
        The weight is $W^* + BA$ with $W^*$ frozen, so the distance to the pretrained weights is $\|BA\|$, and
        the product's anchor is zero. Pulling $B$ to 0 pulls the product there, whatever $A$ is; $A$, which
        starts at random, is a new parameter.

    Args:
        model: a model of peft, or any whose parameters are called like its.

    Returns:
        Zeros by parameter name, for `RecAdam` or `param_groups`.

    Raises:
        RecAdamError: when there is no such factor, or one is not zero.

    Example:
        >>> model = nn.ParameterDict({"lora_A": torch.ones(1, 2), "lora_B": torch.zeros(3, 1)})
        >>> lora_anchors(model)
        {'lora_B': tensor([[0.],
                [0.],
                [0.]])}

    Source: LoRA is arXiv 2106.09685; that B starts at zero, its section 4.1.
    """
    check_module("lora_anchors", model)
    anchors = {}
    for name, p in model.named_parameters():
        check_made(name, p)
        if p.requires_grad and re.search(r"(^|\.)lora_(embedding_)?B(\.|$)", name):
            if bool(p.detach().count_nonzero()):
                raise RecAdamError(
                    f"lora_anchors: {name!r} is not zero; call it before training, with an initialisation "
                    "that leaves the pretrained weights in place (init_lora_weights=True)"
                )
            anchors[name] = torch.zeros_like(p)
    if not anchors:
        raise RecAdamError(
            "lora_anchors: no trainable parameter is called lora_B; give a model with LoRA adapters"
        )
    return anchors


def anchor_of(anchors: Mapping[str, Tensor] | None, name: str, p: Tensor) -> Tensor | None:
    """The anchor of a parameter, copied: where it is now without `anchors`; None when there is none."""
    if anchors is None:
        anchor: Tensor | None = p.detach().clone()
    elif isinstance(anchors, Anchors):
        anchor = anchors.part(name, p) if anchors.match(name).has_anchor else None
    elif name in anchors:
        value = anchors[name]
        check_anchors({name: p.shape}, {name: value})
        _check_kind(name, value)
        if value.is_meta and not (p.is_meta or is_sharded(value)):
            raise RecAdamError(f"anchors: {name!r} is on the meta device; give the pretrained values")
        anchor = part_of(value, p)
    else:
        anchor = None
    if anchor is None or anchor.is_meta:
        return anchor
    _check_kind(name, anchor)
    infinite = (~torch.isfinite(local(anchor))).sum()
    beyond = torch.zeros_like(infinite)
    if torch.finfo(anchor.dtype).max > (most := torch.finfo(p.dtype).max):
        beyond = ((local(anchor).abs() > most) & torch.isfinite(local(anchor))).sum()
    if not p.requires_grad:  # a mask, say, which nobody steps; in all processes alike
        return None if int(summed([infinite], [anchor])[0]) else anchor
    if int(infinite):
        remedy = "give the pretrained values"
        if anchors is None:
            remedy = "freeze it, or put it into a group that says 'anchored': False"
        raise RecAdamError(f"anchors: {name!r} holds NaN or infinity; {remedy}")
    if int(beyond):
        raise RecAdamError(f"anchors: {name!r} has values beyond {p.dtype}, the parameter's; give its own")
    return anchor


def _check_kind(name: str, anchor: Any) -> None:
    """Raise unless it is a dense tensor of floating numbers."""
    if not isinstance(anchor, Tensor) or not anchor.is_floating_point():
        raise RecAdamError(f"anchors: {name!r} is {getattr(anchor, 'dtype', anchor)}; give a floating tensor")
    if not is_wide(anchor):
        raise RecAdamError(f"anchors: {name!r} is {anchor.dtype}; give one of 16 bits or more")
    if anchor.layout != torch.strided:
        raise RecAdamError(f"anchors: {name!r} is sparse; give it as a dense tensor")


def placed(source: Source, stored: str, p: Tensor, dtype: torch.dtype | None, place: str) -> Tensor:
    """A stored tensor as the anchor of a parameter: sharded as that is, in its dtype and place.

    Rows that a grown vocabulary has beyond the stored ones are the parameter's own, in memory.
    """
    shape = source.shape(stored)

    def read(where: tuple[slice, ...]) -> Tensor:
        if shape != tuple(p.shape):
            end = shape[0]
            first, rest = where[0], where[1:]
            old = slice(min(first.start, end), min(first.stop, end))
            values = source.read(stored, (old, *rest))
            return put(torch.cat([values, local(p).detach()[old.stop - old.start :].to(values)]))
        return put(source.read(stored, where))

    def put(values: Tensor) -> Tensor:
        if place == "file":
            return values
        if place == "device":
            return values.to(p.device, dtype, copy=True)
        on_host = values.to("cpu", dtype, copy=True)
        return on_host.pin_memory() if torch.cuda.is_available() else on_host

    anchor = like(p, read)
    if place == "file" and isinstance(source, Files) and shape == tuple(p.shape):
        source.keep(stored, anchor)
    return anchor


def no_hash(rows: int | None = None) -> dict[str, Tensor]:
    """What a state has of a hash that is still to be taken, of so many rows or all."""
    entries = {"anchor_hash": torch.zeros((), dtype=torch.int64, device="cpu")}
    if rows is not None:
        entries["anchor_rows"] = torch.tensor(rows, dtype=torch.int64, device="cpu")
    return entries


def take_hashes(states: Iterable[Mapping[str, Any]]) -> None:
    """Put in the anchors' hashes where they are still to be taken."""
    states = [s for s in states if s.get("anchor") is not None and not s["anchor"].is_meta]
    states = [s for s in states if not int(s["anchor_hash"])]
    for state, number in zip(states, hashes_of(states), strict=True):
        state["anchor_hash"].fill_(number)


def hashes_of(states: Sequence[Mapping[str, Any]]) -> list[int]:
    """The hashes of states' anchors, as far as these are pretrained values."""
    return fingerprints((s["anchor"] for s in states), map(rows_of, states))


def rows_of(state: Mapping[str, Any]) -> int | None:
    """How many rows of a grown vocabulary are anchored; None for all."""
    return int(state["anchor_rows"]) if "anchor_rows" in state else None


def from_file(
    group: Mapping[str, Any], wanted: list[tuple[Tensor, int]], files: Collection[str]
) -> dict[Tensor, dict[str, Any]]:
    """Anchors of a group's parameters, read again from the file that they came from."""
    path, names = group["anchor_source"], group["anchor_names"]
    if not wanted or path not in files or not Path(path).is_file():
        return {}
    try:
        source = open_source(path)
    except RecAdamError:
        return {}
    dtype = getattr(torch, group["anchor_dtype"]) if group["anchor_dtype"] else None
    shapes = {name: source.shape(name) for name in set(source) & set(names) if not source.unfit(name)}
    anchors = {}
    for p, index in wanted:
        stored = names[index] if index < len(names) else ""
        shape = shapes.get(stored, ())
        if stored in shapes and (shape == tuple(p.shape) or more_rows(shape, tuple(p.shape))):
            anchor = placed(source, stored, p, dtype, group["anchor_place"])
            anchors[p] = {"anchor": anchor, **no_hash(shape[0] if shape != tuple(p.shape) else None)}
    take_hashes(anchors.values())
    return anchors
