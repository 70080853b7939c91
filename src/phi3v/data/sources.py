"""Fetching sources: hub repositories, web files and local files, into one folder with a lock.

    hf://datasets/OWNER/REPO/PATH   hub dataset files (globs allowed);  hf://OWNER/REPO  a model's weights,
    configuration, tokenizer https://HOST/FILE               a web file
    file:FOLDER-OR-FILE, or a path  local files (globs allowed): hard links where the disk allows, else copies; never
    changed

Each URL gets a folder of its own under the output folder. `sources.lock.json`, written last, names every file with its
size and sha256; `sources.pins.json` keeps the same facts from the first use on (a workflow that repeats the step
deletes the lock, not the pins), and what is fetched ever after must be equal to them. Only this module and hub.py,
web.py beside it touch the network.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from phi3v.data.conversations import DataError
from phi3v.provenance.manifest import digest_file, write_json

LOCK = "sources.lock.json"
PINS = "sources.pins.json"


class SourceError(DataError):
    """A source that cannot be fetched, or is not what it was."""


@dataclass(frozen=True)
class File:
    """A fetched file: its path under the source's folder, its size in bytes and its sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """A fetched URL."""

    url: str
    revision: str | None
    """The revision that was asked for."""
    resolved: str | None
    """The hub commit that was fetched."""
    folder: str
    """Its folder, relative to the lock."""
    files: list[File] = field(default_factory=list)


@dataclass(frozen=True)
class Remote:
    """A file to be fetched. `size` and `sha256` are what the server promises; None where it does not say."""

    path: str
    locator: str
    size: int | None
    sha256: str | None = None


def is_local(url: str) -> bool:
    """Whether a URL names local files."""
    return not re.match(r"^(hf|https?)://", url)


def local_path(url: str) -> Path:
    """The path of a local URL: file:///absolute, file:relative or a plain path. Raises SourceError."""
    if re.match(r"^[A-Za-z][A-Za-z0-9+.-]+:", url) and not url.startswith("file:"):
        raise SourceError(f"source {url!r}: unknown kind; expected hf://…, https://…, file:… or a path")
    path = url.removeprefix("file:")
    if path.startswith("//"):
        host, _, rest = path[2:].partition("/")
        if host not in ("", "localhost"):
            raise SourceError(
                f"source {url!r}: host {host!r} in a file URL; expected file:relative/path or file:///absolute/path"
            )
        path = f"/{rest}"
    return Path(path).expanduser()


def folder_name(url: str, revision: str | None) -> str:
    """Folder of a URL: readable, and different for each URL and revision."""
    digest = hashlib.sha256(json.dumps([url, revision]).encode()).hexdigest()[:6]
    words = re.sub(r"[^A-Za-z0-9_.-]+", "-", re.sub(r"^[a-z]+:/*", "", url.split("?")[0])).strip("-.")
    return f"{words[-60:].strip('-.') or 'source'}-{digest}"


def read_lock(path: Path) -> dict[tuple[str, str | None], Source]:
    """Sources of a lock by (url, revision asked for). Raises SourceError when it is not a lock."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        sources = [Source(**{**item, "files": [File(**file) for file in item["files"]]}) for item in value["sources"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SourceError(f"{path}: not a lock of fetched sources ({error}); remove it to fetch anew") from None
    return {(source.url, source.revision): source for source in sources}


def _write_lock(path: Path, sources: Iterable[Source]) -> None:
    write_json(path, {"sources": [asdict(source) for source in sources]}, indent=2)


def link_or_copy(original: Path, target: Path) -> None:
    """`target` becomes a hard link of a file, or a copy where the disk, the owner or the kind of file system forbids
    one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    original = original.resolve()
    try:
        try:
            os.link(original, part)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOSPC):
                raise
            shutil.copyfile(original, part)
        # Over another link of the same file a rename does nothing and leaves both names.
        target.unlink(missing_ok=True)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _local_files(url: str) -> list[tuple[Path, str]]:
    """(file, path under the source's folder) of a local URL, in order."""
    start = local_path(url)
    if start.is_dir():
        found = []
        for folder, subfolders, names in os.walk(start, followlinks=False):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(names):
                path = Path(folder) / name
                if not name.startswith(".") and path.is_file():
                    found.append((path, path.relative_to(start).as_posix()))
    elif start.is_file():
        found = [(start, start.name)]
    else:
        names = sorted(glob.glob(str(start), recursive=True)) if glob.has_magic(str(start)) else []
        found = [(Path(name), Path(name).name) for name in names if os.path.isfile(name)]
        if len({name for _, name in found}) != len(found):
            raise SourceError(f"source {url!r}: two matching files have the same name; expected files of one folder")
    if not found:
        raise SourceError(
            f"source {url!r}: no such file or folder{' with files' if start.is_dir() else ''} (seen from {Path.cwd()})"
        )
    return found


