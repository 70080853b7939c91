"""Plots as data for the page's Plotly: each has an id, a title, a description for screen readers, traces and a table of its numbers.

Colours are names of the page's CSS variables, so that light and dark mode and printing have their own.
"""

from __future__ import annotations

from typing import Any

from phi3v.reporting.tables import METHODS, AccuracyLine, SpeedLine

Figure = dict[str, Any]
METRICS = {"anls": "ANLS", "official_anls": "official ANLS", "auroc": "AUROC"}


def forest(dataset: str, title: str, lines: list[AccuracyLine], comparable: bool) -> Figure | None:
    """Ours with its interval, before, control and the published figure, a line a row; None when nothing has run."""
    shown = [line for line in lines if line.result and "after" in line.result.passes][::-1]
    if not shown:
        return None
    labels = [line.row.row for line in shown]
    after = [line.result.passes["after"] for line in shown if line.result]
    traces: list[dict[str, Any]] = []
    for name, colour, symbol in (("before", "--before", "circle-open"), ("control", "--control", "x-thin-open")):
        points = [(line.row.row, line.score(name)) for line in shown if line.score(name) is not None]
        if points:
            traces.append(_marks("before" if name == "before" else "pictures swapped", points, colour, symbol, 9))
    published = [(line.row.row, line.row.published) for line in shown if line.row.published is not None]
    if published:
        name = "published" if comparable else "published (not comparable)"
        traces.append(_marks(name, published, "--published", "diamond-open", 10))
    seeds = [(line.row.row, score) for line in shown for score in line.seed_scores]
    if seeds:
        traces.append(_marks("each seed", seeds, "--after", "line-ns-open", 12))
    ours = _marks(
        "after, 95 % interval",
        list(zip(labels, [p.score for p in after], strict=True)),
        "--after",
        "square",
        9,
    )
    ours["error_x"] = {
        "type": "data", "symmetric": False, "thickness": 2, "width": 4, "color": "--after",
        "array": [p.interval[1] - p.score for p in after], "arrayminus": [p.score - p.interval[0] for p in after],
    }  # fmt: skip
    ours["customdata"] = [[*p.interval, p.n] for p in after]
    ours["hovertemplate"] = (
        "%{y}<br>after %{x:.1f} [%{customdata[0]:.1f}, %{customdata[1]:.1f}], n = %{customdata[2]}<extra></extra>"
    )
    traces.append(ours)
    return {
        "id": f"forest-{dataset}",
        "title": f"{title}: {METRICS.get(after[0].metric, after[0].metric)} of each row",
        "text": f"{len(shown)} rows; each with its score before and after training, with swapped pictures, and as published.",
        "traces": traces,
        "layout": {
            "height": 130 + 34 * len(shown),
            "xaxis": {
                "title": {"text": f"{METRICS.get(after[0].metric, after[0].metric)} (0–100)"},
                "range": [-2, 102],
            },
            "yaxis": {"type": "category", "categoryorder": "array", "categoryarray": labels},
            "hovermode": "closest",
        },
        "columns": ["row", "before", "after", "low", "high", "pictures swapped", "published", "seeds"],
        "rows": [
            [
                line.row.row,
                line.score("before"),
                p.score,
                *p.interval,
                line.score("control"),
                line.row.published,
                ", ".join(f"{score:.1f}" for score in line.seed_scores) or "1",
            ]
            for line, p in list(zip(shown, after, strict=True))[::-1]
        ],
    }


def _marks(name: str, points: list[tuple[str, Any]], colour: str, symbol: str, size: int) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": [x for _, x in points], "y": [y for y, _ in points],
        "marker": {"color": colour, "symbol": symbol, "size": size, "line": {"width": 2, "color": colour}},
        "hovertemplate": f"%{{y}}<br>{name} %{{x:.1f}}<extra></extra>",
    }  # fmt: skip


