"""Patches of libraries that training needs, with their reasons. tests/test_training_compat.py fails when one is
obsolete."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from phi3v.settings import Compute, FinetuneSettings

if TYPE_CHECKING:
    from accelerate import Accelerator


def leave_out_unused(settings: Compute) -> None:
    """Prevents transformers, accelerate and PEFT from importing unused libraries. Imports no torch.

    peft imports bitsandbytes with PyTorch's inductor (1.8 s of start-up on a 2-core machine, in each process),
    accelerate's extract_model_from_parallel DeepSpeed (0.4 s), and transformers scipy for the losses of object
    detection (0.7 s), if they are installed. A None in sys.modules is Python's way to say that a module cannot be
    imported (Python reference, 5.3.1). For scripts only: it holds for the whole process.
    """
    # Answers come from unquantised weights.
    unused = ["bitsandbytes", "deepspeed"]
    if isinstance(settings, FinetuneSettings):
        if settings.use_qlora or "8bit" in settings.optimizer:
            unused.remove("bitsandbytes")
        if settings.method not in ("lora", "qlora") and settings.zero_stage:
            unused.remove("deepspeed")
        # bitsandbytes and trackers import scipy themselves.
        if "bitsandbytes" in unused and not settings.report_to:
            unused.append("scipy")
    for name in unused:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def compute_float16_on_cpu(accelerator: Accelerator) -> None:
    """Makes accelerate use float16 autocast and loss scaling on a CPU, where it would silently use float32.

    PyTorch has both since 2.3 (https://github.com/pytorch/pytorch/issues/111559); accelerate's constructor leaves the
    CPU out (accelerator.py, `self.device.type != "cpu"`).
    """
    import torch

    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu")


def prepare_deepspeed(cuda: bool) -> None:
    """Imports DeepSpeed so that it compiles nothing, and supports float16 on a CPU.

    If a compiler is installed, DeepSpeed builds a shared-memory all-reduce in every process on a CPU: 15 to 30 s for a
    small job, and no setting turns it off (https://github.com/deepspeedai/DeepSpeed/issues/7625). It also asks oneDNN
    for a native float16 kernel and refuses float16 without one, although PyTorch computes float16 on any CPU
    (https://github.com/deepspeedai/DeepSpeed/pull/7207).
    """
    os.environ["DS_BUILD_OPS"] = "0"
    if cuda:
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    get_accelerator().is_fp16_supported = lambda: True
