"""What torch expects of its own optimizers, asked of ours: its OptimizerInfo, flags, compilers, copies."""

from __future__ import annotations

import copy
import io
import math
import warnings
import weakref

import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from recadam_core import Constant, RecAdamError, Sigmoid
from recadam_torch import RecAdam

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_optimizers import (
        OptimizerErrorEnum,
        OptimizerInfo,
        OptimizerInput,
        optim_error_inputs_func_adamw,
        optim_inputs_func_adamw,
    )

# What of AdamW's inputs does not apply: amsgrad is another rule than RecAdam's, and betas as tensors are
# settings that nobody anneals.
NOT_OURS = ("amsgrad", "betas")


def ours(optim_input):
    return not any(name in optim_input.kwargs for name in NOT_OURS if name != "betas") and not any(
        isinstance(beta, torch.Tensor) for beta in optim_input.kwargs.get("betas", ())
    )


def inputs(device, dtype=None):
    """AdamW's that apply, those for CUDA too, and ours."""
    given = [
        *optim_inputs_func_adamw("cuda", dtype),
        OptimizerInput(None, {"lr": torch.tensor(0.01)}, "tensor lr"),
    ]
    more = {
        "pull": {"gamma": 10.0, "annealing": Constant(1.0, 0.5)},
        "annealed": {"gamma": 10.0, "annealing": Sigmoid(k=0.5, t0=4)},
        "proximal": {"form": "proximal", "weight_decay": 0.1},
        "capturable and maximize": {"capturable": True, "maximize": True},
        "released": {"form": "released", "weight_decay": 0.1, "gamma": 10.0},
    }
    found = [i for i in given if ours(i)] + [OptimizerInput(None, k, d) for d, k in more.items()]
    # The default annealing leaves the first two hundred steps to the anchors.
    usual = {"lr": 1e-3, "gamma": 10.0, "annealing": Constant(1.0, 0.01)}
    return [OptimizerInput(None, {**usual, **i.kwargs}, i.desc) for i in found]


INFO = OptimizerInfo(
    RecAdam,
    optim_inputs_func=inputs,
    optim_error_inputs_func=optim_error_inputs_func_adamw,
    supported_impls=("foreach", "fused", "differentiable"),
    has_capturable_arg=True,
    supports_complex=False,
    scheduler_inputs=([lambda opt: StepLR(opt, gamma=0.9, step_size=3), lambda opt: ReduceLROnPlateau(opt)],),
)
INPUTS = INFO.optim_inputs_func("cpu")
every_input = pytest.mark.parametrize("given", INPUTS, ids=lambda i: i.desc.replace(" ", "-"))


def made(parameters, given, **more):
    return INFO.optim_cls(parameters, **{**given.kwargs, **more})


