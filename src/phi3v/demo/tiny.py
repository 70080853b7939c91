"""A tiny random Phi-3.5-vision with a small tokenizer of its own, in the published folder layout.

Everything that matters behaves as in the published model: special tokens, one beginning of sequence a text piece,
SentencePiece spaces, byte fallback, tiles and token counts by the same formulas. Only the sizes and ids are small.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from phi3v.model.configuration import Phi3VConfig
from phi3v.model.image_processing import Phi3VImageProcessor
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.model.processing import CHAT_TEMPLATE, Phi3VProcessor, json_file

# Published order of the special tokens behind the vocabulary; True: strips white space on its right.
SPECIAL_TOKENS = (
    ("<|endoftext|>", False),
    ("<|assistant|>", True),
    ("<|system|>", False),
    ("<|end|>", False),
    ("<|user|>", False),
    ("<|image|>", True),
)
ADDITIONAL_SPECIAL_TOKENS = ["<|system|>", "<|end|>", "<|user|>", "<|end|>"]
"""As the published special_tokens_map.json lists them."""

UNKNOWN = "<unk>"
NORMALIZER = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _trained(texts: Iterable[str], max_tokens: int) -> Tokenizer:
    """A BPE tokenizer with the published vocabulary's first 259 ids, and merges that never cross a word."""
    trainee = Tokenizer(models.BPE(unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    trainee.normalizer = NORMALIZER
    # Training must not merge across words, nor take in line breaks and digits, which the published vocabulary keeps
    # apart as well. Encoding itself needs no pre-tokeniser: merges that never cross a word cannot join two.
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "removed"),
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=max_tokens, min_frequency=2, special_tokens=special, show_progress=False)
    trainee.train_from_iterator(texts, trainer)
    return trainee


def train_tokenizer(texts: Iterable[str], max_tokens: int = 2000) -> PreTrainedTokenizerFast:
    """A byte-fallback BPE tokenizer like the published one, trained on `texts`.

    Words that appear at least twice become single tokens as long as `max_tokens` allows. Ids: 0 <unk>, 1 <s>, 2 </s>,
    then 256 bytes, letters and merges, then the special tokens.
    """
    learnt = json.loads(_trained(texts, max_tokens).to_str())["model"]
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=learnt["vocab"], merges=merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = NORMALIZER
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>")])
    tokenizer.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    tokenizer.add_special_tokens([AddedToken(name, rstrip=strip, normalized=False) for name, strip in SPECIAL_TOKENS])
    config = {
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "padding_side": "right",
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **config)
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {
        str(index): {flag: getattr(token, flag) for flag in flags}
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    published = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "auto_map": {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"},
        "legacy": False,
        "processor_class": "Phi3VProcessor",
        "tokenizer_class": "LlamaTokenizer",
        **config,
    }
    special = {name: value for name, value in config.items() if name.endswith("_token")}
    fast.published_files = {
        "tokenizer.json": fast.backend_tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json_file(published),
        "special_tokens_map.json": json_file({"additional_special_tokens": ADDITIONAL_SPECIAL_TOKENS, **special}),
    }
    return fast


def tiny_config(
    tokenizer: PreTrainedTokenizerFast,
    tile_size: int = 28,
    patch_size: int = 7,
    vision_hidden_size: int = 64,
    vision_layers: int = 3,
    vision_heads: int = 4,
    hidden_size: int = 96,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int | None = None,
    max_position_embeddings: int = 8192,
    original_max_position_embeddings: int = 2048,
) -> Phi3VConfig:
    """A configuration of any geometry with this tokenizer's ids.

    `vision_layers` counts the last one, which never runs. Image tokens: (tile_size / patch_size / 2)^2 a tile.
    """
    half = hidden_size // heads // 2
    endoftext, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|end|>"))
    return Phi3VConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=max_position_embeddings,
        # The published 0.02 suits a width of 3072; narrow layers start on a plateau with it.
        initializer_range=hidden_size**-0.5,
        original_max_position_embeddings=original_max_position_embeddings,
        # Factors that grow with the wavelength, as the published ones do.
        rope_scaling={
            "type": "su",
            "short_factor": [1.0 + 2.0 * i / half for i in range(half)],
            "long_factor": [1.0 + 12.0 * i / half for i in range(half)],
        },
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=2,
        pad_token_id=endoftext,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        end_token_ids=[2, endoftext, end],
        vision_config={
            "hidden_size": vision_hidden_size,
            "intermediate_size": 2 * vision_hidden_size,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_heads,
            "image_size": tile_size,
            "patch_size": patch_size,
        },
        architectures=["Phi3VForCausalLM"],
    )


def build_tiny(
    folder: str | Path,
    texts: Iterable[str],
    seed: int = 0,
    num_crops: int = 4,
    max_tokens: int = 2000,
    dtype: torch.dtype = torch.float32,
    **geometry: int,
) -> Path:
    """Write a random tiny checkpoint folder and return its path. The same arguments give the same bytes.

    texts: what the tokenizer learns from (prompts and answers; repeat what shall be single tokens). geometry: see
    `tiny_config`. The folder loads with `Phi3VForCausalLM.from_pretrained` and `Phi3VProcessor.from_pretrained`.
    """
    folder = Path(folder)
    tokenizer = train_tokenizer(texts, max_tokens)
    config = tiny_config(tokenizer, **geometry)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Phi3VForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    processor = Phi3VProcessor(
        Phi3VImageProcessor(num_crops=num_crops, num_img_tokens=config.tokens_per_tile, tile_size=config.tile_size),
        tokenizer,
    )
    processor.save_pretrained(folder)
    return folder
