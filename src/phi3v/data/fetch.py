"""Downloads sources (hub repositories, web and cloud files, local files), with a lock file that pins their contents.

    hf://datasets/OWNER/REPO/PATH    files of a hub dataset (globs allowed), through huggingface_hub
    hf://OWNER/REPO                  weights, configuration and tokenizer of a model
    https://HOST/FILE                a web file, through fsspec
    s3://, gs://, az://BUCKET/PATH   files, folders or globs of an object store, through fsspec (extra `cloud`)
    file:FOLDER-OR-FILE, or a path   local files (globs allowed), read in place and never changed

`sources.lock.json`, written last, lists every file with its size and sha256. `sources.pins.json` keeps the same data
permanently: a workflow that repeats the step deletes the lock but not the pins, and later downloads must match them.
Only this module opens network connections. The libraries read tokens, proxies, mirrors, caches and offline mode
themselves: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, https_proxy, ~/.aws and so on.
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
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from phi3v.data.conversations import DataError
from phi3v.provenance.manifest import digest_file, digests_of, write_json
from phi3v.settings import local_source

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

LOCK = "sources.lock.json"
PINS = "sources.pins.json"
FAILURES = "failures.json"

OFFLINE = "HF_HUB_OFFLINE is set; download once without it, on a machine with network access"

MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "LICENSE*", "README.md")
"""Files to download from a model repository: weights, configuration, tokenizer, licence. No remote code, and no copies
in other formats."""

PROTOCOLS = ("https", "http", "s3", "gs", "az", "hf")
"""URL schemes that can be downloaded."""

TIMEOUT = 30
"""Seconds without data after which a connection counts as lost."""

MAX_PAUSE = 300
"""Longest pause between two attempts in seconds, even if the server asks for more."""

BLOCK = 16 * 2**20
"""Bytes per range request of a file. A lost connection repeats one request."""

MAX_PICTURE_BYTES = 256 * 2**20
"""Largest file behind a URL in a row. Larger files are rejected."""

Kind = Literal["dataset", "model"]
Plan = tuple[list[tuple[Path, int]], Callable[[], tuple[str | None, list["File"]]]]
"""Plan for a remote source: [(folder, bytes to write there)] and a function that downloads: (hub commit, files)."""
Key = tuple[str, str | None]
"""(url, requested revision)"""
T = TypeVar("T")


class SourceError(DataError):
    """A source that cannot be downloaded, or whose content has changed."""


class Transient(Exception):
    """A failure that may pass: a lost connection, a busy server, wrong bytes. wait: seconds that the server asks
    for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class File:
    """A downloaded file: its path in the source's folder, its size in bytes and its sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """A downloaded URL."""

    url: str
    revision: str | None
    """The requested revision."""
    resolved: str | None
    """The commit on the hub that was downloaded."""
    folder: str
    """Its folder, relative to the lock. Empty for local files, which stay in place."""
    files: list[File]


def folder_name(url: str, revision: str | None) -> str:
    """Readable folder name of a URL, unique for each URL and revision."""
    digest = hashlib.sha256(json.dumps([url, revision]).encode()).hexdigest()[:6]
    words = re.sub(r"[^A-Za-z0-9_.-]+", "-", re.sub(r"^[a-z]+:/*", "", url.split("?")[0])).strip("-.")
    return f"{words[-60:].strip('-.') or 'source'}-{digest}"


def read_lock(path: Path) -> dict[Key, Source]:
    """Sources in a lock file. Raises SourceError if the file is invalid."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        sources = [Source(**{**item, "files": [File(**file) for file in item["files"]]}) for item in value["sources"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SourceError(f"{path}: not a valid lock file ({error}); delete it to download again") from None
    return {(source.url, source.revision): source for source in sources}


def _write_lock(path: Path, sources: Iterable[Source]) -> None:
    write_json(path, {"sources": [asdict(source) for source in sources]}, indent=2)


