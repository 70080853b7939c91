"""What can go wrong around a training job: folders that are none, disks that fill up. Clear errors, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from namespaces import namespace
from test_training_checkpoints import SETTINGS, write_checkpoint
from training_fixtures import ROOT, finish, launch, train_here, write_base

from phi3v.training.checkpoints import CheckpointError, find
from phi3v.training.launch import LostProcessError, explain_failure


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("faults"), examples=16)


def start(base: Path, out: Path) -> None:
    train_here(base, out, zero_stage=0, fp32=True, max_steps=1)


def test_a_file_in_place_of_the_checkpoint_folder(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").write_text("not a folder")
    with pytest.raises(
        CheckpointError, match=r"out/checkpoints: cannot be read \(Not a directory\).*Nothing was changed"
    ):
        start(base, tmp_path / "out")
    assert (tmp_path / "out" / "checkpoints").read_text() == "not a folder"
    assert not (tmp_path / "out" / ".lock.json").exists()


def test_a_checkpoint_folder_that_cannot_be_reached(base, tmp_path):
    """A link in a circle stands for a mount that is gone: the name is there, and nobody can read it."""
    (tmp_path / "checkpoints").symlink_to("checkpoints")
    with pytest.raises(CheckpointError, match="checkpoints: cannot be read"):
        start(base, tmp_path)
    assert (tmp_path / "checkpoints").is_symlink()


def test_an_output_folder_that_is_a_file(base, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match=r"out: not writable .*choose another --output_dir"):
        start(base, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "link in a circle", "empty folder"])
def test_a_checkpoint_that_is_none_is_passed_over_with_its_reason(tmp_path, kind):
    write_checkpoint(tmp_path, 5)
    newest = tmp_path / "checkpoint-10"
    if kind == "file":
        newest.write_text("x")
    elif kind == "empty folder":
        newest.mkdir()
    else:
        newest.symlink_to("checkpoint-10")
    found, skipped = find(tmp_path, SETTINGS, 2, True)
    assert found == tmp_path / "checkpoint-5"
    assert "checkpoint.json " in skipped[newest]


def test_a_disk_that_fills_up_costs_the_steps_since_the_last_checkpoint(base, tmp_path):
    """A tmpfs of 16 MB: the second checkpoint finds no room; with room again the same command ends the job."""
    (tmp_path / "disk").mkdir()
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"}
    arguments = [str(base / "model"), str(base / "data"), str(tmp_path / "disk")]
    done = subprocess.run(
        [*namespace(), sys.executable, str(ROOT / "tests/training_full_disk.py"), *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["code"] == 1, seen["output"]
    assert "Traceback" not in seen["output"]
    assert "error: " in seen["output"]
    assert "Earlier checkpoints are intact" in seen["output"], seen["output"]
    assert seen["left"] == ["checkpoint-2"]
    assert seen["wrong"] == [""]
    assert seen["again"] == 0, seen["after"]
    assert "checkpoint-2: resuming from here" in seen["after"]
    assert seen["final"] == ["model.safetensors"]


def test_a_full_disk_and_a_lost_process_are_told_apart_from_errors_of_the_program(tmp_path):
    with pytest.raises(CheckpointError, match=r"m\.jsonl: the disk is full"), explain_failure(tmp_path):
        raise OSError(28, "No space left on device", "m.jsonl")
    with pytest.raises(LostProcessError, match="Rank 0 lost contact with another rank"), explain_failure(tmp_path):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    for error in (OSError(5, "Input/output error"), RuntimeError("shapes"), torch.OutOfMemoryError("CUDA")):
        with (
            pytest.raises(type(error), match=str(error).replace("[", r"\[").replace("]", r"\]")),
            explain_failure(tmp_path),
        ):
            raise error


def test_a_job_with_loader_processes_ends_with_an_error(tmp_path: Path) -> None:
    """They ignore SIGTERM, and an interpreter that exits waits for its child processes. Without: see the checkpoints."""
    base = write_base(tmp_path)
    (base / "data" / "images" / "red.png").unlink()
    flags = ["--model_name_or_path", str(base / "model"), "--data_dir", str(base / "data"), "--use_lora", "--bf16"]
    flags += ["--output_dir", str(tmp_path / "out"), "--lora_rank", "4", "--batch_size", "8", "--max_steps", "1"]
    code, output = finish(launch([*flags, "--num_workers", "2", "--no-tqdm"]), seconds=120)
    assert code != 0, output
    assert "red.png" in output
