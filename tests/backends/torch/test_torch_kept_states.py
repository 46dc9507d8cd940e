"""What others do with an optimizer's state: keep it, hook into it, replace it, clear it, copy it."""

from __future__ import annotations

import collections
import copy
import io
import pickle
import warnings

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from recadam_core import Constant, RecAdamError, Sigmoid
from recadam_torch import Anchors, RecAdam, param_groups

SETTINGS = {"lr": 1e-2, "gamma": 10.0, "annealing": Constant(1.0, 1.0)}
F32 = torch.float32
KEYS = ("step", "exp_avg", "exp_avg_sq")
WAYS = [{}, {"fused": False}, {"foreach": True}, {"exact": True}, {"fused": "numba"}]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def made(model=None, kind=RecAdam, **options):
    model = model or net()
    return model, kind(
        model.named_parameters(), **({**SETTINGS, **options} if kind is RecAdam else {"lr": 1e-2})
    )


def train(model, optimizer, steps):
    for t in steps:
        x = torch.randn(16, 4, generator=torch.Generator("cpu").manual_seed(t), device="cpu", dtype=F32)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def tensors(state):
    """All tensors of a state dict, by where they are."""
    return {
        (i, key): x for i, s in state["state"].items() for key, x in s.items() if isinstance(x, torch.Tensor)
    }


def assert_same(found, expected):
    assert all(map(torch.equal, found, expected))


def assert_equal(found, expected):
    found, expected = tensors(found), tensors(expected)
    assert found.keys() == expected.keys()
    for where, x in found.items():
        assert torch.equal(x, expected[where]), where


# A kept state is one moment.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("saves", [False, True])
def test_a_state_from_before_the_first_step_stays_as_it_was(way, saves):
    """As AdamW's, which is empty then."""
    model, optimizer = made(**way, save_anchors=saves)
    first, second = optimizer.state_dict(), optimizer.state_dict()
    expected = copy.deepcopy(first)
    train(model, optimizer, range(4))
    for kept in (first, second):
        assert_equal(kept, expected)
        assert {float(s["step"]) for s in kept["state"].values()} == {0.0}
    straight = train(model, optimizer, range(4, 6))
    again, other = made(save_anchors=saves)
    other.load_state_dict(first)
    assert_same(train(again, other, range(6)), straight)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [RecAdam, torch.optim.AdamW])
def test_a_state_from_after_a_step_moves_on_whole(way, kind):
    model, optimizer = made(kind=kind, **way)
    train(model, optimizer, range(1))
    kept = optimizer.state_dict()
    train(model, optimizer, range(1, 4))
    assert_equal(kept, optimizer.state_dict())
    assert {float(s["step"]) for s in kept["state"].values()} == {4.0}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: loaded(saved(x))])
def test_a_copy_of_a_state_stays_and_is_no_larger_than_adamw_s(copied):
    sizes = {}
    for kind in (torch.optim.AdamW, RecAdam):
        model, optimizer = made(kind=kind)
        train(model, optimizer, range(3))
        kept = copied(optimizer.state_dict())
        expected = copied(kept)
        train(model, optimizer, range(3, 5))
        assert_equal(kept, expected)
        one = [{key: s[key] for key in KEYS} for s in kept["state"].values()]
        sizes[kind] = saved(one).getbuffer().nbytes
    assert sizes[RecAdam] == sizes[torch.optim.AdamW]


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    return file


def loaded(file, **options):
    file.seek(0)
    return torch.load(file, weights_only=True, **options)


def test_a_parameter_that_was_not_stepped_yet_stays_in_a_kept_state():
    model, optimizer = made()
    head = model[2].weight
    for t in range(2):
        train_without(model, optimizer, head, t)
    kept = optimizer.state_dict()
    train(model, optimizer, range(2, 4))
    assert [float(s["step"]) for s in kept["state"].values()] == [4.0, 4.0, 0.0, 4.0]
    assert not kept["state"][2]["exp_avg"].any()


def train_without(model, optimizer, p, t):
    optimizer.zero_grad()
    model(torch.full((2, 4), float(t + 1))).square().sum().backward()
    p.grad = None
    optimizer.step()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_is_loaded_in_place_before_the_first_step(tmp_path):
    """Distributed checkpoints write into what state_dict() returned."""
    model, optimizer = made()
    train(model, optimizer, range(3))
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
    weights = copy.deepcopy(model.state_dict())
    straight = train(model, optimizer, range(3, 6))
    other, resumed = made()
    other.load_state_dict(weights)
    state = {"optimizer": get_optimizer_state_dict(other, resumed)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other, resumed, state["optimizer"])
    assert_same(train(other, resumed, range(3, 6)), straight)


