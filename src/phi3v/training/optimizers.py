"""The optimizers of `--optimizer`: AdamW with float32 states, with 8-bit states, or with its states in the host's memory.

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

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from phi3v.model.runtime import uses_zero
from phi3v.settings import FinetuneSettings

# Parameters without weight decay by name, beside those of nn.LayerNorm modules: the Hugging Face Trainer's rule.
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters as two groups, with weight decay and without (norms and biases)."""
    in_norms = {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for own, _ in module.named_parameters(recurse=False)
    }
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if name in in_norms or NO_DECAY.search(name) else decaying).append(parameter)
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_optimizer(settings: FinetuneSettings, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the model's trained parameters; device: where the model computes."""
    groups = decay_groups(model, settings.weight_decay)
    rates: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
    }
    if "8bit" in settings.optimizer:
        return _eight_bit(groups, rates, paged=settings.optimizer.startswith("paged") and device.type == "cuda")
    return torch.optim.AdamW(groups, **rates, fused=is_fused(settings, device.type) or None)


def is_fused(settings: FinetuneSettings, kind: str) -> bool:
    """Whether torch's fused AdamW runs: on CUDA, and for offloaded states on the CPU. It needs no temporary copies.

    float16 adapters use the default kernel. The fused kernel itself skips a step that overflowed, so accelerate could
    not see that and would advance the learning rate anyway. ZeRO scales the loss itself.
    """
    if settings.optimizer == "adamw_offload":
        return True
    return kind == "cuda" and (settings.dtype != "fp16" or uses_zero(settings))


def _eight_bit(groups: list[dict[str, Any]], rates: dict[str, Any], paged: bool) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with 8-bit states; a CPU has no paged memory and needs none."""
    import bitsandbytes

    if not paged:
        return bitsandbytes.optim.AdamW8bit(groups, **rates)

    class PagedAdamW8bit(bitsandbytes.optim.PagedAdamW8bit):
        """As in bitsandbytes, whose own load_state_dict would leave a resumed job's states in the GPU's memory."""

        def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
            super().load_state_dict(state_dict, move_to_device=False)
            for parameter, state in self.state.items():
                for name, value in state.items():
                    if name in ("state1", "state2"):
                        state[name] = self.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
                    elif isinstance(value, torch.Tensor):
                        state[name] = value.to(parameter.device)

    return PagedAdamW8bit(groups, **rates)


def linear_schedule(optimizer: torch.optim.Optimizer, warmup: int, total: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises linearly from 0 over `warmup` steps, and falls linearly to 0 at step `total`."""

    def factor(step: int) -> float:
        return step / warmup if step < warmup else max(0.0, (total - step) / max(1, total - warmup))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
