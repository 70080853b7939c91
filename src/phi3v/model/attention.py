"""The decoder's attention: which tokens see which, LongRoPE by each example's own length, and the three kernels.

Shapes: B = batch rows, Q = query tokens, K = key tokens (cached ones included), H = heads, D = head width,
N = B*Q tokens of a packed batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3Attention

from phi3v.model import fused
from phi3v.model.configuration import Phi3VConfig


@dataclass
class AttentionPlan:
    """Which keys a query sees, computed once a forward pass for all layers.

    `lengths` (packed batches): the examples' token counts in order, summing to N; causal within each. Otherwise
    `mask` [B, 1, Q, K] bool (True = seen) or, where it is None, plain causal attention over the last Q of K keys.
    `padding` [B, K] is kept beside a mask for the flash-attn package, which drops padded tokens itself.
    """

    mask: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    lengths: list[int] | None = None
    cu_seqlens: torch.Tensor | None = None
    """[examples + 1] int32, where each packed example begins and ends, on the batch's device."""
    row_lengths: list[int] | None = None
    """Tokens of each row without padding, if the mask was read on the CPU."""

    @property
    def max_length(self) -> int:
        """Longest example of a packed batch."""
        return max(self.lengths) if self.lengths else 0


def packed_lengths(position_ids: torch.Tensor) -> list[int] | None:
    """Token counts of the examples in a packed batch of position ids [B, Q], or None where no row holds several.

    An example begins where a position does not follow its left neighbour's, and at each row's start.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    first = starts.flatten().nonzero().flatten().tolist()
    if len(first) == len(position_ids):
        return None
    ends = [*first[1:], position_ids.numel()]
    return [end - start for start, end in zip(first, ends, strict=True)]


def plan_attention(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, batch: int, queries: int, past: int
) -> AttentionPlan:
    """The plan for B x `queries` tokens after `past` cached ones.

    attention_mask: [B, past + queries] (1 = token, 0 = padding), a ready [B, 1, Q, K] mask, or None. Packed batches
    are recognised by position ids that start anew, without attention mask and cache.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
        return AttentionPlan(mask=mask)
    if attention_mask is None:
        if past == 0 and position_ids is not None and queries > 1:
            lengths = packed_lengths(position_ids.expand(batch, queries))
            if lengths is not None:
                ends = torch.tensor([0, *lengths], device=position_ids.device).cumsum(0).to(torch.int32)
                return AttentionPlan(lengths=lengths, cu_seqlens=ends)
        return AttentionPlan()
    seen = attention_mask.bool()
    if past + queries != seen.shape[1]:
        raise ValueError(
            f"attention_mask: {seen.shape[1]} columns; expected {past + queries} ({past} cached, {queries} new)."
        )
    # Padding on the right is never seen by a token under causal attention: no mask, and the fast kernels stay open.
    if bool(seen.all()) or (past == 0 and bool((seen[:, 1:] <= seen[:, :-1]).all())):
        return AttentionPlan(row_lengths=seen.sum(1).tolist() if seen.device.type == "cpu" else None)
    keys = past + queries
    position = torch.arange(keys, device=seen.device)
    causal = position[None, :] <= position[past:, None]  # [Q, K]
    # A padding token sees itself, or its softmax would be over nothing.
    itself = position[None, :] == position[past:, None]
    return AttentionPlan(mask=((causal & seen[:, None, :]) | itself)[:, None], padding=seen)


