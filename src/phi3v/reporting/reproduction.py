"""Same in, same out: digests of what a run must give again to the byte, and the first place where two runs part."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from phi3v.provenance.manifest import digest_file

# In the order of the workflow, so that the first difference is where it began. NAME is the run's name.
REPEATED = (
    "data/*/dataset.json", "data/*/*.jsonl", "demo-sources/random/*.safetensors", "demo-sources/base/final/*.safetensors",
    "demo-sources/base/final/tokenizer.json", "NAME/train/*/final/*.safetensors", "NAME/train/*/census.json",
    "NAME/evaluate/base/*/*/predictions.jsonl", "NAME/evaluate/*/*/predictions.jsonl", "NAME/evaluate/base/*/*/metrics.json",
    "NAME/evaluate/*/*/metrics.json", "NAME/report/accuracy.tsv",
)  # fmt: skip
# Kernels are chosen by these, the widest first, and sums come out in another order.
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def machine(processors: Path = Path("/proc/cpuinfo")) -> str:
    """What digests may depend on: the processor's maker and widest instructions (as torch's libraries choose kernels), and torch's build."""
    torch = metadata.version("torch")
    if not processors.is_file():
        return f"{platform.machine()}, torch {torch}"
    first = (line.partition(":") for line in processors.read_text().split("\n\n")[0].splitlines())
    facts = {name.strip(): value.strip() for name, _, value in first}
    has = set((facts.get("flags") or facts.get("Features") or "").split())
    widest = next((name for name in INSTRUCTIONS if name in has), platform.machine())
    return f"{facts.get('vendor_id', platform.machine())} {widest}, torch {torch}"


def digests(results: Path, name: str) -> dict[str, str]:
    """Path under results/ to sha256, of every file of run `name` that must repeat; a row's own folders and what all runs share."""
    found: dict[str, str] = {}
    for pattern in REPEATED:
        for path in sorted(results.glob(pattern.replace("NAME", name))):
            if path.is_file():
                found.setdefault(str(path.relative_to(results)), digest_file(path))
    return found


def first_difference(one: dict[str, str], other: dict[str, str]) -> str | None:
    """The first file, in the workflow's order, that differs or that one side lacks; None where all are equal."""
    for name in [*one, *(name for name in other if name not in one)]:
        if one.get(name) != other.get(name):
            return name
    return None


def explain(one: Path, other: Path) -> str:
    """Where two files part: the line, the tensor, or the byte. Both may be missing."""
    for path in (one, other):
        if not path.is_file():
            return f"{path} is not there"
    if one.suffix == ".safetensors":
        return _tensors(one, other)
    left, right = one.read_bytes().splitlines(), other.read_bytes().splitlines()
    for number, (first, second) in enumerate(zip(left, right, strict=False), 1):
        if first != second:
            pairs = enumerate(zip(first, second, strict=False))
            column = next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))
            return f"line {number}, byte {column + 1}: {_around(first, column)} in {one}, {_around(second, column)} in {other}"
    return f"{len(left)} lines in {one}, {len(right)} in {other}"


def _around(line: bytes, column: int) -> str:
    return repr(line[max(0, column - 30) : column + 30].decode(errors="replace"))


def _tensors(one: Path, other: Path) -> str:
    left, right = _header(one), _header(other)
    if left[0] != right[0]:
        names = sorted(set(left[0]) ^ set(right[0])) or [
            name for name in left[0] if left[0][name] != right[0].get(name)
        ]
        return f"headers differ, first at {names[0]!r}"
    with one.open("rb") as first, other.open("rb") as second:
        for name in sorted(set(left[0]) - {"__metadata__"}, key=lambda name: left[0][name]["data_offsets"]):
            start, end = left[0][name]["data_offsets"]
            first.seek(left[1] + start)
            second.seek(right[1] + start)
            if first.read(end - start) != second.read(end - start):
                return f"tensor {name!r} {left[0][name]['dtype']} {left[0][name]['shape']}"
    return "same tensors, other bytes beside them"


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header and where its data begins (https://github.com/huggingface/safetensors, Format)."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size
