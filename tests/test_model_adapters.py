"""LoRA and QLoRA: where adapters sit, that they train, load and merge."""

import json

import pytest
import torch
from golden.golden_common import make_image
from golden.helpers import tiny_folder, tiny_model, tiny_processor
from safetensors.torch import load_file, save_file

from phi3v.model import Phi3VForCausalLM, Phi3VProcessor
from phi3v.model import lora as model_lora
from phi3v.model.adapters import (
    add_lora,
    base_of,
    is_adapter,
    load_for_inference,
    load_quantized,
    lora_targets,
    merge,
    save_adapter,
)

DECODER = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
CLIP = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


def inputs() -> dict[str, torch.Tensor]:
    processor = tiny_processor()
    return dict(processor("<|user|>\n<|image_1|>\nred<|end|>\n<|assistant|>\ngreen<|end|>", make_image(50, 80)))


def train(model, steps: int = 3, dtype: torch.dtype = torch.float32) -> list[float]:
    batch = inputs()
    labels = batch["input_ids"].clone()
    labels[labels == tiny_processor().image_token_id] = -100
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained_adapter(folder, quantized: bool = False, **arguments):
    model = load_quantized(tiny_folder(), torch.bfloat16) if quantized else tiny_model()
    model = add_lora(model, rank=8, alpha=16, seed=0, **arguments)
    train(model, dtype=torch.bfloat16 if quantized else torch.float32)
    save_adapter(model, folder)
    return model.eval()


@pytest.mark.parametrize("frozen", [True, False])
def test_targets_are_the_recipes(frozen):
    model = tiny_model()
    targets = lora_targets(model, freeze_vision=frozen)
    decoder = {f"model.layers.{i}.{part}" for i in range(3) for part in (
        "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")}  # fmt: skip
    vision = {name for name in targets if "vision_embed_tokens" in name}
    assert set(targets) - vision == decoder | {"lm_head"}
    if frozen:
        assert not vision
        return
    assert {name.rpartition(".")[2] for name in vision} == CLIP | {"0", "2"}
    assert len(vision) == 2 * len(CLIP) + 2  # two of the tower's three layers, and the projector
    assert not any(".encoder.layers.2." in name for name in vision)


def test_initial_factors_are_a_function_of_the_seed():
    state = torch.random.get_rng_state()
    factors = [
        {n: p.clone() for n, p in add_lora(tiny_model(), 4, 8, seed=seed).named_parameters() if p.requires_grad}
        for seed in (1, 1, 2)
    ]
    assert torch.equal(state, torch.random.get_rng_state())
    first, again, other = factors
    assert all(torch.equal(first[n], again[n]) for n in first)
    a = [n for n in first if ".lora_A." in n]
    assert all(not torch.equal(first[n], other[n]) for n in a)
    assert all(not first[n].any() for n in first if ".lora_B." in n)
    # gaussian: deviation 1 / rank
    assert torch.cat([first[n].flatten() for n in a]).std().item() == pytest.approx(1 / 4, rel=0.05)


