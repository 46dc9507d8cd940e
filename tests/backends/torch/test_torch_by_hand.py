"""What users of the PyTorch optimizer do by hand between steps: seen, or refused with nothing changed."""

from __future__ import annotations

import copy
import warnings

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from recadam_core import Constant, RecAdamError
from recadam_torch import Anchors, RecAdam, param_groups

K = {"lr": 0.01, "gamma": 10.0, "annealing": Constant(1.0, 1.0)}


def made(**more):
    w = nn.Parameter(torch.zeros(2))
    return w, RecAdam([("w", w)], **{**K, **more})


def step(w, optimizer, grad=0.0):
    w.grad = torch.full_like(w, grad)
    optimizer.step()


def in_place(optimizer, w):
    optimizer.state[w]["anchor"].fill_(5.0)


def another_tensor(optimizer, w):
    optimizer.state[w]["anchor"] = torch.full((2,), 5.0)


def other_data(optimizer, w):
    optimizer.state[w]["anchor"].data = torch.full((2,), 5.0)


by_hand = pytest.mark.parametrize("by_hand", [in_place, another_tensor, other_data])


@by_hand
@pytest.mark.parametrize("save_anchors", [False, True])
def test_an_anchor_set_by_hand_is_hashed_anew(by_hand, save_anchors):
    w, optimizer = made(save_anchors=save_anchors)
    step(w, optimizer)
    optimizer.state_dict()
    by_hand(optimizer, w)
    step(w, optimizer)
    saved = optimizer.state_dict()
    _, other = made(save_anchors=save_anchors)
    if save_anchors:
        other.load_state_dict(saved)
        assert torch.equal(next(iter(other.state.values()))["anchor"], torch.full((2,), 5.0))
    else:
        with pytest.raises(RecAdamError, match=r"the anchor of 'w' is another than the checkpoint's"):
            other.load_state_dict(saved)


@by_hand
def test_an_anchor_set_by_hand_before_the_first_step_stays(by_hand):
    w, optimizer = made()
    by_hand(optimizer, w)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(w, optimizer)
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.5))  # a tenth of the way to 5


@pytest.mark.parametrize("way", [{}, {"fused": False}, {"foreach": True}, {"exact": True}])
def test_what_is_put_into_the_state_later_counts_from_the_next_step(way):
    w, optimizer = made(anchors={"w": torch.ones(2)}, **way)
    step(w, optimizer)
    before = w.detach().clone()
    optimizer.state[w]["importance"] = torch.zeros(2)
    step(w, optimizer)
    assert torch.equal(w, before)  # nothing is important
    head, optimizer = made(anchors={}, **way)
    step(head, optimizer)
    optimizer.state[head]["anchor"] = torch.ones(2)
    step(head, optimizer)
    torch.testing.assert_close(head.detach(), torch.full((2,), 0.1))


def test_no_importance_in_the_state_is_an_importance_of_one():
    w, optimizer = made(anchors={"w": torch.ones(2)}, importance={"w": torch.zeros(2)})
    optimizer.state[w]["importance"] = None
    step(w, optimizer)
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.1))


@pytest.mark.parametrize("form", ["proximal", "released"])
def test_a_form_that_takes_no_importance_is_refused_in_mid_run(form):
    w, optimizer = made(anchors={"w": torch.ones(2)}, importance={"w": torch.ones(2)})
    step(w, optimizer, 1.0)
    before = w.detach().clone()
    optimizer.param_groups[0]["form"] = form
    with pytest.raises(RecAdamError, match="importance needs form='decoupled'"):
        step(w, optimizer, 1.0)
    assert torch.equal(w, before)


RATES = [-0.01, float("nan"), "a", None, True, torch.tensor([1e-3]), torch.tensor(1j)]


@pytest.mark.parametrize("lr", RATES, ids=str)
def test_a_rate_is_checked_in_every_step_that_is_capturable(lr):
    w, optimizer = made(capturable=True)
    step(w, optimizer, 1.0)
    before = w.detach().clone()
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(RecAdamError, match="lr is"):
        step(w, optimizer, 1.0)
    assert torch.equal(w, before)


def test_a_first_step_that_is_refused_leaves_the_anchors():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = RecAdam([("a", a), ("b", b)], **K)
    a.data.fill_(1.0)
    a.grad, b.grad = torch.zeros(2), torch.zeros(2).to_sparse()
    with pytest.warns(UserWarning, match="'a' was overwritten"), pytest.raises(RecAdamError, match="sparse"):
        optimizer.step()
    assert torch.equal(optimizer.state[a]["anchor"], torch.zeros(2))
    a.data.fill_(2.0)
    b.grad = torch.zeros(2)
    with pytest.warns(UserWarning, match="'a' was overwritten"):
        optimizer.step()
    assert torch.equal(optimizer.state[a]["anchor"], torch.full((2,), 2.0))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("keys", [["exp_avg"], ["exp_avg_sq"], ["exp_avg", "exp_avg_sq"]])
@pytest.mark.parametrize("loads", [False, True])
def test_moments_of_sixteen_bits_are_widened(exact, keys, loads):
    w, optimizer = made(exact=exact)
    step(w, optimizer, 1.0)
    state = optimizer.state[w]
    if loads:
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0].update({key: saved["state"][0][key].bfloat16() for key in keys})
        optimizer.load_state_dict(saved)
    else:
        state.update({key: state[key].bfloat16() for key in keys})
    step(w, optimizer, 1.0)
    for key in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[w][key].dtype == torch.float32
    assert optimizer.state[w]["exp_avg"][0].item() == pytest.approx(0.19, rel=1e-2)


