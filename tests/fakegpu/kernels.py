"""Kernels that a CPU build does not choose by itself: SDPA's on CUDA, and torch.compile's fused functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from .device import FakeGpu

aten = torch.ops.aten
_sdpa = F.scaled_dot_product_attention


@contextmanager
def kernels_of(gpu: FakeGpu, capability: tuple[int, int]) -> Iterator[None]:
    """SDPA chooses as on a GPU of this capability, and torch.compile's functions count as one operator each."""
    with (
        mock.patch.object(F, "scaled_dot_product_attention", functools.partial(_attention, gpu, capability)),
        mock.patch.object(torch, "compile", _compile),
        mock.patch("phi3v.model.fused.missing_compiler", return_value=None),
    ):
        yield


def _attention(
    gpu: FakeGpu,
    capability: tuple[int, int],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The choice of ATen/native/transformers/cuda/sdp_utils.cpp: flash, memory-efficient, else the composite.

    query, key, value: [B, H, Q or K, D]. Without cuDNN's kernel, which PyTorch takes on Hopper only when asked.
    """
    if query.device.type != "cuda":
        return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    half = query.dtype in (torch.float16, torch.bfloat16)
    aligned = query.shape[-1] % 8 == 0
    if attn_mask is None and half and aligned and capability >= (8, 0):
        gpu.ledger.kernels["flash"] += 1
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if aligned and not (query.dtype == torch.bfloat16 and capability < (8, 0)):
        gpu.ledger.kernels["efficient"] += 1
        bias = _bias(query, key, attn_mask)
        train = query.requires_grad or key.requires_grad or value.requires_grad
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, train, dropout_p, is_causal, scale=scale
        )[0]
    gpu.ledger.kernels["math"] += 1
    return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _bias(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask as the memory-efficient kernel takes it: [B, H, Q, K] in the type of the query."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _compile(model: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """torch.compile of a pure function: one operator `compiled::NAME` on CUDA tensors, a plain call on CPU tensors."""
    if model is None:
        return functools.partial(_compile, **options)
    function = model

    @functools.wraps(function)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        gpu = FakeGpu.active
        if gpu is not None and any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return gpu.as_one_operator(f"compiled::{function.__name__}", function, args, kwargs)
        return function(*args, **kwargs)

    return compiled
