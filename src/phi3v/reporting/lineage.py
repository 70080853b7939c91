"""The chain from a result back to where its data came from, as the manifests, dataset files and download locks state it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi3v.provenance.manifest import digest_file, parent_file
from phi3v.reporting.results import ResultError, read_json

SHORT = 12


@dataclass
class Link:
    """One result, dataset, download or file of the chain."""

    name: str
    """What the one that was made from it calls it: data, model, config …"""
    path: Path
    kind: str
    """train, evaluate, speed, report; dataset, download, source, file, missing."""
    facts: dict[str, Any] = field(default_factory=dict)
    made_from: list[Link] = field(default_factory=list)
    problem: str = ""
    """Why this is not what the result above was made from; empty where digests agree."""
    url: str = ""
    """Of a source, as its download was asked for."""

    @property
    def headline(self) -> str:
        """The link in a line."""
        facts = "  ".join(f"{name} {value}" for name, value in self.facts.items() if value not in (None, ""))
        text = f"{self.name}: {self.url or self.path}  [{self.kind}]  {facts}".rstrip()
        return f"{text}\n! {self.problem}" if self.problem else text


def chain(path: Path, root: Path = Path()) -> Link:
    """The chain behind a result's folder or a file in it. root: folder that the manifests' relative paths start from.

    Raises ResultError where there is no manifest, dataset.json or download lock to start from.
    """
    if not (root / path).exists():
        raise ResultError(f"{path}: no such file or folder; expected the folder of a result, or a file in it")
    folder = path if path.is_dir() else path.parent
    if parent_file(folder) is None:
        raise ResultError(
            f"{folder}: no manifest.json, dataset.json or sources.lock.json; expected the folder of a result, or a file in it"
        )
    return _link("result", folder, root, None)


def of_row(report: Link, row: str) -> Link:
    """A report's chain with one row's jobs only: its training, evaluation or speed, and the evaluations before training they compare with.

    Raises ResultError for a row that the report has no result of.
    """
    own = [link for link in report.made_from if link.path.name == row]
    if not own:
        known = sorted({link.path.name for link in report.made_from if link.path.parent.name in ("train", "speed")})
        raise ResultError(
            f"{report.path}: row {row!r}: no result behind this report; expected one of {', '.join(known)}"
        )
    start = {_paths(link) for link in own if link.kind == "train"}
    base = [link for link in report.made_from if link.path.parent.name == "base" and _paths(link) in start]
    kept = [link for link in report.made_from if link.kind == "file"] + own + base
    return Link(report.name, report.path, report.kind, report.facts, kept, report.problem)


def lines(link: Link, indent: str = "", seen: set[Path] | None = None) -> Iterator[str]:
    """The chain as an indented tree; what was shown before is named again and not opened."""
    seen = set() if seen is None else seen
    first, *more = link.headline.split("\n")
    repeated = link.path in seen and bool(link.made_from)
    yield indent + first + ("  (above)" if repeated else "")
    yield from (indent + "  " + line for line in more)
    if repeated:
        return
    seen.add(link.path)
    for other in link.made_from:
        yield from lines(other, indent + "    ", seen)


def problems(link: Link) -> list[str]:
    """Every link that is not what its result was made from, once however many results share it."""
    own = [f"{link.path}: {link.problem}"] if link.problem else []
    return list(dict.fromkeys(own + [text for other in link.made_from for text in problems(other)]))


def _paths(link: Link) -> tuple[str, ...]:
    return tuple(sorted(str(other.path) for other in link.made_from if other.name in ("data", "model")))


def _link(name: str, path: Path, root: Path, recorded: str | None) -> Link:
    """recorded: the digest that the result above noted, None where it noted none."""
    here = root / path
    found = parent_file(here)
    if found is None:
        if not here.is_file():
            return Link(name, path, "missing", problem="not there any more" if recorded else "")
        return Link(name, path, "file", {"sha256": digest_file(here)[:SHORT]}, [], _changed(here, recorded))
    read = {"manifest.json": _manifest, "dataset.json": _dataset, "sources.lock.json": _download}[found.name]
    link = read(name, path, read_json(found), root)
    link.problem = _changed(found, recorded)
    return link


def _changed(file: Path, recorded: str | None) -> str:
    if recorded is None:
        return ""
    now = digest_file(file)
    return "" if now == recorded else f"{file.name} changed since: was {recorded[:SHORT]}, is {now[:SHORT]}"


def _manifest(name: str, path: Path, manifest: dict[str, Any], root: Path) -> Link:
    commit = (manifest.get("commit") or "unknown")[:SHORT]
    facts = {
        "commit": commit + (f" with changes {manifest['dirty']}" if manifest.get("dirty") else ""),
        "seed": manifest.get("seed"), "device": manifest.get("device"), "finished": manifest.get("finished"),
        "seconds": manifest.get("seconds"), "packages": ((manifest.get("environment") or {}).get("packages") or "")[:SHORT],
    }  # fmt: skip
    made_from = [
        _link(given, Path(noted["path"]), root, noted.get("sha256"))
        for given, noted in (manifest.get("inputs") or {}).items()
        if "path" in noted
    ]
    return Link(name, path, manifest.get("kind", "result"), facts, made_from)


def _dataset(name: str, path: Path, facts: dict[str, Any], root: Path) -> Link:
    splits = {
        split: f"{values.get('examples')} examples, sha256 {values.get('sha256', '')[:SHORT]}"
        for split, values in (facts.get("splits") or {}).items()
    }
    about = {"converter": f"{facts.get('converter')} {facts.get('converter_version')}", **splits}
    source = path / "source"
    made_from = [_link("source", source, root, None)] if parent_file(root / source) else []
    return Link(name, path, "dataset", about, made_from)


def _download(name: str, path: Path, lock: dict[str, Any], root: Path) -> Link:
    return Link(name, path, "download", {}, [_source(entry, root) for entry in lock.get("sources") or []])


def _source(entry: dict[str, Any], root: Path) -> Link:
    files = entry.get("files") or []
    facts = {"revision": entry.get("resolved") or entry.get("revision"), "files": len(files)}
    if len(files) == 1:
        facts["sha256"] = files[0]["sha256"][:SHORT]
    link = Link("from", Path(entry["url"]), "source", facts, url=entry["url"])
    local = Path(entry["url"].removeprefix("file:").removeprefix("//"))
    if entry["url"].startswith("file:") and (root / local).is_dir() and parent_file(root / local) is not None:
        link.made_from = [_link("made by", local, root, None)]
    return link
