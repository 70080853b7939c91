"""Turn a ZeRO checkpoint of a full fine-tuning run into a model folder in the official layout; needs no GPU.

    python scripts/export_zero.py results/mine/train/ROW/checkpoints/checkpoint-120 results/models/KEY OUT --dtype bf16

The second argument is the folder that training started from. A finished run needs no conversion: its `final` folder is
such a model already.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Parse, convert, and turn what is wrong into one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint-N folder")
    parser.add_argument("base", type=Path, help="the folder that training started from")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="type of the written weights")
    given = parser.parse_args()
    from phi3v.training.export import export_zero_checkpoint

    try:
        print(export_zero_checkpoint(given.checkpoint, given.base, given.out, given.dtype))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
