"""FLOP against PyTorch's FlopCounterMode on small models, for every method; tolerance 1 %."""

import math
from functools import partial

import pytest

from phi3v.planning.fits import FROZEN_IMAGES, FULL_IMAGES, MEAN_TOKENS, PADDED_TILES, PEAK_SHARES
from phi3v.planning.flops import example_work, training_flops, utilisation
from phi3v.planning.geometry import (
    adapter_parameters,
    geometry_from_config,
    num_image_tokens,
    parameters,
    quantised_parameters,
    tile_grid,
)
from phi3v.settings import FinetuneSettings, load_run, validate

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def build():
    """A function that makes a small model of its own sizes, wide enough that nothing is negligible."""
    from phi3v.model.configuration import Phi3VConfig
    from phi3v.model.modeling import Phi3VForCausalLM

    def make(attention="eager", kv_heads=4):
        vision = {
            "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
            "image_size": 56, "patch_size": 7,
        }  # fmt: skip
        config = Phi3VConfig(
            vocab_size=600, hidden_size=96, intermediate_size=224, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=kv_heads, image_token_id=599, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            max_position_embeddings=4096, original_max_position_embeddings=4096, vision_config=vision,
        )  # fmt: skip
        torch.manual_seed(0)
        config._attn_implementation = attention
        return Phi3VForCausalLM(config).train()

    return make


def batch_of(model, text=23, labels=9):
    """One example: a picture of 2 x 1 tiles, text, and answer tokens with labels."""
    geometry = geometry_from_config(model.config.to_dict())
    size, image = model.config.tile_size, num_image_tokens(2, 1, tile_grid(geometry.vision))
    ids = torch.randint(3, 590, (1, image + text))
    ids[0, 1 : 1 + image] = model.config.image_token_id
    targets = torch.full_like(ids, -100)
    targets[0, -labels:] = ids[0, -labels:]
    batch = {
        "input_ids": ids, "labels": targets, "pixel_values": torch.randn(3, 3, size, size),
        "image_sizes": torch.tensor([[2 * size, size]]),
    }  # fmt: skip
    return batch, example_work(geometry, image + text, tiles=3, labels=labels)


def counted(model, batch, custom=None):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        model(**batch).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("recompute", [0.0, 1.0])
@pytest.mark.parametrize("method", ["full", "frozen", "frozen legacy", "lora", "lora frozen"])
def test_hardware_flops_are_what_pytorch_counts(build, method, recompute):
    from phi3v.model.adapters import add_lora
    from phi3v.model.modeling import freeze

    model = build()
    geometry = geometry_from_config(model.config.to_dict())
    batch, work = batch_of(model)
    if recompute:
        model.gradient_checkpointing_enable()
    rank = None
    if method.startswith("frozen"):
        freeze(model, ["clip", "projector", "separators", *(["embedding"] if "legacy" in method else [])])
    elif method.startswith("lora"):
        rank = 8
        model = add_lora(model, rank, 16, freeze_vision=method == "lora frozen", seed=0).train()
    name = method.split()[0]
    frozen = ["clip", "projector"] if method == "lora frozen" else []
    expected = training_flops(geometry, work, name, rank, flash=False, recompute=recompute, frozen=frozen)
    assert expected.hardware == pytest.approx(counted(model, batch), rel=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"freeze_decoder": True},
        {"freeze_decoder": True, "freeze_vision_model": "tower"},
        {"freeze_vision_model": "tower"},
        {"use_lora": True, "lora_targets": ["qkv_proj", "o_proj"]},
        {"use_lora": True, "lora_targets": ["q_proj", "k_proj", "v_proj", "img_projection", "lm_head"]},
        {"use_lora": True, "freeze_decoder": True, "freeze_vision_model": "tower"},
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", [0.0, 1.0])
def test_flops_of_parts_that_a_row_freezes_are_what_pytorch_counts(build, options, recompute):
    """And never more than those of the whole method."""
    from phi3v.model.adapters import add_lora
    from phi3v.model.modeling import freeze
    from phi3v.training.job import chosen_targets

    settings = validate(
        FinetuneSettings, {"model_name_or_path": "m", "output_dir": "o", "lora_rank": 8, **options}, "t"
    )
    model = build()
    geometry = geometry_from_config(model.config.to_dict())
    batch, work = batch_of(model)
    if recompute:
        model.gradient_checkpointing_enable()
    if settings.use_lora:
        model = add_lora(model, 8, 16, seed=0, targets=chosen_targets(settings, model)).train()
    else:
        freeze(model, settings.frozen_groups)
    count = partial(training_flops, geometry, work, settings.method, 8, flash=False, recompute=recompute)
    found = count(frozen=settings.frozen_groups, targets=settings.lora_targets)
    assert found.hardware == pytest.approx(counted(model, batch), rel=0.01)
    assert found.model < 0.97 * count().model


