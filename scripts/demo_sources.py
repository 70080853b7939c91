#!/usr/bin/env python
"""Write the demo's source files: synthetic data in the formats of the hub's datasets.

python scripts/demo_sources.py --output_dir results/demo-sources
python scripts/demo_sources.py --output_dir sources --seed 1 --size docvqa_train=64 --size mixture_train=100
"""

from __future__ import annotations

import argparse

from phi3v.demo.sources import SIZES, make_sources, resolve_sizes
from phi3v.settings import run_script


def size(text: str) -> tuple[str, int]:
    """Parses NAME=ROWS."""
    name, _, number = text.partition("=")
    try:
        resolve_sizes({name: int(number)})
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}; expected NAME=ROWS") from None
    return name, int(number)


def main() -> int:
    """Parses the command line and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder to write to")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed; the same seed and sizes give the same bytes (default: 0)"
    )
    parser.add_argument(
        "--size", type=size, action="append", default=[], metavar="NAME=ROWS", help=f"names: {', '.join(SIZES)}"
    )
    given = parser.parse_args()
    for path in make_sources(given.output_dir, given.seed, dict(given.size)):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run_script(main)
