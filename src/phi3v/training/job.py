"""Builds a loop from settings. Fine-tuning and the speed measurement share this."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from phi3v.data.dataset import ConversationDataset
from phi3v.data.lengths import counts, summary_lines
from phi3v.data.processes import loader_workers
from phi3v.model import Phi3VForCausalLM, Phi3VProcessor
from phi3v.model.adapters import add_lora, load_quantized, lora_targets
from phi3v.model.compat import widen_float16_products
from phi3v.model.modeling import freeze, parameter_group
from phi3v.model.runtime import TORCH_DTYPE, attention_implementation, compute_device, uses_zero, weight_dtype
from phi3v.planning.fits import interval_of
from phi3v.settings import FinetuneSettings, SettingsError, SpeedSettings, number_of
from phi3v.training import micro_batch
from phi3v.training.batches import BatchPlan, Collator, PickedExamples, PlannedSplit
from phi3v.training.census import LossGuard
from phi3v.training.launch import is_first, join_processes, prepare_process, say, world_size
from phi3v.training.logging import check_trackers
from phi3v.training.loop import Loop
from phi3v.training.memory import explain_memory
from phi3v.training.optimizers import build_optimizer, loss_scale, make_accelerator, schedule
from phi3v.training.writer import CheckpointWriter


def check_settings(settings: FinetuneSettings, device: torch.device) -> None:
    """Raises SettingsError if a folder, the division of the batch, an `auto` setting or a tracker cannot work."""
    processes, micro = world_size(), settings.micro_batch_size
    share = processes * (1 if settings.batching == "packed" else settings.micro_batch_size_or_one)
    if settings.batch_size % share:
        each = "" if micro == "auto" or share == processes else f" x --batch_size_per_gpu {micro}"
        raise SettingsError(
            f"command line: field `batch_size`: got {settings.batch_size}: expected a multiple of {share} "
            f"({number_of(processes, 'process', 'processes')}{each})"
        )
    check_automatic(settings, processes, device)
    check_trackers(settings.report_to)
    settings.data_folder()
    if not (Path(settings.model_name_or_path) / "config.json").is_file():
        raise SettingsError(
            f"command line: field `model_name_or_path`: got {settings.model_name_or_path!r}: contains no config.json; "
            "expected a checkpoint folder in the official layout"
        )


def check_automatic(settings: FinetuneSettings, processes: int, device: torch.device) -> None:
    """Raises SettingsError for `auto` with unsharded optimizer states on several GPUs, whose memory was never
    measured."""
    whole = settings.method in ("full", "frozen") and settings.zero_stage < 2 and settings.optimizer == "adamw"
    if settings.is_probed and whole and processes > 1 and device.type == "cuda":
        raise SettingsError(
            f"command line: field `zero_stage`: got {settings.zero_stage} with auto on {processes} GPUs, for which the "
            "memory without shards was never measured; expected --zero_stage 2, or a number for --batch_size_per_gpu "
            "and yes or no for gradient checkpointing"
        )


def load_model(settings: FinetuneSettings, device: torch.device) -> Any:
    """Loads the model and selects its trainable weights: all, all except the vision part, or adapters."""
    widen_float16_products(device, TORCH_DTYPE[settings.dtype])
    attention, dtype = attention_implementation(settings, device), weight_dtype(settings)
    if settings.use_qlora:
        model = load_quantized(settings.model_name_or_path, dtype, attention, device=device)
    else:
        model = Phi3VForCausalLM.from_pretrained(
            settings.model_name_or_path, dtype=dtype, attn_implementation=attention
        )
    if settings.recompute is not None:
        micro_batch.recompute_layers(model, interval_of(settings.recompute))
    if settings.method in ("lora", "qlora"):
        return add_lora(
            model,
            settings.lora_rank,
            settings.lora_alpha_ratio * settings.lora_rank,
            settings.lora_dropout,
            use_dora=settings.use_dora,
            seed=settings.seed,
            targets=chosen_targets(settings, model),
            use_rslora=settings.use_rslora,
        )
    freeze(model, settings.frozen_groups)
    return model


def chosen_targets(settings: FinetuneSettings, model: Phi3VForCausalLM) -> list[str]:
    """Module paths of the layers that get adapters: the recipe's, without frozen groups, restricted to --lora_targets.

    Raises SettingsError if none is left.
    """
    wanted = set(settings.lora_targets)
    targets = [
        name
        for name in lora_targets(model, freeze_vision=False)
        if parameter_group(f"{name}.weight") not in settings.frozen_groups
        and (not wanted or wanted & {name.rpartition(".")[2], *(["img_projection"] * (".img_projection." in name))})
    ]
    if not targets:
        raise SettingsError(
            f"command line: field `lora_targets`: got {settings.lora_targets}: all these layers are in frozen groups "
            f"({', '.join(sorted(settings.frozen_groups))}); expected layers of another group"
        )
    return targets


def read_split(settings: FinetuneSettings, processor: Phi3VProcessor, split: str) -> ConversationDataset:
    """A split of the data folder, with pixels as uint8."""
    return ConversationDataset(
        settings.data_folder(), split, processor, settings.num_crops, settings.seed, as_uint8=True
    )


def training_examples(settings: FinetuneSettings, processor: Phi3VProcessor) -> PickedExamples:
    """The training split without examples longer than --max_length. Raises SettingsError if none is left."""
    dataset = read_split(settings, processor, "train")
    found = counts(dataset)
    tokens, kept = found[:, 0].tolist(), None
    if is_first():
        for line in summary_lines(dataset, settings.max_length, found=found):
            say(line)
    if settings.max_length is not None:
        kept = [index for index, length in enumerate(tokens) if length <= settings.max_length]
        tokens = [tokens[index] for index in kept]
        if not kept:
            raise SettingsError(
                f"{dataset.data_dir}: split train: got no example with at most {settings.max_length} tokens; expected "
                "at "
                "least one; increase --max_length"
            )
    return PickedExamples(dataset, kept, tokens)


def plan_of(settings: FinetuneSettings, examples: PickedExamples) -> BatchPlan:
    """The division of every epoch into micro-batches."""
    packed = settings.batching == "packed"
    return BatchPlan(
        examples=len(examples),
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size_or_one,
        processes=world_size(),
        seed=settings.seed,
        grouping=settings.batching,
        lengths=examples.lengths,
        max_tokens=settings.tokens_per_pack if packed else settings.max_tokens_per_micro_batch,
    )


def steps_of(settings: FinetuneSettings, examples: int) -> tuple[int, int]:
    """(optimizer steps of the job, optimizer steps of its warm-up).

    The recipe's default warm-up becomes a tenth of a job that is not longer than it. Raises SettingsError for another
    warm-up that leaves no step at the full rate. A speed measurement ignores this.
    """
    total = settings.max_steps
    if total <= 0:
        total = math.ceil(settings.epochs * math.ceil(examples / settings.batch_size))
    warmup = settings.warmup_steps
    if warmup < max(total, 1) or settings.lr_scheduler_type == "constant" or isinstance(settings, SpeedSettings):
        return total, warmup
    if warmup == FinetuneSettings.model_fields["warmup_steps"].default:
        return total, total // 10
    raise SettingsError(
        f"command line: field `warmup_steps`: got {warmup}: the job has only {total} optimizer steps ({examples} "
        "examples in "
        f"batches of {settings.batch_size}), so the learning rate would never become {settings.learning_rate:g}; "
        "expected "
        f"less than {total}; lower it, or increase --epochs or --max_steps"
    )


def build(settings: FinetuneSettings, output: Path, trackers: bool = True) -> Loop:
    """Builds everything up to `loop.run()`. trackers: whether to log to TensorBoard and other trackers.

    Raises SettingsError for impossible settings before loading the model, and OutOfMemoryError.
    """
    device = compute_device(settings)
    prepare_process(settings, device)
    check_settings(settings, device)
    processor = Phi3VProcessor.from_pretrained(settings.model_name_or_path)
    pad, cuda = processor.tokenizer.pad_token_id, device.type == "cuda"
    examples = training_examples(settings, processor)
    settings = settings.model_copy(update={"num_crops": examples.dataset.num_crops})
    validation = None
    total, warmup = steps_of(settings, len(examples))
    if warmup < settings.warmup_steps:
        say(f"warm-up of {warmup} steps instead of {settings.warmup_steps}: the job has {total} optimizer steps")
    join_processes(device)
    model = None
    # The weights move to the device here, as do DeepSpeed's float32 copies and optimizer states.
    with explain_memory(settings, device):
        if settings.is_probed:
            model = load_model(settings, device)
            settings = micro_batch.choose(settings, output, model, examples, pad, device)
        plan = plan_of(settings, examples)
        # accelerate comes before the model, because with ZeRO 3 it makes the weights load in shards.
        accelerator = make_accelerator(settings, output, plan.accumulation, device, trackers)
        if model is None:
            model = load_model(settings, device)
            if settings.batching != "packed":
                micro_batch.warn_of_memory(settings, model.config, examples, device)
        collator = Collator(pad, settings.batching, model.config)
        training = PlannedSplit(plan, examples, collator, loader_workers(settings.num_workers, cuda), cuda)
        if settings.eval_steps:
            dataset = read_split(settings, processor, "val")
            count = min(settings.eval_examples or len(dataset), len(dataset))
            in_order = BatchPlan(count, count, settings.micro_batch_size_or_one, world_size(), seed=0)
            collator = Collator(pad, "fixed", model.config)
            validation = replace(training, plan=in_order, examples=PickedExamples(dataset), collate=collator)
        return make_loop(settings, accelerator, model, output, device, training, validation, (total, warmup))


def make_loop(
    settings: FinetuneSettings,
    accelerator: Accelerator,
    model: Any,
    output: Path,
    device: torch.device,
    training: PlannedSplit,
    validation: PlannedSplit | None,
    steps: tuple[int, int],
) -> Loop:
    """The loop with its optimizer and schedule. All random numbers of training follow from the seed set here.

    steps: optimizer steps of the job and of its warm-up.
    """
    set_seed(settings.seed)
    if not uses_zero(settings) and not settings.use_qlora:
        model.to(device)
    optimizer = build_optimizer(settings, model, device)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    total_steps, warmup_steps = steps
    process = accelerator.process_index
    return Loop(
        settings,
        accelerator,
        model,
        prepared,
        optimizer,
        scheduler=schedule(settings.lr_scheduler_type, optimizer, warmup_steps, total_steps),
        training=training,
        validation=validation,
        writer=CheckpointWriter(output / "checkpoints", settings.keep_checkpoints, process, accelerator.num_processes),
        guard=LossGuard(output, process, settings.max_nan_steps, lambda: loss_scale(settings, accelerator, prepared)),
        total_steps=total_steps,
        warmup_steps=warmup_steps,
    )
