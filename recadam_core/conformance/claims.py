"""The claims that a backend is held to, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..annealing import Constant, Linear, Sigmoid
from ..backends import Backend
from ..errors import RecAdamError
from ..hyperparameters import FORMS
from .replay import Deviation, Recording, load_recording, record, replay, trajectory_deviation

__all__ = ["ANNEALINGS", "BOUNDS", "Result", "cases", "check_claims"]

ANNEALINGS = (
    Sigmoid(k=0.3, t0=20),
    Sigmoid(k=2.0, t0=5, weight=0.5),
    Linear(t0=40),
    Constant(1.0, 0.5),
    Constant(1.0, 0.0),
)
"""Annealings of the replayed cases."""

BOUNDS = {
    "replay float64": 1e-13,
    "replay float32": 1e-5,
    "golden float64": 1e-12,
    "golden float32": 1e-5,
}
"""Largest distance from the reference trajectory, as a share of the distance travelled."""


@dataclass(frozen=True)
class Result:
    """One claim about one variant of a backend, and the worst case found.

    Example:
        >>> Result("numpy", "functional", "replay float64", 15, 0.0, 1e-13, "").holds
        True
    """

    backend: str
    variant: str
    claim: str
    cases: int
    worst: float
    bound: float
    worst_case: str

    @property
    def holds(self) -> bool:
        """Whether the worst case is within the bound; NaN is not."""
        return self.worst <= self.bound


def cases(dtype: str) -> Iterable[Recording]:
    """Every form under every annealing of `ANNEALINGS`.

    Args:
        dtype: dtype of the weights.

    Returns:
        The recordings.

    Example:
        >>> len(list(cases("float64")))
        15
    """
    for form in FORMS:
        for annealing in ANNEALINGS:
            yield record(form, annealing, dtype)


def check_claims(
    backend: Backend,
    golden: Path | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> list[Result]:
    """Replay every case through every variant of a backend.

    Args:
        backend: the backend.
        golden: a folder of golden trajectories to replay too; None for none.
        progress: called with the share of the cases that is done, in percent, and the case's name.

    Returns:
        A result for each variant and claim.

    Raises:
        RecAdamError: when there is no golden trajectory in the folder.
    """
    recordings = [r for dtype in ("float64", "float32") for r in cases(dtype)]
    if golden is not None:
        paths = sorted(Path(golden).glob("*.npz"))
        if not paths:
            raise RecAdamError(f"{golden}: no .npz file there; give the folder of golden trajectories")
        recordings += [load_recording(path) for path in paths]
    claims: dict[tuple[str, str], list[tuple[Deviation, Recording]]] = {}
    for index, recording in enumerate(recordings):
        if progress:
            progress(100 * index // len(recordings), recording.name)
        recorded = recording.groups[0].expected is not None
        claim = f"{'golden' if recorded else 'replay'} {recording.dtype}"
        reference = None if recorded else replay(recording)
        for variant in backend.capabilities.variants:
            deviation = trajectory_deviation(recording, replay(recording, backend, variant), reference)
            claims.setdefault((variant, claim), []).append((deviation, recording))
    results = []
    for (variant, claim), found in sorted(claims.items()):
        worst, recording = max(found, key=lambda pair: pair[0].share)
        where = f"{recording.name}, {worst.name}, step {worst.step}" if worst.share else ""
        results.append(Result(backend.name, variant, claim, len(found), worst.share, BOUNDS[claim], where))
    return results
