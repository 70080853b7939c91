"""Fine-tunes one row. scripts/finetune.py runs this in every process."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from phi3v.model.adapters import base_of, write_card
from phi3v.model.fused import compiled_kernels
from phi3v.model.modeling import size_of
from phi3v.model.runtime import Observer, attention_note, device_name, linear4bit
from phi3v.planning.fits import interval_of, recomputation
from phi3v.planning.hardware import utilisation_of
from phi3v.planning.resources import checkpoint_bytes, most_checkpoints
from phi3v.provenance.manifest import write_json, write_manifest
from phi3v.settings import FinetuneSettings, number_of
from phi3v.training import checkpoints, finished
from phi3v.training.census import Census, census_label
from phi3v.training.export import export_final, export_merged
from phi3v.training.job import build
from phi3v.training.launch import (
    REQUEUE_EXIT_CODE,
    StopRequest,
    explain_failure,
    is_first,
    leave,
    of_all,
    of_first,
    parents_command,
    say,
    seconds_to_save,
)
from phi3v.training.lock import FolderLock, LockedError
from phi3v.training.logging import MetricsFile, Progress, Trackers
from phi3v.training.loop import Loop, StepRecord
from phi3v.training.memory import MEMORY_SOURCES, context_bytes, explain_memory, peak_memory_bytes

# Bytes per second that any suitable file system should write. On a slower one, a save may not finish in time.
SLOW_DISK = 100e6
STOPPED = "stopped.json"
"""File in checkpoints/ that exists after a job saved and stopped on request."""


def run(settings: FinetuneSettings) -> int:
    """Trains and writes OUTPUT_DIR. Returns the exit code: 0, or 75 if a signal asked the job to save and stop.

    Raises SettingsError for impossible settings, LockedError if another job owns the folder, CheckpointError,
    CensusError if a group that should train gets no gradient, and NotANumberError if the loss stays NaN or infinite.
    """
    output = Path(settings.output_dir)
    lock = FolderLock(output, say) if is_first() else None
    if lock is not None:
        try:
            lock.acquire(settings.lock_wait_minutes * 60)
        except OSError as error:
            raise checkpoints.CheckpointError(
                f"{output}: not writable ({error.strerror}: {error.filename}); expected a writable folder, or a path "
                "where it can be created; choose another --output_dir"
            ) from error
    try:
        checkpoints.checkpoint_folders(output / "checkpoints")  # raises before anything starts if they are not readable
        with StopRequest() as stop, explain_failure(output):
            return _run(settings, output, stop, lock)
    finally:
        if lock is not None:
            lock.release()


def _run(asked: FinetuneSettings, output: Path, stop: StopRequest, lock: FolderLock | None) -> int:
    started = time.perf_counter()
    loop = build(asked, output)
    if loop.is_main:
        (output / "manifest.json").unlink(missing_ok=True)
        (output / "checkpoints" / STOPPED).unlink(missing_ok=True)
        write_json(output / "settings.json", loop.settings.model_dump())
    say_headline(loop)
    observer = Observer(loop.module)
    attach(loop, output, stop, lock, observer)
    checkpoint = of_first(lambda: find_checkpoint(asked, loop, output / "checkpoints"))
    if of_first(lambda: finished.restore(output, loop.writer.settings, asked.merge)):
        say(f"{output}: already finished with these settings and data; delete this folder to train again")
        return leave(0)
    train_seconds = -time.perf_counter()
    with explain_memory(asked, loop.device, lambda: longest_example(loop)):
        if checkpoint is not None:
            loop.resume(checkpoint)
        loop.run()
    train_seconds += time.perf_counter()
    if loop.stopped_by_signal:
        if loop.is_main:
            # torchrun exits with 1 for any failed worker. Callers recognise a stopped job by this file.
            stopped = {"step": loop.state.step, "exit_code": REQUEUE_EXIT_CODE}
            write_json(output / "checkpoints" / STOPPED, stopped)
        say(f"{stop.signal or 'signal'}: saved at step {loop.state.step}; the same command resumes from there")
        return leave(REQUEUE_EXIT_CODE)
    observed = observe(loop, observer, train_seconds)
    export_final(loop, output / "final")
    if loop.is_main:
        finish(loop, output, observed, started)
        say(f"{output}: done at step {loop.state.step}, {loop.examples} examples in {train_seconds:.1f} s")
    return leave(0)


def finish(loop: Loop, output: Path, observed: dict[str, Any], started: float) -> None:
    """Merges if requested, and writes the manifest, which marks the row as finished. For the first process."""
    # Write the manifest after everything that can fail. Checkpoints stay until it exists.
    settings = loop.settings
    report = export_merged(output) if settings.merge else None
    write_json(output / "observed.json", observed)
    record(loop, settings, output, "train", started)
    if reason := finished.keep(output, loop.state.step, loop.writer.settings):
        say(f"{output}: could not save the result for a repeated start, which would train again ({reason})")
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    if report is not None:
        write_card(output / "merged", base_of(output / "final"), output / "manifest.json", report)
        differs = report["max_logit_difference"]
        say(f"{output / 'merged'}: largest difference of logits from base model with adapter: {differs:.1e}")


def record(loop: Loop, settings: FinetuneSettings, output: Path, kind: str, started: float) -> None:
    """Writes the manifest of a job that started at `started` (time.perf_counter). For the first process."""
    shortened = {} if loop.warmup_steps == settings.warmup_steps else {"warmup_steps": loop.warmup_steps}
    write_manifest(
        output,
        kind=kind,
        settings=settings,
        inputs={"data": str(loop.training.examples.dataset.data_dir), "model": settings.model_name_or_path},
        seed=settings.seed,
        seconds=time.perf_counter() - started,
        device=device_name(loop.device),
        extra=shortened,
    )


def find_checkpoint(asked: FinetuneSettings, loop: Loop, folder: Path) -> Path | None:
    """The checkpoint to resume from, or None. Sets the writer's fingerprint. For the first process.

    Prints which checkpoints cannot be resumed, and why. Raises CheckpointError if the disk has too little free space
    for the requested checkpoints.
    """
    loop.writer.settings = checkpoints.fingerprint(asked, loop.training.examples.dataset.data_dir)
    path, skipped = checkpoints.find(folder, loop.writer.settings, loop.processes, loop.is_sharded)
    for other, reason in skipped.items():
        say(f"{other}: cannot resume from it: {reason}")
        checkpoints.set_aside(other)
    trained = sum(size_of(p) for p in loop.trained)
    weights = sum(size_of(p) * p.element_size() for p in loop.module.parameters())
    needed = checkpoint_bytes(trained, weights, asked.optimizer, loop.is_sharded)
    if asked.save_steps or asked.save_minutes or asked.keep_best:
        checkpoints.check_space(folder, needed, most_checkpoints(asked.keep_checkpoints, asked.keep_best))
    grace = seconds_to_save(parents_command(), os.environ)
    if grace is not None and needed / grace > SLOW_DISK:
        say(
            f"warning: torchrun kills its workers {grace:.0f} s after SIGTERM, but writing a checkpoint of "
            f"{needed / 1e9:.1f} GB may take longer; to allow more time, start with torchrun --shutdown-timeout=900 …"
        )
    if path is not None:
        say(f"{path}: resuming from here")
    return path


def longest_example(loop: Loop) -> str:
    """A sentence about the longest example in the last micro-batch."""
    tokens, index = loop.longest
    if not tokens:
        return ""
    return (
        f"The micro-batch contained {loop.training.examples.where(index)} with {tokens:,} tokens; to skip long "
        "examples, "
        "set --max_length. "
    )


def attach(loop: Loop, output: Path, stop: StopRequest, lock: FolderLock | None, observer: Observer) -> None:
    """Attaches the lock check, the census, metrics and progress to the steps of a job."""
    settings = loop.settings
    census = Census(loop.module, census_label(settings))
    loop.stop = stop
    # FLOP are only counted for the recipe's selections of trained layers.
    if not (settings.freeze_decoder or settings.lora_targets or settings.freeze_vision_model == "tower"):
        config = loop.training.collate.config.to_dict()
        loop.utilisation = utilisation_of(settings, config, device_name(loop.device), loop.processes)

    def check_lock(record: StepRecord) -> None:
        if lock is not None and lock.lost:
            raise LockedError(f"{output}: another job has taken over this folder, so this job stops")

    def look_once(record: StepRecord) -> None:
        loop.hooks.remove(look_once)
        observer.remove()
        census.finish(loop.device, pictures_seen=record.images > 0)
        if loop.is_main:
            write_json(output / "census.json", census.result())

    loop.hooks += [check_lock, look_once]
    if loop.is_main:
        progress = Progress(settings.tqdm, lambda: peak_memory_bytes(loop.device))
        loop.logs = [MetricsFile(output / "metrics.jsonl"), progress, Trackers(loop.accelerator, settings)]


def say_headline(loop: Loop, more: str = "") -> None:
    """Prints a line about the job, and another if flash attention uses a different kernel on this device."""
    settings, plan, examples = loop.settings, loop.training.plan, loop.training.examples
    trainable = sum(map(size_of, loop.trained))
    how = f", ZeRO {settings.zero_stage}" if loop.is_sharded else ""
    micro_steps = f"{number_of(plan.accumulation, 'micro-step')} of {settings.micro_batch_size}"
    if settings.batching == "packed":
        micro_steps = f"packs of {settings.tokens_per_pack} tokens"
    longer = len(examples.dataset) - len(examples)
    left_out = f", {longer} longer than {settings.max_length} tokens skipped" if longer else ""
    say(
        f"{settings.row or settings.dataset or 'finetune'}: {settings.method} {settings.dtype}{how} on "
        f"{loop.processes} x {device_name(loop.device)}; {plan.examples} examples{left_out}, batch "
        f"{plan.batch_size} = {number_of(plan.processes, 'process', 'processes')} x {micro_steps}, "
        f"{recomputation(interval_of(settings.recompute or 0.0))}, "
        f"{trainable:,} trainable parameters{more}"
    )
    if note := attention_note(settings, loop.device):
        say(note)


def observe(loop: Loop, observer: Observer, train_seconds: float) -> dict[str, Any]:
    """Content of observed.json: what ran, besides what was requested. A collective call."""
    settings, device = loop.settings, loop.device
    layers, weight_bytes = linear4bit(loop.module)
    cuda = device.type == "cuda"

    def largest(value: int) -> int:
        return int(of_all(value, "MAX", device))

    return {
        "asked": {"dtype": settings.dtype, "attention": "flash" if settings.flash_attention else "eager"},
        **observer.result(),
        "compiled_kernels": compiled_kernels(),
        "linear4bit_layers": layers,
        "linear4bit_bytes": weight_bytes,
        "batch_size_per_gpu": None if settings.batching == "packed" else settings.micro_batch_size,
        "recompute_every": interval_of(settings.recompute or 0.0),
        "zero_stage": settings.zero_stage if loop.is_sharded else 0,
        "world_size": loop.processes,
        "device": device_name(device),
        "peak_memory_bytes": largest(peak_memory_bytes(device)),
        "reserved_memory_bytes": largest(torch.cuda.max_memory_reserved(device)) if cuda else None,
        "context_memory_bytes": largest(context_bytes(device)) if cuda else None,
        "memory_source": MEMORY_SOURCES["cuda" if cuda else "cpu"],
        "steps": loop.state.step,
        "examples": loop.examples,
        "train_seconds": round(train_seconds, 3),
    }
