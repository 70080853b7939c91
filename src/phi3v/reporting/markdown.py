"""The tables in Markdown, laid out as the recipe's page has them, ready to paste."""

from __future__ import annotations

from typing import Any

from phi3v.reporting.tables import GB, METHODS, AccuracyLine, SpeedLine, Tables, hardware_name


def as_markdown(tables: Tables) -> str:
    """All tables of a run."""
    run = tables.run.settings
    parts = [f"# {_text(run.title)}", ""]
    if run.notice:
        parts += [f"**{_text(run.notice)}**", ""]
    for (dataset, model), lines in grouped(tables.accuracy).items():
        parts += [f"## {_text(tables.run.datasets[dataset].title)}, {_text(tables.run.models[model].title)}", ""]
        parts += [*_accuracy(lines), ""]
    for hardware, speed in by_hardware(tables.speed).items():
        parts += [f"## Speed: {_text(tables.run.hardware[hardware].title)}", "", *_speed(speed), ""]
    return "\n".join(parts)


def grouped(lines: list[AccuracyLine]) -> dict[tuple[str, str], list[AccuracyLine]]:
    """Lines by (dataset, model), in the order in which those first occur; in a group as the recipe orders methods and dtypes."""
    groups: dict[tuple[str, str], list[AccuracyLine]] = {}
    for line in lines:
        groups.setdefault((line.row.dataset, line.row.model), []).append(line)
    methods, dtypes = list(METHODS), ["bf16", "fp16", "fp32"]
    for group in groups.values():
        group.sort(key=lambda line: (methods.index(line.row.method), dtypes.index(line.row.dtype)))
    return groups


def by_hardware(lines: list[SpeedLine]) -> dict[str, list[SpeedLine]]:
    """Lines by the published hardware."""
    groups: dict[str, list[SpeedLine]] = {}
    for line in lines:
        groups.setdefault(line.row.hardware, []).append(line)
    return groups


def _accuracy(lines: list[AccuracyLine]) -> list[str]:
    header = [
        "training method",
        "data type",
        "LoRA rank",
        "LoRA alpha",
        "batch size",
        "learning rate",
        "epochs",
        "before",
        "after",
        "95 % interval",
        "published",
    ]
    rows = []
    several = any(line.spread for line in lines)
    if several:
        header.append("seeds")
    for line in lines:
        row = line.row
        after = line.result.passes.get("after") if line.result else None
        ours = (
            [_figure(line.score("before")), _figure(after.score), f"{after.interval[0]:.1f} to {after.interval[1]:.1f}"]
            if after
            else ["", line.status, ""]
        )
        rows.append(
            [METHODS[row.method], row.dtype, row.lora_rank or "-", f"{row.lora_alpha:g}" if row.lora_alpha else "-", row.batch_size,
             f"{row.learning_rate:g}", f"{row.epochs:g}", *ours, _figure(row.published), *([_seeds(line)] if several else [])]
        )  # fmt: skip
    return _table(header, rows)


def _seeds(line: AccuracyLine) -> str:
    """Each seed's score and their standard deviation."""
    if not line.spread:
        return "1"
    return f"{', '.join(_figure(score) for score in line.seed_scores)} (sd {_figure(line.spread['sd'])})"


def _speed(lines: list[SpeedLine]) -> list[str]:
    header = [
        "training method",
        "nodes",
        "GPUs",
        "flash attention",
        "images/s",
        "speed-up",
        "peak GB",
        "published images/s",
        "published speed-up",
    ]
    rows = []
    for line in lines:
        row = line.row
        memory = line.device_memory or line.value("peak_memory_bytes")
        ours = [
            _figure(line.value("images_per_second"), 3),
            f"{line.speedup:.2f}x" if line.speedup else "",
            _figure(memory / GB if memory else None, 1),
        ]
        if line.status != "done":
            ours[0] = line.status
        elif line.value("stand_in"):
            ours[0] += f" (stand-in for {row.nodes * row.gpus_per_node} {hardware_name(row.hardware)})"
        rows.append(
            [f"{METHODS[row.method]} ({line.how})" if line.how else METHODS[row.method], row.nodes, row.nodes * row.gpus_per_node, "yes" if row.flash_attention else "no", *ours,
             _figure(row.published_images_per_second, 3), f"{row.published_speedup:g}x" if row.published_speedup else ""]
        )  # fmt: skip
    return _table(header, rows)


def _figure(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(_text(str(cell)) for cell in row) + " |" for row in rows]


def _text(text: str) -> str:
    """Text that Markdown shows as it is."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
