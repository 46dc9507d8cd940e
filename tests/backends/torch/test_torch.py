"""`recadam_torch.RecAdam` as a torch.optim citizen."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from recadam_core import Constant, Linear, RecAdamError, Sigmoid
from recadam_torch import RecAdam

SETTINGS = {"lr": 1e-2, "gamma": 10.0, "annealing": Sigmoid(k=0.3, t0=15)}


def model(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(dtype)


def backward(net, t):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t)).to(next(net.parameters()).dtype)
    net.zero_grad()
    loss = net(x).square().sum()
    loss.backward()
    return loss


def train(net, optimizer, steps):
    for t in steps:
        backward(net, t)
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("form", ["decoupled", "proximal"])
def test_without_anchors_it_is_adamw(weight_decay, form):
    ours, theirs = model(), model()
    a = RecAdam(ours.named_parameters(), lr=1e-2, weight_decay=weight_decay, anchors={}, form=form)
    b = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=weight_decay)
    for x, y in zip(train(ours, a, range(100)), train(theirs, b, range(100)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_foreach_and_single_give_the_same_bits():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        runs = []
        for foreach in (False, True):
            net = model(dtype)
            runs.append(train(net, RecAdam(net.named_parameters(), foreach=foreach, **SETTINGS), range(40)))
        assert_same(*runs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stop", [7, 120])
def test_resumes_bit_for_bit_from_a_weights_only_checkpoint(dtype, stop):
    """Before the anchors are released (step 108) and after."""
    net = model(dtype)
    optimizer = RecAdam(net.named_parameters(), **SETTINGS)
    train(net, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    straight = train(net, optimizer, range(stop, stop + 10))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = model(dtype)  # as it was pretrained
    resumed = RecAdam(other.named_parameters(), **SETTINGS)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for state in resumed.state.values():
        assert state["exp_avg"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (state["anchor"] is None) == (stop == 120)
    assert_same(straight, train(other, resumed, range(stop, stop + 10)))


def test_loading_shares_no_memory_with_the_checkpoint():
    net = model()
    optimizer = RecAdam(net.named_parameters(), **SETTINGS)
    saved = optimizer.state_dict()
    resumed = RecAdam(model().named_parameters(), **SETTINGS)
    resumed.load_state_dict(saved)
    pointers = {x.data_ptr() for s in saved["state"].values() for x in s.values()}
    for state in resumed.state.values():
        assert not pointers & {x.data_ptr() for x in state.values()}


def test_a_group_of_the_future_is_checked_like_any_other():
    net = model()
    optimizer = RecAdam([{"params": net[0].parameters()}], **SETTINGS)
    train(net, optimizer, range(3))
    optimizer.add_param_group({"params": net[2].parameters(), "anchored": False, "lr": 1e-3})
    assert "anchor" not in optimizer.state[net[2].weight]
    train(net, optimizer, range(2))
    assert (optimizer.state[net[0].weight]["step"], optimizer.state[net[2].weight]["step"]) == (5, 2)
    for bad in ({"gamma": -1}, {"form": "x"}, {"lr": float("nan")}, {"annealing": {"name": "x"}}):
        with pytest.raises(RecAdamError):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], **bad})
    assert len(optimizer.param_groups) == 2


def test_each_group_has_its_own_policy():
    net = model()
    groups = [
        {"params": net[0].parameters(), "annealing": Constant(0.0, 1.0), "gamma": 50.0},
        {"params": net[2].parameters(), "anchored": False},
    ]
    optimizer = RecAdam(groups, lr=1e-2)
    before = [p.detach().clone() for p in net.parameters()]
    after = train(net, optimizer, range(5))
    assert_same(before[:2], after[:2])  # a task weight of 0 at the anchor: nothing moves
    assert all((a - b).abs().min() > 0.005 for a, b in zip(after[2:], before[2:], strict=True))


def test_parameters_without_gradient_stay_and_keep_their_own_step_count():
    net = model()
    optimizer = RecAdam(net.named_parameters(), **SETTINGS)
    backward(net, 0)
    net[0].weight.grad = None
    before = net[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(net[0].weight, before)
    assert (optimizer.state[net[0].weight]["step"], optimizer.state[net[0].bias]["step"]) == (0, 1)


def test_closure_is_called_with_gradients_on_and_its_loss_returned():
    net = model()
    optimizer = RecAdam(net.named_parameters(), **SETTINGS)
    assert optimizer.step(lambda: backward(net, 0)) == backward(model(), 0)
    assert optimizer.step() is None


def test_schedulers_drive_the_learning_rate():
    def run(scheduled):
        net = model()
        optimizer = RecAdam(net.named_parameters(), **SETTINGS)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1)) if scheduled else None
        for t in range(5):
            backward(net, t)
            if not scheduled:
                optimizer.param_groups[0]["lr"] = 1e-2 / (t + 1)
            optimizer.step()
            if scheduler:
                scheduler.step()
        return [p.detach().clone() for p in net.parameters()]

    assert_same(run(True), run(False))


def test_a_tensor_learning_rate():
    a, b = model(), model()
    tensor = {**SETTINGS, "lr": torch.tensor(0.01, dtype=torch.float64)}
    first = train(a, RecAdam(a.named_parameters(), **tensor), range(3))
    assert_same(first, train(b, RecAdam(b.named_parameters(), **SETTINGS), range(3)))


def test_anchors_are_matched_by_name_not_by_position():
    net = model()
    pretrained = {n: torch.full_like(p, i) for i, (n, p) in enumerate(net.named_parameters())}
    named = list(net.named_parameters())[::-1]
    optimizer = RecAdam(named, anchors=dict(sorted(pretrained.items())), lr=1e-2, gamma=10.0)
    for name, p in net.named_parameters():
        assert torch.equal(optimizer.state[p]["anchor"], pretrained[name])
        assert optimizer.state[p]["anchor"].data_ptr() != pretrained[name].data_ptr()


def test_a_pull_moves_weights_home_at_the_stated_rate():
    p = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    optimizer = RecAdam(
        [("p", p)], anchors={"p": torch.ones(3)}, lr=0.01, gamma=10.0, annealing=Constant(0.0, 1.0)
    )
    for _ in range(20):
        p.grad = torch.ones(3, dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(
        p.detach(), torch.full((3,), 1 + 0.9**20, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_the_anchor_is_freed_when_the_annealing_has_released_it():
    net = model()
    optimizer = RecAdam(net.named_parameters(), lr=1e-2, gamma=10.0, annealing=Linear(t0=4))
    for t in range(1, 6):
        train(net, optimizer, [t])
        assert all((s["anchor"] is None) == (t >= 4) for s in optimizer.state.values())
    optimizer.param_groups[0]["annealing"] = {"name": "linear", "t0": 100}
    backward(net, 9)
    with pytest.raises(RecAdamError, match="step 6: the anchor was freed"):
        optimizer.step()


def test_maximize_climbs_but_the_pull_stays_a_pull():
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    settings = {"lr": 0.1, "gamma": 1.0, "annealing": Constant(1.0, 1.0)}
    optimizer = RecAdam([("p", p)], anchors={"p": torch.ones(1)}, maximize=True, **settings)
    p.grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()
    assert p.item() == pytest.approx(0.1 + 0.1, rel=1e-6)


def test_anchors_of_a_group_are_checked_too():
    optimizer = RecAdam([("v", torch.nn.Parameter(torch.ones(2)))])
    new = [("w", torch.nn.Parameter(torch.ones(2)))]
    with pytest.raises(RecAdamError, match="anchors: 'W' matches no parameter"):
        optimizer.add_param_group({"params": new, "anchors": {"W": torch.ones(2)}})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(RecAdamError, match="anchors: 'w' matches no parameter"):
        RecAdam([{"params": new, "anchored": False}], anchors={"w": torch.ones(2)})
    twice = [{"params": new}, {"params": [("w", torch.nn.Parameter(torch.ones(2)))]}]
    with pytest.raises(RecAdamError, match="two parameters are named 'w'"):
        RecAdam(twice, anchors={"w": torch.ones(2)})


def test_foreign_and_mismatched_states_are_refused_and_nothing_is_loaded():
    net = model()
    optimizer = RecAdam(net.named_parameters(), **SETTINGS)
    train(net, optimizer, range(2))
    other = torch.optim.AdamW(net.named_parameters())
    other.step()
    wide = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    wider = RecAdam(wide.named_parameters())
    renamed = RecAdam([(f"x.{n}", p) for n, p in net.named_parameters()])
    empty = {**optimizer.state_dict(), "state": {}}
    for state, message in (
        (other.state_dict(), "the state is another optimizer's"),
        (wider.state_dict(), r"no state for parameter 0 of shape \(8, 4\)"),
        (renamed.state_dict(), r"parameter '0\.weight' was saved as 'x\.0\.weight'"),
        (empty, "no state for parameter 0"),
    ):
        with pytest.raises(RecAdamError, match=message):
            optimizer.load_state_dict(state)
    assert optimizer.state[net[0].weight]["step"] == 2


def test_names_that_a_wrapper_changed_are_the_same_names():
    net = model()
    wrapped = RecAdam([(f"module._orig_mod.{n}", p) for n, p in net.named_parameters()], **SETTINGS)
    bare = RecAdam(net.named_parameters(), **SETTINGS)
    train(net, wrapped, range(3))
    bare.load_state_dict(wrapped.state_dict())
    assert bare.state[net[0].weight]["step"] == 3


def test_hooks_around_loading_count():
    net = model(torch.bfloat16)
    optimizer = RecAdam(net.named_parameters(), **SETTINGS)

    def add_seven(_, saved):
        states = {i: {**s, "exp_avg": s["exp_avg"] + 7} for i, s in saved["state"].items()}
        return {**saved, "state": states}

    optimizer.register_load_state_dict_pre_hook(add_seven)
    optimizer.load_state_dict(optimizer.state_dict())
    state = optimizer.state[net[0].weight]["exp_avg"]
    assert state.dtype == torch.float32
    assert torch.equal(state, torch.full_like(state, 7))


def test_numpy_scalars_in_settings_load_weights_only():
    net = model()
    optimizer = RecAdam(
        net.named_parameters(),
        lr=np.float64(1e-3),
        gamma=np.float32(10),
        betas=(np.float64(0.9), np.float64(0.99)),
        annealing=Sigmoid(k=np.float64(0.1), t0=np.int64(10)),
    )
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_deepcopy_and_pickle_continue_bit_for_bit(clone):
    net = model()
    optimizer = RecAdam(net.named_parameters(), **SETTINGS)
    train(net, optimizer, range(3))
    other, resumed = clone((net, optimizer))
    assert_same(train(net, optimizer, range(3, 8)), train(other, resumed, range(3, 8)))


def test_a_strangers_annealing():
    @dataclasses.dataclass  # with equality and without a hash
    class Halving:
        steps: int = 41

        def release_step(self):
            return self.steps

        def weights(self, t, xp=None):
            return 1.0, 0.5**t

    net = model()
    optimizer = RecAdam(net.named_parameters(), lr=1e-2, gamma=10.0, annealing=Halving())
    train(net, optimizer, range(42))
    assert all(s["anchor"] is None for s in optimizer.state.values())  # 2^-41 is below the floor


def test_a_step_that_raises_has_changed_nothing():
    net = model()
    optimizer = RecAdam(
        [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 1.0}], lr=1e-2, gamma=10.0
    )
    before = [p.detach().clone() for p in net.parameters()]
    backward(net, 0)
    with pytest.raises(RecAdamError, match=r"step 1: lr .* = 10 diverges"):
        optimizer.step()
    assert_same(before, list(net.parameters()))
    assert all(s["step"] == 0 for s in optimizer.state.values())


def test_sparse_gradients_are_refused_by_name():
    net = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = RecAdam(net.named_parameters(), **SETTINGS)
    net(torch.tensor([1])).sum().backward()
    with pytest.raises(RecAdamError, match="gradient of 'weight' is sparse"):
        optimizer.step()


P = torch.nn.Parameter


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: RecAdam([P(torch.ones(2))], anchors={"w": torch.ones(2)}),
            "anchors are matched by name; pass model.named_parameters() instead of model.parameters()",
        ),
        (
            lambda: RecAdam([("w", P(torch.ones(2)))], anchors={"v": torch.ones(2)}),
            "anchors: 'v' matches no parameter; rename it or leave it out",
        ),
        (
            lambda: RecAdam([("w", P(torch.ones(2)))], anchors={"w": torch.ones(3)}),
            "anchors: 'w' has shape (3,), its parameter (2,); give the pretrained array of that parameter, "
            "or leave the name out for a new head",
        ),
        (
            lambda: RecAdam([("w", P(torch.ones(2, dtype=torch.complex64)))]),
            "parameter 'w' has dtype torch.complex64; give a real floating tensor",
        ),
        (
            lambda: RecAdam([P(torch.ones(2))], lr="a"),
            "Hyperparameters: lr is 'a'; give a finite number >= 0",
        ),
        (
            lambda: RecAdam([P(torch.ones(2))], bias_correction="no"),
            "RecAdam: bias_correction is 'no'; give True or False",
        ),
        (
            lambda: RecAdam([("w", P(torch.ones(2)))], anchors={"w": torch.full((2,), torch.nan)}),
            "anchors: 'w' holds NaN or infinity; give the pretrained values",
        ),
        (
            lambda: RecAdam([("w", P(torch.ones(2)))], anchors={"w": np.ones(2)}),
            "anchors: 'w' is float64; give a floating tensor",
        ),
        (
            lambda: RecAdam([P(torch.ones(2))], lr=-1),
            "Hyperparameters: lr is -1; give a finite number >= 0",
        ),
        (
            lambda: RecAdam([P(torch.ones(2))], form="proximl"),
            "unknown form 'proximl': did you mean 'proximal'? (decoupled, proximal, released)",
        ),
    ],
)
def test_bad_input_is_named_in_one_line(make, message):
    with pytest.raises(RecAdamError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize("fused", ["numba", "compiled", True])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 2)])
def test_fused_is_exact_alone_too(fused, shape):
    def walk(**way):
        p = torch.nn.Parameter(torch.full(shape, 0.3))
        optimizer = RecAdam([{"params": [p], "anchored": False}], lr=0.1, gamma=0.0, **way)
        for t in range(30):
            p.grad = torch.full(shape, 0.1 + t * 0.0137)
            optimizer.step()
        return p.detach()

    assert torch.equal(walk(fused=fused), walk(exact=True))


def test_fused_tells_autograd_that_it_wrote():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = RecAdam([p], fused="numba")
    loss = (p * p * p).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused": "nope"}, "fused is 'nope'; give True, False, or one of numba, compiled, triton"),
        ({"fused": ["numba"]}, "fused is .* give True"),
        ({"fused": "triton"}, "fused='triton' does not run on cpu; give fused=False there"),
        ({"fused": True, "foreach": True}, "foreach and fused are both set; give one of them"),
        ({"exact": "yes"}, "exact is 'yes'; give True or False"),
    ],
)
def test_bad_ways_to_step(options, message):
    with pytest.raises(RecAdamError, match=message):
        RecAdam([torch.nn.Parameter(torch.ones(2))], **options)


def test_states_of_older_releases_leave_the_way_to_step():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = RecAdam([p], fused="numba", exact=True)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["fused"], group["exact"]
    optimizer.load_state_dict(saved)
    assert (optimizer.param_groups[0]["fused"], optimizer.param_groups[0]["exact"]) == ("numba", True)


def test_a_way_that_does_not_run_here_is_not_loaded():
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = RecAdam([{"params": [first]}, {"params": [second]}])
    saved = optimizer.state_dict()
    saved["param_groups"][1]["fused"] = "triton"
    with pytest.raises(RecAdamError, match="does not run on cpu"):
        optimizer.load_state_dict(saved)
    assert [group["fused"] for group in optimizer.param_groups] == [None, None]
