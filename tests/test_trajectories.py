"""The matrix: every variant of every backend, form, annealing and dtype, against the specification."""

from __future__ import annotations

from pathlib import Path

import pytest

from recadam_core import available_backends, get_backend
from recadam_core.conformance import load_recording, record, replay, trajectory_deviation
from recadam_core.conformance.claims import ANNEALINGS, BOUNDS, check_claims
from recadam_core.errors import RecAdamError
from recadam_core.hyperparameters import FORMS

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = [(name, v) for name in available_backends() for v in get_backend(name).capabilities.variants]
RECORDINGS = {p.stem: load_recording(p) for p in sorted(GOLDEN.glob("*.npz"))}
variants = pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=lambda x: x)


@variants
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("annealing", ANNEALINGS, ids=repr)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_replayed_gradients(name, variant, form, annealing, dtype):
    recording = record(form, annealing, dtype)
    worst = trajectory_deviation(recording, replay(recording, get_backend(name), variant), replay(recording))
    assert worst.share <= BOUNDS[f"replay {dtype}"], worst


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


@variants
@pytest.mark.parametrize("case", RECORDINGS)
def test_golden_through_every_backend(name, variant, case):
    recording = RECORDINGS[case]
    worst = trajectory_deviation(recording, replay(recording, get_backend(name), variant))
    assert worst.share <= BOUNDS[f"golden {recording.dtype}"], worst


@pytest.mark.parametrize("form", ["decoupled", "proximal"])
def test_the_golden_test_can_fail(form):
    """Another form of the update misses the golden trajectory by orders of magnitude."""
    import dataclasses

    recording = RECORDINGS["sigmoid"]
    groups = tuple(dataclasses.replace(g, hp=g.hp.replace(form=form)) for g in recording.groups)
    other = dataclasses.replace(recording, groups=groups)
    assert trajectory_deviation(recording, replay(other)).share > 1e-4


def test_a_claim_that_does_not_hold_is_reported(monkeypatch):
    monkeypatch.setitem(BOUNDS, "golden float64", 1e-16)
    results = {r.claim: r for r in check_claims(get_backend("numpy"), GOLDEN)}
    assert results["replay float64"].holds
    assert not results["golden float64"].holds
    assert results["golden float64"].worst_case


@pytest.mark.parametrize("content", [b"", b"not a zip file"])
def test_damaged_golden_file(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(RecAdamError, match=r"x\.npz: damaged golden file"):
        load_recording(tmp_path / "x.npz")


def test_missing_golden_file_and_folder(tmp_path):
    with pytest.raises(RecAdamError, match="no such file"):
        load_recording(tmp_path / "x.npz")
    with pytest.raises(RecAdamError, match=r"no \.npz file there"):
        check_claims(get_backend("numpy"), tmp_path)


def test_unknown_variant():
    with pytest.raises(RecAdamError, match="unknown variant of backend 'torch'"):
        replay(record(steps=1), get_backend("torch"), "fused")