class LongRope:
    """Rotary tables with the short or the long factors for each token.

    Formula of the published code: inverse frequencies 1 / (factor_i * theta^(2i/D)); cos and sin are multiplied by
    sqrt(1 + ln(max / original) / ln(original)), with the short factors as well. Not a module: its tables are float32
    whatever the model is cast to, and none of them is ever on the meta device.
    """

    def __init__(self, config: Phi3VConfig) -> None:
        self.config = config
        self.original = config.original_max_position_embeddings
        self._tables: dict[torch.device, torch.Tensor] = {}
        scale = config.max_position_embeddings / self.original
        self.scaling = (
            math.sqrt(1 + math.log(scale) / math.log(self.original)) if config.rope_scaling and scale > 1 else 1.0
        )

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """Inverse frequencies [2, D/2], float32: row 0 short, row 1 long."""
        if device not in self._tables:
            dim = self.config.head_dim
            exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
            ones = [1.0] * (dim // 2)
            scaling = self.config.rope_scaling or {"short_factor": ones, "long_factor": ones}
            factors = torch.tensor([scaling["short_factor"], scaling["long_factor"]], dtype=torch.float32)
            self._tables[device] = (1.0 / (factors * self.config.rope_theta**exponent)).to(device)
        return self._tables[device]

    @torch.no_grad()
    def __call__(
        self, position_ids: torch.Tensor, is_long: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B or 1, 1, Q, D] at positions [B or 1, Q]; is_long [B, Q] or [B, 1] bool, None = all short."""
        short, long = self.frequencies(position_ids.device)
        inverse = short if is_long is None else torch.where(is_long[..., None], long, short)
        angles = (position_ids[..., None].float() * inverse)[:, None]
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)

    def is_long(
        self,
        plan: AttentionPlan,
        attention_mask: torch.Tensor | None,
        batch: int,
        queries: int,
        past: int,
        device: torch.device,
    ) -> torch.Tensor | None:
        """Which tokens take the long factors, [B, Q], [B, 1] or [1, 1] bool; None where all are short (no transfer)."""
        if past + queries <= self.original:
            return None
        by_example = self.config.longrope_scope == "sequence"
        if by_example and (plan.lengths or plan.row_lengths):
            counts = torch.tensor(plan.lengths or plan.row_lengths)
            long = counts > self.original
            if not bool(long.any()):
                return None
            is_long = long.repeat_interleave(counts).view(batch, queries) if plan.lengths else long[:, None]
            return is_long.to(device, non_blocking=True)
        if attention_mask is not None and by_example:
            if attention_mask.dim() == 4:  # [B, 1, Q, K]: the last query sees its whole example
                attention_mask = plan.mask[:, 0, -1]
            return attention_mask.sum(-1, keepdim=True) > self.original
        return torch.ones((1, 1), dtype=torch.bool, device=device)


class GrowingLayer(DynamicLayer):
    """transformers' growing cache layer with room to grow: a new token is written in place.

    The original joins all keys and values anew with every token, which for a long prompt costs as much memory traffic
    as the attention itself. Beam search and the like, which replace the tensors, get a new buffer.
    """

    room = 64  # tokens; the recipe's evaluation generates as many
    keys: torch.Tensor
    values: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Empty tensors, and nothing behind them yet."""
        super().lazy_initialization(key_states, value_states)
        self._buffers: list[torch.Tensor | None] = [None, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values so far with the new ones [B, H, Q, D] after them: [B, H, K, D]."""
        if key_states.requires_grad or value_states.requires_grad:  # writing in place would break their graph
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        self.keys = self._append(0, self.keys, key_states, past)
        self.values = self._append(1, self.values, value_states, past)
        return self.keys, self.values

    def _append(self, which: int, seen: torch.Tensor, new: torch.Tensor, past: int) -> torch.Tensor:
        batch, heads, queries, width = new.shape
        buffer, total = self._buffers[which], past + queries
        is_ours = buffer is not None and seen.data_ptr() == buffer.data_ptr() and len(buffer) == batch
        if buffer is None or not is_ours or total > buffer.shape[2]:
            buffer = new.new_empty(batch, heads, total + self.room, width)
            if past:
                buffer[:, :, :past] = seen
            self._buffers[which] = buffer
        buffer[:, :, past:total] = new
        return buffer[:, :, :total]


def make_room(cache: Cache | None) -> None:
    """Let an empty plain DynamicCache grow in place; any other cache stays as it is.

    The published windows are longer than all positions, so that layers with a window never forget anything either.
    """
    growing = (DynamicLayer, DynamicSlidingWindowLayer)
    if type(cache) is DynamicCache and not cache.get_seq_length() and not getattr(cache, "offloading", False):
        cache.layers = [GrowingLayer() if type(layer) in growing else layer for layer in cache.layers]


class Phi3VAttention(Phi3Attention):
    """transformers' Phi-3 attention (its weights and names) with packed batches in every kernel."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: AttentionPlan | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [B, Q, hidden] to the same shape; `attention_mask` is the forward pass's plan."""
        batch, queries, _ = hidden_states.shape
        n_heads, n_kv = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv = self.qkv_proj(hidden_states)
        cos, sin = position_embeddings  # [B or 1, 1, Q, D]
        if self.training and fused.available(qkv):
            query, key, value = fused.split_and_rotate(qkv, cos, sin, n_heads, n_kv)
        else:
            query, key, value = fused.split_heads(qkv, n_heads, n_kv)  # [B, H, Q, D]
            query, key = fused.rotate(query, cos, sin), fused.rotate(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        dropout = self.attention_dropout if self.training else 0.0
        output = attend(self, query, key, value, attention_mask or AttentionPlan(), self.scaling, dropout)
        return self.o_proj(output.reshape(batch, queries, -1)), None


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Attention of query [B, H, Q, D] over key, value [B, H_kv, K, D] by the module's implementation: [B, Q, H, D]."""
    implementation = module.config._attn_implementation
    if implementation.startswith("flash_attention"):
        return _flash(module, implementation, query, key, value, plan, scaling, dropout)
    if plan.lengths is not None:
        return _packed(module, query, key, value, plan, scaling, dropout)
    groups = query.shape[1] // key.shape[1]
    causal = plan.mask is None and query.shape[2] > 1
    mask = plan.mask
    if (
        causal and key.shape[2] > query.shape[2]
    ):  # queries are the last of the keys; SDPA's own flag counts from the first
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask, causal = mask.tril(key.shape[2] - query.shape[2]), False
    if implementation == "eager":
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return eager_attention(query, key, value, mask, causal, scaling, dropout).transpose(1, 2)
    # CPU kernels take grouped heads without a copy for plain causal attention; with a mask they fall back to slow ones.
    grouped = {"enable_gqa": True} if groups > 1 and mask is None else {}
    if groups > 1 and not grouped:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling, **grouped
    )
    return output.transpose(1, 2)


def eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Plain matrix products with the softmax in float32: [B, H, Q, D], the reference for the other kernels."""
    scores = (query @ key.transpose(2, 3)) * scaling
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, p=dropout, training=dropout > 0) @ value


def _packed(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Causal attention within each example of a packed batch: [B, Q, H, D]."""
    batch, heads, queries, width = query.shape
    flat = [
        x.transpose(1, 2).reshape(1, batch * queries, x.shape[1], width).transpose(1, 2) for x in (query, key, value)
    ]
    if module.config._attn_implementation == "sdpa" and dropout == 0 and _has_varlen_kernel(query):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in flat)  # [N, H, D]
        ends, longest = plan.cu_seqlens, plan.max_length
        output = varlen_attn(
            q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=heads > k.shape[1]
        )
        return output.view(batch, queries, heads, width)
    pieces = [
        attend(module, q, k, v, AttentionPlan(), scaling, dropout)
        for q, k, v in zip(*(x.split(plan.lengths, dim=2) for x in flat), strict=True)
    ]
    return torch.cat(pieces, dim=1).view(batch, queries, heads, width)


def _has_varlen_kernel(query: torch.Tensor) -> bool:
    """Whether torch's own flash kernel for packed batches runs here: Ampere or newer, half precision."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _flash(
    module: nn.Module,
    implementation: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """The flash-attn package, through transformers: [B, Q, H, D]."""
    kernel = ALL_ATTENTION_FUNCTIONS[implementation]
    batch, heads, queries, width = query.shape
    packed = {}
    if plan.lengths is not None:
        query, key, value = (
            x.transpose(1, 2).reshape(1, batch * queries, x.shape[1], width).transpose(1, 2)
            for x in (query, key, value)
        )
        ends, longest = plan.cu_seqlens, plan.max_length
        packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    output, _ = kernel(
        module, query, key, value, plan.padding, dropout=dropout, scaling=scaling, is_causal=True, **packed
    )
    return output.reshape(batch, queries, heads, width)