def locked_files(source_dir: str | Path, url: str, revision: str | None) -> tuple[Path, list[Path], Source]:
    """(folder, its files in order, lock entry) of a downloaded source. Raises SourceError if it is missing or
    incomplete.

    Local files are compared with the lock by content, because users can change them at any time.
    """
    source_dir = Path(source_dir)
    lock = source_dir / LOCK
    if not lock.is_file():
        raise SourceError(f"{lock}: missing; run scripts/download.py first")
    source = read_lock(lock).get((url, revision))
    if source is None:
        raise SourceError(
            f"{lock}: source {url!r}, revision {revision}: not in the lock file; run scripts/download.py for this "
            "dataset again"
        )
    folder, problem = source_dir / source.folder, None
    if not source.folder:
        folder, names = local_files(url)
        changed = {file.path for file in source.files} ^ set(names)
        problem = f"{folder / min(changed)}: added or removed since the download" if changed else None
    problem = problem or _difference(folder, source.files, contents=not source.folder)
    if problem:
        raise SourceError(f"{problem}; run scripts/download.py again")
    return folder, [folder / file.path for file in source.files], source


def _difference(folder: Path, files: list[File], contents: bool) -> str | None:
    """How the files on disk differ from their record, or None. contents: also compare sha256."""
    for file in files:
        path = folder / file.path
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != file.size:
            return f"{path}: got {path.stat().st_size} bytes; expected {file.size}"
        if contents and (seen := digest_file(path)) != file.sha256:
            return f"{path}: got sha256 {seen}; expected {file.sha256}"
    return None


def _records(folder: Path, names: Iterable[str], workers: int) -> list[File]:
    """The records (path, size, sha256) of files."""
    with ThreadPoolExecutor(workers) as pool:
        return list(
            pool.map(lambda name: File(name, (folder / name).stat().st_size, digest_file(folder / name)), names)
        )


def _link_or_copy(original: Path, target: Path) -> None:
    """Makes `target` a hard link to a file, or a copy if hard links are not possible there."""
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
        # Renaming over another link to the same file does nothing and keeps both names.
        target.unlink(missing_ok=True)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def local_files(url: str) -> tuple[Path, list[str]]:
    """(folder, sorted paths of the files in it) of a local URL. Raises SourceError if there is no file."""
    if re.match(r"file://(?!localhost/)[^/]", url):
        raise SourceError(
            f"source {url!r}: got a host in a file URL; expected file:relative/path or file:///absolute/path"
        )
    start = Path(local_source(url) or "").expanduser()
    if start.is_dir():
        root, names = start, []
        for folder, subfolders, found in os.walk(start):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            files = [Path(folder) / name for name in sorted(found) if not name.startswith(".")]
            names += [path.relative_to(start).as_posix() for path in files if path.is_file()]
    else:
        found = [str(start)] if start.is_file() else sorted(glob.glob(str(start), recursive=True))
        files = [Path(path) for path in found if Path(path).is_file()]
        root = Path(os.path.commonpath([path.parent for path in files])) if files else start
        names = [path.relative_to(root).as_posix() for path in files]
    if not names:
        raise SourceError(
            f"source {url!r}: no such file or folder{' with files' if start.is_dir() else ''} (relative to "
            f"{Path.cwd()})"
        )
    return root, names


