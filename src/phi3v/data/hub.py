"""Hub repositories through huggingface_hub: its cache, its resume, its token, HF_ENDPOINT mirrors and
HF_HUB_OFFLINE."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from phi3v.data.sources import Remote, SourceError, link_or_copy
from phi3v.data.web import Transient, retry_after, status_error, with_retries
from phi3v.provenance.manifest import digest_file

MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "LICENSE*", "README.md")
"""Of a model repository: weights, configuration, tokenizer, terms. No remote code, no second copy in another format."""

T = TypeVar("T")


def split_url(url: str) -> tuple[str, str, str]:
    """("dataset" or "model", "OWNER/REPO", "path or pattern") of a hub URL. Raises SourceError."""
    match = re.fullmatch(r"hf://(datasets/)?(?!datasets/)([\w.-]+/[\w.-]+)(?:/(.+))?", url)
    if not match:
        raise SourceError(f"source {url!r}: expected hf://datasets/OWNER/REPO/PATH or hf://OWNER/REPO")
    return ("dataset" if match[1] else "model"), match[2], match[3] or ""


def _call(action: Callable[[], T], what: str) -> T:
    """A hub call with failures sorted: passing ones are tried again, others end in a SourceError with what to do."""
    import httpx2
    from huggingface_hub.errors import (
        EntryNotFoundError,
        FileMetadataError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def attempt() -> T:
        try:
            return action()
        except OfflineModeIsEnabled:
            raise SourceError(
                f"{what}: not in the cache, and HF_HUB_OFFLINE forbids the network; download it once online"
            ) from None
        except GatedRepoError:
            raise SourceError(f"{what}: gated: accept its terms on its page and set HF_TOKEN") from None
        except RevisionNotFoundError:
            raise SourceError(f"{what}: no such revision; expected a commit, branch or tag of the repository") from None
        except RepositoryNotFoundError:
            raise SourceError(f"{what}: no such repository, or not visible without a token (HF_TOKEN)") from None
        except LocalEntryNotFoundError as error:
            # Raised offline, and also when the connection failed before the file's facts were known.
            if error.__cause__ is None or isinstance(error.__cause__, OfflineModeIsEnabled):
                raise SourceError(f"{what}: not in the cache, and the network is not reachable or forbidden") from None
            raise Transient(f"{error.__cause__}") from None
        except EntryNotFoundError:
            raise SourceError(f"{what}: no such file in the repository") from None
        except HfHubHTTPError as error:
            response = error.response
            raise status_error(response.status_code, what, retry_after_header(response.headers)) from None
        except FileMetadataError as error:
            raise Transient(str(error)) from None
        except (httpx2.HTTPError, ConnectionError, TimeoutError) as error:
            raise Transient(f"{type(error).__name__}: {error}") from None
        except OSError as error:
            if "Consistency check failed" in str(error):
                raise Transient("fewer or more bytes than promised") from None
            raise

    return with_retries(attempt, what)


def retry_after_header(headers: Any) -> str | None:
    """The Retry-After header, where it can be read at all."""
    value = headers.get("Retry-After")
    return value if retry_after(value) is not None else None


def store() -> Path | None:
    """The hub's cache, through which every file goes."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def stored(url: str, revision: str | None, remote: Remote) -> bool:
    """Whether the cache has the file already."""
    from huggingface_hub import try_to_load_from_cache

    repo_type, repo, _ = split_url(url)
    return isinstance(try_to_load_from_cache(repo, remote.locator, revision=revision, repo_type=repo_type), str)


def listing(url: str, revision: str | None, kind: str) -> tuple[str | None, list[Remote]]:
    """(commit, files that the URL's pattern names). Offline: what the cache has. Raises SourceError."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.hf_api import RepoFile

    repo_type, repo, pattern = split_url(url)
    if is_offline_mode():
        root = _cached_snapshot(url, repo_type, repo, revision)
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        found = [Remote(name, name, (root / name).stat().st_size) for name in names if _selected(name, pattern, kind)]
        if not found:
            raise SourceError(
                f"{url}: nothing of it in {root}, and HF_HUB_OFFLINE forbids the network; fetch it online"
            )
        return root.name, found
    api = HfApi()
    commit = _call(lambda: api.repo_info(repo, repo_type=repo_type, revision=revision).sha, url)
    fixed = (
        re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
        if re.search(r"[*?\[]", pattern)
        else pattern.rpartition("/")[0]
    )
    tree = _call(
        lambda: list(
            api.list_repo_tree(repo, path_in_repo=fixed or None, recursive=True, revision=commit, repo_type=repo_type)
        ),
        url,
    )
    remotes = [
        Remote(item.path, item.path, item.size, item.lfs.sha256 if item.lfs else None)
        for item in tree
        if isinstance(item, RepoFile) and _selected(item.path, pattern, kind)
    ]
    if not remotes:
        raise SourceError(f"{url}: no file of the repository matches {pattern or MODEL_FILES!r} at {commit}")
    for remote in remotes:
        if remote.path.startswith("/") or ".." in remote.path.split("/"):
            raise SourceError(f"{url}: the listing names {remote.path!r}; expected paths inside the repository")
    return commit, sorted(remotes, key=lambda remote: remote.path)


def _cached_snapshot(url: str, repo_type: str, repo: str, revision: str | None) -> Path:
    """Folder of the cached commit: the one asked for, or the only one there. Raises SourceError."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    home = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=repo_type)
    reference = home / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshots = sorted((home / "snapshots").glob(commit or "*"))
    if len(snapshots) != 1:
        seen = ", ".join(path.name for path in snapshots) or "none"
        raise SourceError(
            f"{url}: HF_HUB_OFFLINE forbids the network, and the cache {home} has {seen} of revision {revision}; "
            f"expected "
            "one: fetch it online, or name the revision"
        )
    return snapshots[0]


def _selected(path: str, pattern: str, kind: str) -> bool:
    if pattern:
        return fnmatch.fnmatchcase(path, pattern)
    return kind != "model" or ("/" not in path and any(fnmatch.fnmatchcase(path, name) for name in MODEL_FILES))


def get(url: str, revision: str | None, remote: Remote, target: Path, sha256: str | None) -> None:
    """One file into the hub's cache, and from there into place. Wrong bytes are thrown out of the cache and fetched
    again."""
    from huggingface_hub import hf_hub_download

    repo_type, repo, _ = split_url(url)
    wrong = False

    def download() -> None:
        nonlocal wrong
        path = Path(hf_hub_download(repo, remote.locator, repo_type=repo_type, revision=revision, force_download=wrong))
        size = path.stat().st_size
        if remote.size not in (None, size):
            wrong = True
            raise Transient(f"{size} bytes; expected {remote.size}")
        if sha256 and (seen := digest_file(path)) != sha256:
            wrong = True
            raise Transient(f"wrong bytes: sha256 {seen}; expected {sha256}")
        link_or_copy(path, target)

    _call(download, f"{url}: {remote.path}")
