"""What can I do with my GPUs? The recipe's hardware advice, checked against memory and time.

The recipe: A100 and H100: full fine-tuning with flash attention and bf16. V100 32 GB: full fine-tuning with fp16 and
without flash attention, much slower. No data-centre GPU: LoRA on two GPUs. Turing and newer: QLoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phi3v.planning.choice import largest_micro_batch
from phi3v.planning.flops import Method
from phi3v.planning.hardware import find_hardware
from phi3v.planning.memory import Fit, fits, memory
from phi3v.planning.misfit import device_need, fewer_crops
from phi3v.planning.roofline import step_time
from phi3v.planning.setup import Constants, Setup
from phi3v.planning.workload import mean_and_longest, workload
from phi3v.settings import Dataset, Geometry, Hardware, SettingsError, Workload

METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
# The recipe's scripts' defaults.
LORA_RANK, EPOCHS, BATCH = 64, 1, 64
# Images a second without flash attention over those with it, 8 A100, in the recipe's speed table: full fine-tuning;
# LoRA and QLoRA alike.
EAGER_FULL, EAGER_ADAPTERS = 0.58, 0.46
# No machine of config/hardware.yaml's makers has more.
DEVICES_OF_A_MACHINE = 16
# Before Turing: PyTorch's builds for CUDA 13 have no kernels for them (pytorch/pytorch issue 172352).
WITHOUT_CUDA_13 = ("Maxwell", "Pascal", "Volta")


@dataclass(frozen=True)
class Option:
    """A method on the devices asked about."""

    method: str
    setup: Setup
    fits: Fit | None
    """None: the hardware cannot do the method."""
    allocated_gb: float
    reserved_gb: float
    context_gb: float
    micro_batch: int | None
    images_per_second: float
    hours: float
    """One epoch over the dataset."""
    remark: str

    @property
    def least_gb(self) -> float:
        """What the job cannot do without, GB per device."""
        return self.allocated_gb + self.context_gb


@dataclass(frozen=True)
class Advice:
    """The options in the recipe's order; `chosen` is the first that fits, None where none does."""

    device: str
    hardware: Hardware
    dataset: str
    options: list[Option]
    chosen: Option | None
    reasons: list[str]

    def text(self) -> str:
        """The answer to a person."""
        asked, chosen = self.options[0].setup, self.chosen
        machines = f" ({asked.nodes} machines of {asked.per_node})" if asked.nodes > 1 else ""
        lines = [f"{asked.devices} x {self.hardware.title}{machines}, {self.dataset}:"]
        if chosen is None:
            lines.append("recommended: none")
        else:
            lines.append(
                f"recommended: {chosen.method}, {asked.dtype}, flash attention {'yes' if asked.flash else 'no'}, "
                f"micro-batch {chosen.micro_batch or 1} (batch {asked.batch_size})"
            )
            lines.append(f"  {self.command()}")
            if asked.nodes > 1:
                lines.append(
                    f"  on each of the {asked.nodes} machines, HOST being the name of one of them; or once in a SLURM job "
                    f"that has them: scripts/torchrun_nodes.sh {asked.nodes} {asked.per_node} scripts/finetune.py "
                    "and the same flags"
                )
        lines += [f"- {reason}" for reason in self.reasons]
        lines.append(
            f"{'method':8} {'fits':5} {'alloc GB':>8} {'+ cached':>8} {'+ context':>9} {'micro':>5} {'img/s':>7}"
            f" {'h/epoch':>8}  remark"
        )
        for item in self.options:
            lines.append(
                f"{item.method:8} {item.fits or 'never':5} {item.allocated_gb:8.1f} {item.reserved_gb:8.1f}"
                f" {item.reserved_gb + item.context_gb:9.1f} {item.micro_batch or '-':>5} {item.images_per_second:7.3g} {item.hours:8.2f}  {item.remark}".rstrip()
            )
        return "\n".join(lines)

    def command(self) -> str:
        """The training command of the choice, in the recipe's flags."""
        assert self.chosen is not None
        setup = self.chosen.setup
        where = (
            "--standalone"
            if setup.nodes == 1
            else f"--nnodes={setup.nodes} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
        )
        words = [
            f"torchrun {where} --nproc_per_node={setup.per_node} scripts/finetune.py --dataset {self.dataset}",
            f"--{setup.dtype}", f"--batch_size {setup.batch_size} --batch_size_per_gpu {self.chosen.micro_batch or 1}",
        ]  # fmt: skip
        if setup.flash:
            words.append("--use_flash_attention")
        if setup.adapters:
            words.append("--use_lora" + (" --use_qlora" if setup.method == "qlora" else ""))
        return " ".join([*words, "--model_name_or_path MODEL --output_dir FOLDER"])

    def as_dict(self) -> dict[str, Any]:
        """JSON values: what was asked about, the recommendation (None: none), why, and every option."""
        asked = self.options[0].setup
        options = [
            {
                "method": item.method, "fits": item.fits or "never", 
                "allocated_gb": item.allocated_gb, "reserved_gb": item.reserved_gb, "context_gb": item.context_gb,
                "micro_batch": item.micro_batch, "images_per_second": item.images_per_second,
                "hours_per_epoch": item.hours, "remark": item.remark,
            }
            for item in self.options
        ]  # fmt: skip
        return {
            "device": self.device, "count": asked.per_node, "nodes": asked.nodes, "dataset": self.dataset,
            "dtype": asked.dtype, "flash_attention": asked.flash, "batch_size": asked.batch_size,
            "recommended": self.chosen and self.chosen.method, "command": self.command() if self.chosen else None,
            "reasons": self.reasons, "options": options,
        }  # fmt: skip


