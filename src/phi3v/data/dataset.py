"""Loads a data folder: any example by its number, as model inputs.

The JSONL file stays on disk. Only an index of byte offsets (8 bytes per line) is in memory, so a million examples load
within seconds.

    T = tokens of an example, B = examples of a batch, S = side of a tile in pixels
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from phi3v.data.conversations import Conversation, DataError, Turn, answer_text, prompt_text
from phi3v.data.split import SplitRecords

if TYPE_CHECKING:
    from PIL import Image
    from transformers import ProcessorMixin


class Encoded(TypedDict):
    """An example as model inputs. pixel_values are float32, or uint8 that the model normalises."""

    input_ids: torch.Tensor
    """[T]"""
    labels: torch.Tensor
    """[T], -100 except on answers"""
    pixel_values: torch.Tensor
    """[tiles, 3, S, S]. A text-only example has no tiles."""
    image_sizes: torch.Tensor
    """[images, 2]"""


class Example(Encoded):
    """Model inputs of an example, with its id."""

    id: str


class ConversationDataset(SplitRecords, Dataset[Example]):
    """A split of a data folder as training examples.

    Call `set_epoch` before each epoch, which draws other turns if `turns` is draw.
    """

    processor: ProcessorMixin

    def __init__(
        self,
        data_dir: str | Path,
        split: str,
        processor: ProcessorMixin,
        num_crops: int | None = None,
        seed: int = 42,
        as_uint8: bool = False,
        turns: str | None = None,
    ) -> None:
        super().__init__(data_dir, split, processor, num_crops, turns)
        self.seed, self.as_uint8 = seed, as_uint8
        # Shared with loader processes that outlive an epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose turns are drawn, also in loader processes."""
        self._epoch[0] = epoch

    @property
    def epoch(self) -> int:
        """Epoch whose turns are drawn."""
        return int(self._epoch[0])

    def selected(self, index: int) -> Conversation:
        """The record, with the turns that train in this epoch."""
        conversation = self.conversation(index)
        turns = self.choices(conversation)
        if self.turns == "draw" and len(turns) > 1:
            turns = (turns[random.Random(f"turn/{self.seed}/{self.epoch}/{index}").randrange(len(turns))],)
        return replace(conversation, turns=turns)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example: got {index}; expected 0 … {len(self) - 1}")
        conversation = self.selected(index)
        where = f"{self.lines.path}:{index + 1}"
        pictures = [[self.pictures.open(path, where) for path in turn.images] for turn in conversation.turns]
        try:
            return {"id": conversation.id, **encode(self.processor, conversation.turns, pictures, self.as_uint8)}
        except ValueError as error:
            raise DataError(f"{where}: example {conversation.id!r}: {error}") from error


def encode(
    processor: ProcessorMixin,
    turns: Sequence[Turn],
    pictures: Sequence[Sequence[Image.Image]],
    as_uint8: bool = False,
) -> Encoded:
    """Encodes turns and their decoded pictures as model inputs.

    The processor encodes the prompt of each turn as in the model's training, with a beginning-of-sequence token before
    the text and after every picture. Later turns have none at their start. Labels are the answers with their end marks.
    """
    tokenizer = processor.tokenizer
    ids: list[int] = []
    labels: list[int] = []
    tiles: list[torch.Tensor] = []
    sizes: list[torch.Tensor] = []
    extra = {"as_uint8": True} if as_uint8 else {}
    for position, (turn, own) in enumerate(zip(turns, pictures, strict=True)):
        # The processor numbers pictures from 1 in each call. The number does not affect the ids.
        inputs = processor(prompt_text(turn), images=list(own) or None, return_tensors=None, **extra)
        prompt = inputs["input_ids"][0]
        if position and prompt and prompt[0] == tokenizer.bos_token_id:
            prompt = prompt[1:]
        answer = processor.text_ids(answer_text(turn), add_special_tokens=False)
        ids += prompt + answer
        labels += [-100] * len(prompt) + answer
        if own:
            tiles.append(inputs["pixel_values"])
            sizes.append(inputs["image_sizes"])
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int64),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "pixel_values": torch.cat(tiles) if tiles else torch.empty(0, 3, 0, 0),
        "image_sizes": torch.cat(sizes) if sizes else torch.empty(0, 2, dtype=torch.int64),
    }


def collate(examples: Sequence[Encoded], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch for the model, padded on the right.

    input_ids, attention_mask, labels [B, T]. loss_weights [B, T] float: 1 / (label tokens of the example) at label
    positions, 0 elsewhere, so that every example has the same weight regardless of the length of its answer.
    pixel_values [tiles of all examples, 3, S, S] and image_sizes [images of all examples, 2], in the order of the
    examples. Both are absent if there are no pictures.
    """
    pad = partial(pad_sequence, batch_first=True)
    answers = [example["labels"] != -100 for example in examples]
    batch = {
        "input_ids": pad([example["input_ids"] for example in examples], padding_value=pad_token_id),
        "attention_mask": pad([torch.ones_like(example["input_ids"]) for example in examples]),
        "labels": pad([example["labels"] for example in examples], padding_value=-100),
        "loss_weights": pad([answer / answer.sum().clamp(min=1) for answer in answers]),
    }
    pictured = [example for example in examples if len(example["image_sizes"])]
    if pictured:
        batch["pixel_values"] = torch.cat([example["pixel_values"] for example in pictured])
        batch["image_sizes"] = torch.cat([example["image_sizes"] for example in pictured])
    return batch
