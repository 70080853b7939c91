"""--batch_size_per_gpu auto and --gradient_checkpointing auto: finds the fastest step that fits in memory.

The planner's estimates give the start. Then the longest examples of the training split make real forward and backward
passes, whose peaks decide how far to go. The planner's counts add the memory of later parts: the optimizer states, and
the buffers of ZeRO and DDP.

On a CUDA device, the measure is the reserved memory, and a probe that runs out of memory is followed by a smaller one.
On a CPU, it is the resident set. Running out of memory there would end the process, so the smallest probe comes first,
and others run only if they are expected to fit.
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
from statistics import median
from typing import Any, Literal

import torch

from phi3v.data.dataset import Example, collate
from phi3v.model import Phi3VConfig
from phi3v.model.runtime import TORCH_DTYPE, device_name, uses_zero
from phi3v.planning.fits import Choice, choices, fastest_first, micro_batches
from phi3v.planning.flops import Setup
from phi3v.planning.geometry import geometry_from_config
from phi3v.planning.hardware import hardware_entry
from phi3v.planning.memory import GB, memory, probe_bytes
from phi3v.provenance.manifest import write_json
from phi3v.settings import FinetuneSettings, Hardware, SettingsError
from phi3v.training import checkpoints
from phi3v.training.batches import ModelBatch, PickedExamples, work_of
from phi3v.training.launch import is_first, of_all, of_first, say, world_size
from phi3v.training.memory import capacity_bytes, explain_memory, give_back, held_bytes, peak

FILE = "micro_batch.json"
PROBES = 8
"""Largest number of probes in the search for faster choices."""


def fastest_that_fits(
    ways: Sequence[Choice],
    estimate: Callable[[Choice], float],
    probe: Callable[[Choice], float],
    resting: float,
    capacity: float,
    fatal: bool,
) -> tuple[Choice | None, dict[Choice, float]]:
    """(the first of `ways`, fastest first, that was measured to stay within `capacity`; bytes of all measured ones).

    None if nothing fits. estimate: predicted bytes. probe: measured bytes of a real step, infinite if it ran out of
    memory. resting: bytes of every way. fatal: running out of memory ends the process, so the smallest way comes first,
    and only ways that are expected to fit are measured; a faster one may then be missed. Ways with an estimate not
    below that of a failed one are not measured.
    """
    peaks: dict[Choice, float] = {}

    def expected(way: Choice) -> float:
        """Extrapolates linearly from the two largest measurements. `resting` replaces a missing one."""
        measured = sorted((estimate(tried), size) for tried, size in peaks.items() if math.isfinite(size))
        if not measured:
            return estimate(way)
        (low, smaller), (high, larger) = [(resting, min(resting, measured[0][1])), *measured][-2:]
        slope = max(0.0, (larger - smaller) / max(high - low, 1e-6))
        if len(measured) == 1:  # one small pass is no evidence that large ones need far less than planned
            slope = max(slope, 0.5)
        return larger + slope * (estimate(way) - high)

    while True:
        best = next((way for way in ways if peaks.get(way, math.inf) <= capacity), None)
        failed = min((estimate(way) for way, size in peaks.items() if size > capacity), default=math.inf)
        faster = ways if best is None else ways[: ways.index(best)]
        possible = [way for way in faster if way not in peaks and estimate(way) < failed]
        hopeful = [way for way in possible if expected(way) <= capacity]
        measured = sum(map(math.isfinite, peaks.values()))
        if best is not None and len(peaks) >= PROBES:
            return best, peaks
        if hopeful and (measured or not (peaks or fatal)):
            way = hopeful[0]
        elif possible and not (peaks and fatal) and (best is None or measured < 2):
            way = min(possible, key=estimate)
        else:
            return best, peaks
        peaks[way] = probe(way)


@dataclass(frozen=True)
class Trial:
    """Evaluates ways to run the job for the search: the planner's estimate, and a real pass."""

    settings: FinetuneSettings
    model: Any
    examples: Sequence[Example]
    """The longest examples, as many as the largest micro-batch contains."""
    pad_token_id: int
    setup: Setup
    resting: float
    """Bytes in use for every way: measured for this process, or the planner's count if it is larger."""
    device: torch.device

    def estimate(self, way: Choice) -> float:
        """Predicted bytes at the peak of training."""
        planned = memory(self.applied(way))
        return self.resting + planned.reserved_gb * GB - sum(planned.resting.values())

    def size(self, way: Choice) -> int:
        """Examples per micro-batch: fewer than requested if --max_tokens_per_micro_batch splits it."""
        bound = self.settings.max_tokens_per_micro_batch
        fit = way.micro_batch if bound is None else bound // len(self.examples[0]["input_ids"])
        return max(1, min(way.micro_batch, fit))

    def applied(self, way: Choice) -> Setup:
        """The planner's setup of the job for a way."""
        return replace(way.applied(self.setup), micro_batch=self.size(way))

    def later(self, way: Choice) -> float:
        """Bytes that training adds to a probe's peak: states, shards and buckets, minus gradients that ZeRO frees."""
        setup = self.applied(way)
        return memory(setup).allocated_gb * GB - probe_bytes(setup)

    def measure(self, way: Choice) -> float:
        """Measured bytes at the peak of training, of the process that needs most. A collective call."""
        recompute_layers(self.model, way.recompute_every)
        batch = ModelBatch.of(self.model.config, collate(self.examples[: self.size(way)], self.pad_token_id))
        return of_all(_probe(self.settings, self.model, batch, self.device) + self.later(way), "MAX", self.device)


