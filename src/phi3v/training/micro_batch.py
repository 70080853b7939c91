"""--batch_size_per_gpu auto: the largest micro-batch that fits, found before training.

The planner's estimate says where to begin; then the longest examples of the training split make a real forward and
backward pass that is thrown away, and what it took says how far one can go. What comes later is added from the
planner's counts: the optimizer's states, and ZeRO's and DDP's buffers.

On a CUDA device what counts is the memory reserved of what is free, and a probe that runs out goes down a size. On a
CPU it is the resident set, and running out would end the process: the first probe is one example, and the next sizes
are only tried where a straight line through what was measured stays within the limit.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from phi3v.manifest import write_json
from phi3v.planning.flops import example_work
from phi3v.planning.geometry import geometry_from_config
from phi3v.planning.memory import memory, probe_bytes
from phi3v.planning.setup import Setup
from phi3v.settings import FinetuneSettings, Hardware
from phi3v.training import checkpoints
from phi3v.training.memory import (
    GB,
    capacity_bytes,
    explain_memory,
    give_back,
    held_bytes,
    peak,
    processes_on_this_machine,
)
from phi3v.training.observe import device_name
from phi3v.training.precision import TORCH_DTYPE, uses_zero, weight_dtype
from phi3v.training.watching import say

FILE = "micro_batch.json"


@dataclass(frozen=True)
class Found:
    """A choice and what it rests on."""

    size: int | None
    """None: not even the smallest fits."""
    peaks: dict[int, float]
    """Bytes by size that was tried; infinite where the device ran out."""


def largest_that_fits(
    sizes: Sequence[int],
    estimate: Callable[[int], float],
    probe: Callable[[int], float],
    resting: float,
    capacity: float,
    fatal: bool,
) -> Found:
    """The largest of `sizes` (ascending) whose probe stays within `capacity`, with few probes.

    estimate: bytes by size before anything was measured. probe: bytes of a real step, infinite when it ran out.
    resting: bytes that are known not to grow with the size. fatal: running out ends the process, so the first probe is
    the smallest size, and no size is tried that is not expected to fit; the answer may then be too small.
    """
    peaks: dict[int, float] = {}

    def expected(size: int) -> float:
        """Straight through the last two measurements; through one of them and `resting`, which overstates the slope."""
        measured = sorted((tried, peaks[tried]) for tried in peaks if math.isfinite(peaks[tried]))
        if not measured:
            return estimate(size)
        low = measured[-2] if len(measured) > 1 else (0, min(resting, measured[-1][1]))
        high = measured[-1]
        slope = max(0.0, (high[1] - low[1]) / (high[0] - low[0]))
        return high[1] + slope * (size - high[0])

    while True:
        best = max((size for size in peaks if peaks[size] <= capacity), default=0)
        ceiling = min((size for size in peaks if peaks[size] > capacity), default=math.inf)
        between = [size for size in sizes if best < size < ceiling]
        hopeful = [size for size in between if expected(size) <= capacity]
        finite = sum(map(math.isfinite, peaks.values()))
        if fatal and not peaks:
            size = sizes[0]
        elif not between:
            return Found(best or None, peaks)
        elif peaks and not finite:
            size = between[len(between) // 2]  # the estimate was too low, and nothing else is known
        elif hopeful:
            size = max(hopeful)
        elif not best:
            size = min(between)
        elif finite > 1:
            return Found(best, peaks)
        elif best > sizes[0]:
            size = sizes[0]  # cheap, and with two measurements the slope is right
        elif fatal:
            return Found(best, peaks)
        else:
            size = min(between)
        peaks[size] = probe(size)


def candidates(batch_size: int, processes: int) -> list[int]:
    """Micro-batches that divide a process's share of the batch, ascending."""
    share = batch_size // processes
    return [size for size in range(1, share + 1) if share % size == 0]


