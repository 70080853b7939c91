"""A run as an RO-Crate (https://w3id.org/ro/crate/1.1, Workflow Run Crate 0.5): the workflow, each job, and how they depend on each other.

The crate holds settings, tables, metrics and manifests; weights, pictures and predictions stay where they are, named by their digests
in the manifests.
"""

from __future__ import annotations

import hashlib
import mimetypes
import shutil
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

from phi3v import __version__
from phi3v.provenance.lineage import Link, chain
from phi3v.provenance.manifest import SOURCE, Manifest, ResultError, digest_file, parent_file, read_json

if TYPE_CHECKING:
    from rocrate.model import ContextEntity, DataEntity
    from rocrate.rocrate import ROCrate

PROFILES = [
    ("https://w3id.org/ro/wfrun/process/0.5", "Process Run Crate", "0.5"),
    ("https://w3id.org/ro/wfrun/workflow/0.5", "Workflow Run Crate", "0.5"),
    ("https://w3id.org/workflowhub/workflow-ro-crate/1.0", "Workflow RO-Crate", "1.0"),
]
WORKFLOW_FILES = ("Snakefile", "workflow/rules/*.smk", "LICENSE")
SCRIPTS = {"train": "finetune.py", "evaluate": "evaluate.py", "speed": "speed.py", "report": "report.py"}
# What a job leaves that is small: manifests and their neighbours.
SMALL = ("*.json", "*.tsv", "*.md", "index.html", "before/*.json", "after/*.json", "control/*.json")
SHA256 = "https://w3id.org/ro/terms/workflow-run#sha256"
LICENCE = "https://spdx.org/licenses/MIT"


@dataclass
class Job:
    """A link of the chain that left files in the crate."""

    home: Path
    results: list[DataEntity]
    inputs: list[DataEntity] = field(default_factory=list)
    """Files that stand for what it was made from."""