def regression(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    x, y = torch.randn(20, 3).to(dtype), torch.randn(20, 1).to(dtype)
    return model, lambda: (model(x) - y).square().mean()


def walk(model, loss, optimizer, steps=8, step=None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        (step or optimizer.step)()
    return [p.detach().clone() for p in model.parameters()]


def gap(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


@every_input
@pytest.mark.parametrize("schedulers", [(), INFO.scheduler_inputs[0]], ids=["plain", "scheduled"])
@pytest.mark.parametrize("foreach", [False, True])
def test_it_goes_the_right_way(given, schedulers, foreach):
    """With a 2x2 problem as torch's own test has, in either direction."""
    torch.manual_seed(1)
    weight, bias = (nn.Parameter(torch.randn(*shape)) for shape in ((10, 5), (10,)))
    x = torch.randn(5)
    optimizer = made([weight, bias], given, foreach=foreach, lr=1e-3)
    scheduled = [make(optimizer) for make in schedulers]

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure)
        for scheduler in scheduled:
            scheduler.step(loss.detach()) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    if optimizer.param_groups[0]["maximize"]:
        assert closure().item() > first
    else:
        assert closure().item() < first


@every_input
@pytest.mark.parametrize(
    "way", [{"foreach": True}, {"fused": True}, {"capturable": True}, {"differentiable": True}]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_way_walks_the_same_path(given, way, dtype):
    """Bit for bit, but for the square root of the one-pass kernels and coefficients of the device."""
    kwargs = {k: v for k, v in given.kwargs.items() if k != "capturable"}
    plain, loss = regression(dtype)
    one_by_one = {"foreach": False, "fused": False, **kwargs}
    expected = walk(plain, loss, RecAdam(plain.named_parameters(), **one_by_one))
    model, loss = regression(dtype)
    if "differentiable" in way:  # which wants parameters that are no leaves
        leaves = dict(model.named_parameters())
        for name, p in leaves.items():
            module = model.get_submodule(name.rpartition(".")[0])
            del module._parameters[name.rpartition(".")[2]]
            setattr(module, name.rpartition(".")[2], p.clone())
        named = {n: model.get_submodule(n.rpartition(".")[0]).__dict__[n.rpartition(".")[2]] for n in leaves}
        optimizer = RecAdam(named.items(), **kwargs, **way)
        for _ in range(8):
            grads = torch.autograd.grad(loss(), list(named.values()), retain_graph=True)
            for p, grad in zip(named.values(), grads, strict=True):
                p.grad = grad.detach()
            with torch.no_grad():
                for p in named.values():
                    p.detach_()
                optimizer.step()
                for p in named.values():
                    p.detach_().requires_grad_()
        found = [p.detach() for p in named.values()]
    else:
        found = walk(model, loss, RecAdam(model.named_parameters(), **kwargs, **way))
    bound = (
        0.0 if "foreach" in way else {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype]
    )
    assert gap(expected, found) <= bound


@every_input
def test_saving_in_mid_trajectory_changes_nothing(given):
    model, loss = regression()
    optimizer = made(model.named_parameters(), given)
    start = copy.deepcopy(model.state_dict())
    walk(model, loss, optimizer, 3)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    expected = walk(model, loss, optimizer, 5)
    other, loss = regression()
    other.load_state_dict(start)
    resumed = made(other.named_parameters(), given)
    weights, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert gap(expected, walk(other, loss, resumed, 5)) == 0
    twin, optimizer_twin = copy.deepcopy((other, resumed))
    assert optimizer_twin.param_groups[0]["params"][0] is next(iter(twin.parameters()))


@every_input
def test_copies_and_representations(given):
    model, loss = regression()
    optimizer = made(model.named_parameters(), given)
    walk(model, loss, optimizer, 2)
    assert "RecAdam (" in repr(optimizer)
    assert repr(copy.deepcopy(optimizer)) == repr(optimizer)
    assert all(len(state) >= 4 for state in optimizer.state.values())


@pytest.mark.parametrize("error", INFO.optim_error_inputs_func("cpu", torch.float32), ids=lambda e:
                         e.optimizer_error_input.desc.replace(" ", "-"))  # fmt: skip
def test_torch_s_bad_inputs_are_refused_or_fine(error):
    given = error.optimizer_error_input
    params = given.params if given.params is not None else [nn.Parameter(torch.ones(2, 2))]
    # AdamW cannot take a tensor lr in foreach; ours can.
    if "lr as Tensor doesn't work with foreach" in given.desc:
        RecAdam(params, **given.kwargs)
        return
    assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            RecAdam(params, **given.kwargs)
        return
    with pytest.raises(error.error_type) as caught:
        RecAdam(params, **given.kwargs)
    assert "\n" not in str(caught.value) or "duplicate" in given.desc


def test_hooks_run_around_the_step():
    model, loss = regression()
    optimizer = RecAdam(model.parameters(), gamma=10.0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    walk(model, loss, optimizer, 2)
    assert seen == ["before", "after"] * 2


@pytest.mark.parametrize("capturable", [False, True])
def test_autograd_goes_through_a_differentiable_step(capturable):
    """The derivative of the weights after two steps by the learning rate, against a finite difference."""

    def after(lr):
        start = torch.linspace(-1, 1, 4, dtype=torch.float64, requires_grad=True)
        w = start.clone()
        lr = torch.as_tensor(lr, dtype=torch.float64)
        settings = {"gamma": 3.0, "annealing": Constant(1.0, 0.5)}
        optimizer = RecAdam([("w", w)], lr=lr, differentiable=True, capturable=capturable, **settings)
        for _ in range(2):
            w.grad = torch.autograd.grad(start.pow(3).sum(), start, create_graph=True)[0]
            optimizer.step()
        return w.sum(), start

    def value(lr):
        return after(lr)[0].item()

    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    total, start = after(lr)
    (slope,) = torch.autograd.grad(total, lr, retain_graph=True)
    assert slope.item() == pytest.approx((value(0.05 + 1e-6) - value(0.05 - 1e-6)) / 2e-6, rel=1e-6)
    (by_start,) = torch.autograd.grad(total, start)
    assert torch.isfinite(by_start).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capturable": True, "fused": True}, "capturable and fused are both set"),
        ({"capturable": True, "exact": True}, "capturable and exact are both set"),
        ({"differentiable": True, "foreach": True}, "differentiable and foreach are both set"),
        ({"differentiable": True, "rounding": "compensated"}, "differentiable needs rounding='nearest'"),
        ({"rounding": "up"}, "unknown rounding 'up': choose one of"),
        ({"capturable": 1}, "capturable is 1; give True or False"),
        ({"save_anchors": "no"}, "save_anchors is 'no'; give True or False"),
    ],
)  # fmt: skip
def test_flags_that_exclude_one_another(options, message):
    with pytest.raises(RecAdamError, match=message):
        RecAdam([nn.Parameter(torch.ones(2))], **options)


def test_stochastic_rounding_is_for_bfloat16():
    with pytest.raises(RecAdamError, match=r"'w' is float16; rounding='stochastic' is for bfloat16"):
        RecAdam([("w", nn.Parameter(torch.ones(2, dtype=torch.float16)))], rounding="stochastic")


# Compilers.


@pytest.mark.parametrize("capturable", [False, True])
def test_a_compiled_step_compiles_once_in_two_hundred_steps_of_annealing(capturable):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if not capturable else "aot_eager")
    settings = {"lr": 1e-2, "gamma": 10.0, "annealing": Sigmoid(k=0.1, t0=50), "capturable": capturable}
    plain, loss = regression(torch.float32)
    reference = RecAdam(plain.named_parameters(), **settings)
    scheduler = StepLR(reference, step_size=1, gamma=0.99)
    for _ in range(200):
        expected = walk(plain, loss, reference, 1)
        scheduler.step()
    model, loss = regression(torch.float32)
    optimizer = RecAdam(model.named_parameters(), **settings)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.99)
    step = torch.compile(optimizer.step, backend=counter)
    walk(model, loss, optimizer, 1, step)
    scheduler.step()
    compiled = counter.frame_count
    assert sum(any(node.op == "call_function" for node in g.graph.nodes) for g in counter.graphs) == 1
    for _ in range(199):
        found = walk(model, loss, optimizer, 1, step)
        scheduler.step()
    assert counter.frame_count == compiled
    assert gap(expected, found) < 1e-5


