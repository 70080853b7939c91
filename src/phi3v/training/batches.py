"""Assigns examples to micro-batches and processes, and reads and collates them.

A plan depends only on seed, epoch and step. The examples of an optimizer step are fixed by (seed, epoch), regardless of
the number of processes and the grouping. Within a step they are spread over W processes x M micro-batches. Every
process runs the same number of micro-steps. If there are too few examples in the last step of an epoch, a process
computes a filler whose loss has weight 0.

    B = examples of a step, W = processes, M = micro-batches of a process in a step, m = examples of a micro-batch,
    T = tokens of the longest example of a micro-batch (packed: the sum over its examples)
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypedDict

import torch
from torch.utils.data import DataLoader, Dataset

from phi3v.data.dataset import ConversationDataset, Encoded, Example, collate
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.layout import DEVICE_FIELDS, BatchLayout, lay_out
from phi3v.planning.flops import Work, example_work
from phi3v.planning.geometry import geometry_from_config
from phi3v.settings import Geometry
from phi3v.training.launch import ignore_sigterm

ALIGNMENT = 16
"""Alignment in bytes. A tensor can be a view of a buffer if its offset is a multiple of its element size."""
PREFETCH = 4
"""Batches that each loader process prefetches, at most 24 MB each for a full-size page."""
Grouping = Literal["fixed", "length", "packed"]


class Pick(NamedTuple):
    """One example of a micro-batch."""

    index: int  # type: ignore[assignment]  # tuple.index is never used
    """Position in the dataset."""
    counted: bool
    """False for a filler, whose loss has weight 0."""
    in_step: int
    """Examples of the whole optimizer step, over all processes: what the loss is divided by."""
    ends_step: bool
    """Whether it is in the process's last micro-batch of the optimizer step."""


@dataclass(frozen=True)
class BatchPlan:
    """The micro-batches of every epoch."""

    examples: int
    """Size of the training split."""
    batch_size: int
    """B."""
    micro_batch_size: int
    """m; with `packed` micro-batches are bounded by tokens instead."""
    processes: int
    """W."""
    seed: int
    """Seed of the order."""
    grouping: Grouping = "fixed"
    """fixed: in order. length: similar lengths share a micro-batch. packed: several examples per sequence, up to
    max_tokens."""
    lengths: Sequence[int] = ()
    """Tokens of each example. Required for length, packed and max_tokens."""
    max_tokens: int | None = None
    """Most tokens of a micro-batch, padding included. M grows accordingly. A longer example forms its own
    micro-batch."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last may be smaller."""
        return math.ceil(self.examples / self.batch_size)

    @property
    def accumulation(self) -> int:
        """M of a whole step, with `packed` at most."""
        return self.micro_steps(min(self.batch_size, self.examples))

    def micro_steps(self, examples: int) -> int:
        """M of a step of so many examples, as far as their number decides it."""
        return math.ceil(examples / self.processes / (1 if self.grouping == "packed" else self.micro_batch_size))

    def epochs_at(self, step: int) -> float:
        """Epochs, counted in micro-steps, after `step` optimizer steps: 2.5."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        whole = self.steps_per_epoch - 1
        last = self.micro_steps(self.examples - whole * self.batch_size)
        return epochs + steps * self.accumulation / (self.accumulation * whole + last)

    def order(self, epoch: int) -> list[int]:
        """The examples of an epoch, in order: by seed and epoch alone."""
        order = list(range(self.examples))
        random.Random(f"order/{self.seed}/{epoch}").shuffle(order)
        return order

    def epoch(self, epoch: int, rank: int, first_step: int = 0) -> Iterator[list[Pick]]:
        """The micro-batches of process `rank`, in order; `first_step` leaves out the steps before it."""
        order = self.order(epoch)
        for step in range(first_step, self.steps_per_epoch):
            members = order[step * self.batch_size : (step + 1) * self.batch_size]
            spread, filler = self.spread(members), members[0]
            if self.max_tokens is not None:
                filler = min(members, key=lambda index: self.lengths[index])
            micro_steps = max(map(len, spread))
            for number in range(micro_steps):
                indices = spread[rank][number] if number < len(spread[rank]) else []
                ends = number == micro_steps - 1
                yield [Pick(index, bool(indices), len(members), ends) for index in indices or [filler]]

    def split(self, indices: Sequence[int]) -> list[list[int]]:
        """Examples of a micro-batch as several of at most `max_tokens`, in order; a longer example is one by itself."""
        parts: list[list[int]] = [[]]
        for index in indices:
            longest = max(self.lengths[other] for other in [*parts[-1], index])
            if parts[-1] and self.max_tokens is not None and longest * (len(parts[-1]) + 1) > self.max_tokens:
                parts.append([])
            parts[-1].append(index)
        return parts

    def spread(self, members: Sequence[int]) -> list[list[list[int]]]:
        """The micro-batches of each process, as dataset indices: `members` each once; some lists may be empty."""
        micro_steps = self.micro_steps(len(members))
        if self.grouping == "packed":
            for count in range(self._least_packs(members), micro_steps + 1):
                packs = self._packed(members, self.processes * count)
                if self._keeps_to_tokens(packs):
                    break
            return [packs[rank :: self.processes] for rank in range(self.processes)]
        if self.grouping == "length":
            # Neighbours in length run at the same micro-step, so padding is short and so is waiting for others.
            members = sorted(members, key=lambda index: (-self.lengths[index], index))
        slots: list[list[list[int]]] = [[[] for _ in range(micro_steps)] for _ in range(self.processes)]
        for position, index in enumerate(members):
            if self.grouping == "length":
                micro, rank = divmod(position // self.micro_batch_size, self.processes)
            else:
                # In order, process by process within a micro-step, one example each until all have m.
                micro, place = divmod(position, self.processes * self.micro_batch_size)
                rank = place % self.processes
            slots[rank][micro].append(index)
        if self.max_tokens is None:
            return slots
        return [[part for indices in own for part in self.split(indices) if part] for own in slots]

    def _least_packs(self, members: Sequence[int]) -> int:
        """Packs of a process that no division can do without: by tokens, and because two of over half never share
        one."""
        assert self.max_tokens is not None
        tokens = sum(min(self.lengths[index], self.max_tokens) for index in members)
        large = sum(2 * self.lengths[index] > self.max_tokens for index in members)
        return math.ceil(max(tokens / self.max_tokens, large) / self.processes)

    def _packed(self, members: Sequence[int], bins: int) -> list[list[int]]:
        """Longest first into the emptiest of `bins`: within 4/3 of the best largest bin (Graham 1969); fullest
        first."""
        packs: list[list[int]] = [[] for _ in range(bins)]
        emptiest = [(0, number) for number in range(bins)]
        for index in sorted(members, key=lambda index: (-self.lengths[index], index)):
            filled, place = emptiest[0]
            packs[place].append(index)
            heapq.heapreplace(emptiest, (filled + self.lengths[index], place))
        return sorted(packs, key=lambda pack: -sum(self.lengths[index] for index in pack))

    def _keeps_to_tokens(self, packs: list[list[int]]) -> bool:
        """Whether no pack of several examples has more than `max_tokens`."""
        assert self.max_tokens is not None
        return all(len(pack) <= 1 or sum(self.lengths[index] for index in pack) <= self.max_tokens for pack in packs)


# From a plan to tensors ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchCounts:
    """What the examples of a micro-batch amount to, without fillers."""

    ids: tuple[str, ...]
    images: int
    slots: int
    """Tokens with padding, fillers included."""
    work: Work
    """Examples, tokens without padding, and what else FLOP are counted from."""
    longest: tuple[int, int] = (0, 0)
    """(tokens, position in the dataset) of the longest example, fillers included."""


@dataclass(frozen=True)
class TensorBundle:
    """Tensors in one buffer, which is copied to a device in one transfer."""

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
    ends_step: bool
    """Whether it is this process's last of the optimizer step."""
    counts: BatchCounts

    def pin_memory(self) -> MicroBatch:
        """In page-locked memory, for the loader's pinning thread: the copy to a GPU then runs beside the host."""
        tensors = self.inputs.tensors
        pinned = replace(tensors, buffer=tensors.buffer.pin_memory())
        return replace(self, inputs=replace(self.inputs, tensors=pinned))