def _fetch_local(url: str, folder: Path) -> list[File]:
    files, kept = [], set()
    for original, name in tqdm(_local_files(url), desc=f"linking {url}"[:60], unit="file", disable=None):
        target = folder / name
        link_or_copy(original, target)
        files.append(File(name, target.stat().st_size, digest_file(target)))
        kept.add(target)
    for path in folder.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()
    return files


def matches(folder: Path, files: list[File], contents: bool) -> str | None:
    """How the files on disk differ from their record, or None. contents: compare sha256 too."""
    for file in files:
        path = folder / file.path
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != file.size:
            return f"{path}: {path.stat().st_size} bytes; expected {file.size}"
        if contents and (seen := digest_file(path)) != file.sha256:
            return f"{path}: sha256 {seen}; expected {file.sha256}"
    return None


def _check_room(fetches: list[_Fetch]) -> None:
    """Room for every file of every source, before the first byte. Raises SourceError."""
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for item in fetches:
        for folder, size in item.needs():
            device = os.stat(folder).st_dev
            places.setdefault(device, folder)
            needed[device] = needed.get(device, 0) + size
    for device, size in needed.items():
        free = shutil.disk_usage(places[device]).free
        if size > free:
            raise SourceError(
                f"{places[device]}: {size / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB free; expected room for all "
                f"before the first byte is fetched"
            )


def _check_pins(url: str, revision: str | None, pinned: Source, files: list[File]) -> None:
    seen = {file.path: file for file in files}
    for file in pinned.files:
        now = seen.get(file.path)
        if now != file:
            what = "is no longer there" if now is None else f"has {now.size} bytes, sha256 {now.sha256}"
            raise SourceError(
                f"source {url!r}, revision {pinned.resolved or revision}: {file.path} {what}; on first use it had "
                f"{file.size} bytes, "
                f"sha256 {file.sha256}. Remove {PINS} beside it to accept the new content"
            )


class _Fetch:
    """A remote source that is about to be fetched: its listing, and what of it is missing."""

    def __init__(self, url: str, revision: str | None, folder: Path, pinned: Source | None, kind: str) -> None:
        from phi3v.data import hub, web

        self.url, self.revision, self.folder = url, revision, folder
        self.reach = hub if url.startswith("hf://") else web
        self.wanted = {file.path: file.sha256 for file in pinned.files} if pinned else {}
        commit = pinned.resolved if pinned and pinned.resolved else revision
        self.resolved, self.remotes = self.reach.listing(url, commit, kind)
        folder.mkdir(parents=True, exist_ok=True)

    def needs(self) -> Iterator[tuple[Path, int]]:
        """(folder, bytes that will be written there)."""
        missing = [remote for remote in self.remotes if not (self.folder / remote.path).is_file()]
        store = self.reach.store()
        linked = store is not None and os.stat(store).st_dev == os.stat(self.folder).st_dev
        for remote in missing:
            if store is not None and not self.reach.stored(self.url, self.resolved, remote):
                yield store, remote.size or 0
            if not linked:
                yield self.folder, remote.size or 0

    def run(self, name: str, workers: int) -> Source:
        """Fetch what is missing, check everything. Raises SourceError."""
        with ThreadPoolExecutor(workers) as pool:
            return Source(self.url, self.revision, self.resolved, name, list(pool.map(self._get, self.remotes)))

    def _get(self, remote: Remote) -> File:
        target = self.folder / remote.path
        promised = self.wanted.get(remote.path, remote.sha256)
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            self.reach.get(self.url, self.resolved, remote, target, promised)
        file = File(remote.path, target.stat().st_size, digest_file(target))
        if (remote.size not in (None, file.size)) or (promised not in (None, file.sha256)):
            target.unlink()
            raise SourceError(
                f"source {self.url!r}: {remote.path}: {file.size} bytes, sha256 {file.sha256}; expected {remote.size} "
                f"bytes, sha256 "
                f"{promised}. The file was removed; run the download again"
            )
        return file


