"""The chain from a result back to where its data came from, as the manifests, dataset files and download locks state it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from phi3v.provenance.manifest import PARENT_FILES, ResultError, digest_file, parent_file, read_json

SHORT = 12


@dataclass
class Link:
    """One result, dataset, download, source or file of the chain."""

    name: str
    """What the result that was made from it calls it: data, model, config …"""
    path: Path | str
    """A folder or file; of a source, the URL that its download asked for."""
    kind: str
    """train, evaluate, speed, report; dataset, download, source, file, missing."""
    facts: dict[str, object] = field(default_factory=dict)
    made_from: list[Link] = field(default_factory=list)
    problem: str = ""
    """Why this is not what the result above was made from; empty if the digests agree."""


def chain(path: Path, root: Path = Path()) -> Link:
    """The chain behind a result's folder or a file in it. root: the folder that the manifests' relative paths start from.

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
    """A report's chain with the jobs of one row only, and the evaluations before training that it compares with.

    Raises ResultError for a row that the report has no result of.
    """
    jobs = [(Path(link.path), link) for link in report.made_from]
    own = [link for path, link in jobs if path.name == row]
    if not own:
        known = sorted({path.name for path, _ in jobs if path.parent.name in ("train", "speed")})
        raise ResultError(
            f"{report.path}: row {row!r}: no result behind this report; expected one of {', '.join(known)}"
        )
    start = [_data_and_model(link) for link in own if link.kind == "train"]
    base = [link for path, link in jobs if path.parent.name == "base" and _data_and_model(link) in start]
    return replace(report, made_from=[link for _, link in jobs if link.kind == "file"] + own + base)


def _data_and_model(link: Link) -> list[str]:
    return sorted(str(other.path) for other in link.made_from if other.name in ("data", "model"))


def lines(link: Link, indent: str = "", seen: set[Path | str] | None = None) -> Iterator[str]:
    """The chain as an indented tree; a result that was shown before is named again and marked, not opened again."""
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
    """Each link that is not what its result was made from; once, however many results share it."""
    own = [f"{link.path}: {link.problem}"] if link.problem else []
    return list(dict.fromkeys(own + [text for other in link.made_from for text in problems(other)]))


def _link(name: str, path: Path, root: Path, recorded: str | None) -> Link:
    """The link of a path. recorded: the digest that the result above noted, if it noted one."""
    found = parent_file(root / path)
    file = found or root / path
    if not file.is_file():
        return Link(name, path, "missing", problem="not there any more" if recorded else "")
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
