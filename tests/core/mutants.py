"""Does the conformance kit notice? Small changes to the kernels, and what catches each.

    python tests/core/mutants.py numpy torch triton jax

A group is a process: it imports its framework once and forks for every change. The child loads the changed
module from a temporary file, holds one variant to short cases of the kit, and says which claim is missed.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import sys
import tempfile
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple


class Mutation(NamedTuple):
    group: str  # key of GROUPS
    module: str
    variants: str  # which of the backend's variants, separated by spaces; any that misses will do
    what: str
    old: str
    new: str


# Group: backend, environment of the process, modules that are imported before the fork.
GROUPS = {
    "numpy": ("numpy", {}, ["numpy", "mpmath", "numba"]),
    "torch": ("torch", {}, ["numpy", "mpmath", "numba", "torch"]),
    "triton": ("torch", {"TRITON_INTERPRET": "1"}, ["numpy", "mpmath", "torch", "triton"]),
    "jax": ("jax", {"XLA_FLAGS": "--xla_cpu_max_isa=AVX"}, ["numpy", "mpmath", "jax", "optax"]),
}

CASES = (
    "decoupled/sigmoid/plain/few/float32/8",
    "released/steep/plain/few/float32/8",
    "proximal/linear/quick/few/float32/8",
    "decoupled/sigmoid/plain/mixed/float64/4",
    "decoupled/sigmoid/plain/solo/float32/300",
    "decoupled/sigmoid/plain/few/float16/8",
)
WEIGHED = "decoupled/sigmoid/plain/weighed/float32/12"
CURVES = ("sigmoid", "steep", "linear")  # of the claim on coefficients
PULLS = ("usual", "weighed", "wide")


def _kernel(group, module, variants, *changes):
    return [Mutation(group, module, variants, *change) for change in changes]


MUTATIONS = [
    # The specification itself: the oracle must notice.
    *_kernel(
        "numpy", "recadam_core.update", "specification",
        ("beta2 for beta1 in one place", "m + rest1 * grad", "m + rest2 * grad"),
        ("eps inside the root", "sqrt(v) + eps)", "sqrt(v + eps))"),
        ("the pull reads the new theta", "pull * (anchor - theta)", "pull * (anchor - (theta - adam))"),
        ("beta1 for beta2 in one place", "v = beta2 * v", "v = beta1 * v"),
        ("a part of the first moment under the fraction", "divide(m, sqrt", "divide(m - rest1 * grad, sqrt"),
        ("the pull pushes", "pull * (anchor - theta)", "pull * (theta - anchor)"),
        ("the decay reads the new theta", "decay * theta", "decay * (theta + delta)"),
        ("the importance is missing", "back = importance * back", "back = 1.0 * back"),
        ("the gradient is not squared", "(grad * grad)", "grad"),
        ("16-bit sums are rounded twice", "_astype(xp, theta, delta.dtype) + delta,",
         "theta + _astype(xp, delta, theta.dtype),"),
    ),
    # Held against itself the specification would agree: NumPy's other way notices.
    *_kernel(
        "numpy", "recadam_core.update", "fused",
        ("the pull alone overshoots", "proximal(p, xp)[1]", "p"),
        ("the pull alone is not weighed", "star, weight, *unread", "star, None, *unread"),
    ),
    # Policy.
    *_kernel(
        "numpy", "recadam_core.coefficients", "specification",
        ("t is off by one", "c1, c2 = (-xp.expm1(t * ", "c1, c2 = (-xp.expm1((t + 1) * "),
        ("the task weight is missing", "step = lr * task * scale", "step = lr * scale"),
        ("lr is missing in the pull", "pull = lr * hp.gamma * recall", "pull = hp.gamma * recall"),
        ("the recall weight is missing", "pull = lr * hp.gamma * recall", "pull = lr * hp.gamma"),
        ("the root of the second correction is missing", "root = xp.sqrt(c2)", "root = c2"),
        ("eps is not corrected", "    else:\n        eps = eps * root\n", "    else:\n        pass\n"),
        ("released: the pull forgets the decay", "_scaled(pull, keep)", "pull"),
        ("proximal: the decay is not shrunk", "_scaled(decay, shrink)", "decay"),
        ("1 - beta^t cancels", "(-xp.expm1(t * _log(beta, xp)) for", "(1 - xp.exp(t * _log(beta, xp)) for"),
    ),
    *_kernel(
        "numpy", "recadam_core.annealing", "specification",
        ("1 - sigma(x) for sigma(-x)", "xp.where(rising, low, high)",
         "self.weight - xp.where(rising, high, low)"),
        ("the sum of the weights is 1", "high, low = self.weight / (1.0 + e)", "high, low = 1.0 / (1.0 + e)"),
        ("the anchor is never released",
         "return task, where(abs(recall) < RECALL_FLOOR, 0.0 * recall, recall)", "return task, recall"),
        ("t0 is off by one", "x = self.k * (t - self.t0)", "x = self.k * (t - self.t0 - 1)"),
        ("linear goes on", "xp.where(rising, task, zero + self.weight)", "task"),
    ),
    *_kernel(
        "numpy", "recadam_core.optimizer", "functional",
        ("t is off by one", "return int(taken) + 1", "return int(taken) + 2"),
        ("heads are anchored", "c = coefficients(t, self.hp, lr, anchored)", "c = coefficients(t, self.hp, lr, True)._replace(pull=0.0)"),
        ("the importance is missing", "if pulls and state.importance else None", "if False else None"),
        ("the given lr is not used", "c = coefficients(t, self.hp, lr, anchored)", "c = coefficients(t, self.hp, None, anchored)"),
    ),
    # Each backend's kernel.
    *_kernel(
        "numpy", "recadam_numpy.kernel", "functional",
        ("beta2 for beta1 in one place", "(c.beta1, 1 - c.beta1, c.beta2", "(c.beta1, 1 - c.beta2, c.beta2"),
        ("the decay is missing", "c.decay or None", "None"),
        ("the step is missing", "c.step, c.eps", "1.0, c.eps"),
        ("the importance is missing", "anchor, importance, *numbers", "anchor, None, *numbers"),
        ("1 - beta rounded first", "(c.beta1, 1 - c.beta1", "(c.beta1, 1 - theta.dtype.type(c.beta1)"),
        ("the moments stay", "delta, m[...], v[...] = formula", "delta, *_ = formula"),
    ),
    *_kernel(
        "numpy", "recadam_numpy.one_pass", "fused",
        ("beta2 for beta1 in one place", "c.beta1, 1 - c.beta1, c.beta2, 1", "c.beta1, 1 - c.beta2, c.beta2, 1"),
        ("operations are contracted", '_formula = numba.njit(error_model="numpy"', '_formula = numba.njit(fastmath=True, error_model="numpy"'),
        ("the anchor is the importance, too", "addresses[5, p] + start", "addresses[4, p] + start"),
        ("the decay is missing", "0, pulls + (pulls and weighs), c.decay != 0", "0, pulls + (pulls and weighs), 0"),
        ("what is read is taken to be in C order", "else [np.ascontiguousarray(x) for x in xs]", "else list(xs)"),
        ("the pull alone is not weighed", "_pull_loop(theta, star, weight, x[6])", "_pull_loop(theta, star, None, x[6])"),
        ("the pull alone goes no way", "*unread, share", "*unread, 0.0 * share"),
    ),
    *_kernel(
        "torch", "recadam_torch.kernels.lists", "functional single foreach",
        ("beta2 for beta1 in one place", "c.beta1, 1 - c.beta1, c.beta2", "c.beta1, 1 - c.beta2, c.beta2"),
        ("the decay is missing", "c.decay or None", "None"),
        ("what is divided is lost", "Lists(list(torch._foreach_div(self.tensors, other.tensors)), spent=True)",
         "Lists(torch._foreach_div_(self.tensors, other.tensors) or self.tensors, spent=True)"),
        ("the parameters are spent", "Lists(old),", "Lists(old, spent=True),"),
        ("torch's own root in the exact setting", "if exact else list(torch._foreach_sqrt", "if False else list(torch._foreach_sqrt"),
        ("the importance is missing", "if pulls and importances is not None else None", "if False else None"),
        ("the pull alone stays in 16 bits", "    dtypes = {x.dtype for x in tensors}\n", "    dtypes = set()\n"),
        ("16-bit sums are rounded twice", "torch._foreach_copy_(thetas, list(torch._foreach_add(old, delta.tensors)))",
         "torch._foreach_add_(thetas, _like(delta.tensors, thetas))"),
    ),
    *_kernel(
        "torch", "recadam_torch.plan", "foreach",
        ("t is off by one", 'steps_taken(name, state[p]["step"]) + 1', 'steps_taken(name, state[p]["step"]) + 2'),
        ("heads and bodies are one list", 'anchored = "anchor" in state[p] and', "anchored ="),
    ),
    *_kernel(
        "torch", "recadam_torch.stepping", "capturable",
        ("t is off by one", "torch.stack(work.steps) + 1", "torch.stack(work.steps) + 2"),
    ),
    *_kernel(
        "torch", "recadam_torch.kernels.compiled", "compiled",
        ("beta2 for beta1 in one place", "betas = beta1, 1 - beta1, beta2", "betas = beta1, 1 - beta2, beta2"),
        ("the importance is missing", "importances if anchors else None]", "None]"),
        ("the pull alone stays in 16 bits", "wide_dtype(theta) if m is None", "theta.dtype if m is None"),
        ("the decay is missing", "number(c.decay) if c.decay else None", "None"),
    ),
    *_kernel(
        "torch", "recadam_torch.kernels.numba", "fused",
        ("the importance is missing", "importances is not None)", "False)"),
    ),
    *_kernel(
        "torch", "recadam_torch.memory", "fused",
        ("other layouts are not written back", "if x is not y]", "if False]"),
    ),
    *_kernel(
        "torch", "recadam_torch.plan", "fused",
        ("t is off by one", "int(steps.pop()) + 1", "int(steps.pop()) + 2"),
    ),
    *_kernel(
        "triton", "recadam_torch.kernels.triton", "triton",
        ("beta2 for beta1 in one place", "numbers = (c.beta1, 1 - c.beta1", "numbers = (c.beta1, 1 - c.beta2"),
        ("the root of float64 is another", "root = tl.sqrt(x)", "root = tl.sqrt(x + 1e-8)"),
        ("the root is another", "root = tl.sqrt_rn(x)", "root = tl.sqrt_rn(x + 1e-8)"),
        ("the importance is missing", "    if weighs:\n", "    if False:\n"),
        ("the pull alone takes a step", "steps=grads is not None", "steps=True"),
        ("the decay is missing", "    if decays:\n", "    if False:\n"),
    ),
    *_kernel(
        "jax", "recadam_core.update", "functional eager",
        ("beta2 for beta1 in one place", "m + rest1 * grad", "m + rest2 * grad"),
        ("eps inside the root", "sqrt(v) + eps)", "sqrt(v + eps))"),
        ("the pull reads the new theta", "pull * (anchor - theta)", "pull * (anchor - (theta - adam))"),
    ),
    *_kernel(
        "jax", "recadam_core.coefficients", "optax",
        ("1 - beta^t cancels", "(-xp.expm1(t * _log(beta, xp)) for", "(1 - xp.exp(t * _log(beta, xp)) for"),
    ),
    *_kernel(
        "jax", "recadam_core.annealing", "optax",
        ("1 - sigma(x) for sigma(-x)", "xp.where(rising, low, high)",
         "self.weight - xp.where(rising, high, low)"),
    ),
    *_kernel(
        "jax", "recadam_jax.coefficients", "optax",
        ("t is off by one", "optax.safe_increment(count).astype", "count.astype"),
    ),
    *_kernel(
        "jax", "recadam_jax.transformation", "optax",
        ("heads are anchored", "c = by_anchored[star is not None]", "c = by_anchored[True]._replace(pull=0.0)"),
    ),
    *_kernel(
        "jax", "recadam_jax.transformation", "optax-host",
        ("the importance is missing", "Moments(m, v), star, c, weight)", "Moments(m, v), star, c)"),
    ),
    *_kernel(
        "jax", "recadam_jax.coefficients", "optax-host",
        ("heads are anchored", "(False, on_host.new)", "(False, on_host.anchored)"),
        ("the decay is missing", "0.0 if is_zero(hp.weight_decay) else decay", "0.0"),
        ("eps and step are swapped", "(step, eps, pull, decay) in (", "(eps, step, pull, decay) in ("),
    ),
    *_kernel(
        "jax", "recadam_jax.backend", "functional",
        ("the decay is missing", "decay if decays else 0.0)", "0.0)"),
        ("the importance is missing", "anchors, c, weights)", "anchors, c)"),
        ("the pull alone overshoots", "pull_alone(recall).pull", "recall"),
        ("the pull alone is not weighed", "pull_by(x, star, share, w)", "pull_by(x, star, share)"),
    ),
]  # fmt: skip


class Changed(importlib.abc.MetaPathFinder):
    """Finds one module in a changed copy: in a file, since Triton reads sources from files."""

    def __init__(self, mutation: Mutation, folder: str) -> None:
        self.mutation, self.folder = mutation, Path(folder)

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.mutation.module:
            return None
        found = PathFinder.find_spec(fullname, path)
        source = Path(found.origin).read_text(encoding="utf-8")
        if source.count(self.mutation.old) != 1:
            raise SystemExit(f"{fullname} has {self.mutation.old!r} {source.count(self.mutation.old)} times")
        changed = self.folder / Path(found.origin).name
        changed.write_text(source.replace(self.mutation.old, self.mutation.new), encoding="utf-8")
        return importlib.util.spec_from_file_location(fullname, changed)


def caught_by(backend: str, variants: list[str]) -> str:
    """The first claim that a variant misses; empty when all hold."""
    from recadam_core import get_backend
    from recadam_core.conformance.claims import check
    from recadam_core.conformance.run import plan

    served = get_backend(backend)
    jobs = plan(served, variants, kinds=("exact", "step"), cases=CASES)
    if {"specification", "optax"} & set(variants):
        jobs += plan(served, variants, kinds=("coefficients",), cases=CURVES)
    jobs += plan(served, variants, kinds=("weighed", "step"), cases=[WEIGHED])
    if any(served.capabilities.variant(name).pull for name in variants):
        jobs += plan(served, variants, kinds=("pull",), cases=PULLS)
    for job in jobs:
        for name, claim in job.claims:
            variant = served.capabilities.variant(name)
            if variant.misses.get(claim.kind):
                continue
            try:
                result = check(served, variant, claim)
            except Exception as error:  # a kernel that breaks is noticed, too
                return f"{type(error).__name__}"
            if not result.passes:
                return f"{name}: {claim.name}"
    return ""


def run_group(group: str) -> list[dict[str, str]]:
    """Every mutation of a group, and an unchanged run of each of its variants."""
    backend, environment, modules = GROUPS[group]
    os.environ.update(environment)
    for name in modules:
        importlib.import_module(name)
    mine = [mutation for mutation in MUTATIONS if mutation.group == group]
    unchanged = [
        Mutation(group, "", variants, "nothing", "", "")
        for variants in dict.fromkeys(mutation.variants for mutation in mine)
    ]
    results = []
    for mutation in [*unchanged, *mine]:
        with tempfile.TemporaryDirectory() as folder:
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(reading)
                status = 1
                try:
                    sys.meta_path.insert(0, Changed(mutation, folder))
                    answer = caught_by(backend, mutation.variants.split())
                    os.write(writing, answer.encode())
                    status = 0
                except SystemExit as error:
                    print(error, file=sys.stderr)
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            os.close(writing)
            with os.fdopen(reading) as pipe:
                answer = pipe.read()
            _, status = os.waitpid(child, 0)
            if status:
                answer = "failed"
        results.append({**mutation._asdict(), "caught by": answer})
        print(json.dumps(results[-1]), flush=True)
    return results


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        run_group(chosen)
