"""LoRA layers whose low-rank product is added into the base's output.

PEFT's own layer casts its input to the adapters' float32, and scales and adds the product in passes of their own over
the layer's whole width. Here the product runs in the input's type, is scaled while it is `rank` wide, and is added by
the matrix product itself. Weights, gradients and merging stay PEFT's: float32 factors under PEFT's names.

Shapes: N = rows of the input, I = inputs, O = outputs, r = rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import nn


def _inner_product(x: torch.Tensor, a: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * x a^T [N, r]."""
    return torch.mm(x, a.t()).mul_(scaling)


def _add_product(output: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """output + left @ right; in place on CUDA, where cuBLAS would copy `output` first."""
    return torch.addmm(output, left, right, out=output) if output.is_cuda else torch.addmm(output, left, right)


def _factor_gradients(
    gradient: torch.Tensor, x: torch.Tensor, inner: torch.Tensor, b: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the inner product [N, r], of a [r, I] and of b [O, r], the latter two in float32."""
    to_inner = torch.mm(gradient, b).mul_(scaling)
    return to_inner, torch.mm(to_inner.t(), x).float(), torch.mm(gradient.t(), inner).float()


class _LinearWithProduct(torch.autograd.Function):
    """x W^T + bias + scaling x a^T b^T over a frozen W; the factors come twice: to train, and in x's type."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wide_a: torch.Tensor,
        wide_b: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float,
    ) -> torch.Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        output = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
        inner = _inner_product(rows, a, scaling)
        output = _add_product(output, inner, b.t())
        ctx.save_for_backward(rows, weight, inner, a, b)
        ctx.scaling = scaling
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, inner, a, b = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        to_inner, to_a, to_b = _factor_gradients(flat, rows, inner, b, ctx.scaling)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = _add_product(torch.mm(flat, weight), to_inner, a).view(*gradient.shape[:-1], rows.shape[-1])
        return to_x, None, None, to_a, to_b, None, None, None


class _AddProduct(torch.autograd.Function):
    """output + scaling x a^T b^T for a base layer that computes `output` itself."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, x: torch.Tensor, wide_a: torch.Tensor, wide_b: torch.Tensor,
        a: torch.Tensor, b: torch.Tensor, scaling: float,
    ) -> torch.Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        inner = _inner_product(rows, a, scaling)
        ctx.save_for_backward(rows, inner, a, b)
        ctx.scaling = scaling
        return torch.addmm(output.view(-1, output.shape[-1]), inner, b.t()).view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, inner, a, b = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        to_inner, to_a, to_b = _factor_gradients(flat, rows, inner, b, ctx.scaling)
        to_x = None
        if ctx.needs_input_grad[1]:
            to_x = torch.mm(to_inner, a).view(*gradient.shape[:-1], rows.shape[-1])
        return gradient, to_x, to_a, to_b, None, None, None


class _Factors:
    """A layer's two factors in the compute type, made again once the trained ones have changed."""

    def __init__(self) -> None:
        self._source: tuple[object, ...] = ()
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, a: nn.Parameter, b: nn.Parameter, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """a and b in `dtype`, without gradients."""
        source = (id(a), a._version, id(b), b._version, a.device, dtype)
        if self._made is None or source != self._source:
            self._made, self._source = (a.detach().to(dtype), b.detach().to(dtype)), source
        return self._made


class LoraLinear(lora.Linear):
    """PEFT's layer over a frozen `nn.Linear`; plain LoRA without dropout, all else is left to PEFT."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._factors = _Factors()

    def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """[..., I] to [..., O], in x's type."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *arguments, **options)
        (name,) = self.active_adapters
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        base = self.get_base_layer()
        return _LinearWithProduct.apply(
            x, base.weight, base.bias, a, b, *self._factors.of(a, b, x.dtype), self.scaling[name]
        )


def layers(quantised: bool) -> dict[type[nn.Module], type[nn.Module]]:
    """The layer type for each type of base layer, most special first, as PEFT's custom modules take them.

    quantised: with bitsandbytes' 4-bit layers, which must be installed.
    """
    if not quantised:
        return {nn.Linear: LoraLinear}
    import bitsandbytes

    class LoraLinear4bit(lora.Linear4bit):
        """The same over a 4-bit base, which computes its own output."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._factors = _Factors()

        def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            """[..., I] to [..., O], in x's type."""
            if self.disable_adapters or self.merged:
                return super().forward(x, *arguments, **options)
            (name,) = self.active_adapters
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            return _AddProduct.apply(self.base_layer(x), x, a, b, *self._factors.of(a, b, x.dtype), self.scaling[name])

    return {bitsandbytes.nn.Linear4bit: LoraLinear4bit, nn.Linear: LoraLinear}