def local_contents(url: str, cache: Path) -> str:
    """Digest of the names and contents of a local URL's files, or "missing". cache: see digests_of."""
    try:
        root, names = local_files(url)
    except SourceError:
        return "missing"
    contents = list(zip(names, digests_of([root / name for name in names], cache), strict=True))
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def _sorted_error(error: Exception, what: str) -> Exception:
    """Converts temporary failures to Transient and final ones to SourceError with advice. Returns others unchanged."""
    import aiohttp
    from huggingface_hub import errors as hub

    wrapped = isinstance(error, FileNotFoundError | hub.DryRunError) and error.__cause__
    if isinstance(wrapped, Exception):  # both libraries wrap the server's response
        return _sorted_error(wrapped, what)
    status, wait = None, None
    if isinstance(error, hub.HfHubHTTPError):
        status, wait = error.response.status_code, error.response.headers.get("Retry-After")
    elif isinstance(error, aiohttp.ClientResponseError):
        status, wait = error.status, error.headers.get("Retry-After") if error.headers else None
    if status is not None and (status in (408, 429) or status >= 500):
        return Transient(f"HTTP {status}", float(wait) if wait and wait.isdigit() else None)
    reasons: dict[type[Exception], str] = {
        hub.OfflineModeIsEnabled: f"not in the cache; {OFFLINE}",
        hub.GatedRepoError: "gated repository: accept its terms on its page and set HF_TOKEN",
        hub.RevisionNotFoundError: "no such revision; expected a commit, branch or tag",
        hub.RepositoryNotFoundError: "no such repository, or private: check the name and set HF_TOKEN",
        hub.EntryNotFoundError: "no such file in the repository or its cache",
        FileNotFoundError: "not found (HTTP 404 or no such object): check the URL",
        PermissionError: "permission denied: check your credentials for this storage",
    }
    statuses = {401: "requires a token: set HF_TOKEN", 403: "accept the terms on the source's page and set HF_TOKEN"}
    statuses |= {404: "not found: check the URL and the revision"}
    from_disk = isinstance(error, OSError) and error.errno  # a file error on this machine
    reason = next((text for known, text in reasons.items() if isinstance(error, known) and not from_disk), None)
    if reason is None and status is not None:
        reason = f"HTTP {status}: {statuses.get(status, 'refused')}"
    if reason:
        return SourceError(f"{what}: {reason}")
    network = (hub.FileMetadataError, aiohttp.ClientError, ConnectionError, TimeoutError)
    if isinstance(error, network) or type(error).__module__.startswith("httpx2"):
        return Transient(f"{type(error).__name__}: {error}")
    short = isinstance(error, OSError) and "Consistency check failed" in str(error)  # huggingface_hub's message
    return Transient("the size differs from the announced size") if short else error


def _with_retries(action: Callable[[], T], what: str, most: int = 6) -> T:
    """Runs an action until it succeeds. Waits 1, 2, 4 … seconds after temporary failures, or as long as the server
    asks.

    PHI3V_DOWNLOAD_ATTEMPTS and PHI3V_DOWNLOAD_PAUSE (1) set the number of attempts and the first pause in seconds.
    """
    attempts = max(1, int(os.environ.get("PHI3V_DOWNLOAD_ATTEMPTS", most)))
    pause = float(os.environ.get("PHI3V_DOWNLOAD_PAUSE", "1"))
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except Exception as error:
            reason = error if isinstance(error, Transient | SourceError) else _sorted_error(error, what)
            if not isinstance(reason, Transient):
                raise reason from (None if reason is not error else error.__cause__)
            if attempt == attempts:
                raise SourceError(f"{what}: {reason}; gave up after {attempt} attempts") from None
            wait = min(reason.wait if reason.wait is not None else pause * 2 ** (attempt - 1), MAX_PAUSE)
            tqdm.write(f"{what}: {reason}; trying again in {wait:.0f} s (attempt {attempt} of {attempts})")
            time.sleep(wait)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """(fsspec's file system, path) of a URL. Raises SourceError for an unknown scheme or a missing package."""
    import aiohttp
    from fsspec.core import url_to_fs
    from huggingface_hub.constants import is_offline_mode

    protocol = url.partition("://")[0].lower()
    if protocol not in PROTOCOLS:
        raise SourceError(
            f"source {url!r}: unknown scheme; expected hf://…, https://…, s3://…, gs://…, az://…, file:… or a path"
        )
    if is_offline_mode():
        raise SourceError(f"source {url!r}: {OFFLINE}")
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    headers = {"User-Agent": "phi3v", "Accept-Encoding": "identity"}
    web = {"client_kwargs": {"trust_env": True, "timeout": timeout, "headers": headers}}
    try:
        # fsspec treats the text after `::` as another URL, and would only download the first one.
        return url_to_fs(url.replace("::", "%3A%3A"), **(web if protocol in ("http", "https") else {}))
    except ImportError as error:
        raise SourceError(
            f"source {url!r}: {error}; s3://, gs:// and az:// require the extra `cloud`: pip install -e '.[cloud]'"
        ) from None


