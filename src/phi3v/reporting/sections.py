"""What stands on the page beside the tables: the data, the plan beside what happened, machines, and where numbers come from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v.planning.memory import GB
from phi3v.provenance.manifest import Manifest, ResultError, read_json
from phi3v.reporting.columns import Cell
from phi3v.reporting.join import AnyLine, SpeedLine, Tables
from phi3v.reporting.results import Work, attempt, read_if_present
from phi3v.settings import Dataset, dataset_key

SHOWN_REJECTIONS = 10


@dataclass
class DataSection:
    """One dataset: what dataset.json and statistics.json state, or why they are not there."""

    name: str
    entry: Dataset
    rows: int
    """Rows of the run that use it; 0: an official split."""
    problem: str
    facts: dict[str, Any]
    """dataset.json."""
    statistics: dict[str, dict[str, Any]]
    rejections: list[str]
    """The first source rows that were left out, each with its reason."""

    def of(self, name: str) -> dict[str, dict[str, Any]]:
        """A field of dataset.json, {split: {…}}: splits, leakage, source."""
        return _objects(self.facts.get(name))


def datasets(tables: Tables, results: Path) -> list[DataSection]:
    """Each dataset of the run's rows, then their official splits."""
    rows: dict[str, int] = {}
    for line in tables.lines:
        rows[line.row.dataset] = rows.get(line.row.dataset, 0) + 1
    for name in list(rows):
        official = tables.run.datasets[name].official
        if official:
            rows.setdefault(official, 0)
    return [_dataset(name, tables.run.datasets[name], count, results) for name, count in rows.items()]


def data_folder(name: str, entry: Dataset, results: Path) -> Path:
    """Folder of a converted dataset; results: results/NAME."""
    return results.parent / "data" / dataset_key(name, entry)


def _dataset(name: str, entry: Dataset, rows: int, results: Path) -> DataSection:
    folder = data_folder(name, entry, results)
    problems: list[str] = []
    facts: dict[str, Any] = {}
    missing = entry.missing_source()
    if (folder / "dataset.json").exists():
        facts = attempt(problems, read_json, folder / "dataset.json") or {}
    else:
        problems.append("not converted yet" if rows or missing is None else f"not present: {missing}")
    counted = read_if_present(folder / "statistics.json", problems)
    rejected = _rejections(folder / "rejected.jsonl")
    return DataSection(name, entry, rows, problems[-1] if problems else "", facts, _objects(counted), rejected)


def _objects(value: object) -> dict[str, dict[str, Any]]:
    """The members of an object that are objects themselves."""
    return {key: item for key, item in value.items() if isinstance(item, dict)} if isinstance(value, dict) else {}


def _rejections(path: Path) -> list[str]:
    found: list[str] = []
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line, _ in zip(file, range(SHOWN_REJECTIONS), strict=False):
                try:
                    item = json.loads(line)
                    found.append(f"{item.get('split', '')}: {item.get('where', '')}: {item.get('reason', '')}"[:300])
                except (ValueError, AttributeError):
                    found.append(line.strip()[:300])
    return found


@dataclass
class Provenance:
    """What is behind the results, from their manifests."""

    manifests: dict[str, Manifest]
    """By the folder's name under the run's results."""

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
        """Results of code with uncommitted changes."""
        return sum(bool(manifest.get("dirty")) for manifest in self.manifests.values())


def finished(tables: Tables, results: Path) -> dict[str, Work]:
    """The finished jobs behind the tables by their folder under `results`; an evaluation that rows share stands once."""
    found: dict[str, Work] = {}
    for line in tables.jobs:
        for work in line.works:
            if work.manifest is not None:
                inside = work.folder.is_relative_to(results)
                found[str(work.folder.relative_to(results) if inside else work.folder)] = work
    return found


def provenance(tables: Tables, results: Path) -> Provenance:
    """The manifests of all finished jobs."""
    return Provenance({name: work.manifest for name, work in finished(tables, results).items() if work.manifest})


def fingerprints(lines: list[SpeedLine]) -> list[tuple[list[str], dict[str, str]]]:
    """What speed rows were measured on: (rows, known facts), rows with the same facts together."""
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


PLAN_COLUMNS = ["row", "plan", "hours planned", "hours taken", "images/s planned", "images/s seen"]
PLAN_COLUMNS += ["allocated GB planned", "allocated GB seen"]


def plan(tables: Tables, results: Path) -> list[list[Cell]]:
    """What was planned (results/NAME/plan/plan.json) beside what was measured, in PLAN_COLUMNS; empty if no plan was made.

    A row's hours are those of one seed's job: training and the three passes, that before training included.
    """
    try:
        planned = {entry["row"]: entry for entry in read_json(results / "plan" / "plan.json")["rows"]}
    except (ResultError, KeyError, TypeError):
        return []
    found: list[list[Cell]] = []
    for line in tables.jobs:
        if line.row.row in planned:
            entry = planned[line.row.row]
            seconds, rate, peak = _took(line)
            hours, allocated = seconds / 3600 if seconds else None, peak / GB if peak else None
            cells = [line.row.row, entry.get("status"), entry.get("hours"), hours, entry.get("images_per_second"), rate]
            found.append([*cells, entry.get("allocated_gb"), allocated])
    return found


def _took(line: AnyLine) -> tuple[float | None, float | None, float | None]:
    """(seconds, images/s, bytes at the peak) of a job; the rate of a training is the median of its steps'."""
    if isinstance(line, SpeedLine):
        return line.work.seconds, line.rate, line.speed.peak_memory_bytes if line.speed else None
    parts = [work.seconds for work in (line.baseline, line.train, line.evaluate)]
    known = [part for part in parts if part is not None]
    rates = sorted(rate for point in line.training.curve if (rate := point.get("images_per_second")))
    median = rates[len(rates) // 2] if rates else None
    return sum(known) if len(known) == len(parts) else None, median, line.observed.peak_memory_bytes