def fetch(
    wanted: list[tuple[str, str | None]],
    output_dir: str | Path,
    workers: int = 4,
    kind: str = "dataset",
    flat: bool = False,
) -> dict[tuple[str, str | None], Source]:
    """Fetch every (url, revision) into output_dir and write the lock last; what is there already is checked, not
    fetched again.

    kind: "dataset" or "model" (of a model repository only weights, configuration and tokenizer are taken).
    flat: a single source goes into output_dir itself (a model's checkpoint folder).
    Raises SourceError; files already fetched stay, for the next try.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if flat and len(wanted) != 1:
        raise ValueError(f"flat: {len(wanted)} sources; expected one")
    record = next((output_dir / name for name in (PINS, LOCK) if (output_dir / name).exists()), None)
    pins = read_lock(record) if record else {}
    fetched: dict[tuple[str, str | None], Source] = {}
    names = {key: "." if flat else folder_name(*key) for key in dict.fromkeys(wanted)}
    remote: dict[tuple[str, str | None], _Fetch] = {}
    for (url, revision), name in names.items():
        pinned = pins.get((url, revision))
        if not is_local(url) and not (pinned and matches(output_dir / name, pinned.files, contents=True) is None):
            remote[url, revision] = _Fetch(url, revision, output_dir / name, pinned, kind)
    _check_room(list(remote.values()))
    for (url, revision), name in names.items():
        pinned = pins.get((url, revision))
        if is_local(url):
            source = Source(url, revision, None, name, _fetch_local_into(url, output_dir / name, flat))
            if pinned and pinned.files != source.files:
                print(f"{url}: changed since it was last used; the new content is taken", file=sys.stderr)
        elif (url, revision) in remote:
            source = remote[url, revision].run(name, workers)
            if pinned:
                _check_pins(url, revision, pinned, source.files)
        else:
            assert pinned is not None, "what is not fetched was found as its pins say"
            source = pinned
        fetched[url, revision] = source
        _write_lock(output_dir / PINS, {**pins, **fetched}.values())
    _write_lock(output_dir / LOCK, fetched.values())
    return fetched


def _fetch_local_into(url: str, folder: Path, flat: bool) -> list[File]:
    """Local files into a folder of their own; of a flat target nothing else is removed."""
    if not flat:
        folder.mkdir(exist_ok=True)
        return _fetch_local(url, folder)
    files = []
    for original, name in _local_files(url):
        if name in (LOCK, PINS):
            continue
        link_or_copy(original, folder / name)
        files.append(File(name, (folder / name).stat().st_size, digest_file(folder / name)))
    return files


def locked_files(source_dir: str | Path, url: str, revision: str | None) -> tuple[Path, list[Path], Source]:
    """(folder, its files in order, lock entry) of a fetched source. Raises SourceError when it is missing or
    incomplete."""
    source_dir = Path(source_dir)
    lock = source_dir / LOCK
    if not lock.is_file():
        raise SourceError(f"{lock}: missing; expected the result of scripts/download.py")
    sources = read_lock(lock)
    if (url, revision) not in sources:
        raise SourceError(
            f"{lock}: source {url!r}, revision {revision}: not there; run scripts/download.py for this dataset again"
        )
    source = sources[url, revision]
    folder = source_dir / source.folder
    if problem := matches(folder, source.files, contents=False):
        raise SourceError(f"{problem}; run scripts/download.py again")
    return folder, [folder / file.path for file in source.files], source
