"""Where pretrained values are read from: tensors in memory, or files, each tensor when it is asked for."""

from __future__ import annotations

import json
import os
import re
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from recadam_core import RecAdamError
from recadam_core.errors import shown

from .shards import is_wrapper, local

__all__ = ["Files", "Mapped", "Source", "Tensors", "is_wide", "mapped_files", "open_source"]

Where = tuple[slice, ...]

WIDE = ("F16", "BF16", "F32", "F64")
"""What safetensors calls the dtypes that weights are kept in: 8 bits and less come with scales."""


def is_wide(x: Tensor) -> bool:
    """Whether a tensor holds real floating numbers of 16 bits or more."""
    return x.is_floating_point() and x.dtype.itemsize > 1


class Mapped:
    """A file that is mapped into memory: where it is cut short, reading its pages ends the process."""

    def __init__(self, path: Path) -> None:
        self._path, self._handle = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)
        self._was = self._now()

    def _now(self) -> tuple[int, int]:
        stat = os.fstat(self._handle)
        return stat.st_size, stat.st_mtime_ns

    def intact(self) -> bool:
        """Whether nobody has written to it since."""
        return self._now() == self._was

    def check(self) -> None:
        """Raise when somebody has written to it since."""
        if not self.intact():
            raise RecAdamError(
                f"anchors: {self._path} was written to while it was mapped; restore it and make the anchors "
                "again, and replace such a file by renaming another onto it"
            )


_MAPPED: Any = WeakTensorKeyDictionary()


def mapped_files(anchors: Iterable[Tensor]) -> set[Mapped]:
    """The files whose pages these anchors are."""
    return {_MAPPED[x] for x in anchors if x in _MAPPED}