def _listing(system: AbstractFileSystem, path: str, url: str) -> dict[str, dict[str, Any]]:
    """fsspec's attributes of each file of a URL, by path in the source's folder. Raises SourceError if there is no
    file."""
    if url.startswith("http"):
        files = {unquote(urlsplit(path).path).rpartition("/")[2]: system.info(path)}
    else:
        fixed = re.split(r"[*?\[]", path)[0]
        found = system.find(path, detail=True) if fixed == path else system.glob(path, detail=True)
        base = f"{path.rstrip('/')}/" if fixed == path and path not in found else fixed[: fixed.rfind("/") + 1]
        files = {key.removeprefix(base): found[key] for key in sorted(found) if found[key]["type"] == "file"}
    if not files:
        raise SourceError(f"source {url!r}: matches no file; check the URL")
    for name in files:
        if {"", ".", ".."} & set(name.split("/")):
            raise SourceError(f"source {url!r}: {name!r} is not a file name; expected a URL that ends in a file name")
    return files


def _plan_files(url: str, folder: Path, workers: int) -> Plan:
    """Plan for a web file or the files of an object store. The lock's sha256 pins them."""
    system, path = _filesystem(url)
    remotes = _with_retries(lambda: _listing(system, path, url), url)

    def fetch_file(name: str) -> None:
        target = folder / name
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        # Resume a partial download if the server still has the same file.
        tag = hashlib.sha256(_tag(remotes[name]).encode()).hexdigest()[:8]
        part = target.with_name(f".{target.name}.{tag}.part")
        _with_retries(lambda: _append(system, remotes[name], part), f"{url}: {name}")
        os.replace(part, target)
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
            left.unlink()

    def run() -> tuple[None, list[File]]:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fetch_file, remotes))
        return None, _records(folder, remotes, workers)

    return [(folder, info["size"] or 0) for name, info in remotes.items() if not (folder / name).exists()], run


def _tag(info: dict[str, Any]) -> str:
    """An identifier that changes with the content of a file, or "" if the server provides none."""
    return str(info.get("ETag") or info.get("etag") or info.get("Last-Modified") or "")


def _append(system: AbstractFileSystem, info: dict[str, Any], part: Path) -> None:
    """Downloads the missing part of a file. Raises Transient if the file is short or changes during the download."""
    path, size = info["name"], info["size"]
    # Without size and tag, it is unknown whether a partial file belongs to the same content.
    in_blocks = bool(size and _tag(info) and info.get("partial", True))
    have = part.stat().st_size if in_blocks and part.exists() else 0
    if not in_blocks:
        system.get_file(path, str(part))
    elif have < size:
        with (
            open(part, "ab") as out,
            tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=path[-40:], disable=None) as bar,
            system.open(path, "rb", block_size=BLOCK, cache_type="none") as file,
        ):
            file.seek(have)
            try:
                while block := file.read(BLOCK):
                    out.write(block)
                    bar.update(len(block))
            except ValueError as error:
                info["partial"] = False
                raise Transient(f"the server only sends complete files ({error})") from None
    if size is not None and part.stat().st_size != size:
        raise Transient(f"connection lost after {part.stat().st_size} of {size} bytes")
    if in_blocks and _tag(system.info(path)) != _tag(info):
        part.unlink()
        raise Transient("the file changed during the download")


