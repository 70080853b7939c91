"""Budgets of full-size training on the fake GPU: what a micro-step may cost, and which line made it dearer.

    python -m tests.fakegpu.budgets                  measure every job of budgets.yaml and print the table
    python -m tests.fakegpu.budgets "lora flash"     only jobs whose name begins so
    python -m tests.fakegpu.budgets --write          and store the figures as the new budgets

budgets.yaml holds the figures; breakdown.tsv holds where they come from, so that a regression can be named.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from .measure import FullSizeJob, Measured, measured

FILE = Path(__file__).with_name("budgets.yaml")
BREAKDOWN = Path(__file__).with_name("breakdown.tsv")
TOLERANCE = 0.02
"""Relative; counts of waits and copies must not grow at all."""
QUANTITIES = (
    "host_waits", "blocking_copies", "forward_operators", "backward_operators", "products_gb", "attention_gb",
    "elementwise_gb", "all_gb", "reduction_waits", "reduction_gb", "communication_gb", "peak_gb",
)  # fmt: skip
_EXACT = ("host_waits", "blocking_copies", "reduction_waits")
# Which breakdown explains a quantity.
_EXPLAINED_BY = {
    "forward_operators": "operators", "backward_operators": "operators", "blocking_copies": "copies", "reduction_waits": "host_waits",
    "all_gb": "elementwise_gb",
}  # fmt: skip
ROWS = 20
"""Largest rows of a breakdown that are stored."""
_HEADER = ("job", "quantity", "amount", "operator", "source")
Rows = list[list[Any]]
"""[amount, operator, source] each."""


@dataclass(frozen=True)
class Budget:
    """An entry of budgets.yaml."""

    job: FullSizeJob
    before: dict[str, float]
    """At commit 18b3476, before this harness was there."""
    budget: dict[str, float]


def read_budgets() -> list[Budget]:
    """The entries of budgets.yaml."""
    entries = yaml.safe_load(FILE.read_text(encoding="utf-8"))["budgets"]
    return [Budget(FullSizeJob(**entry["job"]), entry.get("before", {}), entry.get("budget", {})) for entry in entries]


def exceeded(budget: Budget, result: Measured) -> list[str]:
    """A line for each quantity over its budget, followed by the operators and lines that grew."""
    stored = read_breakdown()
    values = asdict(result)
    lines = []
    for name, allowed in budget.budget.items():
        tolerance = 0 if name in _EXACT else TOLERANCE * allowed
        if values[name] <= allowed + tolerance:
            continue
        lines.append(f"{result.job}: {name} {values[name]:,.2f}; budget {allowed:,.2f}")
        source = _EXPLAINED_BY.get(name, name)
        lines += grown(stored.get((result.job, source), []), result.sources.get(source, []))
    return lines


def read_breakdown() -> dict[tuple[str, str], Rows]:
    """breakdown.tsv: (job, quantity) to rows."""
    found: dict[tuple[str, str], Rows] = {}
    if BREAKDOWN.is_file():
        with BREAKDOWN.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                rows = found.setdefault((row["job"], row["quantity"]), [])
                rows.append([float(row["amount"]), row["operator"], row["source"]])
    return found


def grown(before: Rows, now: Rows, most: int = 12) -> list[str]:
    """The rows that grew most; without line numbers, which move. A row that was not stored was no larger than these."""
    old = _by_text(before)
    least = min(old.values()) if len(before) >= ROWS else 0.0
    growth = [(amount - old.get(key, least), amount, *key) for key, amount in _by_text(now).items()]
    rows = sorted((row for row in growth if row[0] > 0.005), reverse=True)[:most]
    return [f"    +{more:,.2f} to {amount:,.2f}  {operator}  {source}" for more, amount, operator, source in rows]


def _by_text(rows: Rows) -> dict[tuple[str, str], float]:
    sums: dict[tuple[str, str], float] = {}
    for amount, operator, source in rows:
        key = (operator, re.sub(r"(\.py):\d+", r"\1", source))
        sums[key] = sums.get(key, 0.0) + amount
    return sums


def figures(result: Measured) -> dict[str, float]:
    """The quantities of a budget, rounded for the file."""
    values = asdict(result)
    return {name: round(values[name], 2 if name.endswith("_gb") else 1) for name in QUANTITIES}


def table(pairs: list[tuple[Budget, Measured | None]]) -> str:
    """Jobs against quantities: before -> budget -> measured."""
    lines = []
    for budget, result in pairs:
        lines.append(budget.job.name)
        now = figures(result) if result else {}
        for name in QUANTITIES:
            columns = [side.get(name) for side in (budget.before, budget.budget, now)]
            lines.append(f"  {name:20s}" + "".join(f"{'' if c is None else format(c, ',.2f'):>14s}" for c in columns))
    return "\n".join([f"{'':22s}{'before':>14s}{'budget':>14s}{'measured':>14s}", *lines])


def write(budgets: list[Budget], results: dict[str, Measured]) -> None:
    """Store measured figures as budgets, with their breakdown; entries that were not measured stay."""
    document = FILE.read_text(encoding="utf-8").partition("budgets:")[0] + "budgets:\n"
    breakdown = read_breakdown()
    for budget in budgets:
        result = results.get(budget.job.name)
        now = figures(result) if result else budget.budget
        given = {key: value for key, value in asdict(budget.job).items() if value != _DEFAULTS.get(key)}
        document += f"  - job: {json.dumps(given)}\n"
        document += f"    before: {_flow(budget.before)}\n    budget: {_flow(now)}\n"
        if result:
            breakdown |= {(result.job, quantity): rows[:ROWS] for quantity, rows in result.sources.items()}
    FILE.write_text(document, encoding="utf-8")
    with BREAKDOWN.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(_HEADER)
        for (job, quantity), rows in sorted(breakdown.items()):
            writer.writerows([job, quantity, f"{amount:.4g}", operator, source] for amount, operator, source in rows)


_DEFAULTS = asdict(FullSizeJob(""))


def _flow(values: dict[str, float]) -> str:
    return (
        "{"
        + ", ".join(f"{name}: {value:g}" if value < 1e6 else f"{name}: {value}" for name, value in values.items())
        + "}"
    )


def main() -> None:
    """Measure, print, and store on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of job names (default: all)")
    parser.add_argument("--write", action="store_true", help="store the measured figures as budgets")
    chosen = parser.parse_args()
    budgets = read_budgets()
    wanted = [b for b in budgets if not chosen.names or any(b.job.name.startswith(name) for name in chosen.names)]
    results = {result.job: result for result in measured([b.job for b in wanted], top=400)}
    print(table([(budget, results[budget.job.name]) for budget in wanted]))
    if chosen.write:
        write(budgets, results)


if __name__ == "__main__":
    main()
