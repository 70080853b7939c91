"""float16 matrix products on a CPU as a GPU's tensor cores do them: float16 operands, float32 sums, float16 results.

CPUs without float16 arithmetic run PyTorch's own float16 products at 7-20 GFLOP/s a core (float32: 95). Widening the
operands is exact, so only the order of the sums differs. Sources: NVIDIA, V100 GPU architecture white paper (tensor
cores: FP16 multiply, FP32 accumulate).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY: torch.library.Library | None = None


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dtype == torch.float16:
        return torch.mm(a.float(), b.float()).half()
    return torch.ops.aten.mm.out(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dtype == torch.float16:
        return torch.bmm(a.float(), b.float()).half()
    return torch.ops.aten.bmm.out(a, b, out=a.new_empty(a.shape[0], a.shape[1], b.shape[2]))


def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    if a.dtype == torch.float16:
        return torch.addmm(bias.float(), a.float(), b.float(), beta=beta, alpha=alpha).half()
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.ops.aten.addmm.out(bias, a, b, beta=beta, alpha=alpha, out=out)


def _conv2d(
    images: torch.Tensor,
    weight: torch.Tensor,
    kernel: list[int],
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
) -> torch.Tensor:
    """Reached by float16 alone: other types have faster convolutions."""
    wide = None if bias is None else bias.float()
    return torch.nn.functional.conv2d(images.float(), weight.float(), wide, stride, padding).to(images.dtype)


def _conv2d_backward(
    gradient: torch.Tensor, images: torch.Tensor, weight: torch.Tensor, kernel: list[int], stride: list[int], padding: list[int],
    wanted: list[bool],
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    wide = torch.ops.aten.convolution_backward(
        gradient.float(),
        images.float(),
        weight.float(),
        [weight.shape[0]],
        stride,
        padding,
        [1, 1],
        False,
        [0, 0],
        1,
        wanted,
    )
    return tuple(None if part is None else part.to(images.dtype) for part in wide)


def use_float32_sums() -> None:
    """Let every later float16 product and convolution of this process on a CPU widen its operands; safe to call twice."""
    global _LIBRARY
    if _LIBRARY is not None:
        return
    kernels: dict[str, Callable[..., Any]] = {
        "mm": _mm, "bmm": _bmm, "addmm": _addmm,
        "_slow_conv2d_forward": _conv2d, "_slow_conv2d_backward.output_mask": _conv2d_backward,
    }  # fmt: skip
    _LIBRARY = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # PyTorch says once that kernels are overridden, which is the purpose.
        warnings.simplefilter("ignore", UserWarning)
        for name, kernel in kernels.items():
            _LIBRARY.impl(name, kernel, "CPU")
