"""Peak memory of a training job, whether its device has enough, the fastest way to run it, and what else would fit.

    setup, load = setup_of(run, job)            # a row of the run as input of the formulas
    found = what_fits(setup)                    # found.memory, found.verdict, found.need
    what_fits(setup, choices(setup)).setup      # with the fastest micro-batch and recomputation that fit
    runnable(run)                               # the run without the rows that cannot fit

The plan, the advice on GPUs, `auto` and the workflow's selection of rows use this module. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from phi3v.planning.flops import Method, Setup, Work, example_work
from phi3v.planning.geometry import model_geometry, num_image_tokens, tile_grid, tile_layout
from phi3v.planning.memory import Memory, Verdict, memory
from phi3v.planning.step_time import step_time
from phi3v.settings import (
    AccuracyRow,
    Dataset,
    Geometry,
    Hardware,
    Job,
    NotRun,
    ResolvedRun,
    SettingsError,
    SpeedRow,
    Workload,
    dataset_key,
)
from phi3v.settings.commands import own_settings
from phi3v.settings.rows import Optimizer
from phi3v.settings.run import place_accuracy

# Assumed per example for a dataset without `workload`: square pictures that fill the largest tile grid.
UNKNOWN = {"shapes": [(1000, 1000, 1.0)], "text": 100, "labels": 12, "picture_bytes": 3e5}
# RECIPE: mean length of DocVQA at num_crops 16. The scripts pad every picture to 17 tiles and run the tower on all.
MEAN_TOKENS, PADDED_TILES = 2443.23, 17
FULL_IMAGES, FROZEN_IMAGES = 8.657, 31.736
"""Published images/s on 8 A100 with flash attention: full fine-tuning, and the "vision frozen" row."""
PEAK_SHARES = {"full": 27, "full_hardware": 36, "frozen": 82, "frozen_hardware": 107, "forward_only": 34}
"""Percent of the peak of 8 A100 at these rates, from phi3v.planning.flops (tests/test_planning_flops.py computes them).
forward_only: the frozen row, if the decoder only ran forward."""
# Recompute no layer (0), or every eighth, fourth, third, second, or every layer (transformers' every_n_layers).
RECOMPUTE_EVERY = (0, 8, 4, 3, 2, 1)
# The recipe's rank, for suggesting adapters to a row of another method.
LORA_RANK = 64
# In the recipe's order.
METHODS: tuple[Method, ...] = ("full", "frozen", "lora", "qlora")
# Optimizers for full fine-tuning in less memory, the fastest first.
LEAN_OPTIMIZERS: tuple[Optimizer, ...] = ("adamw_8bit", "paged_adamw_8bit", "adamw_offload")


# From a row to a setup -------------------------------------------------------------------------------------------------


def workload(name: str, dataset: Dataset, root: Path = Path()) -> Workload:
    """The workload of a datasets entry, with the counts of its converted folder if there is one.

    For a converted entry without the field, pictures are assumed to fill the largest tile grid. root: repository root,
    which contains results/. Raises SettingsError for an entry without the field that is not converted.
    """
    file = root / "results" / "data" / dataset_key(name, dataset) / "dataset.json"
    if not file.is_file():
        if dataset.workload is None:
            raise SettingsError(
                f"dataset `{name}`: field `workload`: empty, and the dataset is not converted yet ({file} is missing); "
                "expected the field in the datasets file; add it or run `snakemake -c2 data`"
            )
        return dataset.workload
    splits = json.loads(file.read_text(encoding="utf-8"))["splits"]
    counts = {"train": splits.get("train", {}).get("examples", 0), "evaluation": splits["val"]["examples"]}
    if dataset.workload is not None:
        return dataset.workload.model_copy(update=counts)
    fullest = splits["train" if counts["train"] else "val"]
    pictures = round(fullest.get("images", 0) / max(1, fullest["examples"]))
    return Workload(**counts, **UNKNOWN, pictures=pictures, source=f"{file}; largest grid assumed")


def mean_and_longest(load: Workload, geometry: Geometry, num_crops: int) -> tuple[Work, Work]:
    """Work of a mean training example, and of the longest example given the shapes of the pictures."""
    mean, longest = Work(), Work()
    for width, height, share in load.shapes:
        _, _, down, across = tile_layout(width, height, num_crops, geometry.vision.image_size)
        tokens = load.pictures * num_image_tokens(down, across, tile_grid(geometry.vision)) + load.text
        work = example_work(geometry, tokens, load.pictures * (down * across + 1), load.labels)
        mean = mean + work.scaled(share)
        longest = max(longest, work, key=lambda item: item.tokens)
    return mean, longest


def _counted(name: str, dataset: Dataset, geometry: Geometry, num_crops: int, root: Path) -> tuple[Work, Work] | None:
    """Work of a mean training example and of the longest, counted on the converted data. None if there are no
    counts."""
    file = root / "results" / "data" / dataset_key(name, dataset) / "statistics.json"
    split = json.loads(file.read_text(encoding="utf-8")).get("train", {}) if file.is_file() else {}
    if split.get("num_crops") != num_crops or "longest" not in split:
        return None
    turns = 1 if dataset.turns == "draw" else split["turns"] / split["examples"]
    labels = turns * split["answer_tokens"]["mean"]
    mean = example_work(geometry, split["tokens"]["mean"], split["tiles"]["mean"], labels)
    longest = split["longest"]
    return mean, example_work(geometry, longest["tokens"], longest["tiles"], longest["labels"])


def _cut(setup: Setup, tokens: int) -> Work:
    """The longest example if examples are limited to `tokens`. Its tiles and labels may stay the same."""
    longest = setup.longest
    return example_work(setup.geometry, tokens, longest.tiles, min(longest.labels, tokens))


def setup_of(run: ResolvedRun, job: Job, root: Path = Path(), counted: bool = True) -> tuple[Setup, Workload]:
    """The setup and workload of a row as this project runs it, with `auto` replaced by the predicted choice.

    counted: use the longest example in the data folder's statistics.json if the file exists (written by rule
    data_statistics, or by scripts/validate.py FOLDER --model MODEL). Otherwise it follows from the dataset's entry.
    Raises SettingsError if the sizes of the model or the dataset are still unknown.
    """
    row = job.row
    geometry = model_geometry(row.model, run.models[row.model], root)
    load = workload(row.dataset, run.datasets[row.dataset], root)
    mean, longest = mean_and_longest(load, geometry, job.num_crops)
    own = own_settings(row, f"row `{row.row}`")
    setup = _setup(row, geometry, run.hardware[job.pool.device], (mean, longest), job.nodes, job.processes_per_node)
    packed = own.batching == "packed"
    bound = own.tokens_per_pack if packed else own.max_tokens_per_micro_batch
    frozen = own.frozen_groups if own.freeze_decoder else frozenset[str]()
    setup = replace(
        setup,
        zero_stage=own.zero_stage,
        token_bound=bound,
        packed=packed,
        frozen=frozen,
        lora_targets=tuple(own.lora_targets),
    )
    found = _counted(row.dataset, run.datasets[row.dataset], geometry, job.num_crops, root) if counted else None
    if found:
        # The time of a dataset with a workload stays the same before and after its conversion.
        mean = setup.work if run.datasets[row.dataset].workload else found[0]
        setup = replace(setup, work=mean, longest=found[1], lengths="counted")
    if own.max_length and own.max_length < setup.longest.tokens:
        setup = replace(setup, longest=_cut(setup, own.max_length))
    if "auto" in (row.micro_batch_size, row.gradient_checkpointing):
        sizes = None if row.micro_batch_size == "auto" else [row.micro_batch_size]
        setup = what_fits(setup, choices(setup, sizes, row.recompute)).setup
    return setup, load


def published_setup(row: SpeedRow, geometry: Geometry, hardware: Hardware) -> Setup:
    """The setup of a speed row in the recipe's scripts: padded tiles, the head at every position, all layers
    recomputed.

    Frozen rows use legacy freezing: only the final norm and the head have gradients.
    """
    image_tokens = min(MEAN_TOKENS, float(num_image_tokens(4, 4, tile_grid(geometry.vision))))
    work = Work(1, MEAN_TOKENS, MEAN_TOKENS**2, PADDED_TILES, image_tokens, MEAN_TOKENS)
    setup = _setup(row, geometry, hardware, (work, work), row.nodes, row.gpus_per_node)
    method: Method = "frozen_forward_only" if row.method == "frozen" else row.method
    return replace(setup, method=method, recompute=1.0, as_published=True)


def _setup(
    row: AccuracyRow | SpeedRow,
    geometry: Geometry,
    hardware: Hardware,
    works: tuple[Work, Work],
    nodes: int,
    per_node: int,
) -> Setup:
    """The row's own settings. `auto` recomputation counts as all layers. works: of a mean and of the longest
    example."""
    return Setup(
        geometry=geometry,
        hardware=hardware,
        method=row.method,
        dtype=row.dtype,
        flash=row.flash_attention,
        work=works[0],
        longest=works[1],
        batch_size=row.batch_size,
        nodes=nodes,
        per_node=per_node,
        micro_batch=row.micro_batch_size_or_one,
        rank=row.lora_rank or 0,
        recompute=1.0 if row.recompute is None else row.recompute,
        optimizer=row.optimizer,
    )


# What fits -------------------------------------------------------------------------------------------------------------


def interval_of(share: float) -> int:
    """n if every n-th layer is recomputed, or 0 if none is."""
    return round(1 / share) if share else 0


def recomputation(interval: int) -> str:
    """The recomputation interval in words, for logs."""
    if interval <= 1:
        return "all layers recomputed" if interval else "no layer recomputed"
    return f"1 of {interval} layers recomputed"


@dataclass(frozen=True)
class Choice:
    """A way to run a step."""

    micro_batch: int
    """Examples per forward pass."""
    recompute_every: int
    """n if every n-th layer is recomputed in the backward pass, or 0 if none is."""

    @property
    def recompute(self) -> float:
        """Share of the layers that are recomputed, as Setup.recompute."""
        return 1 / self.recompute_every if self.recompute_every else 0.0

    def __str__(self) -> str:
        return f"micro-batch {self.micro_batch}, {recomputation(self.recompute_every)}"

    def applied(self, setup: Setup) -> Setup:
        """The setup with this choice."""
        return replace(setup, micro_batch=self.micro_batch, recompute=self.recompute)

    def settings(self) -> dict[str, int]:
        """The fields of FinetuneSettings that replace `auto`."""
        return {
            "micro_batch_size": self.micro_batch,
            "gradient_checkpointing": self.recompute_every > 0,
            "recompute_every": max(1, self.recompute_every),
        }


@dataclass(frozen=True)
class Fit:
    """A setup and the memory that it needs on its device."""

    setup: Setup
    memory: Memory

    @property
    def verdict(self) -> Verdict:
        """Whether the device has enough memory."""
        return self.memory.verdict(self.setup.hardware.memory_gb)

    @property
    def need(self) -> str:
        """Required memory per device in words: the peak, or the least amount if it is tight."""
        if self.verdict == "yes":
            return f"{self.memory.device_gb:.0f} GB"
        return f"tight, {self.memory.least_gb:.0f} GB at least"

    @property
    def largest_micro_batch(self) -> int | None:
        """The largest micro-batch that fits without being tight. None on a CPU, or if not even one example fits."""
        if self.setup.hardware.memory_gb is None:
            return None
        for size in reversed(micro_batches(self.setup.batch_size, self.setup.devices)):
            if what_fits(replace(self.setup, micro_batch=size)).verdict == "yes":
                return size
        return None


def micro_batches(batch_size: int, devices: int) -> list[int]:
    """Micro-batches that divide a device's share of the batch, ascending."""
    return [size for size in range(1, batch_size // devices + 1) if batch_size % (devices * size) == 0]


def choices(setup: Setup, sizes: Sequence[int] | None = None, recompute: float | None = None) -> list[Choice]:
    """The choices of a job. sizes, recompute: micro-batch sizes and recomputed share if the row sets them."""
    intervals = RECOMPUTE_EVERY if recompute is None else (interval_of(recompute),)
    return [
        Choice(size, every) for size in sizes or micro_batches(setup.batch_size, setup.devices) for every in intervals
    ]


def fastest_first(setup: Setup, among: Iterable[Choice]) -> list[Choice]:
    """The choices by predicted step time. Equal times keep their order."""
    return sorted(among, key=lambda choice: step_time(choice.applied(setup)).seconds)


def what_fits(setup: Setup, among: Sequence[Choice] = ()) -> Fit:
    """Peak memory and verdict of a setup, run as the fastest of the choices `among` that fits without being tight.

    The setup stays unchanged if there is no choice, if none fits, or if the device's memory is unknown (a CPU).
    """
    if among and setup.hardware.memory_gb is not None:
        setup = _fastest_that_fits(setup, tuple(among))
    return Fit(setup, memory(setup))


@lru_cache
def _fastest_that_fits(setup: Setup, among: tuple[Choice, ...]) -> Setup:
    """Cached, because a plan asks for the same row several times and rows share setups."""
    possible = [choice for choice in among if what_fits(choice.applied(setup)).verdict == "yes"]
    return fastest_first(setup, possible)[0].applied(setup) if possible else setup


# What else would fit ---------------------------------------------------------------------------------------------------


def first_that_fits(candidates: Iterable[Setup]) -> Fit | None:
    """The first setup that fits, tight included, or None."""
    return next((found for found in map(what_fits, candidates) if found.verdict != "no"), None)


def can_run(setup: Setup) -> bool:
    """Whether the hardware has the kernels that the method needs."""
    return setup.method != "qlora" or setup.hardware.quantisation


def with_method(setup: Setup, method: Method) -> Setup:
    """The setup with another method that trains all weights it can. New adapters get the recipe's rank."""
    rank = (setup.rank or LORA_RANK) if "lora" in method else 0
    return replace(setup, method=method, rank=rank, frozen=frozenset(), lora_targets=())


def other_methods(setup: Setup) -> list[Fit]:
    """Cheaper methods on the same devices that the hardware supports and that fit, in the recipe's order."""
    flash = setup.hardware.flash_attention
    others = [replace(with_method(setup, method), micro_batch=1, flash=flash) for method in METHODS]
    possible = [other for other in others if can_run(other) and (other.method, flash) != (setup.method, setup.flash)]
    return [fit for fit in map(what_fits, possible) if fit.verdict != "no"]


def other_optimizers(setup: Setup) -> list[Fit]:
    """Full fine-tuning with other optimizers that fit on the same devices, the fastest first."""
    names = [name for name in LEAN_OPTIMIZERS if name != setup.optimizer and not setup.adapters]
    fits = [what_fits(replace(setup, optimizer=name, micro_batch=1)) for name in names]
    return [fit for fit in fits if fit.verdict != "no"]


def fewer_crops(setup: Setup, load: Workload, num_crops: int) -> tuple[int, Fit] | None:
    """The largest num_crops below `num_crops` at which the setup fits. None if none does, or if lengths were
    counted."""
    if setup.lengths == "counted":
        return None
    for crops in range(num_crops - 1, 0, -1):
        mean, longest = mean_and_longest(load, setup.geometry, crops)
        if fit := first_that_fits([replace(setup, work=mean, longest=longest)]):
            return crops, fit
    return None


def shorter(setup: Setup) -> tuple[int, Fit] | None:
    """The largest max_length, a power of two, at which the setup fits. None if none does, or if lengths are
    estimated."""
    if setup.lengths == "counted":
        for tokens in (2**power for power in range(int(setup.longest.tokens - 1).bit_length() - 1, 8, -1)):
            if fit := first_that_fits([replace(setup, longest=_cut(setup, tokens))]):
                return tokens, fit
    return None


def more_devices(setup: Setup) -> Fit | None:
    """The fewest machines, 2 to 32 times as many, on which the setup fits. None for adapters, which are not sharded.

    The batch size becomes the next multiple of the number of devices.
    """
    many = () if setup.adapters else [setup.devices * times for times in (2, 4, 8, 16, 32)]
    return first_that_fits(
        replace(setup, nodes=devices // setup.per_node, batch_size=-(-setup.batch_size // devices) * devices)
        for devices in many
    )


def more_of_the_pool(setup: Setup, job: Job) -> Fit | None:
    """An accuracy row on the fewest devices of its pool on which it fits, or None."""
    if setup.adapters or not isinstance(job.row, AccuracyRow):
        return None
    most = setup.batch_size // setup.micro_batch
    counts = [gpus for gpus in range(setup.devices + 1, most + 1) if setup.batch_size % (gpus * setup.micro_batch) == 0]
    layouts = [(gpus, *place_accuracy(gpus, job.pool)) for gpus in counts]
    return first_that_fits(
        replace(setup, nodes=nodes, per_node=per_node) for gpus, nodes, per_node in layouts if nodes * per_node == gpus
    )


# Rows that do not fit --------------------------------------------------------------------------------------------------


def misfit(fit: Fit, load: Workload, job: Job) -> str:
    """By how much a row exceeds the memory of its device, and what would fit."""
    setup, need, capacity = fit.setup, fit.memory, float(fit.setup.hardware.memory_gb or 0)
    ways = []
    if setup.micro_batch > 1 and first_that_fits([replace(setup, micro_batch=1)]):
        ways.append("micro_batch_size 1")
    own = more_of_the_pool(setup, job)
    if own:
        written = f"`overrides: {{{job.table_row}: {{gpus: {own.setup.devices}}}}}`"
        ways.append(f"{own.setup.devices} devices, which this run has: {written} ({own.need})")
    for other in other_methods(setup):
        flash = " with flash attention" if other.setup.flash and not setup.flash else ""
        ways.append(f"{other.setup.method}{flash} ({other.need})")
    if smaller := fewer_crops(setup, load, job.num_crops):
        ways.append(f"num_crops {smaller[0]} instead of {job.num_crops} ({smaller[1].need})")
    if kept := shorter(setup):
        tokens, text = kept[0], f"the longest example has {setup.longest.tokens:.0f} tokens"
        ways.append(f"`finetune: {{max_length: {tokens}}}`, which skips longer examples: {text} ({kept[1].need})")
    if not own and (more := more_devices(setup)):
        ways.append(f"{more.setup.devices} devices ({more.need})")
    ways.append(f"a device with {math.ceil(need.device_gb)} GB ({math.ceil(need.least_gb)} GB: tight)")
    return (
        f"predicted peak {need.least_gb:.0f} GB per device, {need.least_gb - capacity:.0f} GB more than "
        f"{setup.hardware.title} has ({capacity:.0f} GB); would fit: {', '.join(ways)}"
    )


def named(run: ResolvedRun, job: Job) -> bool:
    """Whether the run selects the job's row by its exact id. Such a row runs even if it is not predicted to fit."""
    return run.settings.rows.names(job.table_row)


def left_out(run: ResolvedRun, job: Job) -> str | None:
    """Why the workflow skips a row. None if it fits, or if the run selects it by its exact id.

    Depends only on the run's files, not on conversion, so that the selection of rows does not change during a run.
    Therefore no row is skipped if its model has no `geometry` or its dataset has no `workload`.
    """
    planned = run.models[job.row.model].geometry and run.datasets[job.row.dataset].workload
    if not planned or named(run, job):
        return None
    setup, load = setup_of(run, job, counted=False)
    fit = what_fits(setup)
    return misfit(fit, load, job) if fit.verdict == "no" else None


def runnable(run: ResolvedRun) -> ResolvedRun:
    """The run without the rows that do not fit on their device. They move to `not_run`, with the memory they need."""
    jobs = (*run.accuracy, *run.speed)
    missing = {job.row.row: reason for job in jobs if (reason := left_out(run, job)) is not None}
    kept = {
        "accuracy": [job for job in run.accuracy if job.row.row not in missing],
        "speed": [job for job in run.speed if job.row.row not in missing],
        "not_run": [
            *run.not_run,
            *(NotRun(row=job.row, reason=missing[job.row.row]) for job in jobs if job.row.row in missing),
        ],
    }
    # A new object, because a copy would keep the old object's cached index of jobs.
    return ResolvedRun.model_construct(**{**dict(run), **kept})
