"""vLLM's own Phi-3-vision, from Python and over HTTP: the same prompt ids, greedy tokens and log-probabilities.

vLLM takes configuration and image processor from the publisher's Python files.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from golden.helpers import official_files

from clients.checkpoint import build
from clients.conftest import with_code
from clients.reference import NEW_TOKENS, answer, compare, table, write_job
from phi3v.model import Phi3VForCausalLM, Phi3VProcessor
from phi3v.model.adapters import add_lora, merge, save_adapter

pytestmark = pytest.mark.verify
SCRIPT = Path(__file__).with_name("vllm_offline.py")
# One process, 1 GiB of keys and values, threads where the system puts them.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
SHORT = 4096
"""The length up to which the short RoPE factors apply; with a larger --max-model-len vLLM takes the long ones for all."""


def offline(client, checkpoint: Path, questions: list[dict], folder: Path, **values: Any) -> dict[str, Any]:
    job = write_job(folder / "job.json", checkpoint, questions, **{"max_model_len": SHORT, **values})
    client("vllm", SCRIPT, job, folder / "result.json", **ENVIRONMENT)
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def check(title: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    rows = {name: compare(ours[name], result) for name, result in theirs.items()}
    print(f"\n{title}\n{table(rows)}")
    for name, row in rows.items():
        assert row["prompt_equal"] is not False, name
        assert row["equal_tokens"] == NEW_TOKENS, name
        assert row["logprob_distance"] < 1e-3, name


def short(questions: list[dict]) -> list[dict]:
    return [case for case in questions if case["name"] != "long"]


def test_texts_and_pictures(client, served, questions, ours, tmp_path):
    check("vLLM, one by one", ours, offline(client, served, short(questions), tmp_path))


def test_a_batch_of_four(client, served, questions, ours, tmp_path):
    four = [case for case in questions if case["name"] in ("text", "square", "wide", "two")]
    check("vLLM, a batch of four", ours, offline(client, served, four, tmp_path, batched=True))


def test_a_text_beyond_the_short_factors(client, served, questions, ours, tmp_path):
    long = [case for case in questions if case["name"] == "long"]
    check("vLLM, 4,838 tokens", ours, offline(client, served, long, tmp_path, max_model_len=2 * SHORT))


def test_sixteen_crops(client, code, questions, checkpoint, tmp_path):
    """The saved number of crops decides, in this package and in vLLM."""
    model = tmp_path / "sixteen"
    shutil.copytree(checkpoint, model, copy_function=os.link)
    (model / "preprocessor_config.json").unlink()
    Phi3VProcessor.from_pretrained(official_files(), num_crops=16).save_pretrained(tmp_path / "files")
    shutil.copy(tmp_path / "files" / "preprocessor_config.json", model)
    pages = [case for case in questions if case["name"] in ("page", "wide")]
    theirs = offline(client, with_code(model, tmp_path / "served", code), pages, tmp_path)
    check("vLLM, 16 crops", answer(model, pages), theirs)


def test_a_merged_adapter_and_a_sharded_checkpoint(client, code, questions, checkpoint, tmp_path):
    """Both at once: an adapter is trained on a checkpoint of several files, merged, and read by vLLM."""
    base = build(tmp_path / "base", official_files(), max_shard_size="300MB")
    assert len(list(base.glob("*.safetensors"))) > 3
    some = [case for case in questions if case["name"] in ("text", "tall")]
    check(
        "vLLM, several files",
        answer(base, some),
        offline(client, with_code(base, tmp_path / "b", code), some, tmp_path),
    )
    adapted = add_lora(Phi3VForCausalLM.from_pretrained(base), 8, 16, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    save_adapter(adapted, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    theirs = offline(client, with_code(tmp_path / "merged", tmp_path / "m", code), some, tmp_path)
    check("vLLM, merged adapter", answer(tmp_path / "merged", some), theirs)


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def ask(url: str, case: dict[str, Any]) -> dict[str, Any]:
    """One chat completion of the OpenAI protocol, pictures as data: URLs."""
    pictures = [
        {
            "type": "image_url",
            "image_url": {"url": "data:image/png;base64," + base64.b64encode(Path(file).read_bytes()).decode()},
        }
        for file in case["images"]
    ]
    body = {
        "model": "phi3v", "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": case["content"]}]}],
        "temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": True, "top_logprobs": 0,
        "return_token_ids": True, "add_special_tokens": not pictures,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=900) as answered:
        content = json.load(answered)
    choice = content["choices"][0]
    logprobs = [step["logprob"] for step in choice["logprobs"]["content"]]
    return {"prompt_ids": content["prompt_token_ids"], "ids": choice["token_ids"], "logprobs": logprobs}


def test_over_http(served, questions, ours, tmp_path):
    """The command of docs/how-to/serve.md, and requests of the OpenAI protocol."""
    port = free_port()
    python = Path(os.environ.get("PHI3V_CLIENTS", ".clients")).resolve() / "vllm" / "bin" / "python"
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", served, "--served-model-name", "phi3v",
        "--trust-remote-code", "--dtype", "float32", "--max-model-len", str(SHORT), "--limit-mm-per-prompt", '{"image": 2}',
        "--enforce-eager", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen([*map(str, command)], env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()[
                    -4000:
                ]
                time.sleep(1)
        some = [case for case in questions if case["name"] in ("text", "square", "two")]
        check("vLLM over HTTP", ours, {case["name"]: ask(url, case) for case in some})
    finally:
        os.killpg(server.pid, 15)
        server.wait(60)
