"""The real thing: full size with random weights, kernels against eager, 4-bit layers, resume and merge.

Collected on a machine with a CUDA device only. One GPU of 80 GB takes every test; a smaller one skips what does not
fit.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakegpu.budgets import read_budgets
from training_fixtures import ROOT, await_step, finish, launch, write_base

pytestmark = pytest.mark.verify
PEAKS = {budget.job.name: budget.budget["peak_gb"] for budget in read_budgets()}
JOBS = [
    {"method": method, "attention": attention, "accumulation": 1}
    for method in ("lora", "qlora", "frozen", "full")
    for attention in ("flash", "eager")
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job['method']}-{job['attention']}")
def test_full_size(job: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Memory within 5 % of the fake GPU's, and no host wait in a micro-step of flash attention without DeepSpeed."""
    done = subprocess.run(
        [sys.executable, "tests/gpu/full_size_job.py", json.dumps(job)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "OutOfMemoryError" in done.stderr:
        pytest.skip("this GPU has too little memory for the job")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n{json.dumps(result)}")
    assert math.isfinite(result["loss"])
    expected = PEAKS.get(result["job"])
    if expected is not None:
        assert result["peak_gb"] == pytest.approx(expected, rel=0.05)
    if job["method"] in ("lora", "qlora") and job["attention"] == "flash":
        assert not result["waits"]


def loss_and_gradient(base: Path, attention: str, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Of the tiny model in bfloat16 on the GPU."""
    from phi3v.model import Phi3VForCausalLM

    model = Phi3VForCausalLM.from_pretrained(
        base / "model", dtype=torch.bfloat16, attn_implementation=attention
    ).to("cuda")  # fmt: skip
    loss = model(**{name: value.to("cuda") for name, value in batch.items()})["loss"]
    loss.backward()
    return float(loss), model.model.layers[0].self_attn.qkv_proj.weight.grad.float()


@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_computes_what_eager_attention_does(tmp_path: Path, packed: bool) -> None:
    from phi3v.data.dataset import ConversationDataset, collate
    from phi3v.model import Phi3VProcessor
    from phi3v.training.batches import pack

    base = write_base(tmp_path)
    processor = Phi3VProcessor.from_pretrained(base / "model")
    dataset = ConversationDataset(base / "data", "train", processor, 2)
    examples = [dataset[index] for index in range(3)]
    batch = pack(examples) if packed else collate(examples, processor.tokenizer.pad_token_id)
    (eager, expected), (flash, gradient) = (loss_and_gradient(base, name, batch) for name in ("eager", "sdpa"))
    assert flash == pytest.approx(eager, rel=0.02)
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("rows", [1, 64, 2048])  # a decoding step, a short prompt, and bitsandbytes' path over products
def test_a_4_bit_layer_computes_what_its_expanded_weights_do(rows: int) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(256, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cuda")
    inputs = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
    expanded = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    torch.testing.assert_close(layer(inputs).float(), inputs.float() @ expanded.t(), rtol=0.05, atol=0.05)


def test_lora_stops_resumes_and_merges(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    flags = [
        "--model_name_or_path", str(base / "model"), "--data_dir", str(base / "data"), "--use_lora", "--lora_rank", "4",
        "--bf16", "--use_flash_attention", "--batch_size", "4", "--save_steps", "1", "--no-tqdm", "--merge",
    ]  # fmt: skip
    flags += ["--output_dir", str(tmp_path / "out"), "--max_steps", "4"]
    process = launch(flags)
    await_step(process, tmp_path / "out", 1)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    code, output = finish(launch(flags))
    assert code == 0 and "checkpoint-" in output, output
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()
    observed = json.loads((tmp_path / "out" / "observed.json").read_text())
    assert observed["attention_decoder"] == "sdpa flash"