def _plan_hub(url: str, revision: str | None, kind: Kind, folder: Path, workers: int) -> Plan:
    """Plan for files of a hub repository at one commit, through the hub's cache. Offline, uses only the cache."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode
    from huggingface_hub.utils import filter_repo_objects

    match = re.fullmatch(r"hf://(datasets/)?(?!datasets/)([\w.-]+/[\w.-]+)(?:/(.+))?", url)
    if not match:
        raise SourceError(f"source {url!r}: expected hf://datasets/OWNER/REPO/PATH or hf://OWNER/REPO")
    repository: dict[str, Any] = {"repo_id": match[2], "repo_type": "dataset" if match[1] else "model"}
    patterns: dict[str, Any] = {"allow_patterns": match[3]}
    if kind == "model" and not match[3]:
        patterns = {"allow_patterns": list(MODEL_FILES), "ignore_patterns": ["*/*"]}
    needed: list[tuple[Path, int]] = []
    commit = revision
    if not is_offline_mode():
        planned = _with_retries(
            lambda: snapshot_download(**repository, **patterns, revision=revision, dry_run=True), url
        )
        if not planned:
            raise SourceError(f"{url}: no file of the repository matches {patterns['allow_patterns']!r}; check the URL")
        commit, cache = planned[0].commit_hash, Path(HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        needed = [(cache, file.file_size or 0) for file in planned if file.will_download]
        if os.stat(cache).st_dev != os.stat(folder).st_dev:
            needed += [(folder, file.file_size or 0) for file in planned]

    def put_in_place(cached: Path, name: str) -> File:
        promised = cached.resolve().name  # for a large file, its sha256

        def check() -> str:
            if len(promised) == 64 and (seen := digest_file(cached)) != promised:
                hf_hub_download(**repository, filename=name, revision=commit, force_download=True)
                raise Transient(f"wrong content: got sha256 {seen}; expected {promised}")
            return promised if len(promised) == 64 else digest_file(cached)

        sha256 = _with_retries(check, f"{url}: {name}")
        _link_or_copy(cached, folder / name)
        return File(name, cached.stat().st_size, sha256)

    def run() -> tuple[str, list[File]]:
        get = partial(snapshot_download, **repository, **patterns, revision=commit, max_workers=workers)
        snapshot = Path(_with_retries(get, url))
        paths = (path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
        names = sorted(filter_repo_objects(paths, **patterns))
        if not names:
            raise SourceError(f"{url}: the cache has no matching file at commit {snapshot.name}; {OFFLINE}")
        with ThreadPoolExecutor(workers) as pool:
            return snapshot.name, list(pool.map(lambda name: put_in_place(snapshot / name, name), names))

    return needed, run


def _check_free_space(needed: list[tuple[Path, int]]) -> None:
    """Checks the free space for all files of all sources before downloading: (folder, bytes). Raises SourceError."""
    folders, sizes = dict[int, Path](), Counter[int]()
    for folder, size in needed:
        device = os.stat(folder).st_dev
        folders[device] = folder
        sizes[device] += size
    for device, size in sizes.items():
        if size > (free := shutil.disk_usage(folders[device]).free):
            raise SourceError(
                f"{folders[device]}: {size / 1e6:,.0f} MB to download, but only {free / 1e6:,.0f} MB free; free some "
                "space, or use another folder"
            )


def _check_pins(pinned: Source, folder: Path, files: list[File]) -> None:
    """Raises SourceError if the files differ from the first download, and deletes the wrong ones."""
    seen = {file.path: file for file in files}
    for file in pinned.files:
        now = seen.get(file.path)
        if now != file:
            (folder / file.path).unlink(missing_ok=True)
            what = "no longer exists" if now is None else f"has {now.size} bytes, sha256 {now.sha256}"
            raise SourceError(
                f"source {pinned.url!r}, revision {pinned.resolved or pinned.revision}: {file.path} {what}; in the "
                "first "
                f"download it had {file.size} bytes, sha256 {file.sha256}. Delete {PINS} beside it to accept the new "
                "content"
            )


def _take_local(url: str, output_dir: Path, flat: bool, workers: int) -> Source:
    """Records local files in place. Model files (flat) are linked into the checkpoint folder."""
    folder, names = local_files(url)
    names = [name for name in names if name not in (LOCK, PINS)]
    if flat:
        for name in names:
            _link_or_copy(folder / name, output_dir / name)
    return Source(url, None, None, "." if flat else "", _records(folder, names, workers))


def fetch(
    wanted: list[Key], output_dir: str | Path, workers: int = 4, kind: Kind = "dataset", flat: bool = False
) -> dict[Key, Source]:
    """Downloads every (url, revision) to output_dir and writes the lock last. Existing files are only checked.

    kind: "dataset" or "model" (only weights, configuration and tokenizer of a model repository).
    flat: write a single source to output_dir itself (a model's checkpoint folder).
    Raises SourceError. Downloaded files stay for the next attempt.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if flat and len(wanted) != 1:
        raise ValueError(f"flat: {len(wanted)} sources; expected one")
    record = next((output_dir / name for name in (PINS, LOCK) if (output_dir / name).exists()), None)
    pins = read_lock(record) if record else {}
    fetched: dict[Key, Source] = {}
    plans: dict[Key, tuple[Path, Plan]] = {}
    for url, revision in dict.fromkeys(wanted):
        pinned = pins.get((url, revision))
        folder = output_dir / ("." if flat else folder_name(url, revision))
        if local_source(url) is not None:
            source = fetched[url, revision] = _take_local(url, output_dir, flat, workers)
            if pinned and pinned.files != source.files:
                print(f"{url}: changed since the last use; using the new content", file=sys.stderr)
        elif pinned and not _difference(folder, pinned.files, contents=True):
            fetched[url, revision] = pinned
        else:
            folder.mkdir(parents=True, exist_ok=True)
            commit = pinned.resolved if pinned and pinned.resolved else revision
            hub = url.startswith("hf://")
            plan = _plan_hub(url, commit, kind, folder, workers) if hub else _plan_files(url, folder, workers)
            plans[url, revision] = folder, plan
    _check_free_space([pair for _, (needed, _) in plans.values() for pair in needed])
    for key, (folder, (_, run)) in plans.items():
        commit, files = run()
        if key in pins:
            _check_pins(pins[key], folder, files)
        fetched[key] = Source(*key, commit, folder.relative_to(output_dir).as_posix(), files)
        _write_lock(output_dir / PINS, {**pins, **fetched}.values())
    _write_lock(output_dir / PINS, {**pins, **fetched}.values())
    _write_lock(output_dir / LOCK, [fetched[key] for key in dict.fromkeys(wanted)])
    return fetched


def url_file(cache: Path, url: str) -> Path:
    """Path at which `fetch_urls` stores the file of a URL, whether or not it exists."""
    name = hashlib.sha256(url.encode()).hexdigest()
    suffix = re.search(r"\.[A-Za-z0-9]{1,5}$", re.split("[?#]", url)[0])
    return cache / name[:2] / f"{name[2:34]}{suffix[0].lower() if suffix else ''}"


def fetch_urls(
    urls: Iterable[str], cache: Path, limit_bytes: int = 10**12, workers: int = 8
) -> tuple[dict[str, Path], dict[str, str]]:
    """Downloads the files behind URLs in rows. Returns (file of each URL, reason of each failure).

    Files in the cache are not downloaded again. With HF_HUB_OFFLINE, only the cache is used. A URL fails if the files
    of the URLs before it exceed limit_bytes, so that the result does not depend on timing. failures.json in the cache
    lists the reasons. Raises OSError if the disk is full.
    """
    from fsspec.callbacks import Callback

    class Limit(Callback):
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > MAX_PICTURE_BYTES:
                raise SourceError(f"more than {MAX_PICTURE_BYTES} bytes")

    def problem(url: str) -> str:
        """Downloads one URL. Returns "" or the reason of the failure."""
        target = url_file(cache, url)
        if target.exists():
            return ""
        part = target.with_name(f".{target.name}.part")
        try:
            system, path = _filesystem(url)
            target.parent.mkdir(parents=True, exist_ok=True)
            _with_retries(lambda: system.get_file(path, str(part), callback=Limit()), url, most=3)
            os.replace(part, target)
        except OSError:  # from this machine's disk
            raise
        except Exception as error:
            return str(error).removeprefix(f"{url}: ").removeprefix(f"source {url!r}: ") or type(error).__name__
        finally:
            part.unlink(missing_ok=True)
        return ""

    cache.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    failures: dict[str, str] = {}
    unique = list(dict.fromkeys(urls))
    total, batch = 0, 4 * workers
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(unique), desc="fetching", unit="file", disable=None) as bar,
    ):
        for start in range(0, len(unique), batch):
            some = unique[start : start + batch] if total <= limit_bytes else []
            for url, reason in zip(some, pool.map(problem, some), strict=True):
                bar.update()
                if reason:
                    failures[url] = reason
                elif (total := total + url_file(cache, url).stat().st_size) <= limit_bytes:
                    files[url] = url_file(cache, url)
    over = f"over the limit of {limit_bytes} bytes for all files (option `fetch_gb`)"
    failures |= {url: over for url in unique if url not in files and url not in failures}
    write_json(cache / FAILURES, failures, indent=2)
    return files, failures
