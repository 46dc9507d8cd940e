"""The examples run, and end with a figure."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.heavy


def run(*words, **variables):
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["plain_loop.py"],
        ["plain_loop.py", "--bfloat16", "--rounding", "compensated"],
        ["trainer.py"],
        ["lora.py"],
        ["recipe.py"],
        ["recipe.py", "--plain"],
        ["anchor_trainer.py"],
        ["anchor_muon.py"],
        ["jax_nnx.py"],
        ["jax_equinox.py"],
    ],
    ids=" ".join,
)
def test_an_example_ends_with_its_accuracy(words):
    script, *options = words
    last = run(EXAMPLES / script, "--steps", 8, *options).strip().splitlines()[-1]
    found = re.search(r"test accuracy: (0\.\d{3})$", last)
    assert 0.4 < float(found[1]) < 0.9


def test_the_example_of_sentences_finds_what_it_found():
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("datasets")
    printed = run(EXAMPLES / "sentences.py", "--steps", 4)
    pattern = r"^(before|after): finds (0\.\d{3}) of posts, (0\.\d{3}) of SNLI, (0\.\d{3}) of news$"
    lines = re.findall(pattern, printed, re.M)
    assert [line[0] for line in lines] == ["before", "after"]
    figures = [[float(x) for x in line[1:]] for line in lines]
    assert all(abs(x - y) < 0.05 for x, y in zip(*figures, strict=True))


@pytest.mark.skipif("RECADAM_GEMMA" not in os.environ, reason="asks for --accept-gemma-terms")
@pytest.mark.parametrize("words", [["sft.py"], ["dpo.py"], ["dpo.py", "--second-model"]], ids=" ".join)
def test_an_example_with_a_decoder(words):
    pytest.importorskip("trl")
    script, *options = words
    printed = run(EXAMPLES / script, "--steps", 3, "--accept-gemma-terms", *options).strip().splitlines()
    assert re.search(r"test accuracy: 0\.\d{3}$", printed[-1])


@pytest.mark.parametrize("name", ["axolotl", "swift"])
def test_the_plugin_of_a_trainers_trainer(name):
    pytest.importorskip(name)
    code = {
        "axolotl": "from axolotl.utils.dict import DictDefault; import axolotl_anchor as a; "
        "(c,) = a.AnchorPlugin().add_callbacks_post_trainer(DictDefault(anchor_pull=0.5), None)",
        "swift": "import swift_anchor as a; c = a.callbacks_map['anchor'](None, None)",
    }[name]
    assert run("-c", f"{code}; print(type(c).__name__)", PYTHONPATH=str(EXAMPLES)).strip() == "AnchorCallback"


def test_the_example_on_two_processes():
    words = ["-m", "torch.distributed.run", "--nproc-per-node", 2, EXAMPLES / "fsdp2.py", "--steps", 6]
    printed = run(*words)
    held = [int(number.replace(",", "")) for number in re.findall(r"holds ([\d,]+) of", printed)]
    assert len(held) == 2
    assert sum(held) == 17241984
    assert re.search(r"test accuracy: 0\.\d{3}", printed)


def test_the_example_on_eight_devices():
    flag = "--xla_force_host_platform_device_count=8"
    printed = run(EXAMPLES / "jax_sharded.py", "--steps", 4, XLA_FLAGS=flag)
    assert "step 3: the anchors are released" in printed
    assert "a device holds 6,466,038 of 51,728,262 numbers" in printed
    assert re.search(r"test accuracy: 0\.\d{3}$", printed.strip())


def test_the_plain_loop_resumes(tmp_path):
    """Half of it, then the rest with the same line; the checkpoint is there."""
    words = [EXAMPLES / "plain_loop.py", "--folder", tmp_path, "--every", 3]
    run(*words, "--steps", 6)
    assert "resumed at step 6" in run(*words, "--steps", 9)
