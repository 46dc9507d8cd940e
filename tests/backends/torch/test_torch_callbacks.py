"""The pull in trainers, in one line: Hugging Face's Trainer, TRL's, sentence-transformers', Lightning's."""

from __future__ import annotations

import copy
import importlib.util
import shutil
import stat
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from recadam_core import DriftBudget, Linear, RecAdamError
from recadam_torch import Anchors, CoverageWarning, Forgetting, RecAdam, anchor, lora_anchors, reference
from recadam_torch.huggingface import AnchorCallback

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("trainers", HERE / "test_torch_trainers.py")
trainers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trainers)
tiny, trainer, equal, lora = trainers.tiny, trainers.trainer, trainers.equal, trainers.lora

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainers' own
HEAVY = pytest.mark.heavy
BERT = transformers.BertForSequenceClassification


def trained(folder, model, callback=None, start=None, **more):
    """The trainer and the callback after a run."""
    callback = callback or AnchorCallback(pull=0.5)
    made = trainer(folder, model, **more)
    made.add_callback(callback)
    made.train(resume_from_checkpoint=str(folder / start) if start else None)  # an absolute one is itself
    return made, callback


def kept(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith("_recadam_anchors-")]


def at(model, anchors):
    """Whether the anchors are these weights."""
    values = dict(model.named_parameters())
    return len(anchors) > 0 and all(torch.equal(star, values[name]) for name, star in anchors.items())


@pytest.fixture
def folder(tmp_path):
    """Weights that a model names, its head among them."""
    tiny().save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


class ByHand(trainers.NoDropout):
    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer()
        anchor(optimizer, {n: p.detach().clone() for n, p in self.model.named_parameters()}, pull=0.5,
               names=self.model.named_parameters())  # fmt: skip
        return optimizer


def test_one_line_does_what_anchor_does_in_a_loop(tmp_path):
    one, other = tiny(), tiny()
    trained(tmp_path / "a", one)
    trainer(tmp_path / "b", other, kind=ByHand).train()
    assert equal(one, other)
    plain = tiny()
    trainer(tmp_path / "c", plain).train()
    assert not equal(one, plain)


OTHERS = ("sgd", "adafactor", "adamw_torch_fused")
OPTIMIZERS = ["adamw_torch", *(pytest.param(name, marks=HEAVY) for name in OTHERS)]


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("named", [True, False])
def test_a_run_that_is_resumed_goes_on_bit_for_bit(tmp_path, folder, named, optim):
    make = (lambda: BERT.from_pretrained(folder)) if named else tiny
    whole = make()
    first, callback = trained(tmp_path / "run", whole, optim=optim)
    saved = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    if any(name.endswith("LayerNorm.gamma") for name in saved):
        pytest.skip("this transformers saves norms under names that Trainer does not load again")
    assert len(kept(tmp_path / "run")) == (not named)  # the file that is named needs no copy
    source = first.optimizer.param_groups[0]["anchor_source"]
    assert source == (str(folder / "model.safetensors") if named else "")
    assert at(tiny(), callback.handle.anchors)
    assert len(callback.handle.anchors) == len(list(tiny().parameters()))
    resumed = make()
    second, callback = trained(tmp_path / "run", resumed, start="checkpoint-6", optim=optim)
    assert second.state.global_step == 12
    assert equal(whole, resumed)
    assert at(tiny(), callback.handle.anchors)


def test_its_figures_are_in_the_logs(tmp_path):
    made = trainer(tmp_path, tiny())
    callback = AnchorCallback.add_to(made, pull=0.5, annealing=Linear(t0=24))
    assert made.callback_handler.callbacks[0] is callback
    made.train()
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [4, 8, 12]
    for entry in logged:
        t = entry["step"]
        rate = 0.5 * (1 - t / 24) * (1 - (t - 1) / 12)  # of the annealing, and of Trainer's own schedule
        assert entry["anchor/pull"] == pytest.approx(rate)
        assert 0 < entry["anchor/distance"] < 0.2
    assert logged[-1]["anchor/distance"] == pytest.approx(callback.handle.drift().distance)