def choose(
    settings: FinetuneSettings, output: Path, model: Any, data: PickedExamples, pad_token_id: int, device: torch.device
) -> FinetuneSettings:
    """The settings with numbers in place of `auto`. A collective call.

    Writes the measurements to OUTPUT/micro_batch.json. A job that resumes from a checkpoint keeps its first choice.
    Sets the recomputed layers of the model. Raises OutOfMemoryError if nothing fits.
    """
    way = of_first(lambda: _written(settings, output, device))
    if way is not None:
        say(f"{way}: kept from the start of this job ({output / FILE})")
    else:
        way = _searched(settings, output, model, data, pad_token_id, device)
    recompute_layers(model, way.recompute_every)
    return settings.model_copy(update=way.settings())


def _searched(
    settings: FinetuneSettings, output: Path, model: Any, data: PickedExamples, pad_token_id: int, device: torch.device
) -> Choice:
    order = sorted(range(len(data.lengths)), key=lambda index: (-data.lengths[index], index))
    longest = data.lengths[order[0]]
    largest = max(_sizes(settings))
    examples = [data.example(index) for index in order[:largest]]
    examples = [examples[at % len(examples)] for at in range(largest)]
    setup = _setup(settings, model.config, examples[0], device)
    # The same in all processes, like every number that decides which collective call comes next.
    capacity = of_all(capacity_bytes(device, settings.memory_limit_gb), "MIN", device)
    resting = of_all(max(held_bytes(device), sum(memory(setup).resting.values())), "MAX", device)
    trial = Trial(settings, model, examples, pad_token_id, setup, resting, device)
    ways, fatal = of_first(lambda: ways_of(settings, setup, device)), device.type != "cuda"
    way, peaks = fastest_that_fits(ways, trial.estimate, trial.measure, resting, capacity, fatal)
    tried = "; ".join(
        f"{tried}: {f'{size / GB:.2f} GB' if math.isfinite(size) else 'out of memory'}" for tried, size in peaks.items()
    )
    numbers = f"longest examples: {longest} tokens; {tried}; available: {capacity / GB:.2f} GB"
    if way is None:
        one = settings.micro_batch_size == "auto"
        what = "micro-batch 1" if one else f"recomputation with micro-batch {settings.micro_batch_size}"
        with explain_memory(settings, device):
            raise MemoryError(f"not even {what} fits: {numbers}" if one else f"no {what} fits: {numbers}")
    say(f"{way}: {numbers}")
    if is_first():
        found = {
            **_values(way),
            "processes": world_size(),
            "device": device_name(device),
            "settings": checkpoints.decisive(settings),
            "capacity_bytes": capacity,
            "later_bytes": trial.later(way),
            "longest_tokens": longest,
            "probes": [
                {**_values(tried), "peak_bytes": size if math.isfinite(size) else None} for tried, size in peaks.items()
            ],
        }
        write_json(output / FILE, found)
    return way


