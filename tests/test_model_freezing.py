"""Freezing is what it claims, under activation checkpointing too."""

import pytest
import torch
from golden.golden_common import make_image
from golden.helpers import tiny_model, tiny_processor

from phi3v.model.adapters import add_lora
from phi3v.model.modeling import GROUPS, freeze, parameter_group
from phi3v.settings import FinetuneSettings


def groups_with_gradient(model) -> set[str]:
    """Groups in which every trainable parameter has a gradient that is not zero, after one checkpointed step."""
    processor = tiny_processor()
    batch = dict(processor("<|user|>\n<|image_1|>\nred<|end|>\n<|assistant|>\ngreen<|end|>", make_image(50, 80)))
    labels = batch["input_ids"].clone()
    labels[labels == processor.image_token_id] = -100
    model.train()
    model.activation_checkpointing_enable()
    model(**batch, labels=labels).loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            live = parameter.grad is not None and bool(parameter.grad.any())
            # The key bias moves all scores of a query alike, so its gradient is zero but for rounding.
            live = live or name.endswith("k_proj.bias")
            found[parameter_group(name)] = found.get(parameter_group(name), True) and live
    return {group for group, live in found.items() if live}


EVERYTHING = {"clip", "projector", "separators", "embedding", "decoder", "head"}


def test_all_weights_train():
    model = tiny_model()
    assert groups_with_gradient(model) == EVERYTHING
    still = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert all(".encoder.layers.2." in n or "post_layernorm" in n for n in still)  # what never runs


@pytest.mark.parametrize(
    ("frozen", "trained"),
    [
        ({"freeze_vision_model": "vision"}, {"embedding", "decoder", "head"}),
        ({"freeze_vision_model": "legacy"}, {"decoder", "head"}),
        ({"freeze_vision_model": "tower"}, EVERYTHING - {"clip"}),
        ({"freeze_decoder": True}, {"clip", "projector", "separators"}),
        ({"freeze_decoder": True, "freeze_vision_model": "tower"}, {"projector", "separators"}),
    ],
)
def test_frozen_groups_have_no_gradient_and_all_others_do(frozen, trained):
    model = tiny_model()
    frozen = freeze(model, FinetuneSettings(model_name_or_path="m", output_dir="o", **frozen).frozen_groups)
    assert groups_with_gradient(model) == trained
    assert {parameter_group(name) for name in frozen} == EVERYTHING - trained
    assert all(p.grad is None for n, p in model.named_parameters() if n in set(frozen))


@pytest.mark.parametrize("vision_frozen", [True, False])
def test_adapters_train_under_checkpointing(vision_frozen):
    model = add_lora(tiny_model(), rank=4, alpha=8, freeze_vision=vision_frozen, seed=0)
    for name, parameter in model.named_parameters():  # B starts at zero, which hides A's gradient
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert groups_with_gradient(model) == {"adapters"}


def test_every_parameter_has_a_group():
    groups = {parameter_group(name) for name, _ in tiny_model().named_parameters()}
    assert groups == EVERYTHING < set(GROUPS)
    assert parameter_group("model.vision_embed_tokens.wte.weight") == "embedding"
    assert parameter_group("module.base_model.model.model.norm.weight") == "decoder"
    with pytest.raises(ValueError, match="belongs to none of"):
        parameter_group("model.extra.weight")
    with pytest.raises(ValueError, match="freeze: all; expected groups among clip"):
        freeze(tiny_model(), ["all"])
