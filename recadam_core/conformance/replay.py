"""Replaying recorded gradients: the same numbers in, and how far apart the trajectories come out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..annealing import Annealing, Constant, Linear, Sigmoid
from ..arrays import NumpyArray
from ..backends import Backend, Specification
from ..errors import RecAdamError, shown, unknown
from ..hyperparameters import Hyperparameters
from ..optimizer import Functional, stepper_of
from ..update import Moments

__all__ = [
    "Deviation",
    "Frame",
    "Group",
    "Recording",
    "load_recording",
    "replay",
    "to_bfloat16",
    "trajectories",
    "trajectory_deviation",
    "walk",
]


@dataclass(frozen=True)
class Group:
    """Arrays that share their settings, with the gradients they were fed.

    Args:
        hp: the settings.
        theta0: starting value by name.
        anchors: pretrained value by name; lacks new heads.
        grads: gradients by name, of shape (steps, ...).
        expected: weights after each step by name, of shape (steps, ...); None when not recorded.
        layouts: layouts of parameter, gradient and anchor by name; contiguous where there is none.
        importance: importance by name, laid out as the anchor; empty where pulls are not weighed.

    Example:
        >>> from recadam_core.conformance import Case
        >>> sorted(Case(steps=2).recording().groups[0].theta0)
        ['head', 'matrix', 'scalar', 'vector']
    """

    hp: Hyperparameters
    theta0: dict[str, NumpyArray]
    anchors: dict[str, NumpyArray]
    grads: dict[str, NumpyArray]
    expected: dict[str, NumpyArray] | None = None
    layouts: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    importance: Mapping[str, NumpyArray] = field(default_factory=dict)


@dataclass(frozen=True)
class Recording:
    """Starting weights, gradients and learning rates of a run.

    Args:
        name: what to call it in tables.
        dtype: the weights' dtype.
        lr: learning rate of each step, of shape (steps,).
        groups: the arrays.

    Example:
        >>> from recadam_core.conformance import Case
        >>> Case(steps=2).recording().lr.shape
        (2,)
    """

    name: str
    dtype: str
    lr: NumpyArray
    groups: tuple[Group, ...]


class Deviation(NamedTuple):
    """The largest deviation of one trajectory from another."""

    share: float  # Euclidean distance between the two / distance travelled so far, at the worst step
    step: int  # that step, from 1
    name: str  # that array


def load_recording(path: str | Path) -> Recording:
    """A golden trajectory of the released optimizer, with the weights it reached.

    Args:
        path: an .npz file; tests/golden/README.md says what is in it.

    Returns:
        The recording, in form `released`, with `expected` weights.

    Raises:
        RecAdamError: when the file is missing or damaged.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {key: file[key] for key in file.files}
        meta = json.loads(str(data["meta"]))
    except FileNotFoundError:
        raise RecAdamError(f"{path}: no such file; give a golden .npz file") from None
    except Exception as error:
        raise RecAdamError(f"{path}: damaged golden file ({error}); fetch it again") from error

    def annealing(weight: float) -> Annealing:
        if meta["anneal_fun"] == "sigmoid":
            return Sigmoid(meta["anneal_k"], meta["anneal_t0"], weight)
        if meta["anneal_fun"] == "linear":
            return Linear(meta["anneal_t0"], weight)
        if meta["anneal_fun"] != "constant":
            raise unknown("anneal_fun", meta["anneal_fun"], ("sigmoid", "linear", "constant"))
        # The released optimizer's pull is (weight - lambda): none at all when lambda is constant.
        return Constant(task=weight, recall=0.0)

    try:
        _check_numbers("lr", data["lr"], (len(data["lr"]) or 1,))
        groups = []
        for i, group in enumerate(meta["groups"]):
            hp = Hyperparameters(
                lr=float(data["lr"].max()),
                betas=tuple(meta["betas"]),
                eps=meta["eps"],
                weight_decay=group["weight_decay"],
                gamma=meta["pretrain_cof"],
                annealing=annealing(group["anneal_w"] or 1.0),
                bias_correction=meta["correct_bias"],
                form="released",
            )
            name = f"group{i}"
            anchors = {name: data[f"anchor_{i}"]} if group["anchored"] else {}
            theta0, grads, expected = ({name: data[f"{key}_{i}"]} for key in ("theta0", "grad", "theta"))
            shape = theta0[name].shape
            for key in ("theta0", "anchor", "grad", "theta"):
                of_steps = data["lr"].shape if key in ("grad", "theta") else ()
                _check_numbers(f"{key}_{i}", data[f"{key}_{i}"], (*of_steps, *shape))
            groups.append(Group(hp, theta0, anchors, grads, expected))
        if not groups or meta["dtype"] not in ("float64", "float32"):
            raise RecAdamError(f"{len(groups)} groups of dtype {shown(meta['dtype'])}")
        return Recording(meta["name"], meta["dtype"], data["lr"], tuple(groups))
    except RecAdamError as error:
        raise RecAdamError(f"{path}: damaged golden file ({error}); fetch it again") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise RecAdamError(f"{path}: damaged golden file (it lacks {error}); fetch it again") from error


