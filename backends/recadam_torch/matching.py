"""Which stored tensor is a parameter's pretrained value: matching by name."""

from __future__ import annotations

import difflib
import fnmatch
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from recadam_core import RecAdamError

from .sources import Source

__all__ = [
    "MODULE",
    "Coverage",
    "Match",
    "bare",
    "check_made",
    "check_module",
    "matched",
    "more_rows",
    "some_of",
]

MODULE = ".modules_to_save."
"""What the names have in them of parameters that peft trains whole, beside its adapters."""

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
_OLD_NORMS = {"gamma": "weight", "beta": "bias"}


class Match(NamedTuple):
    """What was found for one parameter.

    Example:
        >>> Match("embed.weight", (3, 2), 6, "anchored", "embed.weight", rows=2).pulled
        4
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
        >>> from recadam_torch import Anchors
        >>> net = nn.Linear(2, 1)
        >>> print(Anchors.of(net, {"weight": net.weight}, new=["bias"]).coverage)
        1 of 2 parameters anchored (66.7% of 3 numbers) in memory; new: bias
    """

    matches: tuple[Match, ...]
    unused: Mapping[str, str]
    source: str
    expected_new: tuple[str, ...] = ()

    def having(self, *statuses: str) -> list[Match]:
        """The matches of these statuses.

        Example:
            >>> from recadam_torch import Anchors
            >>> [m.parameter for m in Anchors.of(nn.Linear(2, 1), new=["bias"]).coverage.having("new")]
            ['bias']
        """
        return [match for match in self.matches if match.status in statuses]

    @property
    def surprises(self) -> list[Match]:
        """Parameters without an anchor that nobody called new."""
        lacking = self.having("new", "shape", "ambiguous")
        return [m for m in lacking if not _called(m.parameter, self.expected_new)]

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
        return f"{text}; new: {some_of(lacking)}" if lacking else text

    def __rich__(self) -> Any:
        """A table, for `rich.print`: layers that are alike in one row, and what was not used."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        lines = [
            (m.parameter, "×".join(map(str, m.shape)) or "scalar", m.status, m.note or _under(m))
            for m in self.matches
        ]
        lines += [
            (name, "", "not used", f"nearest: {near}" if near else "") for name, near in self.unused.items()
        ]
        rows = Counter(tuple(re.sub(r"\b\d+\.", "*.", cell) for cell in row) for row in lines)
        table = Table(box=None, pad_edge=False)
        for column in ("name", "shape", "", "", "note"):
            table.add_column(column, overflow="fold")
        for (name, shape, status, note), count in rows.items():
            table.add_row(*map(Text, (name, shape, f"×{count}" if count > 1 else "", status, note)))
        return Group(Text(str(self)), table)


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


def bare(name: str) -> str:
    """A parameter's name without what wrappers of the model put into it."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return name.removeprefix("base_model.model.")  # peft's


