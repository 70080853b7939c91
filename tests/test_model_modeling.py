"""The model against golden data of the published code; batching, packing and loss against obvious versions."""

import json
import math

import numpy as np
import pytest
import torch
from golden.compare import check_model_case
from golden.golden_common import make_image
from golden.helpers import (
    GOLDEN,
    golden_model,
    gradients,
    load_arrays,
    load_json,
    own_ids,
    pictures,
    tiny_folder,
    tiny_model,
    tiny_processor,
    worst_gradient_error,
)
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from phi3v.model import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor
from phi3v.model.layout import lay_out
from phi3v.model.modeling import EMBEDDING, EMBEDDING_ALIAS

CASES = {case["key"]: case for case in load_json("models.json")["cases"]}


def golden_inputs(key: str) -> dict[str, torch.Tensor]:
    arrays, case = load_arrays("models.npz"), CASES[key]["case"]
    inputs = {
        "input_ids": own_ids(arrays[f"{key}/input_ids"]),
        "attention_mask": own_ids(arrays[f"{key}/attention_mask"]),
        "labels": torch.from_numpy(arrays[f"{key}/labels"].astype(np.int64)),
    }
    images = pictures(case)
    if images:
        out = Phi3VImageProcessor(num_crops=case["num_crops"])(images)
        inputs.update(pixel_values=out["pixel_values"], image_sizes=out["image_sizes"])
    return inputs


PAIRS = [(key, "sdpa") for key in CASES]
PAIRS += [
    (key, "eager") for key in ("tiny_mha/one_1x1", "tiny_gqa/text_only", "sharp_gqa/one_1x1", "sharp_gqa/text_4097")
]
# One of each kind, where an error shows most; `make verify-model` runs all of them.
SHORT = {
    ("tiny_mha/one_1x1", "sdpa"), ("tiny_mha/text_only", "sdpa"), ("tiny_mha/batch2_right", "sdpa"),
    ("tiny_mha/batch2_one_row_long", "sdpa"), ("tiny_gqa/text_only", "sdpa"), ("tiny_gqa/text_only", "eager"),
    ("sharp_gqa/one_1x1", "sdpa"), ("sharp_gqa/one_1x1", "eager"), ("sharp_gqa/tall6", "sdpa"),
    ("sharp_gqa/text_4096", "sdpa"), ("sharp_gqa/text_4097", "sdpa"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "attn"), [pytest.param(*pair, marks=[] if pair in SHORT else pytest.mark.verify) for pair in PAIRS]
)
def test_golden_forward_and_backward(key, attn):
    case = CASES[key]
    # The one case of mixed lengths over the boundary, where the original chooses factors for the whole batch.
    scope = "batch" if key.endswith("one_row_long") else "sequence"
    model = golden_model(case["variant"], attn, scope)
    model.zero_grad(set_to_none=True)
    seen = {}
    vision = model.model.vision_embed_tokens
    hook = vision.register_forward_hook(lambda _, __, output: seen.update(features=output.detach().numpy()))
    out = model(**golden_inputs(key), logits_to_keep=0, output_hidden_states=True)
    hook.remove()
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    result = {
        "logits": out.logits.detach().numpy(),
        "loss": out.loss.item(),
        "hidden_states": [h.detach().numpy() for h in out.hidden_states],
        "features": seen.get("features"),
        "grad_norms": {n: None if g is None else g.double().norm().item() for n, g in grads.items()},
    }
    errors = check_model_case(str(GOLDEN), key, result)
    assert max(errors["logits"], errors["top_vals"], errors["logsumexp"]) < 1e-5
    assert errors["loss"] < 1e-5
    assert errors["hidden_rel"] < 3e-5
    assert errors.get("features_rel", 0.0) < 1e-5
    assert errors["grad_norm_rel"] < 1e-4, errors["grad_norm_worst"]
    without = {n for n, norm in case["grad_norms"].items() if norm is None}
    assert {n for n, g in grads.items() if g is None} == without
    for name, sample in case["grad_samples"].items():
        if name.endswith("k_proj.bias") or sample["val"] is None:
            continue
        got = grads[name].flatten()[torch.tensor(sample["idx"])].numpy()
        scale = case["grad_norms"][name] / np.sqrt(grads[name].numel())
        np.testing.assert_allclose(got, sample["val"], atol=1e-3 * scale, rtol=0, err_msg=name)


