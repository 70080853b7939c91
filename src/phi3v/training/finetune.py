"""Fine-tune one row: what scripts/finetune.py runs in every process."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from phi3v.manifest import write_json, write_manifest
from phi3v.settings import FinetuneSettings
from phi3v.training.job import Job, build
from phi3v.training.observe import device_name, linear4bit, peak_memory_bytes
from phi3v.training.signals import REQUEUE_EXIT_CODE, StopRequest
from phi3v.training.watching import say


def run(settings: FinetuneSettings) -> int:
    """Train and write OUTPUT_DIR; returns the exit code: 0, or 75 when a signal asked to save and leave.

    Raises SettingsError for what cannot work, CensusError where a group that should train gets no gradient, and
    NotANumberError where the loss stays NaN or infinite.
    """
    started = time.perf_counter()
    output = Path(settings.output_dir)
    stop = StopRequest().listen()
    output.mkdir(parents=True, exist_ok=True)
    job = build(settings, output)
    if job.is_main:
        (output / "manifest.json").unlink(missing_ok=True)
        write_json(output / "settings.json", settings.model_dump())
        say(headline(job))
    watch = attach_watchers(job, output, stop)
    train_seconds = -time.perf_counter()
    job.trainer.train()
    train_seconds += time.perf_counter()
    if watch.stopped_by_signal:
        say(f"{stop.signal or 'signal'}: saved at step {job.trainer.state.global_step}; the same command goes on from there")
        return leave(REQUEUE_EXIT_CODE)
    from phi3v.training.export import export_final

    observed = observe(job, watch, train_seconds)
    export_final(job.trainer, job.processor, settings, output / "final")
    if job.is_main:
        write_json(output / "observed.json", observed)
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        write_manifest(
            output, kind="train", settings=settings,
            inputs={"data": str(job.data_dir), "model": settings.model_name_or_path},
            seed=settings.seed, seconds=time.perf_counter() - started, device=device_name(job.device),
        )  # fmt: skip
        say(f"{output}: done, {observed['steps']} steps, {observed['examples']} examples, {train_seconds:.1f} s training")
    return leave(0)


def attach_watchers(job: Job, output: Path, stop: StopRequest) -> Any:
    """Callbacks of a training job: census, observation, metrics, progress. Returns the StepCallback."""
    from phi3v.model.freezing import parameter_group
    from phi3v.training.census import Census, census_label
    from phi3v.training.observe import Observer
    from phi3v.training.steps import StepCallback
    from phi3v.training.watching import MetricsFile, Progress

    settings, trainer = job.settings, job.trainer
    census = Census(job.model, parameter_group, census_label(settings.method, settings.freeze_vision_model))
    watch = StepCallback(
        trainer, output, stop, census=census, observer=Observer(job.model), nan_patience=settings.nan_patience,
        save_minutes=settings.save_minutes,
    )  # fmt: skip
    trainer.add_callback(watch)
    trainer.step_values = watch.values
    trainer.add_callback(MetricsFile(output / "metrics.jsonl"))
    trainer.add_callback(Progress(settings.tqdm, lambda: peak_memory_bytes(job.device)))
    return watch


def headline(job: Job) -> str:
    """One line that says what is about to run."""
    settings, trainer, plan = job.settings, job.trainer, job.trainer.plan
    trainable = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    how = f", ZeRO {settings.zero_stage}" if trainer.is_deepspeed_enabled else ""
    left_out = f", {job.left_out} longer than {settings.max_length} tokens left out" if job.left_out else ""
    return (
        f"{settings.row or settings.dataset or 'finetune'}: {settings.method} {settings.dtype}{how} on "
        f"{trainer.args.world_size} x {device_name(job.device)}; {plan.examples} examples{left_out}, batch "
        f"{plan.batch_size} = {plan.processes} processes x {plan.accumulation} micro-steps, "
        f"{trainable:,} trainable parameters"
    )


def observe(job: Job, watch: Any, train_seconds: float) -> dict[str, Any]:
    """observed.json: what ran, beside what was asked for; a collective call."""
    settings, trainer = job.settings, job.trainer
    layers, weight_bytes = linear4bit(job.model)
    return {
        "asked": {"dtype": settings.dtype, "attention": "flash" if settings.use_flash_attention else "eager"},
        **watch.observer.result(),
        "linear4bit_layers": layers,
        "linear4bit_bytes": weight_bytes,
        "zero_stage": settings.zero_stage if trainer.is_deepspeed_enabled else 0,
        "world_size": trainer.args.world_size,
        "device": device_name(job.device),
        "peak_memory_bytes": largest(peak_memory_bytes(job.device), job.device),
        "steps": trainer.state.global_step,
        "examples": watch.examples,
        "train_seconds": round(train_seconds, 3),
    }


def largest(value: int, device: torch.device) -> int:
    """The maximum over all processes; a collective call."""
    if not dist.is_initialized():
        return value
    values = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return int(values.item())


def leave(code: int) -> int:
    """Close the process group, so that no process is still talking when another ends."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return code
