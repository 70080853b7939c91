"""Recommends a training method for given GPUs: the recipe's advice, checked against memory and time. Imports no torch.

The recipe: A100 and H100: full fine-tuning with flash attention and bf16. V100 32 GB: full fine-tuning with fp16 and
without flash attention, much slower. No data-centre GPU: LoRA on two GPUs. Turing and newer: QLoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phi3v.planning.fits import (
    Fit,
    can_run,
    fewer_crops,
    mean_and_longest,
    more_devices,
    other_optimizers,
    what_fits,
    with_method,
    workload,
)
from phi3v.planning.flops import Method, Setup
from phi3v.planning.hardware import find_hardware
from phi3v.planning.step_time import images_per_second
from phi3v.settings import Dataset, Geometry, Hardware, SettingsError, Workload

METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
# Defaults of the recipe's scripts.
EPOCHS, BATCH = 1, 64
# Throughput without flash attention divided by the throughput with it, on 8 A100 in the recipe's speed table: for full
# fine-tuning, and for LoRA and QLoRA.
EAGER_FULL, EAGER_ADAPTERS = 0.58, 0.46
# No machine of the makers in config/hardware.yaml has more devices.
DEVICES_OF_A_MACHINE = 16
# Architectures before Turing. PyTorch's builds for CUDA 13 have no kernels for them (pytorch/pytorch issue 172352).
WITHOUT_CUDA_13 = ("Maxwell", "Pascal", "Volta")


@dataclass(frozen=True)
class Option:
    """A training method on the requested devices."""

    fit: Fit
    images_per_second: float
    hours: float
    """Duration of one epoch over the dataset."""
    remark: str

    @property
    def method(self) -> Method:
        """full, lora or qlora."""
        return self.fit.setup.method

    @property
    def verdict(self) -> str:
        """yes, tight or no, by its memory. never: the hardware does not support the method."""
        return self.fit.verdict if can_run(self.fit.setup) else "never"

    @property
    def micro_batch(self) -> int | None:
        """The largest micro-batch that fits, or None."""
        return self.fit.largest_micro_batch if can_run(self.fit.setup) else None

    def values(self) -> dict[str, object]:
        """JSON values."""
        need = self.fit.memory
        return {
            "method": self.method,
            "fits": self.verdict,
            "allocated_gb": need.allocated_gb,
            "reserved_gb": need.reserved_gb,
            "context_gb": need.context_gb,
            "micro_batch": self.micro_batch,
            "images_per_second": self.images_per_second,
            "hours_per_epoch": self.hours,
            "remark": self.remark,
        }

    def line(self) -> str:
        """A line of the table of options."""
        need = self.fit.memory
        return (
            f"{self.method:8} {self.verdict:5} {need.allocated_gb:8.1f} {need.reserved_gb:8.1f} {need.device_gb:9.1f}"
            f" {self.micro_batch or '-':>5} {self.images_per_second:7.3g} {self.hours:8.2f}  {self.remark}"
        ).rstrip()


@dataclass(frozen=True)
class Advice:
    """The options in the recipe's order. `chosen` is the recommended one, or None if none fits."""

    device: str
    dataset: str
    options: list[Option]
    chosen: Option | None
    reasons: list[str]

    @property
    def requested(self) -> Setup:
        """Devices, dtype and batch size of all options."""
        return self.options[0].fit.setup

    def text(self) -> str:
        """The recommendation as text for the terminal."""
        requested, chosen = self.requested, self.chosen
        machines = f" ({requested.nodes} machines with {requested.per_node} each)" if requested.nodes > 1 else ""
        lines = [f"{requested.devices} x {requested.hardware.title}{machines}, {self.dataset}:"]
        if chosen is None:
            lines.append("recommended: none")
        else:
            flash, micro_batch = "yes" if requested.flash else "no", chosen.micro_batch or 1
            lines.append(
                f"recommended: {chosen.method}, {requested.dtype}, flash attention {flash}, micro-batch {micro_batch} "
                f"(batch {requested.batch_size})\n  {self.command()}"
            )
        if chosen and requested.nodes > 1:
            lines.append(
                f"  Run this command on each of the {requested.nodes} machines; HOST is the name of one of them. In a "
                "SLURM "
                f"job with all machines, run once: scripts/torchrun_nodes.sh {requested.nodes} {requested.per_node} "
                "scripts/finetune.py with the same flags"
            )
        lines += [f"- {reason}" for reason in self.reasons]
        lines.append(
            f"{'method':8} {'fits':5} {'alloc GB':>8} {'+ cached':>8} {'+ context':>9} {'micro':>5} {'img/s':>7}"
            f" {'h/epoch':>8}  remark"
        )
        return "\n".join([*lines, *(option.line() for option in self.options)])

    def command(self) -> str | None:
        """Training command of the recommended option, in the recipe's flags, or None."""
        if self.chosen is None:
            return None
        setup = self.chosen.fit.setup
        rendezvous = f"--nnodes={setup.nodes} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
        words = [
            f"torchrun {'--standalone' if setup.nodes == 1 else rendezvous} --nproc_per_node={setup.per_node}",
            f"scripts/finetune.py --dataset {self.dataset}",
            f"--{setup.dtype} --batch_size {setup.batch_size} --batch_size_per_gpu {self.chosen.micro_batch or 1}",
        ]
        if setup.flash:
            words.append("--use_flash_attention")
        if setup.adapters:
            words.append("--use_lora" + (" --use_qlora" if setup.method == "qlora" else ""))
        return " ".join([*words, "--model_name_or_path MODEL --output_dir FOLDER"])

    def values(self) -> dict[str, object]:
        """JSON values: the requested devices, the recommended method (None if none fits), the reasons, and all
        options."""
        requested = self.requested
        return {
            "device": self.device,
            "count": requested.per_node,
            "nodes": requested.nodes,
            "dataset": self.dataset,
            "dtype": requested.dtype,
            "flash_attention": requested.flash,
            "batch_size": requested.batch_size,
            "recommended": self.chosen and self.chosen.method,
            "command": self.command(),
            "reasons": self.reasons,
            "options": [option.values() for option in self.options],
        }


