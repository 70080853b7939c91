"""How much the training loop costs: step time of fine-tuning over bare forward, backward and update.

    python benchmarks/bench_training.py --model_name_or_path MODEL --data_dir DATA --output_dir bench --fp32 \\
        --zero_stage 0 --batch_size 8 --batch_size_per_gpu 8 --repeats 5

Both sides run the same model, batches, loss and optimizer in one process, one after the other, and the medians of the
windows are compared. Prints JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from phi3v.model.runtime import TORCH_DTYPE
from phi3v.settings import SettingsError, SpeedSettings, parse
from phi3v.training.batches import model_inputs
from phi3v.training.job import build
from phi3v.training.signals import StopRequest
from phi3v.training.steps import StepCallback


def loop_overhead(settings: SpeedSettings) -> dict[str, Any]:
    """{"loop_seconds", "bare_seconds", "ratio", …}: medians a step in processor time; one process, without ZeRO.

    On a CPU processor time is what other programs cannot disturb; on a GPU it is wall time, the kernels run elsewhere.

    bare: forward, backward, clipping and AdamW on micro-batches that are in memory already. Raises SettingsError where
    DeepSpeed would run, which has no bare counterpart.
    """
    windows, steps = settings.repeats, settings.timed_steps
    total = settings.speed_warmup_steps + windows * steps
    job = build(settings.model_copy(update={"max_steps": total}), Path(settings.output_dir), trackers=False)
    trainer = job.trainer
    if trainer.is_deepspeed_enabled or trainer.args.world_size > 1:
        raise SettingsError("command line: field `zero_stage`: expected 0 and one process, to compare with a bare loop")
    watch = StepCallback(trainer, Path(settings.output_dir), StopRequest())
    times: list[float] = []
    clock = time.perf_counter if job.device.type == "cuda" else time.process_time

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
            times.append(clock())

    trainer.add_callback(watch)
    trainer.add_callback(Clock())
    trainer.step_values = watch.values
    trainer.train()
    looped = [
        (times[start + steps] - times[start]) / steps
        for start in range(settings.speed_warmup_steps - 1, total - steps, steps)
    ]
    bare = _bare_windows(settings, trainer, windows, steps, clock)
    loop_seconds, bare_seconds = statistics.median(looped), statistics.median(bare)
    return {
        "loop_seconds": loop_seconds, "bare_seconds": bare_seconds, "ratio": loop_seconds / bare_seconds,
        "loop_windows": looped, "bare_windows": bare, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _bare_windows(
    settings: SpeedSettings, trainer: Any, windows: int, steps: int, clock: Callable[[], float]
) -> list[float]:
    """Seconds a step of the bare loop, for each window, on the first whole steps of the plan."""
    trainer.set_epoch(0)
    loader = iter(trainer.get_train_dataloader())
    whole = min(steps, max(1, trainer.plan.examples // trainer.plan.batch_size))
    batches = [[next(loader) for _ in range(trainer.plan.accumulation)] for _ in range(whole)]
    model = trainer.model
    if hasattr(model, "_original_forward"):  # accelerate's autocast wrapper: autocast is part of the bare loop below
        model.forward = model._original_forward
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.95), eps=1e-7)
    dtype = TORCH_DTYPE[settings.dtype]
    seconds = []
    for _ in range(windows + 1):
        start = clock()
        for step in range(steps):
            for batch in batches[step % whole]:
                inputs = model_inputs(batch, trainer.args.device)
                with torch.autocast(trainer.args.device.type, dtype, enabled=dtype != torch.float32):
                    loss = model(**inputs)["loss"] / batch["examples_in_step"]
                loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        seconds.append((clock() - start) / steps)
    return seconds[1:]


def main() -> int:
    """Parse, measure, print."""
    print(json.dumps(loop_overhead(parse(SpeedSettings, __doc__ or ""))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
