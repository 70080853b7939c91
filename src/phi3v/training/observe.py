"""What a job really computes with: dtype of activations, attention kernels, 4-bit layers, memory.

A setting says what was asked for; here is looked at what ran, in the first training forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from phi3v.model import fused

# Operator names of PyTorch (native_functions.yaml; torch.nn.attention.varlen) and flash-attn, and what a reader calls them.
KERNELS = {
    "_scaled_dot_product_flash_attention_for_cpu": "sdpa flash (CPU)",
    "_scaled_dot_product_flash_attention": "sdpa flash",
    "_flash_attention_forward": "sdpa flash (varlen)",
    "_varlen_attn": "sdpa flash (varlen)",
    "_scaled_dot_product_efficient_attention": "sdpa memory-efficient",
    "_scaled_dot_product_cudnn_attention": "sdpa cuDNN",
    "_scaled_dot_product_fused_attention_overrideable": "sdpa fused",
    "_flash_attn_forward": "flash-attn",
    "_flash_attn_varlen_forward": "flash-attn (varlen)",
}
# PyTorch's names, and those of the command line.
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class _Operators(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave this mode, which is the innermost one, for a while."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.split("::")[-1])
        return func(*args, **(kwargs or {}))


def attention_kernel(operators: set[str], implementation: str) -> str:
    """The attention kernel among the operators of a layer; `implementation` tells eager from SDPA's composite.

    An attention operator that has no title here is called by its own name.
    """
    for name, title in KERNELS.items():
        if name in operators:
            return title
    if unnamed := sorted(name for name in operators if "attention" in name or "attn" in name):
        return unnamed[0]
    if "_softmax" in operators or "_safe_softmax" in operators:
        return "eager" if implementation == "eager" else "sdpa math"
    return "none seen"


class Observer:
    """Watches the first training forward of one decoder layer and one vision layer, then gets out of the way."""

    def __init__(self, model: nn.Module) -> None:
        self.activation_dtype: str | None = None
        self.kernels: dict[str, str] = {}
        self._handles: list[RemovableHandle] = []
        implementation = str(getattr(model.config, "_attn_implementation", "sdpa"))
        for part, layer in _first_layers(model).items():
            self._watch(part, layer, implementation)
            if part == "decoder":
                linear = next(m for n, m in layer.named_modules() if n.endswith("qkv_proj"))
                self._handles.append(linear.register_forward_hook(self._see_dtype))

    def _see_dtype(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if module.training:
            self.activation_dtype = DTYPES.get(output.dtype, str(output.dtype))

    def _watch(self, part: str, layer: nn.Module, implementation: str) -> None:
        entered: list[tuple[_Operators, contextlib.ExitStack]] = []

        def enter(module: nn.Module, inputs: Any) -> None:
            if module.training and part not in self.kernels:
                stack = contextlib.ExitStack()
                operators = stack.enter_context(_Operators())
                stack.enter_context(fused.called_within(operators.paused))
                entered.append((operators, stack))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if entered:
                operators, stack = entered.pop()
                stack.close()
                self.kernels[part] = attention_kernel(operators.names, implementation)

        self._handles.append(layer.register_forward_pre_hook(enter))
        self._handles.append(layer.register_forward_hook(leave, always_call=True))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def result(self) -> dict[str, Any]:
        """The observed.json fields that a forward pass shows; null where no such layer ran."""
        return {
            "activation_dtype": self.activation_dtype,
            "attention_decoder": self.kernels.get("decoder"),
            "attention_vision": self.kernels.get("vision"),
        }


def _first_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The first layer of each tower, by module path."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-2:] == ["layers", "0"]:
            found.setdefault("vision" if "vision_embed_tokens" in parts else "decoder", module)
    return found


def size_of(parameter: nn.Parameter) -> int:
    """Elements of a weight; ZeRO 3 leaves an empty tensor and the size beside it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def linear4bit(model: nn.Module) -> tuple[int, int]:
    """Number of bitsandbytes 4-bit layers and the bytes of their packed weights."""
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    return len(layers), sum(int(module.get_parameter("weight").nbytes) for module in layers)


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"CPU ({names[0]})" if names else "CPU"
