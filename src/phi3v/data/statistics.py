"""Statistics of a data folder: examples, pictures, tokens, tiles and answer lengths of each split, and a small plot.

Tokens are counted from texts and picture headers alone, exactly as loading would make them, without decoding a picture.
The recipe's mean length of DocVQA is phi3v.planning.fits.MEAN_TOKENS.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi3v.data.conversations import Turn, answer_text, prompt_text
from phi3v.planning.geometry import num_image_tokens, tile_layout
from phi3v.provenance.manifest import write_json

if TYPE_CHECKING:
    from phi3v.data.loading import ConversationDataset

_TAG = re.compile(r"<\|image_\d+\|>")

CHUNK = 256
"""Examples tokenised together."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of one turn."""

    text: int
    """Of the prompt, beginnings of sequence included."""
    image: int
    answer: int
    """Label tokens, end marks included."""
    tiles: int
    """Tiles of its pictures, the global views included."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.text + self.image + self.answer


def count_turns(processor: Any, turns: Sequence[Turn], sizes: Sequence[Sequence[tuple[int, int]]]) -> list[Counts]:
    """Tokens of each turn as a conversation's first; sizes: (width, height) of each turn's pictures."""
    texts: list[str] = []
    for turn in turns:
        texts += [*_TAG.split(prompt_text(turn)), answer_text(turn)]
    # Prompts begin alike and answers repeat: each text is tokenised once. The backend leaves out what only counts need.
    unique = list(dict.fromkeys(texts))
    encodings = processor.tokenizer.backend_tokenizer.encode_batch_fast(unique)
    length_of = dict(zip(unique, map(len, encodings), strict=True))
    bos = len(processor.tokenizer("")["input_ids"])
    images = processor.image_processor
    counts, place = [], 0
    for turn, own in zip(turns, sizes, strict=True):
        pieces = len(turn.images) + 1
        prompt = sum(length_of[text] for text in texts[place : place + pieces])
        answer = length_of[texts[place + pieces]] - bos
        place += pieces + 1
        grids = [tile_layout(width, height, images.num_crops, images.tile_size)[2:] for width, height in own]
        image = sum(num_image_tokens(*grid, images.tile_grid) for grid in grids)
        counts.append(Counts(prompt, image, answer, sum(down * across + 1 for down, across in grids)))
    return counts


def counted(dataset: ConversationDataset, start: int = 0, stop: int | None = None) -> Iterator[list[Counts]]:
    """Counts of the turns of examples start … stop-1, in order; with `draw` each turn that could be drawn, pictures and
    all."""
    bos = len(dataset.processor.tokenizer("")["input_ids"])
    stop = len(dataset) if stop is None else stop
    for first in range(start, stop, CHUNK):
        turns: list[Turn] = []
        sizes: list[list[tuple[int, int]]] = []
        groups: list[int] = []
        for index in range(first, min(first + CHUNK, stop)):
            conversation = dataset.conversation(index)
            where = f"{dataset.lines.path}:{index + 1}"
            choices = conversation.turns[:1] if dataset.turns == "first" else conversation.turns
            drawn = dataset.turns == "draw" and len(conversation.turns) > 1
            if drawn:
                choices = tuple(Turn(conversation.images, t.user, t.assistant, t.answers) for t in choices)
            paths = {path for turn in choices for path in turn.images}
            known = {path: dataset.pictures.size(path, where) for path in paths}
            turns += choices
            sizes += [[known[path] for path in turn.images] for turn in choices]
            groups.append(len(choices))
        counts = count_turns(dataset.processor, turns, sizes)
        place = 0
        for group in groups:
            own = counts[place : place + group]
            place += group
            if dataset.turns == "all":
                # Later turns go on without a beginning of sequence in front.
                own = own[:1] + [Counts(c.text - bos, c.image, c.answer, c.tiles) for c in own[1:]]
            yield own


def _summary(values: Sequence[float]) -> dict[str, float]:
    array = np.asarray(values, np.float64)
    return {
        "mean": round(float(array.mean()), 2),
        "median": float(np.median(array)),
        "p95": float(np.percentile(array, 95)),
        "max": float(array.max()),
    }


def split_statistics(dataset: ConversationDataset) -> dict[str, Any]:
    """Statistics of a split. Where one turn of several is drawn, tokens are the mean over the turns."""
    tokens, answers, tiles, images, turns, text_only = [], [], [], 0, 0, 0
    for own in counted(dataset):
        weight = len(own) if dataset.turns == "draw" else 1
        tokens.append(sum(count.total for count in own) / weight)
        tiles.append(sum(count.tiles for count in own) / weight)
        answers += [count.answer for count in own]
        turns += len(own)
        text_only += tiles[-1] == 0
    for index in range(len(dataset)):
        images += len(dataset.conversation(index).images)
    edges = np.histogram_bin_edges(tokens, bins=24)
    return {
        "examples": len(dataset),
        "turns": turns,
        "images": images,
        "text_only": int(text_only),
        "num_crops": dataset.num_crops,
        "tokens": _summary(tokens),
        "answer_tokens": _summary(answers),
        "tiles": _summary(tiles),
        "histogram": {
            "edges": [round(float(edge), 1) for edge in edges],
            "counts": np.histogram(tokens, edges)[0].tolist(),
        },
    }


def padding_share(token_lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of padding in right-padded batches of examples (indices into token_lengths)."""
    real = sum(token_lengths[index] for batch in batches for index in batch)
    padded = sum(len(batch) * max(token_lengths[index] for index in batch) for batch in batches if batch)
    return 1 - real / padded


def plot(statistics: dict[str, Any]) -> str:
    """Histograms of tokens, a split beside the other, as SVG."""
    parts: list[str] = []
    left = 0
    for split, values in statistics.items():
        counts, edges = values["histogram"]["counts"], values["histogram"]["edges"]
        parts.append(
            f'<g transform="translate({left},0)"><text x="10" y="16">{escape(split)}: {values["examples"]} examples</text>'
        )
        parts.append(f'<text x="10" y="32" fill="#555">{values["tokens"]["mean"]:g} tokens on average</text>')
        for place, count in enumerate(counts):
            height = 100 * count / max(counts)
            parts.append(
                f'<rect x="{10 + 10 * place}" y="{145 - height:.1f}" width="9" height="{height:.1f}" fill="#3b6ea5"/>'
            )
        parts.append(
            f'<text x="10" y="162">{edges[0]:g}</text><text x="250" y="162" text-anchor="end">{edges[-1]:g}</text></g>'
        )
        left += 270
    body = "".join(parts)
    style = 'height="170" font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{left}" {style}>{body}</svg>\n'


def write_statistics(data_dir: str | Path, processor: Any, num_crops: int | None = None) -> str:
    """statistics.json and statistics.svg of a data folder, counted with a model's processor; returns a line a split."""
    from phi3v.data.loading import ConversationDataset
    from phi3v.data.validation import splits_of

    statistics = {}
    for split in splits_of(Path(data_dir)):
        statistics[split] = split_statistics(ConversationDataset(data_dir, split, processor, num_crops))
    write_json(Path(data_dir) / "statistics.json", statistics, indent=2)
    (Path(data_dir) / "statistics.svg").write_text(plot(statistics), encoding="utf-8")
    return "\n".join(
        f"{split}: {values['examples']} examples, {values['tokens']['mean']} tokens on average, "
        f"{values['tokens']['max']:g} at "
        f"most, {values['tiles']['mean']} tiles, {values['answer_tokens']['mean']} answer tokens"
        for split, values in statistics.items()
    )
