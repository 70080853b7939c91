"""vLLM's own Phi-3-vision, from Python and over HTTP: the same prompt ids, greedy tokens and log-probabilities.

vLLM takes configuration and image processor from the publisher's Python files.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from golden.helpers import official_files

from clients.checkpoint import build, with_code, with_crops
from clients.pages import DOCS, SERVING, example
from clients.reference import NEW_TOKENS, Answers, Case, answer, check, write_job
from clients.server import ENVIRONMENT, ask, serve
from phi3v.model import Phi3VForCausalLM
from phi3v.model.adapters import add_lora, save_adapter

pytestmark = pytest.mark.verify
SHORT = 4096
"""The length up to which the short RoPE factors apply; with a larger --max-model-len vLLM takes the long ones for all."""


@pytest.fixture
def vllm(client, tmp_path) -> Callable[..., Answers]:
    """vllm(checkpoint, cases): vLLM's answers, in one process."""

    def answers(checkpoint: Path, some: list[Case], max_model_len: int = SHORT, batched: bool = False) -> Answers:
        job = write_job(tmp_path / "job.json", checkpoint, some, max_model_len=max_model_len, batched=batched)
        variables = {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        client("vllm", Path(__file__).with_name("vllm_offline.py"), job, tmp_path / "result.json", **variables)
        return json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))

    return answers


def test_texts_and_pictures(vllm, served, cases, ours):
    some = [case for name, case in cases.items() if name != "long"]
    check("vLLM, one by one", ours(some), vllm(served, some))


def test_a_batch_of_four(vllm, served, cases, ours):
    four = [cases[name] for name in ("text", "square", "wide", "two")]
    check("vLLM, a batch of four", ours(four), vllm(served, four, batched=True))


def test_a_text_beyond_the_short_factors(vllm, served, cases, ours):
    check("vLLM, long text", ours([cases["long"]]), vllm(served, [cases["long"]], max_model_len=2 * SHORT))


def test_sixteen_crops(vllm, code, cases, checkpoint, tmp_path):
    """The saved number of crops decides, in this package and in vLLM."""
    model = with_crops(checkpoint, tmp_path / "model", official_files(), 16)
    some = [cases["page"], cases["wide"]]
    check("vLLM, 16 crops", answer(model, some), vllm(with_code(model, tmp_path / "served", code), some))


def test_a_checkpoint_of_several_files(vllm, code, cases, tmp_path):
    model, some = build(tmp_path / "model", official_files(), max_shard_size="300MB"), [cases["text"], cases["tall"]]
    assert len(list(model.glob("*.safetensors"))) > 3
    check("vLLM, several files", answer(model, some), vllm(with_code(model, tmp_path / "served", code), some))


def test_a_merged_adapter(vllm, code, cases, checkpoint, tmp_path):
    """What scripts/merge.py makes of an adapter and its base."""
    adapter, merged, some = tmp_path / "adapter", tmp_path / "merged", [cases["text"], cases["tall"]]
    base = with_crops(checkpoint, tmp_path / "base", official_files(), 1)
    adapted = add_lora(Phi3VForCausalLM.from_pretrained(base), 8, 16, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    save_adapter(adapted, adapter)
    changes = {"results/my/train/my-lora/final": str(adapter), "merged/my-model": str(merged)}
    subprocess.run(shlex.split(example(SERVING, "scripts/merge.py", changes)), cwd=DOCS.parent, check=True)
    check("vLLM, merged adapter", answer(merged, some), vllm(with_code(merged, tmp_path / "served", code), some))


def test_over_http(environment, client, served, cases, ours, tmp_path):
    """The command and the example in Python of the documentation, and requests of the OpenAI protocol."""
    some = [cases[name] for name in ("text", "square", "two")]
    options = ("--dtype", "float32", "--enforce-eager", "--skip-mm-profiling")
    with serve(environment("vllm"), served, tmp_path / "server.log", *options) as (url, _):
        check("vLLM over HTTP", ours(some), {case["name"]: ask(url, case, NEW_TOKENS) for case in some})
        changes = {"http://127.0.0.1:8000": url, "page.png": cases["page"]["images"][0]}
        assert client("vllm", "-c", example(SERVING, "from openai import", changes)).stdout.strip()