def choose(
    settings: FinetuneSettings,
    output: Path,
    model: Any,
    example: Callable[[int], dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    lengths: Sequence[int],
    processes: int,
    device: torch.device,
) -> int:
    """The micro-batch of `auto`, written to OUTPUT/micro_batch.json with what was measured; a collective call.

    A job that goes on from a checkpoint keeps the choice it began with. example: by its number in `lengths`, which are
    its tokens. Raises OutOfMemoryError where not even one example fits.
    """
    kept = _kept(settings, output, processes, device)
    if kept is not None:
        say(f"micro-batch {kept}: as this job began with ({output / FILE})")
        return kept
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    sizes = candidates(settings.batch_size, processes)
    examples = [example(index) for index in order[: sizes[-1]]]
    examples = [examples[at % len(examples)] for at in range(sizes[-1])]
    setup = _setup(settings, model, examples[0], processes)
    held = held_bytes(device)
    capacity = _agreed(capacity_bytes(device, settings.memory_limit_gb, processes_on_this_machine()), "MIN", device)

    def estimate(size: int) -> float:
        return memory(replace(setup, micro_batch=size)).reserved_gb * GB

    def later(size: int) -> float:
        """What training's peak adds to a probe's: states, shards and buckets, less the gradients that ZeRO frees."""
        sized = replace(setup, micro_batch=size)
        return memory(sized).allocated_gb * GB - probe_bytes(sized)

    def probe(size: int) -> float:
        return _agreed(_probe(settings, model, collate(examples[:size]), device) + later(size), "MAX", device)

    resting = max(held, sum(memory(setup).resting.values()))
    found = largest_that_fits(sizes, estimate, probe, resting, capacity, fatal=device.type != "cuda")
    tried = ", ".join(f"{size}: {_gb(found.peaks[size])}" for size in sorted(found.peaks))
    numbers = f"longest examples of {lengths[order[0]]} tokens, {tried}; {_gb(capacity)} to be had"
    if found.size is None:
        with explain_memory(settings, device):
            raise MemoryError(f"not even one example at a time fits: {numbers}")
    say(f"micro-batch {found.size}: {numbers}")
    if dist.is_initialized():
        dist.barrier()  # everybody has looked for the file
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_json(
            output / FILE,
            {
                "batch_size_per_gpu": found.size, "processes": processes, "device": device_name(device),
                "settings": checkpoints.decisive(settings), "capacity_bytes": capacity, "later_bytes": later(found.size), "longest_tokens": lengths[order[0]],
                "peak_bytes": {
                    str(size): value if math.isfinite(value) else None for size, value in sorted(found.peaks.items())
                },
            },
        )  # fmt: skip
    return int(found.size)


def _gb(value: float) -> str:
    return f"{value / GB:.2f} GB" if math.isfinite(value) else "out of memory"


def _kept(settings: FinetuneSettings, output: Path, processes: int, device: torch.device) -> int | None:
    """The size that the checkpoints of `output` were written with, where they are this machine's and of these settings."""
    if not checkpoints.checkpoint_folders(output / "checkpoints"):
        return None
    try:
        values = json.loads((output / FILE).read_text(encoding="utf-8"))
        here = (processes, device_name(device), checkpoints.decisive(settings))
        same = (values["processes"], values["device"], values["settings"]) == here
        return int(values["batch_size_per_gpu"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _agreed(value: float, how: str, device: torch.device) -> float:
    """The smallest or largest of all processes' values."""
    if not dist.is_initialized():
        return value
    values = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(values, op=getattr(dist.ReduceOp, how))
    return float(values.item())


def _setup(settings: FinetuneSettings, model: Any, longest: dict[str, Any], processes: int) -> Setup:
    """The job as the planner sees it, with its longest example."""
    geometry = geometry_from_config(model.config.to_dict())
    labels = int((longest["labels"] != -100).sum())
    work = example_work(geometry, len(longest["input_ids"]), len(longest["pixel_values"]), labels)
    # The formulas ask the hardware for its memory alone, which here is measured.
    nowhere = Hardware(title="", kind="cuda", bf16=True, flash_attention=True, quantisation=True, source="")
    return Setup(
        geometry, nowhere, settings.method, "fp32" if weight_dtype(settings) == torch.float32 else settings.dtype,
        settings.use_flash_attention, work, work, settings.batch_size, 1, processes,
        rank=settings.lora_rank if settings.use_lora else 0, recompute=float(settings.gradient_checkpointing),
    )  # fmt: skip


def _probe(settings: FinetuneSettings, model: Any, batch: dict[str, Any], device: torch.device) -> float:
    """Bytes at the peak of a forward and backward pass whose gradients are thrown away; infinite when it ran out."""
    dtype = TORCH_DTYPE[settings.dtype]
    zero = uses_zero(settings)
    devices = [device.index or 0] if device.type == "cuda" else []
    result = math.inf
    model.to(device).train()
    with torch.random.fork_rng(devices=devices):
        try:
            with peak(device) as peaks:
                inputs = {name: value.to(device) for name, value in batch.items()}
                if zero and "pixel_values" in inputs:
                    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
                with torch.autocast(device.type, dtype, enabled=not zero and dtype != torch.float32):
                    loss = model(**inputs)["loss"]
                loss.backward()
            result = peaks[0]
        except torch.OutOfMemoryError:
            pass  # nothing of the pass may stay alive below
    inputs, loss = {}, None
    for parameter in model.parameters():
        parameter.grad = None
    gc.collect()
    give_back(device)
    return result