def _check_numbers(name: str, x: NumpyArray, shape: tuple[int, ...]) -> None:
    """Raise unless an array has floating numbers, and is of that shape."""
    if x.dtype.kind != "f" or x.shape != shape:
        raise RecAdamError(f"{name} is {x.dtype} {x.shape}, where floating numbers {shape} belong")


class Frame(NamedTuple):
    """One step of a walk, in NumPy."""

    group: int  # index of the recording's group
    t: int  # the step, from 1; 0 before the first
    lr: float  # this step's learning rate
    grads: dict[str, NumpyArray]  # gradients by name
    params: dict[str, NumpyArray]  # parameters after the step by name
    moments: dict[str, Moments]  # the same of the moments


def walk(
    recording: Recording,
    backend: Backend | None = None,
    variant: str = "",
    exact: bool = False,
    moments: bool = False,
) -> Iterator[Frame]:
    """Feed a recording's gradients to a backend, step by step.

    Args:
        recording: what to feed.
        backend: the backend; None walks the specification itself, in NumPy.
        variant: one of the backend's variants; empty for its first.
        exact: whether the backend is to be in its exact setting.
        moments: whether the frames hold moments; reading them takes time.

    Yields:
        For each group a frame of where it starts, and one a step.

    Raises:
        RecAdamError: when the backend has no such variant.

    Example:
        >>> from recadam_core.conformance import Case
        >>> [frame.t for frame in walk(Case(steps=2).recording())]
        [0, 1, 2]
    """
    backend = Specification(np) if backend is None else backend
    chosen = backend.capabilities.variant(variant) if variant else backend.capabilities.variants[0]
    # What overflows is part of some cases, and warnings of it are not.
    with backend.precision(recording.dtype), np.errstate(all="ignore"):
        for index, group in enumerate(recording.groups):

            def placed_as(
                role: int, arrays: Mapping[str, NumpyArray], group: Group = group
            ) -> dict[str, Any]:
                return {
                    name: place(backend, x, recording.dtype, group.layouts.get(name, ("", "", ""))[role])
                    for name, x in arrays.items()
                }

            params, anchors = placed_as(0, group.theta0), placed_as(2, group.anchors)
            if not all(map(backend.owns, params.values())):
                raise RecAdamError(f"backend {backend.name!r} does not own what it made itself; mend owns")
            importance = placed_as(2, group.importance) if group.importance else None
            stepper = stepper_of(backend, chosen, params, anchors, group.hp, exact, importance)
            kinds = {name: (x.dtype, tuple(x.shape)) for name, x in params.items()}
            for t in range(len(recording.lr) + 1):
                lr = float(recording.lr[t - 1]) if t else 0.0
                grads = {n: g[t - 1] for n, g in group.grads.items()} if t else {}
                if t:
                    placed, old = placed_as(1, grads), params
                    untouched = [("gradient", placed)] if t <= 2 else []
                    if untouched and isinstance(stepper, Functional):
                        untouched.append(("parameter", old))
                    before = [read(backend, arrays) for _, arrays in untouched]
                    params = stepper(placed, lr)
                    for (what, arrays), values in zip(untouched, before, strict=True):
                        remedy = " was changed by the step; copy before writing"
                        check_same(values, read(backend, arrays), f"step {t}: {what}", remedy)
                for name, x in params.items():
                    if (x.dtype, tuple(x.shape)) != kinds[name]:
                        raise RecAdamError(
                            f"step {t}: {name!r} came back as {x.dtype} of shape {tuple(x.shape)}, not "
                            f"{kinds[name][0]} of {kinds[name][1]}; round the sum to the parameter's dtype"
                        )
                states = stepper.moments() if moments else {}
                for name, state in states.items():
                    _check_moments(backend, name, recording.dtype, state)
                yield Frame(
                    index,
                    t,
                    lr,
                    grads,
                    {n: backend.to_numpy(x) for n, x in params.items()},
                    {n: Moments(*map(backend.to_numpy, state)) for n, state in states.items()},
                )


def read(backend: Backend, arrays: Mapping[str, Any]) -> dict[str, NumpyArray]:
    """Arrays in NumPy, in memory of their own whatever `to_numpy` does."""
    return {name: np.array(backend.to_numpy(x), copy=True) for name, x in arrays.items()}


def check_same(before: dict[str, NumpyArray], after: dict[str, NumpyArray], what: str, remedy: str) -> None:
    """Raise unless arrays are the same, naming the first that is not."""
    for name, x in before.items():
        if not np.array_equal(x, after[name], equal_nan=True):
            raise RecAdamError(f"{what} {name!r}{remedy}")


