"""Running the kit: each backend in a process of its own, with the environment that its variants ask for."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from ..backends import Backend, get_backend
from ..errors import RecAdamError, unknown
from ..interrupts import deferred
from ..variants import Variant
from .cases import Case
from .claims import LEVELS, Claim, Result, check, claims
from .measures import MEASURES

__all__ = ["Job", "certify", "environment", "is_here", "plan"]


@dataclass(frozen=True)
class Job:
    """Claims about one backend that can share a process.

    Args:
        backend: the backend's name.
        environment: variables that the process needs.
        claims: variants' names and their claims.
    """

    backend: str
    environment: tuple[tuple[str, str], ...]
    claims: tuple[tuple[str, Claim], ...]


def environment(variant: Variant, level: str) -> dict[str, str]:
    """The variables that a process needs in which this variant is held to this level.

    Example:
        >>> environment(Variant("functional"), "exact")
        {}
    """
    return {**variant.environment, **(variant.exact.environment if level == "exact" else {})}


def plan(
    backends: Backend | Sequence[Backend],
    variants: Sequence[str] = (),
    levels: Sequence[str] = LEVELS,
    kinds: Sequence[str] = (),
    cases: Sequence[str] = (),
    golden: Path | None = None,
) -> list[Job]:
    """The claims about backends, by the environment that they need.

    Args:
        backends: the backend, or several; a choice that one of them lacks leaves that one out.
        variants: names of variants; empty for all.
        levels: some of `LEVELS`.
        kinds: kinds of claim; empty for all.
        cases: names of cases, of pulls, of annealings, of manners or of golden files; empty for those of each
            claim.
        golden: a folder of golden trajectories to replay too; None for none.

    Returns:
        The jobs, one for each backend and environment.

    Raises:
        RecAdamError: for a name that there is not in any of them, or when no claim is left.

    Example:
        >>> [job.backend for job in plan(get_backend("numpy"), levels=["exact"])]
        ['numpy']
    """
    backends = backends if isinstance(backends, Sequence) else [backends]
    for kind in kinds:
        if kind not in MEASURES:
            raise unknown("claim", kind, MEASURES)
    if "golden" in kinds and golden is None:
        raise RecAdamError("claim 'golden' needs recorded trajectories; give their folder with --golden")
    names = {v.name for backend in backends for v in backend.capabilities.variants}
    for name in variants:
        if name not in names:
            raise unknown("variant", name, names)
    ways = [
        (backend.name, variant.name, tuple(sorted(environment(variant, level).items())), claim)
        for backend in backends
        for variant in backend.capabilities.variants
        if not variants or variant.name in variants
        for level in levels
        for claim in claims(backend, variant, level, golden)
        if not kinds or claim.kind in kinds
    ]
    claims_of: dict[tuple[str, tuple[tuple[str, str], ...]], list[tuple[str, Claim]]] = {}
    for name, variant_name, variables, claim in ways:
        if cases:
            claim = dataclasses.replace(claim, cases=tuple(_chosen(claim, cases)))
        if claim.cases:
            claims_of.setdefault((name, variables), []).append((variant_name, claim))
    jobs = [Job(*key, tuple(those)) for key, those in claims_of.items()]
    for case in cases:
        if not any(
            case in (given, Path(given).name) for job in jobs for _, c in job.claims for given in c.cases
        ):
            if "/" in case:
                Case.named(case)
            raise RecAdamError(
                f"case {case!r}: no claim that was asked for has it; name one as the table does, "
                "or leave out --variant, --level or --claim"
            )
    if not jobs:
        raise RecAdamError("no claim is left of what was asked for; leave out --variant, --level or --claim")
    return jobs


def _chosen(claim: Claim, cases: Sequence[str]) -> Iterator[str]:
    """Of the cases asked for those that are the claim's; cases of the kit may be new ones."""
    for case in cases:
        if claim.kind == "golden":
            yield from (path for path in claim.cases if Path(path).name == case)
        elif claim.kind in ("coefficients", "manners", "pull"):
            yield from (name for name in claim.cases if name == case)
        elif "/" in case:
            parsed = Case.named(case)
            # Denormal numbers and importances are claims of their own.
            kind = {"denormal": "denormals", "weighed": "weighed"}.get(parsed.arrays, "exact")
            fits = claim.kind in (kind, "step", "trajectory")
            # With eps 0 a zero gradient has no exact step.
            fits = fits and (claim.kind != "step" or parsed.settings != "bare")
            if fits and parsed.dtype == claim.dtype:
                yield case


