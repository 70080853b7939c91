"""Attention plans, kernels against each other, LongRoPE factors by each example's own length."""

import math

import pytest
import torch
from golden.helpers import tiny_folder

from phi3v.model import Phi3VConfig
from phi3v.model.attention import LongRope, Phi3VAttention, eager_attention
from phi3v.model.fused import rotate
from phi3v.model.layout import AttentionPlan, packed_lengths, plan_attention


def attention(implementation: str) -> Phi3VAttention:
    """A module whose kernels are called directly; its weights and head counts do not matter."""
    config = Phi3VConfig(hidden_size=16, num_attention_heads=2, vocab_size=64, pad_token_id=0)
    config._attn_implementation = implementation
    module = Phi3VAttention(config, 0)
    module.scaling = 0.3
    return module


def qkv(tokens: int, keys: int | None = None, heads: int = 4, kv_heads: int = 2, batch: int = 1):
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads, tokens), (kv_heads, keys or tokens), (kv_heads, keys or tokens))
    return [torch.randn(batch, h, t, 8, generator=generator) for h, t in sizes]


def slow(query, key, value, seen) -> torch.Tensor:
    """[B, Q, H, D] with an explicit loop over queries; seen [B, Q, K] bool."""
    groups = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query)
    for b, h, q in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        keep = seen[b, q]
        scores = key[b, h // groups][keep] @ query[b, h, q] * 0.3
        out[b, h, q] = scores.softmax(0) @ value[b, h // groups][keep]
    return out.transpose(1, 2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_kernels_against_the_slow_version(implementation, kv_heads):
    module = attention(implementation)
    lengths = [3, 1, 5]
    query, key, value = qkv(9, kv_heads=kv_heads)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None]
    example = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    own = causal & (example[:, None] == example[None, :])
    plain = module.attend(query, key, value, AttentionPlan())
    torch.testing.assert_close(plain, slow(query, key, value, causal))
    packed = module.attend(query, key, value, AttentionPlan(lengths=lengths))
    torch.testing.assert_close(packed, slow(query, key, value, own))
    # The last 2 of 9 tokens, the others cached.
    last = module.attend(query[:, :, -2:], key, value, AttentionPlan())
    torch.testing.assert_close(last, slow(query[:, :, -2:], key, value, causal[:, -2:]))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_padded_rows(implementation, padding):
    mask = {
        "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
        "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        "holes": [[1, 0, 1, 0, 1], [1, 1, 1, 1, 1]],
    }[padding]
    mask = torch.tensor(mask)
    query, key, value = qkv(5, batch=2)
    plan = plan_attention(mask, None, 2, 5, 0)
    assert (plan.mask is None) == (padding == "right")  # padding on the right needs no mask under causal attention
    got = attention(implementation).attend(query, key, value, plan)
    seen = torch.ones(5, 5, dtype=torch.bool).tril() & mask[:, None].bool() | torch.eye(5, dtype=torch.bool)
    expected = slow(query, key, value, seen)
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real])
    assert torch.isfinite(got).all()


def test_packed_batches_are_recognised():
    assert packed_lengths(torch.tensor([[0, 1, 2, 3]])) is None
    assert packed_lengths(torch.tensor([[0, 1, 2], [0, 1, 2]])) is None
    assert packed_lengths(torch.tensor([[0, 1, 0, 0, 1, 2]])) == [2, 1, 3]
    assert packed_lengths(torch.tensor([[0, 1, 0], [0, 1, 2]])) == [2, 1, 3]
    plan = plan_attention(None, torch.tensor([[0, 1, 0, 1, 2]]), 1, 5, 0)
    assert plan.cu_seqlens.tolist() == [0, 2, 5]
    assert plan.max_length == 3
    # With a mask, positions that stand still are padding of a generation batch, not packing.
    assert plan_attention(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 0, 1]]), 1, 4, 0).lengths is None


def test_eager_reference_is_a_softmax():
    query, key, value = qkv(4, heads=2)
    got = eager_attention(query, key, value, None, True, 0.3, 0.0)
    torch.testing.assert_close(
        got.transpose(1, 2), slow(query, key, value, torch.ones(1, 4, 4, dtype=torch.bool).tril())
    )


def rope(**changes) -> LongRope:
    config = Phi3VConfig.from_pretrained(tiny_folder())
    for key, value in changes.items():
        setattr(config, key, value)
    return LongRope(config)


def test_factors_go_by_each_examples_own_length():
    long = rope(original_max_position_embeddings=4)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    device = mask.device
    assert long.is_long(plan_attention(mask, None, 2, 5, 0), 2, 5, 0, device).tolist() == [[False], [True]]
    packed = plan_attention(None, torch.tensor([[0, 1, 0, 1, 2, 3, 4]]), 1, 7, 0)
    assert long.is_long(packed, 1, 7, 0, device).tolist() == [[False] * 2 + [True] * 5]
    assert long.is_long(AttentionPlan(), 2, 1, 4, device).tolist() == [[True]]  # the cached tokens count
    assert long.is_long(AttentionPlan(), 2, 4, 0, device) is None
    whole = rope(original_max_position_embeddings=4, longrope_scope="batch")
    assert whole.is_long(plan_attention(mask, None, 2, 5, 0), 2, 5, 0, device).tolist() == [[True]]


def test_tables_follow_the_formula():
    table = rope()
    config = table.config
    cos, sin = table(torch.tensor([[7]]), torch.tensor([[True]]), torch.float32)
    scaling = math.sqrt(1 + math.log(8192 / 2048) / math.log(2048))
    width = config.head_dim
    for i in range(width // 2):
        angle = 7 / (config.rope_scaling["long_factor"][i] * config.rope_theta ** (2 * i / width))
        assert cos[0, 0, 0, i].item() == pytest.approx(scaling * math.cos(angle), rel=1e-5)
        assert sin[0, 0, 0, width // 2 + i].item() == pytest.approx(scaling * math.sin(angle), rel=1e-5, abs=1e-7)
    short = table(torch.tensor([[7]]), None, torch.float32)[0]
    assert (short - cos).abs().max() > 1e-2
    x = torch.randn(1, 2, 1, width)
    turned = rotate(x, cos / scaling, sin / scaling)
    torch.testing.assert_close(turned.norm(), x.norm())  # a rotation


def test_casting_the_model_leaves_the_tables_in_float32():
    from phi3v.model import Phi3VForCausalLM

    model = Phi3VForCausalLM.from_pretrained(tiny_folder()).half()
    assert model.model.rope.frequencies(torch.device("cpu")).dtype == torch.float32
