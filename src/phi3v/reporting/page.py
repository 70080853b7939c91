"""A run's report folder: index.html, accuracy.tsv, speed.tsv, report.json, tables.md and a manifest.

index.html is one file that needs no network. Every text goes through Jinja's escaping; data for scripts are JSON in a
block that the browser does not run; a content security policy allows exactly the two scripts of this page, by their
digests, and nothing from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import jinja2
from PIL import Image

from phi3v.data.conversations import DataError
from phi3v.data.pictures import open_rgb
from phi3v.evaluation.questions import Record
from phi3v.planning.fits import FROZEN_IMAGES, FULL_IMAGES, MEAN_TOKENS, PADDED_TILES, PEAK_SHARES, runnable
from phi3v.planning.flops import FORMULA
from phi3v.planning.memory import GB
from phi3v.provenance.manifest import Commit, Manifest, commit, write_atomically, write_json, write_manifest
from phi3v.reporting import columns, figures
from phi3v.reporting.figures import Figure
from phi3v.reporting.join import AccuracyLine, AnyLine, SpeedLine, Tables, build_tables
from phi3v.reporting.results import DataSection, Work, data_folder, read_dataset
from phi3v.reporting.verdict import hardware_name
from phi3v.settings import AccuracyRow, ReportSettings, Role, SpeedRow, fields_with, load_run

HERE = Path(__file__).resolve().parent
PICTURES_PER_EXAMPLE = 8
LONGEST_SIDE = 240
QUALITY = 70
BUDGET_BYTES = 4_000_000
"""Limit for all thumbnails, so that a report of 200 rows is small enough for e-mail."""
# Fields that the page shows elsewhere than among a row's settings.
IN_OTHER_PLACES = {name for row in (AccuracyRow, SpeedRow) for name in fields_with(row, Role.IDENTITY, Role.PUBLISHED)}


def build_report(settings: ReportSettings) -> Tables:
    """Reads the run's configuration and available results, and writes the report. Raises SettingsError on a wrong
    configuration."""
    started = time.perf_counter()
    run = runnable(load_run(settings.config))
    results = Path(settings.results or f"results/{run.settings.name}")
    folder = Path(settings.output_dir or results / "report")
    code = commit()
    tables = build_tables(run, results, code)
    accuracy = columns.as_records(tables.accuracy, columns.ACCURACY_COLUMNS + columns.ACCURACY_TIMES)
    speed = columns.as_records(tables.speed, columns.SPEED_COLUMNS)
    about = {"run": run.settings.name, **run.settings.model_dump(include={"title", "notice", "comparable"})}
    write_atomically(folder / "accuracy.tsv", columns.as_tsv(accuracy, columns.ACCURACY_COLUMNS))
    write_atomically(folder / "speed.tsv", columns.as_tsv(speed, columns.SPEED_COLUMNS))
    write_json(folder / "report.json", {**about, "accuracy": accuracy, "speed": speed})
    write_atomically(folder / "tables.md", as_markdown(tables))
    write_atomically(folder / "index.html", Page(tables, results, code, settings.partial).render())
    parents = {name: str(work.folder) for name, work in finished(tables, results).items()}
    write_manifest(
        folder,
        kind="report",
        settings=settings,
        seed=run.settings.seed,
        inputs={"config": settings.config} | parents,
        seconds=time.perf_counter() - started,
        device="CPU",
    )
    return tables


def as_markdown(tables: Tables) -> str:
    """All tables of a run in Markdown, in the layout of the recipe's page."""
    template = _environment().get_template("tables.md")
    accuracy, speed = columns.by_dataset_and_model(tables.accuracy), columns.by_hardware(tables.speed)
    text = template.render(run=tables.run, settings=tables.run.settings, accuracy=accuracy, speed=speed)
    return text.rstrip() + "\n"


class Thumbnails:
    """Thumbnails by a digest of their bytes. Each is embedded only once."""

    def __init__(self, budget: int = BUDGET_BYTES) -> None:
        self.data: dict[str, str] = {}
        """The data to embed in the page."""
        self._keys: dict[Path, str | None] = {}
        self._left = budget

    def add(self, path: Path) -> str | None:
        """Key of a picture's thumbnail. None if the file is missing, is not a picture, or exceeds the limit for all."""
        if path not in self._keys:
            self._keys[path] = self._make(path)
        return self._keys[path]

    def _make(self, path: Path) -> str | None:
        try:
            raw = path.read_bytes()
            key = hashlib.sha256(raw).hexdigest()[:12]
            if key in self.data:
                return key
            small = open_rgb(raw, str(path))
        except (OSError, DataError):
            return None
        small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=QUALITY, method=4)
        uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        if len(uri) > self._left:
            return None
        self._left -= len(uri)
        self.data[key] = uri
        return key


