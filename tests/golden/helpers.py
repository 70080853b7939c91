"""What the model tests share: golden variants with their weights, and one tiny checkpoint folder."""

import functools
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.golden_common import image_from_spec, make_weight

from phi3v.demo.tiny import build_tiny
from phi3v.model import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor

GOLDEN = Path(__file__).resolve().parent
IMAGE_TOKEN_ID = 32044

TEXTS = [
    "What colour is the square? Answer briefly. red green blue",
    "\nWhat colour is the square?\nAnswer briefly.",
    "How many pictures are there? one two three yes no",
] * 4


def official_files() -> Path:
    """The publisher's JSON files, which are not part of this repository; skips where they are not found."""
    candidates = [os.environ.get("PHI3V_OFFICIAL_FILES"), GOLDEN.parents[2] / "shared" / "golden" / "official_files"]
    for folder in candidates:
        if folder and (Path(folder) / "tokenizer.json").is_file():
            return Path(folder)
    pytest.skip("no published tokenizer: set PHI3V_OFFICIAL_FILES to a folder with the publisher's JSON files")


@functools.cache
def load_json(name: str):
    """A vendored golden JSON file."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


@functools.cache
def load_arrays(name: str):
    """A vendored golden npz file."""
    return np.load(GOLDEN / name)


@functools.cache
def golden_model(variant: str, attn: str = "sdpa", scope: str = "sequence") -> Phi3VForCausalLM:
    """A golden variant with the weights its numbers were made with, in train mode (all dropouts are 0)."""
    spec = load_json("state_dict_tiny.json")[variant]
    config = Phi3VConfig.from_dict({**spec["text"], "vision_config": dict(spec["clip"]), "longrope_scope": scope})
    config._attn_implementation = attn
    model = Phi3VForCausalLM(config)
    weights = {
        name: torch.from_numpy(make_weight(name, spec["shapes"][name], spec["salt"], spec["rules"]))
        for name in model.state_dict()
    }
    model.load_state_dict(weights)
    return model.train()


def pictures(case: dict) -> list:
    """All pictures of a golden case, row by row."""
    return [image_from_spec(spec) for row in case["rows"] for spec in row.get("images") or []]


def own_ids(ids) -> torch.Tensor:
    """Golden ids (negative at image positions) as this package writes them."""
    tensor = torch.as_tensor(np.asarray(ids), dtype=torch.int64)
    return torch.where(tensor < 0, IMAGE_TOKEN_ID, tensor)


@functools.cache
def tiny_folder(**geometry) -> Path:
    """A tiny checkpoint folder, built once a session for each geometry."""
    keeper = tempfile.TemporaryDirectory(prefix="phi3v-tiny-")
    _keepers.append(keeper)
    return build_tiny(keeper.name, TEXTS, seed=1, **geometry)


_keepers: list = []


def tiny_model(attn: str = "sdpa", dtype: torch.dtype = torch.float32, **geometry) -> Phi3VForCausalLM:
    """A fresh model of the tiny folder."""
    return Phi3VForCausalLM.from_pretrained(tiny_folder(**geometry), dtype=dtype, attn_implementation=attn)


def tiny_processor(**geometry) -> Phi3VProcessor:
    """A fresh processor of the tiny folder."""
    return Phi3VProcessor.from_pretrained(tiny_folder(**geometry))


def tiny_pair(**geometry) -> tuple[Phi3VForCausalLM, Phi3VProcessor]:
    """A fresh model of the tiny folder, in eval mode, and its processor."""
    return tiny_model(**geometry).eval(), tiny_processor(**geometry)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Clones of all gradients by name; parameters without one are left out."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst_gradient_error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of any gradient, relative to the norm of all of them together."""
    assert got.keys() == expected.keys()
    norm = torch.stack([g.double().norm() for g in expected.values()]).norm()
    return max(float((got[name].double() - expected[name].double()).norm() / norm) for name in expected)
