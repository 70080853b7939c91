"""Phi-3.5-vision at full size (4.15 B weights) on a fake GPU, built and trained by the package's own entry points.

Weights have no values, so nothing is read from disk. The example is the longest of DocVQA: one picture of 4 x 4 tiles
(17 with the global view), 2,547 tokens, 12 of them labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import nn

TILES, TOKENS, LABELS = 17, 2547, 12
EXAMPLES = 64
_WORD, _ANSWER = "invoice", "total"
_FACTORS = Path(__file__).resolve().parent.parent / "golden" / "rope_factors.json"


def write_folders(folder: Path, layers: int = 0) -> None:
    """FOLDER/model without weights, of all layers or of so many, and FOLDER/data with `EXAMPLES` equal examples."""
    from phi3v.data.dataset import ConversationDataset
    from phi3v.demo.tiny import train_tokenizer
    from phi3v.model import Phi3VConfig, Phi3VProcessor
    from phi3v.model.image_processing import Phi3VImageProcessor

    tokenizer = train_tokenizer([f"{_WORD} {_ANSWER}"] * 8)
    pad, image = (tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|image|>"))
    factors = json.loads(_FACTORS.read_text(encoding="utf-8"))
    scaling = {"type": "su", "short_factor": factors["short_factor"], "long_factor": factors["long_factor"]}
    config = Phi3VConfig(rope_scaling=scaling, sliding_window=262144, pad_token_id=pad, image_token_id=image)
    if layers:
        config.num_hidden_layers = config.vision_config.num_hidden_layers = layers
    config.save_pretrained(folder / "model")
    processor = Phi3VProcessor(
        Phi3VImageProcessor(num_crops=16, num_img_tokens=config.tokens_per_tile, tile_size=config.tile_size), tokenizer
    )
    processor.save_pretrained(folder / "model")
    (folder / "data" / "images").mkdir(parents=True)
    side = 4 * config.tile_size
    Image.new("RGB", (side, side)).save(folder / "data" / "images" / "page.png")
    words, answers = 8, 8
    for _ in range(3):  # each word is a token; the template's own tokens are found by counting
        _write_split(folder / "data" / "train.jsonl", words, answers)
        example = ConversationDataset(folder / "data", "train", processor, 16)[0]
        labels = int((example["labels"] != -100).sum())
        answers += LABELS - labels
        words += TOKENS - len(example["input_ids"]) - (LABELS - labels)
    if (len(example["input_ids"]), labels, len(example["pixel_values"])) != (TOKENS, LABELS, TILES):
        raise RuntimeError(f"the example has {len(example['input_ids'])} tokens, {labels} labels")


def _write_split(path: Path, words: int, answers: int) -> None:
    turn = {"images": ["page.png"], "user": " ".join([_WORD] * words), "assistant": " ".join([_ANSWER] * answers)}
    lines = [json.dumps({"id": f"page-{n}", "source": "test", "conversations": [turn]}) for n in range(EXAMPLES)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@contextmanager
def without_weights() -> Iterator[None]:
    """Loading a checkpoint makes weights without values on the device; 4-bit layers are built by hand."""
    from phi3v.model import Phi3VForCausalLM
    from phi3v.training import job

    with (
        mock.patch.object(Phi3VForCausalLM, "from_pretrained", classmethod(_on_device)),
        mock.patch.object(job, "load_quantized", quantised),
    ):
        yield


def _on_device(
    cls: Any, folder: str | Path, dtype: torch.dtype = torch.float32, attn_implementation: str = "eager", **_: Any
) -> Any:
    """What from_pretrained followed by .to("cuda") gives."""
    from phi3v.model import Phi3VConfig

    config = Phi3VConfig.from_pretrained(folder)
    with torch.device("cuda"):
        model = cls._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    model.model.vision_embed_tokens.img_processor.vision_model.freeze_unused()
    return model


def quantised(
    folder: str | Path, dtype: torch.dtype = torch.bfloat16, attn: str = "sdpa", device: object = None
) -> Any:
    """adapters.load_quantized by hand: bitsandbytes' Params4bit cannot hold a fake tensor."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    from phi3v.model import Phi3VForCausalLM

    model = Phi3VForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn).to("cuda")
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        new = Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=dtype,
            quant_type="nf4", device="meta",
        )  # fmt: skip
        packed, state = quantize_4bit(linear.weight.data, blocksize=64, quant_type="nf4", compress_statistics=False)
        weight = nn.Parameter(packed, requires_grad=False)
        weight.__dict__.update(
            quant_state=state,
            compress_statistics=False,
            quant_type="nf4",
            quant_storage=torch.uint8,
            bnb_quantized=True,
        )
        new._parameters["weight"], new.quant_state = weight, state
        if linear.bias is not None:
            new.bias = linear.bias
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], new)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.hf_quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
    return model.requires_grad_(False)