def test_names_and_shapes_of_the_full_model():
    official = load_json("state_dict_full.json")
    config = Phi3VConfig(rope_scaling={"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48})
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert official["shared"] == {EMBEDDING_ALIAS: EMBEDDING}
    assert {**ours, EMBEDDING_ALIAS: ours[EMBEDDING]} == official["shapes"]
    assert sum(p.numel() for p in model.parameters()) == official["n_parameters_unique"]


def test_either_name_of_the_embedding_loads(tmp_path):
    source = tiny_folder()
    weights = load_file(source / "model.safetensors")
    assert EMBEDDING in weights
    reference = tiny_model()
    for names in ([EMBEDDING_ALIAS], [EMBEDDING, EMBEDDING_ALIAS]):
        folder = tmp_path / str(len(names))
        folder.mkdir()
        renamed = {k: v for k, v in weights.items() if k != EMBEDDING}
        renamed.update({name: weights[EMBEDDING].clone() for name in names})
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text((source / "config.json").read_text())
        model, info = Phi3VForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        torch.testing.assert_close(model.state_dict(), reference.state_dict(), atol=0, rtol=0)
        model.save_pretrained(folder / "again")
        assert set(load_file(folder / "again" / "model.safetensors")) == set(weights)


def test_saved_folder_is_in_the_published_layout(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(), dtype=torch.bfloat16)
    assert type(model) is Phi3VForCausalLM
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["rope_scaling"]["type"] == "su"
    assert config["architectures"] == ["Phi3VForCausalLM"]
    assert config["auto_map"]["AutoConfig"] == "configuration_phi3_v.Phi3VConfig"
    assert "rope_parameters" not in config
    weights = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert any("vision_model.pre_layrnorm" in name for name in weights)


def test_pickled_weights_are_not_read(tmp_path):
    model = tiny_model()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="safetensors"):
        Phi3VForCausalLM.from_pretrained(tmp_path)


# Batching -----------------------------------------------------------------------------------------------------------

PROMPTS = [
    ("<|user|>\n<|image_1|>\nWhat colour?<|end|>\n<|assistant|>\n", "red<|end|>\n<|endoftext|>", [(60, 30)]),
    ("<|user|>\nno picture here<|end|>\n<|assistant|>\n", "no<|end|>\n<|endoftext|>", []),
    ("<|user|>\n<|image_1|>\n<|image_2|>\nHow many?<|end|>\n<|assistant|>\n", "two<|end|>", [(28, 28), (20, 80)]),
    ("<|user|>\n<|image_1|>\nAnswer briefly.<|end|>\n<|assistant|>\n", "red green blue<|end|>", [(90, 90)]),
    ("<|user|>\none<|end|>\n<|assistant|>\n", "yes yes yes yes<|end|>", []),
    ("<|user|>\n<|image_1|>\none?<|end|>\n<|assistant|>\n", "one<|end|>", [(30, 200)]),
    ("<|user|>\n<|image_1|>\n" + "how many " * 60 + "<|end|>\n<|assistant|>\n", "three<|end|>", [(33, 44)]),
    ("<|user|>\n<|image_1|>\nthree?<|end|>\n<|assistant|>\n", "no<|end|>", [(10, 10)]),
]
# So short that the examples above lie on both sides of the boundary between the short and the long factors.
LONG = {"original_max_position_embeddings": 96, "kv_heads": 2}


def example(index: int) -> dict[str, torch.Tensor]:
    """Example `index` as a batch of one row, with labels on the answer and weights 1 / its label tokens."""
    prompt, answer, sizes = PROMPTS[index]
    processor = tiny_processor(**LONG)
    images = [make_image(w, h, index) for w, h in sizes] or None
    question, whole = processor(prompt, images), processor(prompt + answer, images)
    labels = whole["input_ids"].clone()
    labels[:, : question["input_ids"].shape[1]] = -100
    weights = (labels != -100).float() / (labels != -100).sum()
    return {**{k: whole[k] for k in whole}, "labels": labels, "loss_weights": weights}


def joined(examples: list[dict], packed: bool = False) -> dict[str, torch.Tensor]:
    """Several examples as one right-padded batch, or one after another in a packed row with its position ids."""
    batch = {}
    fill = {"input_ids": 5, "attention_mask": 0, "labels": -100, "loss_weights": 0.0}
    length = max(e["input_ids"].shape[1] for e in examples)
    for key, value in fill.items():
        rows = [e[key][0] for e in examples]
        batch[key] = (
            torch.cat(rows)[None]
            if packed
            else torch.stack([F.pad(r, (0, length - len(r)), value=value) for r in rows])
        )
    if packed:
        del batch["attention_mask"]
        batch["position_ids"] = torch.cat([torch.arange(e["input_ids"].shape[1]) for e in examples])[None]
    for key in ("pixel_values", "image_sizes"):
        parts = [e[key] for e in examples if key in e]
        if parts:
            batch[key] = torch.cat(parts)
    return batch


def run(model, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = model(**batch).loss / len(PROMPTS)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_loss_and_gradients_do_not_depend_on_the_batching(attn):
    model = tiny_model(attn, **LONG).train()
    examples = [example(i) for i in range(len(PROMPTS))]
    lengths = [e["input_ids"].shape[1] for e in examples]
    assert min(lengths) <= 96 < max(lengths)
    expected, reference = run(model, examples)
    for batches in (
        [joined(examples[i : i + 2]) for i in range(0, 8, 2)],
        [joined(examples)],
        [joined(examples, packed=True)],
        [joined(examples[:3], packed=True), joined(examples[3:])],
    ):
        loss, grads = run(model, batches)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert worst_gradient_error(grads, reference) < 1e-5


def test_factors_of_the_whole_batch_on_request():
    """The published code's choice: one long row makes all rows long."""
    model = tiny_model(**LONG).eval()
    short, long = example(7), example(6)
    both = joined([short, long])
    del both["labels"], both["loss_weights"]
    n = short["input_ids"].shape[1]
    with torch.inference_mode():
        own = model(**both).logits[0, :n]
        alone = model(short["input_ids"], pixel_values=short["pixel_values"], image_sizes=short["image_sizes"]).logits[
            0
        ]
        torch.testing.assert_close(own, alone, atol=1e-5, rtol=0)
        model.config.longrope_scope = "batch"
        shared = model(**both).logits[0, :n]
    assert (shared - alone).abs().max() > 1e-4


def test_loss_is_what_the_docstring_says():
    model = tiny_model(**LONG).train()
    batch = joined([example(0), example(3)])
    weights = batch.pop("loss_weights")
    labels = batch["labels"]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
    entropy = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100
    )
    mean = entropy.sum() / (labels[:, 1:] != -100).sum()
    out = model(**batch)
    assert out.logits is None
    assert out.loss.item() == pytest.approx(mean.item(), rel=1e-6)
    weighted = (entropy * weights[:, 1:].flatten()).sum()
    assert model(**batch, loss_weights=weights).loss.item() == pytest.approx(weighted.item(), rel=1e-6)
    batch["labels"] = torch.full_like(labels, -100)
    nothing = model(**batch).loss
    nothing.backward()
    assert nothing.item() == 0.0


def test_packed_examples_do_not_learn_from_their_neighbours():
    """A label on an example's first token has nothing to be predicted from."""
    model = tiny_model(**LONG).train()
    first, second = example(1), example(4)
    second["labels"][0, 0] = 5
    packed = joined([first, second], packed=True)
    del packed["loss_weights"]
    second["labels"][0, 0] = -100
    clean = joined([first, second], packed=True)
    del clean["loss_weights"]
    assert model(**packed).loss.item() == model(**clean).loss.item()


@pytest.mark.parametrize("packed", [False, True])
def test_a_layout_made_beforehand_changes_nothing(packed):
    """The collator's way: of the other arguments only input_ids and pixel_values are there."""
    model, batch = tiny_model(**LONG).train(), joined([example(i) for i in range(4)], packed)
    names = ("attention_mask", "position_ids", "image_sizes", "labels", "loss_weights")
    layout = lay_out(model.config, batch["input_ids"], *(batch.get(name) for name in names))
    loss = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], layout=layout).loss
    assert torch.equal(loss, model(**batch).loss)


