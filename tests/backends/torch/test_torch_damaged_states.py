"""States that no RecAdam saved: refused in one line with nothing changed, or loaded as AdamW loads them."""

from __future__ import annotations

import copy
import math
import os
import socket
import stat
import warnings

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from recadam_core import Constant, RecAdamError
from recadam_torch import Anchors, RecAdam, param_groups, sources
from recadam_torch.checkpoints import take_hashes

SETTINGS = {"lr": 1e-2, "gamma": 10.0, "annealing": Constant(1.0, 1.0)}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def groups_of(model):
    """Two groups: one is anchored, one is a new head."""
    return [
        {"params": [(f"0.{name}", p) for name, p in model[0].named_parameters()]},
        {"params": [(f"2.{name}", p) for name, p in model[2].named_parameters()], "anchored": False},
    ]


def step(model, optimizer, t):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(t))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def made(steps=2, **options):
    model = net()
    optimizer = RecAdam(groups_of(model), **SETTINGS, **options)
    for t in range(steps):
        step(model, optimizer, t)
    return model, optimizer


def bits(x):
    """A value as something that is equal only to itself, NaN included."""
    if isinstance(x, torch.Tensor):
        flat = x.detach().reshape(-1).contiguous()
        return (
            str(x.dtype),
            str(x.device),
            tuple(x.shape),
            flat.view(torch.uint8).tolist() if flat.numel() else [],
        )
    if isinstance(x, dict):
        return {key: bits(value) for key, value in x.items() if key != "params"}
    return [bits(value) for value in x] if isinstance(x, (list, tuple)) else repr(x)


def all_of(optimizer):
    """All that a load could change: groups, and the states with their tensors' identities."""
    take_hashes(optimizer.state.values())
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return (
        bits(optimizer.param_groups),
        [bits(p) for p in params],
        [(id(p), bits(state), {k: id(x) for k, x in state.items()}) for p, state in optimizer.state.items()],
        list(map(id, params)),
    )


def assert_refused(optimizer, state, match=""):
    before = all_of(optimizer)
    with pytest.raises(RecAdamError, match=match) as caught:
        optimizer.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert all_of(optimizer) == before
    return str(caught.value)


def changed(change, **options):
    state = copy.deepcopy(made(**options)[1].state_dict())
    return found if (found := change(state)) is not None else state


def of_group(key, value):
    return lambda s: s["param_groups"][0].update({key: value})


def of_state(key, value):
    return lambda s: s["state"][0].update({key: value})


def without(*path):
    def change(s):
        for key in path[:-1]:
            s = s[key]
        del s[path[-1]]

    return change


def by_name(s):
    names = [name for group in s["param_groups"] for name in group["param_names"]]
    return {**s, "state": {names[i]: x for i, x in s["state"].items()}}


def twice(s):
    s["param_groups"][1]["params"] = s["param_groups"][0]["params"]


def theirs(kind, **options):
    model = net()
    optimizer = kind(model.parameters(), lr=1e-2, **options)
    step(model, optimizer, 0)
    return optimizer.state_dict()


