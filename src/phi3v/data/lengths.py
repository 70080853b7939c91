"""Tokens and tiles of a data folder's examples: lengths for batches, and statistics with a plot.

Tokens are counted from texts and picture headers, without decoding pictures, and equal those of loaded examples. The
recipe's mean length of DocVQA is phi3v.planning.fits.MEAN_TOKENS.

All cores count the lengths once and store them in the data folder. The file name is a digest of their inputs (the JSONL
file, which turns train, the tokenizer, tile and grid sizes), so a change of any input counts again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from phi3v.data.conversations import DataError, Turn, answer_text, prompt_text
from phi3v.data.folder import LENGTHS, splits_of
from phi3v.data.processes import process_pool
from phi3v.data.split import SplitRecords, TokenCounter
from phi3v.planning.geometry import num_image_tokens, tile_layout
from phi3v.provenance.manifest import digest_file, write_atomically, write_json
from phi3v.settings import number_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import ProcessorMixin

PART = 4096
"""Examples that a process counts at a time. Fewer than two parts are counted without starting processes."""

VERSION = 2
"""Version of the counts. Raise it if the counts change for the same data and tokenizer."""

CHUNK = 256
"""Examples per tokenizer call."""

_TAG = re.compile(r"<\|image_\d+\|>")


class SplitStatistics(TypedDict):
    """Entry of a split in statistics.json. Summaries have mean, median, p95 and max. The histogram counts tokens."""

    examples: int
    turns: int
    images: int
    text_only: int
    num_crops: int
    tokens: dict[str, float]
    answer_tokens: dict[str, float]
    tiles: dict[str, float]
    longest: dict[str, int]
    """Tokens, tiles and label tokens of the longest example, or of the longest turn if one is drawn."""
    histogram: dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Counts:
    """Token counts of one turn."""

    text: int
    """Tokens of the prompt, beginning-of-sequence tokens included."""
    image: int
    answer: int
    """Label tokens, end marks included."""
    tiles: int
    """Tiles of its pictures, global views included."""
    pictures: int
    shrunk: int
    """Pictures that are scaled to less than half their width."""

    @property
    def total(self) -> int:
        """All tokens of the turn."""
        return self.text + self.image + self.answer


def _plain(processor: ProcessorMixin | TokenCounter) -> Tokenizer:
    """The tokenizer without truncation and padding, which its file or an earlier call may have turned on."""
    tokenizer: Tokenizer = processor.tokenizer.backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def count_turns(
    processor: ProcessorMixin | TokenCounter, turns: Sequence[Turn], sizes: Sequence[Sequence[tuple[int, int]]]
) -> list[Counts]:
    """Token counts of each turn as the first of a conversation. sizes: (width, height) of each turn's pictures."""
    texts: list[str] = []
    for turn in turns:
        texts += [*_TAG.split(prompt_text(turn)), answer_text(turn)]
    # Prompts start alike and answers repeat, so each text is tokenised once. encode_batch_fast omits offsets.
    unique = list(dict.fromkeys(texts))
    tokenizer = _plain(processor)
    length_of = dict(zip(unique, map(len, tokenizer.encode_batch_fast(unique)), strict=True))
    bos = len(tokenizer.encode("").ids)
    images = processor.image_processor
    counts, place = [], 0
    for turn, own in zip(turns, sizes, strict=True):
        pieces = len(turn.images) + 1
        prompt = sum(length_of[text] for text in texts[place : place + pieces])
        answer = length_of[texts[place + pieces]] - bos
        place += pieces + 1
        layouts = [tile_layout(*size, images.num_crops, images.tile_size) for size in own]
        image = sum(num_image_tokens(*layout[2:], images.tile_grid) for layout in layouts)
        tiles = sum(layout.tiles_down * layout.tiles_across + 1 for layout in layouts)
        shrunk = sum(2 * max(layout[:2]) < max(size) for layout, size in zip(layouts, own, strict=True))
        counts.append(Counts(prompt, image, answer, tiles, len(own), shrunk))
    return counts


