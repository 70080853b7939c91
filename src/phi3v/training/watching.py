"""What people watch: a progress bar or sparse lines, and metrics.jsonl.

TensorBoard and other trackers are the Trainer's own callbacks; they get the same values through `Trainer.log`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

# Fields of a metrics.jsonl line, in order; a validation line has step, epoch, eval_loss and eval_seconds instead.
FIELDS = (
    "step", "epoch", "loss", "learning_rate", "grad_norm", "seconds", "images_per_second", "tokens_per_second",
    "loading_share", "padding_share", "tflops", "mfu", "hfu",
)  # fmt: skip


def say(text: str) -> None:
    """A line for the log, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class MetricsFile(TrainerCallback):
    """Writes metrics.jsonl line by line; after a resume the lines beyond the checkpoint are dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = []
        if self.path.is_file() and state.global_step:
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= state.global_step:
                        kept.append(line)
                except (ValueError, KeyError):
                    continue  # the line a killed process was writing
        self._file = self.path.open("w", encoding="utf-8")
        self._file.writelines(line + "\n" for line in kept)
        self._file.flush()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._file is None or not logs:
            return
        if "loss" in logs:
            line = {name: logs.get(name, state.global_step if name == "step" else None) for name in FIELDS}
        elif "eval_loss" in logs:
            line = {"step": state.global_step, "epoch": logs.get("epoch"), "eval_loss": logs["eval_loss"]}
            line["eval_seconds"] = logs.get("eval_seconds")
        else:
            return
        # JSON has no NaN: a loss that is none is written as null.
        line = {name: None if isinstance(v, float) and v - v != 0 else v for name, v in line.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Progress(TrainerCallback):
    """A tqdm bar on a terminal, else about ten lines a run."""

    def __init__(self, bar: bool, memory: Any) -> None:
        self.wants_bar = bar and sys.stderr.isatty()
        self.memory = memory
        self.bar: Any = None
        self._first_step = 0
        self._next_line = 0
        self._start = 0.0
        self._last = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start, self._first_step = time.perf_counter(), state.global_step
        self._next_line = state.global_step + 1
        if self.wants_bar and state.is_world_process_zero:
            from tqdm import tqdm

            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            (self.bar.write if self.bar is not None else say)(
                f"step {state.global_step}: validation loss {logs['eval_loss']:.4f}"
            )
        if "loss" not in logs:
            return
        done = state.global_step - self._first_step
        left = (time.perf_counter() - self._start) / max(done, 1) * (state.max_steps - state.global_step)
        mfu = f"MFU {100 * logs['mfu']:.1f} %  " if "mfu" in logs else ""
        values = (
            f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  {logs['images_per_second']:.2f} img/s  "
            f"{logs['tokens_per_second']:.0f} tok/s  {mfu}{self.memory() / 2**30:.1f} GiB"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(values, refresh=False)
            self.bar.update(state.global_step - self.bar.n)
        elif state.global_step >= self._next_line or state.global_step == state.max_steps:
            say(f"step {state.global_step}/{state.max_steps}  epoch {state.epoch:.2f}  {values}  ETA {duration(left)}")
            tenth = max(1, state.max_steps // 10)
            self._next_line = (state.global_step // tenth + 1) * tenth

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
