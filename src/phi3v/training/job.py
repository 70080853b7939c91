"""From settings to a Trainer that is ready to run: what fine-tuning and the speed measurement share."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phi3v.data.processes import loader_workers
from phi3v.model.runtime import attention_implementation, compute_device, uses_zero, weight_dtype
from phi3v.planning.fits import interval_of
from phi3v.settings import FinetuneSettings, SettingsError
from phi3v.training.batching import BatchPlan, packs_needed
from phi3v.training.recompute import recompute_layers
from phi3v.training.zero import prepare_deepspeed, zero_config

# Seconds that a process may wait for the others. At resume one process reads and hashes whole checkpoints (58 GB each in
# full fine-tuning) and merging is its work too, which takes longer than PyTorch's 10 and the Trainer's 30 minutes.
LONGEST_WAIT = 2 * 3600


@dataclass
class Job:
    """A Trainer and what it was built from."""

    settings: FinetuneSettings
    """What runs: a micro-batch of `auto` is a number here."""
    asked: FinetuneSettings
    """What was asked for; checkpoints belong to it."""
    trainer: Any
    model: Any
    processor: Any
    data_dir: Path
    num_crops: int
    left_out: int
    """Training examples longer than --max_length."""

    @property
    def is_main(self) -> bool:
        """Whether this is the first process of the job."""
        return self.trainer.args.process_index == 0

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.trainer.args.device


def prepare_process(settings: FinetuneSettings, device: torch.device) -> None:
    """Environment of a process before the heavy imports: quiet libraries, rendezvous for a lone process."""
    # PyTorch takes MKL_NUM_THREADS over OMP_NUM_THREADS, and Snakemake exports the former as the whole rule's threads:
    # every process would then have as many as all together.
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if uses_zero(settings) and "RANK" not in os.environ:
        # DeepSpeed wants a process group even for one process started without torchrun.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )  # fmt: skip
    quiet_libraries()
    if uses_zero(settings):
        prepare_deepspeed(device.type == "cuda")


def quiet_libraries() -> None:
    """Leave out what libraries say to their own developers; ours to the reader comes through `say`."""
    for name in ("bitsandbytes", "accelerate", "torch.distributed", "DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    # The Trainer steps the schedule after a float16 step that was skipped, and says so each time.
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def deterministic_kernels(device: torch.device) -> None:
    """Only operators that repeat bit by bit; must run before the first kernel on a GPU.

    There an operator without such a kernel raises. Told to warn instead, PyTorch would keep the atomics of its flash and
    memory-efficient attention (ATen, attention_backward.cu); the flash-attn package asks transformers' variable.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cuda")


def check_geometry(settings: FinetuneSettings, processes: int) -> int:
    """Micro-steps of an optimizer step. Raises SettingsError where the batch does not divide."""
    together = processes * (1 if settings.batch_size_per_gpu == "auto" else settings.batch_size_per_gpu)
    if settings.batching == "packed":
        if settings.batch_size % processes:
            raise SettingsError(
                f"command line: field `batch_size`: got {settings.batch_size}: expected a multiple of the "
                f"{processes} processes"
            )
        return 1
    if settings.batch_size % together:
        each = "" if settings.batch_size_per_gpu == "auto" else f" x --batch_size_per_gpu {settings.batch_size_per_gpu}"
        raise SettingsError(
            f"command line: field `batch_size`: got {settings.batch_size}: expected a multiple of {together} "
            f"({processes} processes{each})"
        )
    return settings.batch_size // together


def check_automatic(settings: FinetuneSettings, processes: int, device: torch.device) -> None:
    """Raises SettingsError if `auto` would search with a memory plan that is not the job's: it counts shards of ZeRO 2."""
    automatic = "auto" in (settings.batch_size_per_gpu, settings.gradient_checkpointing)
    whole = settings.method in ("full", "frozen") and settings.zero_stage < 2
    if automatic and whole and processes > 1 and device.type == "cuda":
        raise SettingsError(
            f"command line: field `zero_stage`: got {settings.zero_stage} with auto on {processes} GPUs, whose optimizer "
            "states auto takes for shards of ZeRO 2; expected --zero_stage 2, or a number for --batch_size_per_gpu and "
            "yes or no for gradient checkpointing"
        )


def check_trackers(names: list[str]) -> None:
    """Raises SettingsError where --report_to names what the Trainer does not know, or what is not installed."""
    from transformers.integrations import get_available_reporting_integrations

    here = get_available_reporting_integrations()
    for name in names:
        if name not in here:
            raise SettingsError(
                f"command line: field `report_to`: got {name!r}: expected a tracker of the Trainer's that is installed "
                f"here ({', '.join(here)}); wandb, mlflow, trackio and others come with `pip install {name}`"
            )


