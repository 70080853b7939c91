"""mistral.rs, which shares no code with this package: another language, its own kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden.helpers import official_files
from transformers import PreTrainedTokenizerBase

from clients.checkpoint import with_crops
from clients.pages import SERVING, example
from clients.reference import Answers, Case, answer, check, write_job
from phi3v.model.configuration import OFFICIAL_IMAGE_TOKEN_ID
from phi3v.model.processing import load_tokenizer

pytest.importorskip("mistralrs", reason="mistral.rs has no wheel for this machine")
# Its cache of keys and values is float16 on a CPU otherwise.
ENVIRONMENT = {**os.environ, "MISTRALRS_CPU_KV_F32": "1", "RAYON_NUM_THREADS": "2"}


@pytest.fixture
def mistral(tmp_path) -> Callable[[Path, list[Case]], dict[str, dict[str, Any]]]:
    """mistral.rs' answers by case: "text", "logprobs", "prompt_tokens"."""

    def answers(checkpoint: Path, some: list[Case]) -> dict[str, dict[str, Any]]:
        job, script = write_job(tmp_path / "job.json", checkpoint, some), Path(__file__).with_name("mistral.py")
        subprocess.run([sys.executable, script, job, tmp_path / "result.json"], env=ENVIRONMENT, check=True)
        return json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))

    return answers


def check_texts(checkpoint: Path, ours: Answers, theirs: dict[str, dict[str, Any]]) -> None:
    tokenizer = load_tokenizer(checkpoint)
    for name, found in theirs.items():
        # It gives text, not ids.
        assert found["text"] == tokenizer.decode(ours[name]["ids"]), name
        found["ids"] = ours[name]["ids"]
    check("mistral.rs", ours, theirs)


def test_mistral_rs_writes_the_same_texts(mistral, checkpoint, cases, ours):
    some = [cases["text"], cases["unicode"]]
    check_texts(checkpoint, ours(some), mistral(checkpoint, some))


@pytest.mark.verify
def test_mistral_rs_writes_the_same_long_text(mistral, checkpoint, cases, ours):
    """Beyond 4,096 tokens the long RoPE factors apply."""
    some = [cases["long"]]
    check_texts(checkpoint, ours(some), mistral(checkpoint, some))


def prompt_of_mistral(tokenizer: PreTrainedTokenizerBase, prompt: str, image_tokens: int) -> list[int]:
    """Its prompt with a picture: it decodes the ids of the text, and encodes what stands around the tag again."""
    before, after = tokenizer.decode(tokenizer(prompt)["input_ids"]).split("<|image_1|>")
    return [*tokenizer(before)["input_ids"], *[OFFICIAL_IMAGE_TOKEN_ID] * image_tokens, *tokenizer(after)["input_ids"]]


@pytest.mark.verify
def test_mistral_rs_reads_pictures_by_its_own_rules(mistral, checkpoint, cases, tmp_path):
    """It resizes to the nearest pixel and encodes the prompt anew: its answers differ, its prompts have a known length."""
    model, some = with_crops(checkpoint, tmp_path / "model", official_files(), 1), [cases["square"]]
    ours, theirs = answer(model, some)["square"], mistral(model, some)["square"]
    tokenizer, image_tokens = load_tokenizer(model), ours["prompt_ids"].count(OFFICIAL_IMAGE_TOKEN_ID)
    ids = prompt_of_mistral(tokenizer, some[0]["prompt"], image_tokens)
    assert theirs["prompt_tokens"] == len(ids) == len(ours["prompt_ids"]) + 1
    apart = abs(ours["logprobs"][0] - theirs["logprobs"][0])
    print(
        f"\nhere {tokenizer.decode(ours['ids'])!r}, mistral.rs {theirs['text']!r}, first log-probability {apart:.1e} apart"
    )
    assert theirs["text"] != tokenizer.decode(ours["ids"])


@pytest.mark.verify
def test_the_example_of_the_documentation(checkpoint):
    code = example(SERVING, "from mistralrs", {"merged/my-model": str(checkpoint)})
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip()