def test_a_compiled_step_frees_anchors_and_refuses_what_diverges():
    torch._dynamo.reset()
    model, loss = regression(torch.float32)
    optimizer = RecAdam(model.named_parameters(), lr=1e-2, gamma=10.0, annealing=Sigmoid(k=10.0, t0=2))
    plain, other = regression(torch.float32)
    reference = RecAdam(plain.named_parameters(), **{k: optimizer.defaults[k] for k in ("lr", "gamma")},
                        annealing=Sigmoid(k=10.0, t0=2))  # fmt: skip
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(8):
        found, expected = walk(model, loss, optimizer, 1, step), walk(plain, other, reference, 1)
        freed = [entry["anchor"] is None for entry in optimizer.state.values()]
        assert freed == [entry["anchor"] is None for entry in reference.state.values()]
    assert all(freed)
    assert gap(found, expected) < 1e-6
    optimizer = RecAdam(model.named_parameters(), lr=1.0, gamma=10.0, annealing=Constant(1.0, 1.0))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RecAdamError, match="diverges"):
        walk(model, loss, optimizer, 1, torch.compile(optimizer.step, backend="aot_eager"))
    assert gap(before, model.parameters()) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_cuda_graph_holds_the_step():
    model, loss = regression(torch.float32)
    settings = {"lr": 1e-2, "gamma": 10.0, "annealing": Sigmoid(k=0.3, t0=10)}
    expected = walk(model, loss, RecAdam(model.named_parameters(), **settings), 30)
    model, _ = regression(torch.float32)
    model = model.cuda()
    torch.manual_seed(0)
    nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = torch.randn(20, 3).cuda(), torch.randn(20, 1).cuda()
    optimizer = RecAdam(model.named_parameters(), capturable=True, **settings)

    def once():
        optimizer.zero_grad(set_to_none=False)
        (model(x) - y).square().mean().backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    for _ in range(27):
        graph.replay()
    assert gap(expected, [p.detach().cpu() for p in model.parameters()]) < 1e-4


