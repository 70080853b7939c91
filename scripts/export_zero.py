"""Convert a ZeRO checkpoint of full fine-tuning to a model folder in the official layout. Runs without a GPU.

    python scripts/export_zero.py results/mine/train/ROW/checkpoints/checkpoint-120 results/models/KEY OUT --dtype bf16

The second argument is the base model's folder. A finished run does not need this, because its `final` folder already
has this layout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Parses the command line and converts. Prints an error as one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint-N folder")
    parser.add_argument("base", type=Path, help="folder of the base model")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="dtype of the written weights"
    )
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
