"""Where the numbers come from: data folders, commits, versions, machines, and the plan beside what happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi3v.provenance.manifest import ResultError, read_json
from phi3v.reporting.results import Work
from phi3v.reporting.tables import GB, AccuracyLine, SpeedLine, Tables
from phi3v.settings import dataset_key


def datasets(tables: Tables, results: Path) -> list[dict[str, Any]]:
    """Each dataset of the run's rows, and their official splits: what dataset.json and statistics.json say, or why they are not there."""
    used: dict[str, int] = {}
    for line in tables.lines:
        used[line.row.dataset] = used.get(line.row.dataset, 0) + 1
    for name in list(used):
        official = tables.run.datasets[name].official
        if official:
            used.setdefault(official, 0)
    return [_dataset(name, rows, tables, results) for name, rows in used.items()]


def _dataset(name: str, rows: int, tables: Tables, results: Path) -> dict[str, Any]:
    entry = tables.run.datasets[name]
    folder = results.parent / "data" / dataset_key(name, entry)
    facts: dict[str, Any] = {}
    problem = ""
    try:
        facts = read_json(folder / "dataset.json")
    except ResultError as error:
        problem = str(error) if (folder / "dataset.json").exists() else "not converted yet"
        missing = entry.missing_source()
        if not rows and missing is not None:
            problem = f"not present: {missing}"
    statistics: dict[str, Any] = {}
    if (folder / "statistics.json").is_file():
        try:
            statistics = read_json(folder / "statistics.json")
        except ResultError as error:
            problem = str(error)
    return {
        "name": name, "title": entry.title, "metric": entry.metric, "licence": entry.licence, "rows": rows, "folder": str(folder),
        "problem": problem, "splits": _mappings(facts.get("splits")), "rejected": facts.get("rejected"),
        "rejections": _rejections(folder / "rejected.jsonl"), "statistics": _mappings(statistics),
        "sources": {split: source.url for split, source in entry.splits.items()}, "leakage": _mappings(facts.get("leakage")),
        "revisions": {split: source.get("revision") for split, source in _mappings(facts.get("source")).items()},
    }  # fmt: skip


def _mappings(value: Any) -> dict[str, dict[str, Any]]:
    """The members of an object that are objects themselves."""
    return {key: item for key, item in value.items() if isinstance(item, dict)} if isinstance(value, dict) else {}


SHOWN_REJECTIONS = 10


def _rejections(path: Path) -> list[str]:
    """The first source rows that were left out, each with its reason."""
    if not path.is_file():
        return []
    found: list[str] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if len(found) == SHOWN_REJECTIONS:
                break
            try:
                item = json.loads(line)
                found.append(f"{item.get('split', '')}: {item.get('where', '')}: {item.get('reason', '')}"[:300])
            except (ValueError, AttributeError):
                found.append(line.strip()[:300])
    return found


def provenance(tables: Tables, results: Path) -> dict[str, Any]:
    """Distinct commits, versions, devices and people behind the results, and each manifest's summary."""
    manifests = [{**(work.manifest or {}), "folder": name} for name, work in _works(tables, results).items()]
    versions: dict[str, set[str]] = {}
    for manifest in manifests:
        for package, version in (manifest.get("versions") or {}).items():
            versions.setdefault(package, set()).add(str(version))
    return {
        "manifests": manifests,
        "versions": {package: sorted(found) for package, found in versions.items()},
        "commits": _distinct(manifests, "commit"),
        "dirty": sum(1 for manifest in manifests if manifest.get("dirty")),
        "devices": _distinct(manifests, "device"),
        "hosts": _distinct(manifests, "host"),
        "users": _distinct(manifests, "user"),
    }


def parents(tables: Tables, results: Path) -> dict[str, Path]:
    """Folder's name under the run's results to folder, of every result that the report shows numbers of."""
    return {name: work.folder for name, work in _works(tables, results).items()}


def _works(tables: Tables, results: Path) -> dict[str, Work]:
    """The finished jobs behind the tables, by folder; baselines that rows share once."""
    found: dict[str, Work] = {}
    for line in tables.jobs:
        if isinstance(line, SpeedLine):
            works = [line.result.work] if line.result else []
        else:
            seen = line.result
            works = [seen.baseline, seen.train, seen.evaluate, seen.official_work] if seen else []
        found |= {_relative(work.folder, results): work for work in works if work.manifest is not None}
    return found


def fingerprints(lines: list[SpeedLine]) -> list[tuple[list[str], dict[str, Any]]]:
    """What speed rows were measured on: (rows, facts that are known), rows with the same facts together."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for line in lines:
        facts = line.value("fingerprint")
        if not isinstance(facts, dict):
            continue
        known = {name: _fact(value) for name, value in facts.items() if value not in (None, [], {})}
        groups.setdefault(json.dumps(known, sort_keys=True), ([], known))[0].append(line.row.row)
    return list(groups.values())


def _fact(value: Any) -> str:
    """A fact of a fingerprint in words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_fact(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return "; ".join(_fact(item) for item in value)
    return str(value)


def _distinct(manifests: list[dict[str, Any]], name: str) -> list[str]:
    return sorted({str(manifest[name]) for manifest in manifests if manifest.get(name)})


def _relative(folder: Path, results: Path) -> str:
    return str(folder.relative_to(results)) if folder.is_relative_to(results) else str(folder)


PLAN_COLUMNS = (
    "row",
    "plan",
    "hours planned",
    "hours taken",
    "images/s planned",
    "images/s seen",
    "allocated GB planned",
    "allocated GB seen",
)


def plan(tables: Tables, results: Path) -> list[list[Any]]:
    """What was planned (results/NAME/plan/plan.json) beside what was measured, in PLAN_COLUMNS; none where no plan was made.

    A row's hours are those of one seed's job: training and the three passes, that before training included.
    """
    path = results / "plan" / "plan.json"
    if not path.is_file():
        return []
    try:
        planned = {entry["row"]: entry for entry in read_json(path)["rows"]}
    except (ResultError, KeyError, TypeError):
        return []
    found = []
    for line in tables.jobs:
        entry = planned.get(line.row.row)
        if entry is None:
            continue
        taken = rate = peak = None
        if isinstance(line, SpeedLine) and line.result is not None:
            taken, rate, peak = (
                line.result.work.seconds,
                line.value("images_per_second"),
                line.value("peak_memory_bytes"),
            )
        elif isinstance(line, AccuracyLine) and line.result is not None:
            parts = [work.seconds for work in (line.result.baseline, line.result.train, line.result.evaluate)]
            taken = sum(part or 0 for part in parts) if None not in parts else None
            rates = sorted(point["images_per_second"] for point in line.result.curve if point.get("images_per_second"))
            rate = rates[len(rates) // 2] if rates else None
            peak = line.result.observed.get("peak_memory_bytes")
        found.append(
            [line.row.row, entry.get("status"), entry.get("hours"), taken / 3600 if taken else None, entry.get("images_per_second"), rate,
             entry.get("allocated_gb"), peak / GB if peak else None]
        )  # fmt: skip
    return found
