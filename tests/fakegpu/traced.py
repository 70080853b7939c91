"""What full-size jobs take on the fake GPU, as stored in traced.tsv, for the planner to be held to.

    python -m tests.fakegpu.traced                 measure every row again, beside what is stored (minutes each)
    python -m tests.fakegpu.traced --write         and store what was measured

A row is a job of fakegpu.measure with the longest DocVQA example (17 tiles, 2547 tokens). The second optimizer step is
measured. Full fine-tuning runs under torchrun, also on one GPU.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from phi3v.planning.flops import Setup, example_work
from phi3v.settings import Geometry, Hardware

FILE = Path(__file__).with_suffix(".tsv")
RANK = 32
"""Of adapters, as fakegpu.measure's."""

KINDS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
}


@dataclass(frozen=True)
class Traced:
    """A job and what it took."""

    method: str
    attention: str
    dtype: str
    world: int
    micro_batch: int
    accumulation: int
    """Micro-steps of an optimizer step; the 64 examples of fakegpu.fullsize allow one of 64."""
    recompute_every: int
    """Every which layer is recomputed; 0: none."""
    peak_gb: float
    """Allocated memory, 10^9 bytes."""
    resting_gb: float
    """Allocated between optimizer steps."""
    elementwise_gb: float | None
    """Bytes of a micro-step outside matrix products and fused attention; None if not measured."""

    @property
    def name(self) -> str:
        """For test reports."""
        return " ".join(str(getattr(self, field.name)) for field in fields(self)[:7])

    def job(self) -> dict[str, Any]:
        """The arguments of fakegpu.measure.FullSizeJob."""
        settings: dict[str, Any] = {} if self.recompute_every else {"gradient_checkpointing": False}
        if self.recompute_every > 1:
            settings["recompute_every"] = self.recompute_every
        named = ("method", "attention", "dtype", "world", "micro_batch", "accumulation")
        return {name: getattr(self, name) for name in named} | {"settings": settings}

    def setup(self, geometry: Geometry, hardware: Hardware) -> Setup:
        """The job as the planner sees it."""
        from fakegpu.fullsize import LABELS, TILES, TOKENS

        work = example_work(geometry, TOKENS, TILES, LABELS)
        return Setup(
            geometry, hardware, self.method, self.dtype, self.attention == "flash", work, work,  # type: ignore[arg-type]
            batch_size=self.accumulation * self.world * self.micro_batch, nodes=max(1, self.world // 8), per_node=min(8, self.world),
            micro_batch=self.micro_batch, rank=RANK if "lora" in self.method else 0,
            recompute=1 / self.recompute_every if self.recompute_every else 0.0,
        )  # fmt: skip


def read_traced(file: Path = FILE) -> list[Traced]:
    """The stored rows."""
    kinds = {field.name: KINDS[str(field.type)] for field in fields(Traced)}
    with file.open(encoding="utf-8", newline="") as lines:
        return [
            Traced(**{name: kinds[name](value) for name, value in row.items()})
            for row in csv.DictReader(lines, delimiter="\t")
        ]


def write_traced(rows: Sequence[Traced], file: Path = FILE) -> None:
    """Store the rows."""
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, [field.name for field in fields(Traced)], delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def traced_again(rows: Sequence[Traced]) -> list[Traced]:
    """The rows as measured now."""
    from fakegpu.measure import FullSizeJob, measured

    results = measured([FullSizeJob(**row.job()) for row in rows])
    return [
        replace(
            row, peak_gb=round(found.peak_gb, 3), resting_gb=round(found.resting_gb, 3),
            elementwise_gb=round(found.elementwise_gb, 1),
        )
        for row, found in zip(rows, results, strict=True)
    ]  # fmt: skip


def main() -> None:
    """Measure the stored rows again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="store what was measured")
    chosen = parser.parse_args()
    stored, found = read_traced(), []
    for row in stored:
        found += traced_again([row])
        print(f"{row.name:32} peak {row.peak_gb:8.3f} stored, {found[-1].peak_gb:8.3f} now", flush=True)
        if chosen.write:
            write_traced([*found, *stored[len(found) :]])


if __name__ == "__main__":
    sys.path.insert(0, str(FILE.parent.parent))
    main()
