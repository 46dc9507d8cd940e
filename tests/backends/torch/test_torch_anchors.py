"""Anchors of PyTorch models: where they are read from, how they are matched, where they are kept."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import warnings

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import save_file
from torch import nn

from recadam_core import Constant, Linear, RecAdamError
from recadam_torch import Anchors, CoverageWarning, RecAdam, importance_of, lora_anchors, param_groups
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


def index(**weights):
    """An index that says where weights are; one file is there, with one tensor."""

    def make(folder):
        save_file({"here": torch.ones(1)}, folder / "one.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
        return folder

    return make


def written(name, content):
    def make(folder):
        torch.save(content, folder / name)
        return folder / name

    return make


def pipe(folder):
    os.mkfifo(folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def deep(name):
    def make(folder):
        (folder / name).write_text("[" * 100_000)
        return folder / name

    return make


def empty(name):
    def make(folder):
        (folder / name).touch()
        return folder / name

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f / "no", r"no: no such file or folder; give the pretrained checkpoint"),
        (lambda f: f, r"has no model.safetensors or pytorch_model.bin; give a checkpoint"),
        (broken("x.safetensors"), r"x.safetensors: damaged \(.*\); fetch it again"),
        (broken("x.pt"), r"x.pt: no checkpoint of torch.save that holds tensors only"),
        (broken("x.safetensors.index.json"), r"damaged index"),
        (empty("x.safetensors"), r"x.safetensors: damaged \(.*\); fetch it again"),
        (empty("x.bin"), r"x.bin: no checkpoint of torch.save that holds tensors only"),
        (empty("x.safetensors.index.json"), r"damaged index"),
        (deep("x.safetensors.index.json"), r"damaged index"),
        (index(w="gone.safetensors"), r"names gone.safetensors, which is not there; fetch it"),
        (index(w="../one.safetensors"), r"names '../one.safetensors', which is not in its folder; fetch it"),
        (index(w="/etc/hostname"), r"names '/etc/hostname', which is not in its folder; fetch it again"),
        (index(w=""), r"names '', which is not in its folder; fetch it again"),
        (index(w=3), r"damaged index"),
        (index(here="one.safetensors", w="one.safetensors"), r"one.safetensors has no 'w', unlike model.saf"),
        (written("x.bin", [torch.ones(1)]), r"x.bin holds a list; give a state dict's file"),
        (written("x.bin", {"model": {"w": torch.ones(1)}}), r"x.bin holds no tensors; give the weights"),
        (pipe, r"pytorch_model.bin is no regular file; give the pretrained checkpoint"),
        (lambda f: "", "anchors: the path is empty; give the pretrained checkpoint"),
        (lambda f: "x" * 5000, "File name too long; give the pretrained checkpoint"),
        (lambda f: {3: torch.ones(1)}, "anchors: a name in the state dict is 3; give text"),
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


@pytest.mark.parametrize("new", [3, None, b"head.*", [3], ["head.*", None], [["head.*"]]])
def test_new_that_names_nothing_is_refused(new):
    with pytest.raises(RecAdamError, match=r"anchors: new is .*; give names of parameters, or patterns as"):
        Anchors.of(net(), new=new)


@pytest.mark.parametrize("model", [3, {"w": torch.ones(1)}, nn.Parameter(torch.ones(1))])
def test_a_model_that_is_none_is_refused(model):
    with pytest.raises(RecAdamError, match=r"anchors: the model is a \w+; give the module to be trained"):
        Anchors.of(model)


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


# Vocabularies.


class Speaker(nn.Module):
    """Embeddings, something between, and an output layer that is tied or has numbers of its own."""

    def __init__(self, rows, tied=False, bias=True, labels=3):
        super().__init__()
        torch.manual_seed(rows)
        self.embed, self.out = nn.Embedding(rows, 4), nn.Linear(4, rows, bias=bias)
        self.body, self.labels = nn.Linear(4, 4), nn.Linear(4, labels)
        if tied:
            self.out.weight = self.embed.weight


def as_it_was(folder, form, **options):
    return form({name: p.detach().clone() for name, p in Speaker(5, **options).named_parameters()}, folder)


FULL = Constant(1.0, 1.0)


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("form", [as_dict, as_file])
@pytest.mark.parametrize("place", ["device", "host"])
def test_a_grown_vocabulary_keeps_the_anchors_of_its_old_rows(options, form, place, tmp_path):
    model, before = Speaker(8, **options), Speaker(5, **options)
    anchors = Anchors.of(model, as_it_was(tmp_path, form, **options), strict=True, place=place)
    optimizer = RecAdam(param_groups(model, anchors), lr=0.01, gamma=50.0, annealing=FULL)
    grown = [n for n, p in model.named_parameters() if n.startswith(("embed", "out"))]
    old = dict(before.named_parameters())
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        half = (start[name][:5] + old[name]) / 2 if name in grown else (start[name] + old[name]) / 2
        torch.testing.assert_close(p[:5] if name in grown else p, half)
        if name in grown:
            assert torch.equal(p[5:], start[name][5:])
            assert anchors[name].shape == old[name].shape
    said = str(anchors.coverage)
    assert said.endswith("; new: " + ", ".join(f"{name}[5:]" for name in grown))
    matches = {m.parameter: m for m in anchors.coverage.matches}
    assert {n for n, m in matches.items() if m.note == "3 of 8 rows are new"} == set(grown)
    assert matches["embed.weight"].pulled == 20


def test_new_rows_take_the_steps_of_no_anchor_bit_for_bit(tmp_path):
    """The annealed ones: what a pull of 0 leaves."""

    def walk(gamma):
        model = Speaker(8)
        anchors = Anchors.of(model, as_it_was(tmp_path, as_dict))
        optimizer = RecAdam(param_groups(model, anchors), lr=0.01, gamma=gamma)
        for t in range(5):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            optimizer.step()
        return model, optimizer.drift()

    (pulled, drift), (free, _) = walk(50.0), walk(0.0)
    assert torch.equal(pulled.embed.weight[5:], free.embed.weight[5:])
    assert not torch.equal(pulled.embed.weight[:5], free.embed.weight[:5])
    assert 0 < drift.parameters["embed.weight"].pull_share < 1


def test_only_what_grew_with_an_embedding_is_a_vocabulary(tmp_path):
    """A head for other labels has more rows, too, and they mean something else."""
    with pytest.warns(
        CoverageWarning, match=r"labels.weight \(is 3×4 in the source\), labels.bias \(is 3 in"
    ):
        anchors = Anchors.of(Speaker(8, labels=4), as_it_was(tmp_path, as_dict))
    assert "labels.weight" not in anchors
    assert "embed.weight" in anchors
    with pytest.warns(CoverageWarning, match=r"no anchor for embed.weight \(is 5×4 in the source\)"):
        assert "embed.weight" not in Anchors.of(
            Speaker(4), as_it_was(tmp_path, as_dict)
        )  # which rows are left?
    named_new = Anchors.of(Speaker(8), as_it_was(tmp_path, as_dict), new=["embed.*", "out.*"], strict=True)
    assert "embed.weight" not in named_new


@pytest.mark.parametrize("place", ["device", "file"])
def test_a_grown_vocabulary_resumes_bit_for_bit(place, tmp_path):
    """Its new rows start elsewhere in the new process, which changes nothing."""
    path = as_it_was(tmp_path, as_file)

    def make(seed, **options):
        model = Speaker(8)
        with torch.no_grad():
            model.embed.weight[5:] += seed
        anchors = Anchors.of(model, path, place=place)
        return model, RecAdam(param_groups(model, anchors), lr=0.01, gamma=20.0, annealing=FULL, **options)

    def train(model, optimizer, steps):
        for t in steps:
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            optimizer.step()

    model, optimizer = make(0)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, range(3, 6))
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other, resumed = make(1)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(other, resumed, range(3, 6))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    # Read again from the file that the checkpoint names.
    moved = RecAdam(param_groups(other, Anchors.of(other, Speaker(8), new=())), lr=0.01, annealing=FULL)
    with pytest.raises(
        RecAdamError, match=r"'embed.weight' was saved with one of shape .8, 4. and has no imp"
    ):
        moved.load_state_dict(state)


def test_importance_and_forms_of_a_grown_vocabulary(tmp_path):
    model = Speaker(8)
    groups = param_groups(model, Anchors.of(model, as_it_was(tmp_path, as_dict)))
    with pytest.raises(RecAdamError, match=r"'embed.weight' has rows without an anchor, with which form="):
        RecAdam(groups, form="proximal")
    importance = {name: torch.full(p.shape, 0.5) for name, p in model.named_parameters()}
    optimizer = RecAdam(groups, importance=importance)
    assert optimizer.state[model.embed.weight]["importance"][:, 0].tolist() == [0.5] * 5 + [0.0] * 3
    assert optimizer.state[model.body.weight]["importance"].unique().tolist() == [0.5]


# Weights that come after the optimizer.


def loaded(model):
    model.load_state_dict(net(seed=5).state_dict())


def replaced(model):
    for p, q in zip(model.parameters(), net(seed=5).parameters(), strict=True):
        p.data = q.data.clone()


@pytest.mark.parametrize("come", [loaded, replaced])
@pytest.mark.parametrize("way", [{}, {"fused": False}, {"capturable": True}], ids=str)
def test_weights_that_come_after_the_optimizer_are_the_anchors(come, way):
    model = net()
    optimizer = RecAdam(model.named_parameters(), lr=1e-2, gamma=10.0, annealing=FULL, **way)
    optimizer.state_dict()  # takes hashes
    come(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(
        UserWarning, match=r"'encoder.dense.weight' and 3 more were overwritten after"
    ) as caught:
        optimizer.step()
    assert len(caught) == 1
    for p, q in zip(model.parameters(), net(seed=5).parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["anchor"], q)
    kept = [int(s["anchor_hash"]) for s in optimizer.state_dict()["state"].values()]
    assert kept == fingerprints(p for p in net(seed=5).parameters())
    loaded(model)  # later on it is the user's own affair
    optimizer.step()


def test_weights_that_are_rounded_or_stay_keep_their_anchors():
    model = net()
    optimizer = RecAdam(model.named_parameters(), lr=1e-2, gamma=10.0, annealing=FULL)
    held = [s["anchor"] for s in optimizer.state.values()]
    model.bfloat16()
    optimizer.step()
    assert all(s["anchor"] is x for s, x in zip(optimizer.state.values(), held, strict=True))


def test_given_anchors_stay_where_they_are(pretrained, tmp_path):
    model = net()
    for anchors in (Anchors.of(model, new=["head.*"]), pretrained):
        optimizer = RecAdam(param_groups(model, anchors), lr=1e-2, gamma=10.0)
        before = {name: x.clone() for name, x in optimizer.interpolate(0.0).items() if name in BODY}
        loaded(model)
        optimizer.step()
        after = optimizer.interpolate(0.0)
        assert all(torch.equal(after[name], x) for name, x in before.items())


def test_anchors_of_a_checkpoint_stay_where_they_are():
    """Its weights come after the optimizer, too, but so do its anchors."""
    model = net()
    optimizer = RecAdam(model.named_parameters(), lr=1e-2, gamma=10.0, save_anchors=True)
    state = copy.deepcopy(optimizer.state_dict())
    other = net(seed=3)
    resumed = RecAdam(other.named_parameters(), lr=1e-2, gamma=10.0)
    resumed.load_state_dict(state)
    loaded(other)
    resumed.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(resumed.state[q]["anchor"], p)


# What cannot be anchored.


@pytest.mark.parametrize("bad", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("given", [False, True])
def test_a_frozen_mask_of_infinities_stays_and_a_trained_one_is_refused(bad, given):
    def make(trained):
        model = nn.ParameterDict({"mask": torch.tensor([0.0, bad]), "w": torch.ones(2)})
        model["mask"].requires_grad_(trained)
        anchors = {name: p.detach().clone() for name, p in model.items()} if given else None
        return model, RecAdam(model.named_parameters(), lr=0.1, gamma=5.0, annealing=FULL, anchors=anchors)

    with pytest.raises(RecAdamError) as caught:
        make(True)
    remedy = (
        "give the pretrained values" if given else "freeze it, or put it into a group that says 'anchored'"
    )
    assert str(caught.value).startswith(f"anchors: 'mask' holds NaN or infinity; {remedy}")
    model, optimizer = make(False)
    model["mask"].requires_grad_(True)  # thawed, and no gradient gets through
    for p in model.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model["mask"].detach(), torch.tensor([0.0, bad]), equal_nan=True)
    state = optimizer.state_dict()
    make(False)[1].load_state_dict(state)
    assert sum(drift.distance for drift in optimizer.drift().parameters.values()) == 0


def test_weights_that_became_infinite_are_no_anchors():
    w = nn.Parameter(torch.ones(2))
    optimizer = RecAdam([("w", w)])
    with torch.no_grad():
        w[0] = torch.inf
    w.grad = torch.zeros(2)
    for _ in range(2):
        with pytest.raises(RecAdamError, match="anchors: 'w' holds NaN or infinity; freeze it"):
            optimizer.step()
    assert w.tolist() == [torch.inf, 1.0]
    assert optimizer.state[w]["anchor"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "use",
    [
        lambda m: Anchors.of(m),
        param_groups,
        lambda m: RecAdam(m.named_parameters()),
        lambda m: RecAdam(m.parameters()),
        lora_anchors,
        lambda m: importance_of(m.named_parameters(), []),
    ],
)
def test_a_lazy_module_is_told_to_be_run_first(use):
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(
        RecAdamError, match=r"parameter .* is of a lazy module and has no shape yet; run the mod"
    ):
        use(model)
    model(torch.ones(1, 2))
    assert len(Anchors.of(model)) == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_quantized_weights_are_left_alone(dtype):
    model = nn.Linear(2, 2)
    model.q = nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False)
    anchors = Anchors.of(model, strict=True)
    assert sorted(anchors) == ["bias", "weight"]
    assert len(RecAdam(param_groups(model, anchors)).state) == 2
    with pytest.raises(
        RecAdamError, match=r"'q' is frozen and has dtype torch.\w+; leave it out, as param_gr"
    ):
        RecAdam(model.named_parameters())
    if dtype.is_floating_point:
        with pytest.raises(RecAdamError, match=r"'q' has dtype torch.float8_e4m3fn; give one of 16 bits or"):
            RecAdam([("q", model.q.requires_grad_(True))])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.complex64])
@pytest.mark.parametrize("form", [as_dict, as_file])
def test_values_without_their_scales_are_no_anchors(dtype, form, tmp_path):
    stored = {"weight": torch.ones(2, 2).to(dtype), "bias": torch.ones(2)}
    try:
        source = form(stored, tmp_path)
    except KeyError:
        pytest.skip("this safetensors writes no such numbers")
    with pytest.warns(
        CoverageWarning, match=r"no anchor for weight \(is \w+ in the source, no floating numb"
    ):
        anchors = Anchors.of(nn.Linear(2, 2), source)
    assert list(anchors) == ["bias"]
    with pytest.raises(RecAdamError, match="anchors: 'weight' is torch"):
        RecAdam(nn.Linear(2, 2).named_parameters(), anchors=stored)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 2, device="meta"), "has no data in the source|is on the meta device; give the pretr"),
        (torch.eye(2).to_sparse(), "is sparse"),
    ],
)
def test_values_that_cannot_be_read_are_no_anchors(value, message):
    with pytest.warns(CoverageWarning, match=message):
        Anchors.of(nn.Linear(2, 2), {"weight": value, "bias": torch.ones(2)})
    with pytest.raises(RecAdamError, match=message):
        RecAdam(nn.Linear(2, 2).named_parameters(), anchors={"weight": value})


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
        (
            {"dtype": torch.float8_e4m3fn},
            "dtype is torch.float8_e4m3fn; give a floating one of 16 bits or more",
        ),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'; give a floating one"),
        ({"strict": "yes"}, "strict is 'yes'; give True or False"),
        ({"place": "file"}, "place='file' needs a .safetensors file"),
    ],
)
def test_bad_places(options, message, pretrained):
    with pytest.raises(RecAdamError, match=message):
        Anchors.of(net(), pretrained, new=["head.*"], **options)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def copied_over(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("spoil", [cut, copied_over])
@pytest.mark.parametrize("use", ["step", "drift", "state_dict", "interpolate"])
def test_a_mapped_file_that_is_written_to_is_refused(spoil, use, tmp_path):
    """Reading its pages would end the process, or pull to what is in them now."""
    model = nn.Linear(64, 64)
    path = as_file({n: p.detach() + 1 for n, p in model.named_parameters()}, tmp_path)
    anchors = Anchors.of(model, path, place="file")
    optimizer = RecAdam(param_groups(model, anchors), lr=0.01, gamma=50.0, annealing=FULL)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    spoil(path)
    arguments = [0.5] if use == "interpolate" else []
    for _ in range(2):
        with pytest.raises(
            RecAdamError, match=r"some.safetensors was written to while it was mapped; restore"
        ):
            getattr(optimizer, use)(*arguments)
    with pytest.raises(RecAdamError, match="was written to while it was mapped"):
        Anchors.part(anchors, "weight", model.weight)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    assert {int(s["step"]) for s in optimizer.state.values()} == {1}


@pytest.mark.parametrize("form", [as_file, as_shards, as_pickle])
def test_a_file_that_is_cut_before_the_optimizer_reads_it_is_refused(form, pretrained, tmp_path):
    anchors = Anchors.of(net(), form(pretrained, tmp_path), new=["head.*"])
    for path in tmp_path.glob("*[sn]"):
        if path.suffix != ".json":
            os.truncate(path, 10)
    with pytest.raises(RecAdamError, match="was written to while it was mapped"):
        RecAdam(param_groups(net(), anchors))


def test_a_mapped_file_may_be_replaced_by_renaming_or_spoilt_when_it_is_not_read_any_more(tmp_path):
    model = nn.Linear(8, 8)
    path = as_file({n: p.detach() + 1 for n, p in model.named_parameters()}, tmp_path)
    anchors = Anchors.of(model, path, place="file")
    optimizer = RecAdam(param_groups(model, anchors), lr=0.01, gamma=50.0, annealing=Linear(t0=3))
    for t in range(4):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        if t == 1:
            save_file({"other": torch.ones(1)}, tmp_path / "new")
            (tmp_path / "new").rename(path)
        optimizer.step()
        held = [s["anchor"] for s in optimizer.state.values()]
    assert held == [None, None]

    path = as_file({n: p.detach() + 1 for n, p in model.named_parameters()}, tmp_path)
    anchors = Anchors.of(model, path, place="file")
    optimizer = RecAdam(param_groups(model, anchors), lr=0.01, gamma=50.0, annealing=Linear(t0=1))
    optimizer.step()
    assert [s["anchor"] for s in optimizer.state.values()] == [None, None]
    cut(path)
    optimizer.step()
    optimizer.drift()


def test_a_group_that_is_added_later_has_its_file_watched(tmp_path):
    model = nn.Linear(64, 64)
    path = as_file({"weight": model.weight.detach() + 1}, tmp_path)
    anchors = Anchors.of(model, path, place="file", new=["bias"])
    optimizer = RecAdam([("bias", model.bias)], lr=0.01, gamma=50.0, annealing=FULL)
    optimizer.step()
    optimizer.add_param_group({"params": [("weight", model.weight)], "anchors": anchors})
    optimizer.step()
    resumed = RecAdam([("bias", model.bias)], lr=0.01, gamma=50.0, annealing=FULL)
    resumed.add_param_group({"params": [("weight", model.weight)], "anchors": anchors})
    resumed.load_state_dict(optimizer.state_dict())
    cut(path)
    for some in (optimizer, resumed):
        with pytest.raises(RecAdamError, match="was written to while it was mapped"):
            some.step()


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


MADE = """
import torch
from torch import nn
from recadam_torch import Anchors, RecAdam, feature_importance, importance_of, param_groups
from recadam_torch.shards import fingerprints

