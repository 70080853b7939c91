"""accelerate for a job: DDP or DeepSpeed's ZeRO, mixed precision, trackers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs

from phi3v.model.runtime import uses_zero
from phi3v.settings import FinetuneSettings
from phi3v.training.compat import compute_float16_on_cpu
from phi3v.training.logging import trackers_of


def make_accelerator(
    settings: FinetuneSettings, output: Path, accumulation: int, device: torch.device, trackers: bool
) -> Accelerator:
    """accelerate for this process; with ZeRO 3 models that are loaded afterwards load in shards.

    accumulation: micro-steps of an optimizer step. trackers: TensorBoard and those of --report_to.
    """
    cuda = device.type == "cuda"
    zero = DeepSpeedPlugin(hf_ds_config=zero_config(settings, accumulation, cuda)) if uses_zero(settings) else None
    first = os.environ.get("RANK", "0") == "0"
    accelerator = Accelerator(
        mixed_precision="no" if settings.dtype == "fp32" else settings.dtype,
        deepspeed_plugin=zero,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False)],
        log_with=trackers_of(settings, output) if trackers and first else None,
        project_dir=output,
    )
    if settings.dtype == "fp16" and not cuda and zero is None:
        compute_float16_on_cpu(accelerator)
    return accelerator


def loss_scale(settings: FinetuneSettings, accelerator: Accelerator, model: Any) -> float | None:
    """The factor that float16 gradients are scaled by now; None in other types. model: as accelerate prepared it."""
    if settings.dtype != "fp16":
        return None
    if accelerator.scaler is not None:
        return float(accelerator.scaler.get_scale())
    return getattr(model.optimizer, "cur_scale", None)


def zero_config(settings: FinetuneSettings, accumulation: int, cuda: bool) -> dict[str, Any]:
    """DeepSpeed's configuration; the optimizer comes from `optimizers`.

    accumulation: micro-steps of an optimizer step. ZeRO 1 shards optimizer states, 2 gradients too, 3 weights as well.
    """
    # Elements. On a GPU two buckets are held: 200 MB each keeps the links busy, and the largest weight (the embedding,
    # 98.5 million) fits in one. On a CPU a bucket is copied whole, no matter how little is in it.
    bucket = 100_000_000 if cuda else 5_000_000
    several_machines = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "overlap_comm": cuda,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # False: each share of a bucket is reduced to the process that owns it, which moves half the bytes of DeepSpeed's
        # default, an all-reduce whose other shares are thrown away. But DeepSpeed waits for the device before each of
        # these 112 reductions (stage_1_and_2.py, allreduce_and_copy), so within a machine the all-reduce stays.
        "use_multi_rank_bucket_allreduce": not (cuda and several_machines),
        # Likewise false: a bucket is all-reduced where it lies, without being cut into shares and copied together again.
        # It sums before it divides by the processes, which bfloat16's range bears and float16's may not.
        # ZeRO 3 scatters in any case, and without this it would all-reduce first.
        "reduce_scatter": not (cuda and not several_machines and settings.dtype == "bf16" and settings.zero_stage < 3),
    }
    if settings.optimizer == "adamw_offload":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if settings.zero_stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True, "stage3_prefetch_bucket_size": bucket}
    # bfloat16 keeps 8 bits: a sum over many micro-steps would lose the small gradients. ZeRO 1 sums whole gradients in
    # the compute type: in float32 they would take 29 GB more (47.6 instead of 18.7 GB on 8 GPUs), in bfloat16 they take
    # 6 GB more. On a CPU DeepSpeed's default, the compute type, stays.
    in_float32 = cuda and settings.zero_stage > 1
    accumulate: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}} if in_float32 else {}
    return {
        **accumulate,
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": settings.max_grad_norm,
        "bf16": {"enabled": settings.dtype == "bf16"},
        "fp16": {"enabled": settings.dtype == "fp16", "initial_scale_power": 16, "loss_scale_window": 1000},
        "zero_optimization": zero,
        # DeepSpeed's own CPU Adam would be compiled on first use. torch's fused AdamW runs there too, without a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
