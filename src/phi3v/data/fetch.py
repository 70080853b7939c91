"""Fetching sources: hub repositories, web files and local files, into one folder with a lock.

    hf://datasets/OWNER/REPO/PATH   hub dataset files (globs allowed)
    hf://OWNER/REPO                 a model's weights, configuration and tokenizer
    https://HOST/FILE               a web file
    file:FOLDER-OR-FILE, or a path  local files (globs allowed): hard links if the disk allows, else copies; never changed

Each URL gets a folder of its own under the output folder. `sources.lock.json`, written last, names every file with its
size and sha256. `sources.pins.json` keeps the same facts from the first use on (a workflow that repeats the step deletes
the lock, not the pins), and later downloads must equal them. This module alone opens network connections: through
huggingface_hub (its cache, resume, token, HF_ENDPOINT mirrors and HF_HUB_OFFLINE) and its HTTP library.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from phi3v.data.conversations import DataError
from phi3v.provenance.manifest import digest_file, write_json

LOCK = "sources.lock.json"
PINS = "sources.pins.json"

MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "LICENSE*", "README.md")
"""Of a model repository: weights, configuration, tokenizer, terms. No remote code, no second copy in another format."""

TIMEOUT = 30
"""Seconds without a byte after which a connection counts as lost."""

MAX_PAUSE = 300
"""Seconds between two tries at most, whatever the server asks for."""

HEADERS = {"User-Agent": "phi3v", "Accept-Encoding": "identity"}

Kind = Literal["dataset", "model"]
Key = tuple[str, str | None]
"""(url, revision asked for)"""
T = TypeVar("T")


class SourceError(DataError):
    """A source that cannot be fetched, or is not what it was."""


class Transient(Exception):
    """A failure that may pass: a lost connection, a busy server, wrong bytes. `wait`: seconds the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


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
    files: list[File]


@dataclass(frozen=True)
class Remote:
    """A file to be fetched. `size`, `sha256` and `tag` are what the server promises; None or "" if it does not."""

    path: str
    size: int | None
    sha256: str | None = None
    tag: str = ""
    """ETag of a web file."""


def _is_local(url: str) -> bool:
    return not url.startswith(("hf://", "https://", "http://"))


