"""A run as an RO-Crate (https://w3id.org/ro/crate/1.1, Workflow Run Crate 0.5): the workflow, each job, and what says how they hang together.

The crate holds settings, tables, metrics and manifests; weights, pictures and predictions stay where they are, named by their digests
in the manifests.
"""

from __future__ import annotations

import hashlib
import mimetypes
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from phi3v import __version__
from phi3v.provenance.lineage import Link, chain
from phi3v.provenance.manifest import SOURCE, ResultError, digest_file, parent_file, read_json, write_json

PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
PROFILE_VERSION = {"https://w3id.org/workflowhub/workflow-ro-crate/1.0": "1.0"}
WORKFLOW_FILES = ("Snakefile", "workflow/rules/*.smk", "LICENSE")
SCRIPTS = {"train": "finetune.py", "evaluate": "evaluate.py", "speed": "speed.py", "report": "report.py"}
# What a job leaves that is small: manifests and their neighbours.
SMALL = ("*.json", "*.tsv", "*.md", "index.html", "before/*.json", "after/*.json", "control/*.json")
CONTEXT, TERMS = "https://w3id.org/ro/crate/1.1/context", "https://w3id.org/ro/terms/workflow-run#"
LICENCE = "https://spdx.org/licenses/MIT"


def export(report: Path, folder: Path, root: Path = Path()) -> Path:
    """Write the crate of the run whose report folder is given; returns its metadata file.

    Raises ResultError where `report` is no report, FileExistsError where the folder holds something else than a crate.
    """
    link = chain(report, root)
    if link.kind != "report":
        raise ResultError(f"{report}: got a result of kind {link.kind}; expected a report's folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / "ro-crate-metadata.json").exists():
        raise FileExistsError(f"{folder}: is there and is no crate; expected a new folder")
    shutil.rmtree(folder, ignore_errors=True)
    entities = _Entities(folder)
    for pattern in WORKFLOW_FILES:
        for path in sorted(SOURCE.glob(pattern)):
            entities.add_file(path, str(path.relative_to(SOURCE)))
    jobs: dict[str, dict[str, Any]] = {}
    _walk(link, root, entities, jobs)
    manifest = read_json(root / report / "manifest.json")
    _describe(entities, jobs, manifest, [entities.files[name]["@id"] for name in jobs[str(link.path)]["_files"]])
    path = folder / "ro-crate-metadata.json"
    write_json(path, {"@context": [CONTEXT, {"sha256": TERMS + "sha256"}], "@graph": entities.graph()})
    return path


class _Entities:
    """The crate's entities by id, and the files that were copied into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}
        self.others: dict[str, dict[str, Any]] = {}

    def add_file(self, source: Path, name: str) -> str:
        """Copy a file into the crate; returns its id."""
        if name not in self.files:
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            kind = mimetypes.guess_type(name)[0] or "text/plain"
            self.files[name] = {
                "@id": name, "@type": "File", "name": name, "encodingFormat": kind, "contentSize": str(source.stat().st_size),
                "sha256": digest_file(source),
            }  # fmt: skip
        return name

    def add(self, uri: str, kind: str | list[str], **values: Any) -> dict[str, str]:
        """Add an entity; returns a reference to it."""
        self.others[uri] = {"@id": uri, "@type": kind, **values}
        return {"@id": uri}

    def graph(self) -> list[dict[str, Any]]:
        return [*self.others.values(), *(file for name, file in self.files.items() if name not in self.others)]


def _walk(link: Link, root: Path, entities: _Entities, jobs: dict[str, dict[str, Any]]) -> list[str]:
    """Copy what says where the link comes from, and note its job; returns the ids of the files that stand for it."""
    if str(link.path) in jobs:
        return jobs[str(link.path)]["_files"]
    place = Path(str(link.path).removeprefix("file:").removeprefix("//"))
    found = parent_file(root / place) if (root / place).is_dir() else None
    if found is None:
        return [entities.add_file(root / place, _name(place))] if link.kind == "file" else []
    home = found.parent
    patterns = SMALL if found.name == "manifest.json" else (found.name,)
    names = [
        entities.add_file(path, _name(_inside(path, root)))
        for pattern in patterns
        for path in sorted(home.glob(pattern))
        if path.is_file()
    ]
    job: dict[str, Any] = {"_files": names, "_link": link, "_home": home}
    jobs[str(link.path)] = job
    job["_objects"] = [name for other in link.made_from for name in _walk(other, root, entities, jobs)]
    return names


def _inside(path: Path, root: Path) -> Path:
    base = root.resolve()
    return path.resolve().relative_to(base) if path.resolve().is_relative_to(base) else path.resolve()


def _name(path: Path) -> str:
    """A file's name in the crate; files from elsewhere stand in outside/, a folder for each that they come from."""
    if not path.is_absolute() and ".." not in path.parts:
        return path.as_posix()
    return f"outside/{hashlib.sha256(str(path.parent).encode()).hexdigest()[:8]}/{path.name}"


def _describe(
    entities: _Entities, jobs: dict[str, dict[str, Any]], manifest: dict[str, Any], results: list[str]
) -> None:
    """The root, the workflow, the run as a whole, and an action for each job that has a manifest."""
    commit = manifest.get("commit") or "unknown"
    user = entities.add("#user", "Person", name=manifest.get("user") or "unknown")
    language = entities.add(
        "https://w3id.org/workflowhub/workflow-ro-crate#snakemake", "ComputerLanguage", name="Snakemake",
        identifier={"@id": "https://snakemake.github.io"}, url={"@id": "https://snakemake.github.io"},
    )  # fmt: skip
    entities.add(
        "Snakefile", ["File", "SoftwareSourceCode", "ComputationalWorkflow"], name="phi3v", version=commit,
        programmingLanguage=language, license={"@id": LICENCE}, sha256=entities.files["Snakefile"]["sha256"],
        encodingFormat="text/plain",
    )  # fmt: skip
    actions: list[dict[str, str]] = []
    started: list[str] = []
    inputs: list[str] = []
    seen: set[Path] = set()
    for job in jobs.values():
        path = job["_home"] / "manifest.json"
        if not path.is_file() or path in seen:
            inputs += [] if path.is_file() else job["_files"]
            continue
        seen.add(path)
        own = read_json(path)
        begin, end = _times(own)
        started.append(begin)
        actions.append(
            entities.add(
                f"#job-{len(actions) + 1}", "CreateAction", name=f"{own.get('kind')} {job['_home'].name}",
                description=own.get("command", ""), instrument=_tool(entities, own), agent=user, startTime=begin, endTime=end,
                actionStatus={"@id": "http://schema.org/CompletedActionStatus"},
                object=[{"@id": name} for name in dict.fromkeys(job["_objects"])],
                result=[{"@id": name} for name in job["_files"]],
            )
        )  # fmt: skip
    run = entities.add(
        "#run", "CreateAction", name=f"run of phi3v at {commit[:12]}", description=manifest.get("command", ""),
        instrument={"@id": "Snakefile"}, agent=user, startTime=min(started), endTime=_times(manifest)[1],
        actionStatus={"@id": "http://schema.org/CompletedActionStatus"},
        object=[{"@id": name} for name in dict.fromkeys(inputs)], result=[{"@id": name} for name in results],
    )  # fmt: skip
    profiles = [
        entities.add(uri, "CreativeWork", name=name, version=PROFILE_VERSION.get(uri, "0.5"))
        for uri, name in PROFILES.items()
    ]
    entities.add(LICENCE, "CreativeWork", name="MIT License", identifier="MIT", url={"@id": LICENCE})
    entities.add(
        "ro-crate-metadata.json", "CreativeWork", about={"@id": "./"},
        conformsTo=[{"@id": "https://w3id.org/ro/crate/1.1"}, {"@id": "https://w3id.org/workflowhub/workflow-ro-crate/1.0"}],
    )  # fmt: skip
    entities.add(
        "./", "Dataset", name=f"phi3v: {manifest.get('settings', {}).get('config') or 'a run'}",
        description="Settings, tables, metrics and manifests of one run that fine-tunes Phi-3.5-vision; weights and pictures stay outside.",
        datePublished=_times(manifest)[1], license={"@id": LICENCE}, conformsTo=profiles, mainEntity={"@id": "Snakefile"},
        mentions=[run, *actions], hasPart=[{"@id": name} for name in entities.files],
    )  # fmt: skip


def _tool(entities: _Entities, manifest: dict[str, Any]) -> dict[str, str]:
    """The script of a job's kind, as an application with its version."""
    name = SCRIPTS.get(str(manifest.get("kind")), "finetune.py")
    return entities.add(
        f"#scripts-{name.removesuffix('.py')}", "SoftwareApplication", name=f"phi3v scripts/{name}",
        softwareVersion=f"{__version__} {manifest.get('commit') or ''}".strip(),
    )  # fmt: skip


def _times(manifest: dict[str, Any]) -> tuple[str, str]:
    """(start, end) of a job as ISO 8601, from its end and its seconds."""
    end = datetime.fromisoformat(manifest["finished"])
    return (end - timedelta(seconds=manifest.get("seconds") or 0)).isoformat(timespec="seconds"), end.isoformat()
