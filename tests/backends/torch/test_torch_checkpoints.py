"""What a checkpoint of the PyTorch optimizer holds, and what it refuses to resume from."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import save_file
from torch import nn

from recadam_core import Constant, RecAdamError, Sigmoid
from recadam_torch import Anchors, RecAdam, param_groups

SETTINGS = {"lr": 1e-2, "gamma": 10.0, "annealing": Sigmoid(k=0.3, t0=15)}


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def train(model, optimizer, steps):
    for t in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t)).to(model[0].weight.dtype)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def saved(**objects):
    file = io.BytesIO()
    torch.save({name: x.state_dict() for name, x in objects.items()}, file)
    return file


def loaded(file):
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_a_checkpoint_is_no_more_than_a_hundredth_larger_than_adamw_s():
    model = nn.Sequential(nn.Embedding(2000, 128), *(nn.Linear(128, 128) for _ in range(4)))
    sizes = {}
    for kind in (torch.optim.AdamW, RecAdam):
        optimizer = kind(model.named_parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        sizes[kind.__name__] = saved(optimizer=optimizer).getbuffer().nbytes
    assert sizes["RecAdam"] / sizes["AdamW"] < 1.01
    with_anchors = saved(optimizer=RecAdam(model.named_parameters(), save_anchors=True))
    assert with_anchors.getbuffer().nbytes > 1.4 * sizes["AdamW"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", ["pretrained again", "file again", "file after tuned weights", "saved"])
@pytest.mark.parametrize("stop", [6, 120])
def test_resumes_bit_for_bit_whatever_the_anchors_come_from(how, dtype, stop, tmp_path):
    """Before the anchors are released, at step 108, and after."""
    model = net(dtype=dtype)
    path = tmp_path / "pretrained.safetensors"
    save_file(net(dtype=dtype).state_dict(), path)

    def make(model, from_file, **options):
        anchors = Anchors.of(model, path) if from_file else None
        return RecAdam(param_groups(model, anchors), **SETTINGS, **options)

    optimizer = make(model, "file" in how, save_anchors=how == "saved")
    train(model, optimizer, range(stop))
    file = saved(model=model, optimizer=optimizer)
    straight = train(model, optimizer, range(stop, stop + 5))

    state = loaded(file)
    # A trainer loads the tuned weights before it makes the optimizer; a script of one's own may not.
    other = net(dtype=dtype)
    if how in ("file after tuned weights", "saved"):
        other.load_state_dict(state["model"])
    resumed = make(other, "file" in how)
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    assert_same(straight, train(other, resumed, range(stop, stop + 5)))
    assert {s["anchor"] is None for s in resumed.state.values()} == {stop > 100}


def test_another_anchor_is_refused_and_nothing_is_loaded(tmp_path):
    path = tmp_path / "pretrained.safetensors"
    save_file(net().state_dict(), path)
    model = net()
    optimizer = RecAdam(param_groups(model, Anchors.of(model, path)), **SETTINGS)
    train(model, optimizer, range(3))
    state = loaded(saved(optimizer=optimizer))["optimizer"]
    path.unlink()
    other = RecAdam(net(seed=1).named_parameters(), **SETTINGS)
    with pytest.raises(RecAdamError) as caught:
        other.load_state_dict(state)
    assert str(caught.value) == (
        f"load_state_dict: the anchor of '0.weight' is another than the checkpoint's ({path}); make the "
        "optimizer with the pretrained weights as anchors=..., or save with save_anchors=True"
    )
    assert {float(s["step"]) for s in other.state.values()} == {0.0}

    # The file is there again, but it was trained on.
    save_file(net(seed=2).state_dict(), path)
    with pytest.raises(RecAdamError, match="is another than the checkpoint's"):
        other.load_state_dict(state)

    new_head = RecAdam(net().named_parameters(), anchors={}, **SETTINGS)
    with pytest.raises(RecAdamError, match=r"'0.weight' is missing here, unlike the checkpoint's"):
        new_head.load_state_dict(state)
    theirs = loaded(saved(optimizer=new_head))["optimizer"]
    with pytest.raises(
        RecAdamError, match=r"'0.weight' was saved without an anchor, as a new head; leave it"
    ):
        other.load_state_dict(theirs)


def test_states_that_hold_their_anchors_still_load():
    """As the first release wrote them: with anchors, without hashes and newer settings."""
    model = net()
    optimizer = RecAdam(model.named_parameters(), **SETTINGS, save_anchors=True)
    train(model, optimizer, range(4))
    state = loaded(saved(optimizer=optimizer))["optimizer"]
    for group in state["param_groups"]:
        for name in ("capturable", "differentiable", "rounding", "save_anchors", "anchor_source", "exact"):
            del group[name]
    for entry in state["state"].values():
        del entry["anchor_hash"]
    other = RecAdam(net(seed=1).named_parameters(), **SETTINGS)
    other.load_state_dict(state)
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert torch.equal(a["anchor"], b["anchor"])
    assert_same(
        [s["anchor_hash"] for s in optimizer.state.values()],
        [s["anchor_hash"] for s in (other.state_dict(), other)[1].state.values()],
    )


def test_what_state_dict_returns_is_written_to_without_harm():
    """Distributed checkpoints load in place: into moments, but not into the proof of the anchors."""
    model = net()
    optimizer = RecAdam(model.named_parameters(), **SETTINGS)
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["anchor_hash"].fill_(7)
    with pytest.raises(RecAdamError, match="is another than the checkpoint's"):
        optimizer.load_state_dict(state)


def test_a_freed_anchor_is_found_again_when_training_goes_back(tmp_path):
    path = tmp_path / "pretrained.safetensors"
    save_file(net().state_dict(), path)
    model = net()
    optimizer = RecAdam(param_groups(model, Anchors.of(model, path)), **SETTINGS)
    train(model, optimizer, range(5))
    file = saved(model=model, optimizer=optimizer)
    straight = train(model, optimizer, range(5, 120))
    assert all(s["anchor"] is None for s in optimizer.state.values())
    state = loaded(file)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert_same(straight, train(model, optimizer, range(5, 120)))


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_roundings_resume_bit_for_bit(rounding):
    def make(model):
        settings = {**SETTINGS, "annealing": Constant(1.0, 1.0)}
        return RecAdam(model.named_parameters(), **settings, rounding=rounding)

    model = net(dtype=torch.bfloat16)
    optimizer = make(model)
    train(model, optimizer, range(5))
    file = saved(model=model, optimizer=optimizer)
    straight = train(model, optimizer, range(5, 10))
    other = net(dtype=torch.bfloat16)
    resumed = make(other)
    state = loaded(file)
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    assert_same(straight, train(other, resumed, range(5, 10)))


def test_a_state_without_residuals_gets_them():
    model = net(dtype=torch.bfloat16)
    optimizer = RecAdam(model.named_parameters(), **SETTINGS)
    state = loaded(saved(optimizer=optimizer))["optimizer"]
    for group in state["param_groups"]:
        del group["rounding"]
    other = RecAdam(net(dtype=torch.bfloat16).named_parameters(), **SETTINGS, rounding="compensated")
    other.load_state_dict(state)
    fresh = net(dtype=torch.bfloat16)
    expected = RecAdam(fresh.named_parameters(), **SETTINGS, rounding="compensated")
    for p, q in zip(other.param_groups[0]["params"], fresh.parameters(), strict=True):
        p.grad = q.grad = torch.full_like(q, 0.01)
    other.step()
    expected.step()
    assert_same(
        [s["residual"] for s in other.state.values()], [s["residual"] for s in expected.state.values()]
    )


def test_drift_says_nothing_of_a_step_before_the_load():
    model = net()
    optimizer = RecAdam(model.named_parameters(), **SETTINGS)
    train(model, optimizer, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.drift().distance > 0
    assert optimizer.drift().pull_share != optimizer.drift().pull_share  # NaN until the next step


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"place": "file"}])
def test_anchors_from_a_file_are_had_again_as_they_were(options, tmp_path):
    """With one that did not move, so that it agrees by chance; under a prefix; in their dtype."""
    path = tmp_path / "pretrained.safetensors"
    save_file({f"bert.{name}": x for name, x in net().state_dict().items()}, path)
    model = net()
    optimizer = RecAdam(param_groups(model, Anchors.of(model, path, **options)), **SETTINGS)
    for t in range(3):
        backward = torch.randn(16, 4, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        model(backward).square().sum().backward()
        model[2].bias.grad = None
        optimizer.step()
    state = loaded(saved(model=model, optimizer=optimizer))
    before = optimizer.interpolate(0.0)
    tuned = net()
    tuned.load_state_dict(state["model"])
    resumed = RecAdam(param_groups(tuned, Anchors.of(tuned, path)), **SETTINGS)
    resumed.load_state_dict(state["optimizer"])
    for a, b in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert torch.equal(a["anchor"], b["anchor"])
        assert a["anchor"].dtype == b["anchor"].dtype

    train(tuned, resumed, range(120))
    assert all(s["anchor"] is None for s in resumed.state.values())
    for name, x in resumed.interpolate(0.0).items():
        assert torch.equal(x, before[name])
    save_file({f"bert.{n}": x.detach().clone() for n, x in tuned.state_dict().items()}, path)  # trained on
    with pytest.raises(RecAdamError, match="was freed, and is not to be had again"):
        resumed.interpolate(0.0)


def test_settings_of_a_checkpoint_are_checked():
    optimizer = RecAdam(net(dtype=torch.bfloat16).named_parameters(), **SETTINGS, rounding="stochastic")
    state = loaded(saved(optimizer=optimizer))["optimizer"]
    other = RecAdam(net(dtype=torch.float16).named_parameters(), **SETTINGS)
    with pytest.raises(RecAdamError, match="is float16; rounding='stochastic' is for bfloat16"):
        other.load_state_dict(state)
    fewer = RecAdam(list(net().parameters())[:2], **SETTINGS)
    with pytest.raises(RecAdamError, match="a group was saved with 4 parameters and has 2; make the groups"):
        fewer.load_state_dict(state)
    kept = loaded(saved(optimizer=RecAdam(net().named_parameters(), save_anchors=True)))["optimizer"]
    kept["state"][0]["anchor"] = kept["state"][0]["anchor"][:1]
    with pytest.raises(RecAdamError, match=r"of shape \(8, 4\) \(its anchor has shape \(1, 4\)\)"):
        RecAdam(net().named_parameters()).load_state_dict(kept)