def _local_path(url: str) -> Path:
    """The path of a local URL: file:///absolute, file:relative or a plain path. Raises SourceError."""
    if re.match(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+:", url):
        raise SourceError(f"source {url!r}: unknown kind; expected hf://…, https://…, file:… or a path")
    path = url.removeprefix("file:")
    if path.startswith("//"):
        host, slash, rest = path[2:].partition("/")
        if host not in ("", "localhost"):
            raise SourceError(
                f"source {url!r}: host {host!r} in a file URL; expected file:relative/path or file:///absolute/path"
            )
        path = slash + rest
    return Path(path).expanduser()


def folder_name(url: str, revision: str | None) -> str:
    """Folder of a URL: readable, and different for each URL and revision."""
    digest = hashlib.sha256(json.dumps([url, revision]).encode()).hexdigest()[:6]
    words = re.sub(r"[^A-Za-z0-9_.-]+", "-", re.sub(r"^[a-z]+:/*", "", url.split("?")[0])).strip("-.")
    return f"{words[-60:].strip('-.') or 'source'}-{digest}"


def read_lock(path: Path) -> dict[Key, Source]:
    """Sources of a lock. Raises SourceError if it is not a lock."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        sources = [Source(**{**item, "files": [File(**file) for file in item["files"]]}) for item in value["sources"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SourceError(f"{path}: not a lock of fetched sources ({error}); remove it to fetch anew") from None
    return {(source.url, source.revision): source for source in sources}


def _write_lock(path: Path, sources: Iterable[Source]) -> None:
    write_json(path, {"sources": [asdict(source) for source in sources]}, indent=2)


def locked_files(source_dir: str | Path, url: str, revision: str | None) -> tuple[Path, list[Path], Source]:
    """(folder, its files in order, lock entry) of a fetched source. Raises SourceError if it is missing or incomplete."""
    source_dir = Path(source_dir)
    lock = source_dir / LOCK
    if not lock.is_file():
        raise SourceError(f"{lock}: missing; expected the result of scripts/download.py")
    source = read_lock(lock).get((url, revision))
    if source is None:
        raise SourceError(
            f"{lock}: source {url!r}, revision {revision}: not there; run scripts/download.py for this dataset again"
        )
    folder = source_dir / source.folder
    if problem := _difference(folder, source.files, contents=False):
        raise SourceError(f"{problem}; run scripts/download.py again")
    return folder, [folder / file.path for file in source.files], source


def _difference(folder: Path, files: list[File], contents: bool) -> str | None:
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


def link_or_copy(original: Path, target: Path) -> None:
    """`target` becomes a hard link of a file, or a copy if the disk, the owner or the file system forbids one."""
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
    start = _local_path(url)
    if start.is_dir():
        found = []
        for folder, subfolders, names in os.walk(start, followlinks=False):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for path in (Path(folder) / name for name in sorted(names) if not name.startswith(".")):
                if path.is_file():
                    found.append((path, path.relative_to(start).as_posix()))
    else:
        paths = [start] if start.is_file() else [Path(name) for name in sorted(glob.glob(str(start), recursive=True))]
        found = [(path, path.name) for path in paths if path.is_file()]
        if len({name for _, name in found}) != len(found):
            raise SourceError(f"source {url!r}: two matching files have the same name; expected files of one folder")
    if not found:
        raise SourceError(
            f"source {url!r}: no such file or folder{' with files' if start.is_dir() else ''} (seen from {Path.cwd()})"
        )
    return found


def _fetch_local(url: str, folder: Path, flat: bool) -> list[File]:
    """Link local files into a folder; other files there go, unless it is the `flat` output folder itself."""
    folder.mkdir(exist_ok=True)
    files = []
    for original, name in tqdm(_local_files(url), desc=f"linking {url}"[:60], unit="file", disable=None):
        if name not in (LOCK, PINS):
            target = folder / name
            link_or_copy(original, target)
            files.append(File(name, target.stat().st_size, digest_file(target)))
    if not flat:
        kept = {folder / file.path for file in files}
        for path in [path for path in folder.rglob("*") if path.is_file() and path not in kept]:
            path.unlink()
    return files


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date."""
    if value and re.fullmatch(r"\d+", value.strip()):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time()) if value else None
    except ValueError:
        return None


def _status_error(status: int, what: str, wait: str | None) -> Exception:
    """The exception of an HTTP status: transient for 408, 429 and 5xx, final else."""
    if status in (408, 429) or status >= 500:
        return Transient(f"HTTP {status}", retry_after(wait))
    hint = {
        401: "not allowed without a token: set HF_TOKEN",
        403: "not allowed: accept the terms on the page of the source and set HF_TOKEN",
        404: "not found: check the address and the revision",
    }.get(status, "refused")
    return SourceError(f"{what}: HTTP {status}: {hint}")


def _sorted_error(error: Exception, what: str) -> Exception:
    """A passing failure as Transient, a final one as SourceError that names what to do, any other unchanged."""
    import httpx2
    from huggingface_hub import errors as hub

    cause = error.__cause__
    if isinstance(error, hub.LocalEntryNotFoundError) and cause and not isinstance(cause, hub.OfflineModeIsEnabled):
        return Transient(f"{cause}")  # the connection failed before the file's facts were known
    final: tuple[tuple[type[Exception], str], ...] = (
        (hub.OfflineModeIsEnabled, "not in the cache; HF_HUB_OFFLINE forbids the network: download it once online"),
        (hub.GatedRepoError, "gated: accept its terms on its page and set HF_TOKEN"),
        (hub.RevisionNotFoundError, "no such revision; expected a commit, branch or tag of the repository"),
        (hub.RepositoryNotFoundError, "no such repository, or not visible without a token (HF_TOKEN)"),
        (hub.LocalEntryNotFoundError, "not in the cache, and the network is not reachable or forbidden"),
        (hub.EntryNotFoundError, "no such file in the repository"),
    )
    for known, message in final:
        if isinstance(error, known):
            return SourceError(f"{what}: {message}")
    if isinstance(error, hub.HfHubHTTPError | httpx2.HTTPStatusError):
        return _status_error(error.response.status_code, what, error.response.headers.get("Retry-After"))
    if isinstance(error, hub.FileMetadataError | httpx2.HTTPError | ConnectionError | TimeoutError):
        return Transient(f"{type(error).__name__}: {error}")
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return Transient("fewer or more bytes than promised")
    return error


