"""The one-pass kernels: the bits of the loop form in every dtype, layout and number of threads."""

from __future__ import annotations

import copy
import itertools
import operator
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import save_file
from torch import nn

from recadam_core import Coefficients, Constant, RecAdamError, Sigmoid
from recadam_torch import Anchors, kernel_
from recadam_torch import RecAdam as TorchRecAdam
from recadam_torch.kernels import FUSED, fused_kernel
from recadam_torch.memory import laid

# Triton's interpreter takes a process of its own, which sees this file with Triton's tests alone.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHUNK = 1 << 14
if INTERPRETED:
    from recadam_torch.kernels.triton import CHUNK, TritonKernel
    from recadam_torch.rounding import noise, round_

SHAPES = ((300, 300), (7,), (3, 5), (), (1,), (0,), (2, CHUNK + 1))
F32, F64, B16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
CPU = torch.device("cpu")


def arrays(dtype, anchor_dtype, pulls, transposed=False, seed=0):
    torch.manual_seed(seed)
    wide = torch.promote_types(dtype, F32)
    columns = [[torch.randn(s).to(d) for s in SHAPES] for d in (dtype, dtype, wide, wide, anchor_dtype)]
    columns[3] = [x.abs() for x in columns[3]]
    if transposed:
        for column in columns:
            column[0] = column[0].t()
            column[2] = torch.randn(5, 3).abs().to(column[2].dtype).t()
    return [*columns[:4], columns[4] if pulls else None]


def assert_same(found, expected):
    for name, xs, ys in zip(("theta", "grad", "m", "v"), found, expected, strict=False):
        for x, y in zip(xs, ys, strict=True):
            assert torch.equal(x, y), (name, x.shape, (x - y).abs().max())


KERNELS = {name: lambda name=name: fused_kernel(name) for name in FUSED if name != "triton"}
if INTERPRETED:
    KERNELS = {"triton": TritonKernel}
CASES = [
    (name, *case)
    for name in KERNELS
    for case in itertools.product((F32, F64, B16, F16), (F32, B16, F16), (0.0, 0.01), (True, False))
    if name == "numba"  # the others take their time
    or (name == "compiled" and case[0] in (F32, B16) and case[1] in (F32, B16) and case[2])
    or (name == "triton" and case[1] != F16 and bool(case[2]) == case[3])
]


@pytest.mark.parametrize(("name", "dtype", "anchor", "decay", "pulls"), CASES, ids=lambda x: str(x)[-8:])
def test_every_dtype_gets_the_bits_of_the_loop(name, dtype, anchor, decay, pulls):
    c = Coefficients(0.9, 0.999, 1e-3, 1e-8, 0.25 if pulls else 0.0, decay)
    kernel = KERNELS[name]()
    for transposed in (False, True):
        expected, found = (arrays(dtype, anchor, pulls, transposed) for _ in range(2))
        for _ in range(2):  # of what it has seen it looks at less
            kernel_(*expected, c, exact=True)
            kernel(*found, c)
        assert_same(found, expected)


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "compiled"])
def test_values_at_the_ends_of_bfloat16_and_float16(name):
    """Ties, the largest numbers, what overflows, infinity and NaN are rounded as torch rounds them."""
    for dtype in (B16, F16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        theta = bits.view(dtype).clone()
        zeros = torch.zeros(len(theta))
        grad = torch.zeros(len(theta), dtype=dtype)
        m = torch.linspace(-1, 1, len(theta)) * theta.float().abs().nan_to_num(1.0, 1.0, 1.0) * 0.01
        c = Coefficients(1.0, 1.0, 1.0, 1.0, 0.0, 0.0)
        expected = (theta.float() - m).to(dtype)
        found = theta.clone()
        with np.errstate(all="ignore"):
            KERNELS[name]()([found], [grad], [m.clone()], [zeros.clone()], None, c)
        # Triton's interpreter reads bfloat16 numbers below its normal ones as zeros.
        flushes = name == "triton" and dtype == B16
        seen = (theta.abs() > 2.0**-125) | theta.isnan() if flushes else slice(None)
        torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=0, equal_nan=True)


