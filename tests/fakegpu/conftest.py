"""Without g++ or with a CUDA build of PyTorch nothing here can run."""

from __future__ import annotations

import pytest

from fakegpu import guard
from fakegpu.walk import Walk


@pytest.fixture(scope="session", autouse=True)
def guard_library() -> None:
    """The guard, built once for the session."""
    if reason := guard.missing():
        pytest.skip(reason)
    guard.build()


def finetune(name: str, *flags: str, world: int = 0, out: str = "", steps: int = 2, **more: object) -> Walk:
    """A walk of scripts/finetune.py: `steps` optimizer steps of two micro-batches each, into {base}/OUT or NAME."""
    processes = max(1, world)
    arguments = [
        "--model_name_or_path", "{base}/model", "--data_dir", "{base}/data", "--output_dir", f"{{base}}/{out or name}",
        "--batch_size", str(2 * processes), "--max_steps", str(steps), "--warmup_steps", "1", "--no-tqdm",
        "--lora_rank", "4", *flags,
    ]  # fmt: skip
    return Walk(name, "finetune", arguments, world=world, gpus=8 if world else 1, **more)  # type: ignore[arg-type]
