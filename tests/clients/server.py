"""vLLM's server, started with the command of the documentation, and requests of the OpenAI protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clients.pages import SERVING, example

# One GiB of keys and values, threads where the system puts them.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}  # fmt: skip
SECONDS_TO_START = 1800


@contextlib.contextmanager
def serve(environment: Path, model: Path, log: Path, *options: str, threads: int = 2) -> Iterator[tuple[str, int]]:
    """(URL, process id) of a server that is ready; `environment` has vLLM, `options` follow the page's command."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
    page = example(SERVING, "vllm serve", {"merged/my-model": str(model), "\\\n": ""})
    # `vllm serve` of the CPU build asks for the metadata of a package of another name; this is what it would start.
    start = [str(environment / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command = [*start, *shlex.split(page)[2:], "--host", "127.0.0.1", "--port", port, *options]
    values = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    values |= {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    with log.open("w") as file:
        server = subprocess.Popen(command, env=values, stdout=file, stderr=file, start_new_session=True)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS_TO_START
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{shlex.join(command)}: not ready\n{log.read_text()[-4000:]}")
            time.sleep(1)
        yield url, server.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def ask(url: str, case: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """Ids and log-probabilities of one chat completion with exactly so many tokens; pictures as data: URLs before the text."""
    encoded = [base64.b64encode(Path(file).read_bytes()).decode() for file in case["images"]]
    pictures = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}} for text in encoded]
    body = {
        "model": "phi3v", "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": case["content"]}]}],
        "temperature": 0, "max_tokens": new_tokens, "ignore_eos": True, "logprobs": True, "top_logprobs": 0,
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
