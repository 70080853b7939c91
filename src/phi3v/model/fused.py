"""Fuses norm, gate, activation and rotation of a layer into one kernel each, forward and backward, on CUDA.

Plain PyTorch runs each of them as four to eight operators, and each operator reads and writes whole activations. Here,
each direction is one pure function that `torch.compile` turns into one kernel. The backward formulas are written out,
so only the inputs are saved. Other devices use the plain operators, which are the reference (tests/test_model_fused).

Shapes: B = batch rows, Q = tokens, H = heads, D = head width, W = any width.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Generic, ParamSpec, Protocol, TypeVar

import torch
from torch import nn
from transformers.models.phi3.modeling_phi3 import Phi3MLP, Phi3RMSNorm

P = ParamSpec("P")
R = TypeVar("R")

RECOMPILE_LIMIT = 64
"""Most compilations of a kernel. Sizes of 1 and equal sizes each need a separate one. Then the plain function runs."""
AMPERE = (8, 0)
"""Compute capability from which NVIDIA GPUs have bfloat16 tensor cores (CUDA C++ Programming Guide, table of arithmetic
instructions), flash attention kernels (PyTorch's sdp_utils, flash-attn), and Triton (its README, "Supported
Hardware")."""


@functools.cache
def missing_compiler() -> str | None:
    """Name of what is missing to compile kernels, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton"
    if not any(shutil.which(name) for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name):
        return "a C compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's C headers"
    return None


def is_ampere(device: torch.device) -> bool:
    """Whether a device is an Ampere or newer GPU, or any ROCm GPU, whose capability numbers differ from NVIDIA's."""
    if device.type != "cuda":
        return False
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= AMPERE


def available(x: torch.Tensor) -> bool:
    """Whether the fused kernels run on `x`: a GPU that Triton supports, Triton and a C compiler."""
    return x.is_cuda and missing_compiler() is None and is_ampere(x.device)


class Context(Protocol):
    """Context that PyTorch passes to both directions of an autograd function."""

    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    backward_kernel: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        """Saves tensors for the backward pass."""


class _Compiled(Generic[P, R]):
    """A pure function that is compiled at its first call, because importing the compiler takes seconds."""

    around: ClassVar[Callable[[], contextlib.AbstractContextManager[None]]] = contextlib.nullcontext

    def __init__(self, function: Callable[P, R]) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    @functools.cached_property
    def compiled(self) -> Callable[P, R]:
        """One kernel for tensors of any shape."""
        # The kernels are few and small, so starting compiler processes for each GPU would take longer.
        threads = int(os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", "1"))
        compiler: Callable[..., Callable[P, R]] = torch.compile  # its types lack recompile_limit
        options = {"compile_threads": threads}
        return compiler(self.function, dynamic=True, options=options, recompile_limit=RECOMPILE_LIMIT)

    def __call__(self, *arguments: P.args, **options: P.kwargs) -> R:
        with type(self).around():
            return self.compiled(*arguments, **options)


def compiled_kernels() -> list[str]:
    """Names of the kernels that this process has compiled. Empty if compilation is off."""
    if os.environ.get("TORCH_COMPILE_DISABLE", "0") == "1":
        return []
    return sorted(
        name for name, kernel in globals().items() if isinstance(kernel, _Compiled) and "compiled" in vars(kernel)
    )


@contextlib.contextmanager
def called_within(around: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Wraps every kernel call in the context manager `around`.

    A TorchDispatchMode must be suspended for kernel calls. TorchDynamo does not compile under such a mode, and never
    retries a function that it first met there.
    """
    before, _Compiled.around = _Compiled.around, staticmethod(around)
    try:
        yield
    finally:
        _Compiled.around = staticmethod(before)


class _Elementwise(torch.autograd.Function):
    """A kernel of one tensor. Its backward kernel takes the gradient and that tensor."""

    @staticmethod
    def forward(
        ctx: Context,
        x: torch.Tensor,
        forward_kernel: Callable[[torch.Tensor], torch.Tensor],
        backward_kernel: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.backward_kernel = backward_kernel
        return forward_kernel(x)

    @staticmethod
    def backward(ctx: Context, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.backward_kernel(gradient, *ctx.saved_tensors), None, None


# RMSNorm ----------------------------------------------------------------------------------------------------------


@_Compiled
def rms_norm_forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """y = weight * x / rms(x) over the last dimension W, and 1 / rms [..., 1] in float32; Phi-3's order of rounding."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * inverse).to(x.dtype), inverse


@_Compiled
def rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor
) -> torch.Tensor:
    """Gradient of x: (w g - n mean(w g n)) / rms with n = x / rms."""
    normal, scaled = x.float() * inverse, gradient.float() * weight.float()
    return ((scaled - normal * (scaled * normal).mean(-1, keepdim=True)) * inverse).to(x.dtype)


@_Compiled
def rms_norm_weight_backward(gradient: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Gradient of the weight [W]: the sum of g n over all rows."""
    product = gradient.float() * (x.float() * inverse)
    return product.flatten(0, -2).sum(0).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, inverse = rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Context, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad[:2]
        return (
            rms_norm_backward(gradient, x, weight, inverse) if to_x else None,
            rms_norm_weight_backward(gradient, x, inverse) if to_weight else None,
            None,
        )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Phi-3's RMSNorm of x [..., W]."""
    return _RMSNorm.apply(x, weight, eps)


class RMSNorm(Phi3RMSNorm):
    """transformers' norm, in one kernel for each direction if training on CUDA."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., W] to the same shape and type."""
        if self.training and available(hidden_states):
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


# SwiGLU -----------------------------------------------------------------------------------------------------------


@_Compiled
def swiglu_forward(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [..., 2W] (gate first) as [..., W]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return up * torch.nn.functional.silu(gate)


@_Compiled
def swiglu_backward(gradient: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Gradient of gate and up, [..., 2W]."""
    gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
    wide, share = gradient.float(), torch.sigmoid(gate)
    to_gate = wide * up * share * (1 + gate * (1 - share))
    return torch.cat((to_gate, wide * gate * share), dim=-1).to(gate_up.dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of gate and up side by side: [..., 2W] to [..., W]."""
    return _Elementwise.apply(gate_up, swiglu_forward, swiglu_backward)


class GatedMLP(nn.Module):
    """The linear layers of transformers' Phi-3 feed-forward block with their gate in one kernel, if training on
    CUDA."""

    def __init__(self, mlp: Phi3MLP) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.activation_fn = mlp.gate_up_proj, mlp.down_proj, mlp.activation_fn
        self.is_silu = mlp.config.hidden_act == "silu"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, Q, W] to the same shape."""
        gate_up = self.gate_up_proj(hidden_states)
        if self.is_silu and self.training and available(gate_up):
            return self.down_proj(swiglu(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


# Quick GELU -------------------------------------------------------------------------------------------------------


@_Compiled
def quick_gelu_forward(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x) (Hendrycks and Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


@_Compiled
def quick_gelu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gradient of x."""
    wide, share = x.float(), torch.sigmoid(1.702 * x.float())
    return (gradient.float() * share * (1 + 1.702 * wide * (1 - share))).to(x.dtype)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), elementwise."""
    return _Elementwise.apply(x, quick_gelu_forward, quick_gelu_backward)


class QuickGELU(nn.Module):
    """CLIP's activation, in one kernel for each direction if training on CUDA."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise on a tensor of any shape."""
        return quick_gelu(x) if self.training and available(x) else x * torch.sigmoid(1.702 * x)


# Rotary embedding -------------------------------------------------------------------------------------------------


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [B, H, Q, D] with cos, sin [B or 1, 1, Q, D] (halves, not interleaved pairs)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


@_Compiled
def rotate_forward(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both rotated."""
    return rotate(query, cos, sin), rotate(key, cos, sin)


@_Compiled
def rotate_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Gradients [B, H, Q, D] of rotated queries and keys, and of values, as that of their product [B, Q, 3 H D].

    The second half of a rotary table repeats its first, so the transposed rotation turns by the opposite angle.
    """
    back = (rotate(query, cos, -sin), rotate(key, cos, -sin), value)
    return torch.cat(back, dim=1).transpose(1, 2).flatten(2)


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = split_heads(qkv, heads, kv_heads)
        ctx.save_for_backward(cos, sin)
        query, key = rotate_forward(query, key, cos, sin)
        return query, key, value

    @staticmethod
    def backward(
        ctx: Context, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None]:
        return rotate_backward(query, key, value, *ctx.saved_tensors), None, None, None, None


def split_heads(qkv: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    """Queries [B, H, Q, D], keys and values [B, H_kv, Q, D], views of their product [B, Q, (H + 2 H_kv) D]."""
    batch, queries, _ = qkv.shape
    split = qkv.view(batch, queries, heads + 2 * kv_heads, -1).transpose(1, 2)
    return split.split((heads, kv_heads, kv_heads), dim=1)


def split_and_rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`split_heads` with queries and keys rotated by cos, sin [B or 1, 1, Q, D]; the values stay a view."""
    return _SplitAndRotate.apply(qkv, cos, sin, heads, kv_heads)
