#!/usr/bin/env python3
"""Fit the planner's constants to the published speed tables, and show how well that holds, leaving each row out, too.

    python benchmarks/calibrate.py                         # the fit, the comparison, the residuals
    python benchmarks/calibrate.py --output_dir FOLDER     # and as files, with a plot

Throughput: the 12 rows that are physically plausible fit four constants; the three frozen rows are not fitted but
predicted, as the published legacy (only the final norm and the head have gradients) and as correct. Memory: the 10 A100
rows fit three constants; the V100 rows show the cards' capacity and are explained, not fitted. Residuals are relative:
predicted over published, less one. The constants in use stand in phi3v.planning (Constants, MemoryConstants).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, TypeVar

from scipy.optimize import least_squares

from phi3v.planning.fits import published_setup
from phi3v.planning.flops import Setup
from phi3v.planning.memory import MemoryConstants, published_memory
from phi3v.planning.step_time import Constants, images_per_second
from phi3v.settings import Hardware, Model, SpeedRow, read_entries
from phi3v.settings.rows import read_table

SPEED_CONSTANTS = ("matmul_efficiency", "bandwidth_efficiency", "layer_seconds", "link_efficiency")
MEMORY_CONSTANTS = ("runtime_gb", "optimizer_bytes", "cached_scores")


@dataclass(frozen=True)
class Published:
    """A published row and the setup that stands for what its script ran."""

    row: SpeedRow
    setup: Setup


def published_rows(root: Path = Path()) -> list[Published]:
    """The 15 rows of config/speed.tsv with a published figure."""
    hardware = read_entries(["config/hardware.yaml"], Hardware, root)
    models = read_entries(["config/models.yaml"], Model, root)
    listed = []
    for row in read_table("config/speed.tsv", SpeedRow, root):
        geometry = models[row.model].geometry
        if row.published_images_per_second and geometry:
            listed.append(Published(row, published_setup(row, geometry, hardware[row.hardware])))
    return listed


def throughput_residual(item: Published, constants: Constants) -> float:
    """Logarithm of predicted over published images a second."""
    return math.log(images_per_second(item.setup, constants) / float(item.row.published_images_per_second or 0))


def memory_residual(item: Published, constants: MemoryConstants) -> float:
    """Logarithm of predicted over published peak memory."""
    return math.log(sum(published_memory(item.setup, constants).values()) / float(item.row.published_memory_gb or 0))


Fitted = TypeVar("Fitted", Constants, MemoryConstants)


def fit(
    rows: Sequence[Published], names: Sequence[str], residual: Callable[[Published, Fitted], float], start: Fitted
) -> Fitted:
    """Constants `names` with the least sum of squared residuals, found in their logarithms."""

    def constants(logs: Sequence[float]) -> Fitted:
        return replace(start, **{name: math.exp(value) for name, value in zip(names, logs, strict=True)})

    found = least_squares(
        lambda logs: [residual(row, constants(logs)) for row in rows],
        [math.log(getattr(start, name)) for name in names],
        xtol=1e-10,
    )
    return constants(found.x.tolist())


@dataclass(frozen=True)
class Compared:
    """A published row beside its prediction; `left_out` is the relative error with constants fitted without the row."""

    row: str
    what: str
    published: float
    predicted: float
    left_out: float | None
    note: str = ""

    @property
    def error(self) -> float:
        """Predicted over published, less one."""
        return self.predicted / self.published - 1


def speed_rows(rows: Sequence[Published]) -> list[Published]:
    """The rows whose published throughput is physically plausible: all but the frozen ones."""
    return [item for item in rows if item.row.method != "frozen"]


def memory_rows(rows: Sequence[Published]) -> list[Published]:
    """The rows whose published memory is a measurement of need: A100."""
    return [item for item in rows if item.row.hardware == "a100-80gb"]


def calibrate(rows: Sequence[Published]) -> tuple[Constants, MemoryConstants]:
    """All fitted constants; the defaults of the two classes are these, and a test holds them to this fit."""
    return (
        fit(speed_rows(rows), SPEED_CONSTANTS, throughput_residual, Constants()),
        fit(memory_rows(rows), MEMORY_CONSTANTS, memory_residual, MemoryConstants()),
    )


def compare(
    rows: Sequence[Published], constants: Constants | None = None, memory: MemoryConstants | None = None
) -> list[Compared]:
    """Every published figure beside its prediction: 15 throughputs, 3 frozen rows as correct, 15 memory peaks."""
    return [*_throughputs(rows, constants or Constants()), *_peaks(rows, memory or MemoryConstants())]


def _without(
    item: Published, members: Sequence[Published], names: Sequence[str],
    residual: Callable[[Published, Fitted], float], constants: Fitted,
) -> float | None:  # fmt: skip
    """Relative error of a row with constants fitted to the others; None for a row that is not fitted."""
    if item not in members:
        return None
    rest = fit([other for other in members if other is not item], names, residual, constants)
    return math.exp(residual(item, rest)) - 1


def _throughputs(rows: Sequence[Published], constants: Constants) -> list[Compared]:
    members, listed = speed_rows(rows), []
    for item in rows:
        published = float(item.row.published_images_per_second or 0)
        without = _without(item, members, SPEED_CONSTANTS, throughput_residual, constants)
        note = "" if item in members else "not fitted: as the published legacy, forward only but for the head"
        predicted = images_per_second(item.setup, constants)
        listed.append(Compared(item.row.row, "img/s", published, predicted, without, note))
        if item.row.method == "frozen":
            correct = images_per_second(replace(item.setup, method="frozen"), constants)
            listed.append(Compared(item.row.row, "img/s", published, correct, None, "as correct: the decoder trains"))
    return listed


def _peaks(rows: Sequence[Published], constants: MemoryConstants) -> list[Compared]:
    members, listed = memory_rows(rows), []
    for item in rows:
        without = _without(item, members, MEMORY_CONSTANTS, memory_residual, constants)
        note = "" if item in members else v100_note(item.setup, constants)
        predicted = device_reading_gb(item.setup, constants)
        listed.append(Compared(item.row.row, "GB", float(item.row.published_memory_gb or 0), predicted, without, note))
    return listed


# ZeRO's shard while it rests: float32 weight, two moments, float32 gradient; adapters the same, whole on each device.
SHARD_BYTES = 16


def total_and_floor(setup: Setup, constants: MemoryConstants) -> tuple[float, float]:
    """GB of the published code's peak with room for everything, and of the least it runs in if all is freed that can be."""
    need = published_memory(setup, constants)
    resting = SHARD_BYTES * setup.trained / (1 if setup.adapters else setup.devices) / 1e9
    # One layer's gradients stay: they are reduced together.
    backward = need["gradients"] / (setup.geometry.num_hidden_layers + 1) + resting
    backward += sum(size for name, size in need.items() if name not in ("gradients", "optimizer", "cached scores"))
    stepping = sum(need[name] for name in ("weights", "optimizer", "buckets", "runtime"))
    return sum(need.values()), max(backward, stepping)


