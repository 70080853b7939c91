"""Fetching: local files, web files and hub repositories, from a loopback server that fails in every way servers
fail."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from data_examples import COMMIT, HubServer

from phi3v.data import fetch as room
from phi3v.data.fetch import LOCK, PINS, SourceError, fetch, fetch_urls, folder_name, locked_files

ROOT = Path(__file__).parents[1]
SHARD = bytes(range(256)) * 4096  # 1 MiB
NOTE = b"small text file"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setenv("PHI3V_DOWNLOAD_PAUSE", "0.01")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    repositories = {
        "datasets/owner/set": {
            "docvqa/train-0.parquet": SHARD,
            "docvqa/train-1.parquet": SHARD[::-1],
            "nlvr2/x.parquet": NOTE,
        },
        "owner/model": {
            "config.json": b"{}",
            "model.safetensors": SHARD,
            "modeling.py": b"code",
            "pytorch_model.bin": NOTE,
        },
        "": {"files/UCF.tar.gz": SHARD},
    }
    with HubServer(repositories) as server:
        yield server


DATASETS = """
docvqa:
  title: D
  metric: anls
  licence: its own terms
  splits:
    train: {url: "hf://datasets/owner/set/docvqa/train-*.parquet", format: cauldron}
    val: {url: "hf://datasets/owner/set/docvqa/train-*.parquet", format: cauldron}
