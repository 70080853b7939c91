"""Tokens of every example of a split: counted once, by all cores, and kept beside the data.

What they depend on (the jsonl, which turns train, the tokenizer, the sizes of tiles and grids) is the name of the file
they are kept in, so a change of any of it counts anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from phi3v.data.processes import process_pool
from phi3v.data.statistics import counted
from phi3v.provenance.manifest import digest_file

if TYPE_CHECKING:
    from phi3v.data.loading import ConversationDataset

FOLDER = ".lengths"
"""In the data folder: what was counted before."""

PART = 4096
"""Examples that a process counts at a time; fewer than two parts are not worth starting processes for."""

VERSION = 1
"""Raised when the same data and tokenizer count differently."""


def lengths(dataset: ConversationDataset, processes: int | None = None) -> list[int]:
    """Tokens of every example; where a turn is drawn, those of the longest, so that a budget holds in every epoch.

    processes: how many count (default: one a core this process may use). Raises DataError for what cannot be read.
    """
    processes = processes or len(os.sched_getaffinity(0))
    # Pictures of a folder made by hand may change while the jsonl stays; the converter's do not.
    if "source" not in dataset.description:
        return count(dataset, processes).tolist()
    folder = dataset.data_dir / FOLDER
    file = folder / f"{dataset.lines.path.stem}-{_key(dataset)}.npy"
    with _alone(folder):
        found = _read(file, len(dataset))
        if found is None:
            found = count(dataset, processes)
            _write(file, found)
    return found.tolist()


def count(dataset: ConversationDataset, processes: int = 1) -> np.ndarray:
    """[examples] int32 tokens of each example, counted now. Raises DataError."""
    parts = [(start, min(start + PART, len(dataset))) for start in range(0, len(dataset), PART)]
    if processes == 1 or len(parts) < 2:
        return np.concatenate([_count_part(dataset, part) for part in parts])
    # The tokenizer's own threads would not survive the fork, and these processes are enough.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with process_pool(min(processes, len(parts)), _keep, dataset) as pool:
            return np.concatenate(list(pool.map(_count_kept, parts)))
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


_KEPT: list[ConversationDataset] = []
"""Of a counting process: its dataset, inherited and not sent."""


def _keep(dataset: ConversationDataset) -> None:
    _KEPT[:] = [dataset]


def _count_kept(part: tuple[int, int]) -> np.ndarray:
    return _count_part(_KEPT[0], part)


def _count_part(dataset: ConversationDataset, part: tuple[int, int]) -> np.ndarray:
    choose = max if dataset.turns == "draw" else sum
    return np.array([choose(turn.total for turn in own) for own in counted(dataset, *part)], np.int32)


def _key(dataset: ConversationDataset) -> str:
    images = dataset.processor.image_processor
    facts = [
        VERSION,
        digest_file(dataset.lines.path),
        dataset.description["source"],
        dataset.turns,
        hashlib.sha256(dataset.processor.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        # A tile's tokens and the grid's limits decide what a picture of a size counts.
        dataset.num_crops,
        [images.tokens_of_picture(*size) for size in ((1000, 1000), (3000, 1000), (10, 500))],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Processes of a job come here together: one counts, the others wait and read. Where the folder cannot be written
    or locked, every process counts."""
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(exist_ok=True)
            lock = stack.enter_context(open(folder / "lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            print(f"{folder}: {error}: every process counts the lengths for itself", file=sys.stderr)
        yield


def _read(file: Path, examples: int) -> np.ndarray | None:
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (examples,) and found.dtype == np.int32 else None


def _write(file: Path, values: np.ndarray) -> None:
    """A file that appears whole or, on a full or read-only disk, not at all: it only saves time."""
    part = ""
    try:
        handle, part = tempfile.mkstemp(dir=file.parent, suffix=".part")
        with os.fdopen(handle, "wb") as out:
            np.save(out, values)
        os.chmod(part, 0o644)
        os.replace(part, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(part)
