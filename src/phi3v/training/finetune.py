"""Fine-tune one row: what scripts/finetune.py runs in every process."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from phi3v.model.adapters import base_of
from phi3v.model.card import write_card
from phi3v.model.fused import compiled_kernels
from phi3v.model.modeling import parameter_group, size_of
from phi3v.model.runtime import Observer, attention_note, device_name, linear4bit
from phi3v.planning.fits import interval_of, recomputation
from phi3v.planning.hardware import utilisation_of
from phi3v.planning.resources import checkpoint_bytes, most_checkpoints
from phi3v.provenance.manifest import write_json, write_manifest
from phi3v.settings import FinetuneSettings
from phi3v.training import checkpoints
from phi3v.training.census import Census, census_label
from phi3v.training.export import export_final, export_merged
from phi3v.training.job import Job, build
from phi3v.training.launch import (
    REQUEUE_EXIT_CODE,
    StopRequest,
    explain_failure,
    leave,
    parents_command,
    seconds_to_save,
)
from phi3v.training.lock import FolderLock, LockedError
from phi3v.training.logging import MetricsFile, Progress, Trackers, say
from phi3v.training.loop import StepRecord
from phi3v.training.memory import (
    MEMORY_SOURCES,
    context_bytes,
    explain_memory,
    peak_memory_bytes,
)

Number = TypeVar("Number", int, float)
# Bytes a second that any file system a 4B model is trained on should write; beyond it a save may not end in time.
SLOW_DISK = 100e6
STOPPED = "stopped.json"
"""In checkpoints/: there while a job has saved and left because it was told to."""


def run(settings: FinetuneSettings) -> int:
    """Train and write OUTPUT_DIR; returns the exit code: 0, or 75 when a signal asked to save and leave.

    Raises SettingsError for what cannot work, LockedError if another job owns the folder, CheckpointError,
    CensusError if a group that should train gets no gradient, and NotANumberError if the loss stays no number.
    """
    output = Path(settings.output_dir)
    lock = FolderLock(output, say) if os.environ.get("RANK", "0") == "0" else None
    if lock is not None:
        try:
            lock.acquire(settings.lock_wait_minutes * 60)
        except OSError as error:
            raise checkpoints.CheckpointError(
                f"{output}: cannot be written to ({error.strerror}: {error.filename}); expected a folder, or a place "
                "for a new one: choose another --output_dir"
            ) from error
    try:
        checkpoints.checkpoint_folders(output / "checkpoints")  # readable, or nothing is begun
        with StopRequest() as stop, explain_failure(output):
            return _run(settings, output, stop, lock)
    finally:
        if lock is not None:
            lock.release()


def _run(settings: FinetuneSettings, output: Path, stop: StopRequest, lock: FolderLock | None) -> int:
    started = time.perf_counter()
    job = build(settings, output)
    loop = job.loop
    if job.is_main:
        (output / "manifest.json").unlink(missing_ok=True)
        (output / "checkpoints" / STOPPED).unlink(missing_ok=True)
        write_json(output / "settings.json", job.settings.model_dump())
        say(headline(job))
        say_attention(job)
    observer = Observer(job.model)
    attach(job, output, stop, lock, observer)
    checkpoint = find_checkpoint(job, output / "checkpoints")
    train_seconds = -time.perf_counter()
    with explain_memory(job.asked, job.device):
        if checkpoint is not None:
            loop.resume(checkpoint)
        loop.run()
    train_seconds += time.perf_counter()
    if loop.stopped_by_signal:
        if job.is_main:
            # torchrun answers any failed worker with 1: who starts it again tells the cases apart by this file.
            stopped = {"step": loop.state.step, "exit_code": REQUEUE_EXIT_CODE}
            write_json(output / "checkpoints" / STOPPED, stopped)
        say(f"{stop.signal or 'signal'}: saved at step {loop.state.step}; the same command resumes from there")
        return leave(REQUEUE_EXIT_CODE)
    observed = observe(job, observer, train_seconds)
    export_final(loop, job.processor, job.settings, output / "final")
    if job.is_main:
        finish(job, output, observed, time.perf_counter() - started)
        say(f"{output}: done at step {loop.state.step}, {loop.examples} examples in {train_seconds:.1f} s")
    return leave(0)


def finish(job: Job, output: Path, observed: dict[str, Any], seconds: float) -> None:
    """Merge if asked, and write the manifest, which says that the row is done; for the first process."""
    # What can still fail comes before the manifest, and checkpoints stay until it is there.
    report = export_merged(output) if job.settings.merge else None
    write_json(output / "observed.json", observed)
    write_manifest(
        output,
        kind="train",
        settings=job.settings,
        inputs={"data": str(job.data_dir), "model": job.settings.model_name_or_path},
        seed=job.settings.seed,
        seconds=seconds,
        device=device_name(job.device),
    )
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    if report is not None:
        write_card(output / "merged", base_of(output / "final"), output / "manifest.json", report)
        differs = report["max_logit_difference"]
        say(f"{output / 'merged'}: logits differ from base and adapter by {differs:.1e} at most")


def find_checkpoint(job: Job, folder: Path) -> Path | None:
    """The checkpoint to resume from, or None; a collective call.

    Reports which checkpoints cannot be resumed and why. Raises CheckpointError if the disk cannot hold what is asked
    for.
    """
    chosen: list[Any] = [None, None]
    if job.is_main:
        try:
            chosen[0] = _checkpoint_of_first_process(job, folder)
        except checkpoints.CheckpointError as error:
            chosen[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(chosen)
    if chosen[1]:
        raise checkpoints.CheckpointError(chosen[1])
    return chosen[0]


def _checkpoint_of_first_process(job: Job, folder: Path) -> Path | None:
    settings, writer = job.settings, job.loop.writer
    writer.settings = checkpoints.fingerprint(job.asked, job.data_dir)
    found = checkpoints.find(folder, writer.settings, job.processes, job.loop.is_sharded)
    for path, reason in found.skipped.items():
        say(f"{path}: not used: {reason}")
        checkpoints.set_aside(path)
    trained = sum(size_of(p) for p in job.loop.trained)
    weights = sum(size_of(p) * p.element_size() for p in job.model.parameters())
    needed = checkpoint_bytes(trained, weights, settings.optimizer, job.loop.is_sharded)
    if settings.save_steps or settings.save_minutes or settings.keep_best:
        checkpoints.check_space(folder, needed, most_checkpoints(settings.keep_checkpoints, settings.keep_best))
    patience = seconds_to_save(parents_command(), os.environ)
    if patience is not None and needed / patience > SLOW_DISK:
        say(
            f"torchrun kills its workers {patience:.0f} s after SIGTERM, a checkpoint of {needed / 1e9:.1f} GB "
            "may take longer: torchrun --shutdown-timeout=900 … gives it the time"
        )
    if found.path is not None:
        say(f"{found.path}: resuming from here")
    return found.path


def attach(job: Job, output: Path, stop: StopRequest, lock: FolderLock | None, observer: Observer) -> None:
    """What a training job does at its steps: keep the lock, take the census, write metrics, show progress."""
    settings, loop = job.settings, job.loop
    label = census_label(settings.method, settings.freeze_vision_model, settings.use_dora)
    census = Census(job.model, parameter_group, label)
    loop.stop = stop
    loop.utilisation = utilisation_of(settings, job.model.config.to_dict(), device_name(job.device), job.processes)

    def check_lock(record: StepRecord) -> None:
        if lock is not None and lock.lost:
            raise LockedError(f"{output}: another job took this folder over; nothing more is written from here")

    def look_once(record: StepRecord) -> None:
        loop.hooks.remove(look_once)
        observer.remove()
        census.finish(job.device, pictures_seen=record.images > 0)
        if job.is_main:
            write_json(output / "census.json", census.result())

    loop.hooks += [check_lock, look_once]
    if job.is_main:
        progress = Progress(settings.tqdm, lambda: peak_memory_bytes(job.device))
        loop.logs = [MetricsFile(output / "metrics.jsonl"), progress, Trackers(loop.accelerator, settings)]


def headline(job: Job) -> str:
    """One line that says what is about to run."""
    settings, plan = job.settings, job.loop.training.plan
    trainable = sum(size_of(p) for p in job.model.parameters() if p.requires_grad)
    how = f", ZeRO {settings.zero_stage}" if job.loop.is_sharded else ""
    size = "a pack" if settings.batching == "packed" else f"{settings.micro_batch_size}"
    left_out = f", {job.left_out} longer than {settings.max_length} tokens left out" if job.left_out else ""
    return (
        f"{settings.row or settings.dataset or 'finetune'}: {settings.method} {settings.dtype}{how} on "
        f"{job.processes} x {device_name(job.device)}; {plan.examples} examples{left_out}, batch "
        f"{plan.batch_size} = {plan.processes} processes x {plan.accumulation} micro-steps of {size}, "
        f"{recomputation(interval_of(settings.recompute or 0.0))}, "
        f"{trainable:,} trainable parameters"
    )


def say_attention(job: Job) -> None:
    """One line if --use_flash_attention runs another kernel on this device."""
    if note := attention_note(job.settings, job.device):
        say(note)


def observe(job: Job, observer: Observer, train_seconds: float) -> dict[str, Any]:
    """observed.json: what ran, beside what was asked for; a collective call."""
    settings = job.settings
    layers, weight_bytes = linear4bit(job.model)
    cuda = job.device.type == "cuda"
    return {
        "asked": {"dtype": settings.dtype, "attention": "flash" if settings.flash_attention else "eager"},
        **observer.result(),
        "compiled_kernels": compiled_kernels(),
        "linear4bit_layers": layers,
        "linear4bit_bytes": weight_bytes,
        "batch_size_per_gpu": None if settings.batching == "packed" else settings.micro_batch_size,
        "recompute_every": interval_of(settings.recompute or 0.0),
        "zero_stage": settings.zero_stage if job.loop.is_sharded else 0,
        "world_size": job.processes,
        "device": device_name(job.device),
        "peak_memory_bytes": largest(peak_memory_bytes(job.device), job.device),
        "reserved_memory_bytes": largest(torch.cuda.max_memory_reserved(job.device), job.device) if cuda else None,
        "context_memory_bytes": largest(context_bytes(job.device), job.device) if cuda else None,
        "memory_source": MEMORY_SOURCES["cuda" if cuda else "cpu"],
        "steps": job.loop.state.step,
        "examples": job.loop.examples,
        "train_seconds": round(train_seconds, 3),
    }


def largest(value: Number, device: torch.device) -> Number:
    """The maximum over all processes (whole numbers to 2^53); a collective call."""
    if not dist.is_initialized():
        return value
    values = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return type(value)(values.item())
