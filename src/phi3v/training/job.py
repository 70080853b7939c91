"""From settings to a loop that is ready to run: what fine-tuning and the speed measurement share."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from phi3v.data.dataset import ConversationDataset, collate
from phi3v.data.lengths import lengths
from phi3v.data.processes import loader_workers
from phi3v.model import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor
from phi3v.model.adapters import add_lora, load_quantized
from phi3v.model.compat import widen_float16_products
from phi3v.model.modeling import freeze_vision
from phi3v.model.runtime import TORCH_DTYPE, attention_implementation, compute_device, uses_zero, weight_dtype
from phi3v.planning.fits import interval_of
from phi3v.settings import FinetuneSettings, SettingsError
from phi3v.training import micro_batch
from phi3v.training.batches import Collator, ModelBatch, PickedExamples, PlannedSplit
from phi3v.training.guard import LossGuard
from phi3v.training.launch import join_processes, prepare_process
from phi3v.training.logging import check_trackers
from phi3v.training.loop import Loop
from phi3v.training.memory import explain_memory
from phi3v.training.optimizers import build_optimizer, linear_schedule
from phi3v.training.parallel import loss_scale, make_accelerator
from phi3v.training.plan import BatchPlan, packs_needed
from phi3v.training.writer import CheckpointWriter


@dataclass
class Job:
    """A training loop and what it was built from."""

    settings: FinetuneSettings
    """What runs: a micro-batch of `auto` is a number here."""
    asked: FinetuneSettings
    """What was asked for; checkpoints belong to it."""
    loop: Loop
    model: Any
    processor: Phi3VProcessor
    data_dir: Path
    num_crops: int
    left_out: int
    """Training examples longer than --max_length."""

    @property
    def is_main(self) -> bool:
        """Whether this is the first process of the job."""
        return self.loop.accelerator.is_main_process

    @property
    def processes(self) -> int:
        """Processes of the job."""
        return self.loop.accelerator.num_processes

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.loop.device


@dataclass(frozen=True)
class TrainingData:
    """The training split as it is read."""

    examples: PickedExamples
    lengths: list[int] | None
    """Tokens of each example, if they are needed."""
    folder: Path
    num_crops: int
    left_out: int


def world_size() -> int:
    """Processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_settings(settings: FinetuneSettings, device: torch.device) -> None:
    """Raises SettingsError if a folder, the batch's division, `auto` or a tracker cannot work."""
    check_geometry(settings, world_size())
    check_automatic(settings, world_size(), device)
    check_trackers(settings.report_to)
    settings.data_folder()
    if not (Path(settings.model_name_or_path) / "config.json").is_file():
        raise SettingsError(
            f"command line: field `model_name_or_path`: got {settings.model_name_or_path!r}: no config.json there; "
            "expected a checkpoint folder in the official layout"
        )


def check_geometry(settings: FinetuneSettings, processes: int) -> None:
    """Raises SettingsError if the batch does not divide by the processes and their micro-batches."""
    share = processes * settings.known_micro_batch
    if settings.batching == "packed":
        if settings.batch_size % processes:
            raise SettingsError(
                f"command line: field `batch_size`: got {settings.batch_size}: expected a multiple of the "
                f"{processes} processes"
            )
    elif settings.batch_size % share:
        each = "" if settings.micro_batch_size == "auto" else f" x --batch_size_per_gpu {settings.micro_batch_size}"
        raise SettingsError(
            f"command line: field `batch_size`: got {settings.batch_size}: expected a multiple of {share} "
            f"({processes} processes{each})"
        )


