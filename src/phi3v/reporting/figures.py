"""Plots as data for the page's Plotly.

Colours are names of the page's CSS variables, so that they differ between light mode, dark mode and print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3v.reporting.columns import METHODS, attention
from phi3v.reporting.join import AccuracyLine, SpeedLine

METRICS = {"anls": "ANLS", "official_anls": "official ANLS", "auroc": "AUROC"}
Json = dict[str, object]


@dataclass(frozen=True)
class Figure:
    """One plot."""

    id: str
    title: str
    text: str
    """Description for screen readers."""
    traces: Sequence[Json]
    layout: Json
    columns: Sequence[str]
    """Column names of the table with the plot's numbers."""
    rows: Sequence[Sequence[object]]


def _axis(title: str, **more: object) -> Json:
    return {"title": {"text": title}, **more}


def _of_rows(labels: list[str]) -> Json:
    """An axis of row ids."""
    return {"type": "category", "categoryorder": "array", "categoryarray": labels}


def _colour(number: int) -> str:
    return f"--series-{number % 8}"


def _marks(name: str, points: Sequence[tuple[str, float]], colour: str, symbol: str, size: int) -> Json:
    """A trace of marks at (row, value)."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [x for _, x in points],
        "y": [y for y, _ in points],
        "marker": {"color": colour, "symbol": symbol, "size": size, "line": {"width": 2, "color": colour}},
        "hovertemplate": f"%{{y}}<br>{name} %{{x:.1f}}<extra></extra>",
    }


def _curve(name: str, x: Sequence[object], y: Sequence[object], colour: str, hover: str, **more: object) -> Json:
    """A trace of connected points."""
    line = {"color": colour, "width": 1.8}
    trace = {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": line}
    return {**trace, "hovertemplate": f"{hover}<extra></extra>", **more}


def forest(dataset: str, title: str, lines: list[AccuracyLine], comparable: bool) -> Figure | None:
    """A dataset's scores, one line per row: after with its interval, before, control, published. None without
    results."""
    finished = [(line, line.after) for line in lines if line.after][::-1]
    if not finished:
        return None
    rows = [line for line, _ in finished]
    metric = METRICS.get(finished[0][1].metric, finished[0][1].metric)
    published = "published" if comparable else "published (not comparable)"
    marks: list[tuple[str, list[tuple[str, float | None]], str, str, int]] = [
        ("before", [(line.row.row, line.score("before")) for line in rows], "--before", "circle-open", 9),
        ("swapped pictures", [(line.row.row, line.score("control")) for line in rows], "--control", "x-thin-open", 9),
        (published, [(line.row.row, line.row.published) for line in rows], "--published", "diamond-open", 10),
        ("each seed", [(line.row.row, x) for line in rows for x in line.seed_scores], "--after", "line-ns-open", 12),
    ]
    traces = []
    for name, values, colour, symbol, size in marks:
        points = [(row, value) for row, value in values if value is not None]
        if points:
            traces.append(_marks(name, points, colour, symbol, size))
    scores = [(line.row.row, after.score) for line, after in finished]
    ours = _marks("after, 95 % interval", scores, "--after", "square", 9)
    bars = {
        "array": [after.interval[1] - after.score for _, after in finished],
        "arrayminus": [after.score - after.interval[0] for _, after in finished],
    }
    ours["error_x"] = {"type": "data", "symmetric": False, "thickness": 2, "width": 4, "color": "--after", **bars}
    ours["customdata"] = [[*after.interval, after.n] for _, after in finished]
    interval = "[%{customdata[0]:.1f}, %{customdata[1]:.1f}], n = %{customdata[2]}"
    ours["hovertemplate"] = f"%{{y}}<br>after %{{x:.1f}} {interval}<extra></extra>"
    numbers = []
    for line, after in reversed(finished):
        each = ", ".join(f"{score:.1f}" for score in line.seed_scores) or "1"
        own = [line.score("before"), after.score, *after.interval, line.score("control"), line.row.published]
        numbers.append([line.row.row, *own, each])
    xaxis = _axis(f"{metric} (0–100)", range=[-2, 102])
    yaxis = _of_rows([line.row.row for line in rows])
    return Figure(
        f"forest-{dataset}",
        f"{title}: {metric} of each row",
        f"{len(finished)} rows, each with its scores before and after training and with swapped pictures, and the "
        "published score.",
        [*traces, ours],
        {"height": 130 + 34 * len(finished), "xaxis": xaxis, "yaxis": yaxis, "hovermode": "closest"},
        ["row", "before", "after", "low", "high", "pictures swapped", "published", "seeds"],
        numbers,
    )


def losses(dataset: str, title: str, lines: list[AccuracyLine]) -> Figure | None:
    """Training loss of every row of a dataset over the epochs."""
    models = {line.row.model for line in lines}

    def short(row: str) -> str:
        """Shortens a row id: the title names the dataset, and a single model's name is redundant."""
        model, found, rest = row.partition(f"-{dataset}-")
        return (rest if len(models) == 1 else f"{model} {rest}") if found else row

    traces: list[Json] = []
    rows = []
    for job in (job for line in lines for job in line.jobs):
        if curve := job.training.curve:
            row = job.row.row
            x, y = [point.get("epoch") for point in curve], [point.get("loss") for point in curve]
            hover = f"{row}<br>epoch %{{x:.2f}}, loss %{{y:.4f}}"
            traces.append(_curve(short(row), x, y, _colour(len(traces)), hover))
            rows.append([row, y[0], y[-1], curve[-1].get("step"), x[-1]])
    if not traces:
        return None
    # As high as the plot of the scores next to it.
    height = max(240, 130 + 34 * sum(line.after is not None for line in lines))
    return Figure(
        f"losses-{dataset}",
        f"{title}: training loss",
        f"Loss over epochs of {len(traces)} rows.",
        traces,
        {"height": height, "xaxis": _axis("epoch"), "yaxis": _axis("loss", rangemode="tozero")},
        ["row", "first loss", "last loss", "steps", "epochs"],
        rows,
    )


