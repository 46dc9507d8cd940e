"""Real trainers on tiny models: Hugging Face's, accelerate, Lightning, peft; groups of many models."""

from __future__ import annotations

import math
import warnings

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from recadam_core import Constant, RecAdamError, Sigmoid
from recadam_torch import Anchors, CoverageWarning, RecAdam, lora_anchors, param_groups

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainers' own

transformers = pytest.importorskip("transformers")
SETTINGS = {"lr": 1e-3, "gamma": 100.0, "annealing": Sigmoid(k=0.5, t0=6)}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def tiny(seed=0):
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=50, num_labels=2, **SMALL)
    model = transformers.BertForSequenceClassification(config)
    return model.eval()  # no dropout: a resumed run draws other numbers


ROWS = [
    {
        "input_ids": torch.arange(i, i + 8) % 50,
        "attention_mask": torch.ones(8, dtype=torch.long),
        "labels": i % 2,
    }
    for i in range(64)
]


@pytest.fixture
def pretrained(tmp_path):
    """The encoder's weights as a hub folder has them: without the prefix, and without the head."""
    folder = tmp_path / "pretrained"
    tiny().bert.save_pretrained(folder)
    return folder


def equal(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# Hugging Face's Trainer.


class NoDropout(transformers.Trainer):
    def training_step(self, model, *arguments, **keywords):
        model.eval()
        model.train = lambda mode=True: model
        return super().training_step(model, *arguments, **keywords)


def trainer(
    folder, model, kind=NoDropout, steps=12, save_only_model=False, save="steps", optim="adamw_torch", **more
):
    args = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=4,
        save_steps=6, report_to=[], disable_tqdm=True, seed=3, use_cpu=True, save_total_limit=3,
        save_only_model=save_only_model, save_strategy=save, optim=optim,
    )  # fmt: skip
    return kind(model, args, train_dataset=ROWS, **more)