@HEAVY
def test_a_checkpoint_of_the_model_alone_is_resumed_to_the_same_anchors(tmp_path, folder):
    for i, make in enumerate((tiny, lambda: BERT.from_pretrained(folder))):
        where = tmp_path / str(i)
        trained(where, make(), save_only_model=True)
        with pytest.warns(UserWarning, match="AnchorCallback: step 6 is resumed, and the checkpoint says n"):
            _, callback = trained(where, make(), start="checkpoint-6", save_only_model=True)
        assert at(tiny(), callback.handle.anchors)
        with pytest.warns(UserWarning, match="the checkpoint says nothing of a pull"):
            second = trained(where, make(), start="checkpoint-6", save_only_model=True, steps=8)[0]
        assert [group["anchor_step"] for group in second.optimizer.param_groups] == [8, 8]


@HEAVY
def test_tuned_weights_are_never_taken_for_the_pretrained(tmp_path, folder):
    trained(tmp_path / "run", BERT.from_pretrained(folder))
    tuned = tmp_path / "run" / "checkpoint-6"
    with pytest.raises(RecAdamError, match=r"anchor: group 0 was pulled towards other anchors \(from .*pret"):
        trained(tmp_path / "run", BERT.from_pretrained(tuned), start="checkpoint-6")
    with pytest.raises(RecAdamError, match="step 6 is resumed and nothing says which its anchors are"):
        trained(tmp_path / "run", tiny(), start="checkpoint-6")
    given = AnchorCallback(pull=0.5, anchors=folder)
    again, callback = trained(tmp_path / "run", BERT.from_pretrained(tuned), given, start="checkpoint-6")
    assert at(tiny(), callback.handle.anchors)
    assert again.state.global_step == 12


@HEAVY
def test_two_runs_in_one_folder_keep_their_own_anchors(tmp_path):
    trained(tmp_path, tiny(0), steps=6)
    shutil.move(tmp_path / "checkpoint-6", tmp_path / "first-6")
    trained(tmp_path, tiny(1), steps=6)
    assert len(kept(tmp_path)) == 2
    for seed, start in ((0, "first-6"), (1, "checkpoint-6")):
        _, callback = trained(tmp_path, tiny(5), start=start, steps=8)
        assert at(tiny(seed), callback.handle.anchors)


@HEAVY
def test_a_model_that_is_no_longer_what_it_names_is_anchored_where_it_is(tmp_path, folder):
    model = BERT.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    changed = copy.deepcopy(model)
    with pytest.warns(CoverageWarning, match=r"the model is not what .*pretrained holds, .* name these in"):
        _, callback = trained(tmp_path / "run", model)
    assert at(changed, callback.handle.anchors)
    assert len(kept(tmp_path / "run")) == 1


@HEAVY
def test_a_head_that_the_file_has_not_is_new(tmp_path, folder):
    tiny().bert.save_pretrained(folder)
    model = BERT.from_pretrained(folder)
    head = [name for name, _ in model.named_parameters() if name.startswith("classifier")]
    with pytest.warns(CoverageWarning, match=r"no anchor for classifier.weight"):
        _, callback = trained(tmp_path / "run", model)
    assert len(head) == 2
    assert not set(head) & set(callback.handle.anchors)
    _, callback = trained(tmp_path / "b", tiny(), AnchorCallback(new=["classifier.*"]))
    assert not set(head) & set(callback.handle.anchors)
    assert not set(head) & set(load_file(tmp_path / "b" / kept(tmp_path / "b")[0]))
    _, callback = trained(tmp_path / "b", tiny(1), start="checkpoint-6")
    assert not set(head) & set(callback.handle.anchors)


def test_without_checkpoints_nothing_is_written(tmp_path):
    trained(tmp_path, tiny(), save="no")
    assert list(tmp_path.iterdir()) == []


