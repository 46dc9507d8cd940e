"""What a step would do on CUDA: counted on tensors of a fake device, compiled for an H100, never run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from cuda_on_paper import CASES, counted, table
from fake_cuda import fake_cuda

from recadam_core import Coefficients, Constant, RecAdamError, Sigmoid
from recadam_torch import RecAdam, anchor, kernels, staging
from recadam_torch.kernels.triton import TritonKernel
from recadam_torch.shards import fingerprints
from recadam_torch.staging import Staging, buckets

TRITON = {"lr": 1e-5, "fused": "triton"}
B16 = torch.bfloat16


def model_of(count=3, device="cuda:1", dtype=torch.float32):
    """Parameters with gradients."""
    params = [nn.Parameter(torch.empty(100, 10, device=device, dtype=dtype)) for _ in range(count)]
    for p in params:
        p.grad = torch.empty_like(p)
    return [(str(i), p) for i, p in enumerate(params)]


# Launches, copies, questions to the device.

OPERATIONS = {"capturable": 50, "GradScaler": 50, "stochastic, capturable": 65, "compensated": 10}
"""Torch's own operations beside the kernel: for any number of tensors at most so many."""


def assert_one_launch(name, found):
    most = next((n for end, n in reversed(OPERATIONS.items()) if name.endswith(end)), 0)
    assert found["launches"] == 1, name
    assert found["waits"] == 0, name
    assert found["sent"] <= 2, name
    assert found["operations"] <= most, name


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tensors", [1, 20])
def test_a_step_is_one_launch_and_waits_for_nothing(name, tensors):
    assert_one_launch(name, counted(CASES[name], tensors))


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["float32", "float32, capturable", "bfloat16, stochastic, capturable"])
def test_a_step_of_ten_thousand_tensors_is_one_launch(name):
    assert_one_launch(name, counted(CASES[name], 10_000))


@pytest.mark.parametrize(
    ("dtype", "options", "most"),
    [
        (torch.float32, {}, 20),
        (B16, {}, 25),
        (B16, {"rounding": "compensated"}, 30),
        (B16, {"fused": "triton", "rounding": "compensated"}, 10),
    ],
)
def test_without_one_pass_an_operation_is_for_all_tensors(dtype, options, most):
    with fake_cuda() as counts:
        optimizer = RecAdam(model_of(20, dtype=dtype), lr=1e-5, **options)
        for _ in range(2):
            counts.clear()
            optimizer.step()
        assert counts.operations.total() <= most
        assert not counts.waits


def test_hashes_take_few_launches():
    with fake_cuda() as counts:
        big = torch.empty(2**26, device="cuda")
        counts.clear()
        fingerprints([big])
        assert counts.operations.total() < 16 * 40  # 2^22 elements at once


# The device of the parameters, whichever is current.


@pytest.mark.parametrize("pulls", [False, True])
def test_the_kernel_is_launched_on_the_device_of_the_parameters(pulls):
    with fake_cuda() as counts:
        named = model_of(device="cuda:1") + [(f"more{n}", p) for n, p in model_of(2, device="cuda:3")]
        if pulls:
            optimizer = torch.optim.SGD(named, lr=1e-5, foreach=False)
            anchor(optimizer)
        else:
            optimizer = RecAdam(named, **TRITON)
        optimizer.step()
        assert [device for _, _, device in counts.launches] == [1, 3]
        assert counts.current is None


def test_scale_and_finding_are_brought_to_each_device():
    with fake_cuda() as counts:
        named = model_of(device="cuda:1")
        optimizer = RecAdam(named, **TRITON, capturable=True)
        optimizer.grad_scale, optimizer.found_inf = (torch.empty((), device="cuda:0") for _ in range(2))
        optimizer.step()
        assert [k["guarded"] for _, k, _ in counts.launches] == [True]
        assert optimizer.state[named[0][1]]["step"].device.index == 1


# Graphs.


@pytest.mark.parametrize("rate", [1e-5, "host", "device"])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_what_is_captured_asks_the_host_for_nothing(rate, decay):
    with fake_cuda() as counts:
        lr = {"host": torch.tensor(1e-5), "device": torch.full((), 1e-5, device="cuda:1")}.get(rate, rate)
        optimizer = RecAdam(model_of(), fused="triton", lr=lr, capturable=True, weight_decay=decay)
        optimizer.step()
        counts.capturing = True
        counts.clear()
        optimizer.step()
        assert (len(counts.launches), counts.sent.total(), counts.waits.total()) == (1, 0, 0)