def _called(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern means this parameter, by its name or by what it is without wrappers."""
    names = {name, bare(name), _whole(bare(name))}
    return any(fnmatch.fnmatch(each, pattern) for pattern in patterns for each in names)


def _whole(name: str) -> str:
    """A parameter's name in the model that peft has wrapped."""
    first, part, rest = name.partition(MODULE)
    return f"{first}.{rest.partition('.')[2]}" if part else name


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
    names: dict[int, list[str]] = {}
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
                names.setdefault(id(p), []).append(name)
    return {id(p): names[id(p)] for p in model.parameters() if id(p) in names}


def matched(model: nn.Module, source: Source, patterns: tuple[str, ...]) -> Coverage:
    """Match a model's parameters to a source, but for those that the patterns call new."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for of, saved in _saved_by_peft(model).items():
        names[of] += saved
    for name, p in model.named_parameters():
        names[id(p)] += [_whole(name)] if MODULE in name else []
    parameters = {name: (names[id(p)], p) for name, p in model.named_parameters()}
    for pattern in patterns:
        if not any(_called(name, [pattern]) for name in parameters):
            near = difflib.get_close_matches(pattern, parameters, n=1)
            hint = f"the nearest is {near[0]!r}" if near else "see model.named_parameters()"
            raise RecAdamError(f"anchors: new={pattern!r} matches no parameter; {hint}")
    renaming = _renaming(model)
    stored: dict[str, list[str]] = {}
    exact = set(source)
    for name in source:
        for key in {bare(name), renaming(bare(name))}:
            stored.setdefault(key, []).append(name)
    ours = [bare(name) for aliases, _ in parameters.values() for name in aliases]
    to_drop, to_add = _prefixes(ours, set(stored)), _prefixes(stored, set(ours))
    matches, taken = [], set()
    for name, (aliases, p) in parameters.items():
        match = Match(name, tuple(p.shape), p.numel(), "new")
        if _called(name, patterns):
            matches.append(match)
            continue
        candidates = [alias for alias in aliases if alias in exact][:1]
        for keys in zip(*(_keys(bare(alias), to_drop, to_add) for alias in aliases), strict=True):
            if candidates:
                break
            candidates = list(dict.fromkeys(n for some in keys for key in some for n in stored.get(key, ())))
        if len(candidates) > 1:
            match = match._replace(status="ambiguous", note=f"several match: {some_of(candidates)}")
        elif candidates:
            taken.add(candidates[0])
            match = match._replace(stored=candidates[0])
            if source.shape(candidates[0]) != match.shape:
                there = "×".join(map(str, source.shape(candidates[0]))) or "scalar"
                match = match._replace(status="shape", note=f"is {there} in the source")
            elif unfit := source.unfit(candidates[0]):
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
    tables = [x.weight for x in model.modules() if isinstance(x, (nn.Embedding, nn.EmbeddingBag))]
    embeddings = set(map(id, tables))
    vocabularies = {
        sizes for i, sizes in grown.items() if id(parameters[matches[i].parameter][1]) in embeddings
    }
    for i, (old, now) in grown.items():
        if (old, now) in vocabularies and not source.unfit(matches[i].stored):
            note = f"{now - old} of {now} rows are new"
            matches[i] = matches[i]._replace(status="anchored", rows=old, note=note)
    for i, match in enumerate(matches):
        if not parameters[match.parameter][1].requires_grad:
            stored_as = match.stored if match.status == "anchored" else ""
            matches[i] = match._replace(status="frozen", stored=stored_as)
    # Two that come to one stored tensor by what was dropped or added: one of them may be a new head.
    claims: dict[str, list[int]] = {}
    for i, match in enumerate(matches):
        if match.status == "anchored" and match.stored not in {match.parameter, bare(match.parameter)}:
            claims.setdefault(match.stored, []).append(i)
    for stored_name, several in claims.items():
        if len(several) > 1:
            for i in several:
                others = some_of([matches[j].parameter for j in several if j != i])
                note = f"{stored_name} would be {others}'s as well"
                matches[i] = matches[i]._replace(status="ambiguous", stored="", note=note)
    lacking = [m.parameter for m in matches if m.status == "new"]
    for i, match in enumerate(matches):
        if match.status == "new" and not _called(match.parameter, patterns):
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
    yield [rest for first, rest in _splits(name) if first in to_drop]
    yield [f"{prefix}.{name}" for prefix in sorted(to_add)]


def _prefixes(names: Iterable[str], others: set[str]) -> set[str]:
    """Beginnings of names without which most of the names that have them are among the others.

    A base model's, as `bert` or `0.auto_model`; not a head's, one of whose names may agree by chance.
    """
    rests: dict[str, list[bool]] = {}
    for name in names:
        for first, rest in _splits(name):
            rests.setdefault(first, []).append(rest in others)
    return {first for first, among in rests.items() if sum(among) * 2 > len(among)}


def _splits(name: str) -> list[tuple[str, str]]:
    """Where a name may be parted into a base model's prefix, of up to three parts, and the rest."""
    parts = name.split(".")
    return [(".".join(parts[:i]), ".".join(parts[i:])) for i in range(1, min(4, len(parts)))]


def _renamed(name: str) -> str:
    """Norms of old checkpoints have a gamma and a beta."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{_OLD_NORMS[last]}" if stem.endswith("Norm") and last in _OLD_NORMS else name


def _under(match: Match) -> str:
    return f"as {match.stored}" if match.stored not in ("", match.parameter) else ""


def some_of(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
