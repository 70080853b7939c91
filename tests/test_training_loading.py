"""Batches on their way to the model: with loader processes, and without a trace in the random generators."""

from __future__ import annotations

import pytest
from training_fixtures import train_here, write_base

from phi3v.data.processes import loader_workers, usable_cpus
from phi3v.training.loop import Loop


@pytest.mark.parametrize(
    ("asked", "cuda", "allotted", "here", "workers"),
    [
        (3, True, "", "1", 3),
        ("auto", False, "64", "1", 0),
        ("auto", True, "1000", "1", None),
        ("auto", True, "1", "4", 1),
    ],
)
def test_workers_follow_the_cpus_of_a_process(monkeypatch, asked, cuda, allotted, here, workers):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", allotted)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    expected = max(1, min(8, usable_cpus() - 1)) if workers is None else workers
    assert loader_workers(asked, cuda) == expected


def test_slurms_allotment_is_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(128)))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "32")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert loader_workers("auto", cuda=True) == 3
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "")
    assert loader_workers("auto", cuda=True) == 8


@pytest.mark.parametrize(("workers", "stop_after"), [(2, 3), (0, 4)], ids=["at the end of an epoch", "inside an epoch"])
def test_a_stopped_job_with_dropout_ends_with_the_same_bytes(tmp_path, monkeypatch, workers, stop_after):
    """20 examples in batches of 8: 3 steps an epoch. Dropout shows any difference in the random generators."""
    base = write_base(tmp_path / "base", examples=20)
    settings = {
        "batch_size": 8, "batch_size_per_gpu": 2, "max_steps": 8, "warmup_steps": 1, "use_lora": True, "lora_rank": 4,
        "lora_dropout": 0.2, "fp32": True, "num_workers": workers,
    }  # fmt: skip
    through = train_here(base, tmp_path / "through", **settings)
    with monkeypatch.context() as patch:
        update = Loop.update

        def told_to_leave(self):
            self.stop.asked = self.state.step + 1 == stop_after
            return update(self)

        patch.setattr(Loop, "update", told_to_leave)
        stopped = train_here(base, tmp_path / "stopped", exit_code=75, **settings)
    assert not (stopped / "final").exists()
    train_here(base, stopped, **settings)
    weights = "final/adapter_model.safetensors"
    assert (stopped / weights).read_bytes() == (through / weights).read_bytes()
