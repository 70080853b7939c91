"""Compute type and attention: what a device can do, and how weights are held for each method."""

from __future__ import annotations

import importlib.util

import torch

from phi3v.model.device import check_architecture
from phi3v.settings import FinetuneSettings, SettingsError

TORCH_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def attention_implementation(settings: FinetuneSettings, device: torch.device) -> str:
    """The model's `attn_implementation`: eager, or with --use_flash_attention the fastest flash kernel there is.

    On CUDA with float16 or bfloat16 the flash-attn package where it is installed, else PyTorch's SDPA; on a CPU SDPA,
    which has a flash kernel of its own.
    """
    if not settings.use_flash_attention:
        return "eager"
    if device.type == "cuda" and settings.dtype != "fp32" and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    return "sdpa"


def check_device(settings: FinetuneSettings, device: torch.device) -> None:
    """Raises SettingsError where PyTorch has no kernels for the device, or it lacks the type or kernel asked for."""
    if device.type != "cuda":
        return
    check_architecture(device)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    at = f"{name} (compute capability {capability[0]}.{capability[1]})"
    # bfloat16 tensor cores and flash kernels came with Ampere, 8.0 (NVIDIA, CUDA C++ Programming Guide, table of
    # arithmetic instructions; PyTorch's sdp_utils asks the same of its flash kernel).
    if settings.bf16 and capability < (8, 0):
        raise SettingsError(f"command line: field `bf16`: got true on {at}: it has no bfloat16; expected --fp16 there")
    if settings.use_flash_attention and capability < (8, 0):
        raise SettingsError(
            f"command line: field `use_flash_attention`: got true on {at}: flash kernels need compute capability 8.0; "
            "leave the flag out there"
        )
    if settings.use_flash_attention and settings.dtype == "fp32":
        raise SettingsError(
            f"command line: field `use_flash_attention`: got true with fp32 on {at}: flash kernels take bf16 or fp16"
        )


def uses_zero(settings: FinetuneSettings) -> bool:
    """Whether DeepSpeed runs the job: full fine-tuning, unless --zero_stage 0."""
    return settings.method in ("full", "frozen") and settings.zero_stage > 0


def weight_dtype(settings: FinetuneSettings) -> torch.dtype:
    """Type the model's weights are loaded in.

    ZeRO keeps its own float32 master copy, and frozen weights under adapters never change: both are held in the compute
    type. Full fine-tuning without ZeRO trains float32 weights under autocast.
    """
    if settings.method in ("full", "frozen") and not uses_zero(settings):
        return torch.float32
    return TORCH_DTYPE[settings.dtype]
