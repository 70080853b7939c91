"""A checkpoint that other programs accept as Phi-3.5-vision: the published tower and vocabulary, and a small decoder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from phi3v.model import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor

# Heads keep the published 96 columns, so that the published RoPE factors fit.
DECODER = {
    "hidden_size": 384, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4,
}  # fmt: skip


def build(folder: Path, published: Path, num_crops: int = 4, max_shard_size: str = "50GB", **values: object) -> Path:
    """Write random float32 weights (0.34 billion) with the publisher's JSON files of `published`; returns `folder`.

    max_shard_size: of a weights file; several files have an index beside them. values: of config.json.
    """
    read = json.loads((published / "config.json").read_text(encoding="utf-8"))
    config = Phi3VConfig.from_dict({**read, **DECODER, "torch_dtype": "float32", **values})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        model = Phi3VForCausalLM(config).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Initialised small, a random decoder repeats its input; these attend and differ.
                if name.endswith(("qkv_proj.weight", "o_proj.weight", "down_proj.weight", "gate_up_proj.weight")):
                    parameter.mul_(4)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    Phi3VProcessor.from_pretrained(published, num_crops=num_crops).save_pretrained(folder)
    return folder


def with_crops(checkpoint: Path, folder: Path, published: Path, num_crops: int) -> Path:
    """A folder of links to the checkpoint's files, but for a preprocessor_config.json with another `num_crops`."""
    Phi3VProcessor.from_pretrained(published, num_crops=num_crops).save_pretrained(folder)
    for file in checkpoint.iterdir():
        if file.name != "preprocessor_config.json":
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file)
    return folder


def with_code(checkpoint: Path, folder: Path, code: Path) -> Path:
    """A folder of links to the checkpoint's files and to the publisher's Python files in `code`."""
    folder.mkdir()
    for file in (*checkpoint.iterdir(), *code.glob("*_phi3_v.py")):
        (folder / file.name).symlink_to(file.resolve())
    return folder
