"""A torch profiler trace of a few optimizer steps, and the operators that took longest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

STEPS = 3
"""Optimizer steps under the profiler."""
TRACE, TABLE = "trace.json.gz", "operators.txt"
OPERATORS = 20


class Profile(TrainerCallback):
    """Profiles the steps after `after_step` on the first process, into FOLDER/trace.json.gz and FOLDER/operators.txt.

    The trace opens in https://ui.perfetto.dev or chrome://tracing. Profiling slows the steps down, so nothing is timed
    meanwhile.
    """

    def __init__(self, folder: Path, device: torch.device, after_step: int) -> None:
        self.folder, self.device, self.after_step = folder, device, after_step
        self._profiler: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if state.global_step == self.after_step:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=kinds)
            self._profiler.start()
        elif self._profiler is not None and state.global_step == self.after_step + STEPS:
            self._profiler.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self.folder / TRACE))
            by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
            table = self._profiler.key_averages().table(sort_by=by, row_limit=OPERATORS, max_name_column_width=60)
            (self.folder / TABLE).write_text(f"{STEPS} optimizer steps\n{table}\n", encoding="utf-8")
            self._profiler = None