def certify(
    jobs: Sequence[Job], workers: int = 1, progress: Callable[[Result], None] | None = None
) -> list[Result]:
    """Hold backends to claims: the results, in the order of the jobs'; `progress` is told each as it comes.

    A job whose environment this process has runs here if there is one worker; all others run in
    processes of their own.

    Raises:
        RecAdamError: when a process fails, with the last line it printed.

    Example:
        >>> jobs = plan(get_backend("numpy"), ["functional"], ["exact"], ["denormals"])
        >>> {result.verdict for result in certify(jobs)}
        {'yes'}
    """
    tell = progress or (lambda result: None)
    results: dict[Job, list[Result]] = {}
    processes: list[subprocess.Popen[str]] = []
    stopped = threading.Event()
    pool = ThreadPoolExecutor(workers)
    try:
        if workers == 1:
            results = {job: [_tell(result, tell) for result in _results(job)] for job in jobs if is_here(job)}
        # The slow ones first: those with an environment of their own, and NumPy last.
        waiting = sorted(
            (job for job in jobs if job not in results),
            key=lambda job: (not job.environment, job.backend == "numpy"),
        )
        futures = {pool.submit(_elsewhere, job, processes, stopped, tell): job for job in waiting}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # first, or the next job would start
        stopped.set()
        for process in processes:
            process.terminate()
        pool.shutdown()
    return [result for job in jobs for result in results[job]]


def is_here(job: Job) -> bool:
    """Whether this process has the environment that a job needs."""
    return all(_set(name, value, os.environ) for name, value in job.environment)


def _tell(result: Result, tell: Callable[[Result], None]) -> Result:
    tell(result)
    return result


def _results(job: Job) -> Iterator[Result]:
    """The job's results, in this process."""
    backend = get_backend(job.backend)
    for name, claim in job.claims:
        variant = backend.capabilities.variant(name)
        if lacks := variant.lacks():
            yield Result(backend.name, name, claim.level, claim.name, len(claim.cases), 0.0, 0.0, lacks=lacks)
        else:
            with deferred():
                result = check(backend, variant, claim)
            yield result


def _set(name: str, value: str, variables: Mapping[str, str]) -> bool:
    """Whether the variable has the value among its words: JAX's flags are several in one."""
    return value in variables.get(name, "").split()


def _elsewhere(
    job: Job,
    processes: list[subprocess.Popen[str]],
    stopped: threading.Event,
    tell: Callable[[Result], None],
) -> list[Result]:
    """The job's results, from a process of its own."""
    variables = dict(os.environ)
    for name, value in job.environment:
        if not _set(name, value, variables):
            variables[name] = (
                f"{variables.get(name, '')} {value}".strip() if name.endswith("FLAGS") else value
            )
    variables.setdefault("OMP_NUM_THREADS", "1")
    results = []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "recadam_core.conformance.run", json.dumps(dataclasses.asdict(job))],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=variables,
            text=True,
        )
        processes.append(process)
        if stopped.is_set():  # while this one was starting, so it was not among those ended
            process.terminate()
        with process:
            for line in process.stdout or ():
                fields = json.loads(line)
                fields["ulps"] = fields["ulps"] and tuple(fields["ulps"])
                results.append(_tell(Result(**fields), tell))
        errors.seek(0)
        printed = errors.read().strip().splitlines()
    if process.returncode or len(results) < len(job.claims):
        last = (printed or [f"exit code {process.returncode}"])[-1]
        raise RecAdamError(f"conformance of {job.backend!r}: the process failed: {last}")
    return results


def _main() -> None:
    """Take a job as JSON; write a result a line, to where only results go."""
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a backend prints is no result
    fields = json.loads(sys.argv[1])
    claims = ((name, Claim(**{**claim, "cases": tuple(claim["cases"])})) for name, claim in fields["claims"])
    job = Job(fields["backend"], tuple(map(tuple, fields["environment"])), tuple(claims))
    for result in _results(job):
        print(json.dumps(dataclasses.asdict(result)), file=results, flush=True)


if __name__ == "__main__":
    _main()
