"""Examples of the documentation, which the tests run as they stand but for names of files and ports."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
SERVING = DOCS / "how-to" / "serve.md"
BENCHMARKS = DOCS / "how-to" / "public-benchmarks.md"


def example(page: Path, part: str, changes: dict[str, str]) -> str:
    """The page's one block of code that contains `part`, with other values in place of those that `changes` names."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if part in block)
    for old, new in changes.items():
        assert old in block, f"{page}: {part}: no {old}"
        block = block.replace(old, new)
    return str(block)
