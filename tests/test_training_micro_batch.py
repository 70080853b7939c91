"""--batch_size_per_gpu auto: the search, and a real one on a CPU against a memory limit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from training_fixtures import train_here, write_data, write_model

from phi3v.settings import FinetuneSettings, SettingsError, validate
from phi3v.training import micro_batch
from phi3v.training.checkpoints import decisive
from phi3v.training.memory import GB, OutOfMemoryError, held_bytes, peak
from phi3v.training.micro_batch import candidates, largest_that_fits

CPU = torch.device("cpu")


def test_sizes_divide_a_processs_share_of_the_batch():
    assert candidates(64, 4) == [1, 2, 4, 8, 16]
    assert candidates(24, 2) == [1, 2, 3, 4, 6, 12]
    assert candidates(2, 2) == [1]


@settings(max_examples=500, deadline=None)
@given(
    share=st.sampled_from([1, 6, 16, 64, 96]), fixed=st.floats(0, 50), each=st.floats(0.01, 20),
    capacity=st.floats(1, 300), wrong=st.floats(0.1, 10), runs_out=st.booleans(), fatal=st.booleans(),
)  # fmt: skip
@example(share=96, fixed=4.0, each=1.0, capacity=7.0, wrong=0.25, runs_out=True, fatal=False)
def test_the_largest_is_found_whatever_the_estimate_says(share, fixed, each, capacity, wrong, runs_out, fatal):
    """Memory that grows in a straight line, with a constant part that nobody knows of beside the 2 that are known."""
    sizes, tried = candidates(share, 1), []

    def need(size: int) -> float:
        return 2 + fixed + each * size

    def probe(size: int) -> float:
        tried.append(size)
        return math.inf if runs_out and need(size) > capacity else need(size)

    found = largest_that_fits(sizes, lambda size: wrong * (2 + each * size), probe, 2.0, capacity, fatal)
    truth = max((size for size in sizes if need(size) <= capacity * (1 - 1e-9)), default=None)
    assert len(tried) == len(set(tried)) <= 8
    assert found.peaks.keys() == set(tried)
    if fatal:
        assert tried[0] == 1
        assert all(need(size) <= capacity * (1 + 1e-9) for size in tried[1:])
        assert (found.size or 0) <= (truth or 1)
        assert (found.size is None) == (need(1) > capacity)
        # The unknown part is overstated once, by the first probe: with none the answer is exact.
        assert fixed > 0 or found.size == truth
    else:
        assert found.size in (truth, max((size for size in sizes if need(size) <= capacity), default=None))


def test_the_peak_of_a_block_is_measured():
    with peak(CPU) as first:
        torch.ones(50_000_000)  # 200 MB, given back at once
    with peak(CPU) as second:
        pass
    assert first[0] - second[0] > 0.15 * GB
    assert second[0] >= 0.9 * held_bytes(CPU)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("micro")
    write_model(folder / "model", hidden_size=256, layers=4, heads=4)
    write_data(folder / "data", examples=32)
    return folder


def train(base: Path, out: Path, limit_gb: float) -> dict:
    """Train within so much memory; micro_batch.json."""
    train_here(
        base, out, batch_size=32, batch_size_per_gpu="auto", fp32=True, zero_stage=0, max_steps=2,
        gradient_checkpointing=False, memory_limit_gb=limit_gb,
    )  # fmt: skip
    return json.loads((out / micro_batch.FILE).read_text())


def room_for(more_gb: float) -> float:
    """So much more than the process holds now, GB."""
    return held_bytes(CPU) / GB + more_gb


def test_auto_uses_the_room_there_is_and_trains_within_it(base, tmp_path):
    """32 examples take about 0.5 GB here: with a lot of room all go at once, with 0.3 GB fewer do."""
    with peak(CPU) as taken:
        narrow = train(base, tmp_path / "narrow", room_for(0.3))
    wide = train(base, tmp_path / "wide", room_for(8.0))
    assert wide["batch_size_per_gpu"] == 32
    size = narrow["batch_size_per_gpu"]
    assert 1 < size < 32
    assert narrow["peak_bytes"][str(size)] <= narrow["capacity_bytes"]
    assert taken[0] <= 1.1 * narrow["capacity_bytes"]
    observed = json.loads((tmp_path / "narrow" / "observed.json").read_text())
    assert observed["batch_size_per_gpu"] == size
    assert observed["examples"] == 64
    curves = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("wide", "narrow")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_nothing_fits_is_said_with_the_numbers(base, tmp_path):
    with pytest.raises(
        OutOfMemoryError, match=r"not even one example at a time fits: .*1: .*GB; 0\.10 GB to be had.*--"
    ):
        train(base, tmp_path / "none", 0.1)


def test_a_probe_leaves_no_trace(base):
    """Random state, gradients and weights are as before it."""
    from phi3v.training.job import load_model

    values = {
        "model_name_or_path": str(base / "model"),
        "output_dir": "o",
        "use_lora": True,
        "lora_dropout": 0.5,
        "bf16": True,
    }
    chosen = validate(FinetuneSettings, values, "test")
    model = load_model(chosen, CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    batch = {
        "input_ids": torch.full((1, 6), 5), "labels": torch.tensor([[-100, -100, 5, 6, 7, 8]]),
        "attention_mask": torch.ones(1, 6, dtype=torch.int64), "loss_weights": torch.full((1, 6), 0.25),
    }  # fmt: skip
    assert micro_batch._probe(chosen, model, batch, CPU) > 0
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_job_that_goes_on_keeps_its_size(tmp_path, monkeypatch):
    def asked(**values) -> FinetuneSettings:
        return validate(FinetuneSettings, {"model_name_or_path": "m", "output_dir": "o"} | values, "test")

    (tmp_path / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    values = {"batch_size_per_gpu": 8, "processes": 2, "device": "CPU (x)", "settings": decisive(asked())}
    (tmp_path / micro_batch.FILE).write_text(json.dumps(values))
    monkeypatch.setattr(micro_batch, "device_name", lambda device: "CPU (x)")
    assert micro_batch._kept(asked(), tmp_path, 2, CPU) == 8
    assert micro_batch._kept(asked(save_steps=7), tmp_path, 2, CPU) == 8
    assert micro_batch._kept(asked(), tmp_path, 4, CPU) is None
    # Of another batch it might not even be a divisor.
    assert micro_batch._kept(asked(batch_size=4), tmp_path, 2, CPU) is None
    (tmp_path / "checkpoints" / "checkpoint-5").rmdir()
    assert micro_batch._kept(asked(), tmp_path, 2, CPU) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"batch_size_per_gpu": "auto", "batching": "packed"}, "with packed batches"),
        ({"batch_size_per_gpu": "auto", "zero_stage": 3}, "with zero_stage 3"),
        ({"batch_size_per_gpu": "many"}, "`batch_size_per_gpu`: got 'many': expected an integer >= 1, or auto"),
        ({"batch_size_per_gpu": 0}, "expected an integer >= 1, or auto"),
        ({"memory_limit_gb": 4}, "batch_size_per_gpu is not auto"),
    ],
)
def test_what_cannot_be_found_is_refused(values, said):
    with pytest.raises(SettingsError, match=said):
        validate(FinetuneSettings, {"model_name_or_path": "m", "output_dir": "o"} | values, "command line")
