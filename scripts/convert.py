#!/usr/bin/env python
"""Convert a dataset to images/ and one JSONL file of conversations per split. Writes dataset.json last.

An entry of a datasets file, from the files that scripts/download.py fetched:
    python scripts/convert.py --datasets config/datasets.yaml --dataset ucf101 \\
        --source_dir results/data/ucf101/source --output_dir results/data/ucf101

Your own files, one split at a time (docs/how-to/convert-*.md describe the formats and docs/reference/metrics.md the
metrics):
    python scripts/convert.py --format table --input my.tsv --images_dir pictures --split train --output_dir my_data
    python scripts/convert.py --format imagefolder --input pictures/val --split val --output_dir my_data
    python scripts/convert.py --format table --input vqa.json --output_dir my_data \\
        --columns image=img_id question="What is this?" answer="{title}: {price}"
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
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="data folder to write")
    parser.add_argument(
        "--on-error",
        "--on_error",
        choices=["stop", "skip"],
        help="what to do with rows that cannot be converted (default: the entry's setting, else stop)",
    )
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="pictures and clips to decode in parallel (default: 2)"
    )
    entry = parser.add_argument_group("an entry of a datasets file")
    entry.add_argument("--datasets", nargs="+", default=["config/datasets.yaml"], metavar="FILE", help="datasets files")
    entry.add_argument("--dataset", metavar="NAME", help="entry to convert")
    entry.add_argument("--source_dir", metavar="DIR", help="output folder of scripts/download.py")
    own = parser.add_argument_group("your own files")
    own.add_argument("--format", choices=list(FORMATS), help="format of the files")
    own.add_argument("--input", type=Path, metavar="PATH", help="table, JSON file, archive, or folder")
    own.add_argument(
        "--images_dir",
        type=Path,
        metavar="DIR",
        help="folder that picture paths are relative to (default: the folder of --input)",
    )
    own.add_argument("--split", default="train", metavar="NAME", help="split to write (default: train)")
    own.add_argument("--name", default="", help="name of the dataset (default: the name of --input)")
    own.add_argument(
        "--turns", choices=["all", "draw", "first"], default="all", help="which turns of a row train (default: all)"
    )
    own.add_argument(
        "--metric", choices=METRICS, default="accuracy", metavar="NAME", help="metric of an answer (default: accuracy)"
    )
    own.add_argument("--num_crops", type=int, metavar="N", help="largest number of tiles per picture (default: 16)")
    own.add_argument("--rows", default=":", metavar="A:B", help="rows to convert, as a Python slice (default: all)")
    own.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="ROLE=SOURCE",
        help="role of the columns: image=img_id, question='What is this?', answer='{title}: {price}'; "
        "repeat a ROLE to give it several columns",
    )
    own.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="another option of the format")
    given = parser.parse_args()
    if bool(given.dataset) == bool(given.format):
        parser.error("expected --dataset NAME --source_dir DIR, or --format FORMAT --input PATH")
    if given.dataset and not given.source_dir:
        parser.error("--source_dir: missing; expected --source_dir DIR, the output folder of scripts/download.py")
    if given.format and not given.input:
        parser.error("--input: missing; expected --input PATH, a file or folder")
    for flag in ("option", "columns"):
        if wrong := [value for value in getattr(given, flag) if "=" not in value]:
            parser.error(f"--{flag}: got {wrong[0]!r}; expected NAME=VALUE")
    return given


def options(given: argparse.Namespace) -> dict[str, OptionValue]:
    """The format options for your own files, including `columns`."""
    columns: dict[str, list[str]] = {}
    for pair in given.columns:
        name, _, source = pair.partition("=")
        columns.setdefault(name, []).append(source)
    named: dict[str, OptionValue] = dict(option.split("=", 1) for option in given.option)
    return named | ({"columns": dict(columns)} if columns else {})


def convert(given: argparse.Namespace) -> None:
    """Converts an entry of a datasets file, or your own files."""
    if given.dataset:
        entries = read_entries(given.datasets, Dataset, Path())
        check_choice("command line", "dataset", given.dataset, entries)
        entry = entries[given.dataset]
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
    """Parses the command line and converts."""
    given = arguments()
    try:
        convert(given)
    except OSError as error:
        full = "; the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        print(f"error: {error}{full}; {given.output_dir} is unchanged", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_script(main)
