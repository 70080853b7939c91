"""Names of the converters: what `format` in a datasets file and `--format` on the command line may say."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from phi3v.data.converters_files import (
    docvqa_official,
    hateful_memes_official,
    image_folder,
    llava,
    nlvr2_official,
    table,
)
from phi3v.data.converters_parquet import cauldron, docvqa_mini
from phi3v.data.converters_video import ucf101
from phi3v.data.samples import Inputs, Rejection, Sample

FORMATS: dict[str, Callable[[Inputs], Iterator[Sample | Rejection]]] = {
    "cauldron": cauldron,
    "docvqa_mini": docvqa_mini,
    "ucf101": ucf101,
    "image_folder": image_folder,
    "table": table,
    "llava": llava,
    "nlvr2_official": nlvr2_official,
    "hateful_memes_official": hateful_memes_official,
    "docvqa_official": docvqa_official,
}