def tokens(name: str, title: str, statistics: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Tokens per example of a dataset, with a step line for each split of statistics.json."""
    traces: list[Json] = []
    rows: list[list[object]] = []
    for number, (split, facts) in enumerate(statistics.items()):
        histogram = facts.get("histogram") or {}
        counts, edges = histogram.get("counts") or [], histogram.get("edges") or []
        if not counts or len(edges) != len(counts) + 1:
            continue
        share = [100 * count / max(sum(counts), 1) for count in counts]
        hover = f"{split}: %{{y:.1f}} % from %{{x:.0f}} tokens"
        line = {"shape": "hv", "color": _colour(number), "width": 1.5}
        traces.append(_curve(split, edges, [*share, share[-1]], "", hover, fill="tozeroy", line=line))
        rows += [[split, low, high, count] for low, high, count in zip(edges, edges[1:], counts, strict=False)]
    if not traces:
        return None
    xaxis = _axis("tokens, including those of the pictures", rangemode="tozero")
    return Figure(
        f"tokens-{name}",
        f"{title}: tokens per example",
        f"Share of the examples by number of tokens, {len(traces)} splits.",
        traces,
        {"height": 240, "xaxis": xaxis, "yaxis": _axis("% of the examples", rangemode="tozero")},
        ["split", "from", "to", "examples"],
        rows,
    )


def curves(line: AccuracyLine) -> Figure | None:
    """Loss, learning rate and throughput of one row over its optimizer steps."""
    curve = line.training.curve
    if not curve:
        return None
    steps = [point.get("step") for point in curve]
    parts = [
        ("loss", "loss", "--after", ".4f"),
        ("learning_rate", "learning rate", "--published", ".2e"),
        ("images_per_second", "images/s", "--before", ".1f"),
    ]
    parts = [part for part in parts if any(point.get(part[0]) is not None for point in curve)]
    layout: Json = {"height": 130 + 110 * len(parts), "showlegend": False, "hovermode": "x unified"}
    layout["xaxis"] = _axis("optimizer step", anchor="y" if len(parts) == 1 else f"y{len(parts)}")
    traces = []
    for at, (name, label, colour, form) in enumerate(parts):
        number = str(at + 1) if at else ""
        values = [point.get(name) for point in curve]
        traces.append(_curve(label, steps, values, colour, f"{label} %{{y:{form}}}", yaxis=f"y{number}"))
        top = 1 - at / len(parts)
        exponent = "e" if name == "learning_rate" else "none"
        domain = [top - 1 / len(parts) + 0.06, top]
        layout[f"yaxis{number}"] = _axis(label, domain=domain, rangemode="tozero", exponentformat=exponent)
    names = ["step", "epoch", *(part[0] for part in parts)]
    return Figure(
        f"curves-{line.row.row}",
        "Loss, learning rate and throughput",
        f"Training of {line.row.row} over {steps[-1]} optimizer steps.",
        traces,
        layout,
        names,
        [[point.get(name) for name in names] for point in curve],
    )


def speed_bars(hardware: str, title: str, lines: list[SpeedLine], comparable: bool) -> Figure | None:
    """Speed-up of every row of one hardware's table, ours and published: ratios, which depend less on the machine."""
    timed = [line for line in lines if line.speed and line.speedup is not None]
    if not timed:
        return None
    labels = [line.row.row for line in reversed(timed)]
    traces: list[Json] = []
    for name, values, colour in (
        (
            "published" if comparable else "published (other machines)",
            [x.row.published_speedup for x in timed],
            "--published",
        ),
        ("ours" if comparable else "ours (other machines)", [x.speedup for x in timed], "--after"),
    ):
        hover = f"%{{y}}<br>{name}: %{{x:.2f}} x<extra></extra>"
        bar = {"type": "bar", "orientation": "h", "name": name, "y": labels, "x": values[::-1]}
        traces.append({**bar, "marker": {"color": colour}, "hovertemplate": hover})
    xaxis, yaxis = _axis("times the first row's images/s"), _of_rows(labels)
    look = {"height": 120 + 44 * len(timed), "barmode": "group", "bargap": 0.35, "hovermode": "closest"}
    return Figure(
        f"speed-{hardware}",
        f"{title}: speed-up relative to the first row",
        f"Speed-up of {len(timed)} rows, ours and published.",
        traces,
        {**look, "xaxis": xaxis, "yaxis": yaxis},
        ["row", "speed-up", "published speed-up", "images/s", "published images/s"],
        [[x.row.row, x.speedup, x.row.published_speedup, x.rate, x.row.published_images_per_second] for x in timed],
    )


def scaling(hardware: str, title: str, lines: list[SpeedLine]) -> Figure | None:
    """images/s by number of GPUs for methods with several published node counts. Ours only if it ran on those
    machines."""
    series: dict[str, list[SpeedLine]] = {}
    for line in lines:
        if not line.row.accompanies:
            series.setdefault(f"{METHODS[line.row.method]}, {attention(line)}", []).append(line)
    traces, rows = [], []
    for number, (name, members) in enumerate(pair for pair in series.items() if len(pair[1]) > 1):
        gpus = [line.gpus for line in members]
        published = [line.row.published_images_per_second for line in members]
        ours = [None if line.stand_in else line.rate for line in members]
        linear = [(published[0] or 0) * count / gpus[0] for count in gpus]
        for kind, values, colour, symbol, dash in (
            ("published", published, "--published", "diamond-open", "dot"),
            ("ours", ours, _colour(number), "square", "solid"),
            ("linear", linear, "--muted", "line-ns", "dash"),
        ):
            if kind != "ours" or any(value is not None for value in values):
                full = f"{name}: {kind}"
                look = {"line": {"color": colour, "dash": dash, "width": 1.8}, "mode": "lines+markers"}
                marker = {"color": colour, "symbol": symbol, "size": 8}
                hover = f"{full}<br>%{{x}} GPUs: %{{y:.2f}} images/s"
                traces.append(_curve(full, gpus, values, colour, hover, marker=marker, **look))
        rows += [[name, g, o, p] for g, o, p in zip(gpus, ours, published, strict=True)]
    if not traces:
        return None
    xaxis = _axis(
        "GPUs", tickvals=sorted({line.gpus for members in series.values() if len(members) > 1 for line in members})
    )
    return Figure(
        f"scaling-{hardware}",
        f"{title}: scaling over nodes",
        "Images per second by number of GPUs, and the line of perfect scaling.",
        traces,
        {"height": 320, "xaxis": xaxis, "yaxis": _axis("images/s over all GPUs", rangemode="tozero")},
        ["method", "GPUs", "images/s", "published images/s"],
        rows,
    )
