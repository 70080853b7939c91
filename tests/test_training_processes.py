"""Two processes against one: the same loss curve, the same weights; ZeRO 3; a checkpoint that lacks a rank."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import finish, launch, train_here, write_base

from phi3v.training.checkpoints import checkpoint_folders

STEPS = 20
BASE = {
    "batch_size": 8, "max_steps": STEPS, "warmup_steps": 2, "learning_rate": 2e-3, "fp32": True, "tqdm": False,
    "gradient_checkpointing": False,
}  # fmt: skip
ACCUMULATE: dict[str, dict[str, Any]] = {
    "2 x 4 accumulate": {"zero_stage": 0},
    "2 x 2 of like lengths": {"zero_stage": 0, "batch_size_per_gpu": 2, "batching": "length"},
    "2 packed": {"zero_stage": 0, "batching": "packed", "tokens_per_pack": 300},
    "2 x auto": {"zero_stage": 0, "batch_size_per_gpu": "auto"},
    "2 x 4 ZeRO 2": {"zero_stage": 2},
    "2 packed ZeRO 2": {"zero_stage": 2, "batching": "packed", "tokens_per_pack": 300},
    "2 x 4 ZeRO 3": {"zero_stage": 3},
}
# Told to leave in step 7: once and for all in one folder, and going on in another.
STOPPED = {"zero_stage": 3, "stop_after": 7}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("processes"), examples=20, text_only_every=7)


def settings(base: Path, name: str, **values) -> dict[str, Any]:
    folders = {
        "model_name_or_path": str(base / "model"), "data_dir": str(base / "data"), "output_dir": str(base / name)
    }  # fmt: skip
    return BASE | folders | values


@pytest.fixture(scope="module")
def two(base) -> list[list]:
    """Every case on two processes, in one start; [exit code, error class, message] of each by the first process."""
    cases = [settings(base, name, **values) for name, values in ACCUMULATE.items()]
    cases += [settings(base, "left", **STOPPED), settings(base, "stopped", **STOPPED)]
    cases += [settings(base, "stopped", zero_stage=3)]
    (base / "cases.json").write_text(json.dumps(cases))
    code, output = finish(launch([str(base / "cases.json"), str(base)], processes=2, script="tests/training_cases.py"))
    assert code == 0, output
    trainable = sum(value.numel() for value in weights_of_base(base).values()) - unused(base)
    assert output.count(f" {trainable:,} trainable parameters") == len(cases), output
    results = [json.loads((base / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [item[0] for item in results[0]] == [item[0] for item in results[1]]
    assert [item[1:] for item in results[0]] == [["", ""]] * len(cases), output
    return results[0]


@pytest.fixture(scope="module")
def one(base) -> Path:
    """One process, all 8 at once."""
    return train_here(base, base / "1 x 8", **BASE, zero_stage=0, batch_size_per_gpu=8)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in load_file(folder / "final" / "model.safetensors").items()}


@pytest.mark.parametrize("way", ACCUMULATE)
def test_the_loss_curve_does_not_depend_on_the_processes(base, one, two, way):
    reference, curve = ([line["loss"] for line in lines(folder)] for folder in (one, base / way))
    assert len(curve) == len(reference) == STEPS
    assert reference[-1] < 0.9 * reference[0]
    worst = max(abs(a / b - 1) for a, b in zip(curve, reference, strict=True))
    print(f"{way}: largest relative difference over {STEPS} steps {worst:.1e}")
    assert worst <= 1e-5
    observed = json.loads((base / way / "observed.json").read_text())
    assert (observed["world_size"], observed["zero_stage"]) == (2, ACCUMULATE[way]["zero_stage"])
    assert observed["examples"] == sum(min(8, 20 - 8 * (step % 3)) for step in range(STEPS))


@pytest.mark.parametrize("way", ["2 x 4 accumulate", "2 x 4 ZeRO 2", "2 x 4 ZeRO 3"])
def test_the_exported_weights_do_not_depend_on_the_sharding(base, one, two, way):
    reference, found = weights(one), weights(base / way)
    assert found.keys() == reference.keys()
    moved = weights_of_base(base)
    for name, value in reference.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    assert any((value - moved[name]).abs().max() > 5e-3 for name, value in reference.items())


def unused(base: Path) -> int:
    """Weights that never run, so never train: the tower's last layer and the norm behind it."""
    marks = ("encoder.layers.1.", "post_layernorm.")
    return sum(value.numel() for name, value in weights_of_base(base).items() if any(mark in name for mark in marks))


def weights_of_base(base: Path) -> dict[str, torch.Tensor]:
    return load_file(base / "model" / "model.safetensors")


def test_auto_with_all_the_room_takes_a_processs_whole_share(base, two):
    found = json.loads((base / "2 x auto" / "micro_batch.json").read_text())
    assert (found["micro_batch_size"], found["processes"]) == (4, 2)


def test_census_counts_what_is_in_shards(base, one, two):
    reference, sharded = (json.loads((folder / "census.json").read_text()) for folder in (one, base / "2 x 4 ZeRO 3"))
    assert sharded == reference


def test_zero_3_is_stopped_and_goes_on_with_the_same_bytes(base, two):
    assert [two[-2][0], two[-1][0]] == [75, 0]
    assert [line["step"] for line in lines(base / "stopped")] == list(range(1, STEPS + 1))
    files = [base / name / "final" / "model.safetensors" for name in ("stopped", "2 x 4 ZeRO 3")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_zero_3_checkpoint_becomes_a_model_and_a_missing_rank_is_named(base, two, tmp_path):
    from phi3v.training.export import export_zero_checkpoint

    (saved,) = checkpoint_folders(base / "left" / "checkpoints")
    plain = load_file(export_zero_checkpoint(saved, base / "model", tmp_path / "plain", "fp32") / "model.safetensors")
    assert {name: value.shape for name, value in plain.items()} == {
        name: value.shape for name, value in weights_of_base(base).items()
    }
    assert any(not torch.equal(value, weights_of_base(base)[name]) for name, value in plain.items())
    damaged = shutil.copytree(saved, tmp_path / "damaged")
    next(damaged.rglob("*rank_1*")).unlink()
    with pytest.raises(ValueError, match=f"{damaged}: incomplete or damaged shards"):
        export_zero_checkpoint(damaged, base / "model", tmp_path / "nothing")
