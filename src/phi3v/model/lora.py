"""LoRA layers that add the low-rank product directly to the base's output.

PEFT's own layer casts its input to the adapters' float32, and scales and adds the product in passes of their own over
the layer's whole width. Here the product runs in the input's type, is scaled while it is `rank` wide, and is added by
the matrix product itself. Weights, gradients and merging stay PEFT's: float32 factors under PEFT's names.

Shapes: N = rows of the input, I = inputs, O = outputs, r = rank.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

import torch
from peft.tuners import lora
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from phi3v.model.fused import Context


class _Factors(NamedTuple):
    """A layer's factors for its products, in the compute dtype and without gradients."""

    a: torch.Tensor
    """[r, I], times the scale."""
    b: torch.Tensor
    """[O, r]."""
    a_t: torch.Tensor
    b_t: torch.Tensor
    weight_t: torch.Tensor | None
    """[I, O], a view of the base's weight. None if the base computes its own output."""
    scale: torch.Tensor
    """[1] float32."""


class _Prepared:
    """Computes a layer's `_Factors`, and computes them again after the trained ones have changed.

    A change in place changes a tensor's version, except through `.data` and in a fused optimizer. Every optimizer's
    step counts as a change.
    """

    steps: ClassVar[int] = 0
    """Number of steps of all optimizers in this process."""

    @classmethod
    def after_step(
        cls, optimizer: torch.optim.Optimizer, arguments: tuple[object, ...], options: dict[str, object]
    ) -> None:
        """A hook that PyTorch calls after each step of any optimizer."""
        cls.steps += 1

    def __init__(self) -> None:
        self._base: tuple[object, ...] = ()
        self._trained: tuple[object, ...] = ()
        self._factors: _Factors

    def factors(
        self, a: nn.Parameter, b: nn.Parameter, weight: torch.Tensor | None, dtype: torch.dtype, scale: float
    ) -> _Factors:
        """Factors of the trained a [r, I] and b [O, r], and the base's frozen weight [O, I]."""
        base = (dtype, scale, a.device, None if weight is None else _mark(weight))
        trained = (self.steps, _mark(a), _mark(b))
        with torch.inference_mode(False), torch.no_grad():
            if base != self._base:
                own_a, own_b = torch.empty_like(a, dtype=dtype), torch.empty_like(b, dtype=dtype)
                weight_t = None if weight is None else weight.t()
                one = torch.full((1,), scale, device=a.device)
                self._factors = _Factors(own_a, own_b, own_a.t(), own_b.t(), weight_t, one)
                self._base, self._trained = base, ()
            if trained != self._trained:
                torch.mul(a, scale, out=self._factors.a)
                self._factors.b.copy_(b)
                self._trained = trained
        return self._factors


def _mark(tensor: torch.Tensor) -> tuple[object, ...]:
    """A value that changes if a tensor is replaced, modified in place, or moved."""
    return id(tensor), tensor._version, tensor.device, tensor.dtype


register_optimizer_step_post_hook(_Prepared.after_step)


