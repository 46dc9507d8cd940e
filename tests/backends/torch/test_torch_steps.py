"""What surrounds a step in PyTorch: default dtypes and devices, settings, shapes, memory, many groups."""

from __future__ import annotations

import copy
import decimal
import fractions
import sys

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from recadam_core import Constant, RecAdamError, Sigmoid
from recadam_torch import Anchors, RecAdam, feature_importance

K = {"lr": 1e-2, "gamma": 10.0, "annealing": Constant(1.0, 1.0)}
WAYS = {
    "single": {"fused": False, "foreach": False},
    "foreach": {"foreach": True},
    "numba": {"fused": "numba"},
    "exact": {"exact": True},
    "compiled": {"fused": "compiled"},
    "capturable": {"capturable": True},
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def parameters(*shapes, seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float32, device="cpu")) for shape in shapes]


def give_gradients(params, t=0):
    generator = torch.Generator("cpu").manual_seed(t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu").to(p.dtype)


def everything(optimizer):
    """A copy of all that a step may change: parameters, state and settings."""
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    states = [
        {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in state.items()}
        for state in optimizer.state.values()
    ]
    groups = [
        {k: copy.copy(v) if isinstance(v, (dict, list)) else v for k, v in g.items() if k != "params"}
        for g in optimizer.param_groups
    ]
    return params, states, groups


def same(x, y):
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return x.dtype == y.dtype and torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    if isinstance(x, (list, tuple)) and not isinstance(x, torch.Size):
        return len(x) == len(y) and all(map(same, x, y))
    return type(x) is type(y) and (x is y or x == y)


def assert_refused(optimizer, message, act=None):
    """The step, or what else is done, raises in one line and has changed nothing."""
    before = everything(optimizer)
    with pytest.raises(RecAdamError, match=message) as caught:
        (act or optimizer.step)()
    assert "\n" not in str(caught.value)
    assert same(before, everything(optimizer))


# Defaults of the process.


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@every_way
def test_steps_are_counted_whatever_the_default_dtype(way, default):
    """16 bits count to 256 or 2048, and no further."""
    expected, found = [], []
    steps = 600 if way not in (WAYS["compiled"], WAYS["capturable"]) else 20
    start = 2040 if steps == 20 else 0
    for dtype, weights in ((torch.float32, expected), (default, found)):
        torch.set_default_dtype(dtype)
        try:
            params = parameters((3, 2), (4,))
            optimizer = RecAdam(params, **K, **way)
            for p in params:
                optimizer.state[p]["step"].fill_(start)
            for t in range(steps):
                give_gradients(params, t)
                optimizer.step()
            weights += [p.detach() for p in params]
            assert {float(optimizer.state[p]["step"]) for p in params} == {float(start + steps)}
            kinds = {k: x.dtype for k, x in optimizer.state[params[0]].items()}
            assert kinds == {
                "step": torch.float32,
                "exp_avg": torch.float32,
                "exp_avg_sq": torch.float32,
                "anchor": torch.float32,
                "anchor_hash": torch.int64,
            }
            assert optimizer.drift().distance > 0
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            give_gradients(params, steps)
            optimizer.step()
            assert {float(optimizer.state[p]["step"]) for p in params} == {float(start + steps + 1)}
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@every_way
def test_a_default_device_that_is_another_changes_nothing(way, rounding):
    """Every tensor that is made says where."""
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
    found = []
    for device in ("cpu", "meta"):
        params = [nn.Parameter(p.detach().to(dtype)) for p in parameters((3, 2), (4,))]
        optimizer = RecAdam(params, rounding=rounding, **K, **way)
        torch.set_default_device(device)
        try:
            for t in range(3):
                give_gradients(params, t)
                optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            give_gradients(params, 4)
            optimizer.step()
            assert optimizer.drift().distance > 0
            later = RecAdam(params, rounding=rounding, **K, **way)
            later.step()
            assert {x.device.type for s in later.state.values() for x in s.values()} == {"cpu"}
        finally:
            torch.set_default_device(None)
        found.append([p.detach() for p in params])
    assert all(map(torch.equal, *found))


def test_importance_and_anchors_say_where_they_are_made():
    model = nn.Linear(3, 2)
    inputs = [torch.ones(4, 3)]
    expected = feature_importance(model.named_parameters(), (model(x) for x in inputs))
    torch.set_default_device("meta")
    try:
        found = feature_importance(model.named_parameters(), (model(x) for x in inputs))
        anchors = Anchors.of(model)
        optimizer = RecAdam(model.named_parameters(), anchors=anchors, importance=found, **K)
        give_gradients(model.parameters())
        optimizer.step()
    finally:
        torch.set_default_device(None)
    assert {x.device.type for x in found.values()} == {"cpu"}
    assert all(torch.equal(expected[name], found[name]) for name in expected)


# Settings.

NUMBERS = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.01, "gamma": 10.0}
REFUSED = {
    "text": lambda x: str(x),
    "bytes": lambda x: str(x).encode(),
    "truth": lambda x: True,
    "NumPy's truth": lambda x: np.True_,
    "decimal": lambda x: decimal.Decimal(x),
    "fraction": lambda x: fractions.Fraction(x),
    "complex": lambda x: complex(x),
    "list": lambda x: [x],
    "array": lambda x: np.array([x]),
    "one in an array": lambda x: torch.tensor([x]),
    "NaN": lambda x: float("nan"),
    "infinite": lambda x: np.float32("inf"),
    "negative": lambda x: -x,
    "none": lambda x: None,
    "a duration": lambda x: np.timedelta64(1, "s"),
    "400 digits": lambda x: 10**400,
    "5000 digits": lambda x: 10**5000,
}
ACCEPTED = {
    "float": float,
    "int": lambda x: 1,
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "int8": lambda x: np.int8(1),
    "0-d array": np.array,
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_number_is_refused_wherever_it_comes_from(name, kind):
    """At construction, in a group in mid-training, in a new group and in a checkpoint alike."""
    wrong = REFUSED[kind](NUMBERS[name])
    params = parameters((3, 2), (4,))
    with pytest.raises(RecAdamError, match=name):
        RecAdam(params, **{**K, name: wrong})
    optimizer = RecAdam([{"params": [params[0]]}, {"params": [params[1]]}], **K)
    give_gradients(params)
    optimizer.step()
    (more,) = parameters((2,))
    assert_refused(optimizer, name, lambda: optimizer.add_param_group({"params": [more], name: wrong}))
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][1][name] = wrong
    assert_refused(optimizer, name, lambda: optimizer.load_state_dict(state))
    optimizer.param_groups[1][name] = wrong
    if kind not in ("array", "one in an array"):  # which compare to no truth value
        assert_refused(optimizer, name)
    else:
        with pytest.raises(RecAdamError, match=name):
            optimizer.step()


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_is_a_number_steps_as_python_s_wherever_it_comes_from(name, kind):
    """And is saved as Python's."""
    value = ACCEPTED[kind](NUMBERS[name])
    found = []
    for given in (float(value), value):
        for where in ("construction", "group"):
            params = parameters((3, 2), (4,))
            settings = {**K, "form": "proximal"}  # stable at any number
            optimizer = RecAdam(params, **(settings | {name: given} if where == "construction" else settings))
            if where == "group":
                optimizer.param_groups[0][name] = given
            for t in range(3):
                give_gradients(params, t)
                optimizer.step()
            assert type(optimizer.state_dict()["param_groups"][0][name]) in (float, int)
            found.append([p.detach() for p in params])
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("bias_correction", "False"), ("maximize", 1), ("anchored", None), ("foreach", 1), ("fused", 1),
        ("fused", "nmba"), ("exact", np.float64(1)), ("rounding", "up"), ("rounding", None),
        ("form", "proximl"), ("form", None), ("betas", 0.9), ("betas", (0.9,)), ("betas", ("0.9", 0.9)),
        ("betas", {0.9, 0.99}), ("betas", (True, 0.9)), ("annealing", "sigmoid"), ("annealing", Sigmoid),
        ("annealing", {"name": "sigmoid", "k": "0.1"}), ("annealing", {"name": "sgmoid"}), ("annealing", {}),
        ("save_anchors", "yes"), ("capturable", "False"),
    ],
)  # fmt: skip
def test_settings_that_are_none_are_refused_wherever_they_come_from(name, wrong):
    params = parameters((3, 2), (4,))
    with pytest.raises(RecAdamError):
        RecAdam(params, **{**K, name: wrong}) if name != "anchored" else RecAdam(
            [{"params": params, "anchored": wrong}], **K
        )
    optimizer = RecAdam([{"params": [params[0]]}, {"params": [params[1]]}], **K)
    give_gradients(params)
    optimizer.step()
    optimizer.param_groups[1][name] = wrong
    assert_refused(optimizer, ".")
    state = copy.deepcopy(optimizer.state_dict())
    assert_refused(optimizer, ".", lambda: optimizer.load_state_dict(state))