@HEAVY
def test_a_checkpoint_that_says_nothing_is_never_anchored_to_tuned_weights(tmp_path, folder):
    where = tmp_path / "run"
    trained(where, BERT.from_pretrained(folder), save_only_model=True)
    tuned = where / "checkpoint-6"
    with pytest.raises(RecAdamError, match=r"nothing says which its anchors are \(no weights but tuned ones"):
        trained(where, BERT.from_pretrained(tuned), start="checkpoint-6", save_only_model=True)
    # Where another run has kept its own there is a choice, which is the user's.
    trained(where, tiny(7), steps=4)
    with pytest.raises(RecAdamError, match=r"\(one of .*_recadam_anchors-.*, .*pretrained/model.safetensors"):
        trained(where, BERT.from_pretrained(folder), start="checkpoint-6", save_only_model=True)
    with pytest.warns(UserWarning, match="says nothing of a pull"):
        trained(tmp_path / "again", BERT.from_pretrained(folder), start=str(tuned), save_only_model=True)


@HEAVY
def test_a_second_stage_keeps_what_it_started_from(tmp_path):
    """Its own checkpoints overwrite the one that the model names, or make room for others."""
    trainer(tmp_path, tiny()).train()
    stage = BERT.from_pretrained(tmp_path / "checkpoint-12")
    began = copy.deepcopy(stage)
    trained(tmp_path, stage)
    assert len(kept(tmp_path)) == 1
    for model in (BERT.from_pretrained(tmp_path / "checkpoint-12"), tiny(4)):
        _, callback = trained(tmp_path, model, start="checkpoint-6")
        assert at(began, callback.handle.anchors)


@HEAVY
def test_a_file_of_kept_anchors_that_is_damaged_is_told_and_written_anew(tmp_path):
    trained(tmp_path, tiny())
    (name,) = kept(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for damaged in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1])):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(RecAdamError, match=f"{name}: damaged, it does not hold what its name says; rest"):
            trained(tmp_path, tiny(3), start="checkpoint-6")
    trained(tmp_path, tiny())
    assert (tmp_path / name).read_bytes() == whole
    trained(tmp_path, tiny(3), start="checkpoint-6")


@HEAVY
def test_a_run_that_is_resumed_with_other_new_parameters_is_told_so(tmp_path):
    trained(tmp_path, tiny())
    (name,) = kept(tmp_path)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(RecAdamError, match=f"{name} has the run's anchors, and with the present new=, or mo"):
        trained(tmp_path, tiny(3), AnchorCallback(pull=0.5, new=["classifier.*"]), start="checkpoint-6")
    assert (tmp_path / name).read_bytes() == before


@HEAVY
def test_a_run_that_goes_on_in_another_folder_is_told_what_to_give(tmp_path):
    trained(tmp_path / "a", tiny())
    start = tmp_path / "a" / "checkpoint-6"
    with pytest.raises(RecAdamError, match=r"give anchors=...: _recadam_anchors-\*.safetensors of the"):
        trained(tmp_path / "b", tiny(3), start=start)
    given = AnchorCallback(pull=0.5, anchors=tmp_path / "a" / kept(tmp_path / "a")[0])
    made, callback = trained(tmp_path / "b", tiny(3), given, start=start)
    assert made.state.global_step == 12
    assert at(tiny(), callback.handle.anchors)


@HEAVY
def test_what_peft_trains_whole_is_new_if_the_base_has_it_not(tmp_path, folder):
    peft = pytest.importorskip("peft")
    tiny().bert.save_pretrained(folder)

    def make(**options):
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], **options)
        return peft.get_peft_model(BERT.from_pretrained(folder), config)

    with pytest.warns(CoverageWarning, match=r"no anchor for .*classifier.modules_to_save.default.weight"):
        _, callback = trained(tmp_path / "a", make())
    assert all("lora_B" in name for name in callback.handle.anchors)
    model = make(modules_to_save=["classifier", "pooler"])
    _, callback = trained(tmp_path / "b", model, AnchorCallback(new=["classifier.*"]))
    rest = [name for name in callback.handle.anchors if "lora_B" not in name]
    assert len(rest) == 2
    assert all("pooler.dense.modules_to_save" in name or "pooler.modules_to_save" in name for name in rest)


