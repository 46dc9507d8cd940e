"""Replaying recorded gradients: the same numbers in, and how far apart the trajectories come out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..annealing import Annealing, Constant, Linear, Sigmoid
from ..backends import Backend, Specification
from ..errors import RecAdamError, unknown
from ..hyperparameters import Hyperparameters

__all__ = [
    "Deviation",
    "Group",
    "Recording",
    "load_recording",
    "record",
    "replay",
    "trajectory_deviation",
]

Array = np.ndarray[Any, Any]
SHAPES = ((), (1,), (7, 5), (64, 33), (3, 4, 5))


@dataclass(frozen=True)
class Group:
    """Arrays that share their settings, with the gradients they were fed.

    Args:
        hp: the settings.
        theta0: starting value by name.
        anchors: pretrained value by name; lacks new heads.
        grads: gradients by name, of shape (steps, ...).
        expected: weights after each step by name, of shape (steps, ...); None when not recorded.

    Example:
        >>> sorted(record(steps=2).groups[0].theta0)[:2]
        ['head', 'w0']
    """

    hp: Hyperparameters
    theta0: dict[str, Array]
    anchors: dict[str, Array]
    grads: dict[str, Array]
    expected: dict[str, Array] | None = None


@dataclass(frozen=True)
class Recording:
    """Starting weights, gradients and learning rates of a run.

    Args:
        name: what to call it in tables.
        dtype: the weights' dtype.
        lr: learning rate of each step, of shape (steps,).
        groups: the arrays.

    Example:
        >>> record(steps=2).lr.shape
        (2,)
    """

    name: str
    dtype: str
    lr: Array
    groups: tuple[Group, ...]


class Deviation(NamedTuple):
    """The largest deviation of one trajectory from another.

    Example:
        >>> Deviation(0.0, 1, "w").step
        1
    """

    share: float  # Euclidean distance between the two / distance travelled so far, at the worst step
    step: int  # that step, from 1
    name: str  # that array


def record(
    form: str = "decoupled",
    annealing: Annealing | None = None,
    dtype: str = "float64",
    steps: int = 60,
    seed: int = 0,
    weight_decay: float = 0.01,
) -> Recording:
    """A recording of seeded gradients, some of them large, small, or exactly zero.

    Args:
        form: form of the update.
        annealing: the annealing; None for a sigmoid that is half-way at a third of the steps.
        dtype: dtype of weights and gradients.
        steps: number of steps.
        seed: seed of the generator.
        weight_decay: decoupled weight decay.

    Returns:
        Arrays of five shapes with anchors near their start, and a head without one; a learning rate
        that warms up and decays.

    Example:
        >>> record("proximal", steps=3).groups[0].hp.form
        'proximal'
    """
    rng = np.random.default_rng(seed)
    annealing = annealing or Sigmoid(k=0.3, t0=steps / 3)
    shapes = {f"w{i}": shape for i, shape in enumerate(SHAPES)} | {"head": (5, 2)}
    theta0 = {n: np.asarray(0.05 * rng.standard_normal(s)).astype(dtype) for n, s in shapes.items()}
    anchors = {
        n: np.asarray(t + 0.01 * rng.standard_normal(t.shape)).astype(dtype)
        for n, t in theta0.items()
        if n != "head"
    }
    grads = {}
    for name, shape in shapes.items():
        g = rng.standard_normal((steps, *shape)) * 10.0 ** rng.integers(-6, 3, size=(steps, *shape))
        grads[name] = np.where(rng.random(g.shape) < 0.05, 0.0, g).astype(dtype)
    t = np.arange(1, steps + 1)
    lr = 1e-3 * np.minimum(t / 5, 1.0) * (1.0 - 0.5 * t / steps)
    hp = Hyperparameters(lr=1e-3, gamma=300.0, weight_decay=weight_decay, annealing=annealing, form=form)
    name = f"{form}/{getattr(annealing, 'name', type(annealing).__name__)}/{dtype}"
    return Recording(name, dtype, lr, (Group(hp, theta0, anchors, grads),))


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
        # The released optimizer's pull is (weight - lambda): none at all when lambda is constant.
        return Constant(task=weight, recall=0.0)

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
        groups.append(Group(hp, theta0, anchors, grads, expected))
    return Recording(meta["name"], meta["dtype"], data["lr"], tuple(groups))


def replay(
    recording: Recording, backend: Backend | None = None, variant: str = "functional"
) -> list[dict[str, Array]]:
    """The trajectory of one group after another under a backend.

    Args:
        recording: what to replay.
        backend: the backend; None replays the specification itself, in NumPy.
        variant: one of the backend's variants.

    Returns:
        For each group the weights after each step by name, of shape (steps, ...), in NumPy.

    Raises:
        RecAdamError: when the backend has no such variant.

    Example:
        >>> replay(record(steps=3))[0]["head"].shape
        (3, 5, 2)
    """
    backend = Specification(np) if backend is None else backend
    if variant not in backend.capabilities.variants:
        raise unknown(f"variant of backend {backend.name!r}:", variant, backend.capabilities.variants)
    trajectories = []
    with backend.precision(recording.dtype):
        for group in recording.groups:
            # Copies, since an optimizer that steps in place may own what it is given.
            params = {n: backend.from_numpy(x) for n, x in group.theta0.items()}
            anchors = {n: backend.from_numpy(x) for n, x in group.anchors.items()}
            stepper = backend.stepper(variant, params, anchors, group.hp)
            path: dict[str, list[Array]] = {n: [] for n in params}
            for t, lr in enumerate(recording.lr):
                new = stepper({n: backend.from_numpy(g[t]) for n, g in group.grads.items()}, float(lr))
                for name in path:
                    path[name].append(backend.to_numpy(new[name]))
            trajectories.append({n: np.stack(steps) for n, steps in path.items()})
    return trajectories


def trajectory_deviation(
    recording: Recording,
    ours: Sequence[dict[str, Array]],
    theirs: Sequence[dict[str, Array]] | None = None,
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
        >>> r = record(steps=3)
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
            exact, start = path.astype(np.float64), group.theta0[name].astype(np.float64)
            gap = np.sqrt(np.square(ours[index][name] - exact).sum(axis=axes))
            # The furthest so far: an array that comes back to its start has still travelled.
            travelled = np.maximum.accumulate(np.sqrt(np.square(exact - start).sum(axis=axes)))
            with np.errstate(divide="ignore", invalid="ignore"):
                share = np.where(gap == 0, 0.0, gap / travelled)
            t = int(np.argmax(share))
            if not share[t] <= worst.share:
                worst = Deviation(float(share[t]), t + 1, name)
    return worst
