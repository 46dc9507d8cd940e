"""The harness's models: one definition, the same numbers and gradients in every framework."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")

import jax
import torch
from safetensors.numpy import save_file

from recadam_core import Hyperparameters, RecAdamError, get_backend
from recadam_core.files import cache_folder
from recadam_harness.archives import model_folder
from recadam_harness.engines import coupled_gradient, make_engine
from recadam_harness.engines.jax import OPS as JAX_OPS
from recadam_harness.engines.torch import OPS as TORCH_OPS
from recadam_harness.models import MLP, Bert, Ops
from recadam_harness.models.bert import load_checkpoint
from recadam_harness.models.gemma import Gemma, load_gemma
from recadam_harness.tasks import get_task

RNG = np.random.default_rng(0)


def test_the_mlps_own_backward_pass_is_the_frameworks_gradient():
    model = MLP((5, 7, 6, 4), 3)
    params = {n: x + 0.1 for n, x in model.init(RNG).items()}
    batch = {"x": RNG.standard_normal((9, 5)), "targets": np.eye(3)[RNG.integers(0, 3, 9)]}
    loss, grads = model.value_and_grad(Ops(np, None), params, batch)

    leaves = {n: torch.tensor(x, requires_grad=True) for n, x in params.items()}
    torch_loss = model.loss(TORCH_OPS, leaves, {n: torch.tensor(x) for n, x in batch.items()})
    torch_loss.backward()
    with jax.enable_x64(True):
        jax_loss, jax_grads = jax.value_and_grad(lambda p: model.loss(JAX_OPS, p, batch))(params)
        assert torch_loss.item() == pytest.approx(loss, rel=1e-14)
        assert float(jax_loss) == pytest.approx(loss, rel=1e-14)
        for name in params:
            np.testing.assert_allclose(leaves[name].grad.numpy(), grads[name], rtol=0, atol=1e-15)
            np.testing.assert_allclose(np.asarray(jax_grads[name]), grads[name], rtol=0, atol=1e-15)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny random BERT of transformers, saved, and its outputs on a padded batch."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40
    )
    net = BertModel(config).eval()
    for p in net.parameters():  # biases and norms away from their trivial start
        p.data += 0.05 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp("tiny")
    net.save_pretrained(folder)
    ids = RNG.integers(0, 50, (4, 9))
    mask = (np.arange(9) < np.array([9, 5, 1, 7])[:, None]).astype(float)
    with torch.no_grad():
        hidden = net(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    return folder, {"ids": ids, "mask": mask, "targets": np.eye(2)[[0, 1, 1, 0]]}, hidden.numpy()


def engine(backend, folder, dtype="float32", optimizer="recadam"):
    config, params = load_checkpoint(folder)
    model = Bert(config)
    full = {**params, **model.init_head(np.random.default_rng(0))}
    hp = Hyperparameters(lr=1e-3, gamma=100.0)
    return make_engine(backend, model, full, frozenset(params), optimizer, hp, dtype)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_bert_is_transformers_bert(backend, tiny):
    folder, batch, hidden = tiny
    ours = engine(backend, folder).call("hidden", batch)
    seen = batch["mask"] > 0
    np.testing.assert_allclose(ours[seen], hidden[seen], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_padding_does_not_reach_the_embedding(backend, tiny):
    folder, batch, _ = tiny
    e = engine(backend, folder)
    changed = {**batch, "ids": np.where(batch["mask"] > 0, batch["ids"], 7)}
    np.testing.assert_array_equal(e.call("features", batch), e.call("features", changed))


@pytest.mark.parametrize(("fixture", "atol"), [("decoder", 1e-12), ("tiny", 1e-13)])
def test_both_frameworks_step_alike(fixture, atol, request):
    make = {"tiny": engine, "decoder": decoding}[fixture]
    folder, batch, _ = request.getfixturevalue(fixture)
    with get_backend("jax").precision("float64"):
        engines = [make(b, folder, "float64") for b in ("torch", "jax")]
        for _ in range(5):
            records = [e.step(batch, 1e-3) for e in engines]
        np.testing.assert_allclose(records[0], records[1], rtol=1e-9)
        weights = [e.weights() for e in engines]
    for name in weights[0]:
        np.testing.assert_allclose(weights[0][name], weights[1][name], rtol=0, atol=atol)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A tiny random Gemma 3 of transformers with a full layer and sliding ones, saved, and what it says."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, query_pre_attn_scalar=12,
    )  # fmt: skip
    net = Gemma3ForCausalLM(config).eval()
    for p in net.parameters():  # norms away from their trivial start, too
        p.data += 0.1 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp("decoder")
    net.save_pretrained(folder)
    ids = RNG.integers(0, 50, (4, 9))
    mask = (np.arange(9) < np.array([9, 5, 2, 7])[:, None]).astype(float)
    with torch.no_grad():
        logits = net(input_ids=torch.tensor(ids)).logits.numpy()
    return folder, {"ids": ids, "mask": mask, "targets": np.eye(2)[[0, 1, 1, 0]]}, logits


def decoding(backend, folder, dtype="float32", optimizer="recadam"):
    config, params = load_gemma(folder)
    hp = Hyperparameters(lr=1e-3, gamma=100.0)
    return make_engine(backend, Gemma(config, (3, 7)), params, frozenset(params), optimizer, hp, dtype)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_gemma_is_transformers_gemma(backend, decoder):
    folder, batch, logits = decoder
    ours = decoding(backend, folder)
    last = batch["mask"].sum(1).astype(int) - 1
    ends = logits[np.arange(4), last]
    np.testing.assert_allclose(ours.call("words", batch), ends, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.call("logits", batch), ends[:, [3, 7]], rtol=0, atol=1e-5)
    shifted = logits[:, :-1] - logits[:, :-1].max(-1, keepdims=True)
    said = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    costs = -np.take_along_axis(said, batch["ids"][:, 1:, None], -1)[..., 0] * batch["mask"][:, 1:]
    found = ours.call("nats", batch)
    np.testing.assert_allclose(found[:, 0], costs.sum(1), rtol=1e-5)
    np.testing.assert_array_equal(found[:, 1], last)
    # What fills a row up reaches nothing.
    changed = {**batch, "ids": np.where(batch["mask"] > 0, batch["ids"], 11)}
    np.testing.assert_array_equal(ours.call("words", batch), ours.call("words", changed))
    record = ours.step(batch, 1e-3)
    whole = np.log(np.exp(ends).sum(1)) - ends[np.arange(4), np.array([3, 7, 7, 3])]
    assert record.loss == pytest.approx(whole.mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "model_type is 'gemma2'; the harness trains those of 'gemma3_text'"),
        (
            {"hidden_activation": "silu"},
            "hidden_activation is 'silu'; the harness trains those of 'gelu_pyto",
        ),
        (
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping is 50.0; the harness trains those of None",
        ),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False; the harness trains those of True"),
        ({"head_dim": None}, "head_dim is None; give a whole number from 1"),
        ({"hidden_size": 0}, "hidden_size is 0; give a whole number from 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, of 3 heads of keys; give a number that they"),
        ({"rope_parameters": {}}, "no 'sliding_attention'; give the config.json of a Gemma 3 decoder"),
        (
            {"layer_types": ["full_attention"]},
            "layer_types has 1 of 6 layers; give files that belong together",
        ),
        ({"sliding_window": 10**40}, "sliding_window is 1"),
    ],
)
def test_a_decoder_of_another_kind_is_refused(change, message, decoder, tmp_path):
    folder, *_ = decoder
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(RecAdamError) as caught:
        load_gemma(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.heavy
@pytest.mark.skipif("RECADAM_GEMMA" not in os.environ, reason="asks for --accept-gemma-terms")
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_gemma_270m_is_transformers_gemma(backend):
    from transformers import AutoModelForCausalLM

    problem = get_task("reviews-decoder").prepare(0, train_rows=8, test_rows=1, bbc_rows=2)
    (folder,) = (
        path for path in (cache_folder() / "models").glob("gemma-270m-*")
        if json.loads((path / "config.json").read_text())["vocab_size"] == problem.model.config.vocab_size
    )  # fmt: skip
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = {name: column[:4] for name, column in problem.train.items()}
    last = rows["mask"].sum(1).astype(int) - 1
    with torch.no_grad():
        logits = net(input_ids=torch.tensor(rows["ids"])).logits.numpy()[np.arange(4), last]
    hp = Hyperparameters(lr=1e-3, gamma=100.0)
    start = problem.model, problem.params, problem.anchored
    ours = make_engine(backend, *start, "recadam", hp, "float32").call("words", rows)
    assert np.abs(ours - logits).max() < 1e-4


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["minilm-l3", "minilm-l6"])
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_minilm_is_transformers_bert(backend, name):
    from transformers import BertModel

    folder = model_folder(name)
    net = BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).eval()
    ids = RNG.integers(1000, 20000, (4, 32))
    mask = (np.arange(32) < np.array([32, 20, 9, 2])[:, None]).astype(float)
    with torch.no_grad():
        hidden = net(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    ours = engine(backend, folder).call("hidden", {"ids": ids, "mask": mask})
    seen = mask > 0
    assert np.abs(ours[seen] - hidden[seen]).max() < 1e-5


def test_a_prefix_and_heads_in_the_checkpoint_are_left_out(tiny, tmp_path):
    folder, _, _ = tiny
    _, params = load_checkpoint(folder)
    save_file(
        {f"bert.{n}": x for n, x in params.items()} | {"cls.bias": np.zeros(3, np.float32)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    _, again = load_checkpoint(tmp_path)
    assert again.keys() == params.keys()


def sizes(**changes):
    """Other values in a checkpoint's config.json."""

    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json; give a Hugging Face checkpoint folder"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: damaged"),
        (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x00" * 20), "model.safetensors: damaged"),
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]),
            "model.safetensors: damaged",
        ),
        (
            lambda d: (d / "config.json").write_text(json.dumps({"model_type": "gpt2"})),
            "model_type 'gpt2' with 'gelu'; the harness trains BERT encoders",
        ),
        (
            lambda d: (d / "config.json").write_text(
                json.dumps({"model_type": "bert", "num_hidden_layers": 3})
            ),
            "parameter 'embeddings.word_embeddings.weight' has shape (50, 24), config.json says (30522, 384)",
        ),
        (
            lambda d: save_file({"x": np.zeros(1)}, d / "model.safetensors"),
            "parameter 'embeddings.word_embeddings.weight' is missing",
        ),
        (lambda d: (d / "config.json").write_text("[]"), "config.json: damaged (not a dict); fetch it again"),
        (lambda d: (d / "config.json").write_text("[" * 100_000), "config.json: damaged (nested too deeply)"),
        (sizes(num_attention_heads=0), "config.json: num_attention_heads is 0; give a whole number from 1"),
        (
            sizes(num_attention_heads=5),
            "config.json: hidden_size is 24, of 5 attention heads; give a size that",
        ),
        (sizes(num_hidden_layers=-1), "config.json: num_hidden_layers is -1; give a whole number from 1"),
        (sizes(num_hidden_layers="3"), "config.json: num_hidden_layers is '3'; give a whole number from 1"),
        (sizes(vocab_size=10**400), "config.json: vocab_size is 1000"),
        (sizes(vocab_size=10**8, hidden_size=24 * 10**5), "an encoder of these sizes: needs about"),
        (sizes(hidden_size=None), "config.json: hidden_size is None; give a whole number from 1"),
        (sizes(layer_norm_eps="x"), "config.json: layer_norm_eps is 'x'; give a finite number > 0"),
        (
            sizes(layer_norm_eps=1e300),
            "config.json: layer_norm_eps is 1e+300; give a finite number > 0 and <= 1",
        ),
        (
            sizes(position_embedding_type="relative_key"),
            "position_embedding_type 'relative_key'; the harness",
        ),
        (sizes(is_decoder=True), "config.json: a decoder, or"),
        (sizes(model_type=["bert"]), "model_type ['bert'] with 'gelu'; the harness trains BERT encoders"),
    ],
)
def test_damaged_checkpoints(tiny, tmp_path, damage, message):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((tiny[0] / file).read_bytes())
    damage(tmp_path)
    with pytest.raises(RecAdamError) as caught:
        load_checkpoint(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_coupled_gradient_is_that_of_the_annealed_objective():
    from recadam_core import Sigmoid

    annealing, gamma, t = Sigmoid(k=0.2, t0=10), 30.0, 7
    theta = torch.tensor(RNG.standard_normal(6), requires_grad=True)
    anchor = torch.tensor(RNG.standard_normal(6))
    task, recall = annealing.weights(t)
    objective = task * theta.sin().sum() + recall * 0.5 * gamma * (theta - anchor).square().sum()
    (wanted,) = torch.autograd.grad(objective, theta)
    got = coupled_gradient(theta.cos(), theta, anchor, annealing, gamma, t)
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)


def test_numpy_says_that_it_cannot_train_bert(tiny):
    with pytest.raises(
        RecAdamError, match="backend 'numpy' has no gradient for a bert model; use torch or jax"
    ):
        engine("numpy", tiny[0])
