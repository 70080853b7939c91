"""Patches of libraries that the model needs. tests/test_model_compat fails as soon as one is unnecessary."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable

import torch
from torch import nn

_LIBRARY: torch.library.Library | None = None


def widen_float16_products(device: torch.device, dtype: torch.dtype) -> None:
    """Makes float16 products and convolutions on a CPU sum in float32, like a GPU's tensor cores. No effect elsewhere.

    Upstream: https://github.com/pytorch/pytorch/issues/146508. CPUs without float16 arithmetic run PyTorch's own
    float16 products at 2-13 GFLOP/s per core (float32: 60-95), so a micro-step of the demo takes five times as long.
    Widening the operands is exact. The kernels stay registered until the process ends. Calling this twice is safe.
    """
    global _LIBRARY
    if device.type != "cpu" or dtype != torch.float16 or _LIBRARY is not None:
        return
    aten = torch.ops.aten
    kernels: dict[str, Callable[..., object]] = {
        "mm": _widened(torch.mm, aten.mm.out),
        "bmm": _widened(torch.bmm, aten.bmm.out),
        "addmm": _widened(torch.addmm, aten.addmm.out),
        "_slow_conv2d_forward": _conv2d,
        "_slow_conv2d_backward.output_mask": _conv2d_backward,
    }
    _LIBRARY = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # PyTorch warns that kernels are overridden, which is the purpose.
        warnings.simplefilter("ignore", UserWarning)
        for name, kernel in kernels.items():
            _LIBRARY.impl(name, kernel, "CPU")


def _widened(product: Callable[..., torch.Tensor], out: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A kernel of `product` that widens float16. Other dtypes use PyTorch's own kernel, through its `out` variant."""

    def kernel(*operands: torch.Tensor, **factors: float) -> torch.Tensor:
        if operands[-1].dtype == torch.float16:
            return product(*(operand.float() for operand in operands), **factors).half()
        return out(*operands, **factors, out=operands[-1].new_empty(0))

    return kernel


def _conv2d(
    images: torch.Tensor,
    weight: torch.Tensor,
    _: list[int],
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
) -> torch.Tensor:
    """PyTorch only calls this kernel for float16, because other dtypes have faster ones."""
    wide = None if bias is None else bias.float()
    return nn.functional.conv2d(images.float(), weight.float(), wide, stride, padding).half()


def _conv2d_backward(
    gradient: torch.Tensor, images: torch.Tensor, weight: torch.Tensor, _: list[int], *rest: list[int]
) -> tuple[torch.Tensor | None, ...]:
    """rest: stride, padding, and which of the gradients of images, weight and bias are wanted."""
    stride, padding, wanted = rest
    wide = torch.ops.aten.convolution_backward(
        gradient.float(),
        images.float(),
        weight.float(),
        [len(weight)],
        stride,
        padding,
        [1, 1],
        False,
        [0, 0],
        1,
        wanted,
    )
    return tuple(None if part is None else part.half() for part in wide)


def import_bitsandbytes() -> None:
    """Imports bitsandbytes, if installed, without running a kernel from a hub repository. Call before importing PEFT.

    On CPUs with AVX-512 BF16 its import calls `kernels.get_kernel("kernels-community/…")` if the package `kernels` is
    installed, else it logs a warning in every process. No setting turns it off (bitsandbytes/backends/cpu/ops.py). A
    None in sys.modules is Python's way to say that a module cannot be imported (Python reference, 5.3.1).
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "kernels"}
    sys.modules["kernels"] = None  # type: ignore[assignment]
    with contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401
    del sys.modules["kernels"]
    sys.modules.update(hidden)


def keep_nf4_unpacked(model: nn.Module) -> None:
    """Keeps bitsandbytes' 4-bit layers in the layout that training reads.

    On CPUs with AVX-512 BF16 bitsandbytes repacks a layer at its first forward pass in eval mode, with scales rounded
    to bfloat16. A validation would change the weights that training continues with, and narrow layers fail. Upstream:
    https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804 (where it came in), issue 2078 (the same packing).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