def test_two_loads_from_one_state_share_nothing():
    model, optimizer = made(save_anchors=True)
    train(model, optimizer, range(2))
    kept = copy.deepcopy(optimizer.state_dict())
    expected = copy.deepcopy(kept)
    pairs = [made() for _ in range(2)]
    for other, resumed in pairs:
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(kept)
    train(*pairs[0], range(2, 5))
    assert_equal(kept, expected)
    assert_equal(pairs[1][1].state_dict(), expected)
    pairs[1][1].state[pairs[1][0][0].weight]["exp_avg"].fill_(7)
    assert_equal(kept, expected)


# accelerate keeps states, and asks whether what it loads is equal.


@pytest.mark.parametrize("safetensors", [True, False])
def test_accelerate_saves_keeps_and_loads_states_as_it_does_adam_s(safetensors, tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def start():
        accelerate.utils.set_seed(42)
        model = nn.Linear(1, 1)
        optimizer = RecAdam(model.parameters(), **SETTINGS)
        batches = torch.utils.data.DataLoader(torch.randn(40, 1), batch_size=8, shuffle=True)
        project = accelerate.utils.ProjectConfiguration(automatic_checkpoint_naming=True)
        accelerator = accelerate.Accelerator(cpu=True, project_dir=tmp_path, project_config=project)
        return accelerator, *accelerator.prepare(model, optimizer, batches)

    def epochs(count, accelerator, model, optimizer, batches):
        for _ in range(count):
            for x in batches:
                accelerator.backward((model(x) - 2 * x - 3).square().mean())
                optimizer.step()
                optimizer.zero_grad()

    def at(model, optimizer):
        return [p.item() for p in model.parameters()], optimizer.state_dict()

    accelerator, model, optimizer, batches = start()
    accelerator.save_state(safe_serialization=safetensors)
    begin = at(model, optimizer)
    epochs(3, accelerator, model, optimizer, batches)
    end = at(model, optimizer)
    assert begin[0] != end[0]

    accelerator, model, optimizer, batches = start()
    accelerator.project_configuration.iteration = 1
    accelerator.load_state(str(tmp_path / "checkpoints" / "checkpoint_0"))
    assert at(model, optimizer) == begin  # every tensor in them is of one number
    epochs(2, accelerator, model, optimizer, batches)
    accelerator.save_state(safe_serialization=safetensors)
    epochs(1, accelerator, model, optimizer, batches)
    accelerator.load_state()  # the last one
    epochs(1, accelerator, model, optimizer, batches)
    assert at(model, optimizer) == end


# Hooks.


def hooked(kind):
    """What hooks saw, and what came out, with every kind of hook there is."""
    seen = []
    model, optimizer = made(kind=kind, **({"save_anchors": False} if kind is RecAdam else {}))
    train(model, optimizer, range(2))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append(sorted(s["state"][0])))
    optimizer.register_state_dict_post_hook(lambda o, s: {"optimizer": s})
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append(sorted(s)))
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append("first"), prepend=True)
    state = copy.deepcopy(optimizer.state_dict())
    other, resumed = made(kind=kind)
    resumed.register_load_state_dict_pre_hook(lambda o, s: seen.append(sorted(s)))
    resumed.register_load_state_dict_pre_hook(lambda o, s: s["optimizer"])
    resumed.register_load_state_dict_post_hook(
        lambda o: seen.append([float(s["step"]) for s in o.state.values()]), prepend=True
    )
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    return seen, state, train(model, optimizer, range(2, 4)), train(other, resumed, range(2, 4))


@pytest.mark.parametrize("kind", [RecAdam, torch.optim.AdamW])
def test_hooks_see_what_is_saved_and_loaded(kind):
    seen, state, straight, again = hooked(kind)
    assert seen[0] == "before"
    assert seen[1] == "first"
    assert seen[2] == sorted([*KEYS, *(["anchor_hash"] if kind is RecAdam else [])])
    assert seen[3:] == [["optimizer"], ["optimizer"], [2.0] * 4]
    assert list(state) == ["optimizer"]
    assert_same(straight, again)