def _check_moments(backend: Backend, name: str, dtype: str, state: Moments) -> None:
    wanted = dtype if dtype in ("float64", "float32") else "float32"
    for letter, x in zip("mv", state, strict=True):
        if (told := backend.to_numpy(x).dtype.name) != wanted:
            raise RecAdamError(f"{letter} of {name!r} is {told}; keep the moments of {dtype} in {wanted}")


def place(backend: Backend, x: NumpyArray, dtype: str, layout: str) -> Any:
    """The array in a backend's library, laid out in memory as asked."""
    if layout == "transposed":
        return backend.from_numpy(np.ascontiguousarray(x.T), dtype).T
    if layout == "strided":
        return backend.from_numpy(np.repeat(x, 2, axis=-1), dtype)[..., ::2]
    return backend.from_numpy(x, dtype)


def replay(
    recording: Recording, backend: Backend | None = None, variant: str = ""
) -> list[dict[str, NumpyArray]]:
    """The trajectory of one group after another under a backend.

    Args:
        recording: what to replay.
        backend: the backend; None replays the specification itself, in NumPy.
        variant: one of the backend's variants; empty for its first.

    Returns:
        For each group the weights after each step by name, of shape (steps, ...), in NumPy.

    Raises:
        RecAdamError: when the backend has no such variant.

    Example:
        >>> from recadam_core.conformance import Case
        >>> replay(Case(steps=3).recording())[0]["head"].shape
        (3, 5, 2)
    """
    return trajectories(walk(recording, backend, variant))


def trajectories(frames: Iterable[Frame]) -> list[dict[str, NumpyArray]]:
    """The frames of a walk as `replay` returns them.

    Example:
        >>> from recadam_core.conformance import Case
        >>> trajectories(walk(Case(steps=3).recording()))[0]["vector"].shape
        (3, 40)
    """
    paths: list[dict[str, list[NumpyArray]]] = []
    for frame in frames:
        if frame.t == 0:
            paths.append({name: [] for name in frame.params})
            continue
        for name, x in frame.params.items():
            paths[frame.group][name].append(x)
    return [{name: np.stack(steps) for name, steps in path.items()} for path in paths]


def to_bfloat16(x: NumpyArray) -> NumpyArray:
    """The nearest bfloat16 numbers, ties to even, held in float32, since NumPy has no such dtype.

    Example:
        >>> to_bfloat16(np.array([1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8]))
        array([1.      , 1.015625], dtype=float32)
    """
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def trajectory_deviation(
    recording: Recording,
    ours: Sequence[dict[str, NumpyArray]],
    theirs: Sequence[dict[str, NumpyArray]] | None = None,
) -> Deviation:
    r"""How far a trajectory lies from another, as a share of the distance travelled.

    Math:
        $\max_{t,\,\text{array}} \|\theta_t - \theta'_t\| \,/\, \max_{s \le t} \|\theta'_s - \theta_0\|$

    Args:
        recording: what was replayed.
        ours: the trajectory to judge, as `replay` returns it.
        theirs: the one to hold it against; None for the recorded weights.

    Returns:
        The worst share, where it is.

    Raises:
        RecAdamError: when there are no recorded weights to compare with.

    Example:
        >>> from recadam_core.conformance import Case
        >>> r = Case(steps=3).recording()
        >>> trajectory_deviation(r, replay(r), replay(r)).share
        0.0
    """
    worst = Deviation(0.0, 1, "")
    for index, group in enumerate(recording.groups):
        reference = group.expected if theirs is None else theirs[index]
        if reference is None:
            raise RecAdamError(f"{recording.name}: no recorded weights; give a trajectory to compare with")
        for name, path in reference.items():
            axes = tuple(range(1, path.ndim))
            exact, got, start = (x.astype(np.float64) for x in (path, ours[index][name], group.theta0[name]))
            with np.errstate(divide="ignore", invalid="ignore"):
                # Where both overflowed alike there is no gap, and where one did, an infinite one.
                apart = np.where((got == exact) | (np.isnan(got) & np.isnan(exact)), 0.0, got - exact)
                way = np.where(np.isfinite(exact), exact - start, 0.0)
                gap = np.sqrt(np.square(apart).sum(axis=axes))
                # The furthest so far: an array that comes back to its start has still travelled.
                travelled = np.maximum.accumulate(np.sqrt(np.square(way).sum(axis=axes)))
                share = np.where(gap == 0, 0.0, gap / travelled)
            share = np.where(np.isnan(share), np.inf, share)
            t = int(np.argmax(share))
            if share[t] > worst.share:
                worst = Deviation(float(share[t]), t + 1, name)
    return worst
