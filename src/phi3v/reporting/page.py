"""index.html: the joined tables, plots, examples and provenance as one file that needs no network.

Every text goes through Jinja's escaping; data for scripts are JSON in a block that the browser does not run; a content security policy
allows exactly the two scripts of this page, by their digests, and nothing from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from phi3v.planning.fits import MEAN_TOKENS, PADDED_TILES
from phi3v.planning.flops import FORMULA
from phi3v.reporting import figures, provenance
from phi3v.reporting.markdown import by_hardware, grouped
from phi3v.reporting.pictures import Thumbnails
from phi3v.reporting.results import AccuracyResult
from phi3v.reporting.tables import (
    GB,
    METHODS,
    AccuracyLine,
    SpeedLine,
    Tables,
    asked,
    observed,
    official_figures,
    plain,
    stand_in_text,
)
from phi3v.settings import AccuracyRow, Role, SpeedRow, dataset_key, fields_with

HERE = Path(__file__).resolve().parent
PICTURES_PER_EXAMPLE = 8
# Fields of a row that its part of the page shows elsewhere than among the settings.
SHOWN_ELSEWHERE = {name for row in (AccuracyRow, SpeedRow) for name in fields_with(row, Role.IDENTITY, Role.PUBLISHED)}


def render(tables: Tables, results: Path, code: dict[str, Any]) -> str:
    """The page. results: results/NAME; pictures are looked for in results/data beside it."""
    thumbnails = Thumbnails()
    comparable = tables.run.settings.comparable
    plots: list[figures.Figure] = []

    def plot(figure: figures.Figure | None) -> figures.Figure | None:
        if figure is not None:
            plots.append(figure)
        return figure

    accuracy = []
    by_dataset: dict[str, list[AccuracyLine]] = {}
    for (dataset, model), lines in grouped(tables.accuracy).items():
        accuracy.append({"dataset": dataset, "model": model, "lines": lines})
        by_dataset.setdefault(dataset, []).extend(lines)
    overviews = []
    for dataset, lines in by_dataset.items():
        title = tables.run.datasets[dataset].title
        found = [plot(figures.forest(dataset, title, lines, comparable)), plot(figures.losses(dataset, title, lines))]
        overviews += [figure for figure in found if figure]
    speed = []
    for hardware, speed_lines in by_hardware(tables.speed).items():
        title = tables.run.hardware[hardware].title
        stand_in = any(line.value("stand_in") for line in speed_lines)
        both = [
            plot(figures.speed_bars(hardware, title, speed_lines, comparable and not stand_in)),
            plot(figures.scaling(hardware, title, speed_lines)),
        ]
        stand_ins = list(
            dict.fromkeys(stand_in_text(line, tables.run.hardware) for line in speed_lines if line.value("stand_in"))
        )
        shown = [figure for figure in both if figure]
        speed.append(
            {
                "hardware": hardware,
                "title": title,
                "lines": speed_lines,
                "figures": shown,
                "stand_ins": stand_ins,
                "fingerprints": provenance.fingerprints(speed_lines),
            }
        )
    details = {}
    for line in tables.accuracy:
        images = (
            results.parent / "data" / dataset_key(line.row.dataset, tables.run.datasets[line.row.dataset]) / "images"
        )
        for job in line.jobs:
            details[job.row.row] = {
                "curves": plot(figures.curves(job)),
                # Each seed's answers would fill the page with the same pictures: the first seed stands for the row.
                "examples": _examples(job, images, thumbnails) if job is line.jobs[0] else [],
            }
    data_sets = provenance.datasets(tables, results)
    tokens = [figure for figure in (plot(figures.tokens(found)) for found in data_sets) if figure]
    scripts = {"plotly": _asset("plotly-basic.min.js"), "page": _asset("page.js")}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        figure=figure_text,
        signed=signed_text,
        duration=duration_text,
        count=count_text,
        gb=gigabytes_text,
        plain=plain,
        hours=hours_text,
    )
    environment.globals.update(
        METHODS=METHODS,
        asked=asked,
        observed=observed,
        hidden_fields=SHOWN_ELSEWHERE,
        harmless=fields_with(AccuracyRow, Role.EQUIVALENT),
        METRICS=figures.METRICS,
        official_figures=official_figures,
    )
    data = {"plots": {figure["id"]: figure for figure in plots}, "pictures": thumbnails.data}
    return environment.get_template("index.html").render(
        run=tables.run,
        settings=tables.run.settings,
        accuracy=accuracy,
        overviews=overviews,
        speed=speed,
        details=details,
        tables=tables,
        summary=_summary(tables),
        data_sets=data_sets,
        tokens=tokens,
        provenance=provenance.provenance(tables, results),
        failures=_failures(tables),
        plan=provenance.plan(tables, results),
        plan_columns=provenance.PLAN_COLUMNS,
        published_tokens=MEAN_TOKENS,
        padded_tiles=PADDED_TILES,
        formula=FORMULA,
        code=code,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=_asset("style.css"),
        scripts=scripts,
        hashes=[_digest(script) for script in scripts.values()],
        # "<" cannot end the block early when it is written as an escape.
        data=json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _asset(name: str) -> str:
    text = (HERE / "assets" / name).read_text(encoding="utf-8")
    if "</script" in text or "</style" in text:
        raise ValueError(f"{name}: holds an end tag; expected text that can be inlined")
    return text


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()


def _examples(line: AccuracyLine, images: Path, thumbnails: Thumbnails) -> list[dict[str, Any]]:
    after = line.result.passes.get("after") if line.result else None
    shown = []
    for record in after.examples if after else []:
        paths = record.get("images") or []
        keys = [thumbnails.add(images / str(path)) for path in paths[:PICTURES_PER_EXAMPLE]]
        shown.append(
            {
                "id": str(record["id"]), "prompt": str(record.get("prompt", "")), "answers": [str(a) for a in record["answers"]],
                "prediction": str(record.get("prediction", "")), "score": record["score"], "pictures": [key for key in keys if key],
                "missing": len(paths) - sum(1 for key in keys if key),
            }
        )  # fmt: skip
    return shown


def _failures(tables: Tables) -> list[AccuracyLine | SpeedLine]:
    return [
        line
        for line in tables.jobs
        if line.status in ("did not finish", "damaged")
        or (line.result is not None and line.result.problems)
        or (isinstance(line, AccuracyLine) and line.official in ("did not finish", "damaged"))
    ]


def _summary(tables: Tables) -> dict[str, Any]:
    """Figures of the first screen."""
    done = [line for line in tables.accuracy if line.status == "done"]
    gained = [line for line in done if line.result and line.result.gain]
    looked = [line for line in done if line.result and line.result.looking]
    verdicts: dict[str, int] = {}
    for line in tables.accuracy:
        if line.verdict:
            verdicts[line.verdict] = verdicts.get(line.verdict, 0) + 1
    works = {}
    for job in tables.jobs:
        if isinstance(job.result, AccuracyResult):
            # Rows share the evaluation before training.
            for work in (job.result.baseline, job.result.train, job.result.evaluate, job.result.official_work):
                works[work.folder] = work.seconds or 0
        elif job.result is not None:
            works[job.result.work.folder] = job.result.work.seconds or 0
    return {
        "done": len(done),
        "rows": len(tables.accuracy),
        "gained": sum(1 for line in gained if line.result and line.result.gain and line.result.gain.difference > 0),
        "gained_of": len(gained),
        "looked": sum(
            1 for line in looked if line.result and line.result.looking and line.result.looking.interval[0] > 0
        ),
        "looked_of": len(looked),
        "speed_done": sum(1 for line in tables.speed if line.status == "done"),
        "speed_rows": len(tables.speed),
        "verdicts": verdicts,
        "seconds": sum(works.values()),
        "older": sum(line.older for line in tables.lines),
        "has_official": any(tables.run.datasets[line.row.dataset].official for line in tables.accuracy),
        "has_mfu": any(line.value("mfu") is not None for line in tables.speed),
    }


def figure_text(value: float | None, digits: int = 1) -> str:
    """A figure, or a dash for what is not there."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed_text(value: float | None, digits: int = 1) -> str:
    """A difference with its sign, a true minus among them."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "\u2212")


def duration_text(seconds: float | None) -> str:
    """42 s, 3 min 05 s, 2 h 10 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def hours_text(hours: float | None) -> str:
    """Hours with as many decimals as say something."""
    return "–" if hours is None else f"{hours:.3f}" if hours < 0.1 else f"{hours:.2f}" if hours < 10 else f"{hours:.0f}"


def count_text(value: float | None) -> str:
    """A count with thin spaces between thousands."""
    return "–" if value is None else f"{value:,.0f}".replace(",", "\u202f")


def gigabytes_text(value: float | None) -> str:
    """Bytes as GB (10^9)."""
    return "–" if value is None else f"{value / GB:.2f} GB"
