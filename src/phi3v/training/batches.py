"""From picks to micro-batches: the dataset, collator and loader that a `BatchPlan` is read with.

Shapes: B = examples of a micro-batch, T = tokens of the longest of them (packed: of all together).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

import torch
from torch.utils.data import DataLoader, Dataset

from phi3v.data.dataset import ConversationDataset, Encoded, Example, collate
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.layout import DEVICE_FIELDS, BatchLayout, lay_out
from phi3v.planning.flops import Work, example_work
from phi3v.planning.geometry import geometry_from_config
from phi3v.training.launch import ignore_sigterm
from phi3v.training.plan import BatchPlan, Grouping, Pick, PlannedBatches

ALIGNMENT = 16
"""Bytes; a tensor may be viewed in a buffer if its offset is a multiple of its element size."""
PREFETCH = 4
"""Batches that each loader process holds ready, at most 24 MB each for a full-size page."""


@dataclass(frozen=True)
class BatchCounts:
    """What the examples of a micro-batch amount to, without fillers."""

    ids: tuple[str, ...] = ()
    images: int = 0
    tokens: int = 0
    """Without padding."""
    slots: int = 0
    """Tokens with padding, fillers included."""
    work: Work = field(default_factory=Work)
    """What FLOP are counted from."""


@dataclass(frozen=True)
class TensorBundle:
    """Tensors side by side in one buffer, which reaches a device in one copy."""

    buffer: torch.Tensor
    """uint8."""
    places: dict[str, tuple[torch.dtype, torch.Size, int]]
    """Type, shape and first byte of each tensor."""

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor | None]) -> TensorBundle:
        """Copies of `tensors` (None is left out), which are on the CPU."""
        places, end = {}, 0
        present = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        for name, tensor in present.items():
            places[name] = (tensor.dtype, tensor.shape, end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        buffer = torch.zeros(end, dtype=torch.uint8)
        for name, tensor in present.items():
            begin = places[name][2]
            buffer[begin : begin + tensor.nbytes] = tensor.view(-1).view(torch.uint8)
        return cls(buffer, places)

    def pin_memory(self) -> TensorBundle:
        """In page-locked memory, for the loader's pinning thread: the copy to a GPU then runs beside the host."""
        return replace(self, buffer=self.buffer.pin_memory())

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors on a device, views of one buffer."""
        buffer = self.buffer.to(device, non_blocking=True)
        found = {}
        for name, (dtype, shape, begin) in self.places.items():
            found[name] = buffer[begin : begin + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        return found


class ModelInputs(TypedDict):
    """The model's arguments, on its device."""

    input_ids: torch.Tensor
    """[B, T]"""
    pixel_values: torch.Tensor | None
    layout: BatchLayout


@dataclass(frozen=True)
class ModelBatch:
    """A collated batch on its way to the model; the layout's device fields are in the bundle."""

    tensors: TensorBundle
    layout: BatchLayout

    @classmethod
    def of(cls, config: Phi3VConfig, batch: Mapping[str, torch.Tensor]) -> ModelBatch:
        """A batch of phi3v.data.dataset.collate or `pack`."""
        layout = lay_out(
            config,
            batch["input_ids"],
            batch.get("attention_mask"),
            batch.get("position_ids"),
            batch.get("image_sizes"),
            batch["labels"],
            batch["loss_weights"],
        )
        fields = {name: getattr(layout, name) for name in DEVICE_FIELDS}
        tensors = {"input_ids": batch["input_ids"], "pixel_values": batch.get("pixel_values"), **fields}
        bundle = TensorBundle.of(tensors | {"cu_seqlens": layout.plan.cu_seqlens})
        return cls(bundle, BatchLayout(plan=layout.plan, image_sizes=layout.image_sizes))

    def pin_memory(self) -> ModelBatch:
        """In page-locked memory, see TensorBundle."""
        return replace(self, tensors=self.tensors.pin_memory())

    def on(self, device: torch.device) -> ModelInputs:
        """The model's arguments on a device, after one copy."""
        tensors = self.tensors.on(device)
        plan = replace(self.layout.plan, cu_seqlens=tensors.get("cu_seqlens"))
        fields = {name: tensors.get(name) for name in DEVICE_FIELDS}
        layout = BatchLayout(plan=plan, image_sizes=self.layout.image_sizes, **fields)
        return {"input_ids": tensors["input_ids"], "pixel_values": tensors.get("pixel_values"), "layout": layout}


