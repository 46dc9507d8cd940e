"""Around which optimizers the pull goes, and what then holds; as a script it prints the table."""

from __future__ import annotations

import importlib
import io
import sys

import pytest
import torch
from torch import nn

from recadam_core import RecAdamError, Sigmoid, apply, pull
from recadam_torch import anchor

WIDTH = 128  # what 8-bit optimizers quantize
SIGMOID = Sigmoid(k=0.5, t0=4.0)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 64))


def of(module, name, **settings):
    """Makes an optimizer of a package that may not be there, of a model or of groups."""

    def make(model, groups=None):
        found = getattr(importlib.import_module(module), name)
        if groups is None:
            groups = [p for p in model.parameters() if p.ndim == 2 or name != "Muon"]
        return found(groups, **settings)

    return make


OPTIMIZERS = {
    "SGD": of("torch.optim", "SGD", lr=0.001, momentum=0.9),
    "AdamW": of("torch.optim", "AdamW", lr=0.01, foreach=False),
    "AdamW, foreach": of("torch.optim", "AdamW", lr=0.01, foreach=True),
    "AdamW, fused": of("torch.optim", "AdamW", lr=0.01, fused=True),
    "Adafactor": of("torch.optim", "Adafactor", lr=0.01),
    "Muon": of("torch.optim", "Muon", lr=0.01),
    "LBFGS": of("torch.optim", "LBFGS", lr=0.1, max_iter=3),
    "AdamW, schedule-free": of("schedulefree", "AdamWScheduleFree", lr=0.01),
    "AdamW, 8 bits": of("torchao.optim", "AdamW8bit", lr=0.01),
    "AdamW, 4 bits": of("torchao.optim", "AdamW4bit", lr=0.01),
    "Lion": of("pytorch_optimizer", "Lion", lr=0.01),
    "CAME": of("pytorch_optimizer", "CAME", lr=0.01),
}


def step(model, optimizer, t):
    """A step on inputs that only the step's number decides."""
    if hasattr(optimizer, "train"):
        optimizer.train()
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(t))

    def closure():
        optimizer.zero_grad()
        loss = 10.0 * model(x.to(next(model.parameters()).dtype)).square().sum()
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        return optimizer.step(closure)
    closure()
    return optimizer.step()


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one, other):
    for (name, x), y in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y), (name, (x - y).abs().max())


def pulled_by_hand(model, optimizer, stars, p):
    """What follows a step: `recadam_core.pull` of all that it stepped."""
    mine = {x for group in optimizer.param_groups for x in group["params"]}
    for name, x in model.named_parameters():
        if x in mine:
            for weight in (x.data, optimizer.state[x].get("z")):
                if weight is not None:
                    weight.copy_(apply(weight, pull(weight, stars[name], p)))


class Missing(Exception):
    """Does not apply; the page says why."""


def walks_the_specifications_path(name, dtype=torch.float32):
    """To the bit the optimizer's step, and then `recadam_core.pull`."""
    model, twin = net().to(dtype), net().to(dtype)
    optimizer, other = OPTIMIZERS[name](model), OPTIMIZERS[name](twin)
    stars = copies(model)
    handle = anchor(optimizer, pull=0.3)
    for t in range(5):
        step(model, optimizer, t)
        step(twin, other, t)
        pulled_by_hand(twin, other, stars, 0.3)
        assert_same(model, twin)
    assert handle.drift().distance > 0
    assert abs(handle.drift().rate - 0.3) < 1e-6
    assert type(optimizer) is type(other)


def walks_it_in_bfloat16(name):
    walks_the_specifications_path(name, torch.bfloat16)


def _half(name):
    """A run of three steps and its checkpoint, and the model after three more."""
    model = net()
    optimizer, stars = OPTIMIZERS[name](model), copies(model)
    anchor(optimizer, stars, names=model.named_parameters(), pull=0.3, annealing=SIGMOID)
    for t in range(3):
        step(model, optimizer, t)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for t in range(3, 6):
        step(model, optimizer, t)

    def loaded():  # anew for each: torch's optimizers step the very tensors that they load
        file.seek(0)
        return torch.load(file, weights_only=True)

    return model, stars, loaded


def resumes(name):
    """On the uninterrupted path, from a state that holds no anchors."""
    model, stars, loaded = _half(name)
    saved = loaded()
    assert not any("anchor" in key for state in saved["optimizer"]["state"].values() for key in state)
    again = net()
    resumed = OPTIMIZERS[name](again)
    anchor(resumed, stars, names=again.named_parameters(), pull=0.3, annealing=SIGMOID)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for t in range(3, 6):
        step(again, resumed, t)
    assert_same(again, model)
    assert [group["anchor_step"] for group in resumed.param_groups] == [6]