def test_a_setting_that_is_missing_is_named():
    params = parameters((2,))
    optimizer = RecAdam(params, **K)
    give_gradients(params)
    del optimizer.param_groups[0]["gamma"]
    assert_refused(optimizer, "a group has no 'gamma'")


def test_truth_values_and_numbers_that_are_equal_are_not_confused():
    """`0 == False`: whatever was checked before says nothing of the other."""
    params = parameters((2,))
    optimizer = RecAdam(params, **{**K, "weight_decay": 0})
    give_gradients(params)
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = False
    assert_refused(optimizer, "weight_decay is False")
    with pytest.raises(RecAdamError, match="weight_decay is False"):
        RecAdam(parameters((2,)), **{**K, "weight_decay": False})


class Odd:
    """An annealing that gives something, from the third step on."""

    def __init__(self, weights):
        self.given = weights

    def weights(self, t, xp=None):
        return self.given if t > 2 else (1.0, 0.5)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "weights",
    [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (-1.0, 1.0), (1.0, -0.5), None, (None, 1.0),
     ("1", 1.0), (1.0, 1.0, 1.0), (1.0,), 0.5, "ab", (True, 1.0), (1j, 1.0), {1.0: 2, 2.0: 3},
     (torch.ones(2), 1.0), (np.nan, 0.0), (1.0, 10**400), (torch.tensor(NAN), 1.0),
     (1.0, torch.tensor(-1.0))],
    ids=str,
)  # fmt: skip
@every_way
def test_an_annealing_that_gives_no_weights_is_refused_at_that_step(weights, way):
    params = parameters((3, 2), (4,))
    first, second = ([p] for p in params)  # the second one's is refused, and the first has not stepped
    groups = [{"params": first}, {"params": second, "annealing": Odd(weights)}]
    optimizer = RecAdam(groups, **K, **way)
    for t in range(2):
        give_gradients(params, t)
        optimizer.step()
    give_gradients(params, 2)
    assert_refused(optimizer, "Odd")


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    "weights",
    [(np.float32(1), np.float64(0.5)), (np.array(1.0), np.array(0.5)), (1, torch.tensor(0.5)), [1.0, 0.5]],
)
def test_an_annealing_may_give_any_numbers(weights, capturable):
    found = []
    for given in (weights, (1.0, 0.5)):
        params = parameters((3, 2))
        optimizer = RecAdam(params, **{**K, "annealing": Odd(given)}, capturable=capturable)
        for t in range(4):
            give_gradients(params, t)
            optimizer.step()
        found.append(params[0].detach())
    assert torch.equal(*found)