def load_model(settings: FinetuneSettings, device: torch.device) -> Any:
    """The model with its trainable weights chosen: all, without the vision part, or adapters."""
    from phi3v.model import Phi3VForCausalLM
    from phi3v.model.half import use_float32_sums

    if device.type == "cpu" and settings.dtype == "fp16":
        use_float32_sums()
    attention, dtype = attention_implementation(settings, device), weight_dtype(settings)
    if settings.use_qlora:
        from phi3v.model.adapters import load_quantized

        model = load_quantized(settings.model_name_or_path, dtype, attention, device=device)
    else:
        model = Phi3VForCausalLM.from_pretrained(
            settings.model_name_or_path, dtype=dtype, attn_implementation=attention
        )
    model.config.use_cache = False
    if settings.recompute is not None:
        recompute_layers(model, interval_of(settings.recompute))
    if settings.method in ("lora", "qlora"):
        from phi3v.model.adapters import add_lora

        return add_lora(
            model, settings.lora_rank, settings.lora_alpha_ratio * settings.lora_rank, settings.lora_dropout,
            freeze_vision=settings.freeze_vision_model != "no", use_dora=settings.use_dora, seed=settings.seed,
        )  # fmt: skip
    from phi3v.model.freezing import freeze_vision

    if settings.freeze_vision_model != "no":
        freeze_vision(model, settings.freeze_vision_model)
    # The tower's last layer never runs (the recipe takes the features before it): it has nothing to train.
    for name, parameter in model.named_parameters():
        if name in unused_parameters(model):
            parameter.requires_grad_(False)
    return model


def unused_parameters(model: Any) -> set[str]:
    """Names of weights that no forward pass touches: the vision tower's last layer and its final norm."""
    last = model.config.vision_config.num_hidden_layers - 1
    marks = (f".img_processor.vision_model.encoder.layers.{last}.", ".img_processor.vision_model.post_layernorm.")
    return {name for name, _ in model.named_parameters() if any(mark in name for mark in marks)}


def read_data(settings: FinetuneSettings, processor: Any, split: str) -> tuple[Any, Path, int]:
    """The split's dataset, its folder, and the number of tiles an image may have."""
    from phi3v.data.dataset import ConversationDataset

    folder = settings.data_folder()
    dataset = ConversationDataset(folder, split, processor, settings.num_crops, settings.seed, as_uint8=True)
    return dataset, folder, dataset.num_crops


def training_arguments(
    settings: FinetuneSettings, folder: Path, accumulation: int, trackers: bool, device: torch.device
) -> Any:
    """The Trainer's arguments; making them joins the process group."""
    from phi3v.training.trainer import OneDeviceArguments

    cuda = device.type == "cuda"
    first = os.environ.get("RANK", "0") == "0"
    return OneDeviceArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.micro_batch_size,
        per_device_eval_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps if settings.max_steps > 0 else -1,
        learning_rate=settings.learning_rate,
        weight_decay=settings.wd,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        max_grad_norm=settings.max_grad_norm,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="linear",
        bf16=settings.dtype == "bf16",
        fp16=settings.dtype == "fp16",
        seed=settings.seed,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        # Other saves are asked for by StepCallback, see steps.py.
        save_strategy="best" if settings.keep_best else "no",
        load_best_model_at_end=settings.keep_best,
        metric_for_best_model="loss" if settings.keep_best else None,
        greater_is_better=False if settings.keep_best else None,
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps or None,
        prediction_loss_only=True,
        report_to=["tensorboard", *settings.report_to] if first and trackers else [],
        disable_tqdm=True,
        log_level="error",
        dataloader_num_workers=loader_workers(settings.num_workers, cuda),
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        average_tokens_across_devices=False,
        ddp_find_unused_parameters=False,
        use_cpu=not cuda,
        ddp_backend=("nccl" if cuda else "gloo") if "RANK" in os.environ else None,
        ddp_broadcast_buffers=False,
        ddp_timeout=LONGEST_WAIT,
        deepspeed=zero_config(settings, accumulation, cuda) if uses_zero(settings) else None,
    )


