"""How much work an example of a dataset is: pictures and their tiles, tokens, and how many examples there are.

A datasets entry says it (field `workload`); counts come from the converted folder where there is one. An entry without
the field counts as pictures of the largest grid an example, once it is converted.
"""

from __future__ import annotations

import json
from pathlib import Path

from phi3v.planning.flops import Work, example_work
from phi3v.planning.geometry import num_image_tokens, tile_grid, tile_layout
from phi3v.settings import Dataset, Geometry, SettingsError, Workload, dataset_key

# What a dataset without `workload` is taken for, per example: square pictures fill the largest grid there is.
UNKNOWN = {"shapes": [(1000, 1000, 1.0)], "text": 100, "labels": 12, "picture_bytes": 3e5}


def workload(name: str, dataset: Dataset, root: Path = Path()) -> Workload:
    """The workload of a datasets entry; counts come from its converted folder where there is one.

    root: repository root, where results/ is. Raises SettingsError for an entry that says nothing and is not converted.
    """
    file = root / "results" / "data" / dataset_key(name, dataset) / "dataset.json"
    if not file.is_file():
        if dataset.workload is None:
            raise SettingsError(
                f"dataset `{name}`: field `workload`: empty, and not converted yet ({file} is missing); expected the "
                "field in the datasets file, or `snakemake -c2 data` first"
            )
        return dataset.workload
    splits = json.loads(file.read_text(encoding="utf-8"))["splits"]
    counts = {"train": splits.get("train", {}).get("examples", 0), "evaluation": splits["val"]["examples"]}
    if dataset.workload is not None:
        return dataset.workload.model_copy(update=counts)
    fullest = splits["train" if counts["train"] else "val"]
    pictures = round(fullest.get("images", 0) / max(1, fullest["examples"]))
    return Workload(**counts, **UNKNOWN, pictures=pictures, source=f"{file}; largest grid assumed")


def mean_and_longest(load: Workload, geometry: Geometry, num_crops: int) -> tuple[Work, Work]:
    """Work of a mean training example, and of the longest that its pictures' shapes make."""
    mean, longest = Work(), Work()
    for width, height, share in load.shapes:
        _, _, down, across = tile_layout(width, height, num_crops, geometry.vision.image_size)
        tokens = load.pictures * num_image_tokens(down, across, tile_grid(geometry.vision)) + load.text
        work = example_work(geometry, tokens, load.pictures * (down * across + 1), load.labels)
        mean = mean + work.scaled(share)
        longest = max(longest, work, key=lambda item: item.tokens)
    return mean, longest
