"""Each script once as on a machine with A100 GPUs, in short."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakegpu.conftest import finetune
from fakegpu.walk import Walk, Walked, walks

LORA = ("--use_lora", "--bf16", "--use_flash_attention")
FULL = ("--bf16", "--use_flash_attention")
JOBS = [
    finetune("lora-stopped", *LORA, out="lora", steps=3, stop_at=1),
    finetune("lora-resumed", *LORA, "--merge", out="lora", steps=3),
    finetune("zero2-stopped", *FULL, out="zero2", steps=3, stop_at=1, world=8),
    finetune("zero2-resumed", *FULL, out="zero2", steps=3, world=8),
    finetune("qlora", "--use_qlora", "--bf16"),
    finetune("packed", *LORA, "--batching", "packed", "--tokens_per_pack", "400"),
    finetune("v100", "--use_lora", "--fp16", "--use_flash_attention", machine="V100", world=8),
    Walk(
        "evaluate", "evaluate",
        ["--model_name_or_path", "{base}/lora/final", "--data_dir", "{base}/data", "--output_dir", "{base}/evaluate",
         "--metric", "accuracy", "--passes", "after", "control", "--max_new_tokens", "8", "--no-tqdm", *FULL],
        world=8,
    ),
    Walk(
        "predict", "predict",
        ["--model_name_or_path", "{base}/lora/final", "--image", "{base}/data/images/red.png", "--question",
         "Which colour is the square ?", "--max_new_tokens", "4", *FULL],
        gpus=1,
    ),
    Walk("merge", "merge", ["--adapter", "{base}/lora/final", "--out", "{base}/merge"], gpus=1),
    Walk(
        "speed", "speed",
        ["--model_name_or_path", "{base}/model", "--data_dir", "{base}/data", "--output_dir", "{base}/speed",
         "--batch_size", "8", "--timed_steps", "1", "--no-tqdm", *FULL],
        world=8,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("walks")


@pytest.fixture(scope="module")
def walked(folder: Path) -> dict[str, Walked]:
    return walks(folder, JOBS)


@pytest.mark.parametrize("name", [job.name for job in JOBS])
def test_the_script_ends_as_on_a_gpu(walked: dict[str, Walked], name: str) -> None:
    expected = 75 if name.endswith("-stopped") else 0
    assert walked[name].exit_code == expected, walked[name].output
    assert walked[name].operators > 0 or name == "merge"
    assert walked[name].live_bytes < 1e6, "memory of the device is still held when the script has ended"


@pytest.mark.parametrize(
    ("name", "kernel", "dtype"),
    [
        ("lora-resumed", "sdpa flash", "bf16"),
        ("zero2-resumed", "sdpa flash", "bf16"),
        ("qlora", "eager", "bf16"),
        ("v100", "sdpa memory-efficient", "fp16"),
    ],
)
def test_observed_names_what_was_asked_for(walked: dict[str, Walked], name: str, kernel: str, dtype: str) -> None:
    observed = walked[name].observed
    assert (observed["attention_decoder"], observed["attention_vision"]) == (kernel, kernel)
    assert observed["activation_dtype"] == dtype


def test_packed_examples_go_through_the_kernel_for_packed_batches(walked: dict[str, Walked]) -> None:
    assert walked["packed"].observed["attention_decoder"] == "sdpa flash (varlen)"


def test_a_stopped_job_resumes_where_it_stopped(walked: dict[str, Walked]) -> None:
    for name in ("lora", "zero2"):
        assert "checkpoint-1" in walked[f"{name}-resumed"].output
        assert walked[f"{name}-resumed"].observed["steps"] == 3


def test_weights_are_exported(folder: Path, walked: dict[str, Walked]) -> None:
    assert (folder / "lora" / "final" / "adapter_model.safetensors").is_file()
    assert (folder / "lora" / "merged" / "model.safetensors").is_file()
    assert (folder / "merge" / "model.safetensors").is_file()
    assert (folder / "zero2" / "final" / "model.safetensors").is_file()


def test_adapters_are_read_to_the_cpu(walked: dict[str, Walked]) -> None:
    """safetensors reads "cuda" as GPU 0 whatever the process's device is."""
    for name, result in walked.items():
        assert set(result.loads) <= {"cpu"}, f"{name}: load_file(device=…) {result.loads}"
