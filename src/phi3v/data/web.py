"""Web files over https, with resume, retries and back-off."""

from __future__ import annotations

import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from phi3v.data.sources import Remote, SourceError
from phi3v.provenance.manifest import digest_file

TIMEOUT = 30
"""Seconds without a byte after which a connection counts as lost."""

T = TypeVar("T")


class Transient(Exception):
    """A failure that may pass: a lost connection, a busy server, wrong bytes. `wait`: seconds the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def attempts() -> int:
    """How often a passing failure is tried; PHI3V_DOWNLOAD_ATTEMPTS changes it."""
    return max(1, int(os.environ.get("PHI3V_DOWNLOAD_ATTEMPTS", "6")))


def with_retries(action: Callable[[], T], what: str) -> T:
    """Run an action until it succeeds; after each Transient wait 1, 2, 4 … seconds, or what the server asked for (at
    most 5 minutes)."""
    pause = float(os.environ.get("PHI3V_DOWNLOAD_PAUSE", "1"))
    for attempt in range(1, attempts() + 1):
        try:
            return action()
        except Transient as error:
            if attempt == attempts():
                raise SourceError(f"{what}: {error}; tried {attempt} times") from None
            wait = min(error.wait if error.wait is not None else pause * 2 ** (attempt - 1), 300)
            tqdm.write(f"{what}: {error}; trying again in {wait:.0f} s ({attempt} of {attempts()})")
            time.sleep(wait)
    raise AssertionError("unreachable: the last attempt returns or raises")


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date."""
    if not value:
        return None
    if re.fullmatch(r"\d+", value.strip()):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def status_error(status: int, what: str, wait: str | None) -> Exception:
    """The exception of an HTTP status: transient for 408, 429 and 5xx, final else."""
    if status in (408, 429) or status >= 500:
        return Transient(f"HTTP {status}", retry_after(wait))
    hint = {
        401: "not allowed without a token: set HF_TOKEN",
        403: "not allowed: accept the terms on the page of the source and set HF_TOKEN",
        404: "not found: check the address and the revision",
    }.get(status, "refused")
    return SourceError(f"{what}: HTTP {status}: {hint}")


def _open(url: str, headers: dict[str, str], method: str = "GET") -> http.client.HTTPResponse:
    # Only https:// and http:// addresses come here: fetch() sends every other kind elsewhere.
    request = urllib.request.Request(  # noqa: S310
        url, headers={"User-Agent": "phi3v", "Accept-Encoding": "identity", **headers}, method=method
    )
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)  # noqa: S310
    except urllib.error.HTTPError as error:
        raise status_error(error.code, url, error.headers.get("Retry-After")) from None
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        raise Transient(str(getattr(error, "reason", error))) from None


def store() -> Path | None:
    """A folder that files go through on their way: none."""
    return None


def stored(url: str, revision: str | None, remote: Remote) -> bool:
    """Whether the file is in that folder already."""
    return False


def listing(url: str, revision: str | None, kind: str) -> tuple[str | None, list[Remote]]:
    """The one file of a web address. A web address has no revision: the lock's sha256 pins it."""
    name = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
    if not name or name in (".", ".."):
        raise SourceError(f"source {url!r}: no file name at the end; expected the address of a file")

    def size() -> int | None:
        try:
            with _open(url, {}, "HEAD") as answer:
                length = answer.headers.get("Content-Length")
                return int(length) if length else None
        except SourceError as error:
            if re.search(r"HTTP (403|405|501)", str(error)):  # the server answers GET only
                return None
            raise

    return None, [Remote(name, url, with_retries(size, url))]


def get(url: str, revision: str | None, remote: Remote, target: Path, sha256: str | None) -> None:
    """Fetch a file; a part left by an earlier try goes on where it ended, if the server still has the same file."""
    part = target.with_name(f".{target.name}.part")
    tag_file = target.with_name(f".{target.name}.etag")

    def attempt() -> None:
        have = part.stat().st_size if part.exists() else 0
        tag = tag_file.read_text() if have and tag_file.exists() else ""
        if have and (not tag or have >= (remote.size or have + 1)):
            # Without a tag nobody can say whether the rest belongs to the same file.
            part.unlink()
            have = 0
        headers = {"Range": f"bytes={have}-", "If-Range": tag} if have else {}
        with _open(url, headers) as answer:
            if have and answer.status != 206:
                have = 0
            tag_file.write_text(answer.headers.get("ETag") or "")
            length = answer.headers.get("Content-Length")
            expected = have + int(length) if length else remote.size
            with (
                open(part, "ab" if have else "wb") as file,
                tqdm(
                    total=expected, initial=have, unit="B", unit_scale=True, desc=target.name[:40], disable=None
                ) as bar,
            ):
                try:
                    while block := answer.read(1 << 18):
                        file.write(block)
                        bar.update(len(block))
                except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
                    raise Transient(f"connection lost after {file.tell()} bytes ({type(error).__name__})") from None
        if expected is not None and part.stat().st_size != expected:
            raise Transient(f"connection lost: {part.stat().st_size} of {expected} bytes")
        if sha256 and (seen := digest_file(part)) != sha256:
            part.unlink()
            raise Transient(f"wrong bytes: sha256 {seen}; expected {sha256}")

    with_retries(attempt, url)
    os.replace(part, target)
    tag_file.unlink(missing_ok=True)