@HEAVY
def test_lora_is_anchored_at_a_product_of_zero(tmp_path):
    model = lora()
    zeros = lora_anchors(model)
    _, callback = trained(tmp_path, model, AnchorCallback(pull=5.0))
    anchors = callback.handle.anchors
    saved = {name for name in anchors if "lora" not in name}
    assert {name: x for name, x in anchors.items() if "lora" in name}.keys() == zeros.keys()
    assert all("modules_to_save" in name for name in saved)
    assert not any(x.count_nonzero() for name, x in anchors.items() if name in zeros)
    assert 0 < trainers.product(model) < 0.02
    assert (tmp_path / kept(tmp_path)[0]).stat().st_size < 20_000  # the frozen model is not in it
    whole = copy.deepcopy(model.state_dict())
    again = lora()
    trained(tmp_path, again, AnchorCallback(pull=5.0), start="checkpoint-6")
    assert all(torch.equal(x, whole[name]) for name, x in again.state_dict().items())


@HEAVY
def test_a_trainer_that_trains_twice_keeps_the_first_anchors(tmp_path):
    made, callback = trained(tmp_path, tiny())
    made.train()
    assert at(tiny(), callback.handle.anchors)
    made.optimizer = made.lr_scheduler = None
    made.train()  # another optimizer, of the same model
    assert at(tiny(), callback.handle.anchors)
    assert callback.handle.is_of(made.optimizer)
    _, callback = trained(tmp_path / "other", tiny(3), callback)
    assert at(tiny(3), callback.handle.anchors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pull": -1}, "anchor: pull is -1; give a finite number >= 0"),
        ({"pull": float("nan")}, "anchor: pull is nan"),
        ({"pull": "0.1"}, "anchor: pull is '0.1'"),
        ({"annealing": "sigmoid"}, "Hyperparameters: annealing is 'sigmoid'"),
        ({"anchors": Anchors.of(nn.Linear(1, 1)), "new": ["a"]}, "AnchorCallback: new and Anchors are both"),
        ({"anchors": 5}, "AnchorCallback: anchors is 5; give a path, a state dict or Anchors"),
        ({"probe": "a text"}, "AnchorCallback: the probe is 'a text'; give a list"),
        ({"probe": {"input_ids": torch.ones(1)}}, "AnchorCallback: the probe is {"),
        ({"probe": []}, "AnchorCallback: the probe is empty"),
        ({"probe": 5}, "AnchorCallback: the probe is 5"),
        ({"new": 5}, "AnchorCallback: new is 5; give a list of names, or of patterns"),
        ({"new": ["head", 5]}, r"AnchorCallback: new is \['head', 5\]; give a list of names"),
        ({"importance": 5}, "AnchorCallback: importance is 5; give tensors by parameter name"),
        (
            {"probe": ["a text"], "budget": DriftBudget(1.0)},
            "the pull is 0.1, and the budget keeps it from 1 to 1e\\+06; give a DriftBudget whose low and",
        ),
    ],
)
def test_a_wrong_setting_is_refused_at_once(settings, message):
    for kind in (AnchorCallback, *(lightning_kind() or ())):
        with pytest.raises(RecAdamError, match=message):
            kind(**settings)


def test_it_is_put_before_the_others_of_a_trainer_alone():
    with pytest.raises(
        RecAdamError, match=r"AnchorCallback.add_to: None is no Trainer of transformers; give one"
    ):
        AnchorCallback.add_to(None)


def lightning_kind():
    if importlib.util.find_spec("lightning") is None:
        return None
    from recadam_torch.lightning import AnchorCallback as OfLightning

    return (OfLightning,)


