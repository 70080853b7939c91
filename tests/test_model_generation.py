"""transformers' generate against golden data, over the factor boundary, and its end tokens."""

import numpy as np
import pytest
import torch
from golden.golden_common import make_image, text_ids
from golden.helpers import golden_model, load_arrays, load_json, own_ids, pictures, tiny_folder, tiny_pair
from golden.helpers import official_files as official
from transformers.cache_utils import DynamicLayer

from phi3v.model import Phi3VImageProcessor, Phi3VProcessor
from phi3v.model.attention import GrowingLayer

CASES = {case["key"]: case for case in load_json("generation.json")["cases"]}


def golden_inputs(case: dict) -> dict[str, torch.Tensor]:
    spec = case["case"]
    if "text_ids" in spec["rows"][0]:
        return {"input_ids": own_ids([text_ids(*spec["rows"][0]["text_ids"])])}
    processor = Phi3VProcessor.from_pretrained(official())
    processor.image_processor = Phi3VImageProcessor(num_crops=spec["num_crops"])
    images, own = iter(pictures(spec)), []
    for row in spec["rows"]:
        own.append([next(images) for _ in row["images"]])
    side = spec.get("padding_side", "right")
    return dict(processor([row["prompt"] for row in spec["rows"]], own, padding_side=side))


@pytest.mark.parametrize("key", CASES)
def test_golden_generation(key):
    case = CASES[key]
    inputs = golden_inputs(case)
    assert inputs["input_ids"].shape[1] == case["prompt_length"]
    model = golden_model(case["variant"]).eval()
    out = model.generate(
        **inputs, max_new_tokens=16, do_sample=False, eos_token_id=2, output_logits=True, return_dict_in_generate=True
    )
    model.train()
    assert min(margin for row in case["top2_margin"] for margin in row) > 1e-4  # no near tie that would need leniency
    assert out.sequences[:, case["prompt_length"] :].tolist() == case["new_tokens"]
    logits = torch.stack(out.logits, dim=1)
    np.testing.assert_allclose(logits.max(-1).values.numpy(), case["step_top_logit"], atol=2e-5, rtol=0)
    stored = load_arrays("generation.npz")[f"{key}/step_logits_cols"]  # every 256th column
    np.testing.assert_allclose(logits[..., ::256].numpy(), stored, atol=2e-5, rtol=0)


# Short factors up to 80 tokens, so that the prompts below outgrow them at different steps.
LONG = {"original_max_position_embeddings": 80}
PROMPTS = [
    ("<|user|>\n<|image_1|>\nWhat colour?<|end|>\n<|assistant|>\n", [make_image(60, 60, 1)]),
    ("<|user|>\nno picture<|end|>\n<|assistant|>\n", None),
    ("<|user|>\n<|image_1|>\n" + "how many " * 8 + "<|end|>\n<|assistant|>\n", [make_image(60, 60, 2)]),
    ("<|user|>\n" + "one two " * 35 + "<|end|>\n<|assistant|>\n", None),
]


def test_a_left_padded_batch_over_the_boundary_equals_its_rows_without_a_cache():
    model, processor = tiny_pair(**LONG)
    texts, images = [p for p, _ in PROMPTS], [i for _, i in PROMPTS]
    lengths = [processor(t, i)["input_ids"].shape[1] for t, i in PROMPTS]
    assert min(lengths) + 30 <= 80
    assert sum(length <= 80 < length + 30 for length in lengths) >= 2  # two rows cross, at different steps
    batch = processor(texts, images, padding_side="left")
    end = {"eos_token_id": -1}  # random weights may say <|end|>; here every step counts
    together = model.generate(**batch, max_new_tokens=30, do_sample=False, **end)[:, batch["input_ids"].shape[1] :]
    for row, (text, image) in enumerate(PROMPTS):
        single = processor(text, image)
        n = single["input_ids"].shape[1]
        slow = model.generate(**single, max_new_tokens=30, do_sample=False, use_cache=False, **end)[0, n:]
        assert together[row].tolist() == slow.tolist(), f"row {row}"


def test_each_end_token_stops():
    model, processor = tiny_pair()
    inputs = dict(processor("<|user|>\nred<|end|>\n<|assistant|>\n"))
    ends = [2, *processor.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])]
    assert model.generation_config.eos_token_id == sorted(ends)
    for end in ends:
        head = torch.zeros_like(model.lm_head.weight)
        # A head that says `end` whatever comes in: the final norm's output is never zero.
        with torch.no_grad():
            hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
            head[end] = hidden
            kept = model.lm_head.weight.clone()
            model.lm_head.weight.copy_(head)
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert out.tolist() == [end]
        with torch.no_grad():
            model.lm_head.weight.copy_(kept)


def test_end_tokens_of_a_published_folder():
    """Its generation_config.json names one of the three; the config's list is added to it."""
    assert golden_model("tiny_mha").generation_config.eos_token_id == [2, 32000, 32007]


def test_sampling_is_a_function_of_the_seed():
    model, processor = tiny_pair()
    inputs = dict(processor(["<|image_1|> red", "green"], [[make_image(30, 30)], None], padding_side="left"))
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(
            model.generate(**inputs, max_new_tokens=12, do_sample=True, temperature=2.0, eos_token_id=-1).tolist()
        )
    assert runs[0] == runs[1] != runs[2]


def test_right_padded_prompts_are_refused():
    model, processor = tiny_pair()
    batch = processor(["red", "red green blue"], padding_side="right")
    with pytest.raises(ValueError, match="row 0: its last column is padding; expected left-padded prompts"):
        model.generate(**batch, max_new_tokens=2)


def test_saved_folder_stops_at_every_end_token(tmp_path):
    import json

    saved = json.loads((tiny_folder() / "generation_config.json").read_text())
    assert len(saved["eos_token_id"]) == 3


def test_a_cache_with_room_gives_the_same_keys_and_values():
    """Against transformers' own growing layer, over several buffers, and after a beam search took other rows."""
    torch.manual_seed(0)
    plain, ours = DynamicLayer(), GrowingLayer()
    pieces = [7, 1, 1, *[30] * 5, 1]
    for index, queries in enumerate(pieces):
        keys, values = torch.randn(3, 2, queries, 4), torch.randn(3, 2, queries, 4)
        expected = plain.update(keys, values)
        for got, want in zip(ours.update(keys, values), expected, strict=True):
            assert torch.equal(got, want)
        if index == 4:
            for layer in (plain, ours):
                layer.reorder_cache(torch.tensor([2, 0, 0]))
        if index == 6:
            for layer in (plain, ours):
                layer.crop(-9)
        assert ours.get_seq_length() == plain.get_seq_length()


def test_a_token_is_written_in_place():
    layer = GrowingLayer()
    layer.update(torch.ones(1, 2, 10, 4), torch.ones(1, 2, 10, 4))
    where = layer.keys.data_ptr()
    for _ in range(GrowingLayer.room):
        layer.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    assert layer.keys.data_ptr() == where
    layer.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    assert layer.keys.data_ptr() != where


@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {}])
def test_generation_with_and_without_room_in_the_cache(arguments, monkeypatch):
    model, processor = tiny_pair(**LONG)
    inputs = processor([p for p, _ in PROMPTS], [i for _, i in PROMPTS], padding_side="left")
    ours = model.generate(**inputs, max_new_tokens=12, do_sample=False, **arguments)
    monkeypatch.setattr("phi3v.model.modeling.make_room", lambda cache: None)
    assert torch.equal(ours, model.generate(**inputs, max_new_tokens=12, do_sample=False, **arguments))
