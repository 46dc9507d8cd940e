"""Replayed recordings, and the released optimizer's golden trajectories through every variant."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mpmath")

from recadam_core import RecAdamError, available_backends, get_backend
from recadam_core.conformance import Case, load_recording, replay, trajectory_deviation, walk
from recadam_core.conformance.claims import BOUNDS

GOLDEN = Path(__file__).parents[1] / "golden"
BACKENDS = ("jax", "numpy", "torch")


def variants(name):
    """Those whose process needs an environment of its own are in test_conformance."""
    if name not in available_backends():
        return ["any"]  # which is skipped
    return [v.name for v in get_backend(name).capabilities.variants if not v.environment]


VARIANTS = [(name, variant) for name in BACKENDS for variant in variants(name)]
RECORDINGS = {p.stem: load_recording(p) for p in sorted(GOLDEN.glob("*.npz"))}


def test_the_golden_cases_are_all_here():
    assert sorted(RECORDINGS) == [
        "constant_half",
        "decay_mixed_groups",
        "linear",
        "no_bias_correction",
        "sigmoid",
        "sigmoid_float32",
        "sigmoid_steep",
        "warmup_linear_decay",
    ]


@pytest.mark.parametrize("case", RECORDINGS)
def test_golden_through_the_specification(case):
    recording = RECORDINGS[case]
    worst = trajectory_deviation(recording, replay(recording))
    assert worst.share <= BOUNDS[f"golden {recording.dtype}"], worst


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=lambda x: x)
@pytest.mark.parametrize("case", RECORDINGS)
def test_golden_through_every_variant(name, variant, case):
    backend, recording = get_backend(name), RECORDINGS[case]
    if lacks := backend.capabilities.variant(variant).lacks():
        pytest.skip(f"could not import {lacks!r}")
    worst = trajectory_deviation(recording, replay(recording, backend, variant))
    assert worst.share <= BOUNDS[f"golden {recording.dtype}"], worst


@pytest.mark.parametrize("form", ["decoupled", "proximal"])
def test_the_golden_test_can_fail(form):
    """Another form of the update misses the golden trajectory by orders of magnitude."""
    recording = RECORDINGS["sigmoid"]
    groups = tuple(dataclasses.replace(g, hp=g.hp.replace(form=form)) for g in recording.groups)
    other = dataclasses.replace(recording, groups=groups)
    assert trajectory_deviation(recording, replay(other)).share > 1e-4


@pytest.mark.parametrize("content", [b"", b"not a zip file"])
def test_damaged_golden_file(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(RecAdamError, match=r"x\.npz: damaged golden file"):
        load_recording(tmp_path / "x.npz")


def other(**meta):
    return lambda data: data.update(meta=np.array(json.dumps({**json.loads(str(data["meta"])), **meta})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data.update(lr=np.empty(0)),
            r"lr is float64 \(0,\), where floating numbers \(1,\) belong",
        ),
        (lambda data: data.update(lr=np.float64(1)), "it lacks"),
        (lambda data: data.update(theta0_0=data["theta0_0"].astype(complex)), "theta0_0 is complex128"),
        (lambda data: data.update(grad_0=data["grad_0"][1:]), "grad_0 is float64"),
        (lambda data: data.update(anchor_0=data["anchor_0"][..., :-1]), "anchor_0 is float64"),
        (lambda data: data.update(theta_0=data["theta_0"].astype(int)), "theta_0 is int64"),
        (lambda data: data.pop("theta_0"), "it lacks 'theta_0"),
        (other(anneal_fun="cosine"), "unknown anneal_fun 'cosine'"),
        (other(anneal_k=-1), "Sigmoid: k is -1"),
        (other(dtype="int8"), "of dtype 'int8'"),
        (other(groups=[]), "0 groups"),
        (other(groups=7), "it lacks"),
        (other(eps="x"), "Hyperparameters: eps is 'x'"),
    ],
)
def test_a_golden_file_with_other_things_in_it_is_refused(tmp_path, change, message):
    data = dict(np.load(GOLDEN / "sigmoid.npz"))
    change(data)
    np.savez(tmp_path / "x.npz", **data)
    with pytest.raises(
        RecAdamError, match=rf"x\.npz: damaged golden file \(.*{message}.*; fetch it again"
    ) as caught:
        load_recording(tmp_path / "x.npz")
    assert "\n" not in str(caught.value)


def test_missing_golden_file(tmp_path):
    with pytest.raises(RecAdamError, match="no such file"):
        load_recording(tmp_path / "x.npz")


@pytest.mark.needs("torch")
def test_unknown_variant():
    with pytest.raises(RecAdamError, match="unknown variant 'fuse': did you mean 'fused'"):
        replay(Case(steps=1).recording(), get_backend("torch"), "fuse")


@pytest.mark.needs("torch")
def test_a_walk_starts_where_the_recording_does():
    recording = Case(arrays="mixed", steps=2).recording()
    first, *rest = walk(recording, get_backend("torch"), "foreach", moments=True)
    assert (first.t, [frame.t for frame in rest]) == (0, [1, 2])
    for name, x in recording.groups[0].theta0.items():
        np.testing.assert_array_equal(first.params[name], x)
        assert not first.moments[name].v.any()