def device_state(setup: Setup, constants: MemoryConstants) -> Literal["fits", "the card is full", "does not fit"]:
    """How the published code fits its device: with room, with the device full, or not at all."""
    (total, floor), capacity = total_and_floor(setup, constants), setup.hardware.memory_gb
    if capacity is None or total <= capacity:
        return "fits"
    return "the card is full" if floor <= capacity else "does not fit"


def device_reading_gb(setup: Setup, constants: MemoryConstants) -> float:
    """What a reading of the device shows at the published code's peak: the total, or the capacity if the job fills it."""
    return min(total_and_floor(setup, constants)[0], setup.hardware.memory_gb or math.inf)


def v100_note(setup: Setup, constants: MemoryConstants) -> str:
    """Why a card's published peak is what it is."""
    total, floor = total_and_floor(setup, constants)
    why = f"takes {total:.0f} GB if there is room, cannot do with less than {floor:.0f} GB"
    return f"{why}: {device_state(setup, constants)}"


def table(compared: Sequence[Compared]) -> str:
    """The comparison as text, a line a figure."""
    lines = [f"{'row':30} {'':5} {'published':>9} {'predicted':>9} {'error':>7} {'left out':>8}  note"]
    for item in compared:
        without = "" if item.left_out is None else f"{100 * item.left_out:+.1f}%"
        lines.append(
            f"{item.row:30} {item.what:5} {item.published:9.3f} {item.predicted:9.3f} {100 * item.error:+6.1f}%"
            f" {without:>8}  {item.note}".rstrip()
        )
    return "\n".join(lines)


