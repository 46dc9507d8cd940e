"""Anchors: pretrained values matched to a model's parameters by name, and where they are kept."""

from __future__ import annotations

import difflib
import fnmatch
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from recadam_core import RecAdamError
from recadam_core.errors import check_flag, shown

from .shards import like, local
from .sources import Files, Source, Tensors, open_source

__all__ = [
    "Anchors",
    "Coverage",
    "CoverageWarning",
    "Match",
    "bare",
    "check_made",
    "lora_anchors",
    "more_rows",
    "placed",
]

PLACES = ("device", "host", "file")
"""Where anchors may be kept."""

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
_OLD_NORMS = {"gamma": "weight", "beta": "bias"}


class CoverageWarning(UserWarning):
    """Some parameters have no anchor, and nobody said that they are new.

    Example:
        >>> issubclass(CoverageWarning, UserWarning)
        True
    """


class Match(NamedTuple):
    """What was found for one parameter.

    Example:
        >>> Match("head.weight", (2, 8), 16, "new").stored
        ''
    """

    parameter: str
    shape: tuple[int, ...]
    size: int  # number of elements
    status: str  # "anchored", "new", "frozen" (needs none), "shape" or "ambiguous" (has none, a mistake?)
    stored: str = ""  # name of its value in the source
    note: str = ""
    rows: int | None = None  # of a grown vocabulary those that have an anchor, the first; None for all

    @property
    def pulled(self) -> int:
        """Number of elements that have an anchor."""
        if not self.has_anchor:
            return 0
        return self.size if self.rows is None else self.size // self.shape[0] * self.rows

    @property
    def has_anchor(self) -> bool:
        """Whether there is a value for it; a frozen one may be trained later."""
        return bool(self.stored) and self.status in ("anchored", "frozen")


