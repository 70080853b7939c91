"""Pictures and frames of clips: what may come in, and how every picture is opened.

A picture is kept as its original bytes if it is JPEG or PNG. Opening gives what a viewer shows: upright after its
EXIF orientation, the first frame of an animation, three channels (transparency is dropped, as the model's own processor
does).
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import (  # noqa: F401  (they register)
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from phi3v.data.conversations import DataError

KEPT = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png"}
"""Formats whose bytes are kept, and their suffix (MPO is a JPEG with further pictures behind the first)."""

READ = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
"""Formats that are opened at all: no vector formats, nothing that runs other programs."""

MAX_RATIO = 336
"""Longest side over shortest side at most. A tile is 336 pixels wide, and with one crop it holds the longer side: a
thinner picture would vanish."""

TOO_THIN = f"expected sides within 1 : {MAX_RATIO} (a tile is 336 pixels)"

JPEG_QUALITY = 95
"""Frames of clips are stored as JPEG of this quality: visibly the same, a tenth of PNG's bytes."""

MAX_FRAMES = 1_000_000
"""A longer clip is refused: nine hours at 30 frames a second."""

# Pillow warns of a bomb above its limit of pixels and refuses at twice that; here the limit itself refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_BROKEN = (
    OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError,
    struct.error, zlib.error,
)  # fmt: skip
"""Pillow's readers answer damaged or hostile files with many kinds of exception; all of them mean the same here."""

_ORIENTATION = 0x0112
"""EXIF's tag; 5 to 8 turn the picture by a quarter."""

_PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the header says."""

    format: str
    width: int
    height: int


def _open(data: bytes | Path | BinaryIO, where: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=READ)
    except UnidentifiedImageError:
        raise DataError(f"{where}: not a picture; expected one of {', '.join(READ)}") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: {error}") from None
    except _BROKEN as error:
        raise DataError(f"{where}: cannot be opened as a picture: {error}") from None
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise DataError(f"{where}: {image.width} x {image.height} pixels; expected at most {limit} in all")
    return image


def too_thin(width: int, height: int) -> bool:
    """Whether the model would see nothing of a picture of that size."""
    return max(width, height) > MAX_RATIO * min(width, height)


def inspect(data: bytes, where: str) -> ImageInfo:
    """Header and completeness of encoded bytes, without decoding them.

    Raises DataError: no picture, too many pixels, too thin, truncated; a PNG also for a wrong checksum.
    """
    with _open(data, where) as image:
        info = ImageInfo(image.format or "", image.width, image.height)
        if too_thin(info.width, info.height):
            raise DataError(f"{where}: {info.width} x {info.height} pixels; {TOO_THIN}")
        try:
            image.verify()  # checks the chunks of a PNG, and nothing of a JPEG
            # A thumbnail among the metadata has an end mark of its own. Some writers append metadata behind the last.
            if info.format in ("JPEG", "MPO") and data.rfind(b"\xff\xd9") < _jpeg_pixels(data):
                raise DataError(
                    f"{where}: JPEG ends after {len(data)} bytes without its end mark; the file is truncated"
                )
        except DataError:
            raise
        except _BROKEN as error:
            raise DataError(f"{where}: the file is damaged or truncated: {error}") from None
    return info


def _jpeg_pixels(data: bytes) -> int:
    """Where a JPEG's metadata end and its pixels start."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        mark = data[position + 1]
        if mark == 0xFF:  # a filling byte
            position += 1
        elif mark == 0xDA:
            return position
        elif mark == 0x01 or 0xD0 <= mark <= 0xD8:  # without a length
            position += 2
        else:
            position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    return position


def open_rgb(data: bytes | Path, where: str) -> Image.Image:
    """Decode to an upright 8-bit RGB picture. Raises DataError if the picture cannot be decoded whole."""
    try:
        with _open(data, where) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16") or image.mode == "I":
                # Pillow's own conversion clips 16-bit grey at 255, which turns nearly every scan white.
                image = image.convert("I").point(lambda grey: grey * (1 / 256)).convert("L")
            elif image.mode == "F":
                raise DataError(f"{where}: floating point pixels; expected 8 or 16 bits a channel")
            return image.convert("RGB")
    except DataError:
        raise
    except _BROKEN as error:
        raise DataError(f"{where}: cannot be decoded: {error}") from None


def as_png(data: bytes, where: str) -> bytes:
    """The picture as PNG, for formats whose bytes are not kept. Raises DataError."""
    buffer = io.BytesIO()
    open_rgb(data, where).save(buffer, "PNG")
    return buffer.getvalue()


def displayed_size(data: bytes | Path | BinaryIO, where: str) -> tuple[int, int]:
    """(width, height) as open_rgb would give it, from the header alone; a file is closed. Raises DataError."""
    try:
        source = io.BytesIO(data) if isinstance(data, bytes) else data
        with open(source, "rb") if isinstance(source, Path) else source as file:
            if plain := _plain_png_size(file):
                return plain
            file.seek(0)
            with _open(file, where) as image:
                # Of a TIFF Pillow gives the size as displayed, and turns the pixels itself.
                turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
                return (image.height, image.width) if turned else image.size
    except OSError as error:
        raise DataError(f"{where}: cannot be opened as a picture: {error}") from None


def _plain_png_size(file: BinaryIO) -> tuple[int, int] | None:
    """(width, height) of a whole PNG in which nothing can turn the picture; None: ask Pillow.

    Pillow decodes all of a PNG to learn its orientation, because it may stand behind the pixels: 60 ms for a page.
    """
    header = file.read(33)
    if len(header) < 33 or not header.startswith(_PNG_START) or header[12:16] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", header, 16)
    if not width or not height or (Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS):
        return None
    while len(start := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", start)
        if kind == b"IEND":
            return width, height
        if kind == b"eXIf":
            return None
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = file.read(min(length, 8))
            if keyword.lower().startswith((b"exif", b"raw prof", b"xml", b"xmp")):
                return None
            length -= len(keyword)
        file.seek(length + 4, io.SEEK_CUR)
    return None


def frame_indices(total: int, wanted: int) -> list[int]:
    """The recipe's choice of frames: arange(0, n, n / 8), truncated."""
    return [int(index) for index in np.arange(0, total, total / wanted)[:wanted]]


def sample_frames(path: Path, wanted: int = 8) -> list[bytes]:
    """JPEG bytes of `wanted` frames spread over a clip, its first frame included.

    Raises DataError if the clip does not decode or has fewer frames. What decodes counts, not what the header promises:
    a correct header costs one pass, a wrong one two.
    """
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: no video stream")
            total = container.streams.video[0].frames
        for _ in range(2):
            indices = frame_indices(total, wanted) if total >= wanted else []
            promised, (total, frames) = total, _decode(path, set(indices))
            if total < wanted:
                raise DataError(f"{path}: {total} frames; expected at least {wanted}")
            if total == promised:
                return [frames[index] for index in indices]
        raise DataError(f"{path}: {total} frames in a second pass; expected {promised} as in the first")
    except DataError:
        raise
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise DataError(f"{path}: does not decode: {error}") from None


def _decode(path: Path, keep: set[int]) -> tuple[int, dict[int, bytes]]:
    """(number of frames, JPEG bytes of those to keep)."""
    import av

    frames: dict[int, bytes] = {}
    total = 0
    with av.open(str(path)) as container:
        # One thread per clip: the converter runs clips side by side.
        container.streams.video[0].thread_count = 1
        for frame in container.decode(video=0):
            if total in keep:
                buffer = io.BytesIO()
                frame.to_image().save(buffer, "JPEG", quality=JPEG_QUALITY)
                frames[total] = buffer.getvalue()
            total += 1
            if total > MAX_FRAMES:
                raise DataError(f"{path}: more than {MAX_FRAMES} frames")
    return total, frames
