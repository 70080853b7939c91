"""Measure the speed of one row: what scripts/speed.py runs in every process.

The steps are fine-tuning's own: same batches, loss, optimizer and loop. Start-up, warm-up, evaluation and saving are
outside the timed windows; waiting for data is inside, and its share is told.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from phi3v.manifest import write_json, write_manifest
from phi3v.planning.flops import FORMULA, Work
from phi3v.settings import SettingsError, SpeedSettings
from phi3v.training.finetune import headline, leave, observe
from phi3v.training.job import Job, build
from phi3v.training.observe import Observer, device_name, peak_memory_bytes
from phi3v.training.signals import StopRequest
from phi3v.training.steps import StepCallback
from phi3v.training.utilisation import Utilisation, utilisation_of
from phi3v.training.watching import Progress, say


@dataclass
class Window:
    """One timed window of optimizer steps."""

    seconds: float = 0.0
    steps: int = 0
    images: int = 0
    tokens: int = 0
    work: Work = field(default_factory=Work)
    loading_seconds: float = 0.0

    def rates(self, utilisation: Utilisation) -> dict[str, float | None]:
        """What speed.json says of a window; over all processes, tokens without padding."""
        return {
            "images_per_second": self.images / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "step_seconds": self.seconds / self.steps,
            "loading_share": self.loading_seconds / self.seconds,
            **utilisation.of(self.work, self.seconds),
        }


@dataclass
class Stopwatch(TrainerCallback):
    """Times windows of steps after the warm-up, with the device at rest at both ends."""

    watch: StepCallback
    device: torch.device
    warmup_steps: int
    timed_steps: int
    windows: list[Window] = field(default_factory=list)
    _started: float = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        timed = state.global_step - self.warmup_steps
        if timed > 0:
            counts = self.watch.counts
            assert counts is not None
            window = self.windows[-1]
            window.steps += 1
            window.images += counts.images
            window.tokens += counts.tokens
            window.work = window.work + counts.work
            window.loading_seconds += counts.loading_seconds
        if timed >= 0 and timed % self.timed_steps == 0:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            if self.windows:
                self.windows[-1].seconds = now - self._started
            self._started = now
            if state.global_step < state.max_steps:
                self.windows.append(Window())


def check_processes(settings: SpeedSettings) -> None:
    """Raises SettingsError where fewer processes run than the row was published with, unless they stand in for them."""
    here = int(os.environ.get("WORLD_SIZE", "1"))
    if here >= settings.expect_processes or settings.stand_in:
        return
    devices = (
        ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}))
        if torch.cuda.is_available()
        else "no CUDA device"
    )
    raise SettingsError(
        f"row {settings.row or '(unnamed)'}: field `expect_processes`: the row needs {settings.expect_processes} "
        f"processes, found {here} ({torch.cuda.device_count()} visible on this machine: {devices}); "
        "--stand_in measures here all the same and labels the result"
    )


def measure(settings: SpeedSettings) -> int:
    """Time the row's steps and write speed.json and manifest.json into OUTPUT_DIR; returns the exit code."""
    started = time.perf_counter()
    check_processes(settings)
    steps = settings.speed_warmup_steps + settings.repeats * settings.timed_steps
    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    job = build(
        settings.model_copy(update={"max_steps": steps, "eval_steps": 0, "report_to": []}), output, trackers=False
    )
    if job.is_main:
        (output / "manifest.json").unlink(missing_ok=True)
        say(
            f"{headline(job)}; {settings.speed_warmup_steps} warm-up and "
            f"{settings.repeats} x {settings.timed_steps} timed steps"
        )
    watch = StepCallback(job.trainer, output, StopRequest(), observer=Observer(job.model))
    stopwatch = Stopwatch(watch, job.device, settings.speed_warmup_steps, settings.timed_steps)
    for callback in (watch, stopwatch, Progress(settings.tqdm, lambda: peak_memory_bytes(job.device))):
        job.trainer.add_callback(callback)
    job.trainer.step_values = watch.values
    train_seconds = -time.perf_counter()
    job.trainer.train()
    train_seconds += time.perf_counter()
    result = speed_result(settings, job, stopwatch.windows, observe(job, watch, train_seconds))
    if job.is_main:
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        write_json(output / "speed.json", result)
        write_manifest(
            output, kind="speed", settings=settings,
            inputs={"data": str(job.data_dir), "model": settings.model_name_or_path},
            seed=settings.seed, seconds=time.perf_counter() - started, device=device_name(job.device),
        )  # fmt: skip
        say(
            f"{result['images_per_second']:.3f} img/s, {result['tokens_per_second']:.0f} tokens/s, "
            f"{result['step_seconds']:.3f} s a step, spread {100 * result['spread']:.1f} %, "
            f"peak {result['peak_memory_bytes'] / 2**30:.2f} GiB"
        )
    return leave(0)


def speed_result(settings: SpeedSettings, job: Job, windows: list[Window], observed: dict[str, Any]) -> dict[str, Any]:
    """speed.json: medians over the windows, and each window."""
    counting = utilisation_of(
        settings, job.model.config.to_dict(), device_name(job.device), job.trainer.args.world_size
    )
    repeats: list[dict[str, Any]] = [window.rates(counting) for window in windows]
    median = {
        name: None if value is None else statistics.median(repeat[name] for repeat in repeats)
        for name, value in repeats[0].items()
    }
    rates = [repeat["images_per_second"] or repeat["tokens_per_second"] for repeat in repeats]
    return {
        "row": settings.row,
        **median,
        "tokens_per_second_per_device": median["tokens_per_second"] / job.trainer.args.world_size,
        "peak_tflops": counting.peak_tflops,
        "formula": FORMULA,
        "spread": (max(rates) - min(rates)) / statistics.median(rates),
        "repeats": repeats,
        "peak_memory_bytes": observed["peak_memory_bytes"],
        "warmup_steps": settings.speed_warmup_steps,
        "timed_steps": settings.timed_steps,
        "world_size": job.trainer.args.world_size,
        "nodes": int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        "device": device_name(job.device),
        "stand_in": settings.stand_in,
        "observed": observed,
    }