def advise(
    gpu: str,
    count: int,
    dataset: str,
    entries: dict[str, Hardware],
    geometry: Geometry,
    data: Dataset,
    nodes: int = 1,
    root: Path = Path(),
) -> Advice:
    """Recommends a method for `count` devices on each of `nodes` machines.

    gpu: device name as a user or a driver writes it. geometry: layer sizes of the model. data: entry of the dataset.
    Raises SettingsError for an unknown GPU, and if a machine cannot have `count` devices.
    """
    key = find_hardware(gpu, entries)
    hardware = entries[key]
    if count > DEVICES_OF_A_MACHINE and hardware.kind != "cpu":
        raise SettingsError(
            f"command line: field `count`: got {count}: expected the devices of one machine, at most "
            f"{DEVICES_OF_A_MACHINE}; for several machines, add --nodes, such as --count 8 --nodes {-(-count // 8)}"
        )
    load = workload(dataset, data, root)
    dtype = "bf16" if hardware.bf16 else "fp16"
    # The recipe's 64, or the next multiple of the number of devices.
    batch = -(-BATCH // (count * nodes)) * count * nodes
    works = mean_and_longest(load, geometry, data.num_crops)
    base = Setup(geometry, hardware, "full", dtype, hardware.flash_attention, *works, batch, nodes, count)
    options = [_option(with_method(base, method), load) for method in METHODS]
    if hardware.kind == "cpu":
        fastest = min(options, key=lambda item: item.hours)
        reason = (
            "the CPU is only meant for the demo (`make demo`: a tiny model in the same workflow). With this model, an "
            f"epoch takes {fastest.hours:.0f} hours with the fastest method, {fastest.method}"
        )
        return Advice(key, dataset, options, None, [reason])
    # The published V100 rows used full fine-tuning although it was tight. For adapters, prefer a method that fits
    # easily.
    ranked = [item for item in options if (item.verdict, item.method) == ("tight", "full")]
    ranked += [item for verdict in ("yes", "tight") for item in options if item.verdict == verdict]
    chosen = ranked[0] if ranked else None
    reasons = [*_device_reasons(base), *_choice_reasons(options[0], chosen), *_optimizer_reasons(options[0])]
    if chosen is None:
        reasons.append(_what_would_fit(options, load, data.num_crops))
    return Advice(key, dataset, options, chosen, reasons)


def _option(setup: Setup, load: Workload) -> Option:
    fit, remark = what_fits(setup), ""
    if not can_run(setup):
        remark = "4-bit weights require Turing or newer (field `quantisation` of the hardware entry)"
    elif fit.verdict == "no":
        remark = f"{fit.memory.least_gb - (setup.hardware.memory_gb or 0):.0f} GB more than the device has"
        if more := more_devices(setup):
            remark += f"; {more.setup.devices} devices would be enough"
    elif fit.verdict == "tight":
        remark = "works only if PyTorch frees cached memory; slower"
    rate = images_per_second(setup)
    return Option(fit, rate, EPOCHS * load.train / rate / 3600, remark)


def _what_would_fit(options: list[Option], load: Workload, num_crops: int) -> str:
    """For a device on which nothing fits: the method that needs the least memory, and the num_crops at which one
    fits."""
    possible = [item.fit for item in options if can_run(item.fit.setup)]
    smallest = min(possible, key=lambda fit: fit.memory.least_gb)
    text = (
        f"nothing fits: {smallest.setup.method} needs the least memory, {smallest.memory.least_gb:.0f} GB per device, "
        f"but this device has {smallest.setup.hardware.memory_gb or 0:.0f} GB; would fit: "
    )
    fewer = [found for fit in possible if (found := fewer_crops(fit.setup, load, num_crops))]
    if fewer:
        crops, fit = max(fewer, key=lambda found: found[0])
        text += f"{fit.setup.method} with --num_crops {crops} instead of {num_crops} ({fit.need}), "
    return text + "a larger device"


def _device_reasons(setup: Setup) -> list[str]:
    """Reasons for the dtype, attention, environment and batch size, which depend only on the devices."""
    hardware = setup.hardware
    if hardware.bf16:
        reasons = ["bf16: the device supports it, and it needs no loss scaling"]
    else:
        reasons = [f"fp16: {hardware.generation or hardware.title} does not support bf16 (Ampere and newer do)"]
    if hardware.flash_attention:
        reasons.append(
            f"flash attention: in the recipe's table, {1 / EAGER_FULL:.1f} times the throughput for full fine-tuning, "
            "and "
            f"{1 / EAGER_ADAPTERS:.1f} times for LoRA and QLoRA"
        )
    else:
        reasons.append(
            "eager attention, as in the recipe's rows for such devices: flash attention requires Ampere or newer. In "
            "the "
            f"recipe's table, runs without it have {EAGER_FULL} of the throughput for full fine-tuning and "
            f"{EAGER_ADAPTERS} for LoRA and QLoRA. With --use_flash_attention, this device uses PyTorch's "
            "memory-efficient kernel, which stores no attention scores and so needs less memory"
        )
    if hardware.generation in WITHOUT_CUDA_13:
        reasons.append(
            f"the locked environment does not run on {hardware.generation}: its PyTorch is built for CUDA 13, which "
            "requires Turing or newer. Install the build of the same version for CUDA 12.6 (docs/troubleshooting.md)"
        )
    if setup.batch_size != BATCH:
        reasons.append(
            f"batch {setup.batch_size}: the recipe's {BATCH} is not a multiple of {setup.devices} devices; this is the "
            "next multiple"
        )
    return reasons


def _optimizer_reasons(full: Option) -> list[str]:
    """Optimizers with which full fine-tuning fits, if it does not fit easily with float32 states."""
    if full.verdict == "yes":
        return []
    setup = full.fit.setup
    found = other_optimizers(setup)
    if not found:
        return ["full fine-tuning fits with none of the optimizers; docs/how-to/small-gpu.md lists the memory of each"]
    ways = []
    for fit in found:
        host = f", {fit.memory.host_gb:.0f} GB of host memory per process" if fit.memory.host else ""
        ways.append(f"--optimizer {fit.setup.optimizer} ({fit.need} per device{host})")
    return [f"full fine-tuning with another optimizer: {'; '.join(ways)}"]


def _choice_reasons(full: Option, chosen: Option | None) -> list[str]:
    """Reasons for the method, in the recipe's terms."""
    if chosen is None:
        return []
    capacity, least = full.fit.setup.hardware.memory_gb or 0, full.fit.memory.least_gb
    if chosen.method != "full":
        reasons = [
            f"{chosen.method}: full fine-tuning needs at least {least:.0f} GB per device, but this device has "
            f"{capacity:.0f} GB ({full.remark or 'see the table'})"
        ]
        if chosen.method == "qlora":
            reasons.append("QLoRA: LoRA does not fit easily; 4-bit kernels run on Turing and newer")
        return reasons
    reasons = ["full fine-tuning: the recipe recommends it whenever it fits"]
    if chosen.verdict == "tight":
        reasons.append(
            f"memory: tight. Tensors and context take {least:.0f} of {capacity:.0f} GB, so this works only if PyTorch "
            "frees cached memory. If it runs out of memory, use LoRA"
        )
    return reasons
