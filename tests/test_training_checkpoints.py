"""Checkpoints: found, refused with a reason, kept whole; and a real resume under torchrun."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import await_step, finish, launch, slow_disk, train_here, weights, write_base, write_data

from phi3v.settings import FinetuneSettings, flags, validate
from phi3v.training import checkpoints
from phi3v.training.checkpoints import (
    SEAL,
    CheckpointError,
    check_space,
    digest_and_sync,
    find,
    rotate,
    seal,
    share_of,
)
from phi3v.training.lock import LockedError

SETTINGS = {"learning_rate": 1e-3, "data": "d", "model": "m"}


def write_checkpoint(folder: Path, step: int, settings: dict | None = None, processes: int = 2) -> Path:
    """A checkpoint as two processes write it: each digests its share."""
    writing = folder / ".writing" / f"checkpoint-{step}"
    (writing / "global_step").mkdir(parents=True)
    for name in ("model.bin", "rng_state_0.pth", "rng_state_1.pth", "global_step/shard_0.pt", "global_step/shard_1.pt"):
        (writing / name).write_bytes(f"{name} {step}".encode() * 50)
    listings = [[path.relative_to(writing).as_posix() for path in checkpoints.files_of(writing)]] * 2
    files = digest_and_sync(writing, share_of(listings, 0, 2)) | digest_and_sync(writing, share_of(listings, 1, 2))
    seal(writing, folder / f"checkpoint-{step}", files, step, processes, settings or SETTINGS)
    return folder / f"checkpoint-{step}"


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    for step in (5, 10, 100):
        write_checkpoint(tmp_path, step)
    (tmp_path / ".writing" / "checkpoint-200").mkdir()
    assert find(tmp_path, SETTINGS, 2, True) == (tmp_path / "checkpoint-100", {})


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_a_file_that_a_process_sees_late_is_in_a_share(tmp_path, processes):
    """Each process lists its own files at once and may see those of other machines late."""
    names = [f"rng_state_{rank}.pth" for rank in range(processes)] + ["model.bin"]
    listings = [["model.bin", f"rng_state_{rank}.pth"] for rank in range(processes)]
    shares = [share_of(listings, rank, processes) for rank in range(processes)]
    assert sorted(name for share in shares for name in share) == sorted(names)


def test_damage_to_any_file_is_seen_and_named(tmp_path):
    write_checkpoint(tmp_path, 5)
    newest = write_checkpoint(tmp_path, 10)
    for path in [*checkpoints.files_of(newest), newest / SEAL]:
        name = path.relative_to(newest).as_posix()
        whole = path.read_bytes()
        flipped = bytes([whole[0] ^ 1]) + whole[1:]
        for damaged in (None, whole[:-9], b"", flipped):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            found, skipped = find(tmp_path, SETTINGS, 2, True)
            assert found == tmp_path / "checkpoint-5"
            assert name in skipped[newest]
            path.write_bytes(whole)
    assert find(tmp_path, SETTINGS, 2, True)[0] == newest


@pytest.mark.parametrize(
    ("settings", "processes", "sharded", "reason"),
    [
        (
            {**SETTINGS, "learning_rate": 2e-3},
            2,
            True,
            "written with other settings: learning_rate was 0.001, is now 0.002",
        ),
        ({**SETTINGS, "model": "n"}, 2, True, "written with other settings: model was 'm', is now 'n'"),
        (SETTINGS, 4, True, "written by 2 processes, but now there are 4"),
        (SETTINGS, 4, False, ""),
        ({**SETTINGS, "use_rslora": False, "lora_targets": []}, 2, True, ""),
        ({**SETTINGS, "use_rslora": True}, 2, True, "use_rslora was False, is now True"),
    ],
)
def test_another_jobs_checkpoint_is_not_gone_on_from(tmp_path, settings, processes, sharded, reason):
    path = write_checkpoint(tmp_path, 5)
    found, skipped = find(tmp_path, settings, processes, sharded)
    assert (found is None) == bool(reason)
    assert reason in skipped.get(path, "")


def test_a_checkpoint_of_version_1_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, 5)
    sealed = json.loads((path / SEAL).read_text())
    del sealed["version"]
    (path / SEAL).write_text(json.dumps(sealed))
    with pytest.raises(CheckpointError, match=r"checkpoint-5: got layout version 1; expected version 2"):
        find(tmp_path, SETTINGS, 2, True)
    assert path.is_dir()


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    rotate(tmp_path, 2, best=tmp_path / "checkpoint-1")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 3, 4)]


def test_space_is_checked_with_the_numbers(tmp_path):
    check_space(tmp_path, 10, 3)
    with pytest.raises(CheckpointError, match=r"GB free, .*3 checkpoints of 1000000.0 GB"):
        check_space(tmp_path, 10**15, 3)


def test_the_fingerprint_follows_settings_data_and_base_weights(tmp_path):
    write_data(tmp_path / "data")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    values = {"model_name_or_path": str(tmp_path / "model"), "output_dir": "o"}

    def mark(**more) -> dict:
        return checkpoints.fingerprint(validate(FinetuneSettings, values | more, "test"), tmp_path / "data")

    before = mark()
    assert mark(save_steps=3, tqdm=False, output_dir="elsewhere") == before
    assert mark(learning_rate=1e-3) != before
    # Times and places say nothing: only contents do, of large files too.
    with (tmp_path / "model" / "model.safetensors").open("wb") as file:
        file.truncate(65 * 2**20)
    before = mark()
    for path in (*(tmp_path / "model").iterdir(), *(tmp_path / "data").rglob("*")):
        os.utime(path, (1e9, 1e9))
    assert mark() == before
    shutil.copytree(tmp_path / "model", tmp_path / "copy", copy_function=shutil.copyfile)
    (tmp_path / "data" / "statistics.json").write_text("{}")
    assert mark(model_name_or_path=str(tmp_path / "copy")) == before
    (tmp_path / "model" / "config.json").write_text("{ }")
    assert mark()["model"] != before["model"]
    with (tmp_path / "data" / "train.jsonl").open("a") as file:
        file.write("\n")
    assert mark()["data"] != before["data"]


def settings_of(base: Path, out: Path, **more) -> dict:
    return {
        "model_name_or_path": str(base / "model"), "data_dir": str(base / "data"), "output_dir": str(out),
        "batch_size": 8, "max_steps": 14, "warmup_steps": 2, "learning_rate": 2e-3, "bf16": True, "save_steps": 3,
        "tqdm": False, **more,
    }  # fmt: skip


def start(settings: dict, more: dict[str, str] | None = None) -> subprocess.Popen:
    return launch(flags(validate(FinetuneSettings, settings, "test")), processes=2, more=more)


def test_killed_damaged_and_stopped_full_training_ends_with_the_same_bytes(tmp_path):
    """ZeRO 2 on two processes: SIGKILL to one, damage to the newest checkpoint, then SIGUSR1; the weights do not show it.

    On the way: a checkpoint becomes safetensors, a second job is refused, and a save that is slower than torchrun waits
    by default survives.
    """
    write_base(tmp_path, examples=20, text_only_every=7)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    process = start(settings_of(tmp_path, broken))
    await_step(process, broken, 7)
    for child in (family := psutil.Process(process.pid).children(recursive=True)):
        child.suspend()  # it must not finish while the second job starts
    with pytest.raises(LockedError, match="still alive"):
        train_here(tmp_path, broken)
    for child in family:
        child.resume()
    # One process is killed: the job ends by itself, and says which and why.
    next(child for child in family if child.environ().get("RANK") == "1").kill()
    code, output = finish(process, 100)
    assert code == 1
    assert "error: Rank 0 lost contact with another rank" in output, output
    assert "local_rank: 1" in output, output
    assert "Signal 9 (SIGKILL)" in output, output
    newest = checkpoints.checkpoint_folders(broken / "checkpoints")[0]
    shard = next(path for path in checkpoints.files_of(newest) if "optim_states" in path.name)
    shard.write_bytes(shard.read_bytes()[:-7])

    # Writing takes 6 s and more; torchrun, which is told as a workflow's job tells it, would wait 4.
    disk = slow_disk(tmp_path / "disk", 1.5) | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "4"}
    process = start(settings_of(tmp_path, broken, save_steps=100, num_workers=1), more=disk)
    await_step(process, broken, 10)
    asked = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    for child in psutil.Process(process.pid).children(recursive=True):
        if not child.children():  # a cluster signals every process of a job, those that load data too
            child.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert time.monotonic() - asked > 6, output
    assert f"{newest}: cannot resume from it: {shard.relative_to(newest).as_posix()} has" in output, output
    stopped = int(output.split("saved at step ")[1].split(";")[0])
    assert code != 0
    assert "SIGUSR1" in output, output
    assert json.loads((broken / "checkpoints" / "stopped.json").read_text())["step"] == stopped

    from phi3v.training.export import export_zero_checkpoint

    saved = broken / "checkpoints" / f"checkpoint-{stopped}"
    damaged = shutil.copytree(saved, tmp_path / "damaged")
    next(damaged.rglob("*rank_1*optim_states.pt")).unlink()
    with pytest.raises(ValueError, match="incomplete or damaged shards"):
        export_zero_checkpoint(damaged, tmp_path / "model", tmp_path / "nothing")
    plain = load_file(export_zero_checkpoint(saved, tmp_path / "model", tmp_path / "plain") / "model.safetensors")
    base = load_file(tmp_path / "model" / "model.safetensors")
    assert plain.keys() == base.keys()
    assert {value.dtype for value in plain.values()} == {torch.bfloat16}

    # One start serves the resumed run and the undisturbed one.
    cases = [settings_of(tmp_path, broken, num_workers=1), settings_of(tmp_path, straight)]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    process = launch([str(tmp_path / "cases.json"), str(tmp_path)], processes=2, script="tests/training_cases.py")
    code, output = finish(process)
    assert code == 0, output
    assert json.loads((tmp_path / "rank0.json").read_text()) == [[0, "", ""]] * 2
    assert f"checkpoint-{stopped}: resuming from here" in output
    assert weights(broken / "final") == weights(straight / "final")
    lines = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert [line["loss"] for line in lines] == [
        json.loads(line)["loss"] for line in (straight / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_full_disk_is_one_clear_error_and_leaves_the_last_checkpoint(tmp_path):
    """The limit on file size stands in for the disk: the second checkpoint cannot be written."""
    from phi3v.training.loop import Loop

    base = write_base(tmp_path, examples=16)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    original = Loop.save

    def save(self):
        if self.state.step == 4:
            self.writer.finish()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        original(self)

    try:
        Loop.save = save
        with pytest.raises(CheckpointError, match=r"step 4: .*could not be written.*GB free.*intact"):
            train_here(base, tmp_path / "out", batch_size=8, max_steps=5, save_steps=2, zero_stage=0, fp32=True)
    finally:
        Loop.save = original
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    kept = tmp_path / "out" / "checkpoints"
    assert [path.name for path in checkpoints.checkpoint_folders(kept)] == ["checkpoint-2"]
    sealed = json.loads((kept / "checkpoint-2" / SEAL).read_text())
    assert not checkpoints.why_not(kept / "checkpoint-2", sealed["settings"], 1, False)