def _with_retries(action: Callable[[], T], what: str) -> T:
    """Run an action until it succeeds; after each passing failure wait 1, 2, 4 … seconds, or what the server asks for.

    PHI3V_DOWNLOAD_ATTEMPTS (6) and PHI3V_DOWNLOAD_PAUSE (1) change the number of tries and the first pause.
    """
    attempts = max(1, int(os.environ.get("PHI3V_DOWNLOAD_ATTEMPTS", "6")))
    pause = float(os.environ.get("PHI3V_DOWNLOAD_PAUSE", "1"))
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except Exception as error:
            known = _sorted_error(error, what)
            if not isinstance(known, Transient):
                raise known from (None if known is not error else error.__cause__)
            if attempt == attempts:
                raise SourceError(f"{what}: {known}; tried {attempt} times") from None
            wait = min(known.wait if known.wait is not None else pause * 2 ** (attempt - 1), MAX_PAUSE)
            tqdm.write(f"{what}: {known}; trying again in {wait:.0f} s ({attempt} of {attempts})")
            time.sleep(wait)
    raise AssertionError("unreachable: the last attempt returns or raises")


class _Server(ABC):
    """A remote source: what it lists, and the folder that its files go into."""

    url: str
    resolved: str | None = None
    remotes: list[Remote]

    def written(self, remote: Remote, folder: Path) -> list[Path]:
        """The folders that a file's bytes are written to on the way into `folder`."""
        return [folder]

    @abstractmethod
    def get(self, remote: Remote, target: Path, sha256: str | None) -> None:
        """Fetch one file. Raises SourceError."""

    def missing(self, folder: Path) -> Iterator[tuple[Path, int]]:
        """(folder, bytes that will be written there) of the files that are not in `folder` yet."""
        for remote in self.remotes:
            if not (folder / remote.path).is_file():
                yield from ((place, remote.size or 0) for place in self.written(remote, folder))

    def fetch(self, remote: Remote, folder: Path, pinned: Source | None) -> File:
        """Fetch a file unless it is there, and check it. Raises SourceError."""
        target = folder / remote.path
        pins = {file.path: file.sha256 for file in pinned.files} if pinned else {}
        promised = pins.get(remote.path, remote.sha256)
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            self.get(remote, target, promised)
        file = File(remote.path, target.stat().st_size, digest_file(target))
        if (remote.size not in (None, file.size)) or (promised not in (None, file.sha256)):
            target.unlink()
            raise SourceError(
                f"source {self.url!r}: {remote.path}: {file.size} bytes, sha256 {file.sha256}; expected "
                f"{remote.size} bytes, sha256 {promised}. The file was removed; run the download again"
            )
        return file


class _Web(_Server):
    """A file over https, with resume. A web address has no revision: the lock's sha256 pins it."""

    def __init__(self, url: str) -> None:
        self.url = url
        name = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
        if not name or name in (".", ".."):
            raise SourceError(f"source {url!r}: no file name at the end; expected the address of a file")
        self.remotes = [_with_retries(lambda: self._head(name), url)]

    def _head(self, name: str) -> Remote:
        import httpx2

        answer = httpx2.head(self.url, headers=HEADERS, timeout=TIMEOUT, follow_redirects=True)
        if answer.status_code in (403, 405, 501):  # the server answers GET only: take the headers, not the body
            with httpx2.stream("GET", self.url, headers=HEADERS, timeout=TIMEOUT, follow_redirects=True) as answer:
                pass
        answer.raise_for_status()
        length = answer.headers.get("Content-Length")
        return Remote(name, int(length) if length else None, tag=answer.headers.get("ETag", ""))

    def get(self, remote: Remote, target: Path, sha256: str | None) -> None:
        """Fetch a file; a part left by an earlier try continues if the server still has the same file."""
        part = target.with_name(f".{target.name}.{hashlib.sha256(remote.tag.encode()).hexdigest()[:8]}.part")
        _with_retries(lambda: self._get(remote, part, sha256), self.url)
        os.replace(part, target)
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
            left.unlink()

    def _get(self, remote: Remote, part: Path, sha256: str | None) -> None:
        import httpx2

        # Without a tag nobody knows whether the rest belongs to the same file.
        have = part.stat().st_size if remote.tag and part.exists() else 0
        have = 0 if have >= (remote.size or have + 1) else have
        wanted = {"Range": f"bytes={have}-", "If-Range": remote.tag} if have else {}
        with httpx2.stream("GET", self.url, headers=HEADERS | wanted, timeout=TIMEOUT, follow_redirects=True) as answer:
            answer.raise_for_status()
            have = have if answer.status_code == 206 else 0
            length = answer.headers.get("Content-Length")
            expected = have + int(length) if length else remote.size
            with (
                open(part, "ab" if have else "wb") as file,
                tqdm(
                    total=expected, initial=have, unit="B", unit_scale=True, desc=remote.path[:40], disable=None
                ) as bar,
            ):
                for block in answer.iter_raw():
                    file.write(block)
                    bar.update(len(block))
        if expected is not None and (size := part.stat().st_size) != expected:
            raise Transient(f"connection lost: {size} of {expected} bytes")
        if sha256 and (seen := digest_file(part)) != sha256:
            part.unlink()
            raise Transient(f"wrong bytes: sha256 {seen}; expected {sha256}")