def test_a_fresh_adapter_changes_nothing_and_rank_may_exceed_the_width():
    batch = inputs()
    with torch.inference_mode():
        expected = tiny_model().eval()(**batch).logits
        model = add_lora(tiny_model(), rank=200, alpha=100, dropout=0.1, seed=0).eval()
        torch.testing.assert_close(model(**batch).logits, expected, atol=0, rtol=0)
    with pytest.raises(ValueError, match="lora_rank: got 0"):
        add_lora(tiny_model(), rank=0, alpha=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantized", [False, True])
def test_training_lowers_the_loss(quantized, dtype):
    model = load_quantized(tiny_folder(), dtype) if quantized else tiny_model(dtype=dtype)
    model = add_lora(model, rank=8, alpha=16, seed=0)
    model.gradient_checkpointing_enable()
    losses = train(model, steps=4, dtype=dtype)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("quantized", "dtype"), [(False, torch.float32), (False, torch.bfloat16), (True, torch.float32)]
)
def test_layers_compute_what_pefts_do(quantized, dtype, monkeypatch):
    """All gradients, and the losses of steps that change the factors."""
    losses, gradients = [], []
    for plain in (False, True):
        model = load_quantized(tiny_folder(), dtype) if quantized else tiny_model(dtype=dtype)
        if plain:
            monkeypatch.setattr(model_lora, "layers", lambda quantised: {})
        model = add_lora(model, rank=8, alpha=12, seed=0).train()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, and then A has no gradient
                parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
        batch = inputs()
        model(**batch, labels=batch["input_ids"].clamp(max=300)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
        losses.append(train(model, steps=3))
        kinds = {type(m).__module__ for m in model.modules() if hasattr(m, "lora_A")}
        assert all(kind.startswith("peft") for kind in kinds) == plain
    exact = dtype == torch.float32
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if exact else 0.03)
    for name, expected in gradients[1].items():
        distance = (gradients[0][name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert distance < (1e-4 if exact else 0.1), name


def test_half_precision_weights_train_without_autocast():
    """It would hold norms and the residual stream in float32. PEFT's layers, which mix types, keep it."""
    seen = {}
    for dora in (False, True):
        model = add_lora(tiny_model(dtype=torch.bfloat16), rank=4, alpha=4, seed=0, use_dora=dora).train()
        norm = model.base_model.model.model.norm
        norm.register_forward_hook(lambda *_, dora=dora: seen.update({dora: torch.is_autocast_enabled("cpu")}))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**inputs())
    assert seen == {False: False, True: True}


def test_every_linear_layer_but_the_head_is_in_four_bits():
    model = load_quantized(tiny_folder(), torch.float32)
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {name for name, kind in kinds.items() if kind == "Linear"} == {"lm_head"}
    assert set(kinds.values()) == {"Linear", "Linear4bit"}
    assert model.model.layers[0].mlp.down_proj.weight.quant_state.quant_type == "nf4"
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("arguments", [{}, {"use_dora": True}, {"freeze_vision": True}])
def test_saved_adapter_loads_and_merges(tmp_path, arguments):
    model = trained_adapter(tmp_path / "adapter", **arguments)
    assert is_adapter(tmp_path / "adapter")
    assert not is_adapter(tiny_folder())
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)  # nothing of the base
    batch = inputs()
    with torch.inference_mode():
        expected = model(**batch).logits
        loaded = load_for_inference(tmp_path / "adapter", torch.float32)
        torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-5, rtol=0)
        report = merge(tmp_path / "adapter", tmp_path / "merged")
        merged = load_for_inference(tmp_path / "merged", torch.float32)
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-5, rtol=0)
    assert report["max_logit_difference"] < 1e-4
    assert report["top_token_agreement"] == 1.0
    assert (expected - tiny_model().eval()(**batch).logits).abs().max() > 0.1  # it did learn something
    base = load_file(tiny_folder() / "model.safetensors")
    assert {n: t.shape for n, t in load_file(tmp_path / "merged" / "model.safetensors").items()} == {
        n: t.shape for n, t in base.items()
    }
    assert Phi3VProcessor.from_pretrained(tmp_path / "merged")("red")["input_ids"].tolist()
    assert type(Phi3VForCausalLM.from_pretrained(tmp_path / "merged")) is Phi3VForCausalLM


def test_adapter_of_quantised_training_sits_on_the_unquantised_base(tmp_path):
    trained_adapter(tmp_path / "adapter", quantized=True)
    model = load_for_inference(tmp_path / "adapter", torch.bfloat16)
    assert not any("4bit" in type(m).__name__ for m in model.modules())
    report = merge(tmp_path / "adapter", tmp_path / "merged", dtype=torch.bfloat16)
    assert 0 < report["max_logit_difference"] < 0.1 * report["logit_scale"]  # every weight rounded once
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_merge_refuses(tmp_path, monkeypatch):
    trained_adapter(tmp_path / "adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="not empty"):
        merge(tmp_path / "adapter", tmp_path / "full")
    # A merge that loses a factor must be noticed.
    import phi3v.model.adapters as module

    def forgetful(*arguments):
        model = honest_with(*arguments)
        layer = model.base_model.model.model.layers[0].mlp.down_proj
        model.merge_and_unload = lambda: (layer.scaling.update(default=0.0), model.base_model.merge_and_unload())[1]
        return model

    honest_with = module._with_adapter
    monkeypatch.setattr(module, "_with_adapter", forgetful)
    with pytest.raises(ValueError, match=r"merged model differs .* max logit difference"):
        merge(tmp_path / "adapter", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_lost_base_is_named(tmp_path):
    save_file({}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "nowhere/at-all"}))
    with pytest.raises(ValueError, match="`base_model_name_or_path`: got 'nowhere/at-all'"):
        base_of(tmp_path)


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"fused": False, "foreach": False}])
def test_every_adamw_makes_the_layers_prepare_their_factors_again(how):
    """A fused step leaves the version of the tensors that it changes as it was."""
    model = add_lora(tiny_model(), rank=4, alpha=4, seed=0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **how)
    batch, seen = inputs(), []
    for _ in range(3):
        model(**batch, labels=batch["input_ids"].clamp(max=300)).loss.backward()
        layer = model.base_model.model.model.layers[0].self_attn.qkv_proj
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        made = layer._prepared.factors(a, b, layer.base_layer.weight, torch.float32, 1.0)
        torch.testing.assert_close((made.a, made.b), (a.detach(), b.detach()), atol=0, rtol=0)
        seen.append(made.b.clone())
        optimizer.step()
    assert not torch.equal(seen[1], seen[2])