def _batch(devices: int) -> int:
    """The recipe's 64, or the next multiple of the devices."""
    return -(-BATCH // devices) * devices


def advise(
    gpu: str, count: int, dataset: str, entries: dict[str, Hardware], geometry: Geometry, data: Dataset,
    nodes: int = 1, root: Path = Path(), constants: Constants | None = None,
) -> Advice:  # fmt: skip
    """Recommend a method for `count` devices of each of `nodes` machines.

    gpu: as a person or a driver says it. geometry: the model's. data: the datasets entry named `dataset`. Raises
    SettingsError for an unknown GPU, and for more devices than a machine has.
    """
    constants = constants or Constants()
    key = find_hardware(gpu, entries)
    hardware = entries[key]
    if count > DEVICES_OF_A_MACHINE and hardware.kind != "cpu":
        raise SettingsError(
            f"command line: field `count`: got {count}: expected the devices of one machine, {DEVICES_OF_A_MACHINE} at "
            f"most; for several machines --nodes, as --count 8 --nodes {-(-count // 8)}"
        )
    load = workload(dataset, data, root)
    mean, longest = mean_and_longest(load, geometry, data.num_crops)
    dtype = "bf16" if hardware.bf16 else "fp16"
    base = Setup(
        geometry, hardware, "full", dtype, hardware.flash_attention, mean, longest, _batch(count * nodes), nodes, count
    )
    options = [
        _option(replace(base, method=name, rank=LORA_RANK if "lora" in name else 0), load, constants)
        for name in METHODS
    ]
    if hardware.kind == "cpu":
        fastest = min(options, key=lambda item: item.hours)
        reason = (
            "a CPU is for the demo (`make demo`: a tiny model, the same workflow); with this model an epoch would take "
            f"{fastest.hours:.0f} hours with the fastest method, {fastest.method}"
        )
        return Advice(key, hardware, dataset, options, None, [reason])
    comfortable = next((item for item in options if item.fits == "yes"), None)
    tight = next((item for item in options if item.fits == "tight"), None)
    # The published V100 rows did full fine-tuning on full devices; for adapters a comfortable method is better.
    chosen = tight if tight and (comfortable is None or tight.method == "full") else comfortable
    reasons = _reasons(hardware, options, chosen)
    if chosen is None:
        reasons.append(_what_would_fit(options, load, data.num_crops))
    return Advice(key, hardware, dataset, options, chosen, reasons)


def _option(setup: Setup, load: Workload, constants: Constants) -> Option:
    need, time = memory(setup), step_time(setup, constants)
    state: Fit | None = fits(setup)
    remark = ""
    capacity = setup.hardware.memory_gb
    if setup.method == "qlora" and not setup.hardware.quantisation:
        state, remark = None, "the recipe asks for Turing or newer for 4 bits (`quantisation` of the hardware's entry)"
    elif state == "no" and capacity is not None:
        remark = f"{need.least_gb - capacity:.0f} GB too much"
        for times in (2, 4, 8, 16, 32):
            wider = replace(setup, nodes=setup.nodes * times, batch_size=_batch(setup.devices * times))
            if not setup.adapters and fits(wider) != "no":
                remark += f"; {wider.devices} devices in all would do"
                break
    elif state == "tight":
        remark = "works only if PyTorch frees cached memory; slower"
    micro = largest_micro_batch(setup) if state else None
    rate = setup.batch_size / time.seconds
    return Option(
        setup.method, setup, state, need.allocated_gb, need.reserved_gb, need.context_gb, micro, rate,
        EPOCHS * load.train / rate / 3600, remark,
    )  # fmt: skip


def _what_would_fit(options: list[Option], load: Workload, num_crops: int) -> str:
    """For a device on which nothing fits: the method that needs the least, and with how many tiles one would fit."""
    possible = [item for item in options if item.fits]
    smallest = min(possible, key=lambda item: item.least_gb)
    said = (
        f"nothing fits: {smallest.method} needs the least, {smallest.least_gb:.0f} GB per device, and "
        f"this one has {smallest.setup.hardware.memory_gb or 0:.0f} GB; what would fit: "
    )
    fewer = [(found, item) for item in possible if (found := fewer_crops(item.setup, load, num_crops))]
    if fewer:
        (crops, setup), item = max(fewer, key=lambda pair: pair[0][0])
        said += f"{item.method} with --num_crops {crops} instead of {num_crops} ({device_need(setup)}), "
    return said + "a larger device"


def _reasons(hardware: Hardware, options: list[Option], chosen: Option | None) -> list[str]:
    """Why, in the recipe's terms."""
    said = [
        "bf16: the device computes it, and it needs no loss scaling"
        if hardware.bf16
        else f"fp16: {hardware.generation or hardware.title} has no bf16 (Ampere and newer)",
        f"flash attention: in the recipe's table {1 / EAGER_FULL:.1f} times the throughput for full fine-tuning and "
        f"{1 / EAGER_ADAPTERS:.1f} times for LoRA and QLoRA"
        if hardware.flash_attention
        else "no flash attention: its kernels need Ampere or newer; in the recipe's table a run without it has "
        f"{EAGER_FULL} of the throughput for full fine-tuning and {EAGER_ADAPTERS} for LoRA and QLoRA",
    ]
    if hardware.generation in WITHOUT_CUDA_13:
        said.append(
            f"the locked environment does not run on {hardware.generation}: its PyTorch is built for CUDA 13, which "
            "begins with Turing; PyTorch's build of the same version for CUDA 12.6 does (docs/planner.md)"
        )
    full = options[0]
    if full.setup.batch_size != BATCH:
        said.append(
            f"batch {full.setup.batch_size}: the recipe's {BATCH} is no multiple of {full.setup.devices} devices, this is "
            "the next one"
        )
    if chosen is None:
        return said
    if chosen.method == "full":
        said.append("full fine-tuning: the recipe's advice whenever it fits")
        if chosen.fits == "tight":
            said.append(
                f"memory: tight. Tensors and context take {full.least_gb:.0f} of {hardware.memory_gb or 0:.0f} GB, so it"
                " works only if PyTorch frees cached memory. If it runs out of memory, use LoRA"
            )
    else:
        said.append(
            f"{chosen.method}: full fine-tuning needs at least {full.least_gb:.0f} GB per device, this one "
            f"has {hardware.memory_gb or 0:.0f} GB ({full.remark or 'see the table'})"
        )
        if chosen.method == "qlora":
            said.append("QLoRA: LoRA does not fit comfortably; 4-bit kernels run on Turing and newer")
    return said