@dataclass(frozen=True)
class MicroBatch:
    """What a process computes at once."""

    inputs: ModelBatch
    examples_in_step: int
    """Examples of the whole optimizer step, over all processes: what the loss is divided by."""
    counts: BatchCounts

    def pin_memory(self) -> MicroBatch:
        """In page-locked memory, see TensorBundle."""
        return replace(self, inputs=self.inputs.pin_memory())


def tiles_of(example: Encoded) -> int:
    """Tiles that the vision tower runs on for an example; byte tiles come without their global views."""
    pixels = example["pixel_values"]
    return len(pixels) + (len(example["image_sizes"]) if pixels.dtype == torch.uint8 else 0)


class PickedExamples(Dataset[tuple[Example, Pick]]):
    """The data room's dataset, indexed by `Pick`; `kept` maps picks to its examples where some are left out."""

    def __init__(self, dataset: ConversationDataset, kept: Sequence[int] | None = None) -> None:
        self.dataset, self.kept = dataset, kept

    def __len__(self) -> int:
        return len(self.dataset) if self.kept is None else len(self.kept)

    def __getitem__(self, pick: Pick) -> tuple[Example, Pick]:
        return self.example(pick.index), pick

    def example(self, index: int) -> Example:
        """An example by its number among those that are kept."""
        return self.dataset[index if self.kept is None else self.kept[index]]

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on: one turn of a record may be drawn by it."""
        self.dataset.set_epoch(epoch)


class Collator:
    """Examples and their picks as a `MicroBatch`."""

    def __init__(self, pad_token_id: int, grouping: Grouping, config: Phi3VConfig) -> None:
        self.pad_token_id, self.grouping, self.config = pad_token_id, grouping, config
        self.geometry = geometry_from_config(config.to_dict())

    def __call__(self, picked: list[tuple[Example, Pick]]) -> MicroBatch:
        examples, picks = [example for example, _ in picked], [pick for _, pick in picked]
        counted = [example for example, pick in picked if pick.counted]
        batch = pack(examples) if self.grouping == "packed" else collate(examples, self.pad_token_id)
        if len(counted) < len(examples):  # a filler is a micro-batch of its own, see BatchPlan.epoch
            batch["loss_weights"] = torch.zeros_like(batch["loss_weights"])
        counts = BatchCounts(
            ids=tuple(str(example["id"]) for example in counted),
            images=sum(len(example["image_sizes"]) for example in counted),
            tokens=sum(len(example["input_ids"]) for example in counted),
            slots=batch["input_ids"].numel(),
            work=sum((self._work(example) for example in counted), Work()),
        )
        return MicroBatch(ModelBatch.of(self.config, batch), picks[0].in_step, counts)

    def _work(self, example: Example) -> Work:
        """What the planner counts a step's FLOP from."""
        labels = int((example["labels"] != -100).sum())
        return example_work(self.geometry, len(example["input_ids"]), tiles_of(example), labels)


def pack(examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
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


@dataclass(frozen=True)
class PlannedSplit:
    """A split with the plan it is read by."""

    plan: BatchPlan
    examples: PickedExamples
    collate: Collator
    workers: int
    """Loader processes of each training process."""
    cuda: bool

    def loader(self, process: int, persistent: bool = False) -> DataLoader[tuple[Example, Pick]]:
        """The planned micro-batches of a process; persistent: loader processes outlive an epoch.

        The loader has a random generator of its own. Otherwise each new iterator would draw from the global one, and a
        resumed job would see other dropout masks than one that ran through.
        """
        some = self.workers > 0
        return DataLoader(
            self.examples,
            batch_sampler=PlannedBatches(self.plan, process),
            collate_fn=self.collate,
            num_workers=self.workers,
            pin_memory=self.cuda,
            multiprocessing_context="fork" if some else None,
            worker_init_fn=ignore_sigterm if some else None,
            prefetch_factor=PREFETCH if some else None,
            persistent_workers=persistent and some,
            generator=torch.Generator(),
        )

    def set_epoch(self, loader: DataLoader[tuple[Example, Pick]], epoch: int, first_step: int = 0) -> None:
        """Choose the epoch of the next pass over `loader`, and the optimizer step that it starts with."""
        assert isinstance(loader.batch_sampler, PlannedBatches)
        loader.batch_sampler.set_epoch(epoch, first_step)
        self.examples.set_epoch(epoch)
