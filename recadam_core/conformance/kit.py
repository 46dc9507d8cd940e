"""The kit as a pytest class, for backends in repositories of their own.

from recadam_core.conformance.kit import BackendConformance

class TestMine(BackendConformance):
    backend = "mylib"
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from ..backends import get_backend, is_missing
from ..errors import RecAdamError
from .claims import LEVELS, Claim, Result
from .run import Job, certify, is_here, plan

__all__ = ["BackendConformance"]


class BackendConformance:
    """One test for each claim about each variant of a backend.

    A claim that the backend's capabilities list in `Variant.misses` is an expected failure with that
    reason; one that is listed and holds fails. What is not installed is skipped.

    Attributes:
        backend: name of the backend, as it is announced.
        variants: names of its variants; empty for all.
        levels: some of "exact" and "fast".
        kinds: kinds of claim; empty for all.
        cases: names of cases; empty for those of each claim.
        golden: folder of golden trajectories; None for none.

    Example:
        >>> class TestMine(BackendConformance):
        ...     backend = "numpy"
        ...     levels = ("exact",)
        >>> TestMine().jobs()[0].claims[0][1].name
        'exact float32'
    """

    backend: ClassVar[str] = ""
    variants: ClassVar[tuple[str, ...]] = ()
    levels: ClassVar[tuple[str, ...]] = LEVELS
    kinds: ClassVar[tuple[str, ...]] = ()
    cases: ClassVar[tuple[str, ...]] = ()
    golden: ClassVar[Path | None] = None

    def jobs(self) -> list[Job]:
        """What is to be shown."""
        backend = get_backend(self.backend)
        for name in ("variants", "levels", "kinds", "cases"):
            if isinstance(getattr(self, name), str):
                raise RecAdamError(f"{type(self).__name__}: {name} is a string; give a tuple of names")
        return plan(backend, self.variants, self.levels, self.kinds, self.cases, self.golden)

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Pytest's hook: a test a claim."""
        if {"job", "index"} <= set(metafunc.fixturenames):
            if is_missing(self.backend):
                import pytest

                absent = pytest.mark.skip(reason=f"could not import {self.backend!r}")
                metafunc.parametrize(("job", "index"), [pytest.param(None, 0, marks=absent)], ids=["any"])
                return
            items = [(job, index) for job in self.jobs() for index in range(len(job.claims))]
            names = [f"{variant}-{claim.name}" for job, i in items for variant, claim in [job.claims[i]]]
            metafunc.parametrize(("job", "index"), items, ids=names)

    def test_claim(self, job: Job, index: int) -> None:
        """The claim holds, or is declared not to."""
        import pytest

        result = _result(job, *job.claims[index]) if is_here(job) else _results_elsewhere(job)[index]
        if result.verdict == "skipped":
            pytest.skip(f"needs {result.lacks}")
        if result.verdict == "known":
            pytest.xfail(result.known)
        measured = f"{result.worst:.3g}, bound {result.bound:g}"
        measured = "; ".join(filter(None, (measured, result.where, result.command)))
        assert result.verdict != "STALE", f"declared as missed ({result.known}), but holds: {measured}"
        assert result.passes, measured


def _result(job: Job, variant: str, claim: Claim) -> Result:
    (result,) = certify([Job(job.backend, job.environment, ((variant, claim),))])
    return result


@cache
def _results_elsewhere(job: Job) -> list[Result]:
    """All of a job at once, since a process with another environment takes long to start."""
    return certify([job])