class Page:
    """index.html. results: results/NAME; pictures are looked for in results/data beside it. code: of this report.

    partial: the run ended before all rows were finished.
    """

    def __init__(self, tables: Tables, results: Path, code: Commit, partial: bool = False) -> None:
        self.tables, self.results, self.code, self.partial = tables, results, code, partial
        self.thumbnails = Thumbnails()
        self.plots: dict[str, Figure] = {}

    def render(self) -> str:
        """The page as text."""
        tables, results = self.tables, self.results
        scripts = {"plotly": _asset("plotly-basic.min.js"), "page": _asset("page.js")}
        data_sets = datasets(tables, results)
        parts = {
            "accuracy": columns.by_dataset_and_model(tables.accuracy),
            "overviews": self._overviews(),
            "speed": [self._speed(hardware, lines) for hardware, lines in columns.by_hardware(tables.speed).items()],
            "details": dict(detail for line in tables.accuracy for detail in self._details(line)),
            "data_sets": data_sets,
            "tokens": self._add(*(figures.tokens(of.name, of.entry.title, of.statistics) for of in data_sets)),
            "plan": columns.plan(tables, results),
            "failures": [line for line in tables.jobs if _failed(line)],
            "provenance": Provenance(
                {name: work.manifest for name, work in finished(tables, results).items() if work.manifest}
            ),
            "summary": _summary(tables),
        }
        data = {"plots": {name: vars(plot) for name, plot in self.plots.items()}, "pictures": self.thumbnails.data}
        # "<" is escaped, so that the data cannot end the block early.
        text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        template = _environment().get_template("index.html")
        return template.render(
            parts,
            run=tables.run,
            settings=tables.run.settings,
            tables=tables,
            code=self.code,
            partial=self.partial,
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            style=_asset("style.css"),
            scripts=scripts,
            hashes=[_digest(script) for script in scripts.values()],
            data=text,
        )

    def _add(self, *made: Figure | None) -> list[Figure]:
        """Adds plots to the page. Returns those that are not None."""
        found = [figure for figure in made if figure is not None]
        self.plots |= {figure.id: figure for figure in found}
        return found

    def _overviews(self) -> list[Figure]:
        run, groups = self.tables.run, columns.by_dataset_and_model(self.tables.accuracy)
        found: list[Figure] = []
        for dataset in dict.fromkeys(name for name, _ in groups):
            lines = [line for (name, _), group in groups.items() if name == dataset for line in group]
            title = run.datasets[dataset].title
            forest = figures.forest(dataset, title, lines, run.settings.comparable)
            found += self._add(forest, figures.losses(dataset, title, lines))
        return found

    def _speed(self, hardware: str, lines: list[SpeedLine]) -> dict[str, object]:
        """The page's section for one published hardware."""
        run = self.tables.run
        title = run.hardware[hardware].title
        stand_ins = list(dict.fromkeys(line.stand_in for line in lines if line.stand_in))
        bars = figures.speed_bars(hardware, title, lines, run.settings.comparable and not stand_ins)
        return {
            "title": title,
            "lines": lines,
            "figures": self._add(bars, figures.scaling(hardware, title, lines)),
            "stand_ins": stand_ins,
            "fingerprints": fingerprints(lines),
        }

    def _details(self, line: AccuracyLine) -> Iterator[tuple[str, dict[str, object]]]:
        """Curves and examples of each job of a row, by the job's id."""
        name = line.row.dataset
        images = data_folder(name, self.tables.run.datasets[name], self.results) / "images"
        for job in line.jobs:
            # Only the first seed's answers are on the page, because the other seeds' have the same pictures.
            records = job.after.examples if job.after and job is line.jobs[0] else []
            examples = [(record, self._pictures(record, images)) for record in records]
            yield job.row.row, {"curves": self._add(figures.curves(job)), "examples": examples}

    def _pictures(self, record: Record, images: Path) -> list[str]:
        """Keys of the thumbnails of an example."""
        keys = [self.thumbnails.add(images / path) for path in record.get("images", [])[:PICTURES_PER_EXAMPLE]]
        return [key for key in keys if key]


def datasets(tables: Tables, results: Path) -> list[DataSection]:
    """Each dataset of the run's rows, then their official splits."""
    rows = Counter(line.row.dataset for line in tables.lines)
    for official in [tables.run.datasets[name].official for name in rows]:
        if official:
            rows.setdefault(official, 0)
    return [read_dataset(name, tables.run.datasets[name], count, results) for name, count in rows.items()]


