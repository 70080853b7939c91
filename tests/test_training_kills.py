"""Killed at random moments and started again, the weights are the same.

The short form is a test as any other; the long one is run by `make verify-training`, figures in docs/measurements.md.
"""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from training_fixtures import await_step, finish, kill, last_step, launch, weights, write_base

METHODS = {
    "full": ["--bf16"],
    "lora": ["--use_lora", "--lora_rank", "4", "--bf16", "--use_flash_attention"],
    "qlora": ["--use_qlora", "--lora_rank", "4", "--fp16", "--lora_dropout", "0.1"],
    "dora": ["--use_lora", "--use_dora", "--lora_rank", "4", "--bf16", "--batching", "length"],
}
STEPS, SAVE = 72, 3
KILLS, STOPS = 5, 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("kills"), examples=20, text_only_every=7)


def command(base: Path, out: Path, method: str, steps: int = STEPS) -> list[str]:
    return [
        "--model_name_or_path", str(base / "model"), "--data_dir", str(base / "data"), "--output_dir", str(out),
        "--batch_size", "8", "--max_steps", str(steps), "--warmup_steps", "4", "--learning_rate", "2e-3",
        "--save_steps", str(SAVE), "--no-tqdm", *METHODS[method],
    ]  # fmt: skip


def resumed_from(output: str) -> int:
    """Step of the checkpoint that a run said it goes on from; 0 where it began anew."""
    found = re.search(r"checkpoint-(\d+): resuming from here", output)
    return int(found.group(1)) if found else 0


@pytest.mark.parametrize("method", ["lora", *(pytest.param(m, marks=pytest.mark.verify) for m in ("qlora", "dora"))])
def test_killed_once_and_resumed_ends_with_the_same_bytes(base: Path, tmp_path: Path, method: str, capfd) -> None:
    """One process; full fine-tuning under ZeRO is in test_training_checkpoints.py."""
    from accelerate.state import AcceleratorState

    from phi3v.settings import FinetuneSettings, parse
    from phi3v.training.finetune import run

    threads = torch.get_num_threads()
    try:
        for out in (tmp_path / "straight", tmp_path / "broken"):
            if out.name == "broken":
                process = launch(command(base, out, method, 10))
                await_step(process, out, 5)
                kill(process)
                assert not (out / "final").exists()
                capfd.readouterr()
            torch.set_num_threads(1)  # as `launch` does it: the order of sums depends on it
            assert run(parse(FinetuneSettings, "", command(base, out, method, 10))) == 0
            AcceleratorState._reset_state(reset_partial_state=True)
    finally:
        torch.set_num_threads(threads)
    assert resumed_from(capfd.readouterr().err) in (3, 6, 9)
    assert weights(tmp_path / "broken" / "final") == weights(tmp_path / "straight" / "final")


@pytest.mark.verify
@pytest.mark.parametrize("method", METHODS)
def test_killed_many_times_and_resumed_ends_with_the_same_bytes(base: Path, tmp_path: Path, method: str) -> None:
    """Two processes: SIGKILL at five random moments in a row, then SIGTERM at three."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    code, output = finish(launch(command(base, straight, method), processes=2))
    assert code == 0, output
    moments = random.Random(method)
    repeated: dict[str, list[int]] = {"SIGKILL": [], "SIGTERM": []}
    last, before = 0, ""
    for end in ["SIGKILL"] * KILLS + ["SIGTERM"] * STOPS:
        process = launch(command(base, broken, method), processes=2)
        await_step(process, broken, last + moments.randrange(2, 8))
        time.sleep(moments.random() * 0.3)
        if end == "SIGKILL":
            output = kill(process)
        else:
            process.send_signal(signal.SIGTERM)
            code, output = finish(process)
            assert code != 0, output
            assert f"SIGTERM: saved at step {last_step(broken)}" in output, output
        if last:
            repeated[before].append(last - resumed_from(output))
        before, last = end, last_step(broken)
        assert last < STEPS, "the run ended before it was killed"
    code, output = finish(launch(command(base, broken, method), processes=2))
    assert code == 0, output
    repeated[before].append(last - resumed_from(output))
    print(f"{method}: steps repeated after SIGKILL {repeated['SIGKILL']}, after SIGTERM {repeated['SIGTERM']}")
    assert (
        max(repeated["SIGKILL"]) <= 2 * SAVE
    )  # an interval, and the steps while the last checkpoint was being written
    assert max(repeated["SIGTERM"]) == 0
    assert weights(broken / "final") == weights(straight / "final")
    assert len((broken / "metrics.jsonl").read_text().splitlines()) == STEPS
