"""The pull around other optimizers: which, and what it is used with."""

from __future__ import annotations

import copy
import gc
import importlib.util
import os
import pickle
import re
import subprocess
import sys
import time
import warnings
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import save_file
from torch import nn

from recadam_core import Constant, Linear, RecAdamError, apply, pull
from recadam_torch import Anchors, RecAdam, anchor

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("torch_pull", HERE / "torch_pull.py")
torch_pull = importlib.util.module_from_spec(spec)
spec.loader.exec_module(torch_pull)
OPTIMIZERS, WIDTH = torch_pull.OPTIMIZERS, torch_pull.WIDTH
net, step, copies = torch_pull.net, torch_pull.step, torch_pull.copies

PAGE = HERE.parents[2] / "docs" / "anchor.md"
DOCUMENTED = dict(re.findall(r"^\| (.+?) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.M))


@pytest.mark.parametrize("column", torch_pull.COLUMNS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_of_optimizers_is_what_holds(name, column):
    try:
        found = torch_pull.cell(name, torch_pull.COLUMNS[column])
    except ModuleNotFoundError as error:
        pytest.skip(f"could not import {error.name!r}")
    documented = DOCUMENTED[name].split(" | ")
    assert found == documented[list(torch_pull.COLUMNS).index(column)]
    assert found != "no"


@pytest.mark.parametrize("kind", ["dtype", "transposed"])
def test_anchors_of_another_kind_are_copied_into_the_weights_place(kind):
    model = nn.Linear(3, 3, bias=False)
    star = torch.ones(3, 3, dtype=torch.bfloat16) if kind == "dtype" else torch.ones(3, 3).t()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    handle = anchor(optimizer, {"weight": star})
    tuned = model.weight.detach().clone()
    with handle.at_anchors():
        assert model.weight.dtype == torch.float32
        assert torch.equal(model.weight, torch.ones(3, 3))
    assert torch.equal(model.weight, tuned)
    assert torch.equal(handle.interpolate(0.0)["weight"], torch.ones(3, 3))


def test_the_pull_follows_the_schedule_of_each_group_and_a_rate_of_zero_moves_nothing():
    w, v = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [w], "lr": 0.5}, {"params": [v], "lr": 0.1}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (0.0, 0.5, 1.0, 0.25)[t])
    anchor(optimizer, pull=1.0)
    for x in (w, v):
        x.grad = torch.zeros(1)
    optimizer.step()
    schedule.step()
    w.data += 1.0
    v.data += 1.0
    for part in (0.5, 1.0, 0.25):
        before = w.item()
        optimizer.step()
        assert w.item() == pytest.approx(before / (1 + part), rel=1e-6)
        assert v.item() == w.item()
        schedule.last_epoch < 3 and schedule.step()


def test_without_a_schedulers_word_the_peak_is_the_highest_rate_so_far():
    w = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([w], lr=0.0)
    handle = anchor(optimizer, pull=1.0)
    w.grad = torch.zeros(1)
    optimizer.step()
    w.data += 1.0
    shares = []
    for lr in (0.0, 0.1, 0.2, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        before = w.item()
        optimizer.step()
        shares.append(1 - w.item() / before)
    assert shares == pytest.approx([0.0, 0.5, 0.5, 1 / 3], rel=1e-5)
    assert handle.drift().distance == pytest.approx(w.item())


def test_an_optimizer_without_a_rate_is_pulled_alike_in_every_step():
    class Signs(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.data -= p.grad.sign()

    w = nn.Parameter(torch.zeros(2))
    optimizer = Signs([w])
    anchor(optimizer, pull=1.0)
    w.grad = torch.tensor([1.0, 0.0])
    for expected in (-0.5, -0.75, -0.875):
        optimizer.step()
        assert w.tolist() == [expected, 0.0]


@pytest.mark.parametrize("tensor", [False, True])
def test_a_task_weight_scales_the_rate_for_its_step_alone(tensor):
    w = nn.Parameter(torch.zeros(1))
    rate = torch.tensor(0.5) if tensor else 0.5
    optimizer = torch.optim.SGD([w], lr=rate)
    anchor(optimizer, pull=0.0, annealing=Linear(t0=4))
    w.grad = torch.ones(1)
    for t, total in enumerate((0.125, 0.375, 0.75, 1.25, 1.75), start=1):
        optimizer.step()
        assert w.item() == -total, t
        assert float(optimizer.param_groups[0]["lr"]) == 0.5
    assert optimizer.param_groups[0]["lr"] is rate or not tensor


def test_a_step_that_raises_leaves_the_rate_as_it_was():
    w = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([w], lr=0.5)
    handle = anchor(optimizer, annealing=Constant(0.5, 1.0))

    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.5
    w.grad = torch.ones(1)
    optimizer.step()
    assert w.item() == pytest.approx(-0.25 / 1.1)
    with handle.at_anchors():
        assert w.item() == 0.0


def test_within_a_step_the_anchors_do_not_take_the_weights_place():
    w = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([("w", w)], lr=0.5)
    handle = anchor(optimizer, {"w": torch.zeros(1)})

    def closure():
        with handle.at_anchors():
            return w.sum()

    with pytest.raises(RecAdamError, match="the optimizer is within a step; call it before or after"):
        optimizer.step(closure)
    with handle.at_anchors():
        assert w.item() == 0.0


@pytest.mark.parametrize("lr", [-0.1, float("nan"), "0.1"])
def test_a_rate_that_is_none_is_refused_before_the_optimizer_steps(lr):
    w = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([w], lr=0.5)
    anchor(optimizer)
    w.grad = torch.ones(1)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(RecAdamError, match=r"^anchor: lr is .*; give a"):
        optimizer.step()
    assert w.item() == 1.0


def test_what_is_frozen_stays_and_what_is_thawed_or_added_is_pulled_from_where_it_was():
    model = net()
    late = nn.Parameter(torch.full((2,), 3.0))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    anchor(optimizer, pull=1e9)
    step(model, optimizer, 0)
    before = copies(model)
    model[0].weight.data += 1.0  # by somebody else
    step(model, optimizer, 1)
    moved = copies(model)
    assert torch.equal(moved["0.weight"], before["0.weight"] + 1.0)
    assert torch.allclose(moved["2.weight"], before["2.weight"], atol=1e-5)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": [late]})
    step(model, optimizer, 2)
    assert torch.allclose(model[0].weight, before["0.weight"], atol=1e-5)
    late.grad = torch.ones(2)
    optimizer.step()
    assert torch.allclose(late, torch.full((2,), 3.0), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_pulled_in_float32_at_least_and_rounded_once(dtype):
    theta, star = torch.randn(50).to(dtype), torch.randn(50).to(dtype)
    w = nn.Parameter(theta.clone())
    optimizer = torch.optim.SGD([("w", w)], lr=0.1)
    anchor(optimizer, {"w": star}, pull=0.3)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert torch.equal(w, apply(theta, pull(theta, star, 0.3)))


def test_an_importance_weighs_the_pull():
    w = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([("w", w)], lr=0.1)
    anchor(optimizer, {"w": torch.zeros(3)}, pull=1.0, importance={"w": torch.tensor([0.0, 0.5, 1.0])})
    w.grad = torch.zeros(3)
    optimizer.step()
    assert w.tolist() == [1.0, 0.75, 0.5]


def test_what_has_no_anchor_is_not_pulled():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    anchors = Anchors.of(model, new=["2.*"])
    anchor(optimizer, anchors, names=model.named_parameters(), pull=1e9)
    before = copies(model)
    step(model, optimizer, 0)
    after = copies(model)
    assert [torch.allclose(after[n], before[n], atol=1e-5) for n in after] == [True, True, False, False]


def test_what_a_wrapper_broadcasts_before_the_first_step_is_the_anchor():
    w = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    handle = anchor(optimizer, pull=1.0)
    w.data += 5.0
    w.grad = torch.zeros(2)
    with pytest.warns(UserWarning, match=r"'params\[0\]' was overwritten after it was called"):
        optimizer.step()
    assert (w.tolist(), handle.drift().distance) == ([5.0, 5.0], 0.0)


def test_other_anchors_are_told_by_their_hash_and_nothing_is_changed():
    model = net()
    optimizer = OPTIMIZERS["AdamW"](model)
    anchor(optimizer)
    step(model, optimizer, 0)
    saved = optimizer.state_dict()
    tuned = net()
    tuned.load_state_dict(model.state_dict())
    late = OPTIMIZERS["AdamW"](tuned)
    anchor(late)  # after the tuned weights were loaded
    with pytest.raises(
        RecAdamError, match="group 0 was pulled towards other anchors; give those as anchors="
    ):
        late.load_state_dict(saved)
    assert late.state_dict()["state"] == {}
    plain = OPTIMIZERS["AdamW"](net()).state_dict()
    with pytest.warns(UserWarning, match="saved without the pull"):
        late.load_state_dict(plain)
    assert late.param_groups[0]["anchor_step"] == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pull": float("nan")}, "anchor: pull is nan; give a finite number >= 0"),
        ({"pull": -1.0}, r"anchor: pull is -1.0; give a"),
        ({"pull": "0.1"}, "anchor: pull is '0.1'; give a"),
        ({"pull": True}, "anchor: pull is True; give a"),
        ({"annealing": 0.5}, "annealing"),
        ({"anchors": {"w": torch.zeros(3)}}, r"'w' has shape \(3,\), its parameter \(2,\)"),
        ({"anchors": {"v": torch.zeros(2)}}, "'v' matches no parameter"),
        ({"anchors": {"w": torch.full((2,), torch.nan)}}, "'w' holds NaN or infinity"),
        ({"anchors": [torch.zeros(2)]}, "anchors: list; give a dict of arrays by parameter name"),
        ({"names": [1, 2]}, r"names is \[1, 2\]; give model.named_parameters\(\)"),
        ({"names": nn.Linear(2, 2).named_parameters()}, r"parameter 0 of shape \(2,\) has no name in names"),
        ({"importance": {"w": torch.full((2,), 2.0)}}, r"importance"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x[:20],
)
def test_what_cannot_be_a_pull_is_refused_in_one_line_and_leaves_the_optimizer_alone(settings, says):
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([("w", w)], lr=0.1)
    before = [list(group) for group in optimizer.param_groups]
    with pytest.raises(RecAdamError, match=says) as raised:
        anchor(optimizer, **settings)
    assert "\n" not in str(raised.value)
    assert [list(group) for group in optimizer.param_groups] == before
    anchor(optimizer).remove()
    assert [list(group) for group in optimizer.param_groups] == before
    assert not optimizer._optimizer_step_post_hooks


def test_anchors_by_name_need_names():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(RecAdamError, match=r"matched by name; give names=model.named_parameters\(\)"):
        anchor(torch.optim.SGD([w], lr=0.1), {"w": torch.zeros(2)})


def test_two_handles_and_a_pull_around_recadam_are_refused():
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    handle = anchor(optimizer)
    with pytest.raises(RecAdamError, match=r"pulls already; call remove\(\) of the other handle"):
        anchor(optimizer)
    handle.remove()
    anchor(optimizer)
    with pytest.raises(RecAdamError, match="RecAdam pulls by itself"):
        anchor(RecAdam([w]))
    with pytest.raises(RecAdamError, match=r"the optimizer is 3; give a torch.optim.Optimizer"):
        anchor(3)


def test_an_optimizer_that_nobody_holds_is_freed_with_its_anchors():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    anchor(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


def test_parameters_that_were_replaced_are_refused_before_anything_is_written():
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    anchor(optimizer)
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    optimizer.param_groups[0]["params"] = [other]
    with pytest.raises(
        RecAdamError, match=r"parameter 0 of shape \(2,\) was replaced by others after anchor\(\) was called"
    ):
        optimizer.step()
    assert other.tolist() == [1.0, 1.0, 1.0]


def test_a_step_is_compiled_around_the_pull():
    model, twin = net(), net()
    optimizer, other = OPTIMIZERS["AdamW"](model), OPTIMIZERS["AdamW"](twin)
    anchor(optimizer, pull=0.3), anchor(other, pull=0.3)
    compiled = torch.compile(optimizer.step)
    for t in range(3):
        step(twin, other, t)
        optimizer.zero_grad()
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(t))
        (10.0 * model(x).square().sum()).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled()
    for x, y in zip(model.parameters(), twin.parameters(), strict=True):
        np.testing.assert_allclose(x.detach(), y.detach(), atol=1e-5)


@pytest.mark.heavy
def test_a_loop_that_is_killed_ends_where_the_uninterrupted_one_does(tmp_path):
    """Killed three times, wherever it happened to be, and started again by the same line."""
    ends = []
    for kills in (0, 3):
        folder = tmp_path / str(kills)
        folder.mkdir()
        command = [sys.executable, HERE / "pulled_worker.py", folder, "60"]
        for until in (*range(10, 10 + 15 * kills, 15), None):
            with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
                began = int(process.stdout.readline().split()[1])
                assert began == 0 or kills
                while until is not None and _step(folder / "latest.pt") < until:
                    time.sleep(0.01)
                if until is not None:
                    process.kill()
            assert process.returncode == (0 if until is None else -9)
        ends.append(torch.load(folder / "latest.pt", weights_only=True))
    assert [end["step"] for end in ends] == [60, 60]
    assert all(torch.equal(x, ends[1]["model"][name]) for name, x in ends[0]["model"].items())
    for i in range(2):
        groups = [end[f"o{i}"]["param_groups"] for end in ends]
        assert groups[0] == groups[1]
        assert groups[0][0]["anchor_step"] == 60


def _step(path):
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def changed(file: Path, how: str) -> None:
    """Do something to a file whose pages are mapped."""
    if how == "cut short":
        os.truncate(file, 100)
    elif how == "overwritten":
        size = file.stat().st_size
        with file.open("r+b") as opened:
            opened.seek(size // 2)
            opened.write(bytes(size - size // 2))
    else:
        os.utime(file)


@pytest.mark.parametrize("how", ["cut short", "overwritten", "touched"])
def test_a_file_whose_pages_are_anchors_is_looked_at_before_each_use(tmp_path, how):
    model, file = net(), tmp_path / "model.safetensors"
    save_file(copies(model), file)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    handle = anchor(optimizer, Anchors.of(model, file, place="file"))
    step(model, optimizer, 1)
    before = copies(model)
    changed(file, how)
    with pytest.raises(RecAdamError, match="was written to while it was mapped"):
        step(model, optimizer, 2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for use in (handle.drift, partial(handle.interpolate, 0.5), handle.at_anchors().__enter__):
        with pytest.raises(RecAdamError, match="was written to while it was mapped"):
            use()


@pytest.mark.parametrize("make", [lambda part: part.parameters(), lambda part: part.named_parameters()])
def test_each_parameter_of_groups_without_full_names_has_its_drift(make):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD([{"params": make(part)} for part in model], lr=0.1)
    handle = anchor(optimizer)
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    drift = handle.drift()
    assert len(drift.parameters) == 4
    assert sum(x.distance**2 for x in drift.parameters.values()) == pytest.approx(drift.distance**2)


def test_a_state_of_the_same_parameters_in_another_order_is_refused():
    def made(names):
        layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in "ab"})
        known = dict(layers.named_parameters())
        optimizer = torch.optim.AdamW([(name, known[name]) for name in names], lr=0.1)
        handle = anchor(optimizer)
        sum(p.sum() for p in known.values()).backward()
        optimizer.step()
        return optimizer, handle

    names = ["a.weight", "a.bias", "b.weight", "b.bias"]
    (saved, _), (other, handle) = made(names), made(names[2:] + names[:2])
    before = other.state_dict()
    with pytest.raises(RecAdamError, match=r"group 0 has 'b.weight' where the state has 'a.weight', and s"):
        other.load_state_dict(saved.state_dict())
    assert str(other.state_dict()) == str(before)
    assert list(handle.anchors) == names[2:] + names[:2]


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e300), (torch.float16, 1e5)])
@pytest.mark.parametrize(
    "pulls", [anchor, lambda optimizer, anchors: RecAdam(optimizer.named, anchors=anchors)]
)
def test_anchors_that_the_parameters_cannot_be_are_refused(pulls, dtype, value):
    model = nn.Linear(2, 2).to(dtype)
    anchors = {name: p.detach().double() for name, p in model.named_parameters()}
    anchors["bias"][0] = -value
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    optimizer.named = list(model.named_parameters())
    with pytest.raises(
        RecAdamError, match=f"'bias' has values beyond {dtype}, the parameter's; give its own"
    ):
        pulls(optimizer, anchors)


def test_a_pull_of_nothing_is_warned_of_where_it_is_called():
    optimizer = torch.optim.SGD(net().named_parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="nothing is pulled, since no parameter of the optimizer") as said:
        anchor(optimizer, {})
    assert said[0].filename == __file__


def test_an_empty_group_needs_no_names():
    model = net()
    optimizer = torch.optim.SGD([{"params": list(model.parameters())}, {"params": [], "lr": 0.01}], lr=0.1)
    handle = anchor(optimizer)
    step(model, optimizer, 1)
    assert handle.drift().distance > 0


def test_a_handle_is_neither_copied_nor_pickled():
    optimizer = torch.optim.SGD(net().named_parameters(), lr=0.1)
    handle = anchor(optimizer)
    for use in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(RecAdamError, match="a handle is its optimizer's, and neither copied nor pickled"):
            use(handle)
    assert repr(handle) == f"AnchorPull(SGD, {len(handle.parameters)} parameters, pull=0.1)"


def test_after_a_checkpoint_in_a_plain_optimizer_another_pull_begins_as_the_error_says():
    model = net()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    anchor(optimizer)
    step(model, optimizer, 1)
    again = torch.optim.SGD(model.named_parameters(), lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    with pytest.raises(RecAdamError, match=r"take the entries anchor_\* out of the optimizer's groups first"):
        anchor(again, copies(model))
    for group in again.param_groups:
        for key in [key for key in group if key.startswith("anchor_")]:
            del group[key]
    assert anchor(again, copies(model)).drift().distance == 0
