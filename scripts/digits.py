#!/usr/bin/env python
"""Write scikit-learn's 1,797 handwritten digits as an example of a user's files: pictures, and one table per split.

python scripts/digits.py --output_dir results/digits-source
"""

from __future__ import annotations

import argparse

from phi3v.demo.sources import HELD_OUT, write_digits
from phi3v.settings import run_script


def main() -> int:
    """Parses the command line and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed for selecting the digits of val (default: 0)")
    parser.add_argument("--held_out", type=int, default=HELD_OUT, help=f"number of digits in val (default: {HELD_OUT})")
    given = parser.parse_args()
    for path in write_digits(given.output_dir, given.seed, given.held_out):
        print(path)
    return 0


if __name__ == "__main__":
    run_script(main)
