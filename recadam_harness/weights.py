"""Arrays on disk: safetensors that say whose they are, and the weights of a run after a step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recadam_core.errors import RecAdamError

from .engines import Array
from .folders import Folder

__all__ = ["digest_of", "packed", "read_weights", "unpacked", "weights_name", "write_weights"]


def weights_name(step: int) -> str:
    """Where the weights after a step are."""
    return f"weights/{step:06d}.safetensors"


def write_weights(folder: Folder, step: int, weights: Mapping[str, Array]) -> None:
    """Write the weights after a step; the file says whose they are."""
    folder.write(weights_name(step), packed(weights, {"run": folder.identity, "step": str(step)}))


def read_weights(folder: Folder, step: int) -> dict[str, Array]:
    """The weights after a step, if they are what the run wrote."""
    name = weights_name(step)
    path = folder.path / name
    try:
        if folder.altered(name):
            raise ValueError("not what the run wrote: its sha256 is not the manifest's")
        arrays, about = unpacked(path)
        if (about.get("run"), about.get("step")) != (folder.identity, str(step)):
            raise ValueError(f"of another run, or of step {about.get('step')}")
        return arrays
    except (OSError, ValueError) as error:
        raise RecAdamError(f"{path}: damaged ({error}); run it again") from None


def digest_of(arrays: Mapping[str, Array], digest: Any) -> None:
    """Take arrays into a digest of hashlib, whatever their order."""
    for name in sorted(arrays):
        x = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {x.dtype.str} {x.shape} ".encode())
        digest.update(x.tobytes())


def packed(arrays: Mapping[str, Array], about: dict[str, str]) -> bytes:
    """The bytes of a file with these arrays and this metadata."""
    from safetensors.numpy import save

    # One entry: the order of several is drawn by chance, and equal runs have equal files.
    metadata = {"recadam": json.dumps(about, sort_keys=True)}
    return save({name: np.ascontiguousarray(x) for name, x in arrays.items()}, metadata)


def unpacked(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays and metadata of a file; ValueError for one that is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = dict(json.loads((file.metadata() or {}).get("recadam", "{}")))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from None  # an attribute: a dtype that NumPy lacks
