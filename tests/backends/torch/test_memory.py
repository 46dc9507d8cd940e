"""One pass over memory goes by addresses: what does not fit is refused, never read or written."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from recadam_core import Coefficients, Constant, RecAdamError
from recadam_torch import Anchors, CoverageWarning, RecAdam

SETTINGS = {"lr": 1e-2, "gamma": 10.0, "annealing": Constant(0.5, 0.5)}
C = Coefficients(0.9, 0.999, 0.01, 1e-8, 0.1, 0.0)


def stepped():
    p = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    optimizer = RecAdam([("w", p)], **SETTINGS)
    p.grad = torch.ones(2, 3)
    optimizer.step()
    return p, optimizer


def test_moments_that_stayed_on_meta():
    with torch.device("meta"):
        p = nn.Parameter(torch.ones(4))
    optimizer = RecAdam([("w", p)], **SETTINGS)
    other = nn.Parameter(torch.ones(4))
    torch.utils.swap_tensors(p, other)
    p.grad = torch.ones(4)
    with pytest.raises(RecAdamError, match="'w' is on cpu, its moments on meta: it was moved; make a new"):
        optimizer.step()


def test_a_storage_that_was_freed():
    p, optimizer = stepped()
    p.grad.untyped_storage().resize_(0)
    with pytest.raises(RecAdamError, match="'w': its gradient is not in memory"):
        optimizer.step()


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"exact": True}])
def test_weights_that_became_wider_than_their_moments(flags):
    p = nn.Parameter(torch.ones(3))
    optimizer = RecAdam([("w", p)], **SETTINGS, **flags)
    p.data = p.data.double()
    p.grad = None
    p.grad = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(
        RecAdamError, match=r"parameter 'w' is torch\.float64 and was torch\.float32; make a new"
    ):
        optimizer.step()


def test_a_parameter_that_was_turned():
    p, optimizer = stepped()
    p.data = p.data.t().contiguous()
    p.grad = None
    p.grad = torch.ones(3, 2)
    before = p.detach().clone()
    with pytest.raises(RecAdamError, match=r"has shape \(3, 2\), its first moment \(2, 3\)"):
        optimizer.step()
    assert torch.equal(p, before)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = (
            nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2)
        )


def test_two_modules_do_not_take_one_stored_tensor_each():
    model = Two()
    with pytest.warns(CoverageWarning, match=r"0\.weight would be head\.0\.weight's as well"):
        anchors = Anchors.of(model, model.encoder.state_dict())
    assert len(anchors) == 0
    with pytest.raises(RecAdamError, match="no anchor for encoder"):
        Anchors.of(model, model.encoder.state_dict(), strict=True)
    told = Anchors.of(model, model.encoder.state_dict(), new=["head.*"], strict=True)
    assert list(told) == [name for name, _ in model.named_parameters() if name.startswith("encoder.")]


def test_anchors_are_a_mapping():
    model = nn.Linear(2, 1)
    anchors = Anchors.of(model, model.state_dict())
    assert "elsewhere" not in anchors
    assert anchors.get("elsewhere") is None


def test_interpolated_ends_are_exact():
    model = nn.Linear(2, 1)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = RecAdam(model.named_parameters(), **SETTINGS)
    with torch.no_grad():
        model.weight[0, 0] = torch.inf
    assert torch.equal(optimizer.interpolate(0)["weight"], kept["weight"])
    assert torch.equal(optimizer.interpolate(1)["weight"], model.weight)
    with pytest.raises(RecAdamError, match="interpolate: alpha is nan; give a finite number"):
        optimizer.interpolate(float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"][0].update(exp_avg_sq=torch.ones(5)), "no state for parameter 0 of shape"),
        (
            lambda s: s["state"][0].update(exp_avg=torch.ones(2, 3, dtype=torch.int64)),
            "no state for parameter 0",
        ),
        (lambda s: s["state"][0].update(step=3), "no state for parameter 0"),
        (
            lambda s: s["param_groups"][0].update(lr=-1.0),
            r"load_state_dict: lr is -1\.0; give a finite number",
        ),
    ],
)
def test_a_broken_state_is_not_loaded(change, message):
    _, optimizer = stepped()
    state = optimizer.state_dict()
    state = {**state, "state": {0: dict(state["state"][0])}, "param_groups": [dict(state["param_groups"][0])]}
    change(state)
    with pytest.raises(RecAdamError, match=message):
        stepped()[1].load_state_dict(state)
