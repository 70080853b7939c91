"""`make verify-data`: every test image of Pillow's source distribution is taken pixel for pixel, or refused with a reason.

The reference is Pillow itself: all its plugins, the first frame, upright after EXIF, 16-bit grey divided by 256,
transparency pasted on white. Each file is read in a process of its own, whose processor time and peak memory count.
"""

from __future__ import annotations

import collections
import multiprocessing
import resource
import subprocess
import sys
import tarfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pillow_heif
import pypdfium2
import pytest
from PIL import Image, ImageOps

from phi3v.data.conversations import DataError
from phi3v.data.pictures import READ, open_rgb, read_pictures

pytestmark = [pytest.mark.verify, pytest.mark.filterwarnings("ignore")]

SECONDS, MEBIBYTES = 5, 1024

TAKEN = (*READ, "MPO", "HEIF", "PDF")

UNREADABLE = ("damaged or truncated", "cannot be opened as a picture", "not a readable picture")
"""How a refusal of what Pillow cannot read either starts."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests/images of the source distribution of the installed Pillow, from the package index."""
    folder = tmp_path_factory.mktemp("pillow")
    name = f"pillow=={version('pillow')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "pillow", name]
    subprocess.run([*command, "--dest", folder], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return next(folder.glob("*/Tests/images"))


def reference(path: Path) -> tuple[str, list[Image.Image] | Exception]:
    """(format, pages or what is raised), with every plugin that Pillow has, pillow-heif and PDFium."""
    kind = ""
    try:
        if path.suffix == ".pdf":
            return "PDF", [page.render(scale=150 / 72).to_pil() for page in pypdfium2.PdfDocument(path)]
        if path.suffix == ".heif":
            return "HEIF", [pillow_heif.open_heif(path).to_pillow().convert("RGB")]
        with Image.open(path) as image:
            kind = image.format or ""
            pages = []
            for frame in range(image.n_frames if kind == "TIFF" else 1):
                if frame:
                    image.seek(frame)
                if frame == 0 or not image.tag_v2.get(254, 0) & 1:
                    pages.append(shown(image))
        return kind, pages
    except Exception as error:
        return kind, error


def shown(image: Image.Image) -> Image.Image:
    """Upright, 16-bit grey divided by 256, transparency pasted on white, RGB. Raises ValueError for other depths."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        deep = np.asarray(image)
        if image.mode == "F" or deep.min() < 0 or deep.max() > 65535:
            raise ValueError("pixels from")
        clear = deep == image.info.get("transparency", -1)
        return Image.fromarray(np.where(clear, 255, deep >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGB", image.size, "white")
        white.paste(image.convert("RGB"), mask=image.convert("RGBA").getchannel("A"))
        return white
    return image.convert("RGB")


def outcome(path: Path) -> dict[str, object]:
    """What reading a file gives, beside the reference; `wrong` says where they disagree."""
    start = time.process_time()
    refusal, pages = "", []
    try:
        pages = read_pictures(path, "row 1")
    except DataError as error:
        refusal = str(error)
    seconds, memory = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    kind, expected = reference(path)
    wrong = ""
    reason = refusal.removeprefix(f"row 1: {path.name}: ")
    if pages:
        mine = [open_rgb(page.data, path.name) for page in pages]
        same = not isinstance(expected, Exception) and [image.size for image in mine] == [i.size for i in expected]
        if (
            kind not in TAKEN
            or not same
            or any(a.tobytes() != b.tobytes() for a, b in zip(mine, expected, strict=True))
        ):
            wrong = f"taken; expected {kind} {expected}"
    elif reason == refusal:
        wrong = "the file is not named"
    elif isinstance(expected, Exception):
        deep = kind in TAKEN and str(expected) == "pixels from"
        if not reason.startswith("pixels from" if deep else UNREADABLE) and "pixels; expected at most" not in reason:
            wrong = f"Pillow raises {expected}"
    elif kind in TAKEN or not reason.startswith("not a readable picture"):
        wrong = f"Pillow reads {kind} {expected}"
    label = f"taken: {kind}" if pages else f"refused: {reason.split(':')[0].split(';')[0][:40]}"
    return {
        "name": path.name,
        "seconds": seconds,
        "memory": memory,
        "label": label,
        "wrong": wrong and f"{refusal}: {wrong}",
    }


def test_every_test_image_of_pillow_is_taken_or_refused_with_a_reason(images: Path) -> None:
    paths = sorted(path for path in images.rglob("*") if path.is_file())
    # A process of its own for each file: a crash is seen, and its memory is its own.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_data_pillow"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        found = [pool.apply_async(outcome, (path,)).get(120) for path in paths]
    for label, count in sorted(collections.Counter(entry["label"] for entry in found).items()):
        print(f"{count:5} {label}")
    slowest, largest = max(found, key=lambda entry: entry["seconds"]), max(found, key=lambda entry: entry["memory"])
    print(f"{len(found)} files; slowest {slowest['seconds']:.2f} s ({slowest['name']}); ", end="")
    print(f"largest peak {largest['memory']:.0f} MiB ({largest['name']})")
    assert len(found) > 1000
    assert [f"{entry['name']}: {entry['wrong']}" for entry in found if entry["wrong"]] == []
    assert slowest["seconds"] < SECONDS
    assert largest["memory"] < MEBIBYTES