# Mixed precision.


def test_a_step_that_found_infinity_changes_nothing_the_pull_included():
    model, loss = regression(torch.float32)
    anchors = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {"lr": 1e-2, "gamma": 10.0, "annealing": Constant(1.0, 1.0)}
    optimizer = RecAdam(model.named_parameters(), anchors=anchors, **settings)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)  # away from the anchors, so that the pull would show
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for infinite in (True, False):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss()
        scaler.scale(value).backward()
        if infinite:
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        assert (gap(before, list(model.parameters())) == 0) == infinite
        assert {int(s["step"]) for s in optimizer.state.values()} == {0 if infinite else 1}


@pytest.mark.parametrize(
    ("rounding", "dtype", "low", "high"),
    [
        ("nearest", torch.bfloat16, 1.0, 1.0),  # stuck: a pull of 0.1% is less than half an ulp
        ("stochastic", torch.bfloat16, 0.81, 0.83),
        ("compensated", torch.bfloat16, 0.818, 0.8195),
        ("nearest", torch.float16, 0.7, 0.9),
        ("compensated", torch.float16, 0.818, 0.8195),
        ("stochastic", torch.float32, 0.818, 0.8195),  # of 16-bit parameters only
    ],
)
@pytest.mark.parametrize("fused", [False, "numba"])
def test_the_pull_moves_weights_that_plain_rounding_leaves_stuck(rounding, dtype, low, high, fused):
    """0.999^200 = 0.8186 of the way is left after 200 steps that each go 0.1% of it."""
    p = nn.Parameter(torch.ones(4000, dtype=dtype))
    settings = {
        "lr": 1e-3,
        "gamma": 1.0,
        "annealing": Constant(0.0, 1.0),
        "rounding": rounding,
        "fused": fused,
    }
    optimizer = RecAdam([("w", p)], anchors={"w": torch.zeros(4000)}, **settings)
    for _ in range(200):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    value = p.detach().double()
    if "residual" in optimizer.state[p]:
        value = value + optimizer.state[p]["residual"].double()
    assert low <= value.mean().item() <= high


def test_chance_is_fair_and_follows_names_not_places():
    from recadam_torch.rounding import noise

    p = torch.ones(100_000)
    found = noise(p, "w", 3).double()
    assert found.mean().item() == pytest.approx(2**15 - 0.5, rel=0.01)
    assert found.var().item() == pytest.approx(2**32 / 12, rel=0.02)
    assert torch.equal(noise(p, "w", 3), noise(p, "w", torch.tensor(3)))
    for other in (noise(p, "v", 3), noise(p, "w", 4)):
        assert (other == found).double().mean() < 1e-3


# Telemetry.


def test_drift_says_how_far_and_what_pulls():
    w, head = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.zeros(1))
    settings = {"lr": 0.01, "gamma": 20.0, "annealing": Constant(0.5, 0.25)}
    optimizer = RecAdam([("w", w), ("head", head)], anchors={"w": torch.zeros(2)}, **settings)
    before = optimizer.drift()
    assert (before.distance, before.relative) == (5.0, math.inf)
    assert math.isnan(before.pull_share)
    w.grad, head.grad = torch.ones(2), torch.ones(1)
    optimizer.step()
    found = optimizer.drift()
    # The pull is 0.01 * 20 * 0.25 = 5% of 5.0; Adam's first step 0.01 * 0.5 in each of two numbers.
    pull, adam = 0.05 * 5.0, 0.005 * math.sqrt(2)
    assert found.pull_share == pytest.approx(pull / (pull + adam), rel=1e-5)
    assert (found.task, found.recall) == (0.5, 0.25)
    assert found.rate == pytest.approx(0.2)
    assert set(found.parameters) == {"w"}
    assert found.parameters["w"].distance == found.distance == pytest.approx(w.detach().norm().item())


def test_drift_forgets_what_was_freed():
    w = nn.Parameter(torch.ones(2))
    optimizer = RecAdam([("w", w)], lr=0.01, gamma=1.0, annealing={"name": "linear", "t0": 2})
    for _ in range(3):
        w.grad = torch.ones(2)
        optimizer.step()
    assert optimizer.drift().parameters == {}
    with pytest.raises(
        RecAdamError, match="the anchor of 'w' was freed, and is not to be had again; give the pre"
    ):
        optimizer.interpolate(0.5)
    between = optimizer.interpolate(0.5, {"w": torch.zeros(2)})
    assert torch.equal(between["w"], w.detach() / 2)


