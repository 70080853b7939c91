"""The optimizers of `--optimizer`, the learning rate schedule, and accelerate with DeepSpeed's ZeRO.

| name | states per trained weight | where they live |
|---|---|---|
| adamw | two float32: 8 bytes | on the GPU, in shards under ZeRO |
| adamw_8bit | two 8-bit numbers and a float32 scale per 256: 2.03 bytes | on the GPU |
| paged_adamw_8bit | the same | in CUDA managed memory, which moves to the host when the GPU is full |
| adamw_offload | two float32 and the float32 weight: 12 bytes | in the host's memory (DeepSpeed ZeRO-Offload) |

The 8-bit states are bitsandbytes' (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"). Tensors under
4,096 elements keep float32 states.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs
from torch import nn

from phi3v.model.compat import import_bitsandbytes
from phi3v.model.runtime import uses_zero
from phi3v.settings import FinetuneSettings
from phi3v.training.census import census_group
from phi3v.training.compat import compute_float16_on_cpu
from phi3v.training.launch import is_first
from phi3v.training.logging import trackers_of

# Parameters without weight decay by name, beside those of nn.LayerNorm modules: the Hugging Face Trainer's rule.
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


def parameter_groups(settings: FinetuneSettings, model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups by learning rate, each with and without weight decay (norms and biases).

    The groups of `learning_rate` come first. Other rates have groups only if a weight uses them.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    in_norms = {id(parameter) for norm in norms for parameter in norm.parameters(recurse=False)}
    vision, projector = settings.vision_learning_rate, settings.projector_learning_rate
    own_rates = {"clip": vision, "projector": projector, "separators": projector}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {
        (settings.learning_rate, True): [], (settings.learning_rate, False): []
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = settings.learning_rate
            if vision or projector:
                rate = own_rates.get(census_group(name).removeprefix("adapters (").rstrip(")")) or rate
            decays = not (id(parameter) in in_norms or NO_DECAY.search(name))
            groups.setdefault((rate, decays), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": settings.weight_decay * decays, "lr": rate}
        for (rate, decays), parameters in groups.items()
    ]


def build_optimizer(settings: FinetuneSettings, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the model's trained parameters. device: device of the model."""
    groups = parameter_groups(settings, model)
    rates: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
    }
    if "8bit" in settings.optimizer:
        return _eight_bit(groups, rates, paged=settings.optimizer.startswith("paged") and device.type == "cuda")
    return torch.optim.AdamW(groups, **rates, fused=is_fused(settings, device.type) or None)


def is_fused(settings: FinetuneSettings, kind: str) -> bool:
    """Whether torch's fused AdamW runs: on CUDA, and for offloaded states on the CPU. It makes no temporary copies.

    float16 adapters use the default kernel, because the fused kernel itself skips a step that overflowed. accelerate
    would not notice and would advance the learning rate. ZeRO scales the loss itself.
    """
    if settings.optimizer == "adamw_offload":
        return True
    return kind == "cuda" and (settings.dtype != "fp16" or uses_zero(settings))


