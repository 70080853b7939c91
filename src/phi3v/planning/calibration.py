"""The constants' fit to the published speed tables, and how well it holds: residuals, leaving each row out, too.

    python scripts/plan.py --published                      # the fit, the comparison, the residuals
    python scripts/plan.py --published --output_dir FOLDER  # and as files, with a plot

Throughput: the 12 rows that are physically plausible fit four constants; the three frozen rows are not fitted but
predicted, as the published legacy (only the final norm and the head have gradients) and as correct. Memory: the 10 A100
rows fit three constants; the V100 rows show the cards' capacity and are explained, not fitted. Residuals are relative:
predicted over published, less one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from phi3v.planning.published import (
    MemoryConstants,
    device_reading_gb,
    device_state,
    published_memory,
    published_setup,
)
from phi3v.planning.roofline import images_per_second
from phi3v.planning.setup import Constants, Setup
from phi3v.settings import Hardware, Model, SpeedRow, read_entries, read_table

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
    return math.log(published_memory(item.setup, constants).total_gb / float(item.row.published_memory_gb or 0))


Fitted = TypeVar("Fitted", Constants, MemoryConstants)


def fit(
    rows: Sequence[Published], names: Sequence[str], residual: Callable[[Published, Fitted], float], start: Fitted
) -> Fitted:
    """Constants `names` with the least sum of squared residuals: Gauss-Newton on their logarithms, step halving."""
    values = [math.log(getattr(start, name)) for name in names]

    def at(logs: Sequence[float]) -> list[float]:
        constants = replace(start, **{name: math.exp(value) for name, value in zip(names, logs, strict=True)})
        return [residual(row, constants) for row in rows]

    for _ in range(30):
        here = at(values)
        slopes = []
        for index in range(len(values)):
            moved = [value + 1e-4 * (index == i) for i, value in enumerate(values)]
            slopes.append([(b - a) / 1e-4 for a, b in zip(here, at(moved), strict=True)])
        # A little damping keeps a constant that no row of the rest depends on where it was.
        normal = [
            [sum(map(float.__mul__, p, q)) + 1e-3 * (i == k) for k, q in enumerate(slopes)]
            for i, p in enumerate(slopes)
        ]
        step = _solve(normal, [-sum(map(float.__mul__, slope, here)) for slope in slopes])
        base, size = sum(r * r for r in here), 1.0
        while size > 1e-3 and sum(r * r for r in at([v + size * d for v, d in zip(values, step, strict=True)])) > base:
            size /= 2
        values = [v + size * d for v, d in zip(values, step, strict=True)]
        if max(abs(size * d) for d in step) < 1e-7:
            break
    return replace(start, **{name: math.exp(value) for name, value in zip(names, values, strict=True)})


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination of a small positive definite system."""
    rows = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    for i, pivot in enumerate(rows):
        for k in range(i + 1, len(rows)):
            factor = rows[k][i] / pivot[i]
            rows[k] = [x - factor * y for x, y in zip(rows[k], pivot, strict=True)]
    found = [0.0] * len(rows)
    for i in reversed(range(len(rows))):
        found[i] = (rows[i][-1] - sum(rows[i][k] * found[k] for k in range(i + 1, len(rows)))) / rows[i][i]
    return found


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


def v100_note(setup: Setup, constants: MemoryConstants) -> str:
    """Why a card's published peak is what it is."""
    need = published_memory(setup, constants)
    why = f"takes {need.total_gb:.0f} GB if there is room, cannot do with less than {need.floor_gb:.0f} GB"
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
