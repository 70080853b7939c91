"""Thumbnails of the pictures behind the shown examples, each embedded once however many rows show it."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path

from PIL import Image, ImageOps

LONGEST_SIDE = 240
QUALITY = 70
BUDGET_BYTES = 4_000_000
"""Of all thumbnails together, so that a report of 200 rows still goes through the mail."""


class Thumbnails:
    """Pictures by a short digest of their bytes; `data` is what the page embeds."""

    def __init__(self, budget: int = BUDGET_BYTES) -> None:
        self.data: dict[str, str] = {}
        self._keys: dict[Path, str | None] = {}
        self._left = budget

    def add(self, path: Path) -> str | None:
        """Key of a picture's thumbnail; None when the file is not there (any more), is no picture, or the budget is spent."""
        if path not in self._keys:
            self._keys[path] = self._make(path)
        return self._keys[path]

    def _make(self, path: Path) -> str | None:
        try:
            raw = path.read_bytes()
            key = hashlib.sha256(raw).hexdigest()[:12]
            if key in self.data:
                return key
            image = Image.open(io.BytesIO(raw))
            image.draft("RGB", (2 * LONGEST_SIDE, 2 * LONGEST_SIDE))
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=QUALITY, method=4)
        uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        if len(uri) > self._left:
            return None
        self._left -= len(uri)
        self.data[key] = uri
        return key
