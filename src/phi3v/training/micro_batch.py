"""--batch_size_per_gpu auto and --gradient_checkpointing auto: how a step runs fastest within the memory.

The planner's estimates say where to begin; then the longest examples of the training split make a real forward and
backward pass that is thrown away, and what it took says how far one can go. What comes later is added from the
planner's counts: the optimizer's states, and ZeRO's and DDP's buffers.

On a CUDA device what counts is the memory reserved of what is free, and a probe that runs out goes down a size. On a
CPU it is the resident set, and running out would end the process: the first probe is the smallest, and others are only
tried if they are expected to stay within the limit.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from phi3v.data.dataset import Example
from phi3v.model.runtime import TORCH_DTYPE, device_name, uses_zero, weight_dtype
from phi3v.planning.fits import Choice, choices, fastest_first, micro_batches
from phi3v.planning.flops import Setup, example_work
from phi3v.planning.geometry import geometry_from_config
from phi3v.planning.hardware import hardware_entry
from phi3v.planning.memory import memory, probe_bytes
from phi3v.provenance.manifest import write_json
from phi3v.settings import FinetuneSettings, Hardware, SettingsError
from phi3v.training import checkpoints
from phi3v.training.batches import ModelBatch, tiles_of
from phi3v.training.logging import say
from phi3v.training.memory import (
    GB,
    capacity_bytes,
    explain_memory,
    give_back,
    held_bytes,
    peak,
)

FILE = "micro_batch.json"
PROBES = 8
"""Real passes at most while faster ways are looked for."""


@dataclass(frozen=True)
class Found:
    """A choice and what it rests on."""

    size: int | None
    """None: not even the smallest fits."""
    peaks: dict[int, float]
    """Bytes by size that was tried; infinite where the device ran out."""


def fastest_that_fits(
    ways: Sequence[Choice],
    estimate: Callable[[Choice], float],
    probe: Callable[[Choice], float],
    resting: float,
    capacity: float,
    fatal: bool,
) -> tuple[Choice | None, dict[Choice, float]]:
    """(the first of `ways`, fastest first, that was found to stay within `capacity`, bytes of all that were tried).

    None: nothing fits. estimate, probe, resting, fatal: as in `largest_that_fits`. Every measurement corrects the
    estimates of what is not resting; what takes no less than a way that failed is not tried.
    """
    peaks: dict[Choice, float] = {}
    correction = 1.0
    while True:
        best = next((way for way in ways if peaks.get(way, math.inf) <= capacity), None)
        failed = min((estimate(way) for way, size in peaks.items() if size > capacity), default=math.inf)
        faster = ways if best is None else ways[: ways.index(best)]
        possible = [way for way in faster if way not in peaks and estimate(way) < failed]
        hopeful = [way for way in possible if resting + correction * (estimate(way) - resting) <= capacity]
        if fatal and not peaks:
            way = min(ways, key=estimate)
        elif hopeful and len(peaks) < PROBES:
            way = hopeful[0]
        elif possible and best is None and not fatal:
            way = min(possible, key=estimate)
        else:
            return best, peaks
        peaks[way] = probe(way)
        passing = max(estimate(way) - resting, 1e-6)
        if math.isfinite(peaks[way]):
            # The first probe of a CPU is a small one; it does not show that a large one takes far less than planned.
            correction = max((peaks[way] - resting) / passing, 0.5 if fatal else 0.0)
        else:
            correction = max(correction, 1.1 * (capacity - resting) / passing)


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


@dataclass(frozen=True)
class Trial:
    """What the search asks of the job: the planner's estimate of a way, and a real pass."""

    settings: FinetuneSettings
    model: Any
    examples: Sequence[Example]
    """The longest, as many as the largest micro-batch takes."""
    collate: Callable[[list[Example]], ModelBatch]
    setup: Setup
    device: torch.device

    def estimate(self, way: Choice) -> float:
        """Bytes at the peak of training, before anything was measured."""
        return memory(way.applied(self.setup)).reserved_gb * GB

    def later(self, way: Choice) -> float:
        """What training's peak adds to a probe's: states, shards and buckets, less the gradients that ZeRO frees."""
        setup = way.applied(self.setup)
        return memory(setup).allocated_gb * GB - probe_bytes(setup)

    def measure(self, way: Choice) -> float:
        """Bytes at the peak of training from a real pass, of the process that takes most; a collective call."""
        recompute_layers(self.model, way.recompute_every)
        batch = self.collate(list(self.examples[: way.micro_batch]))
        return _agreed(_probe(self.settings, self.model, batch, self.device) + self.later(way), "MAX", self.device)

    def search(self, ways: Sequence[Choice], capacity: float) -> tuple[Choice | None, dict[Choice, float]]:
        """The fastest of `ways` that fits, and what was measured; of one recomputation the largest micro-batch."""
        # Agreed, like every number that decides which collective call comes next.
        resting = _agreed(max(held_bytes(self.device), sum(memory(self.setup).resting.values())), "MAX", self.device)
        fatal = self.device.type != "cuda"
        if self.settings.gradient_checkpointing == "auto":
            return fastest_that_fits(ways, self.estimate, self.measure, resting, capacity, fatal)
        of_size = {way.micro_batch: way for way in ways}
        found = largest_that_fits(
            sorted(of_size),
            lambda size: self.estimate(of_size[size]),
            lambda size: self.measure(of_size[size]),
            resting,
            capacity,
            fatal,
        )
        best = None if found.size is None else of_size[found.size]
        return best, {of_size[size]: value for size, value in found.peaks.items()}