def check_automatic(settings: FinetuneSettings, processes: int, device: torch.device) -> None:
    """Raises SettingsError if `auto` would search with a memory plan that is not the job's: it counts shards of ZeRO 2."""
    automatic = "auto" in (settings.micro_batch_size, settings.gradient_checkpointing)
    whole = settings.method in ("full", "frozen") and settings.zero_stage < 2 and settings.optimizer == "adamw"
    if automatic and whole and processes > 1 and device.type == "cuda":
        raise SettingsError(
            f"command line: field `zero_stage`: got {settings.zero_stage} with auto on {processes} GPUs, whose optimizer "
            "states auto takes for shards of ZeRO 2; expected --zero_stage 2, or a number for --batch_size_per_gpu and "
            "yes or no for gradient checkpointing"
        )


def load_model(settings: FinetuneSettings, device: torch.device) -> Any:
    """The model with its trainable weights chosen: all, without the vision part, or adapters."""
    widen_float16_products(device, TORCH_DTYPE[settings.dtype])
    attention, dtype = attention_implementation(settings, device), weight_dtype(settings)
    if settings.use_qlora:
        model = load_quantized(settings.model_name_or_path, dtype, attention, device=device)
    else:
        model = Phi3VForCausalLM.from_pretrained(
            settings.model_name_or_path, dtype=dtype, attn_implementation=attention
        )
    model.config.use_cache = False
    if settings.recompute is not None:
        micro_batch.recompute_layers(model, interval_of(settings.recompute))
    if settings.method in ("lora", "qlora"):
        return add_lora(
            model,
            settings.lora_rank,
            settings.lora_alpha_ratio * settings.lora_rank,
            settings.lora_dropout,
            freeze_vision=settings.freeze_vision_model != "no",
            use_dora=settings.use_dora,
            seed=settings.seed,
        )
    if settings.freeze_vision_model != "no":
        freeze_vision(model, settings.freeze_vision_model)
    return model


def read_data(
    settings: FinetuneSettings, processor: Phi3VProcessor, split: str
) -> tuple[ConversationDataset, Path, int]:
    """The split's dataset, its folder, and the number of tiles an image may have."""
    folder = settings.data_folder()
    dataset = ConversationDataset(folder, split, processor, settings.num_crops, settings.seed, as_uint8=True)
    return dataset, folder, dataset.num_crops


def read_training_data(settings: FinetuneSettings, processor: Phi3VProcessor) -> TrainingData:
    """The training split without its longer examples. Raises SettingsError if none is left."""
    dataset, folder, num_crops = read_data(settings, processor, "train")
    kept, lengths = _lengths(settings, dataset)
    examples = PickedExamples(dataset, kept)
    if not len(examples):
        raise SettingsError(f"{folder}: split train: no examples to train on; expected at least one")
    return TrainingData(examples, lengths, folder, num_crops, len(dataset) - len(examples))


def plan_of(settings: FinetuneSettings, data: TrainingData, processes: int) -> BatchPlan:
    """The micro-batches of every epoch."""
    plan = BatchPlan(
        examples=len(data.examples),
        batch_size=settings.batch_size,
        micro_batch_size=settings.known_micro_batch,
        processes=processes,
        seed=settings.seed,
        grouping=settings.batching,
        lengths=data.lengths,
        token_budget=settings.tokens_per_pack,
    )
    return replace(plan, packs=packs_needed(plan, _epochs(settings, plan))) if settings.batching == "packed" else plan


def validation_of(
    settings: FinetuneSettings, processor: Phi3VProcessor, config: Phi3VConfig, split: PlannedSplit
) -> PlannedSplit | None:
    """The validation split, read like the training `split`; None without --eval_steps."""
    if not settings.eval_steps:
        return None
    dataset = read_data(settings, processor, "val")[0]
    count = min(settings.eval_examples or len(dataset), len(dataset))
    plan = BatchPlan(count, count, settings.known_micro_batch, split.plan.processes, seed=0)
    collator = Collator(processor.tokenizer.pad_token_id, "fixed", config)
    return replace(split, plan=plan, examples=PickedExamples(dataset), collate=collator)