@dataclass(frozen=True)
class Coverage:
    """Which parameters are anchored, which are new, and what did not match.

    Args:
        matches: what was found, parameter by parameter.
        unused: names in the source that no parameter took, each with the parameter nearest by name.
        source: where the values are from.
        expected_new: patterns of the parameters that the user called new.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> print(Anchors.of(net, {"weight": torch.ones(1, 2)}, new=["bias"]).coverage)
        1 of 2 parameters anchored (66.7% of 3 numbers) in memory; new: bias
    """

    matches: tuple[Match, ...]
    unused: Mapping[str, str]
    source: str
    expected_new: tuple[str, ...] = ()

    def having(self, *statuses: str) -> list[Match]:
        """The matches of these statuses.

        Example:
            >>> Coverage((), {}, "").having("new")
            []
        """
        return [match for match in self.matches if match.status in statuses]

    @property
    def surprises(self) -> list[Match]:
        """Parameters without an anchor that nobody called new."""
        lacking = self.having("new", "shape", "ambiguous")
        return [m for m in lacking if not any(fnmatch.fnmatch(m.parameter, p) for p in self.expected_new)]

    def __str__(self) -> str:
        anchored = self.having("anchored")
        trained = [match for match in self.matches if match.status != "frozen"]
        size = sum(match.size for match in trained)
        share = sum(match.pulled for match in anchored) / max(1, size)
        text = (
            f"{len(anchored)} of {len(trained)} parameters anchored ({share:.1%} of {size:,} numbers) "
            f"in {self.source or 'memory'}"
        )
        lacking = [
            match.parameter + (f"[{match.rows}:]" if match.rows else "")
            for match in trained
            if match.status != "anchored" or match.rows
        ]
        return f"{text}; new: {_some(lacking)}" if lacking else text

    def __rich__(self) -> Any:
        """A table, for `rich.print`: layers that are alike in one row, and what was not used."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        found = [
            (m.parameter, "×".join(map(str, m.shape)) or "scalar", m.status, m.note or _under(m))
            for m in self.matches
        ]
        found += [
            (name, "", "not used", f"nearest: {near}" if near else "") for name, near in self.unused.items()
        ]
        rows = Counter(tuple(re.sub(r"\b\d+\.", "*.", cell) for cell in row) for row in found)
        table = Table(box=None, pad_edge=False)
        for column in ("name", "shape", "", "", "note"):
            table.add_column(column, overflow="fold")
        for (name, shape, status, note), count in rows.items():
            table.add_row(*map(Text, (name, shape, f"×{count}" if count > 1 else "", status, note)))
        return Group(Text(str(self)), table)


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
        names: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        for key, saved in _saved_by_peft(model).items():
            names[key] += saved
        parameters = {name: (names[id(p)], p) for name, p in model.named_parameters()}
        for pattern in patterns:
            if not fnmatch.filter(parameters, pattern):
                near = difflib.get_close_matches(pattern, parameters, n=1)
                hint = f"the nearest is {near[0]!r}" if near else "see model.named_parameters()"
                raise RecAdamError(f"anchors: new={pattern!r} matches no parameter; {hint}")
        embeddings = {
            id(module.weight)
            for module in model.modules()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        }
        coverage = _match(parameters, opened, patterns, _renaming(model), embeddings)
        if not coverage.having("anchored", "ambiguous") and coverage.having("new", "shape"):
            raise RecAdamError(
                f"anchors: nothing in {opened.path or 'the state dict'} matches a parameter; it has "
                f"{_some(list(opened))}, the model {_some(list(parameters))}"
            )
        anchors = cls(opened, coverage, dtype, place)
        if coverage.surprises:
            lacking = _some([m.parameter + (f" ({m.note})" if m.note else "") for m in coverage.surprises])
            text = f"anchors: no anchor for {lacking}; name them in new=[...] if they are new"
            if strict:
                raise RecAdamError(text)
            warnings.warn(text, CoverageWarning, stacklevel=2)
        return anchors

    def match(self, name: str) -> Match:
        """What was found for a parameter, under its name or what a wrapper made of it.

        Raises:
            RecAdamError: when the model that was matched has no such parameter.
        """
        found = self._found(name)
        if found is None:
            near = difflib.get_close_matches(name, self._matches, n=1)
            hint = f" (the nearest is {near[0]!r})" if near else ""
            raise RecAdamError(
                f"anchors: they were matched to a model without a parameter {name!r}{hint}; "
                "give the model's own names, or Anchors.of this model"
            )
        return found

    def _found(self, name: str) -> Match | None:
        return self._matches.get(name) or self._matches.get(bare(name))

    def __contains__(self, name: object) -> bool:
        found = self._found(name) if isinstance(name, str) else None
        return found is not None and found.has_anchor

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
            found = source.read(stored, (old, *rest))
            return put(torch.cat([found, local(p).detach()[old.stop - old.start :].to(found)]))
        return put(source.read(stored, where))

    def put(found: Tensor) -> Tensor:
        if place == "file":
            return found
        if place == "device":
            return found.to(p.device, dtype, copy=True)
        kept = found.to("cpu", dtype, copy=True)
        return kept.pin_memory() if torch.cuda.is_available() else kept

    anchor = like(p, read)
    if place == "file" and isinstance(source, Files) and shape == tuple(p.shape):
        source.keep(stored, anchor)
    return anchor


def check_made(name: str, p: Any) -> None:
    """Raise for a parameter of a lazy module that has seen no input yet."""
    if is_lazy(p):
        raise RecAdamError(
            f"parameter {name!r} is of a lazy module and has no shape yet; run the model once before"
        )


def check_module(where: str, model: Any) -> None:
    """Raise unless it is a module of torch."""
    if not isinstance(model, nn.Module):
        raise RecAdamError(f"{where}: the model is a {type(model).__name__}; give the module to be trained")


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
    found = {}
    for name, p in model.named_parameters():
        check_made(name, p)
        if p.requires_grad and re.search(r"(^|\.)lora_(embedding_)?B(\.|$)", name):
            if bool(p.detach().count_nonzero()):
                raise RecAdamError(
                    f"lora_anchors: {name!r} is not zero; call it before training, with an initialisation "
                    "that leaves the pretrained weights in place (init_lora_weights=True)"
                )
            found[name] = torch.zeros_like(p)
    if not found:
        raise RecAdamError(
            "lora_anchors: no trainable parameter is called lora_B; give a model with LoRA adapters"
        )
    return found


def bare(name: str) -> str:
    """A parameter's name without what wrappers of the model put into it."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return name.removeprefix("base_model.model.")  # peft's


def _renaming(model: nn.Module) -> Callable[[str], str]:
    """How transformers renames what is stored when it loads a checkpoint of older names into this model."""
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return _renamed
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    except ImportError:  # a release that keeps names, or has its rules elsewhere
        return _renamed
    return lambda name: str(rename_source_key(name, rules, [])[0])


def _saved_by_peft(model: nn.Module) -> dict[int, list[str]]:
    """The names under which peft saves the adapters that are in use, by the ids of their parameters."""
    library: Any = sys.modules.get("peft")
    found: dict[int, list[str]] = {}
    for module in model.modules() if library is not None else ():
        if not isinstance(module, library.PeftModel):
            continue
        ours = dict(module.named_parameters(remove_duplicate=False))
        for adapter in module.active_adapters:
            # Not the embeddings: whether they were resized it asks of the hub.
            saved = library.get_peft_model_state_dict(
                module, state_dict=ours, adapter_name=adapter, save_embedding_layers=False
            )
            for name, p in saved.items():
                found.setdefault(id(p), []).append(name)
    return {id(p): found[id(p)] for p in model.parameters() if id(p) in found}


