"""Prompts and pictures that every client answers, and the answers of this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from golden.golden_common import make_image

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


def cases(folder: Path) -> list[dict[str, Any]]:
    """{"name", "content" without image tags, "prompt" with the chat template, "images": files that are written here}"""
    texts = {
        "text": "Name three rivers of Europe.",
        "unicode": "Qu’est-ce que c’est ? 日本語 – 10 °C ≤ x",
        "long": LONG,
    }
    found = [{"name": name, "content": text, "images": []} for name, text in texts.items()]
    for name, sizes in PICTURES.items():
        files = []
        for number, size in enumerate(sizes):
            files.append(str(folder / f"{name}-{number}.png"))
            make_image(*size, seed=number).save(files[-1])
        found.append({"name": name, "content": QUESTION, "images": files})
    for case in found:
        tags = "".join(f"<|image_{number}|>\n" for number, _ in enumerate(case["images"], 1))
        case["prompt"] = f"<|user|>\n{tags}{case['content']}<|end|>\n<|assistant|>\n"
    return found


@torch.inference_mode()
def answer(checkpoint: Path, cases: list[dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """By case: "prompt_ids", the greedy "ids" and their "logprobs", float32 and one prompt at a time."""
    from PIL import Image

    model = Phi3VForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = Phi3VProcessor.from_pretrained(checkpoint)
    found = {}
    for case in cases:
        images = [Image.open(file) for file in case["images"]]
        inputs = processor([case["prompt"]], [images] if images else None, padding_side="left")
        # As the clients are asked: exactly so many tokens, whatever they are.
        output = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, output_scores=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        length = inputs["input_ids"].shape[1]
        ids = output.sequences[0, length:].tolist()
        logprobs = [
            float(step[0].float().log_softmax(-1)[token]) for step, token in zip(output.logits, ids, strict=True)
        ]
        found[case["name"]] = {"prompt_ids": inputs["input_ids"][0].tolist(), "ids": ids, "logprobs": logprobs}
    return found


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Equal prompt ids, equal tokens out of all, and the largest distance of a log-probability up to the first other one."""
    pairs = list(zip(ours["ids"], theirs["ids"], strict=True))
    equal = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    gaps = [abs(a - b) for a, b in zip(ours["logprobs"][:equal], theirs["logprobs"][:equal], strict=True)]
    prompt = theirs.get("prompt_ids")
    same = None if prompt is None else prompt == ours["prompt_ids"]
    return {"prompt_equal": same, "equal_tokens": equal, "of": len(pairs), "logprob_distance": max(gaps, default=0.0)}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The comparison as Markdown, for docs."""
    lines = ["| case | prompt ids | equal greedy tokens | log-probability distance |", "|---|---|---|---|"]
    for name, row in rows.items():
        prompt = {True: "equal", False: "differ", None: "not given"}[row["prompt_equal"]]
        lines.append(f"| {name} | {prompt} | {row['equal_tokens']} of {row['of']} | {row['logprob_distance']:.1e} |")
    return "\n".join(lines)


def write_job(path: Path, checkpoint: Path, cases: list[dict[str, Any]], **values: Any) -> Path:
    """What a client's own script reads."""
    path.write_text(json.dumps({"checkpoint": str(checkpoint), "cases": cases, "new_tokens": NEW_TOKENS, **values}))
    return path
