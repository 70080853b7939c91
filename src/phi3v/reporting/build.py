"""Build a run's report folder: index.html, accuracy.tsv, speed.tsv, report.json, tables.md and a manifest."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from phi3v.planning.fits import runnable
from phi3v.provenance.manifest import commit, write_atomically, write_manifest
from phi3v.reporting.markdown import as_markdown
from phi3v.reporting.page import render
from phi3v.reporting.provenance import parents
from phi3v.reporting.tables import (
    ACCURACY_COLUMNS,
    ACCURACY_TIMES,
    SPEED_COLUMNS,
    Tables,
    as_records,
    as_tsv,
    build_tables,
)
from phi3v.settings import ReportSettings, load_run


def build_report(settings: ReportSettings) -> Tables:
    """Read the run's configuration and whatever results there are; write the report. Raises SettingsError on a wrong configuration."""
    started = time.perf_counter()
    run = runnable(load_run(settings.config))
    results = Path(settings.results or f"results/{run.settings.name}")
    folder = Path(settings.output_dir or results / "report")
    code = dict(commit())
    tables = build_tables(run, results, code)
    accuracy = as_records(tables.accuracy, ACCURACY_COLUMNS + ACCURACY_TIMES)
    speed = as_records(tables.speed, SPEED_COLUMNS)
    report = {
        "run": run.settings.name, "title": run.settings.title, "notice": run.settings.notice, "comparable": run.settings.comparable,
        "accuracy": accuracy, "speed": speed,
    }  # fmt: skip
    page = render(tables, results, code)
    write_atomically(folder / "accuracy.tsv", as_tsv(accuracy, ACCURACY_COLUMNS))
    write_atomically(folder / "speed.tsv", as_tsv(speed, SPEED_COLUMNS))
    write_atomically(folder / "report.json", json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "tables.md", as_markdown(tables))
    write_atomically(folder / "index.html", page)
    write_manifest(
        folder, kind="report", settings=settings, seed=run.settings.seed,
        inputs={"config": settings.config} | {name: str(path) for name, path in parents(tables, results).items()},
        seconds=time.perf_counter() - started, device="CPU",
    )  # fmt: skip
    return tables


def _finite(value: Any) -> Any:
    """The value with NaN and infinity as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
