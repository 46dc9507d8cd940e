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

LIGHT = {
    "test_a_compiled_step_compiles_once_in_two_hundred_steps_of_annealing": 1,
    "test_a_demo_takes_no_run_that_came_meanwhile_for_its_own": 0,
    "test_a_demo_that_ends_early_takes_its_runs_along": 1,
    "test_a_demo_writes_its_logs_anew_and_follows_no_link": 0,
    "test_a_file_that_is_there_is_not_replaced": 3,
    "test_a_killed_run_of_the_harness_is_the_uninterrupted_one": 0,
    "test_a_stranger_finds_its_backend_and_the_kit": 0,
    "test_a_stream_that_is_closed_or_full_changes_no_exit_code": 1,
    "test_a_worst_case_is_shown_alone_by_its_command": 0,
    "test_an_interrupted_run_says_so": 1,
    "test_an_unknown_model": 0,
    "test_backends_lists_what_is_installed": 1,
    "test_bad_input_is_one_line": 4,
    "test_bad_input_is_one_line_and_exit_code_2": 8,
    "test_both_frameworks_step_alike": 1,
    "test_compare_finds_where_two_runs_part": 0,
    "test_conformance_table_and_json": 0,
    "test_defaults_of_torch_change_no_tensor_that_is_made": 0,
    "test_each_seed_walks_the_path_that_it_walks_alone": 0,
    "test_end_to_end_in_float64_to_1e_9": 2,
    "test_every_dtype_gets_the_bits_of_the_loop": 20,
    "test_every_method_runs_and_repeats": 1,
    "test_every_way_to_step_follows_the_formula": 3,
    "test_golden_through_every_variant": 26,
    "test_init_random_starts_elsewhere_and_is_pulled_home": 0,
    "test_movie_reviews_takes_a_folder_and_a_few_rows": 0,
    "test_nothing_is_corrupted": 2,
    "test_odd_names_and_sizes_are_one_line": 3,
    "test_splits_are_disjoint_and_fixed": 0,
    "test_steps_are_counted_whatever_the_default_dtype": 6,
    "test_the_pull_holds_what_it_should": 0,
    "test_the_second_is_refused_before_it_writes": 2,
    "test_the_table_of_uses_is_what_holds": 1,
    "test_trainer_that_resumes_without_the_optimizer_keeps_the_pretrained_anchors": 0,
    "test_two_processes_walk_the_path_of_one": 1,
    "test_weights_that_come_after_the_optimizer_are_the_anchors_of_every_process": 1,
    "test_what_a_command_wrote_it_replaces_when_asked": 0,
    "test_without_an_index_it_is_said_what_to_copy_where": 0,
}
"""How many of a test's cases are not heavy, where together they take too many seconds for `make test`."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A test needs what its marker names, and the library of the backend that it is given by name."""
    cases = {}
    for item in items:
        name = getattr(item, "originalname", None)
        if name in LIGHT and not item.get_closest_marker("heavy"):
            cases.setdefault((name, item.path), []).append(item)
    for (name, _), some in cases.items():
        light = {i * len(some) // LIGHT[name] for i in range(LIGHT[name])}  # spread over all of them
        for i, item in enumerate(some):
            if i not in light:
                item.add_marker(pytest.mark.heavy)
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
