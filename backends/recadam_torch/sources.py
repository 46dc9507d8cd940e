"""Where pretrained values are read from: tensors in memory, or files, each tensor when it is asked for."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recadam_core import RecAdamError

__all__ = ["Files", "Source", "Tensors", "open_source"]

Where = tuple[slice, ...]


class Tensors:
    """Tensors in memory, as a state dict has them.

    Args:
        tensors: by name.
        path: the file they were loaded from; empty when there is none.

    Example:
        >>> Tensors({"w": torch.arange(3)}).read("w", (slice(1, 2),))
        tensor([1])
    """

    mapped = False

    def __init__(self, tensors: Mapping[str, Tensor], path: str = "") -> None:
        self.path = path
        self._tensors = {name: x.detach() for name, x in tensors.items() if isinstance(x, Tensor)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return tuple(self._tensors[name].shape)

    def floating(self, name: str) -> bool:
        """Whether it holds real floating numbers."""
        return self._tensors[name].is_floating_point()

    def read(self, name: str, where: Where) -> Tensor:
        """A part of a tensor, in its own memory."""
        return self._tensors[name][where]


class Files:
    """Tensors in .safetensors files: mapped into memory, and read when they are asked for.

    Args:
        files: the file of each tensor by name.
        path: what the user named: the file, the index or the folder.
    """

    mapped = True

    def __init__(self, files: Mapping[str, Path], path: str) -> None:
        self.path, self._files = path, {name: file.resolve() for name, file in files.items()}
        self._open: dict[Path, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def floating(self, name: str) -> bool:
        """Whether it holds real floating numbers."""
        kind: str = self._file(name).get_slice(name).get_dtype()
        return kind.startswith(("F", "BF"))

    def read(self, name: str, where: Where) -> Tensor:
        """A part of a tensor: the file's own pages where it is contiguous there."""
        file = self._file(name)
        whole = all(s.start == 0 and s.stop == n for s, n in zip(where, self.shape(name), strict=True))
        tensor: Tensor = file.get_tensor(name) if whole else file.get_slice(name)[where]
        return tensor

    def _file(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = _open_safetensors(path)
        return self._open[path]


Source = Tensors | Files


def open_source(given: str | Path | Mapping[str, Tensor] | torch.nn.Module) -> Source:
    """The source that is meant by a path, a state dict or a model.

    Args:
        given: a `.safetensors` file, its index (`.safetensors.index.json`), a checkpoint of `torch.save`
            (`.bin`, `.pt`, `.pth`), a folder with one of these as Hugging Face names them, the name of a
            repository on the Hugging Face hub ("org/model"), a state dict, or a model.

    Returns:
        The source. Of files only headers are read.

    Raises:
        RecAdamError: when there is no such file, it is damaged, or it holds no tensors.

    Example:
        >>> list(open_source(torch.nn.Linear(2, 1)))
        ['weight', 'bias']
    """
    if isinstance(given, torch.nn.Module):
        given = dict(given.named_parameters(remove_duplicate=False))
    if isinstance(given, Mapping):
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
)
"""What a checkpoint's file is called in a folder, the first that is there."""

SUFFIXES = (".safetensors", ".json", ".bin", ".pt", ".pth")
"""How the names of files end; a repository on the hub is called otherwise."""


def _found(given: str | Path) -> Path:
    path = Path(given)
    if path.is_dir():
        for name in NAMES:
            if (path / name).exists():
                return path / name
        raise RecAdamError(
            f"anchors: {path} has no {NAMES[0]} or {NAMES[3]}; give a checkpoint's folder or file"
        )
    if path.exists():
        return path
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
        try:
            weights = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            files = {name: path.parent / file for name, file in weights.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecAdamError(f"anchors: {path}: damaged index ({error!r}); fetch it again") from error
        for missing in sorted({file for file in files.values() if not file.exists()}):
            raise RecAdamError(f"anchors: {path} names {missing.name}, which is not there; fetch it")
        if path.name.endswith(".safetensors.index.json"):
            return Files(files, str(path.resolve()))
        tensors: dict[str, Tensor] = {}
        for file in sorted(set(files.values())):
            tensors.update(_load_torch(file))
        return Tensors(tensors, str(path.resolve()))
    if path.suffix == ".safetensors":
        return Files(dict.fromkeys(_open_safetensors(path).keys(), path), str(path.resolve()))
    return Tensors(_load_torch(path), str(path.resolve()))


def _open_safetensors(path: Path) -> Any:
    try:
        from safetensors import safe_open
    except ModuleNotFoundError:
        raise RecAdamError(
            f"anchors: {path} needs 'safetensors'; pip install 'recadam-core[torch]'"
        ) from None
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        raise RecAdamError(f"anchors: {path}: damaged ({error}); fetch it again") from error


def _load_torch(path: Path) -> dict[str, Tensor]:
    try:
        mapped = zipfile.is_zipfile(path)  # files of torch before 1.6 are none
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecAdamError(
            f"anchors: {path}: no checkpoint of torch.save that holds tensors only ({reason}); give one"
        ) from error
    if not isinstance(loaded, Mapping):
        raise RecAdamError(f"anchors: {path} holds a {type(loaded).__name__}; give a state dict's file")
    return {name: x for name, x in loaded.items() if isinstance(x, Tensor)}