def test_trainer_by_its_factory_logs_and_resumes_bit_for_bit(tmp_path, pretrained):
    from recadam_torch.huggingface import RecAdamCallback, RecAdamFactory

    made = (RecAdamFactory, {"anchors": pretrained, "new": ["classifier.*"], **SETTINGS})
    whole = tiny()
    first = trainer(tmp_path / "run", whole, optimizer_cls_and_kwargs=made)
    callback = RecAdamCallback.add_to(first)
    first.train()
    assert first.callback_handler.callbacks[0] is callback
    logged = [entry for entry in first.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [4, 8, 12]
    for entry in logged:
        t = entry["step"]
        assert entry["recadam/lambda"] == pytest.approx(1 / (1 + math.exp(-0.5 * (t - 6))))
        assert 0 < entry["recadam/pull_share"] < 1
        assert entry["recadam/distance"] > 0

    resumed = tiny()
    second = trainer(tmp_path / "run", resumed, optimizer_cls_and_kwargs=made)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert second.state.global_step == 12
    assert equal(whole, resumed)

    # Anchors in memory that are not the checkpoint's, as of a model that was tuned already, are refused.
    for seed in (0, 5):
        anchors = Anchors.of(tiny(seed=seed), new=["classifier.*"])
        unnamed = trainer(
            tmp_path / "other",
            tiny(),
            optimizer_cls_and_kwargs=(RecAdamFactory, {"anchors": anchors, **SETTINGS}),
        )
        if seed == 0:
            unnamed.train()
            continue
        with pytest.raises(RecAdamError, match="is another than the checkpoint's; make the optimizer with"):
            unnamed.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-6"))


def test_trainer_that_resumes_without_the_optimizer_keeps_the_pretrained_anchors(tmp_path, pretrained):
    """A checkpoint of the model alone is in the model before Trainer makes the optimizer."""
    from recadam_torch.huggingface import RecAdamCallback, RecAdamFactory

    where = tmp_path / "run"
    settings = {"lr": 1e-3, "gamma": 100.0, "annealing": Sigmoid(k=0.5, t0=100)}
    for given in (
        {"anchors": pretrained, "new": ["classifier.*"]},
        {"anchors": Anchors.of(tiny(), new=["classifier.*"])},
    ):
        made = (RecAdamFactory, {**given, **settings})
        trainer(where, tiny(), save_only_model=True, optimizer_cls_and_kwargs=made).train()
        assert not (where / "checkpoint-6" / "optimizer.pt").exists()
        resumed = trainer(where, tiny(), save_only_model=True, optimizer_cls_and_kwargs=made)
        RecAdamCallback.add_to(resumed)
        with pytest.warns(
            UserWarning, match=r"Trainer resumes at step 6 from a checkpoint without the optimiz"
        ):
            resumed.train(resume_from_checkpoint=str(where / "checkpoint-6"))
        anchors = resumed.optimizer.optimizer.interpolate(0.0)
        tuned = transformers.BertForSequenceClassification.from_pretrained(where / "checkpoint-6")
        for name, p in tiny().bert.named_parameters():
            assert torch.equal(anchors[f"bert.{name}"], p)
        assert not equal(tuned, tiny())

    nameless = (RecAdamFactory, {"new": ["classifier.*"], **settings})
    with pytest.raises(RecAdamError, match=r"anchors is None, and Trainer may have loaded a checkpoint into"):
        trainer(where, tiny(), optimizer_cls_and_kwargs=nameless).train()
    twice = (RecAdamFactory, {"anchors": Anchors.of(tiny()), "new": ["classifier.*"]})
    with pytest.raises(RecAdamError, match=r"new and Anchors are both given; say new to Anchors.of"):
        trainer(where, tiny(), optimizer_cls_and_kwargs=twice).train()


def test_trainer_that_resumes_with_the_optimizer_warns_of_nothing(tmp_path, pretrained):
    from recadam_torch.huggingface import RecAdamCallback, RecAdamFactory

    made = (RecAdamFactory, {"anchors": pretrained, "new": ["classifier.*"], **SETTINGS})
    with warnings.catch_warnings(record=True) as caught:
        for start in (None, str(tmp_path / "run" / "checkpoint-6")):
            some = trainer(tmp_path / "run", tiny(), optimizer_cls_and_kwargs=made)
            RecAdamCallback.add_to(some)
            some.train(resume_from_checkpoint=start)
    assert not [w for w in caught if "RecAdam" in str(w.message)]


def test_trainer_by_a_subclass_takes_the_same_steps(tmp_path, pretrained):
    from recadam_torch.huggingface import RecAdamFactory

    class Ours(NoDropout):
        def create_optimizer(self, model=None):
            anchors = Anchors.of(self.model, pretrained, new=["classifier.*"])
            self.optimizer = RecAdam(param_groups(self.model, anchors), **SETTINGS)
            return self.optimizer

    one, other = tiny(), tiny()
    trainer(tmp_path / "a", one, kind=Ours).train()
    made = (RecAdamFactory, {"anchors": pretrained, "new": ["classifier.*"], **SETTINGS})
    trainer(tmp_path / "b", other, optimizer_cls_and_kwargs=made).train()
    assert equal(one, other)
    assert not equal(one, tiny())


# accelerate, in one process, with mixed precision and accumulation.


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_takes_the_steps_of_a_plain_loop(precision, pretrained):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = tiny()
    anchors = Anchors.of(model, pretrained, new=["classifier.*"])
    optimizer = RecAdam(param_groups(model, anchors), **SETTINGS)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 4)
    loader = DataLoader(ROWS, batch_size=8)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    plain = tiny()
    anchors = Anchors.of(plain, pretrained, new=["classifier.*"])
    reference = RecAdam(param_groups(plain, anchors), **SETTINGS)
    scheduler = torch.optim.lr_scheduler.LinearLR(reference, 1.0, 0.5, 4)
    for i, batch in enumerate(DataLoader(ROWS, batch_size=8)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = plain(**batch).loss
        (loss / 2).backward()
        if i % 2:
            reference.step()
            scheduler.step()
            reference.zero_grad()
    assert equal(accelerator.unwrap_model(model), plain)
    assert {int(s["step"]) for s in reference.state.values()} == {4}


# Lightning.


def test_lightning_trains_and_resumes_bit_for_bit(tmp_path):
    lightning = pytest.importorskip("lightning")
    torch.manual_seed(0)
    save_file(nn.Linear(8, 4).state_dict(), tmp_path / "pretrained.safetensors")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.body, self.head = nn.Linear(8, 4), nn.Linear(4, 1)

        def training_step(self, batch, index):
            return self.head(self.body(batch).tanh()).square().mean()

        def configure_optimizers(self):
            anchors = Anchors.of(self, tmp_path / "pretrained.safetensors", new=["head.*"])
            optimizer = RecAdam(param_groups(self, anchors), **SETTINGS)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]

    data = DataLoader(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), batch_size=8)

    def fit(epochs, **more):
        module = Module()
        options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
                   "enable_model_summary": False, "enable_checkpointing": False}  # fmt: skip
        runner = lightning.Trainer(max_epochs=epochs, default_root_dir=tmp_path, **options)
        runner.fit(module, data, **more)
        return runner, module

    half, _ = fit(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, straight = fit(4)
    _, resumed = fit(4, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert equal(straight, resumed)


# LoRA.


def lora(**options):
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["query", "value"], **options}
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", **options)
    return peft.get_peft_model(tiny(), config)


def product(model):
    total = 0.0
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "scaling"):
            total += (module.lora_B["default"].weight @ module.lora_A["default"].weight).square().sum().item()
    return math.sqrt(total)