def test_a_decay_that_diverges_is_refused_as_a_pull_is():
    for settings in ({"weight_decay": 2e5}, {"weight_decay": 200.0}, {"gamma": 200.0}):
        params = parameters((2,))
        optimizer = RecAdam(params, **{**K, **settings})
        give_gradients(params)
        assert_refused(optimizer, "diverges")


# Shapes and memory.

CHANGES = {
    "resized": lambda b, state: setattr(b, "data", torch.ones(6, 2)),
    "another gradient": lambda b, state: setattr(b.grad, "data", torch.ones(1, 2)),
    "an anchor of one row": lambda b, state: state.update(anchor=torch.ones(1, 2)),
    "a short moment": lambda b, state: state.update(exp_avg=torch.zeros(4, 1)),
    "another moment": lambda b, state: state.update(exp_avg_sq=torch.zeros(())),
    "a complex number": lambda b, state: setattr(b, "data", torch.ones(4, 2, dtype=torch.complex64)),
    "a moment without data": lambda b, state: state.update(exp_avg=torch.zeros(4, 2, device="meta")),
    "an anchor without data": lambda b, state: state.update(anchor=torch.zeros(4, 2, device="meta")),
    "freed": lambda b, state: b.data.untyped_storage().resize_(0),
    "expanded": lambda b, state: setattr(b, "data", torch.ones(2).expand(4, 2)),
    "negative": lambda b, state: setattr(b, "data", torch._neg_view(torch.ones(4, 2))),
    "an expanded moment": lambda b, state: state.update(exp_avg=torch.zeros(2).expand(4, 2)),
    "an expanded second moment": lambda b, state: state.update(exp_avg_sq=torch.zeros(()).expand(4, 2)),
    "a complex moment": lambda b, state: state.update(exp_avg=torch.zeros(4, 2, dtype=torch.complex64)),
    "an integer moment": lambda b, state: state.update(exp_avg_sq=torch.zeros(4, 2, dtype=torch.int64)),
    "a sparse moment": lambda b, state: state.update(exp_avg=torch.zeros(4, 2).to_sparse()),
    "a freed anchor": lambda b, state: state["anchor"].untyped_storage().resize_(0),
    "a freed gradient": lambda b, state: b.grad.untyped_storage().resize_(0),
    "a moment of NumPy": lambda b, state: state.update(exp_avg=np.zeros((4, 2), np.float32)),
    "no moment": lambda b, state: state.update(exp_avg_sq=None),
    "an anchor of NumPy": lambda b, state: state.update(anchor=np.zeros((4, 2), np.float32)),
    "a sparse anchor": lambda b, state: state.update(anchor=torch.zeros(4, 2).to_sparse()),
    "an integer anchor": lambda b, state: state.update(anchor=torch.zeros(4, 2, dtype=torch.int64)),
    "an anchor that is text": lambda b, state: state.update(anchor="pretrained"),
    "no step": lambda b, state: state.update(step=None),
    "a step of Python": lambda b, state: state.update(step=5),
    "a step of NumPy": lambda b, state: state.update(step=np.float32(5)),
    "several steps": lambda b, state: state.update(step=torch.ones(3)),
    "a step that is not finite": lambda b, state: state.update(step=torch.tensor(float("nan"))),
    "a sparse gradient": lambda b, state: setattr(b, "grad", torch.ones(4, 2).to_sparse()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("warm", [0, 2])
@every_way
def test_what_changed_in_the_second_group_is_found_before_the_first_is_stepped(way, change, warm):
    a, b = parameters((3, 2), (4, 2))
    groups = [{"params": [("a", a)], "lr": 1e-3}, {"params": [("b", b)]}]
    optimizer = RecAdam(groups, anchors={"a": a.detach(), "b": b.detach()}, **K, **way)
    for t in range(warm):
        give_gradients([a, b], t)
        optimizer.step()
    give_gradients([a, b], warm)
    CHANGES[change](b, optimizer.state[b])
    if way.get("capturable") and change == "a step that is not finite":
        pytest.skip("only the device knows")
    before = a.detach().clone(), *(optimizer.state[a][k].clone() for k in ("step", "exp_avg", "exp_avg_sq"))
    with pytest.raises(RecAdamError, match="'b'") as caught:
        optimizer.step()
    assert "\n" not in str(caught.value)
    after = a.detach(), *(optimizer.state[a][k] for k in ("step", "exp_avg", "exp_avg_sq"))
    assert all(map(torch.equal, before, after))


def test_a_step_count_of_integers_counts_on():
    (w,) = parameters((3, 2))
    optimizer = RecAdam([("w", w)], **K)
    give_gradients([w])
    optimizer.state[w]["step"] = torch.tensor(5)
    optimizer.step()
    assert optimizer.state[w]["step"] == 6
    assert optimizer.state[w]["step"].dtype == torch.float32


def test_a_hash_that_is_none_is_refused_before_it_is_saved():
    (w,) = parameters((3, 2))
    optimizer = RecAdam([("w", w)], **K)
    optimizer.state[w]["anchor_hash"] = 5
    with pytest.raises(RecAdamError, match=r"no state for parameter 'w' .* \(its anchor_hash is 5\)"):
        optimizer.state_dict()


def test_a_hash_that_was_taken_out_is_taken_again():
    (w,) = parameters((3, 2))
    optimizer = RecAdam([("w", w)], **K)
    saved = optimizer.state_dict()["state"][0]["anchor_hash"]
    give_gradients([w])
    del optimizer.state[w]["anchor_hash"]
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["anchor_hash"] == saved != 0


def test_a_parameter_that_is_a_wrapper_is_stepped_without_walking_its_memory():
    found = []
    for flags in ({}, {"fused": False}):
        torch.manual_seed(0)
        x = torch.randn(3, 2)
        w = nn.Parameter(TwoTensor(x.clone(), x.clone()))
        plain = nn.Parameter(torch.ones(2))
        optimizer = RecAdam([("w", w), ("plain", plain)], **K, **flags)
        for t in range(3):
            grad = torch.full((3, 2), 0.1 + t)
            w.grad, plain.grad = TwoTensor(grad, grad.clone()), torch.ones(2)
            optimizer.step()
        assert torch.equal(w.a, w.b)
        assert not torch.equal(w.a, x)
        found.append(w.a.detach().clone())
    assert torch.equal(*found)
    optimizer = RecAdam([("w", w)], fused="numba", **K)
    w.grad = TwoTensor(grad, grad.clone())
    exact = RecAdam([plain, w], lr=1e-2, gamma=10.0, exact=True)
    plain.grad = torch.ones(2)
    before = plain.detach().clone()
    with pytest.raises(
        RecAdamError, match=r"is a TwoTensor, of which exact=True takes no root; leave exact out"
    ):
        exact.step()
    assert torch.equal(plain, before)
    assert not exact.state[plain]["step"]
    with pytest.raises(RecAdamError, match=r"'w' is a TwoTensor, .*fused=False"):
        optimizer.step()


# Groups.


def counted(groups, rates):
    """Function calls of a step of so many groups, when nothing has changed since the last."""
    params = parameters(*[(2,)] * groups)
    optimizer = RecAdam(
        [{"params": [p], "lr": 1e-3 * (1 + i % rates / rates)} for i, p in enumerate(params)],
        **{**K, "lr": 0.1},
    )
    for t in range(3):
        give_gradients(params, t)
        optimizer.step()
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("rates", [1, 4, 10**6])
def test_the_cost_of_groups_is_linear_and_small(rates):
    """In function calls, which no machine's load changes."""
    few, many = counted(100, rates), counted(800, rates)
    assert many <= 8 * few
    assert many <= 800 * (250 if rates > 800 else 60)


def test_groups_of_one_rate_are_stepped_as_one_and_those_of_others_apart():
    """Bit for bit as each by itself, while rates change and groups come to share theirs."""
    found = []
    for groups in (1, 6):
        params = parameters((3, 2), (4,), (1,), (), (5, 5), (2, 2))
        optimizers = [RecAdam([{"params": [p]} for p in params], **K)]
        if groups == 1:
            optimizers = [RecAdam([p], **K) for p in params]
        for t in range(9):
            give_gradients(params, t)
            params[t % 6].grad = None
            every = [group for optimizer in optimizers for group in optimizer.param_groups]
            for i, group in enumerate(every):
                group["lr"] = 1e-2 * (1 + (i * t) % 3)
                group["gamma"] = 10.0 if t < 5 or i % 2 else 5.0
            for optimizer in optimizers:
                optimizer.step()
        found.append([p.detach() for p in params])
    assert all(map(torch.equal, *found))


# In mid-training.


def test_a_step_while_weights_are_interpolated_is_refused():
    params = parameters((3, 2))
    optimizer = RecAdam([("w", params[0])], **K)
    for t in range(2):
        give_gradients(params, t)
        optimizer.step()
    tuned = params[0].detach().clone()
    with optimizer.interpolated(0.5):
        with optimizer.interpolated(0.0):
            pass
        assert_refused(optimizer, "the weights are interpolated")
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert_refused(optimizer, "the weights are interpolated")
    assert torch.equal(params[0], tuned)
    optimizer.step()
    assert not torch.equal(params[0], tuned)


def test_a_group_whose_anchors_are_switched_off_is_adam_s_and_back():
    """`"anchored": False` in mid-training leaves anchors unread; True reads them again."""
    ours, theirs, plain = (parameters((3, 2)) for _ in range(3))
    optimizer = RecAdam([("w", ours[0])], **K)
    reference = RecAdam([("w", theirs[0])], **K)
    adam = RecAdam([{"params": [("w", plain[0])], "anchored": False}], **K)
    for t in range(6):
        optimizer.param_groups[0]["anchored"] = t in (0, 1, 4, 5)
        reference.param_groups[0]["gamma"] = 10.0 if t in (0, 1, 4, 5) else 0.0
        adam.param_groups[0]["anchored"] = True  # of what was never anchored there is nothing to read
        for params, opt in ((ours, optimizer), (theirs, reference), (plain, adam)):
            give_gradients(params, t)
            opt.step()
        assert torch.equal(ours[0], theirs[0])
        assert optimizer.drift().pull_share > 0 or t in (2, 3)
    assert "anchor" not in adam.state[plain[0]]
    fresh = parameters((3, 2))
    untouched = RecAdam([{"params": [("w", fresh[0])], "anchored": False}], **K)
    for t in range(6):
        give_gradients(fresh, t)
        untouched.step()
    assert torch.equal(fresh[0], plain[0])


def test_a_parameter_that_is_thawed_later_anneals_from_its_own_first_step():
    """Its steps are counted as Adam counts them: from the first with a gradient."""
    settings = {**K, "annealing": Sigmoid(k=1.0, t0=3)}
    a, b = parameters((3, 2), (3, 2))
    optimizer = RecAdam([("a", a), ("b", b)], **settings)
    (alone,) = parameters((3, 2), seed=0)[:1]
    alone = nn.Parameter(b.detach().clone())
    other = RecAdam([("b", alone)], **settings)
    for t in range(8):
        give_gradients([a, b], t)
        if t < 3:
            b.grad = None
        optimizer.step()
        if t >= 3:
            alone.grad = b.grad.clone()
            other.step()
    assert torch.equal(b, alone)
    assert (float(optimizer.state[a]["step"]), float(optimizer.state[b]["step"])) == (8.0, 5.0)


def test_a_parametrization_leaves_its_original_and_that_one_s_anchor():
    class Halved(nn.Module):
        def forward(self, x):
            return x / 2

    found = []
    for parametrized in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = RecAdam(model.named_parameters(), **K)
        for t in range(6):
            if parametrized and t == 3:
                nn.utils.parametrize.register_parametrization(model, "weight", Halved())
            optimizer.zero_grad()
            scale = 0.5 if not parametrized and t >= 3 else 1.0  # what it does to the gradient
            (model(torch.ones(1, 3)).sum() * (t + 1)).backward()
            weight = model.parametrizations.weight.original if parametrized and t >= 3 else model.weight
            weight.grad *= scale
            optimizer.step()
        assert set(optimizer.state) == set(model.parameters())
        found.append((weight.detach(), optimizer.state[weight]["anchor"]))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_triton_is_for_those_who_name_it(device):
    from recadam_torch.kernels import chosen_fused

    settings = dict.fromkeys(("foreach", "fused")) | dict.fromkeys(
        ("exact", "differentiable", "capturable"), False
    )
    assert chosen_fused(settings, torch.device(device)) == ("numba" if device == "cpu" else "")
    for flag in ("exact", "differentiable", "capturable"):
        assert chosen_fused({**settings, flag: True}, torch.device(device)) == ""
    named = chosen_fused({**settings, "fused": True}, torch.device(device))
    assert named == ("numba" if device == "cpu" else "triton")


@every_way
def test_an_expanded_parameter_is_refused_and_nothing_is_stepped(way):
    q, p = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1).expand(4))
    optimizer = RecAdam([("q", q), ("p", p)], anchors={"q": torch.zeros(4)}, **K, **way)
    q.grad = p.grad = torch.ones(4)
    assert_refused(optimizer, r"'p': its data is a view that cannot be written to")


