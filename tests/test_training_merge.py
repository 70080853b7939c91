"""What adapter training leaves behind: merged, it computes what the trained model computed; a wrong base is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_fixtures import train_here, write_base, write_model

from phi3v.model.adapters import load_for_inference, load_quantized, merge

METHODS = {"lora": {"use_lora": True}, "dora": {"use_lora": True, "use_dora": True}, "qlora": {"use_qlora": True}}

TRAINING = {
    "batch_size": 8, "batch_size_per_gpu": 8, "warmup_steps": 1, "learning_rate": 4e-3, "fp32": True, "lora_rank": 4
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("merge"), examples=16)


@pytest.fixture(scope="module")
def adapters(base) -> dict[str, Path]:
    """The final folder of each method, trained in float32."""
    return {
        method: train_here(base, base / method, max_steps=8, **TRAINING, **values) / "final"
        for method, values in METHODS.items()
    }


def batch(base: Path) -> dict[str, torch.Tensor]:
    """The validation split's pictures and questions."""
    from phi3v.data.dataset import ConversationDataset, collate
    from phi3v.model import Phi3VProcessor

    processor = Phi3VProcessor.from_pretrained(base / "model")
    dataset = ConversationDataset(base / "data", "val", processor)
    values = collate([dataset[index] for index in range(4)], processor.tokenizer.pad_token_id)
    return {name: values[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_sizes")}


def logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        values = model.eval()(**inputs).logits
    return values[inputs["attention_mask"].bool()]


def trained(base: Path, method: str, adapter: Path):
    """The model as training held it: QLoRA's over 4-bit weights, with the adapter beside it."""
    from peft import PeftModel

    from phi3v.model import Phi3VForCausalLM

    if method == "qlora":
        model = load_quantized(base / "model", torch.float32)
    else:
        model = Phi3VForCausalLM.from_pretrained(base / "model", dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter))


@pytest.mark.parametrize("method", METHODS)
def test_the_merged_checkpoint_computes_what_the_adapter_model_does(base, adapters, tmp_path, method):
    inputs = batch(base)
    expected = logits(trained(base, method, adapters[method]), inputs)
    quantised_as = torch.float32 if method == "qlora" else None
    report = merge(adapters[method], tmp_path / "merged", torch.float32, quantised_as=quantised_as)
    found = logits(load_for_inference(tmp_path / "merged", torch.float32), inputs)
    untrained = logits(load_for_inference(base / "model", torch.float32), inputs)
    print(
        f"{method}: largest difference {float((found - expected).abs().max()):.1e} of deviation {float(expected.std()):.2f}"
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - untrained).abs().max() > 0.1
    assert report["max_logit_difference"] < 1e-4


def test_validation_changes_nothing_of_qlora(base, tmp_path):
    """Training goes on with the same 4-bit weights, whatever kernels this CPU has for inference."""
    curves = []
    for name, more in (("plain", {}), ("validated", {"eval_steps": 1})):
        out = train_here(base, tmp_path / name, max_steps=4, **TRAINING, **METHODS["qlora"], **more)
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        curves.append([line["loss"] for line in lines if "loss" in line])
    assert curves[0] == curves[1]


def test_qlora_on_the_whole_base_is_another_model(base, adapters, tmp_path):
    """Why --quantised_as exists: rounding to 4 bits is no small change."""
    expected = logits(trained(base, "qlora", adapters["qlora"]), batch(base))
    merge(adapters["qlora"], tmp_path / "merged", torch.float32)
    found = logits(load_for_inference(tmp_path / "merged", torch.float32), batch(base))
    assert (found - expected).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_bf16_export_reports_its_difference(base, adapters, tmp_path, method):
    report = merge(adapters[method], tmp_path / "merged", torch.bfloat16)
    assert {value.dtype for value in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    whole = logits(load_for_inference(adapters[method], torch.float32), batch(base))
    rounded = logits(load_for_inference(tmp_path / "merged", torch.float32), batch(base))
    real = float((whole - rounded).abs().max())
    assert 0 < report["max_logit_difference"] < 0.1 * report["logit_scale"]
    assert real / 20 < report["max_logit_difference"] < real * 20  # on another prompt, of the same size


@pytest.fixture
def moved(base, adapters, tmp_path) -> tuple[Path, Path]:
    """(adapter, base) of their own, to spoil."""
    model, adapter = (
        shutil.copytree(base / "model", tmp_path / "model"),
        shutil.copytree(adapters["lora"], tmp_path / "a"),
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == base / "model"
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(model)}))
    return adapter, model


def test_a_copied_base_is_the_same_base(moved):
    adapter, _ = moved
    assert not any("lora" in name for name in load_for_inference(adapter, torch.float32).state_dict())


def test_other_weights_of_the_same_shape_are_refused(moved, tmp_path):
    adapter, model = moved
    state = load_file(model / "model.safetensors")
    save_file({name: value * 1.01 for name, value in state.items()}, model / "model.safetensors", {"format": "pt"})
    for use in (lambda: load_for_inference(adapter, torch.float32), lambda: merge(adapter, tmp_path / "out")):
        with pytest.raises(ValueError, match="belongs to another base"):
            use()
    assert not (tmp_path / "out").exists()


def test_another_geometry_is_refused_where_no_mark_is_there(moved, tmp_path):
    adapter, model = moved
    (adapter / "base.json").unlink()
    shutil.rmtree(model)
    write_model(model, hidden_size=64)
    with pytest.raises(ValueError, match=r"do not match its base .*model: .*size mismatch"):
        load_for_inference(adapter, torch.float32)