@dataclass
class Provenance:
    """Facts about the results, from their manifests."""

    manifests: dict[str, Manifest]
    """Manifests by the path of the folder under the run's results."""

    def distinct(self, name: str) -> list[str]:
        """The distinct values of a field: commit, device, host, user."""
        return sorted({str(manifest.get(name)) for manifest in self.manifests.values() if manifest.get(name)})

    @property
    def versions(self) -> dict[str, list[str]]:
        """Package to its distinct versions."""
        found: dict[str, set[str]] = {}
        for manifest in self.manifests.values():
            for package, version in manifest.get("versions", {}).items():
                found.setdefault(package, set()).add(str(version))
        return {package: sorted(versions) for package, versions in found.items()}

    @property
    def dirty(self) -> int:
        """Number of results of code with uncommitted changes."""
        return sum(bool(manifest.get("dirty")) for manifest in self.manifests.values())


def finished(tables: Tables, results: Path) -> dict[str, Work]:
    """Manifests of the finished jobs by their folder under `results`. Shared evaluations occur once."""
    found: dict[str, Work] = {}
    for line in tables.jobs:
        for work in line.works:
            if work.manifest is not None:
                inside = work.folder.is_relative_to(results)
                found[str(work.folder.relative_to(results) if inside else work.folder)] = work
    return found


def fingerprints(lines: list[SpeedLine]) -> list[tuple[list[str], dict[str, str]]]:
    """Machines of the speed rows: (rows, facts). Rows with the same facts are combined."""
    groups: dict[str, tuple[list[str], dict[str, str]]] = {}
    for line in lines:
        facts = line.speed.fingerprint if line.speed else {}
        known = {name: _fact(value) for name, value in facts.items() if value not in (None, [], {})}
        if known:
            groups.setdefault(json.dumps(known, sort_keys=True), ([], known))[0].append(line.row.row)
    return list(groups.values())


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_fact(item)}" for name, item in value.items() if item is not None)
    return "; ".join(_fact(item) for item in value) if isinstance(value, list) else str(value)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": figure_text,
        "signed": signed_text,
        "duration": duration_text,
        "count": count_text,
        "gb": gigabytes_text,
        "markdown": markdown_text,
        "plain": columns.plain,
        "hours": hours_text,
    }
    environment.globals |= {
        "columns": columns,
        "GB": GB,
        "METRICS": figures.METRICS,
        "hardware_name": hardware_name,
        "hidden_fields": IN_OTHER_PLACES,
        "harmless": fields_with(AccuracyRow, Role.EQUIVALENT),
        "published_tokens": MEAN_TOKENS,
        "padded_tiles": PADDED_TILES,
        "full_images": FULL_IMAGES,
        "frozen_images": FROZEN_IMAGES,
        "share": PEAK_SHARES,
        "formula": FORMULA,
    }
    return environment


def _asset(name: str) -> str:
    return (HERE / "assets" / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()


def _failed(line: AnyLine) -> bool:
    states = [line.state, line.official] if isinstance(line, AccuracyLine) else [line.state]
    return bool(line.problems) or any(state.status in ("did not finish", "damaged") for state in states)


def _summary(tables: Tables) -> dict[str, object]:
    """Figures of the summary cards."""
    done = [line for line in tables.accuracy if line.state.status == "done"]
    gains = [line.after_minus["before"].difference for line in done if "before" in line.after_minus]
    worth = [line.after_minus["control"].interval[0] for line in done if "control" in line.after_minus]
    # Rows share the evaluation before training.
    works = {work.folder: work.seconds or 0 for job in tables.jobs for work in job.works}
    return {
        "done": len(done),
        "rows": len(tables.accuracy),
        "gained": sum(gain > 0 for gain in gains),
        "gained_of": len(gains),
        "pictures_used": sum(low > 0 for low in worth),
        "pictures_used_of": len(worth),
        "speed_done": sum(line.state.status == "done" for line in tables.speed),
        "speed_rows": len(tables.speed),
        "seconds": sum(works.values()),
        "older": sum(line.older for line in tables.lines),
        "has_official": any(tables.run.datasets[line.row.dataset].official for line in tables.accuracy),
        "has_mfu": any(line.speed and line.speed.mfu is not None for line in tables.speed),
    }


def markdown_text(text: str) -> str:
    """Escapes text for Markdown, including table cells."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def figure_text(value: float | None, digits: int = 1) -> str:
    """A number, or a dash if it is missing."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed_text(value: float | None, digits: int = 1) -> str:
    """A difference with its sign, as a minus character."""
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
    """Hours with a sensible number of decimals."""
    return "–" if hours is None else f"{hours:.3f}" if hours < 0.1 else f"{hours:.2f}" if hours < 10 else f"{hours:.0f}"


def count_text(value: float | None) -> str:
    """A count with thin spaces between thousands."""
    return "–" if value is None else f"{value:,.0f}".replace(",", "\u202f")


def gigabytes_text(value: float | None) -> str:
    """Bytes as GB (10^9)."""
    return "–" if value is None else f"{value / GB:.2f} GB"
