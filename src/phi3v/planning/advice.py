"""What can I do with my GPUs? The recipe's hardware advice, checked against memory and time.

The recipe: A100 and H100: full fine-tuning with flash attention and bf16. V100 32 GB: full fine-tuning with fp16 and
without flash attention, much slower. No data-centre GPU: LoRA on two GPUs. Turing and newer: QLoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from phi3v.planning.flops import Method
from phi3v.planning.hardware import find_hardware
from phi3v.planning.memory import Fit, fits, memory
from phi3v.planning.plan import largest_micro_batch
from phi3v.planning.roofline import step_time
from phi3v.planning.setup import Constants, Setup
from phi3v.planning.workload import mean_and_longest, workload
from phi3v.settings import Dataset, Geometry, Hardware, Workload

METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
# The recipe's scripts' defaults.
LORA_RANK, EPOCHS = 64, 1


@dataclass(frozen=True)
class Option:
    """A method on the devices asked about."""

    method: str
    setup: Setup
    fits: Fit | None
    """None: the hardware cannot do the method."""
    peak_gb: float
    floor_gb: float
    micro_batch: int | None
    images_per_second: float
    hours: float
    """One epoch over the dataset."""
    remark: str


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
        count = self.options[0].setup.devices
        lines = [f"{count} x {self.hardware.title}, {self.dataset}:"]
        if self.chosen is None:
            lines.append("none of the methods fits")
        else:
            chosen = self.chosen
            size = chosen.micro_batch or 1
            lines.append(
                f"recommended: {chosen.method}, {chosen.setup.dtype}, flash attention "
                f"{'yes' if chosen.setup.flash else 'no'}, micro-batch {size} (batch {chosen.setup.batch_size})"
            )
            lines.append(f"  {self.command()}")
        lines += [f"- {reason}" for reason in self.reasons]
        lines.append(
            f"{'method':8} {'fits':5} {'peak GB':>8} {'at least':>8} {'micro':>6} {'img/s':>7} {'h/epoch':>8}  remark"
        )
        for item in self.options:
            lines.append(
                f"{item.method:8} {item.fits or 'never':5} {item.peak_gb:8.1f} {item.floor_gb:8.1f}"
                f" {item.micro_batch or '-':>6} {item.images_per_second:7.2f} {item.hours:8.2f}  {item.remark}".rstrip()
            )
        return "\n".join(lines)

    def command(self) -> str:
        """The training command of the choice, in the recipe's flags."""
        assert self.chosen is not None
        setup = self.chosen.setup
        words = [
            f"torchrun --nproc_per_node={setup.per_node} scripts/finetune.py --dataset {self.dataset}",
            f"--{setup.dtype}", f"--batch_size {setup.batch_size} --batch_size_per_gpu {self.chosen.micro_batch or 1}",
        ]  # fmt: skip
        if setup.flash:
            words.append("--use_flash_attention")
        if setup.adapters:
            words.append("--use_lora" + (" --use_qlora" if setup.method == "qlora" else ""))
        return " ".join([*words, "--model_name_or_path MODEL --output_dir FOLDER"])


def _batch(devices: int) -> int:
    """The recipe's 64, or the next multiple of the devices."""
    return -(-64 // devices) * devices


def advise(
    gpu: str, count: int, dataset: str, entries: dict[str, Hardware], geometry: Geometry, data: Dataset,
    nodes: int = 1, root: Path = Path(), constants: Constants | None = None,
) -> Advice:  # fmt: skip
    """Recommend a method for `count` devices of each of `nodes` machines; raises SettingsError for an unknown GPU.

    gpu: as a person says it. geometry: the model's. data: the datasets entry named `dataset`.
    """
    constants = constants or Constants()
    key = find_hardware(gpu, entries)
    hardware = entries[key]
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
    with_room = next((item for item in options if item.fits == "yes"), None)
    filling = next((item for item in options if item.fits == "full"), None)
    # Full fine-tuning on a full device is what the published V100 rows did; adapters with room are better than without.
    chosen = filling if filling and (with_room is None or filling.method == "full") else with_room
    return Advice(key, hardware, dataset, options, chosen, _reasons(hardware, options, chosen))


def _option(setup: Setup, load: Workload, constants: Constants) -> Option:
    need, time = memory(setup, constants), step_time(setup, constants)
    state: Fit | None = fits(setup, constants)
    remark = ""
    capacity = setup.hardware.memory_gb
    if setup.method == "qlora" and not setup.hardware.quantisation:
        state, remark = None, "no 4-bit kernels here (Turing or newer)"
    elif state == "no" and capacity is not None:
        remark = f"{need.floor_gb - capacity:.0f} GB too much"
        for nodes in (2, 4, 8, 16, 32):
            wider = replace(setup, per_node=setup.per_node * nodes, batch_size=_batch(setup.devices * nodes))
            if not setup.adapters and fits(wider, constants) != "no":
                remark += f"; {wider.devices} devices would do"
                break
    elif state == "full":
        remark = "the device runs full, as the published V100 rows did"
    micro = largest_micro_batch(setup, constants) if state else None
    rate = setup.batch_size / time.seconds
    return Option(
        setup.method, setup, state, need.total_gb, need.floor_gb, micro, rate, EPOCHS * load.train / rate / 3600, remark
    )


def _reasons(hardware: Hardware, options: list[Option], chosen: Option | None) -> list[str]:
    """Why, in the recipe's terms."""
    said = [
        "bf16: the device computes it, and it needs no loss scaling"
        if hardware.bf16
        else f"fp16: {hardware.generation or hardware.title} has no bf16 (Ampere and newer)",
        "flash attention: 1.7 times the throughput for full fine-tuning and 2.2 times for LoRA in the recipe's table"
        if hardware.flash_attention
        else "no flash attention: its kernels need Ampere or newer; expect a third to a half of the throughput",
    ]
    full = options[0]
    if chosen is None:
        smallest = min((item for item in options if item.fits), key=lambda item: item.floor_gb, default=full)
        said.append(
            f"nothing fits: {smallest.method} needs the least, {smallest.floor_gb:.0f} GB a device, here are "
            f"{hardware.memory_gb or 0:.0f}; fewer tiles (--num_crops 4) or a larger device"
        )
    elif chosen.method == "full":
        said.append("full fine-tuning: the recipe's advice whenever it fits")
        if chosen.fits == "full":
            said.append(
                f"memory: takes {full.peak_gb:.0f} GB where there is room and at least {full.floor_gb:.0f} GB: it fills"
                f" the {hardware.memory_gb or 0:.0f} GB; LoRA is the way back if it fails"
            )
    else:
        said.append(
            f"{chosen.method}: full fine-tuning needs at least {full.floor_gb:.0f} GB a device, here are "
            f"{hardware.memory_gb or 0:.0f} ({full.remark or 'see the table'})"
        )
        if chosen.method == "qlora":
            said.append("QLoRA: LoRA does not fit with room; 4-bit kernels run on Turing and newer")
    return said
