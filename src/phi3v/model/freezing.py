"""Which weights train: groups by name, and freezing that is what it claims."""

from __future__ import annotations

from typing import Literal

from torch import nn

GROUPS = ("clip", "projector", "separators", "embedding", "decoder", "head", "adapters")


def parameter_group(name: str) -> str:
    """The group of a parameter, one of `GROUPS`, from its name (with or without PEFT's and DDP's prefixes).

    clip, projector and separators are the vision part; embedding is the text embedding; decoder includes the final
    norm; adapters are LoRA and DoRA weights wherever they sit. Raises ValueError for a name that fits none.
    """
    if ".lora_" in name or ".modules_to_save." in name:
        return "adapters"
    marks = {
        "clip": ".img_processor.",
        "projector": ".img_projection.",
        "embedding": "embed_tokens.",
        "decoder": ".layers.",
        "head": "lm_head.",
    }
    if name.endswith((".glb_GN", ".sub_GN")):
        return "separators"
    if name.endswith("vision_embed_tokens.wte.weight"):
        return "embedding"
    for group, mark in marks.items():
        if mark in name and (group != "embedding" or "vision_embed_tokens." not in name):
            return group
    if name.endswith("model.norm.weight"):
        return "decoder"
    raise ValueError(f"parameter {name!r}: it belongs to none of {', '.join(GROUPS)}.")


def freeze_vision(model: nn.Module, mode: Literal["vision", "legacy"] = "vision") -> list[str]:
    """Take the vision part out of training; returns the names of the frozen parameters.

    "vision" freezes CLIP, projector and separators. "legacy" freezes the text embedding with them, as the recipe's
    `--freeze_vision_model` did: it froze the module `vision_embed_tokens`, which held the embedding too.
    Call it before adapters are added: adapters are never frozen here.
    """
    if mode not in ("vision", "legacy"):
        raise ValueError(f"freeze_vision mode: {mode!r}; expected 'vision' or 'legacy'.")
    groups = {"clip", "projector", "separators"} | ({"embedding"} if mode == "legacy" else set())
    frozen = []
    for name, parameter in model.named_parameters():
        if parameter_group(name) in groups:
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen
