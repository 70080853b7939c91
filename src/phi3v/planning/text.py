"""The plan as text: a table of all rows, its sums as sentences, and everything about one row."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phi3v.planning.plan import Plan, Planned

LEGEND = """\
n: devices. Memory of one device, GB, predicted for this project's code: alloc: live tensors at the peak; resvd: what
PyTorch's allocator holds; ctx: CUDA context and NCCL. A reading of the device (nvidia-smi) shows resvd + ctx.
fits: yes; tight (works only if PyTorch frees cached memory; slower); no. micro: largest micro-batch that fits. img/s: over all devices. MFU, HFU: share of the dense peak, without and with recomputation.
A CPU's peak is calibrated on one machine (docs/planner.md), so its figures are rough elsewhere.
time: training (or timing) and evaluation. device-h: time x devices. kWh: at the boards' full power."""


def duration(hours: float) -> str:
    """Hours, minutes or seconds, whichever reads best: "12.3 h", "45 min", "20 s"."""
    if hours >= 2:
        return f"{hours:.1f} h"
    return f"{60 * hours:.0f} min" if hours >= 1 / 30 else f"{3600 * hours:.0f} s"


def table(plan: Plan) -> str:
    """A line a row, then the sums, the disk, and the rows that cannot run."""
    head = (
        f"{'row':32} {'device':11} {'n':>3} {'alloc':>6} {'resvd':>6} {'ctx':>4} {'fits':5} {'micro':>5} {'img/s':>8}"
    )
    lines = [f"{head} {'MFU':>5} {'HFU':>5} {'time':>8} {'device-h':>8} {'kWh':>6} {'price':>8}".rstrip()]
    for row in plan.rows:
        if row.hours is None:
            continue
        energy, price = ("" if value is None else f"{value:.1f}" for value in (row.energy_kwh, row.price))
        lines.append(
            f"{row.row:32} {row.device:11} {row.devices:3} {row.allocated_gb:6.1f} {row.reserved_gb:6.1f}"
            f" {row.context_gb:4.1f} {row.fits:5} {row.largest_micro_batch or '-':>5} {row.images_per_second:8.2f} {100 * (row.mfu or 0):4.0f}%"
            f" {100 * (row.hfu or 0):4.0f}% {duration(row.hours):>8} {row.gpu_hours:8.2f} {energy:>6}"
            f" {price:>8}".rstrip()
        )
    lines += [LEGEND, *notes(plan)]
    lines += [f"{row.row}: {row.status}" for row in plan.rows if row.status != "run"]
    return "\n".join(lines)


def notes(plan: Plan) -> list[str]:
    """Sums, price and disk as sentences, for the table and the page."""
    totals = plan.totals()
    device_hours, energy, price = totals["gpu_hours"], totals["energy_kwh"], totals["price"]
    running = sum(row.hours is not None and not row.status.startswith("not run") for row in plan.rows)
    unplanned = sum(row.status.startswith("not planned") for row in plan.rows)
    used = f"rows that run: {running}, together {device_hours or 0:.1f} device-hours"
    used += f", {energy:.0f} kWh" if energy is not None else ", energy: not known (no board power in the hardware file)"
    if unplanned:
        used += f"; rows that could not be planned and are in no sum: {unplanned}"
    unset = "price: not set (`price_per_hour` of each entry under `hardware` in your configuration)"
    sizes = ", ".join(f"{name} {size:.2f} GB" for name, size in plan.disk.items())
    total, missing = sum(plan.disk.values()), sum(plan.disk_missing.values())
    return [
        used,
        f"price: {price:.2f} in the currency of price_per_hour" if price is not None else unset,
        f"disk: {total:.1f} GB ({sizes}); still to be written: {missing:.1f} GB",
    ]


def detail(row: Planned) -> str:
    """Parameters, memory, time and cluster jobs of one row, part by part."""
    if row.hours is None:
        return f"{row.row}: {row.status}"
    flash = "flash attention" if row.flash_attention else "eager attention"
    lines = [f"{row.row}: {row.status}; {row.method}, {row.dtype}, {flash} on {row.devices} x {row.device}"]

    def parts(title: str, values: dict[str, float] | None, total: str) -> None:
        shown = {name: value for name, value in (values or {}).items() if value}
        listed = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        lines.append(f"  {title:30} {total:>9} = {listed}")

    millions = {name: count / 1e6 for name, count in (row.parameters or {}).items()}
    trained = {name: count / 1e6 for name, count in (row.trainable or {}).items()}
    parts("parameters, millions", millions, f"{sum(millions.values()):.4g}")
    parts("of these trained, millions", trained, f"{sum(trained.values()):.4g}")
    parts("allocated per device, GB", row.memory_gb, f"{row.allocated_gb:.4g}")
    lines.append(
        f"  peak in: {row.peak_moment}; reserved {row.reserved_gb:.4g} GB, context {row.context_gb:.4g} GB; micro-batch"
        f" {row.micro_batch}, {100 * (row.recompute or 0):.0f} % of the layers recomputed"
    )
    if row.as_published_gb is not None:
        published = "" if row.published_memory_gb is None else f", published {row.published_memory_gb:.4g} GB"
        lines.append(
            f"  published code: {row.as_published_gb:.4g} GB predicted for the whole device{published};"
            f" {row.as_published:.4g} images/s predicted, published {row.published_images_per_second:.4g}"
        )
    parts("an optimizer step, s", row.step_seconds, f"{sum((row.step_seconds or {}).values()):.4g}")
    lines.append(f"  {row.steps} steps, {duration(row.hours)} with evaluation, {row.gpu_hours:.2f} device-hours")
    for name, job in (row.jobs or {}).items():
        asked = ", ".join(f"{key} {value}" for key, value in job.items() if value not in ("", None))
        lines.append(f"  {name} job: {asked}")
    return "\n".join(lines)
