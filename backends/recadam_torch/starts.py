"""The weights that a run started from: in the file that its model names, or kept beside its checkpoints."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from recadam_core import RecAdamError
from recadam_core.files import replacing

from .anchors import Anchors, CoverageWarning
from .matching import matched
from .pulling import HASH, STEP, AnchorPull, anchor, unwrapped
from .shards import is_sharded, local
from .sources import Tensors, open_source

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
        self._new = (new,) if isinstance(new, str) else tuple(new)
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
        if named is not None:
            handle = self._pulled(named)
            if handle.drift().distance == 0:
                return handle
            handle.remove()  # the model is no longer what it was loaded as
        handle = self._pulled(self._here())
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

    def again(self, step: int) -> AnchorPull:
        """The pull of a run that is resumed, towards what its first start was."""
        said = [group for group in self._groups if group.get(HASH)]
        kept = sorted(self._folder.glob(KEPT.replace("{:016x}", "*")))
        meant = self._folder / KEPT.format(_together(said))
        kept.sort(key=lambda path: path != meant)
        refusal = ""
        for path in kept if said or len(kept) == 1 else []:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", CoverageWarning)  # what it has not was new then
                    handle = self._pulled(self._found(path))
            except RecAdamError as error:
                refusal = str(error)
            else:
                return self._counted(handle, step, said)
        named = None if len(kept) > 1 and not said else self._named()
        if named is not None:
            return self._counted(self._pulled(named), step, said)
        if refusal:
            raise RecAdamError(refusal)
        raise RecAdamError(
            f"AnchorCallback: step {step} is resumed and its anchors are not found: the model names no file "
            f"on this machine, {self._folder} has {len(kept) or 'no'} {KEPT[:16]}*; give anchors=..."
        )

    def _counted(self, handle: AnchorPull, step: int, said: list[Any]) -> AnchorPull:
        """The handle, at a step that no state of the optimizer told."""
        if not said:
            warnings.warn(
                f"AnchorCallback: step {step} is resumed, and the checkpoint says nothing of a pull "
                "(save_only_model, or a run without it)",
                stacklevel=2,
            )
            for group in self._groups:
                group[STEP] = step
        return handle

    def _found(self, source: Any) -> Anchors:
        return Anchors.of(self._model, source, new=self._new)

    def _pulled(self, found: Mapping[str, Tensor]) -> AnchorPull:
        names = [*self._model.named_parameters(), *self._others]
        if isinstance(found, Anchors):
            found = found.with_new(self._others)
        return anchor(self._optimizer, found, names=names, **self._settings)

    def _here(self) -> dict[str, Tensor]:
        """The parameters themselves, but for the new ones: what copies them copies each process's part."""
        coverage = matched(self._model, Tensors(self._trained), (*self._new, *self._random()))
        return {match.parameter: self._trained[match.parameter] for match in coverage.having("anchored")}

    def _named(self) -> Anchors | None:
        """The weights that the model was loaded from, in the dtype that it has; None if it names none."""
        if any(LORA.search(name) for name in self._trained):
            return None  # of them none is trained
        names = {getattr(module, "name_or_path", "") for module in self._model.modules()} - {"", None}
        if len(names) != 1:
            return None
        dtypes = Counter(p.dtype for p in self._trained.values() if p.is_floating_point())
        try:
            source = open_source(_on_this_machine(names.pop()))
            return Anchors.of(self._model, source.path, new=self._new, dtype=dtypes.most_common(1)[0][0])
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
        if writes and not path.exists():
            with replacing(path) as beside:
                save_file(whole, beside)


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