def test_weights_between_are_there_for_a_while_and_gone_after_an_error():
    model, loss = regression(torch.float32)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = RecAdam(model.named_parameters(), lr=0.1, gamma=0.1)
    tuned = walk(model, loss, optimizer, 5)
    for alpha, expected in ((0.0, start), (1.0, tuned)):
        with optimizer.interpolated(alpha):
            assert gap(expected, list(model.parameters())) == 0
    with pytest.raises(KeyError), optimizer.interpolated(0.5):
        raise KeyError
    assert gap(tuned, list(model.parameters())) == 0
    half = optimizer.interpolate(0.5)
    for (name, _), a, b in zip(model.named_parameters(), start, tuned, strict=True):
        torch.testing.assert_close(half[name], (a + b) / 2)


# Parameters that a wrapper replaces.


def test_states_follow_parameters_that_were_replaced_by_name():
    """As wrappers for sharded training do: they swap the groups' parameters, and nothing else."""
    model, loss = regression()
    optimizer = RecAdam(model.named_parameters(), lr=1e-2, gamma=10.0)
    walk(model, loss, optimizer, 3)
    expected_model, expected_loss = regression()
    expected = walk(
        expected_model, expected_loss, RecAdam(expected_model.named_parameters(), lr=1e-2, gamma=10.0)
    )
    for group in optimizer.param_groups:
        for i, (name, p) in enumerate(zip(group["param_names"], group["params"], strict=True)):
            module, _, key = name.rpartition(".")
            new = nn.Parameter(p.detach().clone())
            setattr(model.get_submodule(module), key, new)
            group["params"][i] = new
    assert gap(expected, walk(model, loss, optimizer, 5)) == 0
    assert len(optimizer.state) == 4

    unnamed = RecAdam(model.parameters(), gamma=10.0)
    unnamed.param_groups[0]["params"][0] = nn.Parameter(torch.ones(2))
    unnamed.param_groups[0]["params"][0].grad = torch.ones(2)
    with pytest.raises(
        RecAdamError, match=r"parameter 'params\[0\]' has no state: .* pass model.named_parameters"
    ):
        unnamed.step()


def test_names_that_two_groups_share_mix_nothing_up():
    """As `module.named_parameters()` of two modules gives them."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for groups in (
        [{"params": module.named_parameters()} for module in model],
        [{"params": module.parameters()} for module in model],
    ):
        optimizer = RecAdam(groups, gamma=10.0)
        before = [p.detach().clone() for p in model.parameters()]
        with optimizer.interpolated(1.0):
            assert gap(before, list(model.parameters())) == 0
        assert len(optimizer.drift().parameters) == 4
        with pytest.raises(RecAdamError, match="parameters need names, each its own"):
            optimizer.interpolate(0.5)


def test_gradients_do_not_outlive_the_step():
    model, loss = regression()
    optimizer = RecAdam(model.named_parameters(), gamma=10.0)
    loss().backward()
    held = [weakref.ref(p.grad) for p in model.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    assert not any(ref() is not None for ref in held)


def test_stochastic_rounding_keeps_what_is_no_number():
    from recadam_torch.rounding import round_

    bits = torch.tensor([0x7FFFFFFF, 0x7F800000, -0x800000, -1], dtype=torch.int32)
    theta = torch.zeros(4, dtype=torch.bfloat16)
    round_(theta, bits.view(torch.float32), None, torch.full((4,), 65535, dtype=torch.int32))
    assert theta.isnan().tolist() == [True, False, False, True]
    assert theta[1:3].tolist() == [math.inf, -math.inf]


def test_drift_where_little_can_be_told():
    w, idle = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    settings = {"lr": 0.1, "gamma": 10.0, "annealing": Constant(1.0, 1.0)}  # all the way home in one step
    optimizer = RecAdam([("w", w), ("idle", idle)], **settings)
    assert math.isnan(optimizer.drift().task)
    w.grad = torch.ones(2, dtype=torch.float64)
    optimizer.step()
    assert math.isnan(optimizer.drift().parameters["w"].pull_share)
    optimizer.param_groups[0]["gamma"] = 5.0
    optimizer.step()
    found = optimizer.drift()
    assert 0 < found.pull_share == found.parameters["w"].pull_share  # idle has taken no step
    assert math.isnan(found.parameters["idle"].pull_share)
