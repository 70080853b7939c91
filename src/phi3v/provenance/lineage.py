"""The chain from a result back to the sources of its data, from manifests, dataset files and download locks.

`lines` prints it. `export_crate` writes it as an RO-Crate (https://w3id.org/ro/crate/1.1, Workflow Run Crate 0.5) with
the workflow, the jobs and their dependencies. A crate contains settings, tables, metrics and manifests, but no weights,
pictures and predictions; their digests are in the manifests.
"""

from __future__ import annotations

import hashlib
import mimetypes
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from phi3v import __version__
from phi3v.provenance.manifest import PARENT_FILES, SOURCE, Manifest, ResultError, digest_file, parent_file, read_json

if TYPE_CHECKING:
    from rocrate.model import ContextEntity, DataEntity
    from rocrate.rocrate import ROCrate

SHORT = 12
PROFILES = [
    ("https://w3id.org/ro/wfrun/process/0.5", "Process Run Crate", "0.5"),
    ("https://w3id.org/ro/wfrun/workflow/0.5", "Workflow Run Crate", "0.5"),
    ("https://w3id.org/workflowhub/workflow-ro-crate/1.0", "Workflow RO-Crate", "1.0"),
]
WORKFLOW_FILES = ("Snakefile", "workflow/rules/*.smk", "LICENSE")
SCRIPTS = {
    "train": "finetune.py", "evaluate": "evaluate.py", "score": "score.py", "speed": "speed.py", "report": "report.py",
}  # fmt: skip
# Small files of a job: manifests and others in the same folder.
SMALL = ("*.json", "*.tsv", "*.md", "index.html", "before/*.json", "after/*.json", "control/*.json")
SHA256 = "https://w3id.org/ro/terms/workflow-run#sha256"
LICENCE = "https://spdx.org/licenses/MIT"


@dataclass
class Link:
    """One result, dataset, download, source or file of the chain."""

    name: str
    """Name in the result that used it: data, model, config …"""
    path: Path | str
    """Folder or file. For a source, the requested URL."""
    kind: str
    """train, evaluate, speed, report, dataset, download, source, file, missing."""
    facts: dict[str, object] = field(default_factory=dict)
    made_from: list[Link] = field(default_factory=list)
    problem: str = ""
    """Why this differs from the input of the result above. Empty if the digests agree."""


def chain(path: Path, root: Path = Path()) -> Link:
    """The chain behind a result's folder, or a file in it. root: folder that the manifests' relative paths start from.

    Raises ResultError if there is no manifest, dataset.json or download lock to start from.
    """
    expected = "expected the folder of a result, or a file in it"
    if not (root / path).exists():
        raise ResultError(f"{path}: no such file or folder; {expected}")
    folder = path if (root / path).is_dir() else path.parent
    if parent_file(root / folder) is None:
        raise ResultError(f"{folder}: no {', '.join(PARENT_FILES[:-1])} or {PARENT_FILES[-1]}; {expected}")
    return _link("result", folder, root, None)


def of_row(report: Link, row: str) -> Link:
    """A report's chain with the jobs of only one row, and the evaluations before training that it is compared with.

    Raises ResultError for a row without a result in the report.
    """
    jobs = [(Path(link.path), link) for link in report.made_from]
    own = [link for path, link in jobs if path.name == row]
    if not own:
        known = sorted({path.name for path, _ in jobs if path.parent.name in ("train", "speed")})
        raise ResultError(
            f"{report.path}: row {row!r}: this report has no result of it; expected one of {', '.join(known)}"
        )
    start = [_data_and_model(link) for link in own if link.kind == "train"]
    base = [link for path, link in jobs if path.parent.name == "base" and _data_and_model(link) in start]
    return replace(report, made_from=[link for _, link in jobs if link.kind == "file"] + own + base)


def _data_and_model(link: Link) -> list[str]:
    return sorted(str(other.path) for other in link.made_from if other.name in ("data", "model"))


def lines(link: Link, indent: str = "", seen: set[Path | str] | None = None) -> Iterator[str]:
    """The chain as an indented tree. A repeated result is marked and not expanded again."""
    seen = set() if seen is None else seen
    facts = "  ".join(f"{name} {value}" for name, value in link.facts.items() if value not in (None, ""))
    repeated = link.path in seen and bool(link.made_from)
    yield f"{indent}{link.name}: {link.path}  [{link.kind}]  {facts}".rstrip() + ("  (above)" if repeated else "")
    if link.problem:
        yield f"{indent}  ! {link.problem}"
    if not repeated:
        seen.add(link.path)
        for other in link.made_from:
            yield from lines(other, indent + "    ", seen)


