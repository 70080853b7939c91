"""Where the numbers come from: data folders, commits, versions, machines, and the plan beside what happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi3v.reporting.results import ResultError, Work, read_json
from phi3v.reporting.tables import GB, AccuracyLine, SpeedLine, Tables
from phi3v.settings import dataset_key


def datasets(tables: Tables, results: Path) -> list[dict[str, Any]]:
    """Each dataset of the run's rows: what dataset.json says, or why it is not there."""
    used: dict[str, int] = {}
    for line in tables.lines:
        used[line.row.dataset] = used.get(line.row.dataset, 0) + 1
    found = []
    for name, rows in used.items():
        entry = tables.run.datasets[name]
        folder = results.parent / "data" / dataset_key(name, entry)
        facts: dict[str, Any] = {}
        problem = ""
        try:
            facts = read_json(folder / "dataset.json")
        except ResultError as error:
            problem = "not converted yet" if not (folder / "dataset.json").exists() else str(error)
        splits = facts.get("splits") if isinstance(facts.get("splits"), dict) else {}
        found.append(
            {
                "name": name, "title": entry.title, "metric": entry.metric, "licence": entry.licence, "rows": rows, "folder": str(folder),
                "problem": problem, "splits": splits, "rejected": facts.get("rejected"), "statistics": facts.get("statistics") or {},
                "sources": {split: source.url for split, source in entry.splits.items()}, "leakage": facts.get("leakage"),
            }
        )  # fmt: skip
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
    "peak GB planned",
    "peak GB seen",
)


def plan(tables: Tables, results: Path) -> list[list[Any]]:
    """The plan's rows (results/NAME/plan/plan.json) beside what was measured, in PLAN_COLUMNS; none where no plan was made."""
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
            parts = [work.seconds for work in (line.result.train, line.result.evaluate)]
            taken = sum(part or 0 for part in parts) if None not in parts else None
            rates = sorted(point["images_per_second"] for point in line.result.curve if point.get("images_per_second"))
            rate = rates[len(rates) // 2] if rates else None
            peak = line.result.observed.get("peak_memory_bytes")
        found.append(
            [line.row.row, entry.get("status"), entry.get("hours"), taken / 3600 if taken else None, entry.get("images_per_second"), rate,
             entry.get("peak_gb"), peak / GB if peak else None]
        )  # fmt: skip
    return found