def losses(dataset: str, title: str, lines: list[AccuracyLine]) -> Figure | None:
    """Training loss of every row of a dataset over its epochs."""
    traces, rows = [], []
    jobs = (job for line in lines for job in line.jobs)
    models = {line.row.model for line in lines}

    def short(row: str) -> str:
        """The title names the dataset; a single model's name says nothing either."""
        model, found, rest = row.partition(f"-{dataset}-")
        return (rest if len(models) == 1 else f"{model} {rest}") if found else row

    for number, line in enumerate(job for job in jobs if job.result and job.result.curve):
        assert line.result is not None
        curve = line.result.curve
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": short(line.row.row),
                "x": [p.get("epoch") for p in curve],
                "y": [p.get("loss") for p in curve],
                "line": {"color": f"--series-{number % 8}", "width": 1.8},
                "hovertemplate": f"{line.row.row}<br>epoch %{{x:.2f}}, loss %{{y:.4f}}<extra></extra>",
            }
        )
        rows.append(
            [line.row.row, curve[0].get("loss"), curve[-1].get("loss"), curve[-1].get("step"), curve[-1].get("epoch")]
        )
    if not traces:
        return None
    return {
        "id": f"losses-{dataset}",
        "title": f"{title}: training loss",
        "text": f"Loss over epochs of {len(traces)} rows.",
        "traces": traces,
        "layout": {
            # As high as the plot of the scores beside it.
            "height": max(240, 130 + 34 * sum(line.score("after") is not None for line in lines)),
            "xaxis": {"title": {"text": "epoch"}},
            "yaxis": {"title": {"text": "loss"}, "rangemode": "tozero"},
        },
        "columns": ["row", "first loss", "last loss", "steps", "epochs"],
        "rows": rows,
    }


def tokens(found: dict[str, Any]) -> Figure | None:
    """Tokens of an example of a dataset, a step line for each split; from statistics.json."""
    traces, rows = [], []
    for number, (split, facts) in enumerate(found["statistics"].items()):
        histogram = facts.get("histogram") or {}
        counts, edges = histogram.get("counts"), histogram.get("edges")
        if not counts or not edges or len(edges) != len(counts) + 1:
            continue
        share = [100 * count / max(sum(counts), 1) for count in counts]
        traces.append(
            {
                "type": "scatter", "mode": "lines", "name": split, "x": edges, "y": [*share, share[-1]], "fill": "tozeroy",
                "line": {"shape": "hv", "color": f"--series-{number % 8}", "width": 1.5},
                "hovertemplate": f"{split}: %{{y:.1f}} % from %{{x:.0f}} tokens<extra></extra>",
            }
        )  # fmt: skip
        rows += [[split, low, high, count] for low, high, count in zip(edges, edges[1:], counts, strict=False)]
    if not traces:
        return None
    return {
        "id": f"tokens-{found['name']}",
        "title": f"{found['title']}: tokens of an example",
        "text": f"Share of the examples over their number of tokens, {len(traces)} splits.",
        "traces": traces,
        "layout": {
            "height": 240,
            "xaxis": {"title": {"text": "tokens, those of the pictures included"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "% of the examples"}, "rangemode": "tozero"},
        },
        "columns": ["split", "from", "to", "examples"],
        "rows": rows,
    }


def curves(line: AccuracyLine) -> Figure | None:
    """Loss, learning rate and throughput of one row over its optimizer steps."""
    if line.result is None or not line.result.curve:
        return None
    curve = line.result.curve
    steps = [p.get("step") for p in curve]
    parts = [
        ("loss", "loss", "--after", ".4f"),
        ("learning_rate", "learning rate", "--published", ".2e"),
        ("images_per_second", "images/s", "--before", ".1f"),
    ]
    parts = [part for part in parts if any(p.get(part[0]) is not None for p in curve)]
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "height": 130 + 110 * len(parts),
        "showlegend": False,
        "xaxis": {"title": {"text": "optimizer step"}},
    }
    for at, (name, label, colour, form) in enumerate(parts):
        axis = "y" if at == 0 else f"y{at + 1}"
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": label,
                "x": steps,
                "y": [p.get(name) for p in curve],
                "yaxis": axis,
                "line": {"color": colour, "width": 1.8},
                "hovertemplate": f"{label} %{{y:{form}}}<extra></extra>",
            }
        )
        top = 1 - at / len(parts)
        layout["yaxis" if at == 0 else f"yaxis{at + 1}"] = {
            "domain": [top - 1 / len(parts) + 0.06, top], "title": {"text": label}, "rangemode": "tozero", "exponentformat": "e" if name == "learning_rate" else "none",
        }  # fmt: skip
    layout["xaxis"]["anchor"] = "y" if len(parts) == 1 else f"y{len(parts)}"
    layout["hovermode"] = "x unified"
    names = ["step", "epoch", *(part[0] for part in parts)]
    return {
        "id": f"curves-{line.row.row}",
        "title": "Loss, learning rate and throughput",
        "text": f"Training of {line.row.row} over {steps[-1]} optimizer steps.",
        "traces": traces,
        "layout": layout,
        "columns": names,
        "rows": [[p.get(name) for name in names] for p in curve],
    }