sparse = torch.zeros(4, 3).to_sparse()
nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
DAMAGES = {
    "nothing": (lambda s: {}, "a state has a dict 'state' and a list 'param_groups'"),
    "negative second moments": (of_state("exp_avg_sq", torch.full((4, 3), -1.0)), "has numbers below 0"),
    "an entry without data": (of_state("more", torch.ones(2, device="meta")), "its 'more' is without data"),
    "a nested importance": (
        of_state("importance", nested),
        "its importance is sparse or nested",
    ),
    "no groups": (without("param_groups"), "a state has a dict 'state' and a list 'param_groups'"),
    "no states": (without("state"), "a state has a dict 'state' and a list 'param_groups'"),
    "groups of another type": (lambda s: {**s, "param_groups": {}}, "a list 'param_groups'"),
    "states in a list": (lambda s: {**s, "state": list(s["state"].values())}, "a dict 'state'"),
    "groups that are none": (lambda s: {**s, "param_groups": [1, None]}, "is another optimizer's"),
    "fewer groups": (lambda s: {**s, "param_groups": s["param_groups"][:1]}, "has 1 groups"),
    "more groups": (lambda s: {**s, "param_groups": s["param_groups"] * 2}, "has 4 groups"),
    "AdamW's": (lambda s: theirs(torch.optim.AdamW), "is another optimizer's"),
    "SGD's": (lambda s: theirs(torch.optim.SGD, momentum=0.9), "is another optimizer's"),
    "no params": (without("param_groups", 0, "params"), "is another optimizer's"),
    "params of another type": (of_group("params", 3), "the state is damaged"),
    "params that are lists": (of_group("params", [[0], [1]]), "the state is damaged"),
    "fewer params": (of_group("params", [0]), "was saved with 1 parameters and has 2"),
    "params twice": (twice, "0 are 2 parameters"),
    "more names": (of_group("param_names", ["0.weight", "0.bias", "x"]), r"saved as \['0.weight', "),
    "other names": (of_group("param_names", ["0.weight", "x"]), "'0.bias' was saved as 'x'"),
    "names of another type": (of_group("param_names", [1, 2]), "the state is damaged"),
    "no betas": (without("param_groups", 0, "betas"), "a group has no 'betas'"),
    "no flag": (without("param_groups", 1, "maximize"), "a group has no 'maximize'"),
    "a wrong rate": (of_group("lr", "1e-3"), "lr is '1e-3'"),
    "a wrong strength": (of_group("gamma", math.nan), "gamma is nan"),
    "wrong betas": (of_group("betas", [[0.9], {}]), "."),
    "a wrong annealing": (of_group("annealing", {"kind": ["x"]}), "."),
    "an annealing that is none": (of_group("annealing", object()), "."),
    "a wrong form": (of_group("form", {}), "."),
    "a wrong flag": (of_group("exact", "yes"), "exact is 'yes'"),
    "a wrong rounding": (of_group("rounding", []), "rounding"),
    "a wrong dtype of anchors": (of_group("anchor_dtype", "__class__"), "anchors were kept as"),
    "a dtype of anchors that is none": (of_group("anchor_dtype", 7), "the state is damaged"),
    "an integer dtype of anchors": (of_group("anchor_dtype", "int64"), "anchors were kept as"),
    "a wrong place of anchors": (of_group("anchor_place", "the moon"), "anchors were kept as"),
    "a source that is none": (of_group("anchor_source", ["x"]), "anchors were kept as"),
    "states by name": (by_name, "a state of '0.weight', which no group has"),
    "a state of another": (lambda s: s["state"].update({17: s["state"][0]}), "a state of 17, which no"),
    "no trained state": (lambda s: s["state"].clear(), "nothing was saved"),
    "a state that is none": (lambda s: s["state"].update({0: 5}), r"of shape \(4, 3\) \(it is 5\)"),
    "an empty state": (lambda s: s["state"].update({0: {}}), "its step is None, no count"),
    "no moment": (without("state", 0, "exp_avg"), r"its exp_avg is None"),
    "a moment of another shape": (of_state("exp_avg", torch.zeros(3, 4)), r"its exp_avg has shape \(3, 4\)"),
    "a moment of integers": (of_state("exp_avg", torch.zeros(4, 3).long()), "its exp_avg is torch.int64"),
    "a complex moment": (of_state("exp_avg_sq", torch.zeros(4, 3) * 1j), "its exp_avg_sq is torch.complex64"),
    "a sparse moment": (of_state("exp_avg", sparse), "its exp_avg is sparse"),
    "a moment without data": (of_state("exp_avg", torch.zeros(4, 3).to("meta")), "exp_avg is without data"),
    "a moment of NumPy": (of_state("exp_avg", np.zeros((4, 3))), "its exp_avg is array"),
    "a moment that is a list": (of_state("exp_avg", [[0.0] * 3] * 4), "its exp_avg is "),
    "a step of NaN": (of_state("step", torch.tensor(math.nan)), r"its step is tensor\(nan\)"),
    "an infinite step": (of_state("step", torch.tensor(math.inf)), r"its step is tensor\(inf\)"),
    "a negative step": (of_state("step", torch.tensor(-1.0)), r"its step is tensor\(-1.\)"),
    "half a step": (of_state("step", torch.tensor(1.5)), r"its step is tensor\(1.5000\)"),
    "a huge step": (of_state("step", torch.tensor(1e30)), r"its step is tensor\(1.0000e\+30\)"),
    "two steps": (of_state("step", torch.tensor([1.0, 1.0])), "its step is tensor"),
    "a true step": (of_state("step", torch.tensor(True)), "its step is tensor"),
    "a step without data": (of_state("step", torch.tensor(1.0, device="meta")), "its step is tensor"),
    "a floating hash": (of_state("anchor_hash", torch.tensor(1.0)), r"its anchor_hash is tensor\(1.\)"),
    "a hash that is none": (of_state("anchor_hash", None), "its anchor_hash is None"),
    "another hash": (of_state("anchor_hash", torch.tensor(5)), "the anchor of '0.weight' is another than"),
    "no hash": (without("state", 0, "anchor_hash"), "'0.weight' was saved without an anchor, as a new head"),
    "a hash of a new head": (
        lambda s: s["state"][2].update(anchor_hash=torch.tensor(5)),
        "the anchor of '2.weight' is missing here",
    ),
    "a wrong residual": (of_state("residual", torch.zeros(1)), r"its residual has shape \(1,\)"),
    "an importance": (of_state("importance", torch.ones(4, 3)), r"\(4, 3\) and has no importance"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_in_one_line_and_changes_nothing(damage):
    change, message = DAMAGES[damage]
    model, optimizer = made(steps=3)
    assert_refused(optimizer, changed(change), message)
    step(model, optimizer, 3)
    straight, other = made(steps=4)
    assert all(map(torch.equal, model.parameters(), straight.parameters()))
    assert bits(optimizer.state_dict()) == bits(other.state_dict())


@pytest.mark.parametrize("state", [None, [], 5, "optimizer.pt", object()])
def test_what_is_no_dict_is_refused(state):
    assert_refused(made()[1], state, "load_state_dict: .*; give what RecAdam's")


def flip_a_bit(x):
    x.view(torch.int32)[0, 0] ^= 1
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_a_bit, "the saved anchor of '0.weight' is not the one that its hash is of"),
        (lambda x: x.fill_(math.nan), "the saved anchor of '0.weight' is not the one"),
        (lambda x: x + 1, "the saved anchor of '0.weight' is not the one"),
        (lambda x: x.bfloat16(), "the saved anchor of '0.weight' is not the one"),
        (lambda x: x.long(), "its anchor is torch.int64"),
        (lambda x: x.flip(0), "the saved anchor of '0.weight' is not the one"),
        (lambda x: x.T, r"its anchor has shape \(3, 4\)"),
        (lambda x: x.numpy(), "its anchor is array"),
    ],
)
def test_a_saved_anchor_is_held_against_its_hash(change, message):
    state = changed(lambda s: s["state"][0].update(anchor=change(s["state"][0]["anchor"])), save_anchors=True)
    assert_refused(made()[1], state, message)