def choose(
    settings: FinetuneSettings,
    output: Path,
    model: Any,
    example: Callable[[int], Example],
    collate: Callable[[list[Example]], ModelBatch],
    lengths: Sequence[int],
    processes: int,
    device: torch.device,
) -> Choice:
    """What `auto` stands for, written to OUTPUT/micro_batch.json with what was measured; a collective call.

    A job that resumes from a checkpoint keeps the choice it began with. The model is left with its layers recomputed as
    chosen. example: by its number in `lengths`, which are its tokens. Raises OutOfMemoryError if nothing fits.
    """
    way = _kept(settings, output, processes, device)
    if way is not None:
        say(f"{way}: as this job began with ({output / FILE})")
        recompute_layers(model, way.recompute_every)
        return way
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    largest = max(_sizes(settings, processes))
    examples = [example(index) for index in order[:largest]]
    examples = [examples[at % len(examples)] for at in range(largest)]
    setup = _setup(settings, model, examples[0], processes, device)
    trial = Trial(settings, model, examples, collate, setup, device)
    capacity = _agreed(capacity_bytes(device, settings.memory_limit_gb), "MIN", device)
    way, peaks = trial.search(ways_of(settings, setup, device), capacity)
    tried = "; ".join(f"{tried}: {_gb(value)}" for tried, value in peaks.items())
    numbers = f"longest examples of {lengths[order[0]]} tokens; {tried}; {_gb(capacity)} are available"
    if way is None:
        with explain_memory(settings, device):
            what = (
                "not even one example at a time"
                if settings.micro_batch_size == "auto"
                else f"no recomputation with micro-batch {settings.micro_batch_size}"
            )
            raise MemoryError(f"{what} fits: {numbers}")
    say(f"{way}: {numbers}")
    recompute_layers(model, way.recompute_every)
    if dist.is_initialized():
        dist.barrier()  # everybody has looked for the file
    if not dist.is_initialized() or dist.get_rank() == 0:
        probes = [
            {**_values(tried), "peak_bytes": value if math.isfinite(value) else None} for tried, value in peaks.items()
        ]
        write_json(
            output / FILE,
            {
                **_values(way),
                "processes": processes,
                "device": device_name(device),
                "settings": checkpoints.decisive(settings),
                "capacity_bytes": capacity,
                "later_bytes": trial.later(way),
                "longest_tokens": lengths[order[0]],
                "probes": probes,
            },
        )
    return way


def _values(way: Choice) -> dict[str, int]:
    return {"micro_batch_size": way.micro_batch, "recompute_every": way.recompute_every}


def _sizes(settings: FinetuneSettings, processes: int) -> list[int]:
    if settings.micro_batch_size == "auto":
        return micro_batches(settings.batch_size, processes)
    return [settings.micro_batch_size]


