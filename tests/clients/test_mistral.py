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
from PIL import Image

from clients.checkpoint import with_crops
from clients.pages import SERVING, example
from clients.reference import Answers, Case, answer, check, write_job
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


@pytest.mark.verify
def test_mistral_rs_resizes_pictures_by_its_own_rule(mistral, checkpoint, cases, tmp_path):
    """To the nearest pixel, in place of bilinear and bicubic. Where that makes no difference, the answers are the same."""
    model = with_crops(checkpoint, tmp_path / "model", official_files(), 1)
    plain = Case(**{**cases["square"], "name": "plain", "images": [str(tmp_path / "plain.png")]})
    Image.new("RGB", (336, 336), (200, 40, 90)).save(plain["images"][0])
    some = [plain, cases["square"], cases["page"]]
    ours, theirs = answer(model, some), mistral(model, some)
    tokenizer = load_tokenizer(model)
    for name in ("square", "page"):
        text, other = tokenizer.decode(ours[name]["ids"]), theirs[name]["text"]
        first = abs(ours[name]["logprobs"][0] - theirs[name]["logprobs"][0])
        same = next((n for n, pair in enumerate(zip(text, other, strict=False)) if len(set(pair)) > 1), len(text))
        print(f"{name}: the first {same} of {len(text)} characters equal, first log-probability {first:.1e} apart")
        assert theirs[name]["prompt_tokens"] == len(ours[name]["prompt_ids"])
    check_texts(model, {"plain": ours["plain"]}, {"plain": theirs["plain"]})


@pytest.mark.verify
def test_the_example_of_the_documentation(checkpoint):
    code = example(SERVING, "from mistralrs", {"merged/my-model": str(checkpoint)})
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip()