# What the optimizer keeps of the last step.


def model_of(count=4, dtype=F32):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3, i + 1).to(dtype)) for i in range(count)]
    return [(f"p{i}", p) for i, p in enumerate(params)]


def backward(named, t):
    generator = torch.Generator().manual_seed(t)
    for _, p in named:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


SETTINGS = {"lr": 1e-2, "gamma": 10.0, "annealing": Sigmoid(k=0.5, t0=6.0)}


def swap_data(optimizer, named):
    named[1][1].data = named[1][1].data.clone()


def swap_moment(optimizer, named):
    state = optimizer.state[named[2][1]]
    state["exp_avg"] = state["exp_avg"].clone()


def swap_moments_data(optimizer, named):
    state = optimizer.state[named[2][1]]
    state["exp_avg_sq"].data = state["exp_avg_sq"].data.clone()


def swap_step(optimizer, named):
    state = optimizer.state[named[0][1]]
    state["step"] = state["step"].clone()


def no_grad(optimizer, named):
    named[3][1].grad = None


def strided_grad(optimizer, named):
    named[1][1].grad = named[1][1].grad.t().contiguous().t()


def other_rate(optimizer, named):
    optimizer.param_groups[0]["lr"] = 3e-3


def no_rate(optimizer, named):
    """Without a pull, the anchors are not looked at; with the next one they are again."""
    optimizer.param_groups[0]["lr"] = 1e-2 if optimizer.param_groups[0]["lr"] == 0 else 0.0


def turned_data(optimizer, named):
    named[2][1].data = named[2][1].data.t()


def turned_moment(optimizer, named):
    state = optimizer.state[named[2][1]]
    state["exp_avg"].data = state["exp_avg"].data.t()


def negative_view(optimizer, named):
    """As autograd leaves them after complex conjugates."""
    for _, p in named:
        p.grad = torch._neg_view(p.grad)


def inferred(optimizer, named):
    """A step before the one that is compared, in a mode in which tensors are made for good."""
    with torch.inference_mode():
        optimizer.step()


def expanded(optimizer, named):
    named[1][1].grad = torch.ones(()).expand(named[1][1].shape)


def other_flag(optimizer, named):
    optimizer.param_groups[0]["maximize"] = True


def another_group(optimizer, named):
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer.add_param_group({"params": [("more", p)], "anchored": False})


def reload(optimizer, named):
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "change",
    [swap_data, swap_moment, swap_moments_data, swap_step, no_grad, strided_grad, other_rate, other_flag,
     another_group, reload, no_rate, turned_data, turned_moment, negative_view, inferred, expanded],
)  # fmt: skip
def test_nothing_that_changes_between_steps_goes_unseen(change):
    ours, theirs = model_of(), model_of()
    optimizer = TorchRecAdam(ours, fused="numba", **SETTINGS)
    reference = TorchRecAdam(theirs, exact=True, **SETTINGS)
    for t in range(66):  # the anchors are freed at 62
        for named, opt in ((ours, optimizer), (theirs, reference)):
            backward(named, t)
            if t in (3, 4, 57):
                change(opt, named)
            opt.step()
        freed = optimizer.state[ours[0][1]]["anchor"] is None
        assert optimizer._planner._prepared or freed or (change in (no_grad, other_flag) and t > 2)
        for (name, p), (_, q) in zip(ours, theirs, strict=True):
            assert torch.equal(p, q), (t, name)
            assert optimizer.state[p]["step"] == reference.state[q]["step"]
    freed = [optimizer.state[p]["anchor"] is None for _, p in ours]
    assert freed == [reference.state[p]["anchor"] is None for _, p in theirs]
    assert all(freed)


