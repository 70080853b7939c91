"""A split's records, and the processor that encodes them or only counts their tokens. Imports no torch."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from phi3v.data.conversations import Conversation, DataError, Turn, parse_line
from phi3v.data.folder import LineIndex, Pictures, describe, split_file
from phi3v.planning.geometry import PictureTokens
from phi3v.settings import Dataset

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import ProcessorMixin


@dataclass(frozen=True)
class Tokens:
    """A tokenizer without its class in transformers."""

    backend_tokenizer: Tokenizer


@dataclass
class TokenCounter:
    """Counts tokens as the processor of a checkpoint does, without importing it, which takes 4 s."""

    tokenizer: Tokens
    image_processor: PictureTokens

    @classmethod
    def of(cls, folder: str | Path) -> TokenCounter:
        """Reads a checkpoint folder. Raises FileNotFoundError that names the missing file."""
        from tokenizers import Tokenizer

        tokenizer, pictures = Path(folder) / "tokenizer.json", Path(folder) / "preprocessor_config.json"
        for file in (tokenizer, pictures):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{folder}: contains no {file.name}; expected a checkpoint folder in the published layout"
                )
        values = json.loads(pictures.read_text(encoding="utf-8"))
        known = {field.name: values[field.name] for field in fields(PictureTokens) if field.name in values}
        return cls(Tokens(Tokenizer.from_file(str(tokenizer))), PictureTokens(**known))


class SplitRecords:
    """A split of a data folder as records, with the turns of each that train.

    dataset.json's `turns` selects the turns that train. all: every turn. draw: one turn per epoch, drawn from (seed,
    epoch, index). first: the first turn. Raises DataError for an empty split.
    """

    def __init__(
        self,
        data_dir: str | Path,
        split: str,
        processor: ProcessorMixin | TokenCounter,
        num_crops: int | None = None,
        turns: str | None = None,
    ) -> None:
        self.data_dir = Path(data_dir)
        self.description = describe(data_dir)
        self.lines = LineIndex(split_file(data_dir, split))
        if not len(self.lines):
            raise DataError(f"{self.lines.path}: empty; expected one JSON object per line")
        self.pictures = Pictures(data_dir)
        self.turns = turns or self.description.get("turns", "all")
        self.num_crops = num_crops or self.description.get("num_crops") or Dataset.model_fields["num_crops"].default
        # A copy, because another dataset may use the same processor with another num_crops.
        self.processor = copy.copy(processor)
        self.processor.image_processor = copy.copy(processor.image_processor)
        self.processor.image_processor.num_crops = self.num_crops

    def __len__(self) -> int:
        return len(self.lines)

    def conversation(self, index: int) -> Conversation:
        """The record of an example with all its turns. Raises DataError."""
        return parse_line(self.lines[index], f"{self.lines.path}:{index + 1}")

    def choices(self, conversation: Conversation) -> tuple[Turn, ...]:
        """The turns that can train. If one is drawn, each has all pictures and the first system message of the
        record."""
        if self.turns == "draw" and len(conversation.turns) > 1:
            system = conversation.turns[0].system
            return tuple(
                replace(turn, images=conversation.images, system=turn.system or system) for turn in conversation.turns
            )
        return conversation.turns[:1] if self.turns == "first" else conversation.turns