@pytest.mark.parametrize("gamma", [0.0, 100.0])
def test_the_anchor_of_a_lora_product_is_zero(gamma):
    model = lora()
    anchors = lora_anchors(model)
    assert len(anchors) == 4
    groups = param_groups(model, anchors)
    optimizer = RecAdam(groups, lr=5e-3, gamma=gamma, annealing=Constant(1.0, 1.0))
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    for batch in DataLoader(ROWS, batch_size=4):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    pulled = product(model)
    if gamma:  # half of the way home each step
        assert 0 < pulled < 0.06
        assert optimizer.drift().distance < 0.1
    else:
        assert pulled > 0.12


def test_lora_factors_that_hold_pretrained_weights_are_refused():
    with pytest.raises(RecAdamError, match=r"lora_B.* is not zero; call it before training"):
        lora_anchors(lora(init_lora_weights="olora"))
    with pytest.raises(RecAdamError, match="no trainable parameter is called lora_B"):
        lora_anchors(nn.Linear(2, 2))


# Adapters that were trained before.

ADAPTERS = {  # options of peft's LoRA, and the parameters that it then saves but those of the head
    "plain": ({}, 8),
    "dora": ({"use_dora": True}, 12),
    "bias all": ({"bias": "all"}, 8 + 18),
    "bias of lora": ({"bias": "lora_only"}, 12),
    "modules": ({"modules_to_save": ["pooler"]}, 10),
    "tokens": ({"trainable_token_indices": [1, 2]}, 9),
    "embedding": ({"target_modules": ["word_embeddings"]}, 2),
}


@pytest.mark.parametrize("adapter", ["default", "mine"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_anchored_to_where_it_was_saved(kind, adapter, tmp_path):
    """Saved without its adapter's name, and all of it: the head, too."""
    peft = pytest.importorskip("peft")
    options, count = ADAPTERS[kind]
    saved = lora(**options)
    with torch.no_grad():
        for p in saved.parameters():
            if p.requires_grad:
                p.add_(0.5)
    saved.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny(), tmp_path, adapter_name=adapter, is_trainable=True)
    values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(values) == count + 2
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    for wrapped in (model, nn.DataParallel(model)):
        anchors = Anchors.of(wrapped, tmp_path, strict=True)
        trained = anchors.coverage.having("anchored")
        assert {m.parameter.removeprefix("module.") for m in trained} == set(values)
        for name, x in values.items():
            assert torch.equal(anchors[name], x), name
    optimizer = RecAdam(param_groups(model, anchors))
    assert len(optimizer.state) == len(values)


def test_two_adapters_that_were_saved_under_one_name_are_told_apart(tmp_path):
    """The one in use is the one that is meant; of two in use neither is."""
    peft = pytest.importorskip("peft")
    lora().save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    model.load_adapter(tmp_path, "other", is_trainable=True)
    anchors = Anchors.of(model, tmp_path, new=["*.other.*"], strict=True)
    assert all(".default." in m.parameter for m in anchors.coverage.having("anchored"))
    assert len(anchors.coverage.having("anchored")) == 10


def test_ia3_is_anchored_and_a_prompt_is_named(tmp_path):
    peft = pytest.importorskip("peft")
    targets = {"target_modules": ["query", "output.dense"], "feedforward_modules": ["output.dense"]}
    peft.get_peft_model(tiny(), peft.IA3Config(task_type="SEQ_CLS", **targets)).save_pretrained(
        tmp_path / "a"
    )
    model = peft.PeftModel.from_pretrained(tiny(), tmp_path / "a", is_trainable=True)
    assert len(Anchors.of(model, tmp_path / "a", strict=True).coverage.having("anchored")) == 8
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny(), config)
    model.save_pretrained(tmp_path / "b")
    with pytest.warns(CoverageWarning, match=r"no anchor for prompt_encoder.default.embedding.weight; name"):
        coverage = Anchors.of(model, tmp_path / "b").coverage
    assert len(coverage.having("anchored")) == 2
    assert list(coverage.unused) == ["prompt_embeddings"]


