"""The plan of a run: memory, time and cost of each row on its assigned hardware, before anything starts. No torch.

plan = plan_run(load_run("config/config.yaml"))
plan.values()                               # plan.json
print(plan.table()); plan.page()            # the same as text, and as a web page
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from html import escape
from pathlib import Path
from typing import Literal

from phi3v.planning.fits import left_out, misfit, named, published_setup, setup_of, what_fits
from phi3v.planning.flops import utilisation
from phi3v.planning.geometry import parameters
from phi3v.planning.memory import Verdict, published_memory
from phi3v.planning.resources import (
    Resources,
    disk_needed,
    evaluation_seconds,
    resources,
    row_gb,
    training_steps,
)
from phi3v.planning.step_time import CONSTANTS, images_per_second, peak_tflops, step_time
from phi3v.settings import AccuracyRow, Geometry, Job, ResolvedRun, SettingsError, SpeedRow

JOB_KINDS = {"accuracy": ("train", "evaluate"), "speed": ("speed",)}
LEGEND = """\
n: devices. Predicted memory per device in GB, for this project's code: alloc: live tensors at the peak; resvd: reserved
by PyTorch's allocator; ctx: CUDA context and NCCL. nvidia-smi shows resvd + ctx.
fits: yes; tight (works only if PyTorch frees cached memory; slower); no. micro: largest micro-batch that fits.
img/s: images per second over all devices. MFU, HFU: share of the dense peak, without and with recomputation.
A CPU's peak is calibrated on one machine (docs/measurements.md), so its figures are rough on other machines.
time: training (or timing) and evaluation. device-h: time x devices. kWh: at full board power."""
PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Plan of run {name}</title>
<style>body {{ font-family: sans-serif; margin: 2em }} pre {{ overflow-x: auto }}</style>
</head>
<body>
<h1>Plan of run {name}</h1>
<p>All figures are predicted. FLOP and bytes are counted from the layer sizes, with constants calibrated on the
published speed tables. We infer that the published memory is a reading of the whole device, so compare it with resvd +
ctx. "Published code" is the prediction for the recipe's scripts on the published hardware. We infer that frozen rows
there ran the decoder forward only.</p>
<pre>{table}</pre>
<h2>Rows in detail</h2>
<pre>{details}</pre>
</body>
</html>
"""


