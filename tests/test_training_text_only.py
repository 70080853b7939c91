"""Examples without a picture among others: DDP of one process, ZeRO 3, validation, batches without labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_fixtures import finish, launch, write_base

# The first epoch's micro-batches hold one example each, so some of them hold text alone.
BASE = {
    "batch_size": 8, "max_steps": 2, "warmup_steps": 1, "learning_rate": 2e-3, "fp32": True, "tqdm": False,
    "gradient_checkpointing": False, "lora_rank": 4, "eval_steps": 1,
}  # fmt: skip
FROZEN: dict[str, Any] = {"freeze_vision_model": "vision"}
CASES: dict[str, dict[str, Any]] = {
    "LoRA": {"use_lora": True},
    "LoRA, vision frozen": {"use_lora": True} | FROZEN,
    "QLoRA": {"use_qlora": True},
    "full, ZeRO 0": {"zero_stage": 0},
    "frozen, ZeRO 0": {"zero_stage": 0} | FROZEN,
    "full, ZeRO 3": {"zero_stage": 3},
    "frozen, ZeRO 3": {"zero_stage": 3} | FROZEN,
}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def results(request, tmp_path_factory) -> dict[str, tuple[list, Path]]:
    """What every case ended with under torchrun, [exit code, error class, message], and its folder."""
    base = write_base(tmp_path_factory.mktemp("text"), examples=16, text_only_every=3)
    cases = [
        BASE | values | {
            "model_name_or_path": str(base / "model"), "data_dir": str(base / "data"), "output_dir": str(base / name)
        }
        for name, values in CASES.items()
    ]  # fmt: skip
    (base / "cases.json").write_text(json.dumps(cases))
    started = launch(
        [str(base / "cases.json"), str(base)], request.param, script="tests/training_cases.py", torchrun=True
    )
    code, output = finish(started, seconds=200)
    assert code == 0, output
    ended = json.loads((base / "rank0.json").read_text())
    return {name: (result, base / name) for name, result in zip(CASES, ended, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_every_method_trains_and_validates_where_examples_are_text_alone(results, case):
    result, folder = results[case]
    assert result == [0, "", ""]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert [line["step"] for line in lines if "eval_loss" in line] == [1, 2]


def test_the_loss_does_not_depend_on_the_sharding(results):
    def curve(case: str) -> list[float]:
        lines = (results[case][1] / "metrics.jsonl").read_text().splitlines()
        return [values.get("loss", values.get("eval_loss")) for values in map(json.loads, lines)]

    for name in ("full", "frozen"):
        assert curve(f"{name}, ZeRO 3") == pytest.approx(curve(f"{name}, ZeRO 0"), rel=1e-5)