def loads_without_us(name):
    """Its checkpoint in the optimizer alone, which then steps as one that never was pulled."""
    _, _, loaded = _half(name)
    plain, twin = net(), net()
    for some, says in ((plain, True), (twin, False)):
        saved = loaded()
        for group in saved["optimizer"]["param_groups"]:
            for key in () if says else [key for key in group if key.startswith("anchor_")]:
                del group[key]
        some.load_state_dict(saved["model"])
        alone = OPTIMIZERS[name](some)
        alone.load_state_dict(saved["optimizer"])
        step(some, alone, 3)
    assert_same(plain, twin)


def is_a_reference_model(name):
    """In the weights' place, without a copy."""
    model = net()
    optimizer = OPTIMIZERS[name](model)
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(99))
    before = model(x).detach()
    handle = anchor(optimizer)
    step(model, optimizer, 0)
    tuned, places = model(x).detach(), [p.data_ptr() for p in model.parameters()]
    with handle.at_anchors(), handle.at_anchors():
        assert torch.equal(model(x), before)
        with pytest.raises(RecAdamError, match="the weights are at their anchors; step after the context"):
            optimizer.step()
    assert torch.equal(model(x), tuned)
    assert not torch.equal(tuned, before)
    assert [p.data_ptr() for p in model.parameters()] == places
    with pytest.raises(ZeroDivisionError), handle.at_anchors():
        raise ZeroDivisionError
    assert torch.equal(model(x), tuned)


def follows_the_rates_of_its_groups(name):
    """Each group its own, through a schedule that starts at 0."""
    if name == "LBFGS":
        raise Missing("(a)")
    models, rates = (net(), net()), (1.0, 0.25)
    ends = []
    for model, pulled in zip(models, (True, False), strict=True):
        matrices = [[p for p in layer.parameters() if p.ndim == 2] for layer in (model[0], model[2])]
        groups = [{"params": some, "lr": 0.01 * rate} for some, rate in zip(matrices, rates, strict=True)]
        optimizer = OPTIMIZERS[name](model, groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (0.0, 0.5, 1.0, 0.25)[t])
        stars = copies(model)
        if pulled:
            anchor(optimizer, pull=0.3)
        for t, factor in enumerate((0.0, 0.5, 1.0, 0.25)):
            step(model, optimizer, t)
            if not pulled:
                pulled_by_hand(model, optimizer, stars, 0.3 * factor)
            if t < 3:
                schedule.step()
        ends.append(copies(model))
    for key, x in ends[0].items():
        torch.testing.assert_close(x, ends[1][key], rtol=0, atol=1e-6)


def pulls_what_is_thawed(name):
    """From where it was; what is frozen stays where somebody put it."""
    model = net()
    model[0].requires_grad_(False)
    optimizer = OPTIMIZERS[name](model)
    anchor(optimizer, pull=1e9)
    step(model, optimizer, 0)
    before = copies(model)
    model[0].weight.data += 1.0
    step(model, optimizer, 1)
    assert torch.equal(model[0].weight, before["0.weight"] + 1.0)
    torch.testing.assert_close(model[2].weight, before["2.weight"], rtol=0, atol=1e-4)
    if name == "LBFGS":
        raise Missing("(c)")
    model[0].requires_grad_(True)
    step(model, optimizer, 2)
    torch.testing.assert_close(model[0].weight, before["0.weight"], rtol=0, atol=1e-4)


def moves_nothing_at_an_infinite_gradient(name):
    """Under a GradScaler."""
    if name == "LBFGS":
        raise Missing("(b)")
    model = net()
    optimizer = OPTIMIZERS[name](model)
    handle = anchor(optimizer, pull=0.3)
    step(model, optimizer, 0)
    before = copies(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.zero_grad()
    scaler.scale(model(torch.full((1, WIDTH), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(x, before[n]) for n, x in model.named_parameters())
    assert optimizer.param_groups[0]["anchor_step"] == 1
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(1, WIDTH)).sum()).backward()
    scaler.step(optimizer)
    assert not torch.equal(model[2].weight, before["2.weight"])
    assert handle.drift().distance > 0


COLUMNS = {
    "bits": walks_the_specifications_path,
    "bfloat16": walks_it_in_bfloat16,
    "resumed": resumes,
    "without us": loads_without_us,
    "reference": is_a_reference_model,
    "groups": follows_the_rates_of_its_groups,
    "thawed": pulls_what_is_thawed,
    "scaler": moves_nothing_at_an_infinite_gradient,
}


def cell(name, check):
    try:
        check(name)
    except Missing as reason:
        return str(reason)
    except AssertionError as error:
        print(name, check.__name__, error, file=sys.stderr)
        return "no"
    return "yes"


def table():
    lines = ["| optimizer | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in OPTIMIZERS:
        try:
            cells = [cell(name, check) for check in COLUMNS.values()]
        except ModuleNotFoundError as error:
            print(f"{name}: needs {error.name}", file=sys.stderr)
            continue
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