@dataclass(frozen=True)
class Planned:
    """A row on its hardware. Quantities that cannot be planned are None, and `status` gives the reason."""

    row: str
    table_row: str
    """Id of the line in the table. The rows of all seeds share it."""
    kind: str
    status: str
    device: str = ""
    nodes: int = 0
    devices: int = 0
    method: str = ""
    dtype: str = ""
    flash_attention: bool = False
    parameters: dict[str, int] | None = None
    trainable: dict[str, int] | None = None
    memory_gb: dict[str, float] | None = None
    """Allocated memory per device at the peak, by part. The sum is allocated_gb (phi3v.planning.memory)."""
    longest_tokens: int | None = None
    """Tokens of the longest training example, which determines the peak."""
    lengths: Literal["estimated", "counted"] | None = None
    """counted: the longest example of the converted data. estimated: it follows from the dataset's entry."""
    peak_moment: str | None = None
    """Part of a step in which the peak occurs."""
    allocated_gb: float | None = None
    """Live tensors at the peak, as torch.cuda.max_memory_allocated reports them."""
    reserved_gb: float | None = None
    """Memory that PyTorch's allocator reserves, cached blocks included. Estimated from allocated_gb."""
    context_gb: float | None = None
    """Memory outside the allocator: CUDA context and NCCL. An estimate."""
    fits: Verdict | None = None
    micro_batch: int | None = None
    """Micro-batch that the row runs with."""
    recompute: float | None = None
    """Share of the layers whose activations are recomputed."""
    largest_micro_batch: int | None = None
    """Largest micro-batch that fits and divides the batch."""
    images_per_second: float | None = None
    published_images_per_second: float | None = None
    as_published: float | None = None
    """images_per_second predicted for the published code on the published hardware."""
    as_published_gb: float | None = None
    """Memory predicted for the published code. Like published_memory_gb, it covers the whole device."""
    published_memory_gb: float | None = None
    step_seconds: dict[str, float] | None = None
    mfu: float | None = None
    hfu: float | None = None
    steps: int | None = None
    hours: float | None = None
    """Hours of training (or timing) and evaluation."""
    gpu_hours: float | None = None
    price: float | None = None
    """Price in the currency of the pool's price_per_hour."""
    energy_kwh: float | None = None
    """Energy at full board power: an upper bound for the devices, without the rest of the machine."""
    disk_gb: float | None = None
    """Final weights or adapters, and checkpoints during training."""
    jobs: dict[str, Resources] | None = None
    """Resources that the rules request from a cluster, by kind of job. A site's limits may reduce them."""

    @property
    def runs(self) -> bool:
        """Whether the row could be planned and will run."""
        return self.hours is not None and not self.status.startswith("not run")

    def detail(self) -> str:
        """Parameters, memory, time and cluster jobs of the row, in detail."""
        if self.hours is None:
            return f"{self.row}: {self.status}"
        flash = "flash attention" if self.flash_attention else "eager attention"
        lines = [f"{self.row}: {self.status}; {self.method}, {self.dtype}, {flash} on {self.devices} x {self.device}"]
        millions, trained = (
            {name: count / 1e6 for name, count in (counts or {}).items()}
            for counts in (self.parameters, self.trainable)
        )
        lines += [
            _parts("parameters, millions", millions),
            _parts("of these trained, millions", trained),
            _parts("allocated per device, GB", self.memory_gb),
            f"  peak in: {self.peak_moment}; reserved {self.reserved_gb:.4g} GB, context {self.context_gb:.4g} GB; "
            f"micro-batch {self.micro_batch}, {100 * (self.recompute or 0):.0f} % of the layers recomputed; "
            f"longest example {self.longest_tokens} tokens ({self.lengths})",
        ]
        if self.as_published_gb is not None:
            published = "" if self.published_memory_gb is None else f", published {self.published_memory_gb:.4g} GB"
            lines.append(
                f"  published code: {self.as_published_gb:.4g} GB predicted for the whole device{published};"
                f" {self.as_published:.4g} images/s predicted, published {self.published_images_per_second:.4g}"
            )
        disk = "" if self.disk_gb is None else f", {self.disk_gb:.1f} GB of disk"
        lines += [
            _parts("an optimizer step, s", self.step_seconds),
            f"  {self.steps} steps, {duration(self.hours)} with evaluation, {self.gpu_hours:.2f} device-hours{disk}",
        ]
        for name, job in (self.jobs or {}).items():
            asked = ", ".join(f"{key} {value}" for key, value in asdict(job).items() if value not in ("", None))
            lines.append(f"  {name} job: {asked}")
        return "\n".join(lines)


def _parts(title: str, values: Mapping[str, float] | None) -> str:
    """A line with the sum, and the parts that are not zero."""
    listed = ", ".join(f"{name} {value:.4g}" for name, value in (values or {}).items() if value)
    return f"  {title:30} {sum((values or {}).values()):>9.4g} = {listed}"


def duration(hours: float) -> str:
    """A duration in hours, minutes or seconds, whichever reads best: "12.3 h", "45 min", "20 s"."""
    if hours >= 2:
        return f"{hours:.1f} h"
    return f"{60 * hours:.0f} min" if hours >= 1 / 30 else f"{3600 * hours:.0f} s"


