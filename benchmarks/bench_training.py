"""How much the training loop costs: step time over bare forward, backward and update, and time lost to a checkpoint.

    python benchmarks/bench_training.py --model_name_or_path MODEL --data_dir DATA --output_dir bench --fp32 \\
        --zero_stage 0 --batch_size 8 --batch_size_per_gpu 8 --repeats 5

Both sides run the same model, batches, loss and optimizer in one process, one after the other, and the medians of the
windows are compared. Then nine checkpoints are written, each with training at rest. Prints JSON.
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

from phi3v.model.runtime import TORCH_DTYPE
from phi3v.settings import SettingsError, SpeedSettings, parse
from phi3v.training.job import build
from phi3v.training.loop import Loop

SAVES = 9


def loop_overhead(settings: SpeedSettings) -> dict[str, Any]:
    """{"loop_seconds", "bare_seconds", "ratio", …}: medians a step in processor time; one process, without ZeRO.

    On a CPU processor time is what other programs cannot disturb; on a GPU it is wall time, the kernels run elsewhere.

    bare: forward, backward, clipping and AdamW on micro-batches that are in memory already. Raises SettingsError where
    DeepSpeed would run, which has no bare counterpart.
    """
    windows, steps = settings.repeats, settings.timed_steps
    total = settings.speed_warmup_steps + windows * steps
    loop = build(settings.model_copy(update={"max_steps": total}), Path(settings.output_dir), trackers=False)
    if loop.is_sharded or loop.processes > 1:
        raise SettingsError("command line: field `zero_stage`: expected 0 and one process, to compare with a bare loop")
    times: list[float] = []
    clock = time.perf_counter if loop.device.type == "cuda" else time.process_time
    loop.hooks.append(lambda record: times.append(clock()))
    loop.run()
    looped = [
        (times[start + steps] - times[start]) / steps
        for start in range(settings.speed_warmup_steps - 1, total - steps, steps)
    ]
    saves = save_cost(loop)
    bare = _bare_windows(settings, loop, windows, steps, clock)
    loop_seconds, bare_seconds = statistics.median(looped), statistics.median(bare)
    return {
        "loop_seconds": loop_seconds,
        "bare_seconds": bare_seconds,
        "ratio": loop_seconds / bare_seconds,
        "loop_windows": looped,
        "bare_windows": bare,
        "threads": torch.get_num_threads(),
        **saves,
    }


def save_cost(loop: Loop) -> dict[str, float]:
    """{"save_seconds", "save_blocked_seconds", "save_share"}: medians of a whole save, and of what blocks training."""
    blocked, whole = [], []
    for _ in range(SAVES):
        loop.state.step += 1
        start = time.perf_counter()
        loop.save()
        blocked.append(time.perf_counter() - start)
        loop.writer.finish()
        whole.append(time.perf_counter() - start)
    share = statistics.median(part / all_of_it for part, all_of_it in zip(blocked, whole, strict=True))
    seconds = {"save_seconds": statistics.median(whole), "save_blocked_seconds": statistics.median(blocked)}
    return seconds | {"save_share": share}


def _bare_windows(
    settings: SpeedSettings, loop: Loop, windows: int, steps: int, clock: Callable[[], float]
) -> list[float]:
    """Seconds a step of the bare loop, for each window, on the first whole steps of the plan."""
    plan, loader = loop.training.plan, loop.training.loader(0)
    loop.training.set_epoch(loader, 0)
    whole = min(steps, max(1, plan.examples // plan.batch_size))
    found = iter(loader)
    batches = [[next(found) for _ in range(plan.accumulation)] for _ in range(whole)]
    # Without accelerate's autocast: it is part of the bare loop below.
    model = loop.accelerator.unwrap_model(loop.model, keep_fp32_wrapper=False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.95), eps=1e-7)
    dtype = TORCH_DTYPE[settings.dtype]
    seconds = []
    for _ in range(windows + 1):
        start = clock()
        for step in range(steps):
            for batch in batches[step % whole]:
                inputs = batch.inputs.on(loop.device)
                with torch.autocast(loop.device.type, dtype, enabled=dtype != torch.float32):
                    loss = model(**inputs)["loss"] / batch.examples_in_step
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
