"""Runs on two processes walk the path of one: DDP, FSDP2, accelerate; checkpoints change their number."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

WORKER = Path(__file__).with_name("distributed_worker.py")
FOLDERS = itertools.count()


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Runs a case on some processes; returns what each left."""

    def run(case, world=2, **option):
        folder = tmp_path_factory.mktemp(f"{case}{next(FOLDERS)}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            option["port"] = free.getsockname()[1]
        words = [f"{key}={value}" for key, value in option.items()]
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", WORKER, case, str(rank), str(world), folder, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        try:
            printed = [process.communicate(timeout=540)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert not any(process.returncode for process in processes), "\n".join(printed)[-4000:]
        return [torch.load(folder / f"out{rank}.pt") for rank in range(world)]

    return run


@pytest.fixture(scope="module")
def alone(launch):
    return launch("single", 1)[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The pretrained weights as a file."""
    sys.path.insert(0, str(WORKER.parent))
    try:
        import distributed_worker
    finally:
        sys.path.pop(0)
    path = tmp_path_factory.mktemp("pretrained") / "model.safetensors"
    save_file(distributed_worker.pretrained().state_dict(), path)
    return path


def assert_same(found, expected):
    for name, weights in expected["weights"].items():
        assert torch.equal(found["weights"][name], weights), name
        torch.testing.assert_close(found["between"][name], expected["between"][name], rtol=0, atol=0)
    assert found["distance"] == pytest.approx(expected["distance"], rel=1e-9)
    assert found["share"] == pytest.approx(expected["share"], rel=1e-6)


@pytest.mark.parametrize(
    ("case", "anchors", "sharded"),
    [
        ("ddp", "now", False),
        pytest.param("ddp", "file", False, marks=pytest.mark.heavy),
        pytest.param("fsdp2", "now", True, marks=pytest.mark.heavy),
        ("fsdp2", "file", True),
        pytest.param("fsdp2", "mapped file", True, marks=pytest.mark.heavy),
        ("accelerated", "now", True),
        pytest.param("accelerated", "file", True, marks=pytest.mark.heavy),
    ],
)
def test_two_processes_walk_the_path_of_one(launch, alone, checkpoint, case, anchors, sharded):
    option = {} if anchors == "now" else {"anchors": checkpoint}
    if anchors == "mapped file":
        option["place"] = "file"
    found = launch(case, **option)
    for process in found:
        assert_same(process, alone)
    # Sharded, no process holds the whole: 7 rows are 4 and 3.
    held = [sum(process["anchors"].values()) for process in found]
    assert held == ([4 * 5 + 4 + 2 * 7 + 2, 3 * 5 + 3 + 1 * 7 + 1] if sharded else [66, 66])


@pytest.mark.parametrize(
    "case", ["ddp_after", "accelerated_ddp", pytest.param("fsdp2_loaded", marks=pytest.mark.heavy)]
)
def test_weights_that_come_after_the_optimizer_are_the_anchors_of_every_process(launch, alone, case):
    """Sent by rank 0 when DDP wraps, or loaded; the processes whose weights these overwrite are told."""
    found = launch(case)
    for process in found:
        assert_same(process, alone)
    told = (
        "RecAdam: '0.weight' and 3 more were overwritten after the optimizer was made (by a wrapper's broad"
    )
    warned = [[text[: len(told)] for text in process["warned"]] for process in found]
    # Of a parameter that is spread over processes all are told.
    assert warned == [[told] if case == "fsdp2_loaded" else [], [told]]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("case", "before", "after", "option"),
    [("fsdp2", 2, 1, {}), ("fsdp2", 1, 2, {}), ("fsdp2", 2, 2, {"save": 1}), ("fsdp2", 2, 1, {"flat": 1})],
)
def test_distributed_checkpoints_are_resumed_on_another_number(
    launch, alone, tmp_path, case, before, after, option
):
    where = tmp_path / "checkpoint"
    launch(case, before, stop=5, checkpoint=where, **option)
    for process in launch(case, after, start=5, load=where, **option):
        assert_same(process, alone)


@pytest.fixture(scope="module")
def extensions(tmp_path_factory):
    """Where DeepSpeed builds what it compiles: ours, since a build that was killed leaves a lock."""
    pytest.importorskip("deepspeed")
    return tmp_path_factory.mktemp("extensions")


def assert_same_part(process, alone):
    """ZeRO's flat parts are not the model's weights, so there is nothing to interpolate."""
    assert_same({**process, "between": alone["between"]}, alone)
    assert list(process["anchors"].items()) == [("0.weight and 3 more", 34)]  # of 66, evenly, with padding


@pytest.mark.heavy
def test_zero_1_walks_the_path_of_one_process(launch, alone, extensions):
    for process in launch("zero", stage=1, extensions=extensions):
        assert_same_part(process, alone)


@pytest.mark.heavy
def test_zero_2_resumes_on_the_path_of_one_process(launch, alone, checkpoint, extensions, tmp_path):
    where, option = tmp_path / "saved", {"stage": 2, "extensions": extensions, "anchors": checkpoint}
    launch("zero", stop=5, zero_checkpoint=where, **option)
    for process in launch("zero", start=5, zero_load=where, **option):
        assert_same_part(process, alone)


@pytest.mark.heavy
def test_zero_steps_float32_copies_of_bfloat16_weights(launch, alone, extensions):
    first, second = launch("zero", stage=2, bf16=1, extensions=extensions)
    for name, weights in first["weights"].items():
        assert torch.equal(weights, second["weights"][name])
        assert weights.dtype == torch.bfloat16
        torch.testing.assert_close(weights.float(), alone["weights"][name], rtol=0.02, atol=0.005)
    assert first["distance"] == second["distance"] == pytest.approx(alone["distance"], rel=0.05)


@pytest.mark.heavy
def test_a_distributed_checkpoint_holds_no_anchors(launch, tmp_path):
    sizes = {}
    for name, option in (("hashes", {}), ("anchors", {"save": 1})):
        launch("fsdp2", stop=2, checkpoint=tmp_path / name, **option)
        metadata = dcp.FileSystemReader(tmp_path / name).read_metadata()
        sizes[name] = {key for key in metadata.state_dict_metadata if key.endswith(".anchor")}
    assert len(sizes["hashes"]) == 0
    assert len(sizes["anchors"]) == 4


@pytest.mark.parametrize("case", ["redundancy", pytest.param("broadcast", marks=pytest.mark.heavy)])
def test_a_state_that_one_process_has_is_resumed_by_all_on_the_uninterrupted_path(launch, case):
    found = launch(case)
    for process in found:
        for name, weights in process["straight"].items():
            assert torch.equal(process["resumed"][name], weights), name
            assert torch.equal(found[0]["straight"][name], weights), name
    if case == "redundancy":
        assert sum(process["stepped"] for process in found) == 4


# The pull around another optimizer.


@pytest.fixture(scope="module")
def pulled(launch):
    return launch("single", 1, pulled=1)[0]


def assert_pulled(process, pulled, flat=False):
    """Weights of the path of one process; and, in the anchors' place for a while, where all began."""
    assert_same({**process, "between": pulled["between"]} if flat else process, pulled)
    for name, weights in process["weights"].items():
        assert torch.equal(process["after"][name], weights), name
        assert flat or torch.equal(process["reference"][name], pulled["reference"][name]), name


@pytest.mark.parametrize(
    ("case", "sharded"),
    [
        pytest.param("ddp_after", False, marks=pytest.mark.heavy),
        pytest.param("accelerated_ddp", False, marks=pytest.mark.heavy),
        ("fsdp2", True),
        pytest.param("accelerated", True, marks=pytest.mark.heavy),
    ],
)
def test_two_processes_that_are_pulled_walk_the_path_of_one(launch, pulled, case, sharded):
    found = launch(case, pulled=1)
    for process in found:
        assert_pulled(process, pulled)
    held = [sum(process["anchors"].values()) for process in found]
    assert held == ([4 * 5 + 4 + 2 * 7 + 2, 3 * 5 + 3 + 1 * 7 + 1] if sharded else [66, 66])
    told = "anchor: '0.weight' and 3 more were overwritten after it was called"
    warned = [[text[: len(told)] for text in process["warned"]] for process in found]
    assert warned == [[], [told] if case in ("ddp_after", "accelerated_ddp") else []]


@pytest.mark.heavy
def test_a_checkpoint_of_two_processes_that_are_pulled_is_resumed_by_one(launch, pulled, tmp_path):
    launch("fsdp2", pulled=1, stop=5, checkpoint=tmp_path / "saved")
    (process,) = launch("single", 1, pulled=1, start=5, load=tmp_path / "saved")
    assert_pulled(process, pulled)


@pytest.mark.heavy
def test_the_anchors_that_a_first_start_has_written_serve_any_number_of_processes(launch, pulled, tmp_path):
    """As a trainer's callback writes them, of sharded parameters too."""
    more = {"pulled": 1, "started": tmp_path / "run"}
    launch("fsdp2", stop=5, checkpoint=tmp_path / "saved", **more)
    (kept,) = (tmp_path / "run").iterdir()
    assert {n: x.shape for n, x in load_file(kept).items()} == {
        n: x.shape for n, x in pulled["reference"].items()
    }
    assert all(torch.equal(x, pulled["reference"][name]) for name, x in load_file(kept).items())
    for case, count in (("fsdp2", 2), ("single", 1)):
        for process in launch(case, count, start=5, load=tmp_path / "saved", **more):
            assert_pulled(process, pulled)


@pytest.mark.heavy
def test_zero_1_that_is_pulled_resumes_on_the_path_of_one_process(launch, pulled, extensions, tmp_path):
    where, option = tmp_path / "saved", {"pulled": 1, "stage": 1, "extensions": extensions}
    launch("zero", stop=5, zero_checkpoint=where, **option)
    for process in launch("zero", start=5, zero_load=where, **option):
        assert_pulled(process, pulled, flat=True)
        assert list(process["anchors"].values()) == [34]  # of 66, evenly, with padding
