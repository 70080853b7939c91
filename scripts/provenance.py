#!/usr/bin/env python
"""Print the chain from a result back to the revisions of its data, or export a run as an RO-Crate.

    python scripts/provenance.py results/demo/report/accuracy.tsv --row phi3-docvqa-lora-fp16
    python scripts/provenance.py results/demo/train/phi3-docvqa-lora-fp16/final
    python scripts/provenance.py results/demo/report --crate results/demo/crate

Exits with 1 if any input in the chain has changed since it was used.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from phi3v.provenance import lineage
from phi3v.settings import run_script


def main() -> int:
    """Parses the command line and prints the chain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="folder of a result, or a file in it")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--row", help="with a report: print only this row's results")
    either.add_argument(
        "--crate",
        type=Path,
        metavar="FOLDER",
        help="with a report: write the whole run to FOLDER as a Workflow Run RO-Crate",
    )
    given = parser.parse_args()
    found = lineage.chain(given.result)
    if given.row:
        found = lineage.of_row(found, given.row)
    if given.crate:
        print(lineage.export_crate(given.result if given.result.is_dir() else given.result.parent, given.crate))
        return 0
    for line in lineage.lines(found):
        print(line)
    changed = lineage.problems(found)
    if changed:
        print("\nchanged since they were used:\n" + "\n".join(changed), file=sys.stderr)
    return 1 if changed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` is no error
    run_script(main)
