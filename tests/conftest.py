"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # what is slow on a busy machine is no failure
settings.load_profile("untimed")

# A shell's background jobs ignore interrupts, and their children would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What tests start in a process of its own, or load, has no tests and no examples.
HERE = Path(__file__).parent
collect_ignore = [str(path) for path in HERE.rglob("*.py") if not path.match("test_*.py")]

LIBRARIES = ("torch", "jax")


def pytest_collection_modifyitems(items):
    """A test needs what its marker names, and the library of the backend that it is given by name."""
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        needed = [x for x in given if isinstance(x, str) and x in LIBRARIES]
        needed += [name for mark in item.iter_markers("needs") for name in mark.args]
        for name in needed:
            if importlib.util.find_spec(name) is None:
                item.add_marker(pytest.mark.skip(reason=f"could not import {name!r}"))
        if item.get_closest_marker("tree") and not (HERE.parent / "recadam_core").exists():
            item.add_marker(pytest.mark.skip(reason="no sources beside the tests"))


@pytest.fixture(scope="session")
def recadam():
    """Runs the command line in a process of its own."""

    def run(*args, cwd=None, env=None, timeout=300):
        return subprocess.run(
            [sys.executable, "-m", "recadam_core", *map(str, args)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def campaign():
    """The module of that name, which is no test."""
    spec = importlib.util.spec_from_file_location("campaign", HERE / "harness" / "campaign.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A random two-layer BERT with a word tokenizer, as a Hugging Face checkpoint folder."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(num_hidden_layers=2, **sizes)).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "good", "bad", "film", "plot", "dull", "fine"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Checkpoint folders of tiny random encoders, "bert" and "albert", whose tokenizers know few words."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "of", "and", "is", "not", "good", "man"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    sizes = {"vocab_size": len(words), "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    kinds = {
        "bert": lambda: BertModel(BertConfig(num_hidden_layers=1, **sizes)),
        "albert": lambda: AlbertModel(AlbertConfig(num_hidden_layers=2, embedding_size=8, **sizes)),
    }
    folders = {}
    for kind, make in kinds.items():
        folders[kind] = str(tmp_path_factory.mktemp(kind))
        torch.manual_seed(0)
        make().save_pretrained(folders[kind])
        names = ["input_ids", "token_type_ids", "attention_mask"]
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **special)
        fast.save_pretrained(folders[kind])
    return folders