def _eight_bit(groups: list[dict[str, Any]], rates: dict[str, Any], paged: bool) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with 8-bit states, without paged memory on a CPU."""
    import_bitsandbytes()
    import bitsandbytes

    if not paged:
        return bitsandbytes.optim.AdamW8bit(groups, **rates)

    class PagedAdamW8bit(bitsandbytes.optim.PagedAdamW8bit):
        """Loads states into paged memory. bitsandbytes' own load_state_dict would leave them in the GPU's memory."""

        def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
            super().load_state_dict(state_dict, move_to_device=False)
            for parameter, state in self.state.items():
                for name, value in state.items():
                    if name in ("state1", "state2"):
                        state[name] = self.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
                    elif isinstance(value, torch.Tensor):
                        state[name] = value.to(parameter.device)

    return PagedAdamW8bit(groups, **rates)


def schedule(
    kind: Literal["linear", "cosine", "constant", "constant_with_warmup"],
    optimizer: torch.optim.Optimizer,
    warmup: int,
    total: int,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rates that rise linearly from 0 over `warmup` steps, then fall to 0 at step `total`, or stay constant.

    The kinds are those of transformers.get_scheduler; `constant` has no warm-up.
    """

    def factor(step: int) -> float:
        if step < warmup and kind != "constant":
            return step / warmup
        if kind.startswith("constant"):
            return 1.0
        left = (total - step) / max(1, total - warmup)
        return max(0.0, left if kind == "linear" else 0.5 * (1 - math.cos(math.pi * left)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# Several processes -----------------------------------------------------------------------------------------------------


def make_accelerator(
    settings: FinetuneSettings, output: Path, accumulation: int, device: torch.device, trackers: bool
) -> Accelerator:
    """accelerate for this process. With ZeRO 3, models that are loaded afterwards load in shards.

    accumulation: micro-steps of an optimizer step. trackers: TensorBoard and those of --report_to.
    """
    cuda = device.type == "cuda"
    zero = DeepSpeedPlugin(hf_ds_config=zero_config(settings, accumulation, cuda)) if uses_zero(settings) else None
    accelerator = Accelerator(
        mixed_precision="no" if settings.dtype == "fp32" else settings.dtype,
        deepspeed_plugin=zero,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False)],
        log_with=trackers_of(settings, output) if trackers and is_first() else None,
        project_dir=output,
    )
    if settings.dtype == "fp16" and not cuda and zero is None:
        compute_float16_on_cpu(accelerator)
    return accelerator


def loss_scale(settings: FinetuneSettings, accelerator: Accelerator, model: Any) -> float | None:
    """The current loss scale of float16, or None for other dtypes. model: as prepared by accelerate."""
    if settings.dtype != "fp16":
        return None
    if accelerator.scaler is not None:
        return float(accelerator.scaler.get_scale())
    return getattr(model.optimizer, "cur_scale", None)


def zero_config(settings: FinetuneSettings, accumulation: int, cuda: bool) -> dict[str, Any]:
    """DeepSpeed's configuration, without the optimizer, which `build_optimizer` creates.

    accumulation: micro-steps of an optimizer step. ZeRO 1 shards optimizer states, 2 gradients too, 3 weights as well.
    """
    # Elements. On a GPU there are two buckets: 200 MB each keeps the links busy, and the largest weight (the embedding,
    # 98.5 million) fits in one. On a CPU, DeepSpeed copies the complete bucket even if it is nearly empty.
    bucket = 100_000_000 if cuda else 5_000_000
    several_machines = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "overlap_comm": cuda,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # False: each share of a bucket is reduced to the process that owns it, which transfers half the bytes of
        # DeepSpeed's default, an all-reduce that discards the other shares. But DeepSpeed synchronises with the device
        # before each of these 112 reductions (stage_1_and_2.py, allreduce_and_copy), so within a machine the all-reduce
        # stays.
        "use_multi_rank_bucket_allreduce": not (cuda and several_machines),
        # If false, a bucket is all-reduced in place, without splitting it into shares and copying them back.
        # It then sums before it divides by the processes, which fits the range of bfloat16 but may overflow float16.
        # ZeRO 3 always scatters; with false, it would all-reduce first.
        "reduce_scatter": not (cuda and not several_machines and settings.dtype == "bf16" and settings.zero_stage < 3),
    }
    if settings.optimizer == "adamw_offload":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if settings.zero_stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True, "stage3_prefetch_bucket_size": bucket}
    # bfloat16 has 8 significant bits, so a sum over many micro-steps would lose small gradients. ZeRO 1 keeps complete
    # gradients: float32 would need 29 GB more (47.6 instead of 18.7 GB on 8 GPUs), the compute type needs 6 GB more.
    # On a CPU, DeepSpeed's default remains: the compute type.
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
        # DeepSpeed would compile its own CPU Adam on first use. torch's fused AdamW needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
