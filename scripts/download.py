#!/usr/bin/env python
"""Download a dataset's sources or a model's weights once for all runs. Writes the lock file last.

    python scripts/download.py --datasets config/datasets.yaml --dataset docvqa --output_dir results/data/docvqa/source
    python scripts/download.py --models config/models.yaml --model phi35-vision --output_dir results/models/phi35-vision

If the rows of a dataset contain picture URLs, the pictures are downloaded too, into urls/ of the output folder.
Hub files go through huggingface_hub, which reads HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE. Files that already
exist are checked against their recorded size and sha256, and not downloaded again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from phi3v.data.convert import dataset_sources, fetch_pictures
from phi3v.data.fetch import fetch
from phi3v.settings import Dataset, Model, check_choice, number_of, read_entries, run_script


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--datasets", nargs="+", default=["config/datasets.yaml"], metavar="FILE", help="datasets files"
    )
    parser.add_argument("--models", nargs="+", default=["config/models.yaml"], metavar="FILE", help="models files")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--dataset", metavar="NAME", help="entry of a datasets file")
    chosen.add_argument("--model", metavar="NAME", help="entry of a models file")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder for the files and their lock file")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="parallel downloads (default: 4)")
    return parser.parse_args()


def main() -> int:
    """Parses the command line and downloads."""
    given = arguments()
    kind: type[Dataset | Model] = Dataset if given.dataset else Model
    name, files = (given.dataset, given.datasets) if given.dataset else (given.model, given.models)
    entries = read_entries(files, kind, Path())
    check_choice("command line", kind.__name__.lower(), name, entries)
    entry = entries[name]
    if entry.licence:
        print(f"{name}: {entry.title}. Licence: {entry.licence}", file=sys.stderr)
    if isinstance(entry, Dataset):
        sources = [(split.url, split.revision) for split in entry.splits.values()]
        fetched = fetch(sources, given.output_dir, given.workers)
        fetch_pictures(dataset_sources(name, entry, given.output_dir), given.workers)
    else:
        fetched = fetch([(entry.url, entry.revision)], given.output_dir, given.workers, kind="model", flat=True)
    for source in fetched.values():
        size = sum(file.size for file in source.files)
        pinned = f" at {source.resolved}" if source.resolved else ""
        print(f"{source.url}{pinned}: {number_of(len(source.files), 'file')}, {size / 1e6:.1f} MB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)
