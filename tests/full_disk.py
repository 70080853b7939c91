"""What happens on a disk that is really full: run in a mount namespace of its own by test_data_full_disk.py.

python tests/full_disk.py SCENARIO FOLDER        # as root there: mounts a small tmpfs on FOLDER/disk
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from data_examples import HubServer, cauldron_rows, picture_bytes, ucf_archive, write_parquet

ROOT = Path(__file__).parents[1]
DISK_BYTES = 24 * 2**20
PAYLOAD = os.urandom(12 * 2**20)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes of the disk."""
    filler = disk / "somebody-else"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - leave)
    return filler


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def script(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of the repository, as somebody types it."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    settings = {
        "PYTHONPATH": str(ROOT / "src"),
        "PHI3V_DOWNLOAD_PAUSE": "0.01",
        "HF_HUB_DISABLE_XET": "1",
        **environment,
    }
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)],
        env={**clean, **settings}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def download(folder: Path, disk: Path, url: Callable[[HubServer], str]) -> None:
    """Somebody else fills the disk while the file is on its way; then the room is there again."""
    fillers: list[Path] = []

    class Filling(HubServer):
        def _reply(self, handler, status, data, headers, body, cut=False):  # type: ignore[no-untyped-def,override]
            if body and len(data) > 2**20 and not fillers:
                fillers.append(fill(disk, 4 * 2**20))
            HubServer._reply(handler, status, data, headers, body, cut)

    with Filling({"datasets/owner/set": {"data/big.parquet": PAYLOAD}, "": {"files/big.parquet": PAYLOAD}}) as hub:
        entry = f"{{url: '{url(hub)}', format: cauldron}}"
        (folder / "datasets.yaml").write_text(
            f"set: {{title: T, metric: anls, splits: {{train: {entry}, val: {entry}}}}}"
        )
        where = ("--datasets", folder / "datasets.yaml", "--dataset", "set", "--output_dir", disk / "out")
        surroundings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(disk / "hub"), "PHI3V_DOWNLOAD_ATTEMPTS": "2"}
        done = script("download.py", *where, **surroundings)
        assert done.returncode == 1, (done.returncode, done.stderr)
        assert "the disk is full: free some space" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert not list((disk / "out").rglob("big.parquet"))
        assert not list((disk / "out").rglob("sources.*"))
        fillers[0].unlink()
        before = len(hub.requests)
        done = script("download.py", *where, **surroundings)
        assert done.returncode == 0, done.stderr
        if "hf://" not in entry:  # huggingface_hub keeps whole blocks of 10 MB only, so here it starts anew
            asked = [how for method, path, how in hub.requests[before:] if method == "GET"]
            assert asked and asked[0] and asked[0].startswith("bytes=") and asked[0] != "bytes=0-", asked
    (found,) = (disk / "out").rglob("big.parquet")
    assert found.read_bytes() == PAYLOAD
    left = [path.name for path in (disk / "out").rglob("*") if path.name.startswith(".")]
    assert not left, left


def download_web(folder: Path, disk: Path) -> None:
    """A web file."""
    download(folder, disk, lambda hub: f"{hub.address}/files/big.parquet")


def download_hub(folder: Path, disk: Path) -> None:
    """A hub file; the cache is on the full disk too."""
    download(folder, disk, lambda hub: "hf://datasets/owner/set/data/big.parquet")


def no_room(folder: Path, disk: Path) -> None:
    """Two files that would each fit, but not both: nothing is fetched."""
    with HubServer({"": {"files/a.parquet": PAYLOAD, "files/b.parquet": PAYLOAD[::-1]}}) as hub:
        fill(disk, 20 * 2**20)
        train, val = (f"{{url: '{hub.address}/files/{name}.parquet', format: cauldron}}" for name in "ab")
        (folder / "datasets.yaml").write_text(
            f"set: {{title: T, metric: anls, splits: {{train: {train}, val: {val}}}}}"
        )
        done = script(
            "download.py", "--datasets", folder / "datasets.yaml", "--dataset", "set", "--output_dir", disk / "out"
        )
        assert done.returncode == 2, done.stderr
        assert f"{2 * len(PAYLOAD) / 1e6:,.0f} MB to download" in done.stderr, done.stderr
        assert not any(method == "GET" for method, _, _ in hub.requests)


def convert(folder: Path, disk: Path) -> None:
    """A conversion into a full disk leaves what was there; with room it makes what it makes elsewhere."""
    rows = cauldron_rows(40)
    for number, row in enumerate(rows):
        row["images"][0]["bytes"] = picture_bytes(number, "PNG", (320, 320))  # 0.3 MB
    old = write_parquet(folder / "old.parquet", rows[:4])
    new = write_parquet(folder / "new.parquet", rows)
    what = ("--format", "cauldron", "--split", "train", "--name", "set")
    assert script("convert.py", *what, "--input", old, "--output_dir", disk / "out").returncode == 0
    before = files(disk / "out")
    filler = fill(disk, 8 * 2**20)
    done = script("convert.py", *what, "--input", new, "--output_dir", disk / "out")
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert "the disk is full; " in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert files(disk / "out") == before
    filler.unlink()
    done = script("convert.py", *what, "--input", new, "--output_dir", disk / "out")
    assert done.returncode == 0, done.stderr
    assert script("convert.py", *what, "--input", new, "--output_dir", folder / "elsewhere").returncode == 0
    assert files(disk / "out") == files(folder / "elsewhere")
    assert len(files(disk / "out")) > 4


def unpack(folder: Path, disk: Path) -> None:
    """An archive that needs more room than there is."""
    archive = ucf_archive(folder, {"train": 2, "val": 1})
    filler = fill(disk, 16384)
    what = ("--format", "ucf101", "--input", archive, "--output_dir", disk / "out")
    done = script("convert.py", *what)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    assert "free space" in done.stderr or "the disk is full" in done.stderr, done.stderr
    assert not files(disk / "out")
    filler.unlink()
    assert script("convert.py", *what).returncode == 0


SCENARIOS = {scenario.__name__: scenario for scenario in (download_web, download_hub, no_room, convert, unpack)}


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)], check=True)
    SCENARIOS[name](folder, disk)


if __name__ == "__main__":
    main()
