"""The decoder's attention: LongRoPE by the length of each example, the key-value cache, and the three kernels.

Shapes: B = batch rows, Q = query tokens, K = key tokens (cached ones included), H = heads, D = head width,
N = B*Q tokens of a packed batch.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3Attention

from phi3v.model import fused
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.layout import AttentionPlan


class LongRope:
    """Rotary tables with the short or the long factors for each token.

    Formula of the published code: inverse frequencies 1 / (factor_i * theta^(2i/D)); cos and sin are multiplied by
    sqrt(1 + ln(max / original) / ln(original)), with the short factors as well. Not a module, so that its tables stay
    float32 when the model is cast, and are never on the meta device.
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
        """cos and sin [B or 1, 1, Q, D] at positions [B or 1, Q]. is_long: [B, Q] or [B, 1] bool, or None if all are
        short."""
        short, long = self.frequencies(position_ids.device)
        inverse = short if is_long is None else torch.where(is_long[..., None], long, short)
        angles = (position_ids[..., None].float() * inverse)[:, None]
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)

    def is_long(
        self, plan: AttentionPlan, batch: int, queries: int, past: int, device: torch.device
    ) -> torch.Tensor | None:
        """Whether each token uses the long factors, [B, Q], [B, 1] or [1, 1] bool. None if all use the short ones."""
        if past + queries <= self.original:
            return None
        lengths = plan.lengths or plan.row_lengths
        if self.config.longrope_scope == "batch" or lengths is None:
            return torch.ones((1, 1), dtype=torch.bool, device=device)
        counts = torch.as_tensor(lengths)
        long = counts > self.original
        if long.device.type == "cpu" and not bool(long.any()):
            return None
        is_long = long.repeat_interleave(counts).view(batch, queries) if plan.lengths else long[:, None]
        return is_long.to(device, non_blocking=True)


class GrowingLayer(DynamicLayer):
    """transformers' growing cache layer with spare capacity, so that a new token is written in place.

    The original concatenates all keys and values for every token. For a long prompt, this costs as much memory traffic
    as the attention itself. Beam search and similar methods replace the tensors and get a new buffer.
    """

    room = 64  # tokens; the recipe's evaluation generates as many
    keys: torch.Tensor
    values: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Initialises empty tensors without a buffer."""
        super().lazy_initialization(key_states, value_states)
        self._buffers: list[torch.Tensor | None] = [None, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends new keys and values [B, H, Q, D]. Returns all keys and values [B, H, K, D]."""
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
    """Makes an empty plain DynamicCache grow in place. Other caches stay unchanged.

    The published windows are longer than all positions, so layers with a window keep all tokens too.
    """
    growing = (DynamicLayer, DynamicSlidingWindowLayer)
    if (
        cache is not None
        and type(cache) is DynamicCache
        and not cache.get_seq_length()
        and not getattr(cache, "offloading", False)
    ):
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
        """Maps hidden_states [B, Q, hidden] to the same shape. attention_mask: the AttentionPlan of the forward
        pass."""
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
        output = self.attend(query, key, value, attention_mask or AttentionPlan())
        return self.o_proj(output.reshape(batch, queries, -1)), None

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """Attention of query [B, H, Q, D] over key, value [B, H_kv, K, D] by the configured kernel: [B, Q, H, D]."""
        implementation = self.config._attn_implementation
        if implementation.startswith("flash_attention"):
            return self._flash(query, key, value, plan)
        if plan.lengths is not None:
            return self._packed(query, key, value, plan)
        groups, dropout = query.shape[1] // key.shape[1], self._dropout()
        causal, mask = plan.mask is None and query.shape[2] > 1, plan.mask
        if causal and key.shape[2] > query.shape[2]:
            # The queries belong to the last keys, but SDPA's is_causal flag aligns them with the first.
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            mask, causal = mask.tril(key.shape[2] - query.shape[2]), False
        # CPU kernels take grouped heads without a copy for plain causal attention; with a mask they fall back to slow
        # ones.
        grouped = groups > 1 and mask is None and implementation != "eager"
        if groups > 1 and not grouped:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        if implementation == "eager":
            return eager_attention(query, key, value, mask, causal, self.scaling, dropout).transpose(1, 2)
        options = {"enable_gqa": True} if grouped else {}
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=self.scaling, **options
        )
        return output.transpose(1, 2)

    def _dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0

    def _packed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """Causal attention within each example of a packed batch: [B, Q, H, D]."""
        batch, heads, queries, width = query.shape
        flat = [_in_one_row(x) for x in (query, key, value)]
        if self.config._attn_implementation == "sdpa" and self._dropout() == 0 and _has_varlen_kernel(query):
            from torch.nn.attention.varlen import varlen_attn

            q, k, v = (x[0].transpose(0, 1) for x in flat)  # [N, H, D]
            ends, longest, gqa = plan.cu_seqlens, plan.max_length, heads > k.shape[1]
            assert ends is not None
            bounds, causal = (ends, ends, longest, longest), (-1, 0)
            output = varlen_attn(q, k, v, *bounds, scale=self.scaling, window_size=causal, enable_gqa=gqa)
            assert isinstance(output, torch.Tensor)
            return output.view(batch, queries, heads, width)
        pieces = zip(*(x.split(plan.lengths, dim=2) for x in flat), strict=True)
        output = torch.cat([self.attend(q, k, v, AttentionPlan()) for q, k, v in pieces], dim=1)
        return output.view(batch, queries, heads, width)

    def _flash(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """The flash-attn package, through transformers: [B, Q, H, D]."""
        kernel = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        batch, heads, queries, width = query.shape
        packed = {}
        if plan.lengths is not None:
            query, key, value = (_in_one_row(x) for x in (query, key, value))
            ends, longest = plan.cu_seqlens, plan.max_length
            packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        output, _ = kernel(
            self,
            query,
            key,
            value,
            plan.padding,
            dropout=self._dropout(),
            scaling=self.scaling,
            is_causal=True,
            **packed,
        )
        return output.reshape(batch, queries, heads, width)


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


def _in_one_row(x: torch.Tensor) -> torch.Tensor:
    """[B, H, Q, D] as [1, H, B*Q, D]."""
    batch, heads, queries, width = x.shape
    return x.transpose(1, 2).reshape(1, batch * queries, heads, width).transpose(1, 2)


def _has_varlen_kernel(query: torch.Tensor) -> bool:
    """Whether PyTorch's flash kernel for packed batches supports this: Ampere or newer, half precision."""
    return query.dtype in (torch.float16, torch.bfloat16) and fused.is_ampere(query.device)