def counted(dataset: SplitRecords, start: int = 0, stop: int | None = None) -> Iterator[list[Counts]]:
    """Counts of the turns that can train, of examples start … stop-1 in order. Raises DataError."""
    bos = len(_plain(dataset.processor).encode("").ids)
    tile_size = dataset.processor.image_processor.tile_size
    stop = len(dataset) if stop is None else stop
    for first in range(start, stop, CHUNK):
        groups = [dataset.choices(dataset.conversation(index)) for index in range(first, min(first + CHUNK, stop))]
        sizes: list[list[tuple[int, int]]] = []
        for index, turns in enumerate(groups, first):
            paths = {path for turn in turns for path in turn.images}
            size_of = {path: dataset.pictures.size(path, f"{dataset.lines.path}:{index + 1}") for path in paths}
            for path, size in size_of.items():
                layout = tile_layout(*size, dataset.num_crops, tile_size)
                if not min(layout.width, layout.height):
                    raise DataError(
                        f"{dataset.lines.path}:{index + 1}: image {path!r}: {size[0]} x {size[1]} pixels; expected a "
                        f"picture that keeps a pixel in {dataset.num_crops} tiles of {tile_size} pixels"
                    )
            sizes += [[size_of[path] for path in turn.images] for turn in turns]
        counts = iter(count_turns(dataset.processor, [turn for turns in groups for turn in turns], sizes))
        for turns in groups:
            own = list(islice(counts, len(turns)))
            if dataset.turns == "all":
                # Later turns do not start with a beginning-of-sequence token.
                own[1:] = [replace(count, text=count.text - bos) for count in own[1:]]
            yield own


def lengths(dataset: SplitRecords, processes: int | None = None) -> list[int]:
    """Tokens of every example. If a turn is drawn, those of the longest turn, so that a limit holds in every epoch.

    processes: number of counting processes (default: one per available core). Raises DataError for unreadable data.
    """
    return counts(dataset, processes)[:, 0].tolist()