def test_a_hook_that_raises_leaves_no_hook_behind():
    optimizer = made()[1]
    handle = optimizer.register_state_dict_post_hook(lambda o, s: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.state_dict()
    handle.remove()
    state = optimizer.state_dict()
    handle = optimizer.register_load_state_dict_pre_hook(lambda o, s: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.load_state_dict(state)
    handle.remove()
    assert not optimizer._optimizer_state_dict_post_hooks
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


# Distributed checkpoints, which leave out what is frozen.

OPTIONS = [
    {},
    {"full_state_dict": True},
    {"full_state_dict": True, "cpu_offload": True},
    {"flatten_optimizer_state_dict": True},
    {"strict": False},
]


@pytest.mark.filterwarnings("error::UserWarning:recadam_torch")
@pytest.mark.parametrize("kind", [RecAdam, torch.optim.AdamW])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_frozen_parameter_is_missing_in_a_distributed_checkpoint(options, kind):
    def frozen():
        model = net()
        model[0].bias.requires_grad_(False)
        return model

    model, optimizer = made(frozen(), kind)
    train(model, optimizer, range(3))
    options = StateDictOptions(**options)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    weights = copy.deepcopy(model.state_dict())
    straight = train(model, optimizer, range(3, 6))
    other, resumed = made(frozen(), kind)
    other.load_state_dict(weights)
    set_optimizer_state_dict(other, resumed, state, options=options)
    assert_same(train(other, resumed, range(3, 6)), straight)
    if kind is RecAdam:
        assert torch.equal(resumed.state[other[0].bias]["anchor"], other[0].bias)


def test_a_state_that_lacks_a_trained_parameter_starts_it_anew_and_says_so():
    model, optimizer = made()
    train(model, optimizer, range(3))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    del state["state"]["2.weight"]
    other, resumed = made()
    other.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing optimizer state for parameter '2.weight'"):
        set_optimizer_state_dict(other, resumed, state)
    with pytest.warns(UserWarning, match=r"nothing was saved of '2.weight'; moments and step counts start"):
        set_optimizer_state_dict(other, resumed, state, options=StateDictOptions(strict=False))
    entry = resumed.state[other[2].weight]
    assert (float(entry["step"]), float(entry["exp_avg"].abs().sum())) == (0.0, 0.0)
    assert torch.equal(entry["anchor"], net()[2].weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is not anchored at its tuned weights
        train(other, resumed, range(3, 4))
    assert torch.equal(resumed.state[other[2].weight]["anchor"], net()[2].weight)


# States that are put in, parameter by parameter, as ZeroRedundancyOptimizer does.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stop", [3, 40])
def test_a_state_put_in_for_a_parameter_has_its_anchor_found_again(way, stop):
    """Before the anchors are freed, and after."""
    settings = {"annealing": Sigmoid(k=2.0, t0=15)}
    model, optimizer = made(**way, **settings)
    train(model, optimizer, range(stop))
    kept, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    straight = train(model, optimizer, range(stop, stop + 3))
    other, resumed = made(**way, **settings)
    train(other, resumed, range(1))
    other.load_state_dict(weights)
    for i, p in enumerate(other.parameters()):
        resumed.state[p] = dict(kept["state"][i])
    assert_same(train(other, resumed, range(stop, stop + 3)), straight)
    freed = {s["anchor"] is None for s in optimizer.state.values()}
    assert {s["anchor"] is None for s in resumed.state.values()} == freed == {stop == 40}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(anchor_hash=torch.tensor(7)), "the anchor of '0.weight' is another than"),
        (lambda s: s.pop("anchor_hash"), "'0.weight' was saved without an anchor, as a new head"),
        (
            lambda s: s.pop("exp_avg"),
            r"no state for parameter '0.weight' of shape \(8, 4\) \(its exp_avg is None",
        ),
        (lambda s: s.update(step=torch.tensor(torch.nan)), "its step is tensor"),
    ],
)
@pytest.mark.parametrize("way", WAYS[:2])
def test_a_state_put_in_that_does_not_fit_is_refused_before_the_step(change, message, way):
    model, optimizer = made(**way)
    train(model, optimizer, range(2))
    state = dict(optimizer.state_dict()["state"][0])
    change(state)
    optimizer.state[model[0].weight] = state
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RecAdamError, match=f"optimizer.state: .*{message}"):
        optimizer.step()
    assert_same(model.parameters(), before)
    with pytest.raises(RecAdamError, match=message):
        optimizer.state_dict()