@pytest.mark.parametrize("size", [10, 1001, 2_000_000])
def test_a_parameter_of_another_size_is_refused(size):
    p = nn.Parameter(torch.randn(1000))
    optimizer = TorchRecAdam([p], fused="numba", **SETTINGS)
    for _ in range(2):
        p.grad = torch.ones(1000)
        optimizer.step()
    whole, p.grad = p.data, None
    p.data = whole[:size] if size < 1000 else torch.randn(size)
    p.grad = torch.ones(size)
    before = whole.clone()
    with pytest.raises(RecAdamError, match=rf"parameter .params.0.. has shape \({size},\), its first moment"):
        optimizer.step()
    assert torch.equal(whole, before)


@pytest.mark.parametrize("place", ["memory", "file"])
def test_anchors_in_more_bits_are_rounded_first(tmp_path, place):
    """Whatever is wider than the moments is rounded to them, as in the other ways to step."""
    named = model_of()
    anchors = {name: p.detach().double() + 1e-9 for name, p in named}
    found = []
    for flags in ({"fused": "numba"}, {"exact": True}):
        named = model_of()
        given = anchors
        if place == "file":
            save_file(anchors, tmp_path / "anchors.safetensors")
            given = Anchors.of(nn.ParameterDict(dict(named)), tmp_path / "anchors.safetensors", place="file")
        optimizer = TorchRecAdam(named, anchors=given, **SETTINGS, **flags)
        for t in range(5):
            backward(named, t)
            optimizer.step()
        found.append([p for _, p in named])
    assert all(map(torch.equal, *found))


def test_moments_in_sixteen_bits_are_stepped_in_another_way():
    found = []
    for flags in ({"fused": "numba"}, {"fused": False}):
        named = model_of()
        optimizer = TorchRecAdam(named, **SETTINGS, **flags)
        backward(named, 0)
        optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        for entry in state["state"].values():
            entry.update({key: entry[key].bfloat16() for key in ("exp_avg", "exp_avg_sq")})
        optimizer.load_state_dict(state)
        for t in range(1, 4):
            backward(named, t)
            optimizer.step()
        found.append([p for _, p in named])
    assert all(map(torch.equal, *found))


def test_what_is_freed_is_freed_and_what_is_kept_is_seen():
    named = model_of(dtype=B16)
    settings = {**SETTINGS, "annealing": Sigmoid(k=50.0, t0=2), "rounding": "compensated"}
    optimizer = TorchRecAdam(named, fused="numba", **settings)
    held = weakref.ref(optimizer.state[named[0][1]]["anchor"])
    for t in range(6):
        backward(named, t)
        optimizer.step()
    assert held() is None
    state = optimizer.state[named[2][1]]
    state["residual"] = state["residual"].clone()
    before = state["residual"].clone()
    backward(named, 6)
    optimizer.step()
    assert not torch.equal(state["residual"], before)


def test_the_default_is_one_pass_and_holds_no_gradients():
    named = model_of()
    optimizer = TorchRecAdam(named, **SETTINGS)
    for t in range(3):
        backward(named, t)
        optimizer.step()
    held = [weakref.ref(p.grad) for _, p in named]
    assert len(optimizer._planner._prepared) == 1
    optimizer.zero_grad()
    assert not any(ref() is not None for ref in held)


# Triton.