def plan_job(run: ResolvedRun, job: Job, root: Path = Path()) -> Planned:
    """The plan of one row."""
    row = job.row
    kind = "accuracy" if isinstance(row, AccuracyRow) else "speed"
    planned = Planned(row.row, job.table_row, kind, "run", job.pool.device)
    try:
        setup, load = setup_of(run, job, root)
        time, peak = step_time(setup), peak_tflops(setup)
    except SettingsError as error:
        return replace(planned, status=f"not planned: {error}")
    fit = what_fits(setup)
    if fit.verdict == "no":
        refused = "running it anyway because you named this row" if named(run, job) else "likely to run out of memory"
        refused = "not run" if left_out(run, job) else refused
        planned = replace(planned, status=f"{refused}: {misfit(fit, load, job)}")
    if isinstance(row, AccuracyRow):
        planned = replace(planned, disk_gb=sum(row_gb(setup, row, run.settings.save_minutes)))
    else:
        planned = _with_published(planned, row, job, run, setup.geometry)
    steps, need, devices = training_steps(row, load, run), fit.memory, setup.devices
    hours = (steps * time.seconds + (evaluation_seconds(setup, load) if kind == "accuracy" else 0)) / 3600
    power, price = setup.hardware.power_w, job.pool.price_per_hour
    return replace(
        planned,
        nodes=job.nodes,
        devices=devices,
        method=row.method,
        dtype=row.dtype,
        flash_attention=row.flash_attention,
        parameters=parameters(setup.geometry),
        trainable=setup.trainable(["embedding"] if row.legacy_freezing else []),
        memory_gb=need.parts(),
        longest_tokens=round(setup.longest.tokens),
        lengths=setup.lengths,
        peak_moment=need.peak_moment,
        allocated_gb=need.allocated_gb,
        reserved_gb=need.reserved_gb,
        context_gb=need.context_gb,
        fits=fit.verdict,
        micro_batch=setup.micro_batch,
        recompute=setup.recompute,
        largest_micro_batch=fit.largest_micro_batch,
        images_per_second=setup.batch_size / time.seconds,
        step_seconds={item.name: getattr(time, item.name) for item in fields(time) if item.name != "flops"},
        mfu=utilisation(time.flops.model, time.seconds, peak, devices),
        hfu=utilisation(time.flops.hardware, time.seconds, peak, devices),
        steps=steps,
        hours=hours,
        gpu_hours=hours * devices,
        price=price and price * hours * devices,
        energy_kwh=power and power * hours * devices / 1000,
        jobs={name: found for name, found in resources(run, job, root).items() if name in JOB_KINDS[kind]},
    )


