"""The weights that a run started from: in the file that its model names, or kept beside its checkpoints."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recadam_core import RecAdamError
from recadam_core.files import replacing

from .anchors import Anchors, CoverageWarning, hashes_of
from .matching import MODULE, matched, some_of
from .pulling import HASH, STEP, AnchorPull, anchor, unwrapped
from .shards import is_sharded, local
from .sources import Source, Tensors, open_source

__all__ = ["Start"]

KEPT = "_recadam_anchors-{:016x}.safetensors"
"""What the anchors of a first start are called: by their hash, so that no run takes another's."""

LORA = re.compile(r"(^|\.)lora_(embedding_)?(?P<factor>[AB])(\.|$)")
ELSEWHERE = "elsewhere"
"""What the names of parameters begin with that the optimizer has and the model has not: of a loss, say."""


class Start:
    """A model and its optimizer when training starts, and the anchors that they are to have.

    Args:
        model: as it is: pretrained, or loaded from a checkpoint.
        optimizer: of its trainable parameters, and perhaps others', which are not pulled.
        folder: where the run's checkpoints are.
        new: as in `Anchors.of`.
        settings: of `anchor`.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, folder: Path, new: Iterable[str], settings: dict[str, Any]
    ) -> None:
        self._model, self._optimizer, self._folder, self._settings = model, optimizer, folder, settings
        self._new = tuple(new)
        self._groups = unwrapped(optimizer).param_groups
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._ours = set(model.parameters())
        others = [p for group in self._groups for p in group["params"] if p not in self._ours]
        self._others = [(f"{ELSEWHERE}.{i}", p) for i, p in enumerate(others)]
        if len(others) == sum(len(group["params"]) for group in self._groups):
            raise RecAdamError(
                "AnchorCallback: the optimizer steps none of the model's parameters (flat parts of DeepSpeed "
                "or FSDP 1?); call anchor(optimizer) and give Trainer optimizers=(optimizer, None)"
            )

    def is_of(self, handle: AnchorPull) -> bool:
        """Whether what a handle pulls is of this model."""
        return self._ours.issuperset(handle.parameters)

    def given(self, source: Any) -> AnchorPull:
        """The pull towards anchors from a source, of `Anchors.of`, or ready."""
        return self._pulled(source if isinstance(source, Anchors) else self._found(source))

    def first(self, keeps: bool, writes: bool) -> AnchorPull:
        """The pull towards where the model is: the file that it names, if it is there; or kept in one."""
        named = self._named()
        handle = None if named is None else self._pulled(named)
        if handle is not None and handle.drift().distance != 0:
            handle.remove()  # the model is no longer what it was loaded as
            handle = None
        if handle is None:
            self._warn_of_heads()
        # Checkpoints of the run's own folder are overwritten, or make room for others.
        keeps = keeps and (handle is None or self._is_of_a_run(named))
        handle = self._pulled(self._here()) if handle is None else handle
        if keeps:
            try:
                self._keep(handle, writes)
            except OSError as error:
                handle.remove()
                raise RecAdamError(
                    f"AnchorCallback: {error.filename}: {error.strerror}; let the anchors be written there, "
                    "or give anchors=..."
                ) from error
        return handle

    def _warn_of_heads(self) -> None:
        """Say that the weights as they are become anchors where a file would have known which are new."""
        name = self._name()
        if self._new or not name or any(LORA.search(name) for name in self._trained):
            return
        warnings.warn(
            f"AnchorCallback: the model is not what {name} holds, or that is not there; all its "
            "weights as they are now become anchors, those of a new head, too: name these in new=[...]",
            CoverageWarning,
            stacklevel=2,
        )

    def again(self, step: int) -> AnchorPull:
        """The pull of a run that is resumed, towards what its first start was."""
        said = [group for group in self._groups if group.get(HASH)]
        kept = sorted(self._folder.glob(KEPT.replace("{:016x}", "*")))
        if not said:
            return self._unsaid(step, kept, self._named())
        meant = self._folder / KEPT.format(_together(said))
        for path in sorted(kept, key=lambda path: path != meant):
            try:
                return self._pulled(self._kept(path))
            except RecAdamError as error:
                if path == meant:
                    if _is_whole(path):
                        raise RecAdamError(
                            f"AnchorCallback: {path} has the run's anchors, and with the present new=, or "
                            "model, there would be others; resume as it was started, or give anchors=..."
                        ) from error
                    raise RecAdamError(
                        f"AnchorCallback: {path}: damaged, it does not hold what its name says; restore it, "
                        "or give anchors=..."
                    ) from error
        named = self._named()
        if named is not None:
            return self._pulled(named)
        raise self._not_found(step, kept)

    def _unsaid(self, step: int, kept: list[Path], named: Anchors | None) -> AnchorPull:
        """The same, from a checkpoint that does not say what it was pulled to: if there is no choice."""
        if self._is_of_a_run(named):
            named = None  # tuned weights
        if len(kept) + (named is not None) != 1:
            raise self._not_found(step, kept, named)
        found = self._kept(kept[0]) if named is None else named
        handle = self._pulled(found)
        warnings.warn(
            f"AnchorCallback: step {step} is resumed, and the checkpoint says nothing of a pull "
            f"(save_only_model, or a run without it); anchored to {found.source.path}",
            stacklevel=2,
        )
        for group in self._groups:
            group[STEP] = step
        return handle

    def _not_found(self, step: int, kept: list[Path], named: Anchors | None = None) -> RecAdamError:
        there = [str(path) for path in kept] + ([named.source.path] if named is not None else [])
        what = f"one of {some_of(there)}" if there else "no weights but tuned ones are there"
        return RecAdamError(
            f"AnchorCallback: step {step} is resumed and nothing says which its anchors are ({what}); "
            f"give anchors=...: {KEPT.replace('{:016x}', '*')} of the folder where it was started, or the "
            "pretrained weights"
        )

    def _is_of_a_run(self, named: Anchors | None) -> bool:
        """Whether what the model names is a checkpoint of this run or another."""
        if named is None:
            return False
        folder = Path(named.source.path).parent
        return folder.is_relative_to(self._folder.resolve()) or (folder / "trainer_state.json").exists()

    def _found(self, source: Any) -> Anchors:
        return Anchors.of(self._model, source, new=self._new)

    def _kept(self, path: Path) -> Anchors:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoverageWarning)  # what it has not was new then
            return self._found(path)

    def _pulled(self, found: Mapping[str, Tensor]) -> AnchorPull:
        names = [*self._model.named_parameters(), *self._others]
        if isinstance(found, Anchors):
            found = found.with_new(self._others)
        return anchor(self._optimizer, found, names=names, **self._settings)

    def _here(self) -> dict[str, Tensor]:
        """The parameters themselves, but for the new ones: what copies them copies each process's part."""
        new = (*self._new, *self._random())
        coverage = matched(self._model, Tensors(self._trained), new)
        here = {match.parameter for match in coverage.having("anchored")}
        file = self._file() if any(MODULE in name for name in self._trained) else None
        if file is not None:  # of what peft trains whole, the file that it is from knows what is new
            known = matched(self._model, file, new)
            heads = [m.parameter for m in known.surprises if MODULE in m.parameter]
            if heads:
                warnings.warn(
                    f"anchors: no anchor for {some_of(heads)}; name them in new=[...] if they are new",
                    CoverageWarning,
                    stacklevel=2,
                )
            here -= set(heads)
        return {name: p for name, p in self._trained.items() if name in here}

    def _named(self) -> Anchors | None:
        """The weights that the model was loaded from, in the dtype that it has; None if it names none."""
        if any(LORA.search(name) for name in self._trained):
            return None  # of them none is trained
        source = self._file()
        dtypes = Counter(p.dtype for p in self._trained.values() if p.is_floating_point())
        if source is None or not dtypes:
            return None
        try:
            return Anchors.of(self._model, source.path, new=self._new, dtype=dtypes.most_common(1)[0][0])
        except RecAdamError:
            return None

    def _name(self) -> str:
        """Where the model says that its weights are from; empty where it does not, or several places."""
        names = {getattr(module, "name_or_path", "") for module in self._model.modules()} - {"", None}
        return names.pop() if len(names) == 1 else ""

    def _file(self) -> Source | None:
        """The file that the model names, if it is on this machine."""
        name = self._name()
        try:
            return open_source(_on_this_machine(name)) if name else None
        except RecAdamError:
            return None

    def _random(self) -> list[str]:
        """The factors of LoRA that start at random, while the product of the two is zero."""
        factors = {name: match["factor"] for name in self._trained if (match := LORA.search(name))}
        zero = not any(bool(local(self._trained[n]).count_nonzero()) for n, f in factors.items() if f == "B")
        return [name for name, factor in factors.items() if factor == "A" and zero]

    def _keep(self, handle: AnchorPull, writes: bool) -> None:
        """Write the anchors beside the checkpoints to come, in one process."""
        path = self._folder / KEPT.format(_together(handle.said()))
        whole: dict[str, Tensor] = {}
        for name, star in handle.anchors.items():
            sharded: Any = star
            full: Tensor = sharded.full_tensor() if is_sharded(star) else star
            if writes:
                whole[name] = full.detach().cpu().contiguous()
        if writes:
            with replacing(path) as beside:
                save_file(whole, beside)


def _is_whole(path: Path) -> bool:
    """Whether a file holds what its name says."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        return False
    numbers = hashes_of([{"anchor": star} for star in tensors.values()])
    return path.name == KEPT.format(sum(numbers) % 2**62)


def _together(groups: Iterable[Mapping[str, Any]]) -> int:
    number: int = sum(group[HASH] for group in groups) % 2**62
    return number


def _on_this_machine(name: str) -> str:
    """A folder of that name, or the one where the hub's files of that name are."""
    if Path(name).is_dir():
        return name
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.safetensors.index.json"]
        return str(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except Exception as error:  # whatever the hub's library raises
        raise RecAdamError(f"{name!r} is not on this machine") from error
