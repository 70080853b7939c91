#!/usr/bin/env python
"""Check a data folder before training. Prints each problem as file:line: field, and exits with 1 if there is any.

python scripts/validate.py results/data/docvqa
python scripts/validate.py my_data --level paths        # do not decode the pictures
python scripts/validate.py my_data --model MODEL_DIR    # also count tokens and tiles: statistics.json, .svg
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from phi3v.data.check import validate_folder
from phi3v.settings import heavy_imports, number_of, run_script


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, metavar="DIR", help="folder with images/ and one JSONL file per split")
    parser.add_argument(
        "--level",
        choices=["shape", "paths", "images"],
        default="images",
        help="shape: check lines and ids; paths: also picture paths; images: also decode pictures and search for leaks "
        "(default)",
    )
    parser.add_argument(
        "--allow-leaks", "--allow_leaks", action="store_true", help="count pictures shared by splits, but accept them"
    )
    parser.add_argument("--model", metavar="DIR", help="checkpoint folder; count tokens and tiles with its tokenizer")
    parser.add_argument(
        "--num_crops", type=int, metavar="N", help="largest number of tiles per picture (default: the data folder's)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="pictures to decode in parallel (default: number of CPUs)",
    )
    return parser.parse_args()


def main() -> int:
    """Parses the command line and prints the problems."""
    given = arguments()
    counter = None
    if given.model:
        with heavy_imports():
            from phi3v.data.lengths import TokenCounter, write_statistics

        counter = TokenCounter.of(given.model)
    tile_size = counter.image_processor.tile_size if counter else 336
    checks, problems, shared = validate_folder(given.data_dir, given.level, given.workers, tile_size)
    if given.allow_leaks:
        problems.forget("leak: ")
    for line in problems.lines():
        print(line)
    for split, found in checks.items():
        pictures = f", {number_of(len(found.pictures), 'picture')}" if given.level != "shape" else ""
        print(f"{split}: {number_of(found.examples, 'example')}{pictures}", file=sys.stderr)
    for pair, count in shared.items():
        print(f"{pair}: {number_of(count, 'picture')} in common", file=sys.stderr)
    print(
        f"{given.data_dir}: {number_of(problems.total, 'problem') if problems.total else 'no problems'}",
        file=sys.stderr,
    )
    if counter and not problems.total:
        print(*write_statistics(given.data_dir, counter, given.num_crops), sep="\n", file=sys.stderr)
    return 1 if problems.total else 0


if __name__ == "__main__":
    run_script(main)
