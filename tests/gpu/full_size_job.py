"""Train the full-size model with random weights on this machine's GPU, and print what a micro-step took as JSON.

python tests/gpu/full_size_job.py '{"method": "lora", "attention": "flash"}'
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "src")]
STEPS = 5
WARM = 2
"""Optimizer steps before memory and time are measured."""


def run(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Build and train by the package's own entry points; one process, one GPU."""
    from fakegpu import fullsize
    from fakegpu.measure import FullSizeJob, settings_of

    from phi3v.training.job import build

    fullsize.write_folders(folder)
    job = FullSizeJob(**values)
    settings = settings_of(job, folder).model_copy(update={"max_steps": STEPS})
    with fullsize.without_weights():
        loop = build(settings, folder / "out", trackers=False)
    waits: list[str] = []
    seconds: list[float] = []
    original = loop.micro_step

    def micro_step(*args: Any, **more: Any) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            result = original(*args, **more)
            torch.cuda.set_sync_debug_mode("default")
        waits[:] = [str(w.filename) + f":{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message)]
        return result

    losses: list[float] = []

    def at_step_end(record: Any) -> None:
        torch.cuda.synchronize()
        seconds.append(time.perf_counter())
        losses.append(record.loss)
        if record.step == WARM:
            torch.cuda.reset_peak_memory_stats()

    loop.micro_step = micro_step
    loop.hooks.append(at_step_end)
    loop.run()
    return {
        "job": job.name,
        "device": torch.cuda.get_device_name(),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        "step_seconds": (seconds[-1] - seconds[WARM - 1]) / (STEPS - WARM),
        "waits": waits,
        "loss": losses[-1],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(run(json.loads(sys.argv[1]), Path(name))))