def test_what_cannot_be_pulled_is_refused_before_a_step(tmp_path, folder):
    before = tiny()
    for callback, message in (
        (AnchorCallback(anchors=tmp_path / "nowhere"), "nowhere: no such file or folder"),
        (AnchorCallback(anchors=folder, new=["clasifier.*"]), "new='clasifier.\\*' matches no parameter"),
        (AnchorCallback(importance={"nothing": torch.ones(1)}), "importance"),
    ):
        model = tiny()
        with pytest.raises(RecAdamError, match=message):
            trained(tmp_path / "run", model, callback)
        assert equal(model, before)
    made = trainer(tmp_path / "run", before, optimizers=(RecAdam(before.named_parameters()), None))
    made.add_callback(AnchorCallback())
    with pytest.raises(RecAdamError, match="anchor: RecAdam pulls by itself"):
        made.train()
    other = nn.Linear(2, 2)
    made = trainer(tmp_path / "run", tiny(), optimizers=(torch.optim.SGD(other.parameters()), None))
    made.add_callback(AnchorCallback())
    with pytest.raises(
        RecAdamError, match="AnchorCallback: the optimizer steps none of the model's paramete"
    ):
        made.train()


def test_a_folder_that_takes_no_file_is_said_before_a_step(tmp_path):
    (tmp_path / "run").write_text("a file stands there")
    made = trainer(tmp_path / "elsewhere", tiny())
    made.args.output_dir = str(tmp_path / "run")
    callback = AnchorCallback()
    made.add_callback(callback)
    with pytest.raises(RecAdamError, match=r"AnchorCallback: .*run.*; let the anchors be written there, or"):
        made.train()
    assert "anchor_step" not in made.optimizer.param_groups[0]
    assert stat.S_ISREG((tmp_path / "run").stat().st_mode)


# TRL.


