"""Starts that went wrong on machines with GPUs: what they do now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fakegpu.conftest import finetune
from fakegpu.guard import ROOT, child_environment
from fakegpu.walk import Walk, Walked, walks

LORA = ("--use_lora", "--bf16", "--use_flash_attention")
# transformers and find_spec find a package by its name; FlashAttention 4 and wheels of another ABI share it.
NOT_FLASH_ATTENTION_2 = "__version__ = '4.0.0'\n"


def alone(name: str, *flags: str) -> Walk:
    """Started without torchrun on a machine with eight GPUs."""
    walk = finetune(name, *flags)
    return Walk(walk.name, walk.script, walk.arguments, gpus=8)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Walked]:
    folder = tmp_path_factory.mktemp("refusals")
    (folder / "packages" / "flash_attn").mkdir(parents=True)
    (folder / "packages" / "flash_attn" / "__init__.py").write_text(NOT_FLASH_ATTENTION_2)
    resumed = finetune("rank-3", *LORA, out="rank-3", steps=3, world=8)
    jobs = [
        alone("lora", *LORA),
        alone("zero-0", "--bf16", "--zero_stage", "0"),
        finetune("flash_attn", *LORA, packages=str(folder / "packages")),
        Walk("too-many", resumed.script, resumed.arguments, gpus=2, world=4, local_rank=3),
        finetune("rank-0-stopped", *LORA, out="rank-3", steps=3, world=8, stop_at=1),
        Walk("rank-3", resumed.script, resumed.arguments, world=8, local_rank=3),
        Walk(
            "evaluate", "evaluate",
            ["--model_name_or_path", "{base}/rank-3/final", "--data_dir", "{base}/data", "--output_dir", "{base}/ev",
             "--metric", "accuracy", "--passes", "after", "--max_new_tokens", "4", "--no-tqdm", "--bf16"],
            world=8, local_rank=3,
        ),
    ]  # fmt: skip
    return walks(folder, jobs)


@pytest.mark.parametrize("name", ["lora", "zero-0"])
def test_a_lone_process_uses_one_of_several_gpus(walked: dict[str, Walked], name: str) -> None:
    """nn.DataParallel cuts the tiles of a batch along the wrong dimension."""
    assert walked[name].exit_code == 0, walked[name].output


def test_a_package_flash_attn_that_is_not_flash_attention_2_is_not_used(walked: dict[str, Walked]) -> None:
    assert walked["flash_attn"].exit_code == 0, walked["flash_attn"].output
    assert walked["flash_attn"].observed["attention_decoder"] == "sdpa flash"


def test_more_processes_than_gpus_are_refused_in_a_sentence(walked: dict[str, Walked]) -> None:
    result = walked["too-many"]
    assert result.exit_code == 2, result.output
    assert "2 x NVIDIA A100" in result.output or "2 GPU" in result.output, result.output


@pytest.mark.parametrize("name", ["rank-3", "evaluate"])
def test_no_rank_reads_weights_to_gpu_0(walked: dict[str, Walked], name: str) -> None:
    result = walked[name]
    assert result.exit_code == 0, result.output
    assert set(result.loads) <= {"cpu"}, result.loads


def test_gpus_that_pytorch_cannot_use_are_refused(tmp_path: Path) -> None:
    """A driver that is too old, or a CPU build of PyTorch on a machine with GPUs."""
    environment = child_environment() | {"SLURM_JOB_GPUS": "0,1", "CUDA_VISIBLE_DEVICES": "0,1"}
    flags = ["--model_name_or_path", str(tmp_path), "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "scripts/finetune.py", *flags, "--use_lora", "--bf16"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "CUDA" in done.stderr, done.stderr


def test_a_pretending_process_inherits_no_accelerator_and_no_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    """With DS_ACCELERATOR=cpu, left behind by a job on a CPU, DeepSpeed moves the fake model to the CPU."""
    for name in ("DS_ACCELERATOR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "SLURM_JOB_GPUS"):
        monkeypatch.setenv(name, "cpu")
    assert set(child_environment().values()).isdisjoint({"cpu"})