def test_frozen_forward_only_is_the_head_alone(build):
    model = build()
    geometry = geometry_from_config(model.config.to_dict())
    batch, work = batch_of(model)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    model.model.norm.requires_grad_(True)
    expected = training_flops(geometry, work, "frozen_forward_only", flash=False, recompute=0.0)
    assert expected.hardware == pytest.approx(counted(model, batch), rel=0.01)


@pytest.mark.parametrize("recompute", [0.0, 1.0])
def test_qlora(build, tmp_path, recompute):
    from phi3v.model.adapters import add_lora, load_quantized

    pytest.importorskip("bitsandbytes")
    build().save_pretrained(tmp_path)
    model = load_quantized(tmp_path, torch.float32, "eager", "cpu")
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    geometry = geometry_from_config(model.config.to_dict())
    batch, work = batch_of(model)
    model = add_lora(model, 8, 16, seed=0).train()
    expected = training_flops(geometry, work, "qlora", 8, flash=False, recompute=recompute)

    def gemm_4bit(rows, packed, weight, *rest, **named):
        """[…, K] times a 4-bit [N, K] weight: PyTorch's counter does not know bitsandbytes' operator."""
        return 2 * math.prod(rows) * weight[0]

    custom = {torch.ops.bitsandbytes.gemm_4bit: gemm_4bit}
    assert expected.hardware == pytest.approx(counted(model, batch, custom), rel=0.01)


def test_grouped_heads_and_several_examples_add_up(build):
    """Work is additive: two padded examples cost their own squares with packing, and the batch's without."""
    model = build(kv_heads=2)
    geometry = geometry_from_config(model.config.to_dict())
    batch, work = batch_of(model)
    twice = {name: torch.cat((value, value)) for name, value in batch.items()}
    expected = training_flops(geometry, work + work, "full", flash=False, recompute=0.0)
    assert expected.hardware == pytest.approx(counted(model, twice), rel=0.01)


def test_model_flops_leave_out_what_the_method_does_not_need(build):
    geometry = geometry_from_config(build().config.to_dict())
    _, work = batch_of(build())
    full = training_flops(geometry, work, "full", flash=True, recompute=1.0)
    frozen = training_flops(geometry, work, "frozen", flash=True, recompute=1.0)
    lora = training_flops(geometry, work, "lora", 8, flash=True, recompute=1.0)
    for flops in (full, frozen, lora):
        assert flops.model < flops.hardware
    assert frozen.model < full.model
    assert lora.model < full.model
    again = training_flops(geometry, work, "full", flash=True, recompute=0.0)
    assert again.model == full.model
    with pytest.raises(ValueError, match="rank: None; method lora expects an integer"):
        training_flops(geometry, work, "lora")


def test_published_model(root):
    """Parameters of the published checkpoint, TFLOP of an image, and the shares of the peak that the report quotes."""
    geometry = load_run(root / "config/config.yaml", root).models["phi35-vision"].geometry
    assert sum(parameters(geometry).values()) == 4_146_621_440
    work = example_work(geometry, MEAN_TOKENS, PADDED_TILES, MEAN_TOKENS)
    flops = training_flops(geometry, work, "full", recompute=1.0, reentrant=True)
    assert flops.parts["vision"].forward / 1e12 == pytest.approx(5.7, abs=0.05)
    language = (flops.parts["decoder"].forward + flops.parts["head"].forward) / 1e12
    assert language == pytest.approx(18.2, abs=0.1)
    # The published frozen row is impossible if the decoder was trained, plausible if it ran forward only.
    correct = training_flops(geometry, work, "frozen", recompute=1.0, reentrant=True)
    legacy = training_flops(geometry, work, "frozen_forward_only")
    rates = {
        "full": flops.model * FULL_IMAGES,
        "full_hardware": flops.hardware * FULL_IMAGES,
        "frozen": correct.model * FROZEN_IMAGES,
        "frozen_hardware": correct.hardware * FROZEN_IMAGES,
        "forward_only": legacy.hardware * FROZEN_IMAGES,
    }
    assert {name: round(100 * utilisation(rate, 1.0, 312, 8)) for name, rate in rates.items()} == PEAK_SHARES
    with pytest.raises(ValueError, match="peak_tflops"):
        utilisation(1e12, 1.0, 0)


def test_sizes_against_the_model(build):
    """Parameter counts, adapters and 4-bit weights against a real module tree; tiles against the image processor."""
    from phi3v.model.adapters import add_lora
    from phi3v.model.modeling import parameter_group

    model = build(kv_heads=2)
    geometry = geometry_from_config(model.config.to_dict())
    found = dict.fromkeys(parameters(geometry), 0)
    for name, parameter in model.named_parameters():
        found[parameter_group(name)] += parameter.numel()
    assert parameters(geometry) == found
    linears = sum(
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    )
    assert quantised_parameters(geometry) == linears
    for vision in (True, False):
        peft = add_lora(build(kv_heads=2), 4, 8, freeze_vision=not vision, seed=0)
        trained = sum(p.numel() for p in peft.parameters() if p.requires_grad)
        assert adapter_parameters(geometry, 4, () if vision else ("clip", "projector")) == trained