def test_a_saved_anchor_needs_its_hash_and_may_be_wider():
    for change in (without("state", 0, "anchor_hash"), of_state("anchor_hash", torch.tensor(0))):
        assert_refused(made()[1], changed(change, save_anchors=True), "its anchor has no hash")
    optimizer = made()[1]
    state = changed(
        lambda s: s["state"][0].update(anchor=s["state"][0]["anchor"].double()), save_anchors=True
    )
    optimizer.load_state_dict(state)
    assert torch.equal(
        optimizer.state[optimizer.param_groups[0]["params"][0]]["anchor"], net()[0].weight.double()
    )


# Where a checkpoint says that its anchors are from.


def fifo(folder):
    os.mkfifo(folder / "fifo.safetensors")
    return folder / "fifo.safetensors"


def link_to_fifo(folder):
    (folder / "link.safetensors").symlink_to(fifo(folder))
    return folder / "link.safetensors"


def folder_with_fifo(folder):
    os.mkfifo(folder / "model.safetensors")
    return folder


def unix_socket(folder):
    path = folder / "s.bin"
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path.relative_to(os.getcwd())))
    assert stat.S_ISSOCK(path.stat().st_mode)
    return path


def the_right_file(folder):
    save_file(net().state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def a_pickle(folder):
    torch.save(net().state_dict(), folder / "model.bin")
    return folder / "model.bin"


@pytest.mark.parametrize(
    "source",
    [lambda _: "evil/repo", lambda _: "/dev/zero", lambda _: "/dev/stdin", lambda _: "", lambda _: "\0",
     lambda _: "a\nb", fifo, link_to_fifo, folder_with_fifo, unix_socket, the_right_file, a_pickle, str],
)  # fmt: skip
def test_a_path_that_the_checkpoint_alone_names_is_not_opened(source, tmp_path, monkeypatch):
    """Not even the right file: who wants it read takes anchors from it."""
    monkeypatch.chdir(tmp_path)
    path = str(source(tmp_path))
    model = net()
    optimizer = RecAdam(groups_of(model), **SETTINGS)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0].update(anchor_source=path, anchor_names=("0.weight", "0.bias"))
    tuned = net(seed=1)
    other = RecAdam(groups_of(tuned), **SETTINGS)

    def refuse(*_):
        raise AssertionError("a file was opened")

    for name in ("_from_hub", "_open_path", "_found"):
        monkeypatch.setattr(sources, name, refuse)
    message = assert_refused(other, state, "the anchor of '0.weight' is another than the checkpoint's")
    assert (f"({path})" in message) == bool(path and path.isprintable())
    # With the anchors at hand it loads, and the path is forgotten.
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["anchor_source"] == ""


