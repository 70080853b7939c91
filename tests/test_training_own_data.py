"""Small and odd data of one's own: what training adapts, refuses and reports, and the settings such data need."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from training_fixtures import train_here, weights, write_base

from phi3v.planning.geometry import geometry_from_config, trainable_parameters
from phi3v.settings import FinetuneSettings, SettingsError, validate
from phi3v.training.loop import Loop
from phi3v.training.memory import OutOfMemoryError

SHORT = {"fp32": True, "zero_stage": 0, "batch_size": 8, "warmup_steps": 1, "max_steps": 3, "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("own"), examples=24, text_only_every=6)


@pytest.fixture(scope="module")
def long_answer(tmp_path_factory) -> Path:
    """A folder in which example 5 has an answer of hundreds of tokens and all others are short."""
    base = write_base(tmp_path_factory.mktemp("long"), examples=16)
    file = base / "data" / "train.jsonl"
    lines = file.read_text().splitlines()
    record = json.loads(lines[5])
    record["conversations"][0]["assistant"] = "square " * 600
    lines[5] = json.dumps(record)
    file.write_text("\n".join(lines) + "\n")
    return base


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_the_default_warm_up_fits_a_short_job_and_the_manifest_records_it(base, tmp_path, capfd):
    out = train_here(base, tmp_path / "out", fp32=True, zero_stage=0, batch_size=2, max_steps=11, use_lora=True)
    assert "warm-up of 1 steps instead of 50: the job has 11 optimizer steps" in capfd.readouterr().err
    assert json.loads((out / "manifest.json").read_text())["warmup_steps"] == 1
    rates = [line["learning_rate"] for line in read(out, "metrics.jsonl")]
    assert rates[0] == 0 and max(rates) == rates[1] == pytest.approx(4e-5)


@pytest.mark.parametrize("steps", [3, 20])
def test_a_warm_up_of_ones_own_that_swallows_the_job_is_refused(base, tmp_path, steps):
    wrong = rf"`warmup_steps`: got {steps}: the job has only 3 optimizer steps \(24 examples in .*expected less than 3"
    with pytest.raises(SettingsError, match=wrong):
        train_here(base, tmp_path / "out", fp32=True, zero_stage=0, batch_size=8, warmup_steps=steps)
    assert not (tmp_path / "out" / "settings.json").exists()


def test_a_bound_on_tokens_changes_no_loss_and_no_gradient(long_answer, tmp_path):
    values = SHORT | {"batch_size_per_gpu": 8, "eval_steps": 3}
    whole = train_here(long_answer, tmp_path / "whole", **values)
    split = train_here(long_answer, tmp_path / "split", max_tokens_per_micro_batch=250, **values)
    for name in ("loss", "grad_norm", "eval_loss"):
        one, other = ([line[name] for line in read(out, "metrics.jsonl") if name in line] for out in (whole, split))
        assert one == pytest.approx(other, rel=1e-4)
    padding = [max(line.get("padding_share", 0) for line in read(out, "metrics.jsonl")) for out in (whole, split)]
    assert padding[0] > 0.7 and padding[1] < 0.2


def test_running_out_of_memory_names_the_example(long_answer, tmp_path, monkeypatch):
    original = Loop.loss_of

    def loss_of(self, batch):
        if batch.inputs.tensors.places["input_ids"][1][1] > 500:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return original(self, batch)

    monkeypatch.setattr(Loop, "loss_of", loss_of)
    with pytest.raises(OutOfMemoryError, match=r"train\.jsonl:6: example 'train-5' with \d{3,} tokens; .*--max_length"):
        train_here(long_answer, tmp_path / "out", **SHORT)


def test_an_example_that_will_not_fit_is_reported_before_training(long_answer, tmp_path, monkeypatch, capfd):
    from phi3v.training import micro_batch

    monkeypatch.setattr(micro_batch, "capacity_bytes", lambda device, limit: 1e6)
    train_here(long_answer, tmp_path / "out", **SHORT)
    said = capfd.readouterr().err
    longest = int(re.search(r"train\.jsonl:6: example 'train-5' has (\d+) tokens", said).group(1))
    assert f"--max_length {longest - 1}" in said
    assert "train.jsonl: 16 examples, 16 turns, 16 pictures, 0 examples without a picture" in said
    assert re.search(rf"train\.jsonl: tokens per example: median \d\d, maximum {longest} \(line 6\)", said)


@pytest.mark.parametrize(
    ("values", "trained"),
    [
        ({"freeze_decoder": True, "freeze_vision_model": "tower"}, {"projector", "separators"}),
        ({"freeze_decoder": True}, {"clip", "projector", "separators"}),
        ({"freeze_vision_model": "tower"}, {"projector", "separators", "embedding", "decoder", "head"}),
        ({"use_lora": True, "lora_targets": ["qkv_proj", "lm_head"]}, {"adapters (decoder)", "adapters (head)"}),
        ({"use_lora": True, "freeze_decoder": True}, {"adapters (clip)", "adapters (projector)"}),
        ({"use_lora": True, "lora_targets": ["img_projection"]}, {"adapters (projector)"}),
    ],
)
def test_only_what_is_asked_for_trains(base, tmp_path, values, trained):
    """Text-only examples are among those trained on, one of them a micro-batch by itself."""
    out = train_here(base, tmp_path / "out", **SHORT | values | {"lora_rank": 4})
    census = json.loads((out / "census.json").read_text())["groups"]
    assert {name for name, group in census.items() if group["trainable"]} == trained
    assert {name for name, group in census.items() if group["with_gradient"]} == trained
    asked = validate(FinetuneSettings, json.loads((out / "settings.json").read_text()), "test")
    geometry = geometry_from_config(json.loads((base / "model" / "config.json").read_text()))
    planned = trainable_parameters(geometry, asked.method, asked.lora_rank, asked.frozen_groups, asked.lora_targets)
    assert sum(planned.values()) == sum(group["trainable"] for group in census.values())


def test_rslora_scales_by_the_root_of_the_rank(base, tmp_path):
    """The same as plain LoRA with alpha times the root of the rank, before and after merging."""
    values = SHORT | {"use_lora": True, "lora_rank": 16, "merge": True}
    rooted = train_here(base, tmp_path / "rooted", use_rslora=True, lora_alpha_ratio=1.0, **values)
    plain = train_here(base, tmp_path / "plain", lora_alpha_ratio=4.0, **values)
    assert weights(rooted / "final") == weights(plain / "final")
    assert weights(rooted / "merged") == weights(plain / "merged")


def test_a_moved_job_with_rates_of_its_own_resumes_to_the_same_bytes(base, tmp_path, monkeypatch):
    """Model, data and output are at other places, with other times, when the job resumes."""
    values = SHORT | {
        "max_steps": 6, "vision_learning_rate": 1e-4, "projector_learning_rate": 5e-3, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    through = train_here(base, tmp_path / "through", **values)
    with monkeypatch.context() as patch:
        update = Loop.update

        def told_to_leave(self):
            self.stop.asked = self.state.step + 1 == 3
            return update(self)

        patch.setattr(Loop, "update", told_to_leave)
        stopped = train_here(base, tmp_path / "stopped", exit_code=75, **values)
    moved = tmp_path / "elsewhere"
    for name in ("model", "data"):
        shutil.copytree(base / name, moved / name, copy_function=shutil.copyfile)
    shutil.move(stopped, moved / "out")
    train_here(moved, moved / "out", **values)
    assert [line["step"] for line in read(moved / "out", "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert read(moved / "out", "metrics.jsonl")[2]["seconds"] != read(through, "metrics.jsonl")[2]["seconds"]
    assert weights(moved / "out" / "final") == weights(through / "final")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"freeze_decoder": True, "freeze_vision_model": "vision"}, "leave nothing to train"),
        ({"vision_learning_rate": 1e-5, "freeze_vision_model": "tower"}, "freezes that part"),
        ({"projector_learning_rate": 1e-5, "freeze_vision_model": "vision"}, "freezes that part"),
        ({"use_rslora": True}, ": set, but adapters are off"),
        ({"lora_targets": ["qkv_proj"]}, ": set, but adapters are off"),
        ({"use_lora": True, "lora_targets": ["wq"]}, "qkv_proj"),
        ({"lr_scheduler_type": "polynomial"}, "linear"),
        ({"max_tokens_per_micro_batch": 100, "batching": "packed"}, "tokens_per_pack"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, said):
    with pytest.raises(SettingsError, match=said):
        validate(FinetuneSettings, {"model_name_or_path": "m", "output_dir": "o"} | values, "test")


def test_targets_that_are_all_frozen_are_refused(base, tmp_path):
    values = SHORT | {"use_lora": True, "freeze_vision_model": "vision", "lora_targets": ["fc1"]}
    with pytest.raises(SettingsError, match=r"`lora_targets`: got \['fc1'\]: .*clip"):
        train_here(base, tmp_path / "out", **values)
