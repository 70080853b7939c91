"""Checkpoints are written beside training: what waits, what does not, and what happens to errors."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from phi3v.training import writer as module
from phi3v.training.checkpoints import WRITING, CheckpointError, find
from phi3v.training.writer import CheckpointWriter, host_copy, tensor_bytes


@pytest.fixture
def writer(tmp_path: Path) -> CheckpointWriter:
    return CheckpointWriter(tmp_path, keep=2, process=0, processes=1)


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """No file is written before it is set."""
    open_now, save = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda value, path: (open_now.wait(10), save(value, path)))
    yield open_now
    open_now.set()


def until_written(writer: CheckpointWriter) -> None:
    while not writer.part_written:
        pass


def values(folder: Path, step: int) -> torch.Tensor:
    return torch.load(folder / f"checkpoint-{step}" / "training.pt", weights_only=True)["weights"]["w"]


def test_training_continues_and_the_checkpoint_holds_the_step_it_was_asked_in(tmp_path, writer, gate):
    weight = torch.ones(3)
    writer.begin(1)
    writer.write({"training.pt": {"weights": {"w": weight}}}, best_step=0)
    weight.mul_(7)  # the next step
    assert not writer.part_written
    assert not (tmp_path / "checkpoint-1").exists()
    gate.set()
    writer.finish()
    assert torch.equal(values(tmp_path, 1), torch.ones(3))
    assert find(tmp_path, {}, 1, False)[0] == tmp_path / "checkpoint-1"
    assert not any((tmp_path / WRITING).iterdir())


def test_it_is_sealed_at_the_end_of_a_step_once_it_is_written(tmp_path, writer):
    writer.begin(1)
    writer.write({"training.pt": {"weights": {"w": torch.ones(3)}}}, best_step=0)
    until_written(writer)
    assert not (tmp_path / "checkpoint-1").exists()
    writer.seal()
    assert not writer.part_written
    writer.finish()
    assert (tmp_path / "checkpoint-1").is_dir()


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path, writer, gate):
    writer.begin(1)
    writer.write({"training.pt": {"weights": {"w": torch.ones(3)}}}, best_step=0)
    threading.Timer(0.2, gate.set).start()
    writer.begin(2)
    assert (tmp_path / "checkpoint-1").is_dir()


def test_the_best_checkpoint_stays(tmp_path, writer):
    for step in (1, 2, 3, 4):
        writer.begin(step)
        writer.write({"training.pt": {"weights": {"w": torch.full((3,), float(step))}}}, best_step=1)
    writer.finish()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 3, 4)]
    assert torch.equal(values(tmp_path, 4), torch.full((3,), 4.0))


def test_an_error_of_the_thread_is_raised_on_the_training_thread(tmp_path, writer, monkeypatch):
    def refuse(value, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", refuse)
    writer.begin(3)
    writer.write({"training.pt": {}}, best_step=0)
    with pytest.raises(CheckpointError, match=r"step 3: .*checkpoint-3 could not be written \(.*No space left.*intact"):
        until_written(writer)
    writer.finish()  # nothing is left to wait for
    assert not (tmp_path / "checkpoint-3").exists()


def test_training_waits_if_host_memory_is_short(writer, gate, monkeypatch):
    monkeypatch.setattr(module, "free_ram", lambda: 20.0)
    weight = torch.ones(3)
    gate.set()
    writer.begin(1)
    writer.write({"training.pt": {"weights": {"w": weight}}}, best_step=0)
    weight.mul_(7)
    assert writer.part_written
    writer.finish()
    assert torch.equal(values(writer.folder, 1), torch.ones(3))


def test_a_copy_is_of_every_tensor_in_a_nest():
    nest = {"a": torch.ones(2), "b": [torch.zeros(3), (1, "x")], "c": None}
    copy = host_copy(nest)
    nest["a"].add_(1)
    assert torch.equal(copy["a"], torch.ones(2)) and torch.equal(copy["b"][0], torch.zeros(3))
    assert copy["b"][1] == (1, "x") and copy["c"] is None
    assert tensor_bytes(nest) == 4 * 5
    again = host_copy(nest | {"b": [torch.zeros(4)], "d": torch.ones(1)}, copy)
    assert again["a"].data_ptr() == copy["a"].data_ptr() and torch.equal(again["a"], torch.full((2,), 2.0))
    assert again["b"][0].shape == (4,) and torch.equal(again["d"], torch.ones(1))