def test_a_leaf_is_no_parameter_of_a_differentiable_step():
    w, optimizer = made(differentiable=True)
    with pytest.raises(RecAdamError, match="'w' is a leaf"):
        step(w, optimizer, 1.0)
    assert not optimizer.state[w]["exp_avg"].any()


@pytest.mark.parametrize("source", [lambda m: m.state_dict(), lambda m: m])
def test_anchors_are_the_model_s_values_when_they_were_taken(source):
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    anchors = Anchors.of(model, source(model))
    model.weight.data.fill_(9.0)
    optimizer = RecAdam(param_groups(model, anchors), **K)
    assert torch.equal(optimizer.state[model.weight]["anchor"], before)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ([nn.Parameter(torch.zeros(1))], "RecAdam: a group is [Parameter containing"),
        ({}, "RecAdam: a group is {}; give a dict with its parameters under 'params'"),
        (None, "RecAdam: a group is None; give a dict"),
        ({"params": [nn.Parameter(torch.zeros(1))], "anchor": False}, "unknown setting of a group: 'anchor'"),
        ({"params": [nn.Parameter(torch.zeros(1))], "gama": 1.0}, "unknown setting of a group: 'gama': did"),
    ],
)
def test_what_is_no_group_is_refused(group, message):
    _, optimizer = made()
    with pytest.raises(RecAdamError) as caught:
        optimizer.add_param_group(group)
    assert str(caught.value).startswith(message)
    assert len(optimizer.param_groups) == 1


def test_a_group_may_have_words_of_its_own():
    p = nn.Parameter(torch.zeros(1))
    groups = RecAdam([{"params": [p], "name": "head", "initial_lr": 1.0, "max_lr": 2.0}]).param_groups
    assert groups[0]["name"] == "head"


@pytest.mark.parametrize(
    "count", [torch.tensor(float("nan")), torch.tensor(float("inf")), torch.zeros((), device="meta")]
)
def test_a_count_that_is_none_is_refused_in_the_first_step(count):
    w, optimizer = made()
    optimizer.state[w]["step"] = count
    with pytest.raises(RecAdamError, match=r"the step of 'w' is .*, no count|no state for parameter 'w'"):
        step(w, optimizer)


@pytest.mark.parametrize("flag", ["False", 0, None])
def test_reanchor_is_true_or_false(flag):
    _, optimizer = made()
    with pytest.raises(RecAdamError, match="reset_moments: reanchor is"):
        optimizer.reset_moments(reanchor=flag)


def test_a_group_of_another_optimizer_is_refused():
    w, optimizer = made()
    optimizer.param_groups.append(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).param_groups[0])
    with pytest.raises(RecAdamError):
        step(w, optimizer)
    assert torch.equal(w, torch.zeros(2))


# What subclasses and wrappers do with the object itself.


class OwnGroups(RecAdam):
    """Makes groups of its own, of the parameters alone."""

    def add_param_group(self, param_group):
        super().add_param_group({"params": param_group["params"], "lr": 0.005})


class Sequence:
    """Can be iterated by its items alone."""

    def __init__(self, items):
        self.items = items

    def __getitem__(self, i):
        return self.items[i]


@pytest.mark.parametrize("make", [OwnGroups, lambda params, **more: RecAdam(Sequence(params), **more)])
def test_anchors_and_importance_of_the_constructor_reach_every_group(make):
    w = nn.Parameter(torch.ones(2))
    anchors, importance = {"w": torch.zeros(2)}, {"w": torch.tensor([0.5, 1.0])}
    optimizer = make([("w", w)], anchors=anchors, importance=importance)
    assert optimizer.state[w]["anchor"].tolist() == [0.0, 0.0]
    assert optimizer.state[w]["importance"].tolist() == [0.5, 1.0]
    late = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [("late", late)]})  # those were for the constructor's groups
    assert optimizer.state[late]["anchor"].tolist() == [1.0, 1.0]
    assert "importance" not in optimizer.state[late]


class Wrapper(RecAdam):
    """Takes the place of another, as some trainers' wrappers do."""

    def __init__(self, optimizer):
        self.__dict__.update(optimizer.__dict__)


def test_an_optimizer_may_live_on_in_another_object():
    w, optimizer = made(annealing=Constant(1.0, 0.0))
    step(w, optimizer)
    wrapper = Wrapper(optimizer)
    del optimizer
    step(w, wrapper)
    assert int(wrapper.state_dict()["state"][0]["step"]) == 2


class WholeCopies(RecAdam):
    """Copies and pickles all that it has."""

    def __getstate__(self):
        return self.__dict__.copy()


def test_a_copy_of_everything_steps_alone():
    w = nn.Parameter(torch.zeros(2))
    optimizer = WholeCopies([("w", w)], **K)
    step(w, optimizer, 1.0)
    other = copy.deepcopy(optimizer)
    (theirs,) = other.param_groups[0]["params"]
    before = w.detach().clone()
    step(theirs, other, 1.0)
    assert torch.equal(w, before)
    step(w, optimizer, 1.0)
    assert torch.equal(theirs, w)


def test_names_that_collide_have_figures():
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = RecAdam([("a", a), ("a", b), ("a (1)", c)])
    assert optimizer.drift().distance == 0.0


def test_a_group_that_is_refused_is_shown_as_it_was_given():
    with pytest.raises(RecAdamError, match=r"^RecAdam: a group is \{\}; give a dict"):
        RecAdam([{}])
