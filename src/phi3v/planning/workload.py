"""How much work an example of a dataset is: pictures and their tiles, tokens, and how many examples there are.

Counts of the recipe's datasets are its own; shapes of pictures and lengths of texts are estimates, except DocVQA's mean
of 2443.23 tokens at num_crops 16, which the recipe gives. A dataset that is not listed counts as one picture of the
largest grid an example, and its examples are read from its converted folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from phi3v.planning.flops import Work, example_work
from phi3v.planning.geometry import picture_grid, picture_tokens
from phi3v.settings import Dataset, Geometry, SettingsError, dataset_key


@dataclass(frozen=True)
class Workload:
    """A dataset as the planner sees it."""

    train: int
    """Training examples."""
    evaluation: int
    """Examples of the evaluation split."""
    pictures: int
    """Pictures of an example."""
    shapes: tuple[tuple[int, int, float], ...]
    """(width, height, share) of the pictures."""
    text: int
    """Text tokens of an example, template included."""
    labels: int
    """Answer tokens."""
    picture_bytes: float
    """Of one stored picture."""
    source: str


# A page is about 1700 x 2200; with 18 % of narrower ones the mean is the recipe's 2443 tokens.
_PAGES = ((1700, 2200, 0.82), (1600, 2300, 0.18))
WORKLOADS = {
    "docvqa": Workload(10_189, 200, 1, _PAGES, 38, 12, 6e5, "RECIPE counts and mean length; shapes chosen to meet it"),
    "docvqa_mini": Workload(1_000, 200, 1, _PAGES, 38, 12, 6e5, "RECIPE counts; lengths as docvqa"),
    "hateful_memes": Workload(8_000, 500, 1, ((800, 600, 1.0),), 70, 5, 1.5e5, "RECIPE counts; estimated lengths"),
    "nlvr2": Workload(49_926, 500, 2, ((1000, 750, 1.0),), 110, 8, 2e5, "RECIPE counts; estimated lengths"),
    "ucf101": Workload(300, 30, 8, ((320, 240, 1.0),), 120, 8, 3e4, "RECIPE counts (30 and 3 clips a class); lengths"),
}


def workload(name: str, dataset: Dataset, root: Path = Path()) -> Workload:
    """The workload of a datasets entry; counts come from its converted folder where there is one.

    root: repository root, where results/ is. Raises SettingsError for a dataset that is neither listed nor converted.
    """
    listed = WORKLOADS.get(name)
    file = root / "results" / "data" / dataset_key(name, dataset) / "dataset.json"
    counts = None
    if file.is_file():
        splits = json.loads(file.read_text(encoding="utf-8"))["splits"]
        counts = splits["train"]["examples"], splits["val"]["examples"]
        pictures = max(1, round(splits["train"].get("images", 0) / max(1, counts[0])))
    if listed is None and counts is None:
        raise SettingsError(
            f"dataset `{name}`: neither one of {', '.join(WORKLOADS)} nor converted ({file} is missing); expected "
            "`snakemake data` first"
        )
    if listed is None:
        assert counts is not None
        return Workload(*counts, pictures, ((1000, 1000, 1.0),), 100, 12, 3e5, f"{file}; largest grid assumed")
    if counts is None:
        return listed
    return Workload(
        *counts,
        listed.pictures,
        listed.shapes,
        listed.text,
        listed.labels,
        listed.picture_bytes,
        f"{file}; {listed.source}",
    )


def mean_and_longest(load: Workload, geometry: Geometry, num_crops: int) -> tuple[Work, Work]:
    """Work of a mean training example, and of the longest that its pictures' shapes make."""
    mean, longest = Work(), Work()
    for width, height, share in load.shapes:
        down, across = picture_grid(width, height, num_crops)
        tokens = load.pictures * picture_tokens(geometry, down, across) + load.text
        work = example_work(geometry, tokens, load.pictures * (down * across + 1), load.labels)
        mean = mean + work.scaled(share)
        longest = max(longest, work, key=lambda item: item.tokens)
    return mean, longest
