"""DeepSpeed ZeRO for full fine-tuning: its configuration, and its checkpoints as plain safetensors."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

from phi3v.settings import FinetuneSettings


def prepare_deepspeed(cuda: bool) -> None:
    """Import DeepSpeed so that it compiles nothing, and computes float16 on a CPU where it is asked to."""
    os.environ["DS_BUILD_OPS"] = "0"
    if cuda:
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # Where a compiler is about, it would build a shared-memory all-reduce in every process: 15-30 s for a small job.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It asks oneDNN for a native float16 kernel and refuses without one; PyTorch computes float16 on any CPU.
    get_accelerator().is_fp16_supported = lambda: True


def zero_config(settings: FinetuneSettings, accumulation: int, cuda: bool) -> dict[str, Any]:
    """DeepSpeed's configuration; the optimizer and schedule are the Trainer's (torch AdamW, linear).

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
        "train_micro_batch_size_per_gpu": settings.batch_size_per_gpu,
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


def export_zero_checkpoint(checkpoint: Path, base: Path, out: Path, dtype: str = "bf16") -> Path:
    """A ZeRO checkpoint as plain safetensors in the official layout, from its float32 master weights; needs no GPU.

    checkpoint: a checkpoint-N folder. base: the folder that training started from (configuration, processor).
    Raises ValueError where a rank's shard or a weight is missing, or OUT holds files already.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: not empty; expected a new folder for the exported checkpoint")
    if not (checkpoint / "latest").is_file():
        raise ValueError(f"{checkpoint}: no file `latest`; expected a checkpoint-N folder that ZeRO wrote")
    prepare_deepspeed(cuda=False)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from phi3v.model import Phi3VForCausalLM, Phi3VProcessor
    from phi3v.model.runtime import TORCH_DTYPE

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does shard by shard
        try:
            state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
        except (FileNotFoundError, AssertionError, ValueError, RuntimeError, KeyError, IndexError) as error:
            raise ValueError(f"{checkpoint}: its shards are not complete ({error})") from error
    model = Phi3VForCausalLM.from_pretrained(base)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"{checkpoint}: {len(missing)} weights missing, {len(unexpected)} unknown ({[*missing, *unexpected][:3]}); "
            f"expected those of {base}"
        )
    model.to(TORCH_DTYPE[dtype]).save_pretrained(out)
    Phi3VProcessor.from_pretrained(base).save_pretrained(out)
    return out