@pytest.mark.parametrize(
    "anchors", [5, True, b"x", "w", torch.ones(2), [("w", torch.ones(2))], len, {3: torch.ones(2)}]
)
@pytest.mark.parametrize("where", ["constructor", "group"])
def test_anchors_that_are_no_dict_by_name_are_named(anchors, where):
    named = [("w", nn.Parameter(torch.ones(2)))]
    params = [{"params": named, "anchors": anchors}] if where == "group" else named
    with pytest.raises(RecAdamError, match=r"^anchors: "):
        RecAdam(params, **({} if where == "group" else {"anchors": anchors}))


def test_figures_of_a_parameter_whose_shape_was_changed_are_refused():
    w = nn.Parameter(torch.ones(1, 4))
    optimizer = RecAdam([("w", w)], **K)
    give_gradients([w])
    optimizer.step()
    for shape in ((2, 4), (1, 1)):
        w.grad, w.data = None, torch.zeros(shape)
        for act in (
            optimizer.drift,
            lambda: optimizer.interpolate(0.5),
            optimizer.interpolated(0.5).__enter__,
        ):
            assert_refused(optimizer, "'w' has shape .* its anchor", act)


@pytest.mark.parametrize("flag", [np.array([1, 2]), torch.ones(2), torch.ones((), device="meta"), "x"])
def test_a_flag_that_has_no_truth_is_refused_between_steps(flag):
    params = parameters((2,))
    optimizer = RecAdam(params, **K)
    give_gradients(params)
    optimizer.step()
    optimizer.param_groups[0]["capturable"] = flag
    with pytest.raises(RecAdamError, match="capturable is"):
        optimizer.step()


def test_a_group_without_a_rate_or_with_more_parameters_is_refused():
    params = parameters((2,), (3,))
    optimizer = RecAdam([("a", params[0])], **K)
    give_gradients(params)
    optimizer.param_groups[0]["params"].append(params[1])
    for act in (optimizer.step, optimizer.drift, lambda: optimizer.interpolate(0.5)):
        with pytest.raises(RecAdamError, match="parameters"):
            act()
    optimizer.param_groups[0]["params"].pop()
    del optimizer.param_groups[0]["lr"]
    assert_refused(optimizer, "a group has no 'lr'")