"""
MODELS = "tiny: {title: T, url: 'hf://owner/model', licence: MIT}\n"
URL = "hf://datasets/owner/set/docvqa/train-*.parquet"


def download(folder: Path, hub: HubServer, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """scripts/download.py of the dataset above, with a cache of its own."""
    (folder / "datasets.yaml").write_text(DATASETS)
    (folder / "models.yaml").write_text(MODELS)
    arguments = more or ("--datasets", "datasets.yaml", "--dataset", "docvqa", "--output_dir", "out")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "hub"), "PYTHONPATH": str(ROOT / "src")}
    settings |= {"PHI3V_DOWNLOAD_PAUSE": "0.01", "HF_HUB_DISABLE_XET": "1", **environment}
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "download.py"), *arguments],
        cwd=folder, env={**clean, **settings}, capture_output=True, text=True, timeout=90,
    )  # fmt: skip


def test_hub_files_of_the_pattern_are_fetched_once_and_locked(tmp_path: Path, hub: HubServer) -> None:
    done = download(tmp_path, hub)
    assert done.returncode == 0, done.stderr
    assert "its own terms" in done.stderr
    source = json.loads((tmp_path / "out" / LOCK).read_text())["sources"]
    assert [item["resolved"] for item in source] == [COMMIT]  # both splits share one source
    digests = {file["path"]: (file["size"], file["sha256"]) for file in source[0]["files"]}
    assert digests == {
        "docvqa/train-0.parquet": (len(SHARD), hashlib.sha256(SHARD).hexdigest()),
        "docvqa/train-1.parquet": (len(SHARD), hashlib.sha256(SHARD[::-1]).hexdigest()),
    }
    _, files, _ = locked_files(tmp_path / "out", URL, None)
    assert [path.read_bytes() for path in files] == [SHARD, SHARD[::-1]]
    assert not any(path.endswith("x.parquet") for _, path, _ in hub.requests)
    # Again, and with the lock gone as a workflow removes it: nothing is asked of the server any more.
    (tmp_path / "out" / LOCK).unlink()
    asked = len(hub.requests)
    assert download(tmp_path, hub).returncode == 0
    assert len(hub.requests) == asked
    assert (tmp_path / "out" / LOCK).exists()
    # A compute node without network finds everything.
    (tmp_path / "out" / LOCK).unlink()
    assert download(tmp_path, hub, HF_HUB_OFFLINE="1").returncode == 0


def test_offline_takes_the_files_from_the_cache(tmp_path: Path, hub: HubServer) -> None:
    assert download(tmp_path, hub).returncode == 0
    again = ("--datasets", "datasets.yaml", "--dataset", "docvqa", "--output_dir", "elsewhere")
    done = download(tmp_path, hub, *again, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "elsewhere" / folder_name(URL, None) / "docvqa" / "train-1.parquet").read_bytes() == SHARD[::-1]
    empty = download(tmp_path, hub, *again[:-1], "third", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert empty.returncode == 2
    assert "HF_HUB_OFFLINE" in empty.stderr or "not in the cache" in empty.stderr


def test_a_cut_connection_goes_on_and_busy_servers_are_asked_again(tmp_path: Path, hub: HubServer) -> None:
    # Longer than two of huggingface_hub's blocks of 10 MB: only whole blocks reach its disk.
    hub.repositories["datasets/owner/set"]["docvqa/train-0.parquet"] = SHARD * 24
    hub.faults = {"train-0.parquet": ["cut", 503], "train-1.parquet": [429], "revision/main": [503, 500]}
    done = download(tmp_path, hub)
    assert done.returncode == 0, done.stderr
    _, files, _ = locked_files(tmp_path / "out", URL, None)
    assert [path.read_bytes() for path in files] == [SHARD * 24, SHARD[::-1]]
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path.endswith("train-0.parquet")]
    assert any(asked for asked in ranges), f"no request went on where the cut one ended: {ranges}"


def test_wrong_bytes_are_thrown_away_and_fetched_again(tmp_path: Path, hub: HubServer) -> None:
    hub.faults = {"train-0.parquet": ["wrong"]}
    done = download(tmp_path, hub)
    assert done.returncode == 0, done.stderr
    assert "wrong content" in done.stderr + done.stdout
    _, files, _ = locked_files(tmp_path / "out", URL, None)
    assert files[0].read_bytes() == SHARD


def test_bytes_that_stay_wrong_are_an_error_and_leave_no_lock(tmp_path: Path, hub: HubServer) -> None:
    hub.faults = {"train-0.parquet": ["wrong"] * 20}
    done = download(tmp_path, hub, PHI3V_DOWNLOAD_ATTEMPTS="2")
    assert done.returncode == 2
    assert "train-0.parquet" in done.stderr
    assert "wrong content" in done.stderr
    assert not (tmp_path / "out" / LOCK).exists()
    assert not list((tmp_path / "out").rglob("train-0.parquet"))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("hf://datasets/owner/none/x.parquet", "no such repository"),
        ("hf://datasets/owner/set/none/*.parquet", "no file of the repository matches"),
        ("hf://datasets/owner", "expected hf://datasets/OWNER/REPO/PATH"),
        ("gopher://host/file", "unknown scheme"),
        ("ftp://host/file", "unknown scheme"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, hub: HubServer, entry: str, expected: str) -> None:
    text = DATASETS.replace(URL, entry)
    (tmp_path / "own.yaml").write_text(text)
    done = download(tmp_path, hub, "--datasets", "own.yaml", "--dataset", "docvqa", "--output_dir", "out")
    assert done.returncode == 2
    assert entry in done.stderr
    assert expected in done.stderr


def test_a_revision_that_does_not_exist_is_named(tmp_path: Path, hub: HubServer) -> None:
    text = DATASETS.replace('parquet", format', 'parquet", revision: v9, format')
    (tmp_path / "own.yaml").write_text(text)
    done = download(tmp_path, hub, "--datasets", "own.yaml", "--dataset", "docvqa", "--output_dir", "out")
    assert done.returncode == 2
    assert "no such revision" in done.stderr


def test_content_that_changed_since_first_use_is_refused(tmp_path: Path, hub: HubServer) -> None:
    assert download(tmp_path, hub).returncode == 0
    hub.repositories["datasets/owner/set"]["docvqa/train-0.parquet"] = SHARD[1:] + b"!"
    (tmp_path / "out" / folder_name(URL, None) / "docvqa" / "train-0.parquet").unlink()
    done = download(tmp_path, hub, HF_HOME=str(tmp_path / "other"), PHI3V_DOWNLOAD_ATTEMPTS="2")
    assert done.returncode == 2
    assert "sha256" in done.stderr
    assert "train-0.parquet" in done.stderr


def test_of_a_model_only_weights_configuration_and_tokenizer_are_taken(tmp_path: Path, hub: HubServer) -> None:
    done = download(tmp_path, hub, "--models", "models.yaml", "--model", "tiny", "--output_dir", "model")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        LOCK,
        PINS,
    ]
    assert "MIT" in done.stderr


def test_a_web_file_goes_on_after_a_cut(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BLOCK", len(SHARD) // 4)
    hub.faults = {"UCF.tar.gz": [None, "cut", 503, None, "cut"]}
    url = f"{hub.address}/files/UCF.tar.gz"
    fetch([(url, None)], tmp_path)
    _, files, _ = locked_files(tmp_path, url, None)
    assert files[0].read_bytes() == SHARD
    quarters = [
        int(asked.removeprefix("bytes=").split("-")[0]) * 4 // len(SHARD) for _, _, asked in hub.requests if asked
    ]
    assert quarters == [0, 1, 1, 1, 2, 2, 3]  # no quarter that arrived is asked for again
    assert [path.name for path in files[0].parent.iterdir()] == ["UCF.tar.gz"]


@pytest.mark.parametrize("fault", ["no HEAD", "no ranges"])
def test_servers_that_refuse_head_or_ranges_serve_all_the_same(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(room, "BLOCK", len(SHARD) // 4)
    hub.faults = {"UCF.tar.gz": [fault] * 5}
    url = f"{hub.address}/files/UCF.tar.gz"
    fetch([(url, None)], tmp_path)
    assert locked_files(tmp_path, url, None)[1][0].read_bytes() == SHARD


def test_files_folders_and_patterns_of_an_object_store(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PROTOCOLS", (*room.PROTOCOLS, "memory"))
    store = fsspec.filesystem("memory")
    for name in ("b/train/1.parquet", "b/train/0.parquet", "b/train/deep/2.txt", "b/other"):
        store.pipe(f"/store/{name}", name.encode())
    for url, expected in (
        ("memory://store/b/train", ["0.parquet", "1.parquet", "deep/2.txt"]),
        ("memory://store/b/train/*.parquet", ["0.parquet", "1.parquet"]),
        ("memory://store/b/other", ["other"]),
    ):
        fetch([(url, None)], tmp_path)
        root, files, _ = locked_files(tmp_path, url, None)
        assert [path.relative_to(root).as_posix() for path in files] == expected
        assert all(path.read_bytes().decode().endswith(path.name) for path in files)
    with pytest.raises(SourceError, match=r"'memory://store/none': matches no file"):
        fetch([("memory://store/none", None)], tmp_path)


def test_a_missing_package_of_an_object_store_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(SourceError, match=r"s3fs.*pip install -e '\.\[cloud\]'"):
        fetch([("s3://bucket/x", None)], tmp_path)


def test_urls_of_rows_are_fetched_once_and_failures_have_reasons(tmp_path: Path, hub: HubServer) -> None:
    hub.repositories[""] |= {"p/1.JPG": b"one", "p/2": b"two", "p/3.part": b"three", "p/a::b": b"four", "p/a": b"no"}
    hub.faults = {"1.JPG": [503, "cut"], "busy": [500] * 3}
    good = [f"{hub.address}/p/{name}" for name in ("1.JPG?size=1", "2", "3.part", "a::b")]
    bad = [f"{hub.address}/none.png", f"{hub.address}/busy", "pictures/a.png", "http://[bad/x.png"]
    files, failures = fetch_urls([good[0], *bad, *good], tmp_path)
    assert [files[url].read_bytes() for url in good] == [b"one", b"two", b"three", b"four"]
    assert files[good[0]].suffix == ".jpg"
    assert list(failures) == bad
    assert (
        "404" in failures[bad[0]]
        and "HTTP 500; gave up after 3 attempts" in failures[bad[1]]
        and "https://" in failures[bad[2]]
    )
    assert json.loads((tmp_path / "failures.json").read_text()) == failures
    assert not list(tmp_path.rglob(".*.part"))
    # Once more: only what is missing is asked for.
    hub.repositories[""]["none.png"] = b"late"
    asked = len(hub.requests)
    files, failures = fetch_urls([*good, bad[0]], tmp_path)
    assert files[bad[0]].read_bytes() == b"late" and not failures
    assert {path for _, path, _ in hub.requests[asked:]} == {"/none.png"}


@pytest.mark.parametrize("workers", [1, 8])
def test_the_limit_of_urls_does_not_depend_on_timing(tmp_path: Path, hub: HubServer, workers: int) -> None:
    hub.repositories[""] |= {f"{n}.png": bytes(100) for n in range(40)}
    urls = [f"{hub.address}/{n}.png" for n in range(40)]
    files, failures = fetch_urls(urls, tmp_path, limit_bytes=350, workers=workers)
    assert list(files) == urls[:3]
    assert list(failures) == urls[3:]
    assert "over the limit" in failures[urls[3]]
    assert len(hub.requests) < 40


def test_offline_urls_come_from_the_cache(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[""] |= {"1.png": b"one", "2.png": b"two"}
    urls = [f"{hub.address}/{n}.png" for n in (1, 2)]
    fetch_urls(urls[:1], tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    files, failures = fetch_urls(urls, tmp_path)
    assert list(files) == urls[:1] and "HF_HUB_OFFLINE" in failures[urls[1]]


def test_a_web_file_that_changed_between_two_tries_starts_anew(tmp_path: Path, hub: HubServer) -> None:
    hub.faults = {"UCF.tar.gz": ["cut", 500, 500, 500, 500, 500]}
    url = f"{hub.address}/files/UCF.tar.gz"
    with pytest.raises(SourceError, match="HTTP 500; gave up after 6 attempts"):
        fetch([(url, None)], tmp_path)
    hub.repositories[""]["files/UCF.tar.gz"] = SHARD[::-1]
    fetch([(url, None)], tmp_path)
    assert locked_files(tmp_path, url, None)[1][0].read_bytes() == SHARD[::-1]


@pytest.mark.parametrize("status", [404, 403, 401])
def test_a_final_refusal_is_not_tried_again(tmp_path: Path, hub: HubServer, status: int) -> None:
    hub.faults = {"UCF.tar.gz": [status] * 3}
    url = f"{hub.address}/files/UCF.tar.gz"
    with pytest.raises(SourceError, match=f"HTTP {status}"):
        fetch([(url, None)], tmp_path)
    assert hub.gets("UCF.tar.gz") == 1
    assert not (tmp_path / LOCK).exists()


def test_room_is_checked_before_the_first_byte(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: room.shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(SourceError, match="MB free"):
        fetch([(f"{hub.address}/files/UCF.tar.gz", None)], tmp_path)
    assert hub.gets("UCF.tar.gz") == 0


def test_local_files_are_read_where_they_are_and_never_changed(tmp_path: Path) -> None:
    original = tmp_path / "mine" / "pictures" / "a.png"
    original.parent.mkdir(parents=True)
    original.write_bytes(NOTE)
    (tmp_path / "mine" / "table.csv").write_text("image,question,answer\n")
    before = os.stat(original)
    url = f"file://{tmp_path}/mine"
    fetch([(url, None)], tmp_path / "out")
    root, files, _ = locked_files(tmp_path / "out", url, None)
    assert [path.relative_to(root).as_posix() for path in files] == ["table.csv", "pictures/a.png"]
    assert original.read_bytes() == NOTE
    assert os.stat(original).st_mtime_ns == before.st_mtime_ns
    assert files[1] == original
    # What their owner changes, adds or removes is taken anew.
    (tmp_path / "mine" / "table.csv").unlink()
    with pytest.raises(SourceError, match=r"table\.csv: added or removed .*; run scripts/download\.py again"):
        locked_files(tmp_path / "out", url, None)
    original.write_bytes(SHARD)
    fetch([(url, None)], tmp_path / "out")
    root, files, _ = locked_files(tmp_path / "out", url, None)
    assert [path.read_bytes() for path in files] == [SHARD]


def test_relative_urls_globs_and_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.parquet", "a.parquet", "c.txt"):
        Path(name).write_text(name)
    fetch([("file:*.parquet", None), ("c.txt", None)], "out")
    assert [path.name for path in locked_files("out", "file:*.parquet", None)[1]] == ["a.parquet", "b.parquet"]
    with pytest.raises(SourceError, match=r"'file:none': no such file"):
        fetch([("file:none", None)], "out")
    with pytest.raises(SourceError, match="a host in a file URL"):
        fetch([("file://server/x", None)], "out")


def test_a_local_model_lands_flat(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    fetch([(str(tmp_path / "model"), None)], tmp_path / "out", kind="model", flat=True)
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert locked_files(tmp_path / "out", str(tmp_path / "model"), None)[1] == [tmp_path / "out" / "config.json"]


def test_a_fetched_file_that_was_touched_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("abc")
    url = str(tmp_path / "t.csv")
    fetch([(url, None)], tmp_path / "out")
    _, files, _ = locked_files(tmp_path / "out", url, None)
    files[0].write_text("abd")
    with pytest.raises(SourceError, match=r"t\.csv: got sha256 .*; run scripts/download\.py again"):
        locked_files(tmp_path / "out", url, None)
    (tmp_path / "out" / LOCK).write_text("{}")
    with pytest.raises(SourceError, match="not a valid lock file"):
        locked_files(tmp_path / "out", url, None)
    with pytest.raises(SourceError, match=r"missing; run scripts/download\.py"):
        locked_files(tmp_path, url, None)