def ways_of(settings: FinetuneSettings, setup: Setup, device: torch.device) -> list[Choice]:
    """The ways that `auto` chooses from, fastest first by the planner's step time; a collective call.

    On a device without figures in the hardware file: fewest recomputed layers first, then largest micro-batch.
    """
    ways = choices(setup, _sizes(settings, setup.devices), settings.recompute)
    ways.sort(key=lambda way: (way.recompute, -way.micro_batch))
    entry = hardware_entry(device_name(device))
    if entry is not None:
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        placed = replace(setup, hardware=entry[1], nodes=nodes, per_node=setup.devices // nodes)
        with contextlib.suppress(SettingsError):  # a figure is missing
            ways = fastest_first(placed, ways)
    if dist.is_initialized():
        # Machines may have different devices; every process has to try the same.
        shared: list[Any] = [ways]
        dist.broadcast_object_list(shared)
        ways = shared[0]
    return ways


def _gb(value: float) -> str:
    return f"{value / GB:.2f} GB" if math.isfinite(value) else "out of memory"


def _kept(settings: FinetuneSettings, output: Path, processes: int, device: torch.device) -> Choice | None:
    """What the checkpoints of `output` were written with; the first process decides for all of them."""
    kept: list[Choice | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        kept[0] = _written(settings, output, processes, device)
    if dist.is_initialized():
        dist.broadcast_object_list(kept)
    return kept[0]


def _written(settings: FinetuneSettings, output: Path, processes: int, device: torch.device) -> Choice | None:
    """The choice in OUTPUT/micro_batch.json, if it is of this machine and of these settings and a checkpoint is there."""
    if not checkpoints.checkpoint_folders(output / "checkpoints"):
        return None
    try:
        values = json.loads((output / FILE).read_text(encoding="utf-8"))
        here = (processes, device_name(device), checkpoints.decisive(settings))
        same = (values["processes"], values["device"], values["settings"]) == here
        return Choice(int(values["micro_batch_size"]), int(values["recompute_every"])) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _agreed(value: float, how: str, device: torch.device) -> float:
    """The smallest or largest of all processes' values."""
    if not dist.is_initialized():
        return value
    values = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(values, op=getattr(dist.ReduceOp, how))
    return float(values.item())


def _setup(settings: FinetuneSettings, model: Any, longest: Example, processes: int, device: torch.device) -> Setup:
    """The job as the planner sees it, with its longest example."""
    geometry = geometry_from_config(model.config.to_dict())
    labels = int((longest["labels"] != -100).sum())
    work = example_work(geometry, len(longest["input_ids"]), tiles_of(longest), labels)
    # The formulas ask for the kind of device alone; its memory is measured here.
    kind: Literal["cuda", "cpu"] = "cuda" if device.type == "cuda" else "cpu"
    nowhere = Hardware(title="", kind=kind, bf16=True, flash_attention=True, quantisation=True, source="")
    return Setup(
        geometry,
        nowhere,
        settings.method,
        _planned_dtype(settings),
        settings.flash_attention,
        work,
        work,
        settings.batch_size,
        1,
        processes,
        rank=settings.lora_rank if settings.use_lora else 0,
        recompute=1.0 if settings.recompute is None else settings.recompute,
        optimizer=settings.optimizer,
    )


def _planned_dtype(settings: FinetuneSettings) -> str:
    """The planner counts 8-bit optimizers' casts; other float32 weights under autocast it takes for a float32 job."""
    casts = weight_dtype(settings) == torch.float32 and "8bit" not in settings.optimizer
    return "fp32" if casts else settings.dtype


def _probe(settings: FinetuneSettings, model: Any, batch: ModelBatch, device: torch.device) -> float:
    """Bytes at the peak of a forward and backward pass whose gradients are thrown away; infinite when it ran out."""
    devices = [device.index or 0] if device.type == "cuda" else []
    result = math.inf
    model.to(device).train()
    with torch.random.fork_rng(devices=devices):
        try:
            with peak(device) as peaks:
                _forward_and_backward(settings, model, batch, device)
            result = peaks[0]
        except torch.OutOfMemoryError:
            pass  # nothing of the pass may stay alive below
    for parameter in model.parameters():
        parameter.grad = None
    gc.collect()
    give_back(device)
    return result


def _forward_and_backward(settings: FinetuneSettings, model: Any, batch: ModelBatch, device: torch.device) -> None:
    dtype = TORCH_DTYPE[settings.dtype]
    with torch.autocast(device.type, dtype, enabled=not uses_zero(settings) and dtype != torch.float32):
        loss = model(**batch.on(device))["loss"]
    loss.backward()


def recompute_layers(model: Any, interval: int) -> None:
    """Recompute every `interval`-th layer of the vision tower and the decoder; 0: none.

    The towers' layers are counted one after the other (transformers, activation_checkpointing_enable). Recomputation is
    non-reentrant: it changes neither loss nor gradients.
    """
    if interval:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=interval)
    elif model.is_activation_checkpointing:
        model.activation_checkpointing_disable()
