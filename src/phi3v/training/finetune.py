"""Fine-tune one row: what scripts/finetune.py runs in every process."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from phi3v.model.fused import compiled_kernels
from phi3v.model.runtime import attention_note
from phi3v.planning.fits import interval_of, recomputation
from phi3v.planning.resources import most_checkpoints
from phi3v.planning.utilisation import utilisation_of
from phi3v.provenance.manifest import write_json, write_manifest
from phi3v.settings import FinetuneSettings, SettingsError
from phi3v.training import checkpoints
from phi3v.training.census import Census, CensusError, census_label
from phi3v.training.job import Job, build
from phi3v.training.lock import FolderLock, LockedError
from phi3v.training.memory import (
    MEMORY_SOURCES,
    OutOfMemoryError,
    context_bytes,
    explain_memory,
    peak_memory_bytes,
    reserved_bytes,
)
from phi3v.training.observe import Observer, device_name, linear4bit, size_of
from phi3v.training.signals import REQUEUE_EXIT_CODE, StopRequest, parents_command, seconds_to_save
from phi3v.training.steps import NotANumberError, StepCallback
from phi3v.training.watching import MetricsFile, Progress, say


class LostProcessError(RuntimeError):
    """Another process of the job is gone."""


Number = TypeVar("Number", int, float)
# What gloo, TCPStore and NCCL say of a peer that is gone (PyTorch has no class of its own for it).
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
# What PyTorch says of an operator that --deterministic refuses.
NOT_DETERMINISTIC = "does not have a deterministic implementation"
# Bytes a second that any file system a 4B model is trained on should write; beyond it a save may not end in time.
SLOW_DISK = 100e6
STOPPED = "stopped.json"
"""In checkpoints/: there while a job has saved and left because it was told to."""
EXPECTED_ERRORS = (
    OutOfMemoryError, LockedError, LostProcessError, checkpoints.CheckpointError, CensusError, NotANumberError,
)  # fmt: skip
"""What a script reports as one line: the message says all there is to say."""


def run(settings: FinetuneSettings) -> int:
    """Train and write OUTPUT_DIR; returns the exit code: 0, or 75 when a signal asked to save and leave.

    Raises SettingsError for what cannot work, LockedError where another job owns the folder, CheckpointError,
    CensusError where a group that should train gets no gradient, and NotANumberError where the loss stays no number.
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


@contextlib.contextmanager
def explain_failure(output: Path) -> Iterator[None]:
    """A full disk, a lost process and an operator that does not repeat, as one sentence each."""
    goes_on = "Checkpoints written before are untouched: the same command goes on from the newest"
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(output).free / 1e9
        raise checkpoints.CheckpointError(
            f"{error.filename or output}: the disk is full ({error.strerror}; {free:.2f} GB are free). {goes_on}"
        ) from error
    except RuntimeError as error:
        if NOT_DETERMINISTIC in str(error):
            raise SettingsError(
                f"command line: field `deterministic`: got true: {str(error).splitlines()[0].split(', but you set')[0]} "
                "on this device; expected --no-deterministic, or another method or attention kernel"
            ) from error
        if not any(text in str(error) for text in LOST):
            raise
        rank = os.environ.get("RANK", "0")
        raise LostProcessError(
            f"process {rank}: another process of this job is gone ({str(error).splitlines()[0][:200]}); what it said "
            f"or torchrun says of it is the reason. {goes_on}"
        ) from error