def test_the_user_s_own_file_is_read_again_and_no_other_that_takes_its_place(tmp_path):
    path = the_right_file(tmp_path)
    model = net()
    narrow = Anchors.of(model, path, new=["2.*"], dtype=torch.bfloat16)
    optimizer = RecAdam(param_groups(model, narrow), **SETTINGS)
    step(model, optimizer, 0)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["anchor_source"] = "evil/repo"
    tuned = net()
    resumed = RecAdam(param_groups(tuned, Anchors.of(tuned, path, new=["2.*"])), **SETTINGS)
    resumed.load_state_dict(state)  # in the dtype that the checkpoint says
    assert resumed.state[tuned[0].weight]["anchor"].dtype == torch.bfloat16
    assert resumed.param_groups[0]["anchor_source"] == str(path)

    again = RecAdam(param_groups(tuned, Anchors.of(tuned, path, new=["2.*"])), **SETTINGS)
    path.unlink()
    os.mkfifo(path)
    assert_refused(again, state, "the anchor of '0.weight' is another")


# Anything anywhere.


def paths_in(state):
    """Where there is something to change: keys from the top."""
    found = [()]
    for path in found:
        at = state
        for key in path:
            at = at[key]
        if isinstance(at, dict):
            found += [(*path, key) for key in at]
        elif isinstance(at, list):
            found += [(*path, key) for key in range(len(at))]
    return found[1:]


TENSORS = [torch.zeros(4, 3), torch.full((4, 3), math.nan), torch.tensor(3.0), torch.tensor(-7),
           torch.ones(2, 2), torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3, device="meta"), sparse,
           torch.zeros(4, dtype=torch.bool), torch.tensor(2**40), torch.zeros(0)]  # fmt: skip
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4),
    st.sampled_from(TENSORS), st.sampled_from([object(), np.float32(2), np.zeros(3), {}, [], ()]),
    st.sampled_from([{1}, 1j, len]),
    st.lists(st.integers(0, 5), max_size=4), st.dictionaries(st.integers(0, 4), st.none(), max_size=3),
)  # fmt: skip


def refused(call, *args):
    try:
        call(*args)
    except RecAdamError as error:
        return str(error)
    return ""


@settings(max_examples=150)
@given(data=st.data())
def test_a_state_changed_at_random_is_refused_or_steps(data):
    state = changed(lambda s: None, save_anchors=data.draw(st.booleans()))
    model, optimizer = made(steps=1)
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from(paths_in(state)))
        at = state
        for key in path:
            at = at[key]
        how = data.draw(st.sampled_from(["put", "delete", "move"]))
        if how == "put":
            at[last] = data.draw(JUNK)
        elif how == "delete":
            del at[last]
        elif isinstance(at, dict):
            at[data.draw(st.one_of(st.integers(0, 5), st.text(max_size=3)))] = at.pop(last)
    before = all_of(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if error := refused(optimizer.load_state_dict, state):
            assert "\n" not in error
            assert all_of(optimizer) == before
            return
    # What was let in is what a step takes, or refuses in one line, and what is saved again loads again.
    saved = copy.deepcopy(optimizer.state_dict())
    made()[1].load_state_dict(saved)
    if error := refused(step, model, optimizer, 1):
        assert "\n" not in error
    else:
        counts = [int(s["step"]) for s in saved["state"].values()]
        assert [int(s["step"]) for s in optimizer.state_dict()["state"].values()] == [n + 1 for n in counts]