def _match(
    parameters: Mapping[str, tuple[list[str], Tensor]],
    source: Source,
    patterns: tuple[str, ...],
    renaming: Callable[[str], str],
    embeddings: set[int],
) -> Coverage:
    stored: dict[str, list[str]] = {}
    exact = set(source)
    for name in source:
        for key in {bare(name), renaming(bare(name))}:
            stored.setdefault(key, []).append(name)
    ours = [bare(name) for names, _ in parameters.values() for name in names]
    to_drop, to_add = _prefixes(ours, set(stored)), _prefixes(stored, set(ours))
    matches, taken = [], set()
    for name, (aliases, p) in parameters.items():
        match = Match(name, tuple(p.shape), p.numel(), "new")
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            matches.append(match)
            continue
        found = [alias for alias in aliases if alias in exact][:1]
        for keys in (
            () if found else zip(*(_keys(bare(alias), to_drop, to_add) for alias in aliases), strict=True)
        ):
            found = list(dict.fromkeys(n for some in keys for key in some for n in stored.get(key, ())))
            if found:
                break
        if len(found) > 1:
            match = match._replace(status="ambiguous", note=f"several match: {_some(found)}")
        elif found:
            taken.add(found[0])
            match = match._replace(stored=found[0])
            if source.shape(found[0]) != match.shape:
                there = "×".join(map(str, source.shape(found[0]))) or "scalar"
                match = match._replace(status="shape", note=f"is {there} in the source")
            elif unfit := source.unfit(found[0]):
                match = match._replace(status="shape", note=unfit)
            else:
                match = match._replace(status="anchored")
        matches.append(match)
    # A vocabulary that has grown has its first rows from before; its output layer has grown as its embedding.
    grown = {
        i: (source.shape(match.stored)[0], match.shape[0])
        for i, match in enumerate(matches)
        if match.status == "shape" and more_rows(source.shape(match.stored), match.shape)
    }
    vocabularies = {
        sizes for i, sizes in grown.items() if id(parameters[matches[i].parameter][1]) in embeddings
    }
    for i, (old, now) in grown.items():
        if (old, now) in vocabularies and not source.unfit(matches[i].stored):
            note = f"{now - old} of {now} rows are new"
            matches[i] = matches[i]._replace(status="anchored", rows=old, note=note)
    for i, match in enumerate(matches):
        if not parameters[match.parameter][1].requires_grad:
            kept = match.stored if match.status == "anchored" else ""
            matches[i] = match._replace(status="frozen", stored=kept)
    # Two that come to one stored tensor by what was dropped or added: one of them may be a new head.
    claims: dict[str, list[int]] = {}
    for i, match in enumerate(matches):
        if match.status == "anchored" and match.stored not in {match.parameter, bare(match.parameter)}:
            claims.setdefault(match.stored, []).append(i)
    for stored_name, several in claims.items():
        if len(several) > 1:
            for i in several:
                others = _some([matches[j].parameter for j in several if j != i])
                note = f"{stored_name} would be {others}'s as well"
                matches[i] = matches[i]._replace(status="ambiguous", stored="", note=note)
    lacking = [m.parameter for m in matches if m.status == "new"]
    for i, match in enumerate(matches):
        if match.status == "new" and not any(fnmatch.fnmatch(match.parameter, p) for p in patterns):
            near = difflib.get_close_matches(match.parameter, [n for n in source if n not in taken], n=1)
            matches[i] = match._replace(note=f"nearest in the source: {near[0]}" if near else "")
    unused = {}
    for name in source:
        if name not in taken and not source.unfit(name):
            near = difflib.get_close_matches(bare(name), lacking, n=1)
            unused[name] = near[0] if near else ""
    return Coverage(tuple(matches), unused, source.path, patterns)


def more_rows(old: tuple[int, ...], now: tuple[int, ...]) -> bool:
    """Whether a shape is another one with more rows."""
    return len(old) == len(now) > 0 and 0 < old[0] < now[0] and old[1:] == now[1:]


def _keys(name: str, to_drop: set[str], to_add: set[str]) -> Iterator[list[str]]:
    """The stored names that a parameter may have, the likeliest first."""
    yield [name]
    first, _, rest = name.partition(".")
    yield [rest] if first in to_drop and rest else []
    yield [f"{prefix}.{name}" for prefix in sorted(to_add)]


def _prefixes(names: Iterable[str], others: set[str]) -> set[str]:
    """First parts of names without which most of the names that have them are among the others.

    A base model's, that is; not a head's, one of whose names may agree by chance.
    """
    found: dict[str, list[bool]] = {}
    for name in names:
        first, dot, rest = name.partition(".")
        if dot:
            found.setdefault(first, []).append(rest in others)
    return {first for first, among in found.items() if sum(among) * 2 > len(among)}


def _renamed(name: str) -> str:
    """Norms of old checkpoints have a gamma and a beta."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{_OLD_NORMS[last]}" if stem.endswith("Norm") and last in _OLD_NORMS else name


def _under(match: Match) -> str:
    return f"as {match.stored}" if match.stored not in ("", match.parameter) else ""


def _some(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