class Tensors:
    """Tensors in memory, as a state dict has them."""

    mapped = False

    def __init__(self, tensors: Mapping[str, Tensor], path: str = "", files: Iterable[Mapped] = ()) -> None:
        self.path, self._files = path, list(files)
        self._tensors = {name: x.detach() for name, x in tensors.items() if isinstance(x, Tensor)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": []}  # copies are in memory

    def part_from(self, params: Iterable[Tensor]) -> None:
        """Copy what shares memory with parameters, which training will overwrite."""
        theirs = set(map(_storage, params)) - {0}
        self._tensors = {n: x.clone() if _storage(x) in theirs else x for n, x in self._tensors.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return tuple(self._tensors[name].shape)

    def unfit(self, name: str) -> str:
        """What keeps it from being an anchor; empty when nothing does."""
        x = self._tensors[name]
        if not is_wide(x):
            return _of_dtype(str(x.dtype).removeprefix("torch."))
        if x.is_meta:
            return "has no data in the source"
        return "" if x.layout == torch.strided else "is sparse in the source"

    def read(self, name: str, where: Where) -> Tensor:
        """A part of a tensor, in its own memory."""
        for file in self._files:
            file.check()
        return self._tensors[name][where]


def _storage(x: Tensor) -> int:
    """The address of a tensor's memory; 0 where it has none of its own."""
    return 0 if is_wrapper(x) or x.layout != torch.strided else local(x).untyped_storage().data_ptr()


class Files:
    """Tensors in .safetensors files: mapped into memory, and read when they are asked for."""

    mapped = True

    def __init__(self, files: Mapping[str, Path], path: str) -> None:
        self.path, self._files = path, {name: file.resolve() for name, file in files.items()}
        self._open: dict[Path, tuple[Any, Mapped]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        return tuple(self._file(name)[0].get_slice(name).get_shape())

    def unfit(self, name: str) -> str:
        """What keeps it from being an anchor; empty when nothing does."""
        kind: str = self._file(name)[0].get_slice(name).get_dtype()
        return "" if kind in WIDE else _of_dtype(kind)

    def read(self, name: str, where: Where) -> Tensor:
        """A part of a tensor: the file's own pages where it is contiguous there."""
        file, mapped = self._file(name)
        mapped.check()
        whole = all(s.start == 0 and s.stop == n for s, n in zip(where, self.shape(name), strict=True))
        tensor: Tensor = file.get_tensor(name) if whole else file.get_slice(name)[where]
        return tensor

    def keep(self, name: str, anchor: Tensor) -> None:
        """Remember that an anchor is this tensor's pages: `mapped_files` tells."""
        _MAPPED[anchor] = self._file(name)[1]

    def _file(self, name: str) -> tuple[Any, Mapped]:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = _open_safetensors(path)
        return self._open[path]


Source = Tensors | Files


def _of_dtype(name: str) -> str:
    return f"is {name} in the source, no floating numbers of 16 bits or more"


def open_source(given: str | Path | Mapping[str, Tensor] | torch.nn.Module) -> Source:
    """The source that is meant by a path, a state dict or a model."""
    if isinstance(given, torch.nn.Module):
        given = dict(given.named_parameters(remove_duplicate=False))
    if isinstance(given, Mapping):
        if (other := next((name for name in given if not isinstance(name, str)), "")) != "":
            raise RecAdamError(f"anchors: a name in the state dict is {shown(other)}; give text")
        source: Source = Tensors(given)
    elif isinstance(given, (str, Path)):
        source = _open_path(_found(given))
    else:
        raise RecAdamError(f"anchors: {type(given).__name__}; give a path, a state dict or a model")
    if not any(True for _ in source):
        raise RecAdamError(f"anchors: {source.path or 'the state dict'} holds no tensors; give the weights")
    return source


NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
)
"""What a checkpoint's file is called in a folder, the first that is there."""

SUFFIXES = (".safetensors", ".json", ".bin", ".pt", ".pth")
"""How the names of files end; a repository on the hub is called otherwise."""


def _found(given: str | Path) -> Path:
    if given == "":
        raise RecAdamError("anchors: the path is empty; give the pretrained checkpoint")
    path = Path(given)
    try:
        if path.is_dir():
            for name in NAMES:
                if (path / name).is_file():
                    return path / name
            raise RecAdamError(
                f"anchors: {path} has no {NAMES[0]} or {NAMES[3]}; give a checkpoint's folder or file"
            )
        if path.is_file():
            return path
        if path.exists():  # a pipe would be waited for
            raise RecAdamError(f"anchors: {path} is no regular file; give the pretrained checkpoint")
    except OSError as error:
        raise RecAdamError(
            f"anchors: {shown(str(path))}: {error.strerror}; give the pretrained checkpoint"
        ) from error
    if isinstance(given, str) and re.fullmatch(r"\w[\w-]*/\w[\w.-]*", given) and path.suffix not in SUFFIXES:
        return _found(_from_hub(given))
    raise RecAdamError(f"anchors: {path}: no such file or folder; give the pretrained checkpoint")


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise RecAdamError(
            f"anchors: {name!r} is no path, and the hub needs 'huggingface_hub'; install it or give a path"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecAdamError(
            f"anchors: {name!r} is no path, nor to be had from the hub ({reason}); give a path"
        ) from error


def _open_path(path: Path) -> Source:
    if path.name.endswith(".index.json"):
        return _open_index(path)
    if path.suffix == ".safetensors":
        return Files(dict.fromkeys(_open_safetensors(path)[0].keys(), path), str(path.resolve()))
    mapped, tensors = _load_torch(path)
    return Tensors(tensors, str(path.resolve()), mapped)


def _open_index(path: Path) -> Source:
    """The tensors of a checkpoint in several files, each from the file that the index names."""
    try:
        weights = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        parts = {file: PurePath(file) for file in weights.values()}
        names = {file: [name for name, its in weights.items() if its == file] for file in parts}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecAdamError(f"anchors: {path}: damaged index ({error!r}); fetch it again") from error
    for file, part in parts.items():
        if not part.name or part.is_absolute() or ".." in part.parts:
            raise RecAdamError(f"anchors: {path} names {file!r}, which is not in its folder; fetch it again")
        if not (path.parent / part).is_file():
            raise RecAdamError(f"anchors: {path} names {file}, which is not there; fetch it")
    in_files = path.name.endswith(".safetensors.index.json")
    files: dict[str, Path] = {}
    tensors: dict[str, Tensor] = {}
    every: list[Mapped] = []
    for file in sorted(parts):
        if in_files:
            there: Any = set(_open_safetensors(path.parent / file)[0].keys())
        else:
            mapped, there = _load_torch(path.parent / file)
            every += mapped
        for name in names[file]:
            if name not in there:
                raise RecAdamError(
                    f"anchors: {path.parent / file} has no {name!r}, unlike {path.name}; fetch it"
                )
            files[name] = path.parent / file
            if not in_files:
                tensors[name] = there[name]
    whole = str(path.resolve())
    return Files(files, whole) if in_files else Tensors(tensors, whole, every)


def _open_safetensors(path: Path) -> tuple[Any, Mapped]:
    try:
        from safetensors import safe_open
    except ModuleNotFoundError:
        raise RecAdamError(
            f"anchors: {path} needs 'safetensors'; pip install 'recadam-core[torch]'"
        ) from None
    try:
        mapped = Mapped(path)
        return safe_open(path, framework="pt"), mapped
    except Exception as error:
        raise RecAdamError(f"anchors: {path}: damaged ({error}); fetch it again") from error


def _load_torch(path: Path) -> tuple[list[Mapped], dict[str, Tensor]]:
    """The tensors of a file of `torch.save`, and the file if they are mapped."""
    try:
        mapped = [Mapped(path)] if zipfile.is_zipfile(path) else []  # files of torch before 1.6 are none
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=bool(mapped))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecAdamError(
            f"anchors: {path}: no checkpoint of torch.save that holds tensors only ({reason}); give one"
        ) from error
    if not isinstance(loaded, Mapping):
        raise RecAdamError(f"anchors: {path} holds a {type(loaded).__name__}; give a state dict's file")
    return mapped, {name: x for name, x in loaded.items() if isinstance(x, Tensor)}