def test_a_graph_of_a_step_that_counts_on_the_host_is_refused():
    with fake_cuda() as counts:
        named = model_of()
        optimizer = RecAdam(named, **TRITON)
        optimizer.step()
        counts.capturing = True
        counts.clear()
        with pytest.raises(RecAdamError, match="a CUDA graph is being captured, and would take this one ste"):
            optimizer.step()
        assert not counts.launches
        assert optimizer.state[named[0][1]]["step"] == 1


def test_what_is_sent_while_capturing_is_sent_again_afterwards():
    """It is there when the graph is replayed, not before."""
    with fake_cuda() as counts:
        columns = [[p.detach() for _, p in model_of()] for _ in range(5)]
        kernel, c = TritonKernel(), Coefficients(0.9, 0.999, 1e-3, 1e-8, 0.0, 0.0)
        sent = []
        for capturing in (False, False, True, True, False, False):
            counts.capturing = capturing
            if len(sent) in (3,):  # other gradients, as a captured backward pass makes them
                columns[1] = [x.clone() for x in columns[1]]
            counts.clear()
            kernel(*columns[:4], None, c)
            sent.append(counts.sent.total())
        # Table, chunks and numbers; numbers alone; all of it again after the captured upload.
        assert sent == [3, 1, 1, 2, 3, 1]


def test_a_pull_is_captured_too():
    with fake_cuda() as counts:
        lr = torch.full((), 1e-5, device="cuda:1")
        optimizer = torch.optim.AdamW(model_of(), lr=lr, capturable=True, foreach=False)
        handle = anchor(optimizer)
        optimizer.step()
        peak = optimizer.param_groups[0]["anchor_peak"]
        counts.capturing = True
        counts.clear()
        optimizer.step()
        assert optimizer.param_groups[0]["anchor_peak"] is peak  # where a replay finds the last one
        assert (counts.sent.total(), counts.waits.total()) == (0, 0)
        assert len(counts.launches) == 1
        counts.capturing = False
        handle.remove()
        anchor(optimizer, annealing=Sigmoid(k=0.1, t0=5.0))
        optimizer.step()
        counts.capturing = True
        with pytest.raises(RecAdamError, match="would take this one step of the annealing again and again"):
            optimizer.step()


def test_a_pull_does_not_ask_what_a_scaler_has_found():
    with fake_cuda() as counts:
        optimizer = torch.optim.AdamW(model_of(), lr=1e-5, fused=True)
        anchor(optimizer)
        optimizer.step()
        optimizer.grad_scale, optimizer.found_inf = (torch.empty((), device="cuda:1") for _ in range(2))
        counts.clear()
        optimizer.step()
        assert not counts.waits
        assert len(counts.launches) == 1


def test_a_compiled_step_refuses_what_a_scaler_has_scaled():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = RecAdam([p], lr=1e-5)
    optimizer.step()
    before = p.detach().clone()
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    with (
        mock.patch("torch.compiler.is_compiling", return_value=True),
        pytest.raises(RecAdamError, match="a compiled step does not unscale what a GradScaler has scaled"),
    ):
        optimizer.step()
    assert torch.equal(p, before)


# Where Triton cannot build its launcher.


def test_without_a_compiler_torch_takes_the_place_of_triton():
    with (
        fake_cuda() as counts,
        mock.patch.object(kernels, "triton_fault", return_value="RuntimeError: no C compiler"),
    ):
        kernels._warn_of_triton.cache_clear()
        optimizer = torch.optim.SGD(model_of(), lr=1e-5, foreach=True)
        anchor(optimizer)
        with pytest.warns(UserWarning, match="Triton cannot launch its kernels .RuntimeError: no C compiler"):
            optimizer.step()
        optimizer.step()
        assert not counts.launches
        with pytest.raises(
            RecAdamError, match=r"install a C compiler and Python's headers .gcc, python3-dev"
        ):
            RecAdam(model_of(), **TRITON)


# Anchors on the host.


class Streams:
    """Streams and events that only note in which order things have to happen."""

    def __init__(self):
        self.done = []  # (stream, what, what it comes after)

    def stream(self, name):
        return Stream(self, name)


