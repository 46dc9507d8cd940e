"""Many seeds in one program: each walks its own path."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("sklearn")

from recadam_core import RecAdamError
from recadam_harness import RunConfig, finetune
from recadam_harness.engines import OPTIMIZERS
from recadam_harness.seeds import sweep_seeds


def config(optimizer="recadam", **changes):
    return RunConfig.for_task("digits", "jax", optimizer, **{"steps": 25, "eval_every": 10, **changes})


@pytest.mark.parametrize(
    "optimizer", [x if x == "recadam" else pytest.param(x, marks=pytest.mark.heavy) for x in OPTIMIZERS]
)
def test_each_seed_walks_the_path_that_it_walks_alone(tmp_path, optimizer):
    sweep = sweep_seeds(config(optimizer), [4, 0, 2])
    assert sweep.at == [10, 20, 25]
    assert len({float(x) for x in sweep.steps["loss"][:, -1]}) == 3
    for i, seed in ((0, 4), (2, 2)):
        alone = finetune(config(optimizer, seed=seed), tmp_path / str(seed))
        for column, values in sweep.steps.items():
            np.testing.assert_allclose(values[i], alone.steps[column], rtol=1e-12, atol=1e-14)
        for j, figures in enumerate(alone.evaluations[1:]):  # the first is before any step
            assert figures["step"] == sweep.at[j]
            for name, values in sweep.evaluations.items():
                assert values[i, j] == pytest.approx(figures[name], rel=1e-12)


def test_quartiles_are_of_the_end():
    sweep = sweep_seeds(config(steps=3, eval_every=1), range(5))
    ends = sorted(sweep.evaluations["source_loss"][:, -1])
    assert sweep.quartiles("source_loss") == (ends[1], ends[2], ends[3])


@pytest.mark.parametrize(
    ("changes", "seeds", "message"),
    [
        ({}, [], "seeds are []; give some, each once"),
        ({}, [1, 1], "seeds are [1, 1]; give some, each once"),
        pytest.param(
            {"backend": "torch"},
            [0],
            "backend 'torch' trains one seed at a time; use jax",
            marks=pytest.mark.needs("torch"),
        ),
        ({"lr": 1.0}, [0], "step 1: lr * gamma * recall = "),
        ({"lr": 1e308, "gamma": 0.0, "t0": 1.0}, [5, 7], "seed 5: the loss is not finite at step "),
    ],
)
def test_what_cannot_be_swept_is_said_in_one_line(changes, seeds, message):
    backend = changes.pop("backend", "jax")
    with pytest.raises(RecAdamError) as caught, np.errstate(all="ignore"):
        sweep_seeds(RunConfig.for_task("digits", backend, **{"steps": 5, **changes}), seeds)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.heavy
def test_the_command_prints_the_spread_and_draws_it(recadam, tmp_path):
    out = tmp_path / "seeds"
    command = ["seeds", "--count", 3, "--steps", 4, "--eval-every", 2, "--optimizer", "adamw", "--out", out]
    printed = recadam(*command)
    assert printed.returncode == 0, printed.stderr
    assert "adamw" in printed.stdout
    assert "of 3 seeds after step 4" in printed.stdout
    (found,) = json.loads((out / "seeds.json").read_text())
    assert found["seeds"] == [0, 1, 2]
    assert np.shape(found["evaluations"]["target_accuracy"]) == (3, 2)
    assert (out / "seeds.png").read_bytes().startswith(b"\x89PNG")
    again = recadam(*command)
    assert again.returncode == 2
    assert again.stderr.strip().endswith(
        "seeds.json: is there already; give --overwrite or another directory"
    )