def choose_way(settings: FinetuneSettings, output: Path, data: TrainingData, pad: int, device: torch.device) -> Any:
    """(settings with numbers in place of `auto`, the model they were found with); a collective call."""
    assert data.lengths is not None
    model = load_model(settings, device)
    config = model.config
    way = micro_batch.choose(
        settings,
        output,
        model,
        data.examples.example,
        lambda batch: ModelBatch.of(config, collate(batch, pad)),
        data.lengths,
        world_size(),
        device,
    )
    return settings.model_copy(update=way.settings()), model


def build(settings: FinetuneSettings, output: Path, trackers: bool = True) -> Job:
    """Everything up to `loop.run()`; trackers: TensorBoard and others.

    Raises SettingsError, before anything heavy, if something cannot work, and OutOfMemoryError.
    """
    device = compute_device(settings)
    prepare_process(settings, device)
    check_settings(settings, device)
    processor = Phi3VProcessor.from_pretrained(settings.model_name_or_path)
    data = read_training_data(settings, processor)
    pad = processor.tokenizer.pad_token_id
    join_processes(device)
    asked, model = settings, None
    # The weights reach the device here, and DeepSpeed's float32 copies with their optimizer states.
    with explain_memory(asked, device):
        if settings.is_probed:
            settings, model = choose_way(settings, output, data, pad, device)
        plan = plan_of(settings, data, world_size())
        # accelerate comes before the model: with ZeRO 3 it makes the weights load in shards.
        accelerator = make_accelerator(settings, output, plan.accumulation, device, trackers)
        model = load_model(settings, device) if model is None else model
        cuda = device.type == "cuda"
        collator = Collator(pad, settings.batching, model.config)
        training = PlannedSplit(plan, data.examples, collator, loader_workers(settings.num_workers, cuda), cuda)
        validation = validation_of(settings, processor, model.config, training)
        loop = make_loop(settings, accelerator, model, output, device, training, validation)
    return Job(settings, asked, loop, model, processor, data.folder, data.num_crops, data.left_out)


def make_loop(
    settings: FinetuneSettings,
    accelerator: Accelerator,
    model: Any,
    output: Path,
    device: torch.device,
    training: PlannedSplit,
    validation: PlannedSplit | None,
) -> Loop:
    """The loop with its optimizer and schedule; every random number of training follows from the seed set here."""
    set_seed(settings.seed)
    is_sharded = uses_zero(settings)
    if not is_sharded and not settings.use_qlora:
        model.to(device)
    optimizer = build_optimizer(settings, model, device)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    steps = math.ceil(settings.epochs * training.plan.steps_per_epoch)
    total_steps = settings.max_steps if settings.max_steps > 0 else steps
    process = accelerator.process_index
    return Loop(
        settings,
        accelerator,
        model,
        prepared,
        optimizer,
        scheduler=linear_schedule(optimizer, settings.warmup_steps, total_steps),
        training=training,
        validation=validation,
        writer=CheckpointWriter(output / "checkpoints", settings.keep_checkpoints, process, accelerator.num_processes),
        guard=LossGuard(output, process, settings.nan_patience, lambda: loss_scale(settings, accelerator, prepared)),
        total_steps=total_steps,
        is_sharded=is_sharded,
    )


def _epochs(settings: FinetuneSettings, plan: BatchPlan) -> int:
    """Whole epochs the job will begin."""
    if settings.max_steps > 0:
        return -(-settings.max_steps // plan.steps_per_epoch)
    return int(-(-settings.epochs // 1))


def _lengths(settings: FinetuneSettings, dataset: ConversationDataset) -> tuple[list[int] | None, list[int] | None]:
    """(examples kept by --max_length or None for all, their lengths in tokens) where they are needed."""
    if settings.batching == "fixed" and settings.max_length is None and not settings.is_probed:
        return None, None
    tokens = lengths(dataset)
    if settings.max_length is None:
        return None, tokens
    kept = [index for index, length in enumerate(tokens) if length <= settings.max_length]
    return kept, [tokens[index] for index in kept]