def counts(dataset: SplitRecords, processes: int | None = None) -> np.ndarray:
    """[examples, 5] int32: tokens, tokens of the longest answer, turns, pictures and shrunk pictures of each example.

    If a turn is drawn, tokens and pictures are the largest possible. Raises DataError for unreadable data.
    """
    processes = processes or len(os.sched_getaffinity(0))
    # Pictures of a folder made by hand can change without its JSONL file, so their counts are not stored.
    if "source" not in dataset.description:
        # Every process of a job counts for itself, so the processes of a machine share its cores.
        return count(dataset, max(1, processes // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    folder = dataset.data_dir / LENGTHS
    file = folder / f"{dataset.lines.path.stem}-{_key(dataset)}.npy"
    with _alone(folder):
        found = _read(file, len(dataset))
        if found is None:
            found = count(dataset, processes)
            content = io.BytesIO()
            np.save(content, found)
            with contextlib.suppress(OSError):  # on a full or read-only disk, skip the file, which only saves time
                write_atomically(file, content.getvalue())
    return found


def summary_lines(
    dataset: SplitRecords,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    found: np.ndarray | None = None,
) -> list[str]:
    """Facts of a split that users should check before training, one per line.

    max_length: examples with more tokens are skipped. max_new_tokens: limit of an answer in evaluation (default: the
    data folder's). found: result of `counts`, if available. Raises DataError for unreadable data.
    """
    tokens, answers, turns, pictures, shrunk = (counts(dataset) if found is None else found).T
    longest, wordiest, name = int(tokens.argmax()), int(answers.argmax()), dataset.lines.path
    lines = [
        f"{name}: {number_of(len(tokens), 'example')}, {number_of(turns.sum(), 'turn')}, "
        f"{number_of(pictures.sum(), 'picture')}, {number_of((pictures == 0).sum(), 'example')} without a picture",
        f"{name}: tokens per example: median {int(np.median(tokens)):,}, maximum {tokens[longest]:,} (line "
        f"{longest + 1})",
    ]
    if few := int(shrunk.sum()):
        lines.append(
            f"warning: {name}: {few:,} of {pictures.sum():,} pictures are scaled to less than half their width; "
            f"increase num_crops (now {dataset.num_crops}) to keep more detail (first such picture: line "
            f"{int(shrunk.argmax()) + 1})"
        )
    if max_length is not None and (many := int((tokens > max_length).sum())):
        lines.append(f"warning: {name}: {many:,} examples with more than max_length {max_length:,} tokens are skipped")
    limit = max_new_tokens or dataset.description.get("max_new_tokens")
    if limit and (cut := int((answers > limit).sum())):
        lines.append(
            f"warning: {name}: {cut:,} examples have answers with more than max_new_tokens {limit:,} tokens, at most "
            f"{answers[wordiest]:,} (line {wordiest + 1}); evaluation will cut such answers off"
        )
    return lines


def count(dataset: SplitRecords, processes: int = 1) -> np.ndarray:
    """Computes the result of `counts`. Raises DataError."""
    parts = [(start, min(start + PART, len(dataset))) for start in range(0, len(dataset), PART)]
    if processes == 1 or len(parts) < 2:
        return np.concatenate([_count_part(part, dataset) for part in parts])
    # The tokenizer's threads do not survive a fork, and these processes already use all cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with process_pool(min(processes, len(parts)), _keep, dataset) as pool:
        return np.concatenate(list(pool.map(_count_part, parts)))


_KEPT: list[SplitRecords] = []
"""Dataset of a counting process. It is inherited by fork, not sent."""


def _keep(dataset: SplitRecords) -> None:
    _KEPT[:] = [dataset]


def _count_part(part: tuple[int, int], dataset: SplitRecords | None = None) -> np.ndarray:
    dataset = dataset or _KEPT[0]
    choose = max if dataset.turns == "draw" else sum
    rows = []
    for own in counted(dataset, *part):
        total, pictures, shrunk = (
            choose(facts) for facts in zip(*((t.total, t.pictures, t.shrunk) for t in own), strict=True)
        )
        rows.append((total, max(turn.answer for turn in own), len(own), pictures, shrunk))
    return np.array(rows, np.int32)


def _key(dataset: SplitRecords) -> str:
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
    """Lock for the processes of a job: one counts, the others wait and then read the result.
    If the folder cannot be written or locked, every process counts."""
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(exist_ok=True)
            lock = stack.enter_context(open(folder / "lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            print(f"{folder}: {error}; every process of the job counts the lengths itself", file=sys.stderr)
        yield


def _read(file: Path, examples: int) -> np.ndarray | None:
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (examples, 5) and found.dtype == np.int32 else None


def _summary(values: Sequence[float]) -> dict[str, float]:
    array = np.asarray(values, np.float64)
    return {
        "mean": round(float(array.mean()), 2),
        "median": float(np.median(array)),
        "p95": float(np.percentile(array, 95)),
        "max": float(array.max()),
    }


def split_statistics(dataset: SplitRecords) -> SplitStatistics:
    """Statistics of a split. If one turn of several is drawn, tokens are the mean over the turns."""
    tokens, answers, tiles = [], [], []
    longest = {"tokens": 0, "tiles": 0, "labels": 0}
    for own in counted(dataset):
        for turns in [[turn] for turn in own] if dataset.turns == "draw" else [own]:
            sums = [(turn.total, turn.tiles, turn.answer) for turn in turns]
            example = dict(zip(longest, map(sum, zip(*sums, strict=True)), strict=True))
            longest = max(longest, example, key=lambda item: item["tokens"])
        weight = len(own) if dataset.turns == "draw" else 1
        tokens.append(sum(count.total for count in own) / weight)
        tiles.append(sum(count.tiles for count in own) / weight)
        answers += [count.answer for count in own]
    heights, edges = np.histogram(tokens, bins=24)
    return {
        "examples": len(dataset),
        "turns": len(answers),
        "images": sum(len(dataset.conversation(index).images) for index in range(len(dataset))),
        "text_only": tiles.count(0),
        "num_crops": dataset.num_crops,
        "tokens": _summary(tokens),
        "answer_tokens": _summary(answers),
        "tiles": _summary(tiles),
        "longest": longest,
        "histogram": {"edges": [round(float(edge), 1) for edge in edges], "counts": heights.tolist()},
    }


def plot(statistics: dict[str, SplitStatistics]) -> str:
    """Histograms of tokens, the splits side by side, as SVG."""
    parts: list[str] = []
    for place, (split, values) in enumerate(statistics.items()):
        counts, edges = values["histogram"]["counts"], values["histogram"]["edges"]
        heights = [100 * count / max(counts) for count in counts]
        bars = (
            f'<rect x="{10 + 10 * at}" y="{145 - height:.1f}" width="9" height="{height:.1f}" fill="#3b6ea5"/>'
            for at, height in enumerate(heights)
        )
        parts.append(
            f'<g transform="translate({270 * place},0)">'
            f'<text x="10" y="16">{escape(split)}: {values["examples"]} examples</text>'
            f'<text x="10" y="32" fill="#555">{values["tokens"]["mean"]:g} tokens on average</text>{"".join(bars)}'
            f'<text x="10" y="162">{edges[0]:g}</text><text x="250" y="162" text-anchor="end">{edges[-1]:g}</text></g>'
        )
    size = f'width="{270 * len(parts)}" height="170" font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>\n'


def write_statistics(
    data_dir: str | Path, processor: ProcessorMixin | TokenCounter, num_crops: int | None = None
) -> list[str]:
    """statistics.json and statistics.svg of a data folder, counted with a model's processor; returns summary_lines."""
    datasets = {split: SplitRecords(data_dir, split, processor, num_crops) for split in splits_of(Path(data_dir))}
    statistics = {split: split_statistics(dataset) for split, dataset in datasets.items()}
    write_json(Path(data_dir) / "statistics.json", statistics, indent=2)
    (Path(data_dir) / "statistics.svg").write_text(plot(statistics), encoding="utf-8")
    return [line for dataset in datasets.values() for line in summary_lines(dataset)]
