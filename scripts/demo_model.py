#!/usr/bin/env python
"""Write the demo's tiny random Phi-3.5-vision: a checkpoint folder in the official layout, with its own tokenizer.

python scripts/demo_model.py --data_dirs results/data/mixture-KEY --output_dir results/demo-sources/random \
    --geometry hidden_size=96 --geometry layers=3
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from phi3v.settings import heavy_imports, run_script

TEXTS_PER_FOLDER = 600
"""Examples per data folder whose texts train the tokenizer. They contain every word of the demo."""


def setting(text: str) -> tuple[str, int]:
    """Parses NAME=NUMBER."""
    name, _, number = text.partition("=")
    if not name or not number.isdigit():
        raise argparse.ArgumentTypeError(f"got {text!r}; expected NAME=NUMBER")
    return name, int(number)


def texts(folders: list[str]) -> Iterator[str]:
    """Questions and answers of the training splits."""
    from phi3v.data.conversations import read_conversations
    from phi3v.data.folder import split_file

    for folder in folders:
        for number, record in enumerate(read_conversations(split_file(folder, "train"))):
            if number == TEXTS_PER_FOLDER:
                break
            for turn in record.turns:
                yield turn.user
                yield turn.assistant


def main() -> int:
    """Parses the command line and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_dirs", required=True, nargs="+", help="data folders whose training texts train the tokenizer"
    )
    parser.add_argument("--output_dir", required=True, help="checkpoint folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    parser.add_argument(
        "--geometry",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="size of the model, such as layers=3; repeat the flag for several",
    )
    given = parser.parse_args()
    with heavy_imports():
        from phi3v.demo.tiny import build_tiny

    folder = build_tiny(given.output_dir, texts(given.data_dirs), seed=given.seed, **dict(given.geometry))
    print(f"{folder}: a random tiny model of the official layout")
    return 0


if __name__ == "__main__":
    run_script(main)