def export(report: Path, folder: Path, root: Path = Path()) -> Path:
    """Write the crate of the run whose report folder is given; returns its metadata file.

    Raises ResultError if `report` is no report, FileExistsError if the folder holds something else than a crate.
    """
    from rocrate.rocrate import ROCrate

    link = chain(report, root)
    if link.kind != "report":
        raise ResultError(f"{report}: got a result of kind {link.kind}; expected a report's folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / "ro-crate-metadata.json").exists():
        raise FileExistsError(f"{folder}: is there and is no crate; expected a new folder")
    crate = ROCrate(version="1.1")
    crate.metadata.extra_terms["sha256"] = SHA256
    jobs: dict[str, Job] = {}
    for pattern in WORKFLOW_FILES:
        for path in sorted(SOURCE.glob(pattern)):
            _add_file(crate, path, str(path.relative_to(SOURCE)))
    _add_links(crate, link, root, jobs)
    _describe(crate, jobs, jobs[str(link.path)])
    shutil.rmtree(folder, ignore_errors=True)
    crate.write(folder)
    return folder / "ro-crate-metadata.json"


def _add_file(crate: ROCrate, source: Path, name: str) -> DataEntity:
    known = crate.get(name)
    if known is None:
        about = {
            "name": name,
            "encodingFormat": mimetypes.guess_type(name)[0] or "text/plain",
            "sha256": digest_file(source),
        }
        known = crate.add_file(source, name, properties=about, record_size=True)
    return known


def _add_links(crate: ROCrate, link: Link, root: Path, jobs: dict[str, Job]) -> list[DataEntity]:
    """Copy what states where the link comes from, and note its job; returns the files that stand for it."""
    if str(link.path) in jobs:
        return jobs[str(link.path)].results
    place = Path(str(link.path).removeprefix("file:").removeprefix("//"))
    found = parent_file(root / place) if (root / place).is_dir() else None
    if found is None:
        return [_add_file(crate, root / place, _name(place))] if link.kind == "file" else []
    home, base = found.parent.resolve(), root.resolve()
    patterns = SMALL if found.name == "manifest.json" else (found.name,)
    files = [path for pattern in patterns for path in sorted(home.glob(pattern)) if path.is_file()]
    names = [path.relative_to(base) if path.is_relative_to(base) else path for path in files]
    job = Job(home, [_add_file(crate, path, _name(name)) for path, name in zip(files, names, strict=True)])
    jobs[str(link.path)] = job
    for other in link.made_from:
        job.inputs += [file for file in _add_links(crate, other, root, jobs) if file not in job.inputs]
    return job.results


def _name(path: Path) -> str:
    """A file's name in the crate; files from elsewhere stand in outside/, a folder for each that they come from."""
    if not path.is_absolute() and ".." not in path.parts:
        return path.as_posix()
    return f"outside/{hashlib.sha256(str(path.parent).encode()).hexdigest()[:8]}/{path.name}"


def _describe(crate: ROCrate, jobs: dict[str, Job], report: Job) -> None:
    """The root, the workflow, the run as a whole, and an action for each job that has a manifest."""
    made = {job.home: job for job in jobs.values() if (job.home / "manifest.json").is_file()}
    given = [file for job in jobs.values() if job.home not in made for file in job.results]
    manifests = {home: cast(Manifest, read_json(home / "manifest.json")) for home in made}
    manifest = manifests[report.home]
    commit = manifest.get("commit") or "unknown"
    user = _entity(crate, "#user", "Person", name=manifest.get("user") or "unknown")
    snakefile = SOURCE / "Snakefile"
    about: dict[str, object] = {"name": "phi3v", "version": commit, "license": {"@id": LICENCE}}
    about |= {"encodingFormat": "text/plain", "sha256": digest_file(snakefile)}
    workflow = crate.add_workflow(
        snakefile, "Snakefile", properties=about, main=True, lang="snakemake", record_size=True
    )
    actions = []
    for number, (home, job) in enumerate(made.items(), 1):
        about = _about(manifests[home]) | {"name": f"{manifests[home].get('kind')} {home.name}", "agent": user}
        tool = _tool(crate, manifests[home])
        actions.append(crate.add_action(tool, f"#job-{number}", job.inputs, job.results, properties=about))
    about = _about(manifest) | {"name": f"run of phi3v at {commit[:12]}", "agent": user}
    about["startTime"] = min(action["startTime"] for action in actions)
    run = crate.add_action(workflow, "#run", list(dict.fromkeys(given)), report.results, properties=about)
    _entity(crate, LICENCE, "CreativeWork", name="MIT License", identifier="MIT", url={"@id": LICENCE})
    root = {
        "name": f"phi3v: {manifest.get('settings', {}).get('config') or 'a run'}",
        "description": "Settings, tables, metrics and manifests of one run that fine-tunes Phi-3.5-vision;"
        " weights and pictures stay outside.",
        "datePublished": run["endTime"],
        "license": {"@id": LICENCE},
        "conformsTo": [_entity(crate, uri, "CreativeWork", name=name, version=of) for uri, name, of in PROFILES],
        "mentions": [run, *actions],
    }
    for name, value in root.items():
        crate.root_dataset[name] = value


def _entity(crate: ROCrate, uri: str, kind: str, **values: object) -> ContextEntity:
    return crate.get(uri) or crate.add_jsonld({"@id": uri, "@type": kind, **values})


def _tool(crate: ROCrate, manifest: Manifest) -> ContextEntity:
    """The script of a job's kind, as an application with its version."""
    name = SCRIPTS.get(manifest.get("kind", ""), "finetune.py")
    version = f"{__version__} {manifest.get('commit') or ''}".strip()
    uri = f"#scripts-{name.removesuffix('.py')}"
    return _entity(crate, uri, "SoftwareApplication", name=f"phi3v scripts/{name}", softwareVersion=version)


def _about(manifest: Manifest) -> dict[str, object]:
    """Command and times of a job; its start is its end less its seconds."""
    end = datetime.fromisoformat(manifest["finished"])
    start = end - timedelta(seconds=manifest.get("seconds") or 0)
    return {
        "description": manifest.get("command", ""),
        "startTime": start.isoformat(timespec="seconds"),
        "endTime": end.isoformat(),
        "actionStatus": {"@id": "http://schema.org/CompletedActionStatus"},
    }
