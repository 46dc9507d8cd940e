"""The meter of forgetting, and what the callbacks do by it."""

from __future__ import annotations

import importlib.util
import math
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from recadam_core import DriftBudget, RecAdamError
from recadam_torch import Forgetting, RecAdam, anchor

HERE = Path(__file__).parent
CALLBACKS = HERE / "test_torch_callbacks.py"


def load(name):
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location(name, HERE / f"test_torch_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Speaks(nn.Module):
    """Logits of every token, as a decoder has them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out = nn.Embedding(11, 6), nn.Linear(6, 11)
        self.drop = nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.out(self.drop(self.embedding(input_ids))))


class Embeds(Speaks):
    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(last_hidden_state=self.embedding(input_ids))


def moved(model, by=0.3):
    """A handle with anchors where the model was, and the model somewhere else."""
    handle = anchor(torch.optim.SGD(model.named_parameters(), lr=0.1))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(by * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return handle


BATCHES = [
    {
        "input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    },
    {"input_ids": torch.tensor([[7, 8]]), "attention_mask": torch.tensor([[1, 1]])},
]


def test_it_is_the_divergence_of_tokens_that_are_not_padding():
    model, before = Speaks(), Speaks().eval()
    handle = moved(model)
    model.train()
    found = Forgetting(model, handle, BATCHES)()
    ids = torch.tensor([1, 2, 3, 4, 5, 7, 8])
    with torch.no_grad():
        p, q = (log_softmax(m.eval()(ids).logits, -1) for m in (before, model))
    expected = kl_div(q, p, reduction="batchmean", log_target=True)
    assert found.kl == pytest.approx(expected.item(), rel=1e-5)
    assert found.kl > 0.01
    assert math.isnan(found.cosine)
    assert found.figure == found.kl
    assert found.distance == pytest.approx(handle.drift().distance)


def test_at_the_anchors_nothing_is_forgotten_and_the_model_is_left_as_it_was():
    model = Speaks().train()
    handle = moved(model, by=0.0)
    meter = Forgetting(model, handle, BATCHES)
    state = torch.get_rng_state()
    assert meter().kl == 0.0
    assert torch.equal(torch.get_rng_state(), state)
    model.drop.eval()  # one module alone
    meter()
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert all(p.grad is None for p in model.parameters())


def test_embeddings_are_compared_by_their_cosine():
    model, before = Embeds(), Embeds()
    handle = moved(model)
    found = Forgetting(model, handle, BATCHES)()
    rows = [torch.tensor(row) for row in ([1, 2, 3], [4, 5], [7, 8])]
    means = lambda m: torch.stack([m.embedding(row).mean(0) for row in rows])  # noqa: E731
    expected = torch.cosine_similarity(means(before), means(model)).mean().detach()
    assert found.cosine == pytest.approx(expected.item(), rel=1e-5)
    assert found.figure == pytest.approx(1 - float(expected), rel=1e-5)
    assert math.isnan(found.kl)
    given = Forgetting(model, handle, BATCHES, outputs=_means, embeddings=True)()
    assert given.cosine == pytest.approx(found.cosine, rel=1e-5)


def _means(model, batch):
    mask = batch["attention_mask"][..., None]
    return (model.embedding(batch["input_ids"]) * mask).sum(1) / mask.sum(1)


def test_of_a_classifier_it_is_the_divergence_of_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = RecAdam(model.named_parameters(), lr=0.1, gamma=0.0)
    rows = torch.randn(700, 3)
    before = log_softmax(model(rows), -1).detach()
    for _ in range(3):
        model(rows).square().mean().backward()
        optimizer.step()
    expected = kl_div(log_softmax(model(rows), -1), before, reduction="batchmean", log_target=True)
    for probe in ([rows], [(rows,)], list(rows.split(99))):
        assert Forgetting(model, optimizer, probe)().kl == pytest.approx(expected.item(), rel=1e-4)


def test_what_both_rule_out_counts_nothing_and_what_one_rules_out_is_said():
    class Masks(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))
            self.out = torch.tensor([0.0, 0.0, -torch.inf])

        def forward(self, x):
            return x + self.w + self.out

    model = Masks()
    meter = Forgetting(model, moved(model), [torch.zeros(2, 3)])
    assert 0 < meter().kl < 1
    with torch.no_grad():
        model.w[0] = -torch.inf
    with pytest.raises(RecAdamError, match="Forgetting: batch 0 of the probe gives inf; leave it out"):
        meter()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, h: Forgetting(5, h, BATCHES), "Forgetting: the model is a int; give the module"),
        (lambda m, h: Forgetting(m, None, BATCHES), "Forgetting: None has no at_anchors; give"),
        (lambda m, h: Forgetting(m, h, []), "Forgetting: the probe is empty"),
        (lambda m, h: Forgetting(m, h, "a text"), "Forgetting: the probe is 'a text'; give a list"),
        (lambda m, h: Forgetting(m, h, BATCHES[0]), "Forgetting: the probe is {.*; give a list"),
        (lambda m, h: Forgetting(m, h, torch.ones(2)), "Forgetting: the probe is tensor"),
        (lambda m, h: Forgetting(m, h, 5), "Forgetting: the probe is 5; give a list"),
        (lambda m, h: Forgetting(m, h, ["a text"]), "Forgetting: the probe is texts; give tokenizer="),
        (lambda m, h: Forgetting(m, h, ["a", BATCHES[0]]), "Forgetting: the probe is texts and batches"),
        (lambda m, h: Forgetting(m, h, BATCHES, outputs=lambda m, b: 5)(), "the model gives 5; have outputs"),
        (
            lambda m, h: Forgetting(m, h, BATCHES, outputs=lambda m, b: torch.ones(2, 1))(),
            r"the model gives torch.float32 of shape \(2, 1\); have outputs",
        ),
        (
            lambda m, h: Forgetting(m, h, BATCHES, outputs=lambda m, b: torch.full((2, 2), torch.nan))(),
            "batch 0 of the probe gives nan",
        ),
        (
            lambda m, h: Forgetting(
                m, h, [{**BATCHES[0], "attention_mask": torch.zeros(2, 3, dtype=torch.long)}]
            )(),
            "of the probe every token is padding",
        ),
    ],
)
def test_what_tells_nothing_is_refused_in_one_line(make, message):
    model = Speaks()
    handle = moved(model)
    with pytest.raises(RecAdamError, match=message) as error:
        make(model, handle)
    assert "\n" not in str(error.value)
    assert model.training


def test_of_an_encoder_decoder_the_decoders_tokens_count():
    class Answers(Speaks):
        config = SimpleNamespace(is_encoder_decoder=True)

        def forward(self, input_ids, attention_mask=None, labels=None, decoder_attention_mask=None):
            return super().forward(labels.clamp(min=0))

    model = Answers()
    handle = moved(model)
    ids, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 0, 0]])
    labels = torch.tensor([[4, 5, -100]])
    batches = [
        {"input_ids": ids, "attention_mask": mask, "labels": labels[:, :2]},
        {"input_ids": ids, "attention_mask": mask, "labels": labels},
        {
            "input_ids": ids,
            "labels": torch.tensor([[4, 5, 9]]),
            "decoder_attention_mask": torch.tensor([[1, 1, 0]]),
        },
    ]
    found = [Forgetting(model, handle, [batch])().kl for batch in batches]
    assert found[0] > 0.01
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-5)


def test_a_batch_that_the_model_does_not_take_is_said_in_one_line():
    model = Speaks()
    handle = moved(model)
    for batch in ({"ids": torch.ones(1)}, [1, 2, 3], (torch.ones(1, 2),)):
        with pytest.raises(
            RecAdamError, match="Forgetting: the model does not take batch 0 of the prob"
        ) as e:
            Forgetting(model, handle, [batch])()
        assert "\n" not in str(e.value)
    pair = namedtuple("Pair", "input_ids attention_mask")
    given = pair(BATCHES[1]["input_ids"], BATCHES[1]["attention_mask"])
    assert Forgetting(model, handle, [given])().kl > 0


def test_a_model_whose_output_has_nothing_to_compare():
    model = Speaks()
    handle = moved(model)
    model.forward = lambda **batch: SimpleNamespace(loss=1.0)
    with pytest.raises(RecAdamError, match=r"output is a SimpleNamespace without logits or embeddings; give"):
        Forgetting(model, handle, BATCHES)()


# The strength of the pull, which a checkpoint knows.


def test_the_strength_multiplies_the_pull_and_is_saved():
    w = nn.Parameter(torch.ones(1))
    make = lambda p: torch.optim.SGD([("w", p)], lr=0.1)  # noqa: E731
    handle = anchor(optimizer := make(w), {"w": torch.zeros(1)}, pull=1.0)
    assert handle.strength == 1.0
    handle.strength = 3.0
    w.grad = torch.zeros(1)
    optimizer.step()
    assert w.item() == pytest.approx(0.25)
    assert handle.drift().rate == pytest.approx(3.0)
    other = make(nn.Parameter(torch.zeros(1)))
    again = anchor(other, pull=1.0)
    other.load_state_dict(optimizer.state_dict())
    assert again.strength == 3.0
    state = optimizer.state_dict()
    del state["param_groups"][0]["anchor_strength"]  # of an older version
    other.load_state_dict(state)
    assert again.strength == 1.0
    handle.remove()
    assert handle.strength == 1.0
    with pytest.raises(RecAdamError, match="anchor: the pull was removed and has no strength"):
        handle.strength = 2.0
    assert "anchor_strength" not in optimizer.param_groups[0]
    for wrong in (-1, math.nan, "2", None):
        with pytest.raises(RecAdamError, match="anchor: strength is"):
            handle.strength = wrong
    state["param_groups"][0]["anchor_strength"] = -1.0
    with pytest.raises(RecAdamError, match=r"load_state_dict: anchor_strength is -1.0"):
        other.load_state_dict(state)


# In trainers.

TEXTS = [
    {"input_ids": torch.arange(8)[None] + i, "attention_mask": torch.ones(1, 8).long()} for i in range(4)
]


@pytest.mark.filterwarnings("ignore")
def test_trainer_logs_it_holds_it_and_stops_by_it(tmp_path):
    callbacks = load("callbacks")
    make = lambda **more: callbacks.AnchorCallback(pull=0.1, probe=TEXTS, every=2, **more)  # noqa: E731

    def run(folder, callback, start=None):
        model = callbacks.tiny()
        made, _ = callbacks.trained(tmp_path / folder, model, callback, start=start)
        return made, model, [entry for entry in made.state.log_history if "loss" in entry]

    made, _, logged = run("a", make())
    assert all(entry["anchor/kl"] > 0 for entry in logged)
    assert [entry["step"] for entry in logged] == [4, 8, 12]
    free = logged[-1]["anchor/kl"]

    held = make(budget=free / 4)
    made, whole, logged = run("b", held)
    assert logged[-1]["anchor/kl"] < free
    assert made.optimizer.param_groups[0]["anchor_strength"] > 1.1
    again = make(budget=free / 4)
    _, resumed, _ = run("b", again, start="checkpoint-6")
    assert callbacks.equal(whole, resumed)
    assert again.handle.strength == held.handle.strength

    with pytest.warns(UserWarning, match="AnchorCallback: it measures every 50 steps of 12; give a lower"):
        run("d", callbacks.AnchorCallback(probe=TEXTS))
    wrong = callbacks.AnchorCallback(probe=[{"ids": torch.ones(1)}])
    with pytest.raises(RecAdamError, match="the model does not take batch 0 of the probe"):
        run("e", wrong)

    made, _, logged = run("c", make(stop_at=free / 4))
    assert (tmp_path / "c" / f"checkpoint-{made.state.global_step}").is_dir()
    assert made.state.global_step < 12
    assert logged[-1]["step"] == made.state.global_step
    assert logged[-1]["anchor/kl"] >= free / 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.heavy
def test_texts_are_tokenized_by_the_trainers_own(tmp_path):
    callbacks = load("callbacks")
    callback = callbacks.AnchorCallback(pull=0.1, probe=["w1 w2 w3", "w4"], every=4)
    made = callbacks.trl_trained("SFT", tmp_path, callbacks.decoder(), callback)
    assert made.state.log_history[-2]["anchor/kl"] > 0
    assert callback.watch.last.kl == made.state.log_history[-2]["anchor/kl"]


@pytest.mark.filterwarnings("ignore")
def test_lightning_logs_it_and_stops_by_it(tmp_path):
    callbacks = load("callbacks")
    probe = [torch.randn(4, 8, generator=torch.Generator().manual_seed(1))]
    embed = {"pull": 0.1, "new": [], "probe": probe, "every": 2}
    callback = callbacks.of_lightning(**embed, stop_at=1e-6)
    from lightning import LightningModule

    forward = lambda self, rows: self.body(rows)  # noqa: E731
    patch = pytest.MonkeyPatch()
    patch.setattr(LightningModule, "forward", forward)
    try:
        runner, _ = callbacks.lightning_fit(tmp_path, callback, 4)
    finally:
        patch.undo()
    assert runner.global_step == 2
    assert runner.logged_metrics["anchor/kl"] == pytest.approx(callback.watch.last.kl)
    assert callback.watch.last.distance > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.1}, "AnchorCallback: a budget or stop_at needs a probe"),
        ({"stop_at": 0.1}, "AnchorCallback: a budget or stop_at needs a probe"),
        ({"probe": TEXTS, "every": 0}, "AnchorCallback: every is 0; give a whole number"),
        ({"probe": TEXTS, "every": 1.5}, "AnchorCallback: every is 1.5; give a whole number"),
        ({"probe": TEXTS, "budget": 0}, "AnchorCallback: budget is 0"),
        ({"probe": TEXTS, "budget": "x"}, "AnchorCallback: budget is 'x'"),
        ({"probe": TEXTS, "stop_at": -1}, "AnchorCallback: stop_at is -1"),
        (
            {"probe": TEXTS, "budget": DriftBudget(0.1), "pull": 0.0},
            "AnchorCallback: a budget changes the pu",
        ),
    ],
)
def test_a_wrong_setting_of_the_watch_is_refused_at_once(settings, message):
    callbacks = load("callbacks")
    for kind in (callbacks.AnchorCallback, callbacks.of_lightning):
        with pytest.raises(RecAdamError, match=message):
            kind(**settings)
