"""Anchors of PyTorch models: where they are read from, how they are matched, where they are kept."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import save_file
from torch import nn

from recadam_core import Constant, RecAdamError
from recadam_torch import Anchors, CoverageWarning, RecAdam, param_groups
from recadam_torch.shards import fingerprints
from recadam_torch.sources import open_source


def net(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict(
        {
            "encoder": nn.ModuleDict({"dense": nn.Linear(3, 4), "LayerNorm": nn.LayerNorm(4)}),
            "head": nn.Linear(4, 2),
        }
    )


BODY = ["encoder.dense.weight", "encoder.dense.bias", "encoder.LayerNorm.weight", "encoder.LayerNorm.bias"]


@pytest.fixture
def pretrained():
    return {name: p.detach() + 1 for name, p in net().named_parameters() if name in BODY}


# Sources: the same anchors from whatever holds them.


def as_dict(values, folder):
    return values


def as_model(values, folder):
    model = net()
    model.load_state_dict(values, strict=False)
    return model


def as_file(values, folder):
    save_file(values, folder / "some.safetensors")
    return folder / "some.safetensors"


def as_folder(values, folder):
    save_file(values, folder / "model.safetensors")
    return str(folder)


def as_shards(values, folder):
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(values)}
    for file in set(files.values()):
        save_file({n: values[n] for n, f in files.items() if f == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def as_pickle(values, folder):
    torch.save(values, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("form", [as_dict, as_model, as_file, as_folder, as_shards, as_pickle])
def test_every_source_gives_the_same_anchors(form, pretrained, tmp_path):
    anchors = Anchors.of(net(), form(pretrained, tmp_path), new=["head.*"], strict=True)
    for name, value in pretrained.items():
        torch.testing.assert_close(anchors[name], value, rtol=0, atol=0)
    assert set(anchors) >= set(pretrained)


def test_the_model_as_it_is_now_is_copied():
    model = net()
    anchors = Anchors.of(model, new="head.*")
    before = model["head"].weight.detach().clone(), model["encoder"]["dense"].weight.detach().clone()
    with torch.no_grad():
        model["encoder"]["dense"].weight.zero_()
    assert torch.equal(anchors["encoder.dense.weight"], before[1])
    assert "head.weight" not in anchors
    assert len(anchors) == 4


def broken(kind):
    def make(folder):
        path = folder / kind
        path.write_bytes(b"not a checkpoint")
        return path

    return make


def lacking(folder):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "gone.safetensors"}})
    )
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f / "no", r"no: no such file or folder; give the pretrained checkpoint"),
        (lambda f: f, r"has no model.safetensors or pytorch_model.bin; give a checkpoint"),
        (broken("x.safetensors"), r"x.safetensors: damaged \(.*\); fetch it again"),
        (broken("x.pt"), r"x.pt: no checkpoint of torch.save that holds tensors only"),
        (broken("x.safetensors.index.json"), r"damaged index"),
        (lacking, r"names gone.safetensors, which is not there; fetch it"),
        (lambda f: {}, "the state dict holds no tensors; give the weights"),
        (lambda f: 3, "anchors: int; give a path, a state dict or a model"),
        (lambda f: {"x.y": torch.ones(1)}, r"nothing in the state dict matches a parameter; it has x.y"),
    ],
)  # fmt: skip
def test_a_source_that_is_none(make, message, tmp_path):
    with pytest.raises(RecAdamError, match=message) as caught:
        Anchors.of(net(), make(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_pickle_with_code_in_it_is_refused(tmp_path):
    torch.save({"w": torch.nn.Linear(1, 1)}, tmp_path / "x.pt")
    with pytest.raises(RecAdamError, match=r"holds tensors only"):
        open_source(tmp_path / "x.pt")


# Matching.


def renamed(values, change):
    return {change(name): value for name, value in values.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n,
        lambda n: f"bert.{n}",
        lambda n: f"module.{n}",
        lambda n: f"_orig_mod.module.{n}",
        lambda n: n.removeprefix("encoder."),
        lambda n: n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"),
        lambda n: f"module.bert.{n.replace('Norm.weight', 'Norm.gamma')}",
    ],
)  # fmt: skip
def test_names_match_but_for_prefixes(change, pretrained):
    anchors = Anchors.of(net(), renamed(pretrained, change), new=["head.*"], strict=True)
    for name, value in pretrained.items():
        assert torch.equal(anchors[name], value)


def test_a_head_is_not_matched_by_chance(pretrained):
    """A new head's layer of the same shape as another head's stays new, whatever prefix would fit."""
    model = nn.ModuleDict({"encoder": net()["encoder"], "head": nn.ModuleDict({"dense": nn.Linear(3, 4)})})
    other = {**pretrained, "lm.dense.weight": torch.zeros(4, 3), "lm.dense.bias": torch.zeros(4),
             "dense.other": torch.zeros(4)}  # fmt: skip
    with pytest.warns(
        CoverageWarning, match=r"no anchor for head.dense.weight \(nearest in the source: lm.den"
    ):
        anchors = Anchors.of(model, other)
    assert set(anchors) == set(BODY)
    assert anchors.coverage.unused == {
        "lm.dense.weight": "head.dense.weight", "lm.dense.bias": "head.dense.bias", "dense.other": "",
    } or set(anchors.coverage.unused) == {"lm.dense.weight", "lm.dense.bias", "dense.other"}  # fmt: skip


def test_what_does_not_match_is_told_and_refused_on_request(pretrained):
    pretrained["encoder.dense.weight"] = torch.zeros(4, 5)
    pretrained["encoder.dense.bios"] = pretrained.pop("encoder.dense.bias")
    with pytest.warns(CoverageWarning) as caught:
        anchors = Anchors.of(net(), pretrained, new=["head.*"])
    assert str(caught[0].message) == (
        "anchors: no anchor for encoder.dense.weight (is 4×5 in the source), encoder.dense.bias (nearest in "
        "the source: encoder.dense.bios); name them in new=[...] if they are new"
    )
    statuses = {match.parameter: match.status for match in anchors.coverage.matches}
    assert statuses["encoder.dense.weight"] == "shape"
    assert statuses["encoder.dense.bias"] == "new"
    with pytest.raises(RecAdamError, match=r"no anchor for encoder.dense.weight"):
        Anchors.of(net(), pretrained, new=["head.*"], strict=True)
    with pytest.raises(RecAdamError, match=r"new='heads.\*' matches no parameter; the nearest is 'head"):
        Anchors.of(net(), pretrained, new=["heads.*"])


def test_two_that_match_are_none(pretrained):
    twice = {**renamed(pretrained, lambda n: f"q.{n}"), **renamed(pretrained, lambda n: f"k.{n}")}
    with pytest.raises(
        RecAdamError, match=r"no anchor for encoder.dense.weight \(several match: k.enc|nothing in"
    ):
        Anchors.of(net(), twice, new=["head.*"], strict=True)


def test_tied_weights_are_one_parameter_under_any_of_their_names():
    model = nn.ModuleDict({"shared": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
    model["out"].weight = model["shared"].weight
    for name in ("shared.weight", "out.weight"):
        anchors = Anchors.of(model, {name: torch.ones(5, 3)}, strict=True)
        assert list(anchors) == ["shared.weight"]
        optimizer = RecAdam(param_groups(model, anchors))
        assert torch.equal(optimizer.state[model["shared"].weight]["anchor"], torch.ones(5, 3))


def test_frozen_parameters_need_no_anchor(pretrained):
    model = net()
    model["encoder"]["dense"].requires_grad_(False)
    anchors = Anchors.of(model, pretrained, new=["head.*"], strict=True)
    assert {m.parameter for m in anchors.coverage.having("frozen")} == set(BODY[:2])
    assert not anchors.coverage.unused
    # But they have one, when they are trained later.
    model.requires_grad_(True)
    assert [group["anchored"] for group in param_groups(model, anchors)] == [True, False]
    assert set(anchors) == set(BODY)
    del pretrained["encoder.dense.weight"]
    model["encoder"]["dense"].requires_grad_(False)
    assert "encoder.dense.weight" not in Anchors.of(model, pretrained, new=["head.*"], strict=True)


def test_anchors_of_another_model_are_refused(pretrained):
    anchors = Anchors.of(nn.DataParallel(net()), pretrained, new=["module.head.*"], strict=True)
    assert len(RecAdam(net().named_parameters(), anchors=anchors).state) == 6  # the same but for a wrapper
    other = nn.ModuleDict({"body": nn.Linear(3, 4)})
    for make in (
        lambda: param_groups(other, anchors),
        lambda: RecAdam(other.named_parameters(), anchors=anchors),
    ):
        with pytest.raises(RecAdamError, match=r"matched to a model without a parameter 'body.weight'"):
            make()
    wide = net()
    wide["encoder"]["dense"] = nn.Linear(5, 4)
    with pytest.raises(RecAdamError, match=r"was matched as \(4, 3\), and is \(4, 5\) now"):
        RecAdam(param_groups(wide, anchors))
    with pytest.raises(RecAdamError, match=r"anchors: 'bert.encoder.dense.weight' matches no parameter"):
        param_groups(net(), renamed(pretrained, lambda n: f"bert.{n}"))


def test_a_module_called_like_a_wrapper_is_none():
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "base_layer": nn.Linear(2, 2)})
    anchors = Anchors.of(
        model, {n: torch.full_like(p, i) for i, (n, p) in enumerate(model.named_parameters())}
    )
    assert [anchors[n].unique().item() for n, _ in model.named_parameters()] == [0, 1, 2, 3]


def test_checkpoints_of_torch_before_1_6_are_read(pretrained, tmp_path):
    torch.save(pretrained, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    anchors = Anchors.of(net(), tmp_path / "old.bin", new=["head.*"], strict=True)
    assert torch.equal(anchors[BODY[0]], pretrained[BODY[0]])


def test_the_report_is_a_table_that_can_be_read(pretrained):
    del pretrained["encoder.dense.bias"]
    pretrained["pooler.weight"] = torch.ones(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        coverage = Anchors.of(net(), pretrained, new=["head.*"]).coverage
    assert str(coverage) == (
        "3 of 6 parameters anchored (58.8% of 34 numbers) in memory; new: encoder.dense.bias, head.weight, "
        "head.bias"
    )
    console = pytest.importorskip("rich.console").Console(width=160, record=True, file=io.StringIO())
    console.print(coverage)
    lines = console.export_text().splitlines()
    assert lines[0] == str(coverage)
    assert any(line.split()[:3] == ["encoder.dense.weight", "4×3", "anchored"] for line in lines)
    layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(12)])
    console.print(Anchors.of(layers, layers).coverage)
    assert any(line.split() == ["*.weight", "3×3", "×12", "anchored"]
               for line in console.export_text().splitlines())  # fmt: skip
    assert any("not used" in line and "pooler.weight" in line for line in lines)


# Places.


@pytest.mark.parametrize("place", ["device", "host", "file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_storage_changes_no_more_than_the_dtype_does(place, dtype, pretrained, tmp_path):
    path = as_file(pretrained, tmp_path)
    if place == "file" and dtype is not None:
        with pytest.raises(RecAdamError, match="place='file' keeps the file's dtype"):
            Anchors.of(net(), path, new=["head.*"], dtype=dtype, place=place)
        return

    def walk(values):
        model = net()
        optimizer = RecAdam(param_groups(model, values), lr=1e-2, gamma=10.0, annealing=Constant(1.0, 1.0))
        for t in range(5):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.1 * t)
            optimizer.step()
        return optimizer, [p.detach() for p in model.parameters()]

    rounded = {name: x.to(dtype or torch.float32).float() for name, x in pretrained.items()}
    kept, ours = walk(Anchors.of(net(), path, new=["head.*"], dtype=dtype, place=place))
    _, theirs = walk(rounded)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    held = [state["anchor"] for state in kept.state.values() if "anchor" in state]
    assert {x.dtype for x in held} == {dtype or torch.float32}
    again = pickle.loads(pickle.dumps(copy.deepcopy(kept)))
    assert all(torch.equal(s["anchor"], t["anchor"]) for s, t in
               zip(kept.state.values(), again.state.values(), strict=True) if "anchor" in s)  # fmt: skip


def test_anchors_in_a_file_are_its_pages(tmp_path):
    """No copy is made: what the process holds of a large file is what it has read."""
    model = nn.Linear(2000, 2000, bias=False)
    save_file({"weight": torch.ones(2000, 2000)}, tmp_path / "x.safetensors")
    anchors = Anchors.of(model, tmp_path / "x.safetensors", place="file")
    first, second = (anchors.part("weight", model.weight) for _ in range(2))
    assert first.data_ptr() == second.data_ptr()
    copied = Anchors.of(model, tmp_path / "x.safetensors")
    assert copied.part("weight", model.weight).data_ptr() != first.data_ptr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"place": "moon"}, "place is 'moon'; give one of device, host, file"),
        ({"dtype": torch.int8}, "dtype is torch.int8; give a floating one"),
        ({"place": "file"}, "place='file' needs a .safetensors file"),
    ],
)
def test_bad_places(options, message, pretrained):
    with pytest.raises(RecAdamError, match=message):
        Anchors.of(net(), pretrained, new=["head.*"], **options)


def test_what_is_no_number_is_no_anchor(pretrained, tmp_path):
    pretrained["encoder.dense.bias"][1] = torch.nan
    anchors = Anchors.of(net(), as_file(pretrained, tmp_path), new=["head.*"])
    with pytest.raises(RecAdamError, match=r"'encoder.dense.bias' holds NaN or infinity"):
        RecAdam(param_groups(net(), anchors))


def test_fingerprints_tell_values_and_places_apart():
    x = torch.randn(7, 3)
    (known,) = fingerprints([x])
    assert fingerprints([x.double(), x.clone()]) == [known, known]
    y = x.clone()
    y[6, 2] += 1e-6
    assert known not in fingerprints([y, x.flip(0), x.T.contiguous(), x[:6], -x])
    assert fingerprints([torch.tensor(1.0)]) != fingerprints([torch.tensor(2.0)])
    large = torch.randn(300, 1000)
    assert fingerprints([large]) == fingerprints([large.T.contiguous().T])