@pytest.mark.parametrize("way", WAYS)
def test_an_anchor_taken_out_of_its_state_makes_no_new_head(way):
    model, optimizer = made(**way)
    train(model, optimizer, range(2))
    del optimizer.state[model[0].weight]["anchor"]
    with pytest.raises(RecAdamError, match=r"the anchor of '0.weight' is missing here"):
        optimizer.step()


# Between tasks.

CLEARED = {
    "another dict": lambda o, p: setattr(o, "state", collections.defaultdict(dict)),
    "a cleared dict": lambda o, p: o.state.clear(),
    "a state taken out": lambda o, p: o.state.pop(p),
    "an empty state": lambda o, p: o.state.update({p: {}}),
}


@pytest.mark.parametrize("clear", CLEARED)
@pytest.mark.parametrize("way", WAYS)
def test_a_cleared_state_is_refused_in_one_line_and_the_next_task_starts_all_the_same(clear, way):
    model, optimizer = made(**way)
    train(model, optimizer, range(3))
    tuned = [p.detach().clone() for p in model.parameters()]
    CLEARED[clear](optimizer, model[0].weight)
    for call in (optimizer.step, optimizer.state_dict, optimizer.drift):
        with pytest.raises(RecAdamError) as caught:
            call()
        assert str(caught.value) == (
            "parameter '0.weight' has no state: it was cleared, and its anchor went with it; to start a new "
            "task call reset_moments(), with reanchor=True to anchor it here"
        )
    assert_same(model.parameters(), tuned)
    optimizer.reset_moments()

    other = net()
    anchors = {name: p.detach().clone() for name, p in other.named_parameters()}
    other.load_state_dict(model.state_dict())
    fresh = RecAdam(other.named_parameters(), anchors=anchors, **SETTINGS, **way)
    assert_same(train(model, optimizer, range(3, 6)), train(other, fresh, range(3, 6)))


def test_a_state_emptied_in_place_is_refused_too():
    model, optimizer = made()
    train(model, optimizer, range(2))
    optimizer.state[model[0].weight].clear()
    with pytest.raises(RecAdamError, match=r"'0.weight' has no state: it was cleared"):
        optimizer.step()
    with pytest.raises(
        RecAdamError, match=r"the state of '0.weight' was emptied, and its anchor is lost; call"
    ):
        optimizer.reset_moments()
    optimizer.reset_moments(reanchor=True)
    assert torch.equal(optimizer.state[model[0].weight]["anchor"], model[0].weight)
    train(model, optimizer, range(2))