# Vocabularies that have grown.


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("multiple", [None, 8])
def test_a_vocabulary_that_transformers_resized_keeps_the_anchors_of_its_tokens(tied, multiple, tmp_path):
    def make():
        torch.manual_seed(0)
        config = transformers.BertConfig(vocab_size=50, tie_word_embeddings=tied, **SMALL)
        return transformers.BertForMaskedLM(config)

    make().save_pretrained(tmp_path)
    model = make()
    model.resize_token_embeddings(53, pad_to_multiple_of=multiple)
    rows = 53 if multiple is None else 56
    anchors = Anchors.of(model, tmp_path, strict=True)
    grown = {m.parameter: (m.rows, m.note) for m in anchors.coverage.matches if m.rows}
    bias = [n for n, p in model.named_parameters() if p.shape == (rows,)]
    names = [
        "bert.embeddings.word_embeddings.weight",
        *bias,
        *([] if tied else ["cls.predictions.decoder.weight"]),
    ]
    assert grown == dict.fromkeys(names, (50, f"{rows - 50} of {rows} rows are new"))
    optimizer = RecAdam(param_groups(model, anchors), **SETTINGS)
    p = model.bert.embeddings.word_embeddings.weight
    old = make().bert.embeddings.word_embeddings.weight
    assert torch.equal(optimizer.state[p]["anchor"][:50], old)
    assert optimizer.state[p]["importance"][:, 0].tolist() == [1.0] * 50 + [0.0] * (rows - 50)


# Groups of real architectures.

VIT = {"image_size": 8, "patch_size": 4, "num_labels": 2}
GROUPS = {
    "bert": (lambda t: t.BertForSequenceClassification(t.BertConfig(vocab_size=50, **SMALL)), "bert", 2),
    "albert": (
        lambda t: t.AlbertForSequenceClassification(
            t.AlbertConfig(vocab_size=50, embedding_size=8, hidden_size=16, num_attention_heads=2,
                           num_hidden_layers=4, intermediate_size=24)), "albert", 2),
    "roberta": (
        lambda t: t.RobertaForSequenceClassification(t.RobertaConfig(vocab_size=50, **SMALL)), "roberta", 4),
    "xlm-roberta": (
        lambda t: t.XLMRobertaForSequenceClassification(
            t.XLMRobertaConfig(vocab_size=50, **SMALL)), "roberta", 4),
    "xlnet": (
        lambda t: t.XLNetForSequenceClassification(
            t.XLNetConfig(vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=24)), "transformer", 4),
    "distilbert": (
        lambda t: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=24)),
        "distilbert", 4),
    "gpt2": (
        lambda t: t.GPT2ForSequenceClassification(
            t.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)), "transformer", 1),
    "llama": (
        lambda t: t.LlamaForSequenceClassification(t.LlamaConfig(vocab_size=50, **SMALL)), "model", 1),
    "vit": (lambda t: t.ViTForImageClassification(t.ViTConfig(**SMALL, **VIT)), "vit", 2),
    "t5": (
        lambda t: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)), "", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_real_architectures(name, tmp_path):
    """The pretrained part is anchored from its own folder, whatever its prefix; biases and norms stay."""
    make, prefix, new = GROUPS[name]
    torch.manual_seed(0)
    model = make(transformers)
    base = getattr(model, prefix) if prefix else model
    base.save_pretrained(tmp_path)
    heads = [n for n, _ in model.named_parameters() if prefix and not n.startswith(f"{prefix}.")]
    assert len(heads) == new
    anchors = Anchors.of(model, tmp_path, new=heads, strict=True)
    groups = param_groups(model, anchors, lr=1e-4, new_lr=1e-3, weight_decay=0.1, anchored_weight_decay=0.01)
    optimizer = RecAdam(groups, gamma=10.0)

    placed = {}
    for group in optimizer.param_groups:
        for n, p in zip(group["param_names"], group["params"], strict=True):
            assert n not in placed
            placed[n] = (group["anchored"], group["weight_decay"], group["lr"])
            if group["anchored"]:
                assert torch.equal(optimizer.state[p]["anchor"], p.detach())
    assert set(placed) == {n for n, _ in model.named_parameters()}
    modules = dict(model.named_modules())
    for n, p in model.named_parameters():
        anchored, decay, lr = placed[n]
        norm = "norm" in type(modules[n.rpartition(".")[0]]).__name__.lower()
        assert anchored == (n not in heads)
        assert lr == (1e-4 if anchored else 1e-3)
        assert decay == (0.0 if p.ndim < 2 or norm or n.endswith("bias") else 0.01 if anchored else 0.1), n


def test_shared_layers_and_tied_embeddings_are_stepped_once(tmp_path):
    model = GROUPS["t5"][0](transformers)
    assert model.shared.weight is model.encoder.embed_tokens.weight
    model.save_pretrained(tmp_path)
    optimizer = RecAdam(param_groups(model, Anchors.of(model, tmp_path, strict=True)), **SETTINGS)
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == len({id(p) for p in model.parameters()})
