"""Measures the speed of one row. scripts/speed.py runs this in every process.

The steps are those of fine-tuning: same batches, loss, optimizer and loop. The timed windows exclude start-up, warm-up,
evaluation and saving. They include waiting for data, and its share is reported.

speed.json contains medians over the windows, each window in `repeats`, the memory of the process with the largest peak,
and a fingerprint of the machine.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from phi3v.benchmark.machine import check_devices, fingerprint, found_devices, measured_peak
from phi3v.model.runtime import Observer, device_name
from phi3v.planning.flops import FORMULA, Work
from phi3v.planning.hardware import Utilisation, utilisation_of
from phi3v.provenance.manifest import write_json
from phi3v.settings import SpeedSettings
from phi3v.training.finetune import observe, record, say_headline
from phi3v.training.job import build
from phi3v.training.launch import leave, of_all, say
from phi3v.training.logging import Progress
from phi3v.training.loop import Loop, StepRecord
from phi3v.training.memory import explain_memory, peak_memory_bytes

PROFILED_STEPS = 3
"""Number of profiled optimizer steps."""
TRACE, TABLE = "trace.json.gz", "operators.txt"
OPERATORS = 20
MEMORY = ("peak_memory_bytes", "reserved_memory_bytes", "context_memory_bytes", "memory_source")
"""Fields of observed.json that speed.json repeats."""


@dataclass
class Window:
    """One timed window of optimizer steps, with counts over all processes."""

    seconds: float = 0.0
    steps: int = 0
    images: int = 0
    work: Work = field(default_factory=Work)
    loading_seconds: float = 0.0
    """Waiting for data, of the process that waited longest."""

    def rates(self, utilisation: Utilisation) -> dict[str, float | None]:
        """Values of a window in speed.json: rates over all processes, and MFU and HFU."""
        return {
            "images_per_second": self.images / self.seconds,
            "tokens_per_second": self.work.tokens / self.seconds,
            "step_seconds": self.seconds / self.steps,
            "loading_share": self.loading_seconds / self.seconds,
            **utilisation.of(self.work, self.seconds),
        }


@dataclass
class Stopwatch:
    """A hook of the loop that times windows of steps after the warm-up. Synchronises the device at both ends."""

    device: torch.device
    warmup_steps: int
    timed_steps: int
    repeats: int
    windows: list[Window] = field(default_factory=list)
    _started: float = 0.0

    def __call__(self, record: StepRecord) -> None:
        timed = record.step - self.warmup_steps
        if not 0 <= timed <= self.repeats * self.timed_steps:
            return
        if timed > 0:
            window = self.windows[-1]
            window.steps += 1
            window.images += record.images
            window.work = window.work + record.work
            window.loading_seconds += record.loading_seconds
        if timed % self.timed_steps == 0:
            self._turn(timed)

    def _turn(self, timed: int) -> None:
        """Ends the current window and starts the next one. The time of this call is in neither."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if timed == 0 and self.device.type == "cuda":
            # Loading the model has a separate peak, which does not count.
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.windows:
            window = self.windows[-1]
            window.seconds = now - self._started
            window.loading_seconds = of_all(window.loading_seconds, "MAX", self.device)
        if len(self.windows) < self.repeats:
            self.windows.append(Window())
        self._started = time.perf_counter()


class Profile:
    """A hook of the first process that profiles steps to FOLDER/trace.json.gz and operators.txt.

    The trace opens in https://ui.perfetto.dev or chrome://tracing. Profiling slows down the steps, so none of
    them is timed.
    """

    def __init__(self, folder: Path, device: torch.device, after_step: int) -> None:
        self.folder, self.device, self.after_step = folder, device, after_step
        self._profiler: Any = None

    def __call__(self, record: StepRecord) -> None:
        if record.step == self.after_step:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=kinds)
            self._profiler.start()
        elif self._profiler is not None and record.step == self.after_step + PROFILED_STEPS:
            self._profiler.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self.folder / TRACE))
            by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
            table = self._profiler.key_averages().table(sort_by=by, row_limit=OPERATORS, max_name_column_width=60)
            (self.folder / TABLE).write_text(f"{PROFILED_STEPS} optimizer steps\n{table}\n", encoding="utf-8")
            say(f"{self.folder}: {TRACE} of {PROFILED_STEPS} steps, and the {OPERATORS} longest operators in {TABLE}")
            self._profiler = None


def measure(settings: SpeedSettings) -> int:
    """Times the row's steps and writes speed.json and manifest.json to OUTPUT_DIR. Returns the exit code.

    Raises SettingsError, OutOfMemoryError.
    """
    started = time.perf_counter()
    check_devices(settings, found_devices(settings))
    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    loop = build(timed_job(settings), output, trackers=False)
    (output / "manifest.json").unlink(missing_ok=True)
    timed = f"{settings.speed_warmup_steps} warm-up and {settings.repeats} x {settings.timed_steps} timed steps"
    say_headline(loop, f"; {timed}")
    config, name = loop.training.collate.config.to_dict(), device_name(loop.device)
    counting = utilisation_of(settings, config, name, loop.processes, settings.hardware)
    cpu = loop.device.type == "cpu"
    before = measured_peak(settings.dtype) if cpu else None
    windows, observed = run_steps(settings, loop, output)
    if before is not None:
        # Measured again after the timing. The larger rate was less disturbed by other programs.
        peak, source = max(before, measured_peak(settings.dtype))
        counting = replace(counting, peak_tflops=peak, peak_source=source)
    result = speed_result(settings, loop, windows, counting, observed)
    if loop.is_main:
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        write_json(output / "speed.json", result)
        record(loop, settings, output, "speed", started)
        say(summary(result))
    return leave(0)