class _Hub(_Server):
    """Files of a hub repository at one commit. Offline: what the cache has."""

    def __init__(self, url: str, revision: str | None, kind: Kind) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.constants import is_offline_mode
        from huggingface_hub.hf_api import RepoFile

        match = re.fullmatch(r"hf://(datasets/)?(?!datasets/)([\w.-]+/[\w.-]+)(?:/(.+))?", url)
        if not match:
            raise SourceError(f"source {url!r}: expected hf://datasets/OWNER/REPO/PATH or hf://OWNER/REPO")
        self.url, self.repo, self.pattern, self.kind = url, match[2], match[3] or "", kind
        self.repo_type = "dataset" if match[1] else "model"
        found: list[Remote]
        if is_offline_mode():
            snapshot = self._cached_snapshot(revision)
            self.resolved = snapshot.name
            paths = sorted(path for path in snapshot.rglob("*") if path.is_file())
            found = [Remote(path.relative_to(snapshot).as_posix(), path.stat().st_size) for path in paths]
        else:
            api = HfApi()
            info = _with_retries(lambda: api.repo_info(self.repo, repo_type=self.repo_type, revision=revision), url)
            self.resolved = str(info.sha)
            fixed = re.split(r"[*?\[]", self.pattern)[0].rpartition("/")[0] or None
            tree = _with_retries(
                lambda: list(
                    api.list_repo_tree(
                        self.repo, fixed, recursive=True, revision=self.resolved, repo_type=self.repo_type
                    )
                ),
                url,
            )
            files = [item for item in tree if isinstance(item, RepoFile)]
            found = [Remote(item.path, item.size, item.lfs.sha256 if item.lfs else None) for item in files]
        self.remotes = sorted((file for file in found if self._selected(file.path)), key=lambda file: file.path)
        if not self.remotes:
            wanted = self.pattern or MODEL_FILES
            raise SourceError(f"{url}: no file of the repository matches {wanted!r} at {self.resolved}")
        for remote in self.remotes:
            if remote.path.startswith("/") or ".." in remote.path.split("/"):
                raise SourceError(f"{url}: the listing names {remote.path!r}; expected paths inside the repository")

    def _selected(self, path: str) -> bool:
        if self.pattern:
            return fnmatch.fnmatchcase(path, self.pattern)
        return self.kind != "model" or (
            "/" not in path and any(fnmatch.fnmatchcase(path, name) for name in MODEL_FILES)
        )

    def _cached_snapshot(self, revision: str | None) -> Path:
        """Folder of the cached commit: the one asked for, or the only one there. Raises SourceError."""
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.file_download import repo_folder_name

        home = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=self.repo, repo_type=self.repo_type)
        reference = home / "refs" / (revision or "main")
        commit = reference.read_text().strip() if reference.is_file() else revision
        snapshots = sorted((home / "snapshots").glob(commit or "*"))
        if len(snapshots) != 1:
            seen = ", ".join(path.name for path in snapshots) or "none"
            raise SourceError(
                f"{self.url}: HF_HUB_OFFLINE forbids the network, and the cache {home} has {seen} of revision "
                f"{revision}; expected one: fetch it online, or name the revision"
            )
        return snapshots[0]

    def written(self, remote: Remote, folder: Path) -> list[Path]:
        """The folders that a file's bytes are written to on the way into `folder`: the cache, from where it is linked."""
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.constants import HF_HUB_CACHE

        cache = Path(HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        found = try_to_load_from_cache(self.repo, remote.path, revision=self.resolved, repo_type=self.repo_type)
        linked = os.stat(cache).st_dev == os.stat(folder).st_dev
        return ([] if isinstance(found, str) else [cache]) + ([] if linked else [folder])

    def get(self, remote: Remote, target: Path, sha256: str | None) -> None:
        """One file into the hub's cache, and from there into place; wrong bytes are fetched again."""
        from huggingface_hub import hf_hub_download

        wrong = False

        def download() -> None:
            nonlocal wrong
            path = Path(
                hf_hub_download(
                    self.repo, remote.path, repo_type=self.repo_type, revision=self.resolved, force_download=wrong
                )
            )
            size = path.stat().st_size
            if wrong := remote.size not in (None, size):
                raise Transient(f"{size} bytes; expected {remote.size}")
            if wrong := bool(sha256) and (seen := digest_file(path)) != sha256:
                raise Transient(f"wrong bytes: sha256 {seen}; expected {sha256}")
            link_or_copy(path, target)

        _with_retries(download, f"{self.url}: {remote.path}")


def _check_free_space(missing: Iterator[tuple[Path, int]]) -> None:
    """Room for every file of every source, before the first byte: (folder, bytes). Raises SourceError."""
    needed: dict[int, int] = {}
    folders: dict[int, Path] = {}
    for folder, size in missing:
        device = os.stat(folder).st_dev
        folders.setdefault(device, folder)
        needed[device] = needed.get(device, 0) + size
    for device, size in needed.items():
        free = shutil.disk_usage(folders[device]).free
        if size > free:
            raise SourceError(
                f"{folders[device]}: {size / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB free; expected room for all "
                "before the first byte is fetched"
            )


def _check_pins(pinned: Source, files: list[File]) -> None:
    seen = {file.path: file for file in files}
    for file in pinned.files:
        now = seen.get(file.path)
        if now != file:
            what = "is no longer there" if now is None else f"has {now.size} bytes, sha256 {now.sha256}"
            raise SourceError(
                f"source {pinned.url!r}, revision {pinned.resolved or pinned.revision}: {file.path} {what}; on first "
                f"use it had {file.size} bytes, sha256 {file.sha256}. Remove {PINS} beside it to accept the new content"
            )


def fetch(
    wanted: list[Key], output_dir: str | Path, workers: int = 4, kind: Kind = "dataset", flat: bool = False
) -> dict[Key, Source]:
    """Fetch every (url, revision) into output_dir and write the lock last; what is there already is only checked.

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
    names = {key: "." if flat else folder_name(*key) for key in dict.fromkeys(wanted)}
    complete = {
        key: pins[key]
        for key, name in names.items()
        if key in pins and not _is_local(key[0]) and not _difference(output_dir / name, pins[key].files, contents=True)
    }
    servers: dict[Key, _Server] = {}
    for (url, revision), name in names.items():
        if (url, revision) not in complete and not _is_local(url):
            pinned = pins.get((url, revision))
            commit = pinned.resolved if pinned and pinned.resolved else revision
            servers[url, revision] = _Hub(url, commit, kind) if url.startswith("hf://") else _Web(url)
            (output_dir / name).mkdir(parents=True, exist_ok=True)
    _check_free_space(pair for key, server in servers.items() for pair in server.missing(output_dir / names[key]))
    fetched: dict[Key, Source] = {}
    for key, name in names.items():
        pinned = pins.get(key)
        if server := servers.get(key):
            with ThreadPoolExecutor(workers) as pool:
                files = list(pool.map(partial(server.fetch, folder=output_dir / name, pinned=pinned), server.remotes))
            fetched[key] = Source(*key, server.resolved, name, files)
            if pinned:
                _check_pins(pinned, files)
        elif key in complete:
            fetched[key] = complete[key]
        else:
            fetched[key] = Source(*key, None, name, _fetch_local(key[0], output_dir / name, flat))
            if pinned and pinned.files != fetched[key].files:
                print(f"{key[0]}: changed since it was last used; the new content is taken", file=sys.stderr)
        _write_lock(output_dir / PINS, {**pins, **fetched}.values())
    _write_lock(output_dir / LOCK, fetched.values())
    return fetched
