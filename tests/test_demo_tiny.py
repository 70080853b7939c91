"""The tiny checkpoint behaves as the published model where it matters."""

import hashlib

import pytest
from golden.golden_common import make_image
from golden.helpers import TEXTS, tiny_folder

from phi3v.demo.tiny import build_tiny, train_tokenizer
from phi3v.model import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor


def test_words_are_single_tokens_with_spaces_and_line_breaks_as_published():
    tokenizer = train_tokenizer(TEXTS)
    assert tokenizer.tokenize("red green blue") == ["▁red", "▁green", "▁blue"]
    # After <|user|> a prefix space and the line break by itself; <|assistant|> swallows the white space on its right.
    text = "<|user|>\nHow many?<|end|>\n<|assistant|>\nyes<|end|>\n<|endoftext|>"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert tokens[:4] == ["<s>", "<|user|>", "▁", "<0x0A>"]
    assert (
        tokens[-8:]
        == ["<|end|>", "▁", "<0x0A>", "<|assistant|>", "▁yes", "<|end|>", "▁", "<0x0A>", "<|endoftext|>"][1:]
    )
    assert tokenizer("")["input_ids"] == [1]


@pytest.mark.parametrize("text", ["red green", "日本 🙂 unseen wörds\ttab", "a  b\n\nc"])
def test_any_text_survives(text):
    tokenizer = train_tokenizer(TEXTS)
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    def digests(folder):
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}

    first, again = (build_tiny(tmp_path / name, TEXTS, seed=3) for name in ("a", "b"))
    other = build_tiny(tmp_path / "c", TEXTS, seed=4)
    assert digests(first) == digests(again)
    changed = {name for name, digest in digests(other).items() if digest != digests(first)[name]}
    assert changed == {"model.safetensors"}


@pytest.mark.parametrize(
    "geometry",
    [
        {"tile_size": 28, "patch_size": 7},
        {"tile_size": 56, "patch_size": 14, "vision_hidden_size": 32, "vision_layers": 2, "vision_heads": 2},
        {"tile_size": 24, "patch_size": 4, "hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1},
    ],
)
def test_geometry_is_free(geometry):
    folder = tiny_folder(**geometry)
    model, processor = Phi3VForCausalLM.from_pretrained(folder), Phi3VProcessor.from_pretrained(folder)
    size, side = geometry["tile_size"], geometry["tile_size"] // geometry["patch_size"] // 2
    inputs = processor("<|image_1|>\nred", make_image(2 * size, size), num_crops=2)
    # two local tiles across and the global one, their row separators, one picture separator
    expected = 3 * side**2 + side + 1 + side
    assert (inputs["input_ids"] == processor.image_token_id).sum() == expected
    assert model(**inputs).logits.shape[-1] == model.config.vocab_size


def test_ids_come_from_the_tokenizer():
    config, processor = Phi3VConfig.from_pretrained(tiny_folder()), Phi3VProcessor.from_pretrained(tiny_folder())
    tokenizer = processor.tokenizer
    assert config.image_token_id == processor.image_token_id < config.vocab_size < 1000
    assert config.pad_token_id == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert config.end_token_ids == [2, tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
