"""Prompts and pictures that every client answers, and the answers of this package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from golden.golden_common import make_image
from PIL import Image

from phi3v.model import Phi3VForCausalLM, Phi3VProcessor

NEW_TOKENS = 24
QUESTION = "What does the picture show? Answer in one sentence."
LONG = " ".join(
    f"Line {number}: the meter of house {number * 7 % 1000} shows {number * 31 % 977}." for number in range(250)
)
PICTURES = {
    "square": [(336, 336)],
    "page": [(1700, 2200)],
    "tall": [(300, 1200)],
    "wide": [(1200, 300)],
    "large": [(2169, 2890)],
    "small": [(40, 50)],
    "two": [(336, 336), (600, 400)],
}


class Case(TypedDict):
    """A prompt that every client answers."""

    name: str
    content: str
    """Without image tags."""
    prompt: str
    """With the chat template."""
    images: list[str]
    """Files."""


Answers = dict[str, dict[str, list[Any]]]
"""By case: "prompt_ids", the greedy "ids" and their "logprobs"."""


def write_cases(folder: Path) -> dict[str, Case]:
    """All cases by name; their pictures are written to `folder`."""
    texts = {
        "text": "Name three rivers of Europe.",
        "unicode": "Qu’est-ce que c’est ? 日本語 – 10 °C ≤ x",
        "long": LONG,
    }
    found = {}
    for name, sizes in {"text": [], "unicode": [], "long": [], **PICTURES}.items():
        images = [str(folder / f"{name}-{number}.png") for number, _ in enumerate(sizes)]
        for number, (file, size) in enumerate(zip(images, sizes, strict=True)):
            make_image(*size, seed=number).save(file)
        content = texts.get(name, QUESTION)
        tags = "".join(f"<|image_{number}|>\n" for number, _ in enumerate(images, 1))
        prompt = f"<|user|>\n{tags}{content}<|end|>\n<|assistant|>\n"
        found[name] = Case(name=name, content=content, prompt=prompt, images=images)
    return found


@torch.inference_mode()
def greedy(model: Phi3VForCausalLM, inputs: Mapping[str, torch.Tensor]) -> dict[str, list[Any]]:
    """The answer to the inputs of one prompt: exactly NEW_TOKENS tokens, whatever they are, as the clients are asked."""
    output = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    logprobs = [float(step[0].float().log_softmax(-1)[token]) for step, token in zip(output.logits, ids, strict=True)]
    return {"prompt_ids": inputs["input_ids"][0].tolist(), "ids": ids, "logprobs": logprobs}


def answer(checkpoint: Path, cases: list[Case]) -> Answers:
    """This package's, in float32 and one prompt at a time."""
    model = Phi3VForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor, found = Phi3VProcessor.from_pretrained(checkpoint), {}
    for case in cases:
        images = [Image.open(file) for file in case["images"]]
        inputs = processor([case["prompt"]], [images] if images else None, padding_side="left")
        found[case["name"]] = greedy(model, inputs)
    return found


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Equal prompt ids, equal tokens out of all, and the largest distance of a log-probability up to the first other one."""
    pairs = list(zip(ours["ids"], theirs["ids"], strict=True))
    equal = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    gaps = [abs(a - b) for a, b in zip(ours["logprobs"][:equal], theirs["logprobs"][:equal], strict=True)]
    # Some give the length of the prompt alone.
    length = len(ours["prompt_ids"])
    same = theirs["prompt_ids"] == ours["prompt_ids"] if "prompt_ids" in theirs else theirs["prompt_tokens"] == length
    return {
        "prompt_tokens": length, "prompt_equal": same, "equal_tokens": equal,
        "logprob_distance": max(gaps, default=0.0),
    }  # fmt: skip


def check(title: str, ours: Answers, theirs: Answers) -> None:
    """Print the comparison as Markdown for docs, and assert that prompts and tokens are equal and probabilities close."""
    print(f"\n{title}\n| case | prompt tokens | equal greedy tokens | log-probability distance |\n|---|---|---|---|")
    rows = {name: compare(ours[name], theirs[name]) for name in ours}
    for name, row in rows.items():
        tokens = f"{row['equal_tokens']} of {NEW_TOKENS}"
        print(f"| {name} | {row['prompt_tokens']} | {tokens} | {row['logprob_distance']:.1e} |")
    for name, row in rows.items():
        assert row["prompt_equal"] and row["equal_tokens"] == NEW_TOKENS, (name, row)
        assert row["logprob_distance"] < 1e-3, (name, row)


def write_job(path: Path, checkpoint: Path, cases: list[Case], **values: Any) -> Path:
    """What a client's own script reads."""
    path.write_text(json.dumps({"checkpoint": str(checkpoint), "cases": cases, "new_tokens": NEW_TOKENS, **values}))
    return path