def test_logits_to_keep():
    model = tiny_model().eval()
    batch = {k: v for k, v in example(1).items() if k in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        everything = model(**batch).logits
        torch.testing.assert_close(model(**batch, logits_to_keep=1).logits, everything[:, -1:])
        assert isinstance(model(**batch, return_dict=False), tuple)


def test_inputs_embeds_equal_ids_and_pixels():
    model = tiny_model().eval()
    batch = {k: v for k, v in example(2).items() if k not in ("labels", "loss_weights")}
    with torch.inference_mode():
        layout = lay_out(model.config, batch["input_ids"], image_sizes=batch["image_sizes"])
        embeds = model.model.embed(batch["input_ids"], batch["pixel_values"], layout)
        by_embeds = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(by_embeds, model(**batch).logits, atol=0, rtol=0)


def test_row_of_the_padding_token_gets_no_gradient():
    model = tiny_model(**LONG).train()
    batch = example(0)
    model(**batch).loss.backward()
    grad = model.get_input_embeddings().weight.grad
    assert model.config.pad_token_id in batch["input_ids"]
    assert not grad[model.config.pad_token_id].any()
    assert not grad[model.config.image_token_id].any()
    assert grad.any()


# Odd inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("pixel_values"), "image positions but no pixel_values"),
        (lambda b: b.pop("image_sizes"), "pixel_values without image_sizes"),
        (lambda b: b.update(input_ids=b["input_ids"].clamp(max=5)), r"0 image positions; expected \d+ for image_sizes"),
        (lambda b: b.update(image_sizes=b["image_sizes"] + 1), "in whole tiles of 28 pixels"),
        (lambda b: b.update(pixel_values=b["pixel_values"][1:]), "pixel_values: shape"),
        (lambda b: b.update(labels=b["labels"][:, 1:]), "labels: shape"),
        (lambda b: b.update(loss_weights=b["loss_weights"][:, 1:]), "loss_weights: shape"),
        (lambda b: b.update(attention_mask=b["attention_mask"][:, 1:]), "attention_mask: .* columns; expected"),
        (lambda b: b.update(input_ids=b["input_ids"].float()), "expected integers"),
        (lambda b: b.update(inputs_embeds=torch.zeros(1, 3, 96)), "exactly one of the two"),
    ],
)
def test_refusals(change, message):
    batch = example(0)
    change(batch)
    with pytest.raises(ValueError, match=message):
        tiny_model(**LONG)(**batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_trains_and_generates(dtype, autocast):
    model = tiny_model(dtype=torch.float32 if autocast else dtype, **LONG).train()
    reference = tiny_model(**LONG).train()
    batch = joined([example(i) for i in range(4)])
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(**batch).loss.item(), rel=2e-2)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    inputs = {k: v for k, v in example(0).items() if k not in ("labels", "loss_weights")}
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        assert model.eval().generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize("frozen", [False, True])
def test_activation_checkpointing_changes_nothing(frozen):
    model = tiny_model(**LONG).train()
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("vision_embed_tokens" not in name and parameter.requires_grad)
    batch = joined([example(0), example(2)])
    expected, reference = run(model, [batch])
    model.activation_checkpointing_enable()
    loss, grads = run(model, [batch])
    assert loss == pytest.approx(expected, rel=1e-6)
    assert worst_gradient_error(grads, reference) < 1e-6
    assert EMBEDDING in grads
    assert any(".layers.0." in name for name in grads)
    assert frozen != any("vision_embed_tokens" in name for name in grads)
    with pytest.raises(ValueError, match="use_reentrant: got true"):
        model.activation_checkpointing_enable({"use_reentrant": True})


