"""Long proofs, run by `make verify-training`: killed at random moments and started again, the weights are the same."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from training_fixtures import await_step, finish, kill, last_step, launch, weights, write_data, write_model

pytestmark = pytest.mark.verify

METHODS = {
    "full": ["--bf16"],
    "lora": ["--use_lora", "--lora_rank", "4", "--bf16", "--use_flash_attention"],
    "qlora": ["--use_qlora", "--lora_rank", "4", "--fp16", "--lora_dropout", "0.1"],
}
STEPS, SAVE = 48, 3


def command(tmp_path: Path, out: Path, method: str) -> list[str]:
    return [
        "--model_name_or_path", str(tmp_path / "model"), "--data_dir", str(tmp_path / "data"), "--output_dir", str(out),
        "--batch_size", "8", "--max_steps", str(STEPS), "--warmup_steps", "4", "--learning_rate", "2e-3",
        "--save_steps", str(SAVE), "--no-tqdm", *METHODS[method],
    ]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_killed_five_times_and_resumed_ends_with_the_same_bytes(tmp_path: Path, method: str) -> None:
    write_data(tmp_path / "data", examples=20, text_only_every=7)
    write_model(tmp_path / "model")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    code, output = finish(launch(command(tmp_path, straight, method), processes=2))
    assert code == 0, output
    moments = random.Random(method)
    for round_ in range(5):
        target = last_step(broken) + moments.randrange(4, 8) - (round_ > 0)
        process = launch(command(tmp_path, broken, method), processes=2)
        await_step(process, broken, target)
        time.sleep(moments.random() * 0.3)
        before = last_step(broken)
        output = kill(process)
        if round_:
            assert "going on from here" in output, output
        assert before < STEPS
    process = launch(command(tmp_path, broken, method), processes=2)
    await_step(process, broken, last_step(broken) + 3)
    process.send_signal(signal.SIGTERM)
    stopped, output = finish(process)
    saved = last_step(broken)
    if saved < STEPS:
        assert stopped != 0, output
        assert f"saved at step {saved}" in output, output
    code, output = finish(launch(command(tmp_path, broken, method), processes=2))
    assert code == 0, output
    assert f"checkpoint-{saved}: going on from here" in output, output
    assert weights(broken / "final") == weights(straight / "final")
    steps = list((broken / "metrics.jsonl").read_text().splitlines())
    assert len(steps) == STEPS
