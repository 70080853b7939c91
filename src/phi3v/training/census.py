"""Gradient census: which parameters should train, and which of them got a gradient in the first step.

Settings can claim to train what they do not (RECIPE: the published "vision frozen" rows); the census proves it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from phi3v.model.modeling import size_of

# Groups that only pictures reach.
PICTURE_GROUPS = ("clip", "projector", "separators")


class CensusError(RuntimeError):
    """A group that should train got no gradient."""


def census_group(name: str, parameter_group: Callable[[str], str]) -> str:
    """A parameter's group; adapters are told apart by what they sit on, e.g. `adapters (clip)`."""
    group = parameter_group(name)
    if group != "adapters":
        return group
    parts = name.removeprefix("base_model.model.").split(".")
    place = next((i for i, part in enumerate(parts) if part.startswith(("lora_", "modules_to_save"))), len(parts))
    return f"adapters ({parameter_group('.'.join([*parts[:place], 'weight']))})"


@dataclass
class Group:
    """Weights of a group, in elements."""

    parameters: int = 0
    trainable: int = 0
    with_gradient: int = 0
    expected: bool = False
    """Whether any of it should train."""


class Census:
    """Counts parameters by group, and after `watch` notes which get a gradient that is not all zero."""

    def __init__(self, model: nn.Module, parameter_group: Callable[[str], str], label: str) -> None:
        self.label = label
        self.groups: dict[str, Group] = {}
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._group_of: list[str] = []
        self._seen: list[torch.Tensor | None] = []
        self._handles: list[RemovableHandle] = []
        for name, parameter in model.named_parameters():
            # A 4-bit weight stores two values a byte.
            size = size_of(parameter)
            size *= 2 if type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8 else 1
            group = census_group(name, parameter_group)
            entry = self.groups.setdefault(group, Group())
            entry.parameters += size
            if not parameter.requires_grad:
                continue
            entry.trainable += size
            entry.expected = True
            self._watch(len(self._names), parameter)
            self._names.append(name)
            self._sizes.append(size)
            self._group_of.append(group)

    def _watch(self, number: int, parameter: nn.Parameter) -> None:
        self._seen.append(None)

        def note(gradient: torch.Tensor) -> None:
            seen = (gradient != 0).any()
            before = self._seen[number]
            self._seen[number] = seen if before is None else before | seen

        self._handles.append(parameter.register_hook(note))

    def finish(self, device: torch.device, pictures_seen: bool) -> None:
        """Fill in `with_gradient` over all processes and take the hooks off; a collective call.

        pictures_seen: whether any process had a picture in the step. Raises CensusError for a group, or a layer of it,
        that should train and got nothing.
        """
        for handle in self._handles:
            handle.remove()
        flags = torch.stack(
            [
                torch.zeros((), dtype=torch.bool, device=device) if seen is None else seen.to(device)
                for seen in self._seen
            ]
        ).to(torch.int32)
        if dist.is_initialized():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        for flag, size, group in zip(flags.tolist(), self._sizes, self._group_of, strict=True):
            self.groups[group].with_gradient += size * flag
        self._refuse_silence(flags.tolist(), pictures_seen)

    def _refuse_silence(self, flags: list[int], pictures_seen: bool) -> None:
        """Raises CensusError for a layer without any gradient: its group may still get one through a last norm."""
        blocks: dict[str, list[int]] = {}
        for number, name in enumerate(self._names):
            layer = re.search(r".*\.layers\.\d+(?=\.)", name)
            blocks.setdefault(layer.group() if layer else self._group_of[number], []).append(number)
        silent = [
            numbers
            for numbers in blocks.values()
            if not any(flags[number] for number in numbers)
            and (pictures_seen or not any(part in self._group_of[numbers[0]] for part in PICTURE_GROUPS))
        ]
        if silent:
            groups = sorted({self._group_of[numbers[0]] for numbers in silent})
            names = [self._names[number] for numbers in silent for number in numbers]
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise CensusError(
                f"group {', '.join(groups)}: should train, but the first step gave no gradient to any weight of "
                f"{len(silent)} of its parts ({', '.join(names[:5])}{more}); nothing was saved"
            )

    def result(self) -> dict[str, object]:
        """census.json."""
        return {"label": self.label, "groups": {name: asdict(group) for name, group in self.groups.items()}}


def census_label(method: str, freezing: str, use_dora: bool = False) -> str:
    """The method in words; the recipe's old freezing is named wherever it is used."""
    words = {"full": "full", "frozen": "vision frozen", "lora": "LoRA", "qlora": "QLoRA"}[method]
    words = words.replace("LoRA", "DoRA") if use_dora else words
    if freezing == "legacy":
        return "vision frozen, legacy (text embedding frozen too)"
    return f"{words}, vision frozen" if method in ("lora", "qlora") and freezing != "no" else words