def _with_published(planned: Planned, row: SpeedRow, job: Job, run: ResolvedRun, geometry: Geometry) -> Planned:
    """Adds a speed row's published figures, and the predictions for the published code."""
    planned = replace(
        planned,
        published_images_per_second=row.published_images_per_second,
        published_memory_gb=row.published_memory_gb,
    )
    if job.pool.stand_in or row.published_images_per_second is None:
        return planned
    theirs = published_setup(row, geometry, run.hardware[row.hardware])
    need = sum(published_memory(theirs).values())
    return replace(planned, as_published=images_per_second(theirs), as_published_gb=need)


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    name: str
    rows: list[Planned]
    disk: dict[str, float]
    """GB by kind (phi3v.planning.resources.disk_needed), over all rows that run."""
    disk_missing: dict[str, float]
    """The same, without files that already exist."""

    def values(self) -> dict[str, object]:
        """JSON values, in the units of Planned, and the constants used."""
        return {
            "name": self.name,
            "constants": asdict(CONSTANTS),
            "totals": self.totals(),
            "disk_gb": self.disk,
            "disk_missing_gb": self.disk_missing,
            "rows": [{key: value for key, value in asdict(row).items() if value is not None} for row in self.rows],
        }

    def totals(self) -> dict[str, float | None]:
        """Totals over the rows that will run. A total is None if any row's value is unknown, such as an unset price."""
        sums: dict[str, float | None] = {}
        for name in ("gpu_hours", "price", "energy_kwh"):
            values = [getattr(row, name) for row in self.rows if row.runs]
            sums[name] = None if None in values else sum(values)
        return sums

    def table(self) -> str:
        """One line per row, then the totals, the disk, and the rows that do not run."""
        head = f"{'row':32} {'device':11} {'n':>3} {'alloc':>6} {'resvd':>6} {'ctx':>4} {'fits':5} {'micro':>5} {'img/s':>8}"
        lines = [f"{head} {'MFU':>5} {'HFU':>5} {'time':>8} {'device-h':>8} {'kWh':>6} {'price':>8}".rstrip()]
        for row in self.rows:
            if row.hours is None:
                continue
            energy, price = ("" if value is None else f"{value:.1f}" for value in (row.energy_kwh, row.price))
            lines.append(
                f"{row.row:32} {row.device:11} {row.devices:3} {row.allocated_gb:6.1f} {row.reserved_gb:6.1f}"
                f" {row.context_gb:4.1f} {row.fits:5} {row.largest_micro_batch or '-':>5} {row.images_per_second:8.2f}"
                f" {100 * (row.mfu or 0):4.0f}% {100 * (row.hfu or 0):4.0f}% {duration(row.hours):>8}"
                f" {row.gpu_hours:8.2f} {energy:>6} {price:>8}".rstrip()
            )
        lines += [LEGEND, *self.notes()]
        lines += [f"{row.row}: {row.status}" for row in self.rows if row.status != "run"]
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """Totals, price and disk as sentences."""
        totals = self.totals()
        energy, price = totals["energy_kwh"], totals["price"]
        unplanned = sum(row.status.startswith("not planned") for row in self.rows)
        running = sum(row.runs for row in self.rows)
        used = f"rows that run: {running}, in total {totals['gpu_hours'] or 0:.1f} device-hours, "
        used += "energy: unknown (no power_w in the hardware file)" if energy is None else f"{energy:.0f} kWh"
        if unplanned:
            used += f"; rows that could not be planned and are not in the totals: {unplanned}"
        unset = "not set (set `price_per_hour` for each entry under `hardware` in your configuration)"
        sizes = ", ".join(f"{name} {size:.2f} GB" for name, size in self.disk.items())
        total, missing = sum(self.disk.values()), sum(self.disk_missing.values())
        return [
            used,
            f"price: {unset if price is None else f'{price:.2f} in the currency of price_per_hour'}",
            f"disk: {total:.1f} GB ({sizes}); not written yet: {missing:.1f} GB",
        ]

    def page(self) -> str:
        """A self-contained web page without scripts: the table, then every row in detail."""
        details = "\n\n".join(row.detail() for row in self.rows if row.hours is not None)
        texts = {"name": self.name, "table": self.table(), "details": details}
        return PAGE.format(**{key: escape(text, quote=False) for key, text in texts.items()})

    def detail(self, row: str) -> str:
        """The full plan of one row. Raises SettingsError for a row that is not in the plan."""
        found = [item for item in self.rows if row in (item.row, item.table_row)]
        if not found:
            close = difflib.get_close_matches(row, [item.row for item in self.rows], cutoff=0)
            raise SettingsError(
                f"row {row!r}: not in the plan of {self.name}; did you mean one of these: {', '.join(close)}"
            )
        return "\n\n".join(item.detail() for item in found)


def plan_run(run: ResolvedRun, root: Path = Path()) -> Plan:
    """The plan of every selected row, and the reasons of the rows that cannot run."""
    rows = [plan_job(run, job, root) for job in (*run.accuracy, *run.speed)]
    for skipped in run.not_run:
        kind = "accuracy" if isinstance(skipped.row, AccuracyRow) else "speed"
        rows.append(Planned(skipped.row.row, skipped.row.row, kind, f"not run: {skipped.reason}"))
    running = {row.row for row in rows if row.runs}
    return Plan(
        run.settings.name, rows, disk_needed(run, running, root), disk_needed(run, running, root, missing_only=True)
    )
