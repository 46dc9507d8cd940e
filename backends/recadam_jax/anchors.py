"""Anchors from checkpoints, and states without them once the annealing is over."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np

from recadam_core import Annealing, RecAdamError, release_step
from recadam_core.errors import shown

from .placement import place
from .state import AnchorPullState, RecAdamState, Released
from .trees import Parameters, paths

__all__ = ["load_anchor", "release"]

OURS = RecAdamState, AnchorPullState


def load_anchor(
    source: str | Path,
    params: Any,
    name: Callable[[str], str | None] | None = None,
    new: Iterable[str] = (),
    transpose: Callable[[str], bool] | None = None,
) -> Any:
    """The anchors that a checkpoint holds for a tree of parameters.

    Of a `.safetensors` file each device gets its own part, read when it is asked for; an orbax checkpoint is
    restored into the parameters' shardings.

    Args:
        source: a `.safetensors` file, its index (`.safetensors.index.json`), or an orbax checkpoint's folder
            whose tree has the parameters' paths.
        params: the parameters, of arrays or `jax.ShapeDtypeStruct`; they say shapes, and shardings where they
            are committed to one.
        name: from a parameter's path, as `encoder/layer_3/kernel`, to the tensor's name in the file; None
            where there is none. By default the path itself, or with dots for slashes.
        new: paths of new heads, which need no anchor; a path stands for all below it.
        transpose: of a parameter's path, whether a `.safetensors` file holds it with its axes in reverse
            order, as PyTorch's linear layers are to kernels here.

    Returns:
        A tree like the parameters, with None for new heads, in the checkpoint's dtypes: `recadam`'s `anchor`.

    Raises:
        RecAdamError: when there is no such checkpoint, it is damaged, it has another shape for a parameter,
            or none that is not in `new`; when a path in `new` is none of the parameters'.

    Example:
        >>> import tempfile
        >>> from safetensors.numpy import save_file
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_file({"dense.kernel": np.ones(2, np.float32)}, path)
        >>> anchor = load_anchor(path, {"dense": {"kernel": np.zeros(2)}, "head": np.zeros(3)}, new=["head"])
        >>> anchor["head"] is None, anchor["dense"]["kernel"].tolist()
        (True, [1.0, 1.0])
    """
    ours = Parameters(params)
    heads = [new] if isinstance(new, str) else list(new) if isinstance(new, Iterable) else [new]
    for path in heads:
        if not isinstance(path, str):
            raise RecAdamError(f"anchors: new is {shown(new)}; give paths of parameters, as ['head']")
        if not any(_below(x, [path]) for x in ours.paths):
            raise RecAdamError(
                f"anchors: new names {path!r}, which is no parameter{_nearest(path, ours.paths)}; give a path"
            )
    for what, function in (("name", name), ("transpose", transpose)):
        if not (function is None or callable(function)):
            raise RecAdamError(f"anchors: {what} is {shown(function)}; give a function of a path")
    if not (isinstance(source, (str, PathLike)) and str(source) and "\0" not in str(source)):
        raise RecAdamError(f"anchors: {shown(source)} is no path; give the pretrained checkpoint's")
    file = Path(source).absolute()  # by the name that was given, since a cache of files names them by links
    try:
        there = file.is_dir() or file.is_file()  # and no pipe, which would wait
    except OSError as error:  # a name that is too long
        raise RecAdamError(f"anchors: {shown(str(file))}: {error.strerror}; give another path") from None
    if not there:
        raise RecAdamError(f"anchors: {file}: no such file or folder; give the pretrained checkpoint")
    if file.is_dir() and transpose is not None:
        raise RecAdamError(f"anchors: {file}: transpose is for .safetensors files; leave it out")
    wanted = {x: leaf for x, leaf in ours.each() if not _below(x, heads)}
    names = {x: name(x) for x in wanted} if name else {}
    turned = {x for x in wanted if transpose and transpose(x)}
    try:
        anchors = (_orbax if file.is_dir() else _safetensors)(file, wanted, names, turned)
    except (RecAdamError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a reader raises on a damaged file
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecAdamError(f"anchors: {file}: cannot be read ({told}); fetch it again") from error
    return ours.unflatten([anchors.get(x) for x in ours.paths])


def release(state: Any, annealing: Annealing) -> Any:
    """The state without its anchors, for the second phase of a run: after the annealing nothing reads them.

    The steps after it have the same bits as with the anchors. A compiled step is compiled once more, since
    the state has another structure.

    Args:
        state: of a transformation with `recadam` or `add_anchor_pull` in it, anywhere.
        annealing: its annealing, which says when the recall weight is zero for good.

    Returns:
        A state of the same kind with `Released()` in place of each anchor, and without importances; new heads
        have None as before. An abstract state (of `jax.eval_shape`, to restore a checkpoint into) is
        released whatever its count.

    Raises:
        RecAdamError: when the anchors will be read again, naming the step from which they are not; when there
            is no state of theirs.

    Example:
        >>> import jax.numpy as jnp
        >>> from recadam_core import Linear
        >>> from recadam_jax import recadam
        >>> tx, params = recadam(1e-3, gamma=100.0, annealing=Linear(t0=1)), jnp.ones(2)
        >>> release(tx.init(params), Linear(t0=1)).anchor
        Released()
    """
    last = release_step(annealing)
    seen = 0

    def without(part: Any) -> Any:
        nonlocal seen
        if not isinstance(part, OURS):
            return part
        seen += 1
        if last is None:
            raise RecAdamError(f"release: {annealing!r} never ends; its anchors are read in every step")
        if isinstance(part.count, jax.core.Tracer):
            raise RecAdamError(
                "release: the count is traced; release outside of jit, where it can be checked"
            )
        if not isinstance(part.count, jax.ShapeDtypeStruct):
            t = int(np.min(np.asarray(part.count))) + 1  # after vmap there is a count for each member
            if t < last:
                raise RecAdamError(
                    f"release: step {t} still reads the anchors; release them before step {last}, no earlier"
                )
        return part._replace(anchor=jax.tree.map(lambda _: Released(), part.anchor), importance=None)

    released = jax.tree.map(without, state, is_leaf=lambda x: isinstance(x, OURS))
    if not seen:
        raise RecAdamError("release: this state has no part of recadam; give the optimizer's state")
    return released


def _below(path: str, roots: Any) -> bool:
    return any(f"{path}/".startswith(f"{root}/") for root in roots)


def _nearest(name: str | None, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (there is {near[0]!r})" if near else ""


def _match(
    path: Path, ours: str, leaf: Any, choices: list[Any], shapes: dict[str, Any], turned: bool = False
) -> str:
    """The tensor of a parameter: the first of its names that is there, if it has the shape."""
    theirs: str | None = next((x for x in choices if x in shapes), None)
    if theirs is None:
        raise RecAdamError(
            f"anchors: {path} has no {choices[-1]!r} for parameter {ours!r}{_nearest(choices[-1], shapes)}; "
            "give name=, or list it in new="
        )
    shape = shapes[theirs][::-1] if turned else shapes[theirs]
    if shape != tuple(np.shape(leaf)):
        raise RecAdamError(
            f"anchors: {path}: {theirs!r} has shape {shape}, parameter {ours!r} {tuple(np.shape(leaf))}; "
            "give the pretrained checkpoint of this model, or list it in new="
        )
    return theirs


def _safetensors(
    path: Path, wanted: dict[str, Any], names: dict[str, Any], turned: set[str]
) -> dict[str, Any]:
    files, anchors = _files(path), {}
    pieces = {x: file.get_slice(x) for x, file in files.items()}
    shapes = {x: tuple(piece.get_shape()) for x, piece in pieces.items()}
    for ours, leaf in wanted.items():
        choices = [names[ours]] if names else [ours, ours.replace("/", ".")]
        is_turned = ours in turned
        theirs = _match(path, ours, leaf, choices, shapes, is_turned)
        shape, sharding = tuple(np.shape(leaf)), place(leaf)
        if sharding is None or 0 in shape or not shape:
            whole = files[theirs].get_tensor(theirs)
            anchors[ours] = whole.T if is_turned else whole
        else:
            anchors[ours] = jax.make_array_from_callback(shape, sharding, _reader(pieces[theirs], is_turned))
    return anchors


def _reader(piece: Any, turned: bool) -> Callable[[Any], Any]:
    """Reads the part of a tensor that a device is to hold."""
    return lambda where: np.asarray(piece[where[::-1]]).T if turned else np.asarray(piece[where])


def _files(path: Path) -> dict[str, Any]:
    """The open file of each tensor."""
    if path.name.endswith(".index.json"):
        try:
            weights = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weights.values()))
            outside = [shown(x) for x in names if Path(x).is_absolute() or ".." in Path(x).parts]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RecAdamError(f"anchors: {path}: damaged index ({error!r}); fetch it again") from error
        if outside:
            raise RecAdamError(
                f"anchors: {path}: damaged index ({outside[0]} is outside of its folder); fetch it again"
            )
        shards = {name: _open(path.parent / name) for name in names}
        for name, file in shards.items():
            lacking = {x for x, shard in weights.items() if shard == name} - set(file.keys())
            if lacking:
                raise RecAdamError(
                    f"anchors: {path.parent / name} lacks {min(lacking)!r}, which {path.name} says is there; "
                    "fetch it again"
                )
        return {tensor: shards[shard] for tensor, shard in weights.items()}
    file = _open(path)
    return dict.fromkeys(file.keys(), file)


def _open(path: Path) -> Any:
    try:
        from safetensors import safe_open
    except ModuleNotFoundError:
        raise RecAdamError(f"anchors: {path} needs 'safetensors'; pip install safetensors") from None
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        return safe_open(path, framework="numpy")
    except Exception as error:
        raise RecAdamError(f"anchors: {path}: damaged, or not there ({error}); fetch it again") from error


def _orbax(path: Path, wanted: dict[str, Any], names: dict[str, Any], _: set[str]) -> dict[str, Any]:
    try:
        import orbax.checkpoint as ocp
    except ModuleNotFoundError:
        raise RecAdamError(f"anchors: {path} needs 'orbax-checkpoint'; pip install it") from None
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        if metadata is None:
            raise RecAdamError(f"anchors: {path}: no checkpoint of orbax; give the folder of one step's item")
        keys, stored = _names(metadata.tree), jax.tree.leaves(metadata.tree)
        shapes = {x: tuple(leaf.shape) for x, leaf in zip(keys, stored, strict=True)}
        sources, places = {}, {}
        for ours, leaf in wanted.items():
            sources[ours] = theirs = _match(path, ours, leaf, [names.get(ours, ours)], shapes)
            places[theirs] = place(leaf)
        whole = ocp.RestoreArgs(restore_type=np.ndarray)
        arguments = [ocp.ArrayRestoreArgs(sharding=places[x]) if places.get(x) else whole for x in keys]
        items = [x if key in places else ... for key, x in zip(keys, stored, strict=True)]
        tree: Any = jax.tree.structure(metadata.tree)
        asked = ocp.args.PyTreeRestore(tree.unflatten(items), tree.unflatten(arguments), partial_restore=True)
        restored = checkpointer.restore(path, args=asked)
    values = dict(zip(_names(restored), jax.tree.leaves(restored), strict=True))
    return {ours: values[theirs] for ours, theirs in sources.items()}


def _names(tree: Any) -> list[str]:
    """Paths in a checkpoint, in which the variables of flax.nnx are dicts of one value."""
    names = paths(tree)
    wrapped = all(x.endswith("/value") for x in names)
    return [x.removesuffix("/value") for x in names] if wrapped else names