def _run(settings: FinetuneSettings, output: Path, stop: StopRequest, lock: FolderLock | None) -> int:
    started = time.perf_counter()
    job = build(settings, output)
    settings = job.settings
    if job.is_main:
        (output / "manifest.json").unlink(missing_ok=True)
        (output / "checkpoints" / STOPPED).unlink(missing_ok=True)
        write_json(output / "settings.json", settings.model_dump())
        say(headline(job))
        say_attention(job)
    resume = prepare_checkpoints(job, output / "checkpoints")
    watch = attach_watchers(job, output, stop, lock)
    train_seconds = -time.perf_counter()
    with explain_memory(job.settings, job.device):
        job.trainer.train(resume_from_checkpoint=resume)
    train_seconds += time.perf_counter()
    if watch.stopped_by_signal:
        if job.is_main:
            # torchrun answers any failed worker with 1: who starts it again tells the cases apart by this file.
            stopped = {"step": job.trainer.state.global_step, "exit_code": REQUEUE_EXIT_CODE}
            write_json(output / "checkpoints" / STOPPED, stopped)
        say(
            f"{stop.signal or 'signal'}: saved at step {job.trainer.state.global_step}; "
            "the same command goes on from there"
        )
        return leave(REQUEUE_EXIT_CODE)
    from phi3v.model.adapters import base_of
    from phi3v.model.card import write_card
    from phi3v.training.export import export_final, export_merged

    observed = observe(job, watch, train_seconds)
    export_final(job.trainer, job.processor, settings, output / "final")
    if job.is_main:
        # What can still fail comes before the manifest, and checkpoints stay until it is there.
        report = export_merged(output) if settings.merge else None
        write_json(output / "observed.json", observed)
        write_manifest(
            output, kind="train", settings=settings,
            inputs={"data": str(job.data_dir), "model": settings.model_name_or_path},
            seed=settings.seed, seconds=time.perf_counter() - started, device=device_name(job.device),
        )  # fmt: skip
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        if report is not None:
            write_card(output / "merged", base_of(output / "final"), output / "manifest.json", report)
            differs = report["max_logit_difference"]
            say(f"{output / 'merged'}: logits differ from base and adapter by {differs:.1e} at most")
        say(f"{output}: done at step {observed['steps']}, {observed['examples']} examples in {train_seconds:.1f} s")
    return leave(0)