def timed_job(settings: SpeedSettings) -> SpeedSettings:
    """Settings of a job with as many steps as are timed and profiled, without validation and saving."""
    steps = settings.timed_until + PROFILED_STEPS * settings.profile
    quiet = {"eval_steps": 0, "keep_best": False, "early_stopping_patience": 0, "save_steps": 0, "save_minutes": 0}
    return settings.model_copy(update={"max_steps": steps, "report_to": [], **quiet})


def run_steps(settings: SpeedSettings, loop: Loop, output: Path) -> tuple[list[Window], dict[str, Any]]:
    """Runs the job's steps. Returns the timed windows and the content of observed.json. A collective call."""
    stopwatch = Stopwatch(loop.device, settings.speed_warmup_steps, settings.timed_steps, settings.repeats)
    observer = Observer(loop.module)
    loop.hooks += [lambda record: observer.remove(), stopwatch]
    if loop.is_main:
        loop.logs.append(Progress(settings.tqdm, lambda: peak_memory_bytes(loop.device)))
        if settings.profile:
            loop.hooks.append(Profile(output / "profile", loop.device, settings.timed_until))
    started = time.perf_counter()
    with explain_memory(settings, loop.device):
        loop.run()
    return stopwatch.windows, observe(loop, observer, time.perf_counter() - started)


def speed_result(
    settings: SpeedSettings, loop: Loop, windows: list[Window], counting: Utilisation, observed: dict[str, Any]
) -> dict[str, Any]:
    """Content of speed.json: medians over the windows, each window, memory, fingerprint. A collective call."""
    processes = loop.processes
    repeats = [window.rates(counting) for window in windows]
    median: dict[str, Any] = {}
    for name in repeats[0]:
        values = [value for repeat in repeats if (value := repeat[name]) is not None]
        median[name] = statistics.median(values) if values else None
    rates = [window.work.examples / window.seconds for window in windows]
    step = counting.count(sum((window.work for window in windows), Work()))
    steps = sum(window.steps for window in windows)
    return {
        "row": settings.row,
        **median,
        "tokens_per_second_per_device": median["tokens_per_second"] / processes,
        "spread": (max(rates) - min(rates)) / statistics.median(rates),  # 0.05 = 5 %
        "peak_tflops": counting.peak_tflops,
        "peak_source": counting.peak_source,
        "formula": FORMULA,
        "model_tflop_per_step": step.model / steps / 1e12,
        "hardware_tflop_per_step": step.hardware / steps / 1e12,
        **{name: observed[name] for name in MEMORY},
        "resident_memory_bytes": int(of_all(peak_memory_bytes(torch.device("cpu")), "MAX", loop.device)),
        "warmup_steps": settings.speed_warmup_steps,
        "timed_steps": settings.timed_steps,
        "repeats": repeats,
        "world_size": processes,
        "nodes": int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        "device": device_name(loop.device),
        "stand_in": settings.stand_in,
        "observed": observed,
        "fingerprint": fingerprint(loop.device, loop.training.examples.dataset.data_dir),
    }


def summary(result: dict[str, Any]) -> str:
    """The result in a few lines, with the formulas of MFU and HFU."""
    beside = ""  # further parts of the memory that tools report for a GPU
    if result["reserved_memory_bytes"] is not None:
        reserved, context = (result[f"{name}_memory_bytes"] / 2**30 for name in ("reserved", "context"))
        beside = f" allocated, {reserved:.2f} reserved, {context:.2f} outside PyTorch"
    resident = f"{result['resident_memory_bytes'] / 2**30:.2f} GiB of host memory per process"
    lines = [
        f"{result['images_per_second']:.3f} img/s, {result['tokens_per_second_per_device']:.0f} tokens/s per device, "
        f"{result['step_seconds']:.3f} s per step, spread {100 * result['spread']:.1f} %, waiting for data "
        f"{100 * result['loading_share']:.1f} %",
        f"peak {result['peak_memory_bytes'] / 2**30:.2f} GiB{beside}, {resident}",
    ]
    if result["mfu"] is None:
        lines.append(f"MFU and HFU unknown: no hardware file contains {result['device']}")
    else:
        lines.append(
            f"MFU {100 * result['mfu']:.1f} %, HFU {100 * result['hfu']:.1f} % of {result['peak_tflops']:.4g} TFLOP/s "
            f"({result['peak_source']}); {result['formula']}"
        )
    return "\n".join(lines)
