"""Digests of the files that repeated runs must write with the same bytes, and the first difference between two runs."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

from phi3v.provenance.manifest import digest_file

# In the order of the workflow, so that the first difference shows where it started. NAME is the run's name.
REPEATED = (
    "data/*/dataset.json",
    "data/*/*.jsonl",
    "demo-sources/random/*.safetensors",
    "demo-sources/base/final/*.safetensors",
    "demo-sources/base/final/tokenizer.json",
    "NAME/train/*/final/*.safetensors",
    "NAME/train/*/census.json",
    "NAME/evaluate/base/*/*/predictions.jsonl",
    "NAME/evaluate/*/*/predictions.jsonl",
    "NAME/evaluate/base/*/*/metrics.json",
    "NAME/evaluate/*/*/metrics.json",
    "NAME/report/accuracy.tsv",
)
# The widest available set decides which kernels run, and so the order of summation.
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def machine(processors: Path = Path("/proc/cpuinfo")) -> str:
    """The parts of a machine that digests can depend on: processor vendor, widest instruction set, torch build."""
    torch = metadata.version("torch")
    if not processors.is_file():
        return f"{platform.machine()}, torch {torch}"
    first = (line.partition(":") for line in processors.read_text().split("\n\n")[0].splitlines())
    facts = {name.strip(): value.strip() for name, _, value in first}
    has = set((facts.get("flags") or facts.get("Features") or "").split())
    widest = next((name for name in INSTRUCTIONS if name in has), platform.machine())
    return f"{facts.get('vendor_id', platform.machine())} {widest}, torch {torch}"


def digests(results: Path, name: str) -> dict[str, str]:
    """Path under `results` to sha256, for each file of run `name` and of the shared folders that must repeat."""
    found: dict[str, str] = {}
    for pattern in REPEATED:
        for path in sorted(results.glob(pattern.replace("NAME", name))):
            if path.is_file():
                found.setdefault(str(path.relative_to(results)), digest_file(path))
    return found


def first_difference(one: dict[str, str], other: dict[str, str]) -> str | None:
    """The first file, in the order of the workflow, that differs or is missing on one side. None if all are equal."""
    for name in [*one, *(name for name in other if name not in one)]:
        if one.get(name) != other.get(name):
            return name
    return None


def explain(one: Path, other: Path) -> str:
    """The first difference between two files: a tensor, or a line and byte. A file may be missing."""
    for path in (one, other):
        if not path.is_file():
            return f"{path} does not exist"
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
    from safetensors import deserialize

    left, right = (dict(deserialize(path.read_bytes())) for path in (one, other))
    for name in sorted({*left, *right}):
        if left.get(name) != right.get(name):
            found = left.get(name) or right[name]
            return f"tensor {name!r} {found['dtype']} {found['shape']}"
    return "same tensors, other metadata"