def warn_of_memory(settings: FinetuneSettings, config: Phi3VConfig, data: PickedExamples, device: torch.device) -> None:
    """Prints a warning if the planner expects the longest example to exceed the free memory.

    On a CPU, the system would kill the process without any message.
    """
    tokens, index = max((tokens, -index) for index, tokens in enumerate(data.lengths))
    setup = _setup(settings, config, data.example(-index), device)
    fit = (settings.max_tokens_per_micro_batch or math.inf) // tokens
    size = int(max(1, min(settings.micro_batch_size_or_one, fit)))
    need, capacity = memory(replace(setup, micro_batch=size)).allocated_gb * GB, capacity_bytes(device, None)
    if of_all(need - capacity, "MAX", device) > 0:
        say(
            f"warning: {data.where(-index)} has {tokens:,} tokens (median: {int(median(data.lengths)):,}): predicted "
            "peak "
            f"{need / GB:.1f} GB, but only {capacity / GB:.1f} GB are free. To skip it, set --max_length {tokens - 1}; "
            "for "
            "smaller micro-batches, set --batch_size_per_gpu or --max_tokens_per_micro_batch"
        )


def _values(way: Choice) -> dict[str, int]:
    return {"micro_batch_size": way.micro_batch, "recompute_every": way.recompute_every}


def _sizes(settings: FinetuneSettings) -> list[int]:
    if settings.micro_batch_size == "auto":
        return micro_batches(settings.batch_size, world_size())
    return [settings.micro_batch_size]


def ways_of(settings: FinetuneSettings, setup: Setup, device: torch.device) -> list[Choice]:
    """The choices for `auto`, fastest first by the planner's step time.

    For a device without figures in the hardware file: fewest recomputed layers first, then the largest micro-batch.
    """
    ways = choices(setup, _sizes(settings), settings.recompute)
    ways.sort(key=lambda way: (way.recompute, -way.micro_batch))
    entry = hardware_entry(device_name(device))
    if entry is not None:
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        on_device = replace(setup, hardware=entry[1], nodes=nodes, per_node=setup.devices // nodes)
        with contextlib.suppress(SettingsError):  # a figure is missing
            ways = fastest_first(on_device, ways)
    return ways


def _written(settings: FinetuneSettings, output: Path, device: torch.device) -> Choice | None:
    """The choice in OUTPUT/micro_batch.json, if it has this machine and these settings, and there is a checkpoint."""
    if not checkpoints.checkpoint_folders(output / "checkpoints"):
        return None
    try:
        values = json.loads((output / FILE).read_text(encoding="utf-8"))
        here = (world_size(), device_name(device), checkpoints.decisive(settings))
        same = (values["processes"], values["device"], values["settings"]) == here
        return Choice(int(values["micro_batch_size"]), int(values["recompute_every"])) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _setup(settings: FinetuneSettings, config: Phi3VConfig, longest: Example, device: torch.device) -> Setup:
    """The planner's setup of the job, with its longest example."""
    geometry = geometry_from_config(config.to_dict())
    work = work_of(geometry, longest)
    # The formulas only need the kind of device, because memory is measured here.
    kind: Literal["cuda", "cpu"] = "cuda" if device.type == "cuda" else "cpu"
    nowhere = Hardware(title="", kind=kind, bf16=True, flash_attention=True, quantisation=True, source="")
    return Setup(
        geometry,
        nowhere,
        settings.method,
        settings.dtype,
        settings.flash_attention,
        work,
        work,
        settings.batch_size,
        1,
        world_size(),
        rank=settings.lora_rank if settings.use_lora else 0,
        recompute=1.0 if settings.recompute is None else settings.recompute,
        optimizer=settings.optimizer,
        zero_stage=settings.zero_stage,
        frozen=settings.frozen_groups,
        lora_targets=tuple(settings.lora_targets),
    )


def _probe(settings: FinetuneSettings, model: Any, batch: ModelBatch, device: torch.device) -> float:
    """Bytes at the peak of a forward and backward pass, or infinity if it runs out of memory. Discards the
    gradients."""
    devices = [device.index or 0] if device.type == "cuda" else []
    result = math.inf
    model.to(device).train()
    with torch.random.fork_rng(devices=devices):
        try:
            with peak(device) as peaks:
                _forward_and_backward(settings, model, batch, device)
            result = peaks[0]
        except torch.OutOfMemoryError:
            pass  # the references of the pass must be gone before the cleanup below
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
    """Recomputes every `interval`-th layer of the vision tower and the decoder. 0: none.

    Layers are counted across both towers (transformers, activation_checkpointing_enable). Non-reentrant recomputation
    changes neither loss nor gradients.
    """
    if interval:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=interval)
    elif model.is_activation_checkpointing:
        model.activation_checkpointing_disable()