def tiles_of(example: Encoded) -> int:
    """Tiles that the vision tower runs on for an example; byte tiles come without their global views."""
    pixels = example["pixel_values"]
    return len(pixels) + (len(example["image_sizes"]) if pixels.dtype == torch.uint8 else 0)


def work_of(geometry: Geometry, example: Encoded) -> Work:
    """What the planner counts an example's FLOP and memory from."""
    return example_work(geometry, len(example["input_ids"]), tiles_of(example), int((example["labels"] != -100).sum()))


class PickedExamples(Dataset[tuple[Example, Pick]]):
    """A ConversationDataset, indexed by `Pick`.

    kept: its examples that are used, in order; None: all. lengths: their tokens; the validation split has none.
    """

    def __init__(
        self, dataset: ConversationDataset, kept: Sequence[int] | None = None, lengths: Sequence[int] = ()
    ) -> None:
        self.dataset, self.kept, self.lengths = dataset, kept, lengths

    def __len__(self) -> int:
        return len(self.dataset) if self.kept is None else len(self.kept)

    def __getitem__(self, pick: Pick) -> tuple[Example, Pick]:
        return self.example(pick.index), pick

    def example(self, index: int) -> Example:
        """An example by its number among those that are kept."""
        return self.dataset[self.row(index)]

    def row(self, index: int) -> int:
        """The number of a kept example in the dataset."""
        return index if self.kept is None else self.kept[index]

    def where(self, index: int) -> str:
        """File and line of a kept example, and its id: for messages."""
        row = self.row(index)
        return f"{self.dataset.lines.path}:{row + 1}: example {self.dataset.conversation(row).id!r}"


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
            slots=batch["input_ids"].numel(),
            work=sum((work_of(self.geometry, example) for example in counted), Work()),
            longest=max((len(example["input_ids"]), pick.index) for example, pick in picked),
        )
        return MicroBatch(ModelBatch.of(self.config, batch), picks[0].in_step, picks[0].ends_step, counts)


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


class PlannedBatches:
    """Batch sampler of one process: yields lists of `Pick`, of `epoch` from `first_step` on."""

    def __init__(self, plan: BatchPlan, rank: int) -> None:
        self.plan, self.rank, self.epoch, self.first_step = plan, rank, 0, 0

    def __iter__(self) -> Iterator[list[Pick]]:
        return self.plan.epoch(self.epoch, self.rank, self.first_step)


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

        The loader has its own random generator. Otherwise, each new iterator would draw from the global one, and a
        resumed job would get other dropout masks than an uninterrupted one.
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
        loader.batch_sampler.epoch, loader.batch_sampler.first_step = epoch, first_step
        self.examples.dataset.set_epoch(epoch)  # one turn of a record may be drawn by it
