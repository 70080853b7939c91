"""Handwritten digits as somebody's own dataset: 1,797 real scans that scikit-learn ships, as plain files.

    write_digits("results/demo-sources/digits", seed=0)

writes the two layouts people have: pictures as {train,val}/DIGIT/NNNN.png (8 x 8 grey pixels, as scanned) for the
converter `image_folder`, and train.tsv, val.tsv with the columns image, question, answer for the converter `table`.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(its test part, as scikit-learn ships it).
"""

from __future__ import annotations

import csv
from pathlib import Path
from random import Random

from PIL import Image

from phi3v.data.demo_pictures import png_bytes

QUESTION = "Which digit is written here?"
HELD_OUT = 400
"""Scans of the split `val`."""


def write_digits(folder: str | Path, seed: int = 0, held_out: int = HELD_OUT) -> list[Path]:
    """Write the scans as PNG files and both tables; returns the tables.

    Args:
        held_out: scans that go to `val`, drawn by `seed` alike from all ten digits; the other ones go to `train`.

    Raises:
        ValueError: `held_out` leaves a split empty.
    """
    from sklearn.datasets import load_digits

    scans = load_digits()
    if not 10 <= held_out <= len(scans.target) - 10:
        raise ValueError(f"held_out: {held_out}, expected 10 to {len(scans.target) - 10} of {len(scans.target)} scans")
    order = list(range(len(scans.target)))
    Random(f"{seed}/digits").shuffle(order)
    # Every digit's share is the same in both splits: take each digit's scans in turn.
    by_digit = [[index for index in order if scans.target[index] == digit] for digit in range(10)]
    share = held_out / len(order)
    val = {index for indices in by_digit for index in indices[: round(share * len(indices))]}
    folder = Path(folder)
    tables = []
    for split in ("train", "val"):
        rows = []
        for index in sorted(val if split == "val" else set(order) - val):
            name = f"{split}/{scans.target[index]}/{index:04d}.png"
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # Ink is 0 … 16 in the data set; dark ink on light paper, as it was written.
            grey = (255 - scans.images[index] * 255 / 16).round().astype("uint8")
            path.write_bytes(png_bytes(Image.fromarray(grey)))
            rows.append((name, QUESTION, str(scans.target[index])))
        table = folder / f"{split}.tsv"
        with open(table, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(("image", "question", "answer"))
            writer.writerows(rows)
        tables.append(table)
    return tables