model = nn.Linear(4, 3, device="cpu", dtype=torch.float32)
with torch.no_grad():
    for i, p in enumerate(model.parameters()):
        p.copy_(torch.linspace(-1, 1, p.numel(), device="cpu", dtype=torch.float32).view(p.shape))
x = torch.linspace(0, 1, 8, device="cpu", dtype=torch.float32).view(2, 4)
{default}
found = feature_importance(model.named_parameters(), [model(x)])
found = [found, importance_of(model.named_parameters(), [model(x).square().sum()])]
optimizer = RecAdam(param_groups(model, Anchors.of(model)), lr=0.01, gamma=10.0, importance=found[0])
for p in model.parameters():
    p.grad = torch.zeros_like(p)
optimizer.step()
for state in optimizer.state_dict()["state"].values():
    print(sorted((key, str(x.dtype), str(x.device)) for key, x in state.items()))
print(fingerprints(model.parameters()), [x.tolist() for some in found for x in some.values()])
"""


def test_defaults_of_torch_change_no_tensor_that_is_made():
    """In processes of their own: some defaults outlive a test."""
    printed = set()
    for default in (
        "",
        "torch.set_default_device('meta')",
        "torch.set_default_dtype(torch.bfloat16)",
        "torch.set_default_dtype(torch.float64)",
    ):
        command = [sys.executable, "-c", MADE.replace("{default}", default)]
        printed.add(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(printed) == 1
    assert "('anchor_hash', 'torch.int64', 'cpu')" in printed.pop()