def test_a_cleared_state_is_loaded_into():
    model, optimizer = made()
    train(model, optimizer, range(3))
    kept = copy.deepcopy(optimizer.state_dict())
    optimizer.state = collections.defaultdict(dict)
    optimizer.load_state_dict(kept)
    other, straight = made()
    assert_same(train(model, optimizer, range(3, 5)), train(other, straight, range(5)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("names", [True, False])
def test_reset_moments_anchors_anew_where_the_weights_are(way, names):
    model = net()
    groups = [model[0], model[2]]
    groups = [
        {"params": list(m.named_parameters(f"{i}") if names else m.parameters()), "anchored": i == 0}
        for i, m in enumerate(groups)
    ]
    optimizer = RecAdam(groups, **SETTINGS, **way)
    train(model, optimizer, range(3))
    kept = optimizer.state_dict()
    before = copy.deepcopy(kept)
    optimizer.reset_moments(reanchor=True)
    assert_equal(kept, before)  # is another task's now
    other = net()
    other.load_state_dict(model.state_dict())
    fresh = RecAdam(
        [{"params": other[0].parameters()}, {"params": other[2].parameters(), "anchored": False}],
        **SETTINGS,
        **way,
    )
    assert_same(train(model, optimizer, range(3, 6)), train(other, fresh, range(3, 6)))
    assert_equal(optimizer.state_dict(), fresh.state_dict())
    assert ["anchor" in s for s in optimizer.state.values()] == [True, True, False, False]


def test_reset_moments_reads_freed_anchors_again(tmp_path):
    path = tmp_path / "pretrained.safetensors"
    save_file(net().state_dict(), path)
    settings = {**SETTINGS, "annealing": Sigmoid(k=2.0, t0=5)}
    model = net()
    optimizer = RecAdam(param_groups(model, Anchors.of(model, path)), **settings)
    train(model, optimizer, range(30))
    assert all(s["anchor"] is None for s in optimizer.state.values())
    optimizer.reset_moments()
    assert_same([s["anchor"] for s in optimizer.state.values()], net().parameters())
    train(model, optimizer, range(30))

    path.unlink()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        RecAdamError, match=r"reset_moments: the anchor of '0.weight' was freed, and is not to be"
    ):
        optimizer.reset_moments()
    assert_equal(optimizer.state_dict(), before)
    optimizer.reset_moments(reanchor=True)
    assert_same([s["anchor"] for s in optimizer.state.values()], model.parameters())
    assert {group["anchor_source"] for group in optimizer.param_groups} == {""}
    with torch.no_grad():
        model[2].bias[0] = torch.inf
    with pytest.raises(RecAdamError, match=r"'2.bias' holds NaN or infinity"):
        optimizer.reset_moments(reanchor=True)
    with optimizer.interpolated(0.5), pytest.raises(RecAdamError, match="the weights are interpolated"):
        optimizer.reset_moments(reanchor=True)


# Copies, modes and defaults.


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_the_optimizer_goes_its_own_way(clone, way):
    model, optimizer = made(**way)
    train(model, optimizer, range(3))
    other, copied = clone((model, optimizer))
    kept = optimizer.state_dict()
    straight = train(other, copied, range(3, 6))
    assert {float(s["step"]) for s in kept["state"].values()} == {3.0}
    assert_same(train(model, optimizer, range(3, 6)), straight)
    assert_equal(kept, copied.state_dict())


def test_a_pickle_without_hashes_and_newer_settings_is_restored():
    model, optimizer = made()
    train(model, optimizer, range(2))
    old = copy.deepcopy(optimizer.__getstate__() | {"model": model})
    for group in old["param_groups"]:
        for name in ("capturable", "differentiable", "rounding", "save_anchors", "anchor_source", "exact"):
            del group[name]
    for entry in old["state"].values():
        del entry["anchor_hash"]
    other = old.pop("model")
    restored = RecAdam.__new__(RecAdam)
    restored.__setstate__(old)
    assert_equal(restored.state_dict(), optimizer.state_dict())
    assert_same(train(model, optimizer, range(2, 5)), train(other, restored, range(2, 5)))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_done_without_gradients_is_as_with_them(mode, way):
    """Made, saved, loaded and looked at; tensors of inference mode could not be stepped."""
    model, straight = net(), train(*made(**way), range(4))
    with mode():
        _, optimizer = made(model, **way)
        kept = optimizer.state_dict()
        optimizer.drift()
    train(model, optimizer, range(2))
    with mode():
        kept = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(loaded(saved(kept)))
    assert_same(train(model, optimizer, range(2, 4)), straight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_defaults_at_the_load_change_nothing(dtype, device):
    model, optimizer = made(net(), fused=False)
    train(model, optimizer, range(2))
    state, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    straight = train(model, optimizer, range(2, 4))
    other, resumed = made(net(), fused=False)
    other.load_state_dict(weights)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        resumed.load_state_dict(state)
        assert_equal(resumed.state_dict(), state)
        resumed.load_state_dict(resumed.state_dict())
        kinds = {(x.dtype, x.device.type) for x in tensors(resumed.state_dict()).values()}
        assert kinds == {(torch.float32, "cpu"), (torch.int64, "cpu")}
        x = train(other, resumed, range(2, 3))
        resumed.reset_moments(reanchor=True)
        assert {(s["exp_avg"].dtype, s["step"].dtype) for s in resumed.state.values()} == {
            (torch.float32, torch.float32)
        }
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert len(x) == len(straight)


def test_a_state_without_data_is_refused():
    model, optimizer = made()
    train(model, optimizer, range(2))
    state = loaded(saved(optimizer.state_dict()), map_location="meta")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        RecAdamError, match=r"no state for parameter 0 of shape \(8, 4\) \(its step is tensor"
    ):
        optimizer.load_state_dict(state)
    assert_equal(optimizer.state_dict(), before)


def test_a_copy_from_before_the_first_step_is_anchored_where_its_training_starts():
    model = nn.Linear(3, 2)
    optimizer = RecAdam(model.named_parameters(), lr=1e-2, gamma=10.0)
    for twin, other in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        twin.load_state_dict({name: x + 1 for name, x in twin.state_dict().items()})
        twin(torch.ones(1, 3)).sum().backward()
        with pytest.warns(UserWarning, match="overwritten after the optimizer was made"):
            other.step()
        assert torch.equal(other.state[twin.weight]["anchor"], model.weight + 1)