def build(settings: FinetuneSettings, output: Path, trackers: bool = True) -> Job:
    """Everything up to `trainer.train()`; `trackers`: TensorBoard and others.

    Raises SettingsError before anything heavy where something cannot work."""
    device = compute_device(settings)
    prepare_process(settings, device)
    if settings.deterministic:
        deterministic_kernels(device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = check_geometry(settings, processes)
    check_automatic(settings, processes, device)
    check_trackers(settings.report_to)
    settings.data_folder()
    if not (Path(settings.model_name_or_path) / "config.json").is_file():
        raise SettingsError(
            f"command line: field `model_name_or_path`: got {settings.model_name_or_path!r}: no config.json there; "
            "expected a checkpoint folder in the official layout"
        )
    from phi3v.data.dataset import collate
    from phi3v.model import Phi3VProcessor
    from phi3v.training import micro_batch
    from phi3v.training.batches import Collator, PickedExamples, bundled
    from phi3v.training.meter import Meter
    from phi3v.training.optimizers import build_optimizer
    from phi3v.training.trainer import RecipeTrainer

    processor = Phi3VProcessor.from_pretrained(settings.model_name_or_path)
    dataset, data_dir, num_crops = read_data(settings, processor, "train")
    kept, lengths = _lengths(settings, dataset)
    examples, pad = PickedExamples(dataset, kept), processor.tokenizer.pad_token_id
    if not len(examples):
        raise SettingsError(f"{data_dir}: split train: no examples to train on; expected at least one")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "tensorboard")
    asked, args, model = settings, None, None
    if settings.is_probed:
        # Processes agree on a size, so they have to meet first; the arguments are made again for the size found.
        assert lengths is not None
        single = settings.model_copy(update={"batch_size_per_gpu": 1})
        args = training_arguments(single, output / "checkpoints", accumulation, trackers, device)
        model = load_model(settings, args.device)
        config = model.config
        way = micro_batch.choose(
            settings,
            output,
            model,
            examples.example,
            lambda batch: bundled(config, collate(batch, pad)),
            lengths,
            processes,
            args.device,
        )
        settings = settings.model_copy(update=way.settings())
    plan = BatchPlan(
        examples=len(examples), batch_size=settings.batch_size, micro_batch_size=settings.micro_batch_size,
        processes=processes, seed=settings.seed, grouping=settings.batching, lengths=lengths,
        token_budget=settings.tokens_per_pack, shard_starts=dataset.shard_starts(kept),
    )  # fmt: skip
    if settings.batching == "packed":
        plan = BatchPlan(**{**plan.__dict__, "packs": packs_needed(plan, _epochs(settings, plan))})
    # The Trainer's arguments come before the model: with ZeRO 3 they make the weights load in shards.
    args = training_arguments(settings, output / "checkpoints", plan.accumulation, trackers, device)
    model = load_model(settings, args.device) if model is None else model
    validation: dict[str, Any] = {}
    if settings.eval_steps:
        eval_dataset = read_data(settings, processor, "val")[0]
        count = min(settings.eval_examples or len(eval_dataset), len(eval_dataset))
        validation = {
            "eval_dataset": PickedExamples(eval_dataset), "eval_collator": Collator(collate, pad, "fixed", model.config),
            "eval_plan": BatchPlan(
                examples=count, batch_size=count, micro_batch_size=settings.micro_batch_size,
                processes=processes, seed=0,
            ),
        }  # fmt: skip
    trainer = RecipeTrainer(
        plan=plan, meter=Meter(args.device), model=model, args=args,
        data_collator=Collator(collate, pad, settings.batching, model.config), train_dataset=examples,
        keep_checkpoints=settings.keep_checkpoints, optimizers=(build_optimizer(settings, model, args.device), None),
        **validation,
    )  # fmt: skip
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    left_out = len(dataset) - plan.examples
    return Job(settings, asked, trainer, model, processor, data_dir, num_crops, left_out)


def _epochs(settings: FinetuneSettings, plan: BatchPlan) -> int:
    """Whole epochs the job will begin."""
    if settings.max_steps > 0:
        return -(-settings.max_steps // plan.steps_per_epoch)
    return int(-(-settings.num_train_epochs // 1))


def _lengths(settings: FinetuneSettings, dataset: Any) -> tuple[list[int] | None, list[int] | None]:
    """(examples kept by --max_length or None for all, their lengths in tokens) where they are needed."""
    if settings.batching == "fixed" and settings.max_length is None and not settings.is_probed:
        return None, None
    from phi3v.data.lengths import lengths

    tokens = lengths(dataset)
    if settings.max_length is None:
        return None, tokens
    kept = [index for index, length in enumerate(tokens) if length <= settings.max_length]
    return kept, [tokens[index] for index in kept]