def plot(compared: Sequence[Compared]) -> str:
    """Predicted over published for every figure as an SVG picture; the band is ±15 %."""
    shown = [item for item in compared if not item.note.startswith("as correct")]
    width, top, line = 860, 40, 17
    height = top + line * len(shown) + 34

    def x(ratio: float) -> float:
        return 330 + (ratio - 0.6) * 620

    body = [
        f'<rect x="{x(0.85):.0f}" y="{top - 8}" width="{x(1.15) - x(0.85):.0f}" height="{line * len(shown) + 8}"'
        ' fill="#dfeaf5"/>',
        f'<line x1="{x(1):.0f}" x2="{x(1):.0f}" y1="{top - 8}" y2="{top + line * len(shown)}" stroke="#555"/>',
        '<text x="10" y="20" font-weight="bold">Predicted over published (band: ±15 %)</text>',
    ]
    for index, item in enumerate(shown):
        y = top + line * index + 8
        colour = "#999" if item.left_out is None else "#1f6fb4" if item.what == "img/s" else "#c2571a"
        body.append(f'<text x="10" y="{y}">{item.row}, {item.what}</text>')
        body.append(f'<circle cx="{x(item.predicted / item.published):.1f}" cy="{y - 4}" r="5" fill="{colour}"/>')
        if item.left_out is not None:
            body.append(f'<circle cx="{x(1 + item.left_out):.1f}" cy="{y - 4}" r="5" fill="none" stroke="{colour}"/>')
    for ratio in (0.7, 0.85, 1, 1.15, 1.3):
        body.append(f'<text x="{x(ratio):.0f}" y="{height - 18}" text-anchor="middle">{ratio:g}</text>')
    body.append(
        f'<text x="10" y="{height - 4}">filled: all rows fitted; open: fitted without the row; grey: not fitted</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif"'
        ' font-size="11">'
        '<rect width="100%" height="100%" fill="white"/>' + "".join(body) + "</svg>\n"
    )


def constants_table(rows: Sequence[Published]) -> str:
    """The constants in use beside a fresh fit."""
    speed, memory = calibrate(rows)
    return "\n".join((*_lines(Constants(), speed), *_lines(MemoryConstants(), memory)))


def _lines(used: Fitted, found: Fitted) -> list[str]:
    listed = []
    for item in fields(used):
        fresh = f"{getattr(found, item.name):.4g}" if item.metadata.get("fitted", True) else "chosen"
        listed.append(f"{item.name:22} {getattr(used, item.name):<8.4g} fit {fresh:8} {item.metadata['unit']}")
    return listed


def main() -> None:
    """Parse, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="also write planner.txt and planner.svg there")
    given = parser.parse_args()
    rows = published_rows()
    compared = compare(rows)
    text = f"{constants_table(rows)}\n\n{table(compared)}\n"
    if given.output_dir:
        given.output_dir.mkdir(parents=True, exist_ok=True)
        (given.output_dir / "planner.txt").write_text(text, encoding="utf-8")
        (given.output_dir / "planner.svg").write_text(plot(compared), encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