class Stream:
    def __init__(self, log, name):
        self.log, self.name, self.after = log, name, set()

    def do(self, what):
        self.log.done.append((what, frozenset(self.after)))
        self.after |= {what}

    def wait_stream(self, other):
        self.after |= other.after

    def record_event(self):
        return frozenset(self.after)

    def wait_event(self, event):
        self.after |= event

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize("count", [1, 2, 5])
def test_no_bucket_is_overwritten_before_it_was_read(count):
    """Of every copy into a buffer, the step that read it last comes before; of every read, its copy."""
    log = Streams()
    side, main = log.stream("side"), log.stream("main")
    anchors = [torch.full((8,), float(i)) for i in range(count)]
    filled = staging._filled

    def fill(buffer, tensors):
        side.do(("copy", buffer.data_ptr(), int(tensors[0][0])))
        return filled(buffer, tensors)

    with (
        mock.patch.object(torch.cuda, "Stream", return_value=side),
        mock.patch.object(torch.cuda, "current_stream", return_value=main),
        mock.patch.object(torch.cuda, "stream", side_effect=lambda stream: stream),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        mock.patch.object(staging, "BUCKET", 32),
        mock.patch.object(staging, "_filled", fill),
    ):
        stage = Staging(torch.device("cpu"))
        for turn in range(3):
            seen = []
            for part, stars in stage.parts(anchors):
                main.do(("read", stars[0].data_ptr(), turn, part.start))
                assert torch.equal(stars[0], anchors[part.start])
                seen += range(*part.indices(count))
            assert seen == list(range(count))
    assert len({what[1] for what, _ in log.done}) == min(2, count)  # no more than two buffers
    copied, read = {}, {}
    for what, after in log.done:
        place = what[1]
        if what[0] == "copy":
            assert read.get(place, what) in {*after, what}
            copied[place] = what
        else:
            assert copied[place] in after
            read[place] = what


def test_buckets_are_filled_in_order():
    with mock.patch.object(staging, "BUCKET", 10):
        assert buckets([4, 4, 4, 20, 1, 9, 1]) == [
            slice(0, 2),
            slice(2, 3),
            slice(3, 4),
            slice(4, 6),
            slice(6, 7),
        ]
        assert buckets([3]) == [slice(0, 1)]


@pytest.mark.parametrize("pulls", [False, True])
@pytest.mark.parametrize("fused", ["triton", False])
def test_anchors_on_the_host_come_by_the_bucket(pulls, fused):
    """On the device there is never more of them than two buckets."""
    size = 1000 * 4
    with (
        fake_cuda() as counts,
        mock.patch.object(staging, "BUCKET", 2 * size),
        mock.patch.object(torch.cuda, "Stream", return_value=Stream(Streams(), "side")),
        mock.patch.object(torch.cuda, "current_stream", return_value=Stream(Streams(), "main")),
        mock.patch.object(torch.cuda, "stream", side_effect=lambda stream: stream),
    ):
        named = model_of(7)
        stars = {name: torch.ones(100, 10) for name, _ in named}
        if pulls:
            optimizer = torch.optim.SGD(named, lr=1e-5)
            handle = anchor(optimizer, stars)
            for state in handle._states.values():
                state["anchor"] = torch.ones(100, 10)
        else:
            optimizer = RecAdam(named, lr=1e-5, fused=fused, annealing=Constant(1.0, 1.0), anchors=stars)
            for state in optimizer.state.values():
                state["anchor"] = torch.ones(100, 10)
        optimizer.step()
        counts.clear()
        optimizer.step()
        if pulls or fused:
            assert len(counts.launches) == 4
        assert counts.sent["copy_"] == 7
        stage = next(iter((handle if pulls else optimizer._planner)._staging.values()))
        assert sum(buffer.nbytes for buffer in stage._buffers) == 4 * -(-size // 16) * 16


# Compiled.

BOUNDS = {"float64": 80, "the pull alone": 32}
"""Registers a thread; of all others at most 48, with which 40 of a multiprocessor's 64 warps find room."""


@pytest.mark.heavy
def test_triton_compiles_for_cuda_without_contraction():
    """Rounded division and root, no fused multiply-add, words of 16 bytes, and registers for many warps."""
    worker = Path(__file__).with_name("cuda_on_paper.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, worker, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(result.stdout)
    assert found.keys() == CASES.keys()
    for case, row in found.items():
        assert_one_launch(case, row)
        alone = case == "the pull alone"  # which has neither root nor fraction, and reads two arrays
        assert row["fma"] == row["ftz"] == row["inexact"] == 0, case
        assert (row["sqrt"], row["div"]) == (0, 0) if alone else min(row["sqrt"], row["div"]) >= 3, case
        assert row["wide"] >= (3 if alone else 7), case
        assert row["registers"] <= BOUNDS.get(case, 48), case
        assert row["warps"] >= (24 if case == "float64" else 40), case
        # Between the layouts of two dtypes a block would go through shared memory, where all wait for all.
        assert row["shared"] == row["converted"] == row["stack"] == 0, case
    page = Path(__file__).parents[3] / "docs" / "benchmarks.md"
    for line in table(found).splitlines():
        assert line in page.read_text(encoding="utf-8").splitlines()
