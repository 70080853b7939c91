#!/usr/bin/env python
"""Convert a dataset to images/ and the conversations jsonl; dataset.json is written last.

An entry of a datasets file, from what scripts/download.py fetched:
    python scripts/convert.py --datasets config/datasets.yaml --dataset ucf101 --source_dir results/data/ucf101/source \\
        --output_dir results/data/ucf101

Your own files, one split at a time (docs/how-to/convert-*.md describe the formats and docs/reference/metrics.md the
metrics):
    python scripts/convert.py --format table --input my.tsv --images_dir pictures --split train --output_dir my_data
    python scripts/convert.py --format imagefolder --input pictures/val --split val --output_dir my_data
    python scripts/convert.py --format table --input vqa.json --output_dir my_data \\
        --columns image=img_id question="What is shown?" answer="{title}: {price}"
"""

from __future__ import annotations

import argparse
import errno
import sys
from pathlib import Path

from phi3v.data.convert import convert_dataset, convert_files
from phi3v.data.formats import FORMATS
from phi3v.settings import METRICS, Dataset, OptionValue, check_choice, read_entries, run_script


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="the data folder")
    parser.add_argument(
        "--on-error",
        "--on_error",
        choices=["stop", "skip"],
        help="rows that cannot be converted (default: the entry's, else stop)",
    )
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="pictures and clips decoded at a time (default: 2)"
    )
    entry = parser.add_argument_group("an entry of a datasets file")
    entry.add_argument("--datasets", nargs="+", default=["config/datasets.yaml"], metavar="FILE", help="datasets files")
    entry.add_argument("--dataset", metavar="NAME", help="entry to convert")
    entry.add_argument("--source_dir", metavar="DIR", help="output folder of scripts/download.py")
    own = parser.add_argument_group("your own files")
    own.add_argument("--format", choices=list(FORMATS), help="what the files are")
    own.add_argument("--input", type=Path, metavar="PATH", help="table, json, archive, or folder")
    own.add_argument(
        "--images_dir", type=Path, metavar="DIR", help="where image paths of a table or json start (default: beside it)"
    )
    own.add_argument("--split", default="train", metavar="NAME", help="split to make (default: train)")
    own.add_argument("--name", default="", help="name of the dataset (default: the file's)")
    own.add_argument(
        "--turns", choices=["all", "draw", "first"], default="all", help="how several turns train (default: all)"
    )
    own.add_argument(
        "--metric", choices=METRICS, default="accuracy", metavar="NAME", help="score of an answer (default: accuracy)"
    )
    own.add_argument("--num_crops", type=int, metavar="N", help="largest number of tiles of an image (default: 16)")
    own.add_argument("--rows", default=":", metavar="A:B", help="rows taken, as a Python slice")
    own.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="WHAT=SOURCE",
        help="what the columns are: image=img_id, question='What is shown?', answer='{title}: {price}'; "
        "a WHAT given twice has several",
    )
    own.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="further option of the format")
    given = parser.parse_args()
    if bool(given.dataset) == bool(given.format):
        parser.error("expected --dataset NAME --source_dir DIR, or --format FORMAT --input PATH")
    if given.dataset and not given.source_dir:
        parser.error("--source_dir: missing; expected the output folder of scripts/download.py")
    if given.format and not given.input:
        parser.error("--input: missing; expected a file or folder")
    for flag in ("option", "columns"):
        if wrong := [value for value in getattr(given, flag) if "=" not in value]:
            parser.error(f"--{flag}: got {wrong[0]!r}; expected NAME=VALUE")
    return given


def options(given: argparse.Namespace) -> dict[str, OptionValue]:
    """The options of your own files, `columns` among them."""
    columns: dict[str, list[str]] = {}
    for pair in given.columns:
        name, _, source = pair.partition("=")
        columns.setdefault(name, []).append(source)
    named: dict[str, OptionValue] = dict(option.split("=", 1) for option in given.option)
    return named | ({"columns": dict(columns)} if columns else {})


def convert(given: argparse.Namespace) -> None:
    """An entry of a datasets file, or your own files."""
    if given.dataset:
        known = read_entries(given.datasets, Dataset, Path())
        check_choice("command line", "dataset", given.dataset, known)
        entry = known[given.dataset]
        convert_dataset(given.dataset, entry, given.source_dir, given.output_dir, given.on_error, given.workers)
        return
    convert_files(
        given.format,
        given.input,
        given.output_dir,
        given.split,
        given.images_dir,
        given.name,
        given.turns,
        given.metric,
        given.num_crops,
        given.rows,
        options(given),
        given.on_error or "stop",
        given.workers,
    )


def main() -> int:
    """Parse the command line and convert."""
    given = arguments()
    try:
        convert(given)
    except OSError as error:
        full = "; the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        print(f"error: {error}{full}; nothing of {given.output_dir} was changed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_script(main)
