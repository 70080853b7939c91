"""Logs of a running job: metrics.jsonl, a progress bar or occasional lines, TensorBoard and other trackers."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from tqdm import tqdm

from phi3v.settings import FinetuneSettings, SettingsError
from phi3v.training.launch import say

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

# Fields of a metrics.jsonl line, in order. A validation line has step, epoch, eval_loss and eval_seconds instead.
FIELDS = (
    "step", "epoch", "loss", "learning_rate", "grad_norm", "seconds", "images_per_second", "tokens_per_second",
    "loading_share", "padding_share", "tflops", "mfu", "hfu",
)  # fmt: skip
Line = dict[str, Any]
"""Values of an optimizer step (FIELDS) or of a validation, by name."""


class Log(Protocol):
    """Destination of a job's log values. Only the first process has any."""

    def begin(self, step: int, total: int) -> None:
        """Called when the job starts or resumes after `step` of `total` optimizer steps."""

    def write(self, line: Line) -> None:
        """Called after a step or a validation."""

    def close(self) -> None:
        """Called when the job ends."""


class MetricsFile:
    """Writes metrics.jsonl line by line. A resume removes the lines after the checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def begin(self, step: int, total: int) -> None:
        kept = ""
        if self.path.is_file() and step:
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError):  # an incomplete line of a killed process
                    kept += f"{line}\n" if json.loads(line)["step"] <= step else ""
        self._file = self.path.open("w", encoding="utf-8", buffering=1)
        self._file.write(kept)

    def write(self, line: Line) -> None:
        assert self._file is not None
        if "loss" in line:
            line = {name: line.get(name) for name in FIELDS}
        # JSON has no NaN, so a loss that is not finite becomes null.
        line = {name: None if isinstance(v, float) and v - v != 0 else v for name, v in line.items()}
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Progress:
    """A tqdm bar on a terminal. Otherwise about ten lines per run."""

    def __init__(self, bar: bool, memory: Callable[[], int]) -> None:
        self.wants_bar = bar and sys.stderr.isatty()
        self.memory = memory
        self.bar: tqdm | None = None

    def begin(self, step: int, total: int) -> None:
        self._start, self._first_step, self._next_line, self._total = time.perf_counter(), step, step + 1, total
        if self.wants_bar:
            self.bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True)

    def write(self, line: Line) -> None:
        step = line["step"]
        if "eval_loss" in line:
            (self.bar.write if self.bar is not None else say)(f"step {step}: validation loss {line['eval_loss']:.4f}")
            return
        mfu = f"MFU {100 * line['mfu']:.1f} %  " if line.get("mfu") is not None else ""
        values = (
            f"loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  {line['images_per_second']:.2f} img/s  "
            f"{line['tokens_per_second']:.0f} tok/s  {mfu}{self.memory() / 2**30:.1f} GiB"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(values, refresh=False)
            self.bar.update(step - self.bar.n)
        elif step >= self._next_line or step == self._total:
            left = (time.perf_counter() - self._start) / max(step - self._first_step, 1) * (self._total - step)
            say(f"step {step}/{self._total}  epoch {line['epoch']:.2f}  {values}  ETA {tqdm.format_interval(left)}")
            tenth = max(1, self._total // 10)
            self._next_line = (step // tenth + 1) * tenth

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Trackers:
    """accelerate's trackers: the values of metrics.jsonl as train/… and eval/…."""

    def __init__(self, accelerator: Accelerator, settings: FinetuneSettings) -> None:
        self.accelerator, self.settings = accelerator, settings

    def begin(self, step: int, total: int) -> None:
        name = self.settings.row or self.settings.dataset or Path(self.settings.output_dir).name
        names = {"wandb": {"name": name}, "trackio": {"name": name}, "mlflow": {"run_name": name}}
        project = os.environ.get("WANDB_PROJECT", "phi3v")
        self.accelerator.init_trackers(project, init_kwargs=names)
        for tracker in self.accelerator.trackers:
            if tracker.name != "tensorboard":  # it only accepts numbers and short texts, and creates a folder for them
                tracker.store_init_configuration(self.settings.model_dump())

    def write(self, line: Line) -> None:
        # Trackers only accept numbers, so unknown values are omitted.
        values = {
            f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
            for name, value in line.items()
            if value is not None and name != "step"
        }
        self.accelerator.log(values, step=line["step"])

    def close(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()


def trackers_of(settings: FinetuneSettings, output: Path) -> list[str | GeneralTracker]:
    """TensorBoard in OUTPUT/tensorboard, and the trackers of --report_to."""
    from accelerate.tracking import TensorBoardTracker

    others = [name for name in settings.report_to if name != "tensorboard"]
    return [TensorBoardTracker("tensorboard", output), *others]


def check_trackers(names: list[str]) -> None:
    """Raises SettingsError if --report_to names a tracker that accelerate does not support or that is not installed."""
    from accelerate.tracking import get_available_trackers

    here = [tracker.value for tracker in get_available_trackers()]
    for name in names:
        if name not in here:
            raise SettingsError(
                f"command line: field `report_to`: got {name!r}: expected an installed tracker of accelerate "
                f"({', '.join(here)}); install wandb, mlflow, trackio and others with `pip install {name}`"
            )
