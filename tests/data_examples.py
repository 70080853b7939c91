"""Small sources for the data tests: pictures, parquet files, clips and a web server that speaks the hub's endpoints."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

COMMIT = "c0ffee" * 6 + "c0ff"


def picture_bytes(seed: int = 0, kind: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    """A small noisy picture."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def cauldron_rows(count: int, pictures: int = 1, turns: int = 2) -> list[dict]:
    """Rows as in the_cauldron; pictures are JPEG in even rows and PNG in odd ones."""
    return [
        {
            "images": [
                {"bytes": picture_bytes(10 * row + k, "PNG" if row % 2 else "JPEG"), "path": None}
                for k in range(pictures)
            ],
            "texts": [
                {"user": f"Question {row}.{k}?", "assistant": f"Answer {row}.{k}", "source": "demo"}
                for k in range(turns)
            ],
        }
        for row in range(count)
    ]


def write_clip(path: Path, frames: int, level: int = 0, codec: str = "mpeg4", size: tuple[int, int] = (64, 48)) -> Path:
    """A clip whose frame k is grey of level + 8 k."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for k in range(frames):
            image = np.full((size[1], size[0], 3), min(255, level + 8 * k), np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def ucf_archive(folder: Path, splits: dict[str, int], classes: tuple[str, ...] = ("Archery", "BabyCrawling")) -> Path:
    """UCF101_subset.tar.gz with `splits[split]` clips of each class."""
    for split, count in splits.items():
        for number, name in enumerate(classes):
            for clip in range(count):
                write_clip(folder / "UCF101_subset" / split / name / f"v_{name}_g{clip:02d}_c01.avi", 20, 20 * number)
    path = folder / "UCF101_subset.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder / "UCF101_subset", "UCF101_subset")
    return path


@dataclass
class HubServer:
    """A web server with a hub's repositories, and faults to order: `faults[path suffix]` is a list of what the next
    GETs meet.

    Faults: "cut" (half of the bytes, then the connection ends), "wrong" (other bytes), "no HEAD" (405 to a HEAD), "no ranges" (the whole file
    whatever is asked for), or a status number.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    faults: dict[str, list[str | int | None]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range header)."""
    address: str = ""

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                """Nothing on the screen."""

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def gets(self, suffix: str) -> int:
        """How many GETs a path that ends so has met."""
        return sum(method == "GET" and path.endswith(suffix) for method, path, _ in self.requests)

    def answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append((handler.command, path, handler.headers.get("Range")))
        fault: str | int | None = None
        for suffix, faults in self.faults.items():
            if path.endswith(suffix) and faults and body != (faults[0] == "no HEAD"):
                fault = faults.pop(0)
                break
        if fault == "no HEAD":
            return self._reply(handler, 405, b"", {}, body)
        if isinstance(fault, int):
            return self._reply(handler, fault, b"{}", {"Retry-After": "0"} if fault in (429, 503) else {}, body)
        if path.startswith("/api/"):
            return self._api(handler, path, body)
        return self._file(handler, path, body, fault)

    def _repository(self, path: str) -> tuple[str, dict[str, bytes]] | None:
        for name, files in self.repositories.items():
            if path == name or path.startswith(f"{name}/"):
                return name, files
        return None

    def _api(self, handler: BaseHTTPRequestHandler, path: str, body: bool) -> None:
        kind, _, rest = path.removeprefix("/api/").partition("/")
        found = self._repository(f"datasets/{rest}" if kind == "datasets" else rest)
        if found is None:
            return self._reply(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        name, files = found
        action, _, place = (
            (f"datasets/{rest}" if kind == "datasets" else rest).removeprefix(name).strip("/").partition("/")
        )
        revision, _, folder = place.partition("/")
        if revision not in ("main", COMMIT, ""):
            return self._reply(handler, 404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        if action == "tree":
            listing = [
                {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
                | (
                    {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
                    if len(data) > 200
                    else {}
                )
                for path, data in files.items()
                if not folder or path.startswith(f"{folder}/")
            ]
            return self._reply(handler, 200, json.dumps(listing).encode(), {}, body)
        info = {"id": name.removeprefix("datasets/"), "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
        info["siblings"] = [{"rfilename": path} for path in files]
        return self._reply(handler, 200, json.dumps(info).encode(), {}, body)

    def _file(self, handler: BaseHTTPRequestHandler, path: str, body: bool, fault: str | int | None) -> None:
        found = self._repository(path.strip("/"))
        if found:
            name = path.strip("/").removeprefix(f"{found[0]}/resolve/").partition("/")[2]
            data = found[1].get(name)
        else:
            data = self.repositories.get("", {}).get(path.strip("/"))
        if data is None:
            return self._reply(handler, 404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        tag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if fault == "wrong":
            data = bytes(len(data))
        asked = handler.headers.get("Range")
        if not asked or fault == "no ranges" or handler.headers.get("If-Range") not in (None, f'"{tag}"'):
            return self._reply(handler, 200, data, headers, body, cut=fault == "cut")
        start, _, last = asked.removeprefix("bytes=").partition("-")
        part = data[int(start) : int(last) + 1 if last else None]
        headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
        return self._reply(handler, 206, part, headers, body, cut=fault == "cut")

    @staticmethod
    def _reply(
        handler: BaseHTTPRequestHandler,
        status: int,
        data: bytes,
        headers: dict[str, str],
        body: bool,
        cut: bool = False,
    ) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if body:
            handler.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            handler.wfile.flush()
            handler.close_connection = True
            handler.connection.close()