def problems(link: Link) -> list[str]:
    """Each link that differs from the input of its result, without duplicates."""
    own = [f"{link.path}: {link.problem}"] if link.problem else []
    return list(dict.fromkeys(own + [text for other in link.made_from for text in problems(other)]))


def _link(name: str, path: Path, root: Path, recorded: str | None) -> Link:
    """The link of a path. recorded: digest in the manifest of the result above, if any."""
    found = parent_file(root / path)
    file = found or root / path
    if not file.is_file():
        return Link(name, path, "missing", problem="no longer exists" if recorded else "")
    now = digest_file(file)
    if found is None:
        link = Link(name, path, "file", {"sha256": now[:SHORT]})
    else:
        read = dict(zip(PARENT_FILES, (_manifest, _dataset, _download), strict=True))[found.name]
        link = read(name, path, read_json(found), root)
    if recorded not in (None, now):
        link.problem = f"{file.name} changed since: was {str(recorded)[:SHORT]}, is {now[:SHORT]}"
    return link


def _manifest(name: str, path: Path, manifest: dict[str, Any], root: Path) -> Link:
    commit, dirty = (manifest.get("commit") or "unknown")[:SHORT], manifest.get("dirty")
    facts: dict[str, object] = {"commit": f"{commit} with changes {dirty}" if dirty else commit}
    facts |= {fact: manifest.get(fact) for fact in ("seed", "device", "finished", "seconds")}
    facts["packages"] = manifest.get("environment", {}).get("packages", "")[:SHORT]
    inputs = manifest.get("inputs", {}).items()
    made_from = [_link(given, Path(of["path"]), root, of.get("sha256")) for given, of in inputs if "path" in of]
    return Link(name, path, manifest.get("kind", "result"), facts, made_from)


def _dataset(name: str, path: Path, dataset: dict[str, Any], root: Path) -> Link:
    facts: dict[str, object] = {"converter": f"{dataset.get('converter')} {dataset.get('converter_version')}"}
    for split, of in dataset.get("splits", {}).items():
        facts[split] = f"{of.get('examples')} examples, sha256 {of.get('sha256', '')[:SHORT]}"
    source = path / "source"
    return Link(
        name, path, "dataset", facts, [_link("source", source, root, None)] if parent_file(root / source) else []
    )


def _download(name: str, path: Path, lock: dict[str, Any], root: Path) -> Link:
    return Link(name, path, "download", {}, [_source(entry, root) for entry in lock.get("sources", [])])


def _source(entry: dict[str, Any], root: Path) -> Link:
    url, files = entry["url"], entry.get("files", [])
    facts: dict[str, object] = {"revision": entry.get("resolved") or entry.get("revision"), "files": len(files)}
    if len(files) == 1:
        facts["sha256"] = files[0]["sha256"][:SHORT]
    local = Path(url.removeprefix("file:").removeprefix("//"))
    made = url.startswith("file:") and (root / local).is_dir() and parent_file(root / local) is not None
    return Link("from", url, "source", facts, [_link("made by", local, root, None)] if made else [])


@dataclass
class Job:
    """A link of the chain that has files in the crate."""

    home: Path
    results: list[DataEntity]
    inputs: list[DataEntity] = field(default_factory=list)
    """Files that represent its inputs."""


def export_crate(report: Path, folder: Path, root: Path = Path()) -> Path:
    """Writes the crate of the run with the given report folder. Returns its metadata file.

    Raises ResultError if `report` is no report, FileExistsError if the folder contains anything but a crate.
    """
    from rocrate.rocrate import ROCrate

    link = chain(report, root)
    if link.kind != "report":
        raise ResultError(f"{report}: got a result of kind {link.kind}; expected a report's folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / "ro-crate-metadata.json").exists():
        raise FileExistsError(f"{folder}: exists and is not a crate; choose a new folder")
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
    """Adds the files that describe the link's origin, and records its job. Returns the files that represent it."""
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
    """Name of a file in the crate. Files from outside are in outside/, in one folder per source folder."""
    if not path.is_absolute() and ".." not in path.parts:
        return path.as_posix()
    return f"outside/{hashlib.sha256(str(path.parent).encode()).hexdigest()[:8]}/{path.name}"


def _describe(crate: ROCrate, jobs: dict[str, Job], report: Job) -> None:
    """The root, the workflow, the run as a whole, and an action for each job with a manifest."""
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
    """The script for a kind of job, as an application with its version."""
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
