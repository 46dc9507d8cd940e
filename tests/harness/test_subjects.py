"""What fronts are of, with tiny models: every method trains embeddings and a decoder, and does so again."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")
pytest.importorskip("peft")

import torch
from torch import nn

from recadam_core import RecAdamError
from recadam_harness.experiments import METHODS, Trial, run_trial
from recadam_harness.experiments import data as data_
from recadam_harness.experiments.decoding import Decoding
from recadam_harness.experiments.embeddings import Embeddings, reciprocal_rank
from recadam_harness.experiments.front_grids import front_arms
from recadam_harness.experiments.methods import (
    _filter,
    _project,
    freeze,
    optimizer_for,
    prune,
    rate_for,
    replayed,
)
from recadam_harness.experiments.table import Row

CPU = torch.device("cpu")
SMALL = {"rows": 24, "steps": 4, "batch_size": 8, "max_length": 16, "lr": 1e-2}
QUICK = {"embeddings": ("adamw", "replay"), "decoder": ("adamw", "l2sp", "lwf", "self-replay")}
METHODS_OF = {kind: sorted({arm.method for arm in front_arms(kind).values()}) for kind in QUICK}


@pytest.fixture(scope="module")
def material():
    """A tiny random decoder, and rows of random words of it."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from recadam_harness.experiments import decoding

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, pad_token_id=0, eos_token_id=1,
        bos_token_id=2,
    )  # fmt: skip
    rng = np.random.default_rng(0)

    def rows(count, longest):
        return [rng.integers(3, 40, rng.integers(3, longest)).tolist() for _ in range(count)]

    parts = {"train": decoding.POOL, "validation": 24, "test": 24}
    return decoding._Material(
        model=Gemma3ForCausalLM(config).eval(),
        rows={name: rows(count, 20) for name, count in parts.items()},
        labels={name: rng.integers(0, 2, count) for name, count in parts.items()},
        answers=[5, 6],
        topics=[7, 8, 9, 10, 11],
        news=rows(decoding.OLD.stop, 20),
        titles=rows(decoding.TITLES["test"].stop, 9),
        subjects=rng.integers(0, 5, decoding.TITLES["test"].stop),
        posts=rows(decoding.ARTICLES["test"].stop, 20),
        begin=2,
    )


@pytest.fixture
def tiny(request, encoders, material, monkeypatch):
    """From a kind to the settings of a trial of it, with a tiny model."""
    from recadam_harness.experiments import decoding

    monkeypatch.setattr(decoding, "_material", lambda target: material)
    splits = data_.target_of("newsgroup-pairs")
    few = dataclasses.replace(splits, validation=splits.validation.part(slice(0, 40)),
                              test=splits.test.part(slice(0, 40)))  # fmt: skip
    monkeypatch.setattr("recadam_harness.experiments.embeddings.target_of", lambda name: few)
    return {
        "embeddings": {"target": "newsgroup-pairs", "model": encoders["bert"], **SMALL},
        "decoder": {"target": "reviews-answers", "model": "gemma-270m", **SMALL},
    }


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param(kind, m, marks=() if m in QUICK[kind] else pytest.mark.heavy)
        for kind, methods in METHODS_OF.items()
        for m in methods
    ],
)
def test_every_method_trains_and_repeats(tiny, kind, method):
    more = {"share": 0.5} if "share" in METHODS[method].settings else {}
    trial = Trial(method=method, **tiny[kind], **more)
    first, again = run_trial(trial), run_trial(trial)
    assert {k: v for k, v in first.items() if k != "seconds"} == {
        k: v for k, v in again.items() if k != "seconds"
    }
    assert first["distance"] > 0
    assert first["moved"] > 0
    assert first["forgotten"] != 0
    assert Row(entry(trial), {k: v for k, v in first.items() if k != "curve"}).wrong == ""


def entry(trial):
    from recadam_harness.experiments.table import Entry

    return Entry("test", "adamw", trial)


def subject(tiny, kind="decoder", **settings):
    made = Trial(**{**tiny[kind], **settings})
    return made, (Decoding if kind == "decoder" else Embeddings)(made, CPU)


def test_of_a_row_that_is_filled_up_the_decoder_says_what_it_says_of_it_alone(tiny, material):
    _, one = subject(tiny)
    rows = [[3, 4, 5, 6, 7, 8], [9, 10], [11, 12, 13]]
    with torch.no_grad():
        together = one._last(rows)
        alone = torch.cat([material.model(input_ids=torch.tensor([row])).logits[:, -1] for row in rows])
        costs = one.nats(rows)
        logits = [material.model(input_ids=torch.tensor([row])).logits[0, :-1] for row in rows]
        told = [torch.tensor(row[1:]) for row in rows]
        each = map(partial(nn.functional.cross_entropy, reduction="sum"), logits, told)
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(costs, sum(each) / sum(len(row) - 1 for row in rows))


def test_what_was_said_before_and_is_said_again_has_not_moved(tiny):
    for kind in ("decoder", "embeddings"):
        _, one = subject(tiny, kind)
        before = one.probed()
        assert {name: one.moved(x, before[name]) for name, x in before.items()} == pytest.approx(
            dict.fromkeys(before, 0.0), abs=1e-6
        )


def test_a_decoder_has_a_pool_of_rows(tiny):
    with pytest.raises(RecAdamError, match=r"rows is 4000; a decoder draws from 3000, give no more"):
        subject(tiny, rows=4000)