def _add_product(output: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """output + left @ right; in place on CUDA, where cuBLAS would copy `output` first."""
    return torch.addmm(output, left, right, out=output) if output.is_cuda else torch.addmm(output, left, right)


def _factor_gradients(
    gradient: torch.Tensor, rows: torch.Tensor, inner: torch.Tensor, own_b: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of the inner product over the scale [N, r], and float32 ones of a [r, I] and b [O, r]."""
    to_inner = torch.mm(gradient, own_b)
    to_a = torch.mm(to_inner.t(), rows) * scale  # a float32 vector of one element makes it float32
    return to_inner, to_a, torch.mm(gradient.t(), inner).float()


class _Context(Context, Protocol):
    scale: torch.Tensor


class _LinearWithProduct(torch.autograd.Function):
    """x W^T + bias + scale x a^T b^T over a frozen W. The gradients of a and b are those of the trained factors."""

    @staticmethod
    def forward(
        ctx: _Context,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: nn.Parameter,
        b: nn.Parameter,
        factors: _Factors,
    ) -> torch.Tensor:
        rows, weight_t = x.reshape(-1, x.shape[-1]), factors.weight_t
        assert weight_t is not None
        output = torch.mm(rows, weight_t) if bias is None else torch.addmm(bias, rows, weight_t)
        inner = torch.mm(rows, factors.a_t)
        output = _add_product(output, inner, factors.b_t)
        # The factors too: changed before the backward pass, they are an error and not a wrong gradient.
        ctx.save_for_backward(rows, weight, inner, factors.a, factors.b)
        ctx.scale = factors.scale
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: _Context, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, inner, own_a, own_b = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        to_inner, to_a, to_b = _factor_gradients(flat, rows, inner, own_b, ctx.scale)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = _add_product(torch.mm(flat, weight), to_inner, own_a)
            to_x = to_x.view(*gradient.shape[:-1], rows.shape[-1])
        return to_x, None, None, to_a, to_b, None


class _AddProduct(torch.autograd.Function):
    """output + scale x a^T b^T for a base layer that computes `output` itself."""

    @staticmethod
    def forward(
        ctx: _Context, output: torch.Tensor, x: torch.Tensor, a: nn.Parameter, b: nn.Parameter, factors: _Factors
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = torch.mm(rows, factors.a_t)
        ctx.save_for_backward(rows, inner, factors.a, factors.b)
        ctx.scale = factors.scale
        return torch.addmm(output.view(-1, output.shape[-1]), inner, factors.b_t).view_as(output)

    @staticmethod
    def backward(ctx: _Context, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, inner, own_a, own_b = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        to_inner, to_a, to_b = _factor_gradients(flat, rows, inner, own_b, ctx.scale)
        to_x = None
        if ctx.needs_input_grad[1]:
            to_x = torch.mm(to_inner, own_a).view(*gradient.shape[:-1], rows.shape[-1])
        return gradient, to_x, to_a, to_b, None


def _product_first(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Same as `_LinearWithProduct`, but with the base's product last, so that recomputation can stop before it.

    Non-reentrant checkpointing stops as soon as everything for the backward pass is available. PyTorch's own products
    save their inputs before they run, but a custom function saves them afterwards. The cost is a sum of two input
    gradients.
    """
    rows = x.reshape(-1, x.shape[-1])
    inner = torch.mm(rows, a.to(x.dtype).t()) * scaling
    up = b.to(x.dtype).t()
    product = torch.mm(inner, up) if bias is None else torch.addmm(bias, inner, up)
    return torch.addmm(product, rows, weight.t()).view(*x.shape[:-1], -1)


class _LoraLayer(lora.LoraLayer):
    """Plain LoRA without dropout. PEFT's layer, which is next in the method resolution order, does everything else."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self._prepared = _Prepared()

    def forward(self, x: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        """[..., I] to [..., O], in x's type."""
        if self.disable_adapters or self.merged or not self._takes(x):
            return super().forward(x, *arguments, **options)
        (name,) = self.active_adapters
        return self._output(x, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])

    def _takes(self, x: torch.Tensor) -> bool:
        return True

    def _output(self, x: torch.Tensor, a: nn.Parameter, b: nn.Parameter, scaling: float) -> torch.Tensor:
        """The product with a base that computes its own output."""
        return _AddProduct.apply(self.base_layer(x), x, a, b, self._prepared.factors(a, b, None, x.dtype, scaling))


class LoraLinear(_LoraLayer, lora.Linear):
    """PEFT's layer over a frozen `nn.Linear`."""

    ends_checkpoint = False
    """Whether it is the last layer of a checkpointed block."""

    def _takes(self, x: torch.Tensor) -> bool:
        return x.dtype == self.get_base_layer().weight.dtype  # else under autocast, and PEFT converts

    def _output(self, x: torch.Tensor, a: nn.Parameter, b: nn.Parameter, scaling: float) -> torch.Tensor:
        base = self.get_base_layer()
        if self.ends_checkpoint:
            return _product_first(x, base.weight, base.bias, a, b, scaling)
        factors = self._prepared.factors(a, b, base.weight, x.dtype, scaling)
        return _LinearWithProduct.apply(x, base.weight, base.bias, a, b, factors)


def layers(quantised: bool) -> dict[type[nn.Module], type[nn.Module]]:
    """The layer type for each type of base layer, most specific first, as PEFT's custom modules expect it.

    quantised: with bitsandbytes' 4-bit layers, which must be installed.
    """
    if not quantised:
        return {nn.Linear: LoraLinear}
    import bitsandbytes

    class LoraLinear4bit(_LoraLayer, lora.Linear4bit):
        """PEFT's layer over a 4-bit base."""

    return {bitsandbytes.nn.Linear4bit: LoraLinear4bit, nn.Linear: LoraLinear}
