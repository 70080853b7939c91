"""Two checks of a running job: which parameters get a gradient in the first step, and whether the loss is finite.

Settings can claim to train weights that do not train (RECIPE: the published "vision frozen" rows). The census of
gradients detects this.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from phi3v.model.modeling import parameter_group, size_of
from phi3v.provenance.manifest import write_json
from phi3v.settings import FinetuneSettings
from phi3v.training.launch import say

# Groups that only get gradients from pictures.
PICTURE_GROUPS = ("clip", "projector", "separators")


class CensusError(RuntimeError):
    """A group that should train got no gradient."""


class NotANumberError(RuntimeError):
    """The loss was NaN or infinite for several steps in a row."""


def census_group(name: str) -> str:
    """Group of a parameter. Adapters are grouped by the layer they belong to, such as `adapters (clip)`."""
    group = parameter_group(name)
    if group != "adapters":
        return group
    parts = name.removeprefix("base_model.model.").split(".")
    place = next((i for i, part in enumerate(parts) if part.startswith(("lora_", "modules_to_save"))), len(parts))
    return f"adapters ({parameter_group('.'.join([*parts[:place], 'weight']))})"


@dataclass
class Group:
    """Number of weights in a group."""

    parameters: int = 0
    trainable: int = 0
    with_gradient: int = 0
    expected: bool = False
    """Whether any of them should train."""


@dataclass
class _Watched:
    """A parameter that should train."""

    name: str
    group: str
    size: int
    seen: torch.Tensor | None = None
    """Whether a gradient was nonzero, on the gradient's device. None: no gradient yet."""

    def note(self, gradient: torch.Tensor) -> None:
        seen = (gradient != 0).any()
        self.seen = seen if self.seen is None else self.seen | seen


class Census:
    """Counts parameters by group, and until `finish` records which ones get a nonzero gradient."""

    def __init__(self, model: nn.Module, label: str) -> None:
        self.label = label
        self.groups: dict[str, Group] = {}
        self._watched: list[_Watched] = []
        self._handles: list[RemovableHandle] = []
        for name, parameter in model.named_parameters():
            # A 4-bit weight stores two values per byte.
            size = size_of(parameter)
            size *= 2 if type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8 else 1
            group = census_group(name)
            entry = self.groups.setdefault(group, Group())
            entry.parameters += size
            if parameter.requires_grad:
                entry.trainable += size
                entry.expected = True
                self._watched.append(_Watched(name, group, size))
                self._handles.append(parameter.register_hook(self._watched[-1].note))

    def finish(self, device: torch.device, pictures_seen: bool) -> None:
        """Sets `with_gradient` over all processes and removes the hooks. A collective call.

        pictures_seen: whether any process had a picture in the step. Raises CensusError for a layer, or a group outside
        of layers, that should train but got no gradient. Layers are checked one by one, because a group can get a
        gradient through its last norm alone.
        """
        for handle in self._handles:
            handle.remove()
        none = torch.zeros((), dtype=torch.bool, device=device)
        seen = [none if watched.seen is None else watched.seen.to(device) for watched in self._watched]
        flags = torch.stack(seen).to(torch.int32)
        if dist.is_initialized():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        blocks: dict[str, list[tuple[_Watched, int]]] = {}
        for watched, flag in zip(self._watched, flags.tolist(), strict=True):
            self.groups[watched.group].with_gradient += watched.size * flag
            layer = re.search(r".*\.layers\.\d+(?=\.)", watched.name)
            blocks.setdefault(layer.group() if layer else watched.group, []).append((watched, flag))
        silent = [
            [watched for watched, _ in block]
            for block in blocks.values()
            if not any(flag for _, flag in block)
            and (pictures_seen or not any(part in block[0][0].group for part in PICTURE_GROUPS))
        ]
        if silent:
            groups = sorted({block[0].group for block in silent})
            names = [watched.name for block in silent for watched in block]
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise CensusError(
                f"group {', '.join(groups)}: should train, but the first step gave no gradient to {len(silent)} of its "
                "parts "
                f"({', '.join(names[:5])}{more}); nothing was saved. Check the freezing settings of this row"
            )

    def result(self) -> dict[str, object]:
        """Content of census.json."""
        return {"label": self.label, "groups": {name: asdict(group) for name, group in self.groups.items()}}


def census_label(settings: FinetuneSettings) -> str:
    """Name of the method. Mentions the recipe's legacy freezing wherever it is used."""
    method, freezing = settings.method, settings.freeze_vision_model
    words = {"full": "full", "frozen": "vision frozen", "lora": "LoRA", "qlora": "QLoRA"}[method]
    words = words.replace("LoRA", "DoRA") if settings.use_dora else words
    if freezing == "legacy":
        return "vision frozen, legacy (text embedding frozen too)"
    if freezing == "tower":
        words += ", CLIP frozen"
    elif method in ("lora", "qlora") and freezing != "no":
        words += ", vision frozen"
    return f"{words}, decoder frozen" if settings.freeze_decoder else words


class LossGuard:
    """Checks the loss of one process. scale: returns the current float16 loss scale, or None without one."""

    def __init__(self, folder: Path, process: int, max_nan_steps: int, scale: Callable[[], float | None]) -> None:
        self.folder, self.process, self.max_nan_steps, self.scale = folder, process, max_nan_steps, scale
        self._has_collapsed = False
        self._bad_ids: list[list[str]] = []

    def check(self, step: int, loss: float, ids: list[str]) -> None:
        """Checks the loss of a step. ids: its examples. Raises NotANumberError after `max_nan_steps` bad steps in a
        row."""
        scale = self.scale()
        if scale is not None and scale < 1 and not self._has_collapsed:
            self._has_collapsed = True
            say(
                f"step {step}: warning: the float16 loss scale has dropped to {scale:g}. Gradients overflow at every "
                "scale; "
                "use --bf16"
            )
        if math.isfinite(loss):
            self._bad_ids = []
            return
        self._bad_ids.append(ids)
        bad = len(self._bad_ids)
        if bad < self.max_nan_steps:
            return
        path = self.folder / f"bad_examples.rank{self.process}.json"
        write_json(path, {"step": step, "ids": self._bad_ids})
        raise NotANumberError(
            f"step {step}: the loss was NaN or infinite in {bad} steps in a row; {path} lists the examples of these "
            "steps. Try a lower --learning_rate, --bf16 instead of --fp16, or training without these examples"
        )