def test_the_mean_reciprocal_rank():
    queries = np.eye(3)
    answers = np.array([[1.0, 0.1, 0.0], [0.9, 0.8, 0.0], [0.5, 0.6, 0.4]])
    # The cosines of the third answer with 1, 2 and 3 are .57, .68 and .46; ranks 1, 1 and 1 by column.
    similar = answers / np.linalg.norm(answers, axis=1, keepdims=True)
    ranks = [1 + sum(similar[j] @ queries[i] > similar[i] @ queries[i] for j in range(3)) for i in range(3)]
    assert reciprocal_rank(queries, answers) == pytest.approx(np.mean(1 / np.array(ranks)))


def test_mofo_moves_only_the_entries_with_the_largest_moments():
    p = nn.Parameter(torch.zeros(2, 5))
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.arange(10.0).reshape(2, 5) - 5
    before = p.detach().clone()
    optimizer.step()
    with torch.no_grad():
        _filter(optimizer, p, before, 0.3)
    assert (p != 0).flatten().tolist() == [True, True] + [False] * 7 + [True]  # 5, 4 and 4 are largest


@pytest.mark.parametrize(("towards", "radius"), [(True, 1.0), (False, 2.0)])
def test_spd_takes_back_what_the_step_adds_to_the_radius_where_the_gradient_leads_home(towards, radius):
    star, before = torch.zeros(2), torch.tensor([1.0, 0.0])
    p = nn.Parameter(torch.tensor([2.0, 0.0]))
    p.grad = torch.tensor([1.0, 0.0]) * (1 if towards else -1)
    with torch.no_grad():
        _project(p, before, star, 1.0)
    assert float(p.detach().norm()) == pytest.approx(radius)


def test_half_of_each_layers_matrices_and_norms_are_trained(tiny):
    trial, one = subject(tiny, method="half", share=0.5)
    freeze(one, trial.share, trial.seed)
    trained = [name for name, p in one.module.named_parameters() if p.requires_grad]
    for layer in (0, 1):
        within = [name for name in trained if f"layers.{layer}." in name]
        assert sum("proj" in name for name in within) == 4  # of 7
        assert sum("norm" in name for name in within) == 3  # of 6
    assert "model.embed_tokens.weight" in trained
    again = subject(tiny, method="half")[1]
    freeze(again, 0.5, trial.seed)
    assert trained == [name for name, p in again.module.named_parameters() if p.requires_grad]


def test_finch_divides_the_rate_by_the_root_of_the_mean_loss(tiny):
    trial, one = subject(tiny, method="finch")
    rate = rate_for(trial, one)
    with torch.no_grad():
        mean = np.mean([float(one.loss(t)) for t in range(1, trial.steps + 1)])
    mean = 0.9 * mean + 0.1 * 2.0
    assert rate(1, 2.0) == pytest.approx(trial.lr / mean**0.5)
    for _ in range(200):
        last = rate(2, 0.01)
    assert last == pytest.approx(2.5 * trial.lr)  # and no higher


def test_fapm_keeps_of_the_change_what_is_large_and_not_beside_a_small_weight(tiny):
    _, one = subject(tiny)
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        for p in one.module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    star, tuned = one.anchors[name], one.named[name].detach().clone()
    score = (tuned - star).abs() * (1 - star.abs().mean() / star.abs())
    prune(one, 0.25)
    kept = one.named[name] != star
    assert int(kept.sum()) == star.numel() // 4
    assert float(score[kept].min()) >= float(score[~kept].max())
    assert torch.equal(one.named[name][kept], tuned[kept])


def test_replay_is_spread_evenly(tiny):
    trial, one = subject(tiny, method="replay", share=0.05, steps=60)
    asked = []
    one.old = lambda seed, count: type("Old", (), {"loss": staticmethod(asked.append), "count": count})
    loss = replayed(trial, one)
    steps = [t for t in range(1, 61) if loss(t) is not None or (len(asked) > 0 and asked.pop())]
    assert steps == [11, 31, 51]


def test_what_is_distilled_is_what_the_anchors_say(tiny):
    from recadam_harness.experiments.methods import extra_for

    trial, one = subject(tiny, method="lwf", weight=2.0)
    extra = extra_for(trial, one, optimizer_for(trial, one, None))
    assert float(extra(1).detach()) == pytest.approx(0.0, abs=1e-6)
    before = copy.deepcopy(one.module)
    with torch.no_grad():
        for p in one.module.parameters():
            p.add_(0.05 * torch.randn_like(p))
        now = one.said(1)
        moved, one.module = one.module, before
        then = one.said(1)
        one.module = moved
    expected = 2.0 * (then.exp() * (then - now)).sum(1).mean()
    assert float(extra(1).detach()) == pytest.approx(float(expected), rel=1e-4)


def test_subjects_are_of_texts_that_are_kept_apart():
    splits = data_.target_of("newsgroup-pairs")
    texts = [x for p in (splits.train, splits.validation, splits.test) for x in (*p.first, *p.second)]
    assert len(set(texts)) == len(texts)
    assert [len(splits.validation), len(splits.test)] == [1000, 1000]
    answers = data_.target_of("snli-answers")
    assert answers.classes == 3
    premises = [set(p.first) for p in (answers.train, answers.validation, answers.test)]
    assert max(len(premises[0] & premises[1]), len(premises[0] & premises[2])) <= 1  # which the cut parts
    titles, bodies, topics = data_.news()
    assert len(titles) == len(bodies) == len(topics) == 2000
    assert set(topics) == set(range(5))