def prepare_checkpoints(job: Job, folder: Path) -> str | None:
    """The checkpoint to go on from, or None; a collective call.

    Says which checkpoints are passed over and why. Raises CheckpointError where the disk cannot hold what is asked for.
    """
    settings, trainer = job.settings, job.trainer
    chosen: list[Any] = [None, None]
    if job.is_main:
        try:
            trainer.fingerprint = checkpoints.fingerprint(job.asked, job.data_dir)
            found = checkpoints.find(folder, trainer.fingerprint, trainer.args.world_size, trainer.is_deepspeed_enabled)
            for path, reason in found.skipped.items():
                say(f"{path}: not used: {reason}")
                checkpoints.set_aside(path)
            needed = _checkpoint_bytes(job)
            if settings.save_steps or settings.save_minutes or settings.keep_best:
                count = most_checkpoints(settings.keep_checkpoints, settings.keep_best)
                checkpoints.check_space(folder, needed, count)
            patience = seconds_to_save(parents_command(), os.environ)
            if patience is not None and needed / patience > SLOW_DISK:
                say(
                    f"torchrun kills its workers {patience:.0f} s after SIGTERM, a checkpoint of {needed / 1e9:.1f} GB "
                    "may take longer: torchrun --shutdown-timeout=900 … gives it the time"
                )
            if found.path is not None:
                say(f"{found.path}: going on from here")
                chosen[0] = str(found.path)
        except checkpoints.CheckpointError as error:
            chosen[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(chosen)
    if chosen[1]:
        raise checkpoints.CheckpointError(chosen[1])
    return chosen[0]


def _checkpoint_bytes(job: Job) -> int:
    """Of adapters alone, or of all weights; beside them what the optimizer keeps."""
    adapters = job.settings.method in ("lora", "qlora")
    held = [p for p in job.model.parameters() if p.requires_grad or not adapters]
    trained = sum(size_of(p) for p in held if p.requires_grad)
    weights = sum(size_of(p) * p.element_size() for p in held)
    return checkpoints.bytes_needed(weights, trained, job.trainer.is_deepspeed_enabled)


def attach_watchers(job: Job, output: Path, stop: StopRequest, lock: FolderLock | None) -> StepCallback:
    """Callbacks of a training job: census, observation, metrics, progress. Returns the StepCallback."""
    from phi3v.model.freezing import parameter_group

    settings, trainer = job.settings, job.trainer
    census = Census(
        job.model, parameter_group, census_label(settings.method, settings.freeze_vision_model, settings.use_dora)
    )
    watch = StepCallback(
        trainer, output, stop, census=census, observer=Observer(job.model), lock=lock, settings=settings,
        utilisation=utilisation_of(
            settings, job.model.config.to_dict(), device_name(job.device), trainer.args.world_size
        ),
    )  # fmt: skip
    trainer.add_callback(watch)
    trainer.step_values = watch.values
    trainer.add_callback(MetricsFile(output / "metrics.jsonl"))
    trainer.add_callback(Progress(settings.tqdm, lambda: peak_memory_bytes(job.device)))
    return watch


def headline(job: Job) -> str:
    """One line that says what is about to run."""
    settings, trainer, plan = job.settings, job.trainer, job.trainer.plan
    trainable = sum(size_of(p) for p in job.model.parameters() if p.requires_grad)
    how = f", ZeRO {settings.zero_stage}" if trainer.is_deepspeed_enabled else ""
    size = "a pack" if settings.batching == "packed" else f"{settings.batch_size_per_gpu}"
    left_out = f", {job.left_out} longer than {settings.max_length} tokens left out" if job.left_out else ""
    return (
        f"{settings.row or settings.dataset or 'finetune'}: {settings.method} {settings.dtype}{how} on "
        f"{trainer.args.world_size} x {device_name(job.device)}; {plan.examples} examples{left_out}, batch "
        f"{plan.batch_size} = {plan.processes} processes x {plan.accumulation} micro-steps of {size}, "
        f"{recomputation(interval_of(settings.recompute or 0.0))}, "
        f"{trainable:,} trainable parameters"
    )


def say_attention(job: Job) -> None:
    """One line if --use_flash_attention runs another kernel on this device."""
    if note := attention_note(job.settings, job.device):
        say(note)


def observe(job: Job, watch: Any, train_seconds: float) -> dict[str, Any]:
    """observed.json: what ran, beside what was asked for; a collective call."""
    settings, trainer = job.settings, job.trainer
    layers, weight_bytes = linear4bit(job.model)
    cuda = job.device.type == "cuda"
    return {
        "asked": {"dtype": settings.dtype, "attention": "flash" if settings.use_flash_attention else "eager"},
        **watch.observer.result(),
        "compiled_kernels": compiled_kernels(),
        "linear4bit_layers": layers,
        "linear4bit_bytes": weight_bytes,
        "batch_size_per_gpu": None if settings.batching == "packed" else settings.batch_size_per_gpu,
        "recompute_every": interval_of(settings.recompute or 0.0),
        "zero_stage": settings.zero_stage if trainer.is_deepspeed_enabled else 0,
        "world_size": trainer.args.world_size,
        "device": device_name(job.device),
        "peak_memory_bytes": largest(peak_memory_bytes(job.device), job.device),
        "reserved_memory_bytes": largest(reserved_bytes(job.device), job.device) if cuda else None,
        "context_memory_bytes": largest(context_bytes(job.device), job.device) if cuda else None,
        "memory_source": MEMORY_SOURCES["cuda" if cuda else "cpu"],
        "steps": trainer.state.global_step,
        "examples": watch.examples,
        "train_seconds": round(train_seconds, 3),
    }


def largest(value: Number, device: torch.device) -> Number:
    """The maximum over all processes (whole numbers to 2^53); a collective call."""
    if not dist.is_initialized():
        return value
    values = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return type(value)(values.item())


def leave(code: int) -> int:
    """Close the process group, so that no process is still talking when another ends."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return code