def speed_bars(hardware: str, title: str, lines: list[SpeedLine], comparable: bool) -> Figure | None:
    """Speed-up of every row of one hardware's table, ours beside published: ratios, so that machines do not matter."""
    shown = [line for line in lines if line.speedup is not None][::-1]
    if not shown:
        return None
    labels = [line.row.row for line in shown]
    suffix = "" if comparable else " (other machines)"
    traces = [
        {
            "type": "bar", "orientation": "h", "name": name, "y": labels, "x": values, "marker": {"color": colour},
            "hovertemplate": f"%{{y}}<br>{name}: %{{x:.2f}} x<extra></extra>",
        }
        for name, colour, values in (
            (f"published{suffix}", "--published", [line.row.published_speedup for line in shown]),
            (f"ours{suffix}", "--after", [line.speedup for line in shown]),
        )
    ]  # fmt: skip
    return {
        "id": f"speed-{hardware}",
        "title": f"{title}: speed-up against the first row",
        "text": f"Speed-up of {len(shown)} rows, ours and published.",
        "traces": traces,
        "layout": {
            "height": 120 + 44 * len(shown), "barmode": "group", "bargap": 0.35, "xaxis": {"title": {"text": "times the first row's images/s"}},
            "yaxis": {"type": "category", "categoryorder": "array", "categoryarray": labels}, "hovermode": "closest",
        },
        "columns": ["row", "speed-up", "published speed-up", "images/s", "published images/s"],
        "rows": [
            [line.row.row, line.speedup, line.row.published_speedup, line.value("images_per_second"), line.row.published_images_per_second]
            for line in shown[::-1]
        ],
    }  # fmt: skip


def scaling(hardware: str, title: str, lines: list[SpeedLine]) -> Figure | None:
    """images/s over GPUs for methods that were published on several node counts; ours only where it ran on those machines."""
    series: dict[str, list[SpeedLine]] = {}
    for line in lines:
        if line.row.accompanies:
            continue
        series.setdefault(f"{METHODS[line.row.method]}, {'flash' if line.row.flash_attention else 'eager'}", []).append(
            line
        )
    traces, rows = [], []
    for number, (name, members) in enumerate(pair for pair in series.items() if len(pair[1]) > 1):
        gpus = [line.row.nodes * line.row.gpus_per_node for line in members]
        published = [line.row.published_images_per_second for line in members]
        traces.append(_series(f"{name}: published", gpus, published, "--published", "diamond-open", "dot"))
        ours = [
            None if line.value("stand_in") or line.status != "done" else line.value("images_per_second")
            for line in members
        ]
        if any(value is not None for value in ours):
            traces.append(_series(f"{name}: ours", gpus, ours, f"--series-{number % 8}", "square", "solid"))
        ideal = [(published[0] or 0) * count / gpus[0] for count in gpus]
        traces.append(_series(f"{name}: linear", gpus, ideal, "--muted", "line-ns", "dash"))
        rows += [[name, g, o, p] for g, o, p in zip(gpus, ours, published, strict=True)]
    if not traces:
        return None
    return {
        "id": f"scaling-{hardware}",
        "title": f"{title}: scaling over nodes",
        "text": "Images per second over the number of GPUs, with the line of perfect scaling.",
        "traces": traces,
        "layout": {
            "height": 320, "xaxis": {"title": {"text": "GPUs"}, "tickvals": sorted({row[1] for row in rows})},
            "yaxis": {"title": {"text": "images/s over all GPUs"}, "rangemode": "tozero"},
        },
        "columns": ["method", "GPUs", "images/s", "published images/s"],
        "rows": rows,
    }  # fmt: skip


def _series(name: str, x: list[Any], y: list[Any], colour: str, symbol: str, dash: str) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines+markers", "name": name, "x": x, "y": y, "line": {"color": colour, "dash": dash, "width": 1.8},
        "marker": {"color": colour, "symbol": symbol, "size": 8}, "hovertemplate": f"{name}<br>%{{x}} GPUs: %{{y:.2f}} images/s<extra></extra>",
    }  # fmt: skip