def test_text_only_batch_among_other_processes_touches_the_vision_part():
    """What keeps a distributed step from waiting: zero gradients instead of none, at an unchanged loss."""
    model = tiny_model(**LONG).train()
    vision = model.model.vision_embed_tokens
    expected, reference = run(model, [example(1)])
    assert not any("vision_embed_tokens" in name for name in reference)
    vision.run_without_images = True
    loss, grads = run(model, [example(1)])
    assert loss == expected
    added = {name: grad for name, grad in grads.items() if name not in reference}
    with_picture = run(model, [example(0)])[1]
    assert grads.keys() == with_picture.keys()
    assert not any(grad.any() for grad in added.values())


@pytest.mark.parametrize("lacking", ["pictures", "labels"])
def test_what_a_float16_batch_lacks_adds_zero_to_the_loss(lacking):
    """Also if the features or hidden states that stand for it exceed float16's largest number in sum."""
    model = tiny_model(dtype=torch.float16, **LONG).train()
    vision = model.model.vision_embed_tokens
    vision.run_without_images = True
    batch = example(1)
    if lacking == "pictures":
        torch.nn.init.constant_(vision.img_projection[2].bias, 60000.0)
    else:
        batch["labels"] = torch.full_like(batch["labels"], -100)
        model.model.norm.register_forward_hook(lambda module, inputs, output: output * 0 + 60000.0)
    loss, grads = run(model, [batch])
    assert math.isfinite(loss)
    assert all(bool(torch.isfinite(grad).all()) for grad in grads.values())
    assert not any(grad.any() for name, grad in grads.items() if "vision_embed_tokens" in name)
    assert grads.keys() == run(model, [example(0)])[1].keys()


