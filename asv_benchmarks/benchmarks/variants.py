"""Every variant of every backend, on the devices that are here."""

from __future__ import annotations

import shutil

from recadam_core import Hyperparameters, RecAdamError, available_backends, get_backend
from recadam_core.optimizer import stepper_of

from .common import MODEL, SHAPES, arrays, best, turns

DEVICES = ["cpu", "cuda"] if shutil.which("nvidia-smi") else ["cpu"]
HP = Hyperparameters(lr=1e-5, gamma=5000.0)


class Variants:
    """A step of each variant over one of its backend's functional form.

    What is not installed is skipped. So is what needs an environment on the CPU, as Triton does an
    interpreter, whose time says nothing; without a GPU it is not even listed.
    """

    params = (
        [
            f"{name} {v.name}"
            for name in available_backends()
            for v in get_backend(name).capabilities.variants[1:]
            if (not v.environment or "cuda" in DEVICES)
        ],
        DEVICES,
        MODEL,
    )
    param_names = ("variant", "device", "parameters")
    unit = "times the functional form"
    timeout = 600

    def setup(self, which, device, _):
        name, chosen = which.split()
        backend = get_backend(name)
        variant = backend.capabilities.variant(chosen)
        if variant.lacks():
            raise NotImplementedError(f"{which} needs {variant.lacks()}")
        if device not in backend.capabilities.devices or not here(name, device):
            raise NotImplementedError(f"{which} has no {device} here")
        if device == "cpu" and variant.environment:
            raise NotImplementedError(f"{which} is interpreted on the CPU")
        try:
            pair = (backend.capabilities.variants[0], variant)
            self.steps = {v.name: step(backend, v, device) for v in pair}
            for take in self.steps.values():
                take()
        except RecAdamError as error:
            if device == "cpu":
                raise
            raise NotImplementedError(str(error)) from error  # as of numba's on CUDA

    def track_step(self, which, device, _):
        return best(turns(self.steps, warm=1), *reversed(self.steps))

    track_step.pretty_name = "A step of each backend's variants"


def step(backend, variant, device):
    """A step of a variant, that waits for its device."""

    def put(seed):
        made = map(backend.from_numpy, arrays(SHAPES, seed))
        return {str(i): placed(x, backend.name, device) for i, x in enumerate(made)}

    params, grads, anchors = put(0), put(1), put(0)
    stepper = stepper_of(backend, variant, params, anchors, HP)
    return lambda: synchronise(stepper(grads, HP.lr)["0"])


def here(backend, device):
    """Whether the backend's library has the device in this machine."""
    if device == "cpu":
        return True
    if backend == "torch":
        import torch

        return torch.cuda.is_available()
    import jax

    try:
        return backend == "jax" and bool(jax.devices(device))
    except RuntimeError:
        return False


def placed(array, backend, device):
    """The array on a device."""
    if backend == "torch":
        return array.to(device)
    if backend == "jax":
        import jax

        return jax.device_put(array, jax.devices(device)[0])
    return array


def synchronise(array):
    """Wait until the array is there."""
    if hasattr(array, "block_until_ready"):
        array.block_until_ready()
    elif getattr(array, "is_cuda", False):
        import torch

        torch.cuda.synchronize(array.device)
