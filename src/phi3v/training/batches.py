"""From picks to tensors: the dataset and collator that a `BatchPlan` is read with.

Shapes: B = examples of a micro-batch, T = tokens of the longest of them (packed: of all together).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from phi3v.planning.flops import Work, example_work
from phi3v.settings import Geometry
from phi3v.training.batching import Grouping, Pick

# Keys of a batch that are for the trainer, not for the model.
TRAINER_KEYS = ("examples_in_step", "ids", "token_count", "slot_count", "image_count", "example_count", "work")


class PickedExamples(Dataset):
    """The data room's dataset, indexed by `Pick`; `kept` maps picks to its examples where some are left out."""

    def __init__(self, dataset: Any, kept: Sequence[int] | None = None) -> None:
        self.dataset, self.kept = dataset, kept

    def __len__(self) -> int:
        return len(self.dataset) if self.kept is None else len(self.kept)

    def __getitem__(self, pick: Pick) -> tuple[dict[str, Any], Pick]:
        return self.example(pick.index), pick

    def example(self, index: int) -> dict[str, Any]:
        """An example by its number among those that are kept."""
        return self.dataset[index if self.kept is None else self.kept[index]]

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on: one turn of a record may be drawn by it."""
        self.dataset.set_epoch(epoch)


class Collator:
    """A micro-batch for the model, with the counts that the trainer's loss and meter need."""

    def __init__(
        self, collate: Callable[..., dict[str, Any]], pad_token_id: int, grouping: Grouping, geometry: Geometry
    ) -> None:
        self.collate, self.pad_token_id, self.grouping, self.geometry = collate, pad_token_id, grouping, geometry

    def __call__(self, picked: list[tuple[dict[str, Any], Pick]]) -> dict[str, Any]:
        examples, picks = [example for example, _ in picked], [pick for _, pick in picked]
        counted = [example for example, pick in picked if pick.counted]
        batch = pack(examples) if self.grouping == "packed" else self.collate(examples, self.pad_token_id)
        if len(counted) < len(examples):  # a filler is a micro-batch of its own, see BatchPlan.epoch
            batch["loss_weights"] = torch.zeros_like(batch["loss_weights"])
        batch = {key: value for key, value in batch.items() if key not in ("id", "ids")}
        return batch | {
            "examples_in_step": picks[0].in_step,
            "ids": [str(example["id"]) for example in counted],
            "example_count": len(counted),
            "work": sum((self._work(example) for example in counted), Work()),
            "token_count": sum(len(example["input_ids"]) for example in counted),
            "slot_count": batch["input_ids"].numel(),
            "image_count": sum(
                len(example["image_sizes"]) for example in counted if example.get("image_sizes") is not None
            ),
        }

    def _work(self, example: dict[str, Any]) -> Work:
        """What the planner counts a step's FLOP from."""
        labels = int((example["labels"] != -100).sum())
        return example_work(self.geometry, len(example["input_ids"]), len(example["pixel_values"]), labels)


def pack(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Several examples in one sequence: input_ids, labels, position_ids (from 0 for each), loss_weights, all [1, T].

    There is no attention mask: the restart of the positions is what keeps the examples apart.
    """
    weights = []
    for example in examples:
        is_label = example["labels"] != -100
        weights.append(is_label / is_label.sum().clamp(min=1))
    batch = {
        "input_ids": torch.cat([example["input_ids"] for example in examples])[None],
        "labels": torch.cat([example["labels"] for example in examples])[None],
        "position_ids": torch.cat([torch.arange(len(example["input_ids"])) for example in examples])[None],
        "loss_weights": torch.cat(weights)[None],
    }
    for key in ("pixel_values", "image_sizes"):
        values = [example[key] for example in examples if example.get(key) is not None and len(example[key])]
        if values:
            batch[key] = torch.cat(values)
    return batch
