"""Where the numbers come from: data folders, commits, versions, machines, and the plan beside what happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi3v.reporting.results import ResultError, read_json
from phi3v.reporting.tables import Tables
from phi3v.settings import dataset_key


def datasets(tables: Tables, results: Path) -> list[dict[str, Any]]:
    """Each dataset of the run's rows: what dataset.json says, or why it is not there."""
    used: dict[str, int] = {}
    for line in [*tables.accuracy, *tables.speed]:
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
    manifests: list[dict[str, Any]] = []
    seen: set[str] = set()
    for line in [*tables.accuracy, *tables.speed]:
        if line.result is None:
            continue
        works = [line.result.work] if hasattr(line.result, "work") else [line.result.baseline, line.result.train, line.result.evaluate]
        for work in works:
            if work.manifest is None or str(work.folder) in seen:
                continue
            seen.add(str(work.folder))
            manifests.append({**work.manifest, "folder": _relative(work.folder, results)})
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


def _distinct(manifests: list[dict[str, Any]], name: str) -> list[str]:
    return sorted({str(manifest[name]) for manifest in manifests if manifest.get(name)})


def _relative(folder: Path, results: Path) -> str:
    return str(folder.relative_to(results)) if folder.is_relative_to(results) else str(folder)


def plan(results: Path) -> list[dict[str, Any]]:
    """The plan's rows (results/NAME/plan/plan.json), where it was made."""
    path = results / "plan" / "plan.json"
    if not path.is_file():
        return []
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return []
    rows = values.get("rows") if isinstance(values, dict) else values
    return [row for row in rows or [] if isinstance(row, dict)]