def words():
    """A tokenizer of sixty words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]
    model = models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>")
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def decoder(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**trainers.SMALL, **sizes))


def trl_trained(kind, folder, model, callback, start=None, peft=None, **more):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = {"text": [" ".join(f"w{i * j % 61}" for j in range(8)) for i in range(32)]}
    if kind == "DPO":
        rows = {"prompt": [f"w{i}" for i in range(32)], "chosen": [f" w{2 * i % 61} w3" for i in range(32)],
                "rejected": [f" w{3 * i % 61} w5" for i in range(32)]}  # fmt: skip
    args = getattr(trl, f"{kind}Config")(
        str(folder), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=2,
        save_steps=4, report_to=[], disable_tqdm=True, use_cpu=True, seed=3, bf16=False, max_length=16,
    )  # fmt: skip
    made = getattr(trl, f"{kind}Trainer")(
        model, args=args, train_dataset=Dataset.from_dict(rows), processing_class=words(),
        callbacks=[callback], peft_config=peft, **more,
    )  # fmt: skip
    made.train(resume_from_checkpoint=start)
    return made


@pytest.mark.parametrize("kind", ["SFT", pytest.param("DPO", marks=HEAVY)])
def test_a_trainer_of_trl_resumes_bit_for_bit(kind, tmp_path):
    whole, resumed = decoder(), decoder()
    for model, start in ((whole, None), (resumed, str(tmp_path / "checkpoint-4"))):
        callback = AnchorCallback(pull=0.5)
        more = {"ref_model": reference(model, callback)} if kind == "DPO" else {}
        made = trl_trained(kind, tmp_path, model, callback, start, **more)
        assert at(decoder(), callback.handle.anchors)
        logged = [entry for entry in made.state.log_history if "loss" in entry]
        assert [entry["step"] for entry in logged] == [2, 4, 6, 8]
        assert all(entry["anchor/distance"] > 0 for entry in logged)
    assert equal(whole, resumed)


@HEAVY
def test_dpo_with_the_anchors_as_its_reference_is_dpo_with_a_second_model(tmp_path):
    one, other, callback = decoder(), decoder(), AnchorCallback(pull=0.2)
    trl_trained("DPO", tmp_path, one, callback, ref_model=reference(one, callback))
    trl_trained("DPO", tmp_path, other, AnchorCallback(pull=0.2), ref_model=decoder())
    assert equal(one, other)


@HEAVY
def test_lora_in_a_trainer_of_trl(tmp_path):
    peft = pytest.importorskip("peft")
    callback = AnchorCallback(pull=0.5)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    made = trl_trained("SFT", tmp_path, decoder(), callback, peft=config)
    assert all("lora_B" in name for name in callback.handle.anchors)
    assert len(callback.handle.anchors) == 2
    assert made.state.log_history[0]["anchor/distance"] > 0


# sentence-transformers, on a real encoder.


@HEAVY
def test_sentence_transformers_are_anchored_to_the_file_of_their_encoder(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    Dataset = pytest.importorskip("datasets").Dataset
    from recadam_harness.archives import model_folder

    modules = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    source = model_folder("minilm-l3")
    rows = Dataset.from_dict({"anchor": [f"a question {i}" for i in range(32)],
                              "positive": [f"an answer {i}" for i in range(32)]})  # fmt: skip
    ends = []
    for start in (None, str(tmp_path / "checkpoint-2")):
        model = st.SentenceTransformer(
            modules=[modules.Transformer(str(source)), modules.Pooling(384)], device="cpu"
        )
        args = st.SentenceTransformerTrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=8, logging_steps=2, save_steps=2,
            report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        callback = AnchorCallback(pull=0.1)
        losses = importlib.import_module("sentence_transformers.losses")
        loss = losses.MultipleNegativesRankingLoss(model)
        loss.extra = nn.Parameter(torch.zeros(3))  # of the loss, not of the model
        made = st.SentenceTransformerTrainer(
            model, args=args, train_dataset=rows, loss=loss, callbacks=[callback]
        )
        made.train(resume_from_checkpoint=start)
        assert made.optimizer.param_groups[0]["anchor_source"] == str(source / "model.safetensors")
        assert not any(name.startswith("elsewhere") for name in callback.handle.anchors)
        stored = load_file(source / "model.safetensors")
        for name, star in callback.handle.anchors.items():
            assert torch.equal(star, stored[name.removeprefix("0.model.")])
        ends.append(copy.deepcopy(model.state_dict()))
        assert callback.handle.drift().distance > 0.1
    assert all(torch.equal(x, ends[1][name]) for name, x in ends[0].items())
    assert kept(tmp_path) == []


# Lightning.


def lightning_fit(folder, callback, epochs=2, module=None, optimizers=1, **more):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.body, self.head = nn.Linear(8, 4), nn.Linear(4, 1)
            self.automatic_optimization = optimizers == 1

        def training_step(self, batch, index):
            loss = self.head(self.body(batch).tanh()).square().mean()
            if optimizers == 1:
                return loss
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            return None

        def configure_optimizers(self):
            if optimizers == 2:
                return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]

    rows = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    off = ("enable_progress_bar", "logger", "enable_model_summary", "enable_checkpointing")
    options = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 2, **dict.fromkeys(off, False)}
    module = Module() if module is None else module
    runner = lightning.Trainer(max_epochs=epochs, default_root_dir=folder, callbacks=[callback], **options)
    runner.fit(module, torch.utils.data.DataLoader(rows, batch_size=8), **more)
    return runner, module


def of_lightning(**settings):
    pytest.importorskip("lightning")
    from recadam_torch.lightning import AnchorCallback as OfLightning

    return OfLightning(**{"pull": 0.5, "new": ["head.*"], **settings})


def test_lightning_is_pulled_and_resumed_bit_for_bit(tmp_path):
    callback = of_lightning()
    half, tuned = lightning_fit(tmp_path, callback)
    half.save_checkpoint(tmp_path / "half.ckpt")
    (handle,) = callback.handles
    assert half.logged_metrics["anchor/distance"] == pytest.approx(handle.drift().distance)
    assert half.logged_metrics["anchor/pull"] == pytest.approx(0.45)
    _, straight = lightning_fit(tmp_path, of_lightning(), 4)
    more = {"ckpt_path": tmp_path / "half.ckpt", "weights_only": True}
    _, resumed = lightning_fit(tmp_path, of_lightning(), 4, **more)
    assert equal(straight, resumed)
    _, plain = lightning_fit(tmp_path, of_lightning(pull=0.0), 4)
    assert not equal(straight, plain)
    with pytest.raises(RecAdamError, match="load_state_dict: group 0 was pulled towards other anchors"):
        lightning_fit(tmp_path, of_lightning(), 4, module=tuned, **more)


@HEAVY
def test_lightning_with_two_optimizers_and_twice(tmp_path):
    callback = of_lightning(new=[])
    with callback.at_anchors():  # before it starts
        pass
    _, module = lightning_fit(tmp_path, callback, optimizers=2)
    assert len(callback.handles) == 2
    first = {name: star for handle in callback.handles for name, star in handle.anchors.items()}
    assert len(first) == 4
    tuned = copy.deepcopy(module)
    with callback.at_anchors():
        assert at(module, first)
    assert equal(module, tuned)
    lightning_fit(tmp_path, callback, module=module, optimizers=2)
    again = {name: star for handle in callback.handles for name, star in handle.anchors.items()}
    assert all(torch.equal(star, again[name]) for name, star in first.items())


# The reference model.


def test_a_reference_is_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    before = copy.deepcopy(model).eval()
    optimizer = RecAdam(model.named_parameters(), lr=0.1, gamma=0.0)
    frozen = reference(model, optimizer)
    rows = torch.randn(8, 4)
    for _ in range(3):
        loss = (model(rows) - frozen(rows)).square().sum()  # forward, reference, then backward
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        said = frozen(rows)
        assert torch.equal(said, before(rows))
        assert not said.requires_grad
        assert model.training
    assert type(frozen).__name__ == "Sequential"
    assert isinstance(frozen, nn.Sequential)
    assert all(a is b for a, b in zip(frozen.parameters(), model.parameters(), strict=True))
    with pytest.raises(RecAdamError, match="reference: the model is a int; give the module"):
        reference(5, optimizer)


def test_what_is_done_to_a_reference_is_not_done_to_the_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    frozen = reference(model, anchor(torch.optim.SGD(model.parameters(), lr=0.1)))
    for done in (frozen.eval(), frozen.requires_grad_(False), frozen.half(), frozen.to(torch.float64)):
        assert done is frozen
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert not frozen(torch.ones(2)).requires_grad


def test_a_reference_by_one_of_two_optimizers_is_warned_of():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    handles = [anchor(torch.optim.SGD(part.parameters(), lr=0.1)) for part in model]
    with pytest.warns(UserWarning, match=r"reference: 1.weight, 1.bias are stepped by an optimizer that is"):
        reference(model, handles[0])
    both = reference(model, handles)
    before = model(torch.ones(2)).detach()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert torch.equal(both(torch.ones(2)), before)
    normed = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    handle = anchor(torch.optim.SGD(normed.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="the running statistics of '1' have no anchors"):
        reference(normed, handle)


def test_a_reference_of_another_model_is_refused():
    """Or the policy would be its own reference, and a meter would say that nothing was forgotten."""
    model = nn.Linear(2, 2)
    other, rows = copy.deepcopy(model), [torch.ones(1, 2)]
    recadam = RecAdam(copy.deepcopy(model).named_parameters())
    for known in (anchor(torch.optim.SGD(model.parameters(), lr=0.1)), recadam):
        for make in (lambda known: reference(other, known), lambda known: Forgetting(other, known, rows)):
            with pytest.raises(
                RecAdamError, match="what has the anchors steps none of this model's parameters"
            ):
                make(known)


def test_a_reference_that_raises_leaves_the_model_as_it_was():
    model = nn.Linear(2, 2)
    tuned = copy.deepcopy(model)
    frozen = reference(model, anchor(torch.optim.SGD(model.parameters(), lr=0.1)))
    with pytest.raises(RuntimeError):
        frozen(torch.ones(3))
    assert equal(model, tuned)
    assert model.training
