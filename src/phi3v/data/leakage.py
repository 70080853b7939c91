"""Leakage: pictures of an evaluation that are, byte for byte, in the training split too.

Bytes, not pixels: that costs next to nothing, so it is known for every dataset. scripts/validate.py compares pixels,
which also finds a picture that was encoded anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from phi3v.data.conversations import Conversation, DataError, read_conversations
from phi3v.data.pictures import Pictures, pictures_of


def content_digest(data: bytes) -> bytes:
    """What stands for a picture's bytes."""
    return hashlib.sha256(data).digest()


def in_training(paths: Iterable[str], own: Pictures, train: Iterable[Conversation], theirs: Pictures) -> set[str]:
    """Those of the paths whose bytes are also a picture of the training split.

    Of the training pictures only those are read that are as long as one of the paths'. Raises DataError where one of
    the paths' is not there.
    """
    digests = {path: content_digest(own.bytes_of(path, "leakage")) for path in sorted(set(paths))}
    sizes = {own.stored_bytes(path, "leakage") for path in digests}
    wanted = set(digests.values())
    seen: set[bytes] = set()
    done: set[str] = set()
    for example in train:
        for path in example.images:
            try:
                if theirs.stored_bytes(path, example.id) in sizes and path not in done:
                    done.add(path)
                    seen.add(content_digest(theirs.bytes_of(path, example.id)))
            except DataError:
                continue  # a picture that cannot be read cannot have been trained on
    seen &= wanted
    return {path for path, digest in digests.items() if digest in seen}


def leakage(folders: dict[str, Path], splits: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """dataset.json's `leakage`: {"val": {"examples": 3, "of": 500, "pictures": 3}} for each split but train.

    splits: as in dataset.json; folders: the data folder of each. {} where there is no train. Raises DataError.
    """
    if "train" not in splits:
        return {}
    train = folders["train"] / splits["train"]["file"]
    theirs = pictures_of(folders["train"], splits["train"])
    found: dict[str, dict[str, int]] = {}
    for split, entry in splits.items():
        if split == "train":
            continue
        examples = [example.images for example in read_conversations(folders[split] / entry["file"])]
        paths = {path for images in examples for path in images}
        leaked = in_training(paths, pictures_of(folders[split], entry), read_conversations(train), theirs)
        count = sum(any(path in leaked for path in images) for images in examples)
        found[split] = {"examples": count, "of": len(examples), "pictures": len(leaked)}
    return found