@pytest.mark.heavy
def test_triton_under_its_interpreter():
    """The tests of this file that have its name."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, __file__, "-k", "triton and not interpreter", "-W", "ignore"],
        capture_output=True, text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    assert "48 passed" in result.stdout


needs_triton = pytest.mark.skipif(not INTERPRETED, reason="runs under Triton's interpreter")


@needs_triton
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("dtype", "rounding"), [(F32, "nearest"), (B16, "stochastic"), (B16, "compensated")])
def test_triton_walks_the_path_of_the_others(capturable, maximize, dtype, rounding):
    ours, theirs = model_of(dtype=dtype), model_of(dtype=dtype)
    flags = {"maximize": maximize, "rounding": rounding, **SETTINGS}
    optimizer = TorchRecAdam(ours, fused="triton", capturable=capturable, **flags)
    reference = TorchRecAdam(theirs, exact=not capturable, capturable=capturable, fused=False, **flags)
    for t in range(8):
        for named, opt in ((ours, optimizer), (theirs, reference)):
            backward(named, t)
            opt.step()
    for (_, p), (_, q) in zip(ours, theirs, strict=True):
        # The reference takes torch's square root where coefficients are of the device.
        torch.testing.assert_close(p, q, rtol=1e-6 if capturable and dtype == F32 else 0, atol=0)
        assert optimizer.state[p]["step"] == 8


@needs_triton
def test_triton_rounds_by_the_chance_of_the_others():
    theta, grad, m, v, anchor = arrays(B16, F32, True)
    expected = [x.clone() for x in theta]
    wide, m2, v2 = [x.float() for x in theta], [x.clone() for x in m], [x.clone() for x in v]
    c = Coefficients(0.9, 0.999, 1e-3, 1e-8, 0.25, 0.01)
    kernel_(wide, [-g.float() for g in grad], m2, v2, anchor, c, exact=True)
    names = [f"p{i}" for i in range(len(theta))]
    round_(expected, wide, [], [noise(x, name, 7) for x, name in zip(expected, names, strict=True)])
    TritonKernel()(theta, grad, m, v, anchor, c, negates=True, chance=(names, 7))
    assert_same([theta, [], m, v], [expected, [], m2, v2])


@needs_triton
@pytest.mark.parametrize("moments", [B16, F16])
def test_triton_keeps_moments_in_sixteen_bits(moments):
    theta, grad, m, v, anchor = arrays(F32, B16, True)
    m, v = ([x.to(moments) for x in xs] for xs in (m, v))
    c = Coefficients(0.9, 0.999, 1e-3, 1e-8, 0.25, 0.01)
    wide = [[x.clone() for x in theta], grad, [x.float() for x in m], [x.float() for x in v], anchor]
    kernel_(*wide, c, exact=True)
    TritonKernel()(theta, grad, m, v, anchor, c)
    assert_same([theta, [], m, v], [wide[0], [], *([x.to(moments) for x in xs] for xs in wide[2:4])])


@needs_triton
def test_what_a_grad_scaler_finds_stays_on_the_device_with_triton():
    """As torch.amp.GradScaler drives an optimizer that says it sees to scale and infinity itself."""
    ours, theirs = model_of(), model_of()
    optimizer = TorchRecAdam(ours, fused="triton", capturable=True, **SETTINGS)
    reference = TorchRecAdam(theirs, fused="triton", capturable=True, **SETTINGS)
    assert optimizer._step_supports_amp_scaling
    assert not TorchRecAdam(model_of(), **SETTINGS)._step_supports_amp_scaling
    for t in range(6):
        infinite = t in (0, 3)
        backward(ours, t)
        for _, p in ours:
            p.grad *= 8.0
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(infinite))
        optimizer.step()
        if not infinite:
            backward(theirs, t)
            reference.step()
        for (_, p), (_, q) in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
            assert infinite or torch.equal(p.grad, q.grad)  # it is unscaled where it lies
            assert optimizer.state[p]["step"] == reference.state[q]["step"]


def laid_out_otherwise(x, way):
    """The same values in another layout, or at an odd address."""
    if way == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if way == "transposed":
        return x.transpose(1, 3).contiguous().transpose(1, 3)
    if way == "odd address":
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    return x


@pytest.mark.parametrize("fused", [name for name in KERNELS if name != "compiled"])
@pytest.mark.parametrize(
    "ways", [("channels_last",), ("transposed",), ("odd address",), ("channels_last", "")]
)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_triton_and_numba_walk_other_layouts_where_they_lie(fused, ways, rounding):
    """Nothing is copied where parameter, gradient and all the rest are laid out alike."""
    found = []
    for flags in ({"fused": fused}, {"fused": False, "exact": True}):
        torch.manual_seed(0)
        dtype = F32 if rounding == "nearest" else B16
        named = [(f"p{i}", nn.Parameter(torch.randn(3, 5, 2, 4).to(dtype))) for i in range(2)]
        if "exact" not in flags:
            for i, (_, p) in enumerate(named):
                p.data = laid_out_otherwise(p.data, ways[i % len(ways)])
        optimizer = TorchRecAdam(named, rounding=rounding, **SETTINGS, **flags)
        for t in range(4):
            backward(named, t)
            if "exact" not in flags:
                for i, (_, p) in enumerate(named):
                    p.grad = laid_out_otherwise(p.grad, ways[i % len(ways)])
            optimizer.step()
        found.append([p for _, p in named])
    assert all(map(torch.equal, *found))
    if rounding == "nearest" and fused == "numba":
        columns = [[p.detach() for p in found[0]], [p.grad for p in found[0]]]
        assert all(map(operator.is_, laid(columns, F32, frozenset([F32]), CPU, (0,)).columns[0], columns[0]))


@pytest.mark.parametrize("fused", [name for name in KERNELS if name != "compiled"])
def test_triton_and_numba_step_by_an_expanded_gradient_and_leave_it(fused):
    p, q = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    grad = torch.full((), 0.5).expand(3, 4)
    for x, flags in ((p, {"fused": fused}), (q, {"fused": False, "exact": True})):
        optimizer = TorchRecAdam([x], **SETTINGS, **flags)
        x.grad = grad
        optimizer.step()
    assert torch.equal(p, q)
    assert p.grad.stride() == (0, 0)


@needs_triton
def test_triton_refuses_to_unscale_an_expanded_gradient_before_it_writes():
    named = model_of()
    optimizer = TorchRecAdam(named, fused="triton", capturable=True, **SETTINGS)
    backward(named, 0)
    optimizer.step()
    backward(named, 1)
    named[1][1].grad = torch.ones(()).expand(named[1][1].shape)
    before = [p.detach().clone() for _, p in named]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    with pytest.raises(
        RecAdamError, match="a parameter, its gradient or a moment is a view that cannot be wr"
    ):
        optimizer.step()
    assert all(map(torch.equal, before, [p for _, p in named]))


@needs_triton
def test_triton_unscales_float64_in_float64():
    theta = [torch.zeros(3, dtype=F64)]
    grad = [torch.tensor([1 / 3, 1e-300, 1e300], dtype=F64)]
    m, v = ([torch.zeros(3, dtype=F64)] for _ in range(2))
    c = Coefficients(0.9, 0.999, 1e-3, 1e-8, 0.0, 0.0)
    expected = grad[0] / 3.0
    TritonKernel()(theta, grad, m, v, None, c, scale=torch.tensor(3.0))
    assert torch.equal(grad[0], expected)


@needs_triton
@pytest.mark.parametrize("which", ["theta", "grad", "exp_avg", "anchor"])
def test_triton_refuses_a_freed_storage(which):
    named = model_of()
    optimizer = TorchRecAdam(named, fused="triton", **SETTINGS)
    for t in range(2):
        backward(named, t)
        optimizer.step()
    p = named[2][1]
    backward(named, 2)
    x = {"theta": p, "grad": p.grad}.get(which)
    x = optimizer.state[p][which] if x is None else x
    before = named[0][1].detach().clone()
    x.untyped_storage().resize_(0)
    with pytest.raises(RecAdamError, match=r"parameter .p2.: its .* is not in memory .a freed storage"):
        optimizer.step()
    assert torch.equal(before, named[0][1])


@pytest.mark.parametrize("fused", ["numba", False])
def test_a_coefficient_beyond_float32_is_infinite_there(fused):
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = TorchRecAdam([p], lr=1e40, annealing=Constant(1.0, 0.0), fused=fused)
    p.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    assert p.tolist() == [-float("inf"), float("inf")]
