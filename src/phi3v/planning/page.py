"""The plan as a part of a page: tables without scripts or outside files, for the report to take in."""

from __future__ import annotations

from html import escape
from typing import Any

COLUMNS = (
    ("row", "row", ""),
    ("device", "device", ""),
    ("devices", "n", "d"),
    ("allocated_gb", "allocated GB", ".1f"),
    ("reserved_gb", "reserved GB", ".1f"),
    ("context_gb", "context GB", ".1f"),
    ("fits", "fits", ""),
    ("published_memory_gb", "published GB (device)", ".0f"),
    ("as_published_gb", "published code, predicted GB (device)", ".1f"),
    ("micro_batch", "micro-batch", "d"),
    ("largest_micro_batch", "largest micro-batch", "d"),
    ("recompute", "recomputed layers", ".0%"),
    ("images_per_second", "img/s", ".2f"),
    ("published_images_per_second", "published img/s", ".3f"),
    ("as_published", "published code, predicted img/s", ".2f"),
    ("mfu", "MFU", ".0%"),
    ("hfu", "HFU", ".0%"),
    ("hours", "hours", ".2f"),
    ("gpu_hours", "device-hours", ".2f"),
    ("energy_kwh", "kWh", ".1f"),
    ("price", "price", ".2f"),
    ("disk_gb", "disk GB", ".1f"),
)


def plan_html(plan: dict[str, Any]) -> str:
    """A `<section>` from the values of plan.json (Plan.as_dict)."""
    planned = [row for row in plan["rows"] if "hours" in row]
    others = [row for row in plan["rows"] if row["status"] != "run"]
    head = "".join(f"<th>{escape(title)}</th>" for _, title, _ in COLUMNS)
    lines = [
        '<section id="plan">',
        "<h2>Plan</h2>",
        "<p>Predicted before anything ran: FLOP and bytes counted from the layer sizes, with constants calibrated on"
        " the published speed tables. <em>Allocated</em>: live tensors at the peak. <em>Reserved</em>: what PyTorch's"
        " allocator holds, cached blocks included. <em>Context</em>: what the process takes beside it. A reading of the"
        " device (nvidia-smi) shows reserved and context together; the published memory is very likely such a reading"
        " (an inference). <em>Published code</em>: the prediction for what the recipe's scripts ran on the published"
        " hardware; frozen rows there very likely ran the decoder forward only (an inference).</p>",
        f"<table><thead><tr>{head}</tr></thead><tbody>",
    ]
    for row in planned:
        cells = "".join(f"<td>{escape(_cell(row.get(key), form))}</td>" for key, _, form in COLUMNS)
        lines.append(f"<tr>{cells}</tr>")
    lines.append("</tbody></table>")
    lines += [f"<p>{escape(note)}</p>" for note in plan["notes"]]
    lines.append("<details><summary>Each row part by part</summary><pre>")
    lines += [escape(detail) + "\n" for detail in plan["details"]]
    lines.append("</pre></details>")
    if others:
        items = "".join(f"<li><code>{escape(row['row'])}</code>: {escape(row['status'])}</li>" for row in others)
        lines.append(f"<h3>Rows that do not run here</h3><ul>{items}</ul>")
    return "\n".join([*lines, "</section>", ""])


def _cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