def _distributed_step(rank: int, folder: str) -> None:
    """One data-parallel step: a picture on rank 0, text alone on rank 1. Saves the loss and the reduced gradients."""
    torch.set_num_threads(1)
    # Before the group exists: with one, transformers saves the tiny folder on rank 0 alone.
    model, batch = tiny_model(**LONG).train(), example(rank)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    assert ("pixel_values" in batch) == (rank == 0)
    wrapped = DistributedDataParallel(model)  # held by name: gradients are reduced only while it lives
    loss = wrapped(**batch).loss
    loss.backward()
    torch.save({"loss": loss.item(), "gradients": gradients(model)}, f"{folder}/rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_text_only_batch_on_one_rank_does_not_stop_the_others(tmp_path):
    """Two processes; neither waits for ever, and both hold the mean of the two examples' gradients."""
    torch.multiprocessing.start_processes(
        _distributed_step, args=(str(tmp_path),), nprocs=2, start_method="spawn", join=False
    ).join(timeout=120)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    model = tiny_model(**LONG).train()
    model.zero_grad(set_to_none=True)
    for rank in (0, 1):
        loss = model(**example(rank)).loss
        assert loss.item() == pytest.approx(ranks[rank]["loss"], rel=1e-6)
        (loss / 2).backward()
    expected = gradients(model)
    for rank in ranks:
        assert rank["gradients"].keys() == expected.keys()
        assert worst_gradient_error(rank["gradients"], expected) < 1e-5
