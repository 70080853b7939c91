"""Pictures: what may come in, and how it is opened.

A picture is kept as its original bytes where it is JPEG or PNG. Opening gives what a viewer shows: upright after its
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
"""Longer side over shorter side at most. A tile is 336 pixels wide, and with one crop it holds the longer side: of a
thinner picture nothing would be left."""

TOO_THIN = f"expected sides within 1 : {MAX_RATIO} (a tile is 336 pixels)"

# Pillow warns of a bomb above its limit of pixels and refuses at twice that; here the limit itself refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_ORIENTATION = 0x0112
"""EXIF's tag; 5 to 8 turn the picture by a quarter."""

_PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the header says."""

    format: str
    width: int
    height: int
    mode: str


def _open(data: bytes | Path | BinaryIO, where: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=READ)
    except UnidentifiedImageError:
        raise DataError(f"{where}: not a picture; expected one of {', '.join(READ)}") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: {error}") from None
    # Pillow's readers answer hostile headers with many kinds of exception; all of them mean the same here.
    except (
        OSError,
        ValueError,
        SyntaxError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        OverflowError,
        struct.error,
    ) as error:
        raise DataError(f"{where}: cannot be opened as a picture: {error}") from None
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise DataError(f"{where}: {image.width} x {image.height} pixels; expected at most {limit} in all")
    return image


def too_thin(width: int, height: int) -> bool:
    """Whether the model would see nothing of a picture of that size."""
    return max(width, height) > MAX_RATIO * min(width, height)


def check_png(data: bytes, where: str) -> None:
    """Every chunk is whole and its checksum right, up to the end mark. Raises DataError."""
    position, end = len(_PNG_START), len(data)
    view = memoryview(data)
    while position + 12 <= end:
        length, kind = struct.unpack_from(">I4s", data, position)
        stop = position + 12 + length
        if stop > end:
            break
        if zlib.crc32(view[position + 4 : stop - 4]) != struct.unpack_from(">I", data, stop - 4)[0]:
            raise DataError(f"{where}: PNG chunk {kind!r} at byte {position} has a wrong checksum; the file is damaged")
        if kind == b"IEND":
            return
        position = stop
    raise DataError(f"{where}: PNG ends after {end} bytes without its end mark; the file is truncated")


def check_jpeg(data: bytes, where: str) -> None:
    """The end mark is there, behind the start of the pixels. Raises DataError."""
    # A thumbnail among the metadata has an end mark of its own. Some writers pad or append metadata behind the last.
    if data.rfind(b"\xff\xd9") < _jpeg_pixels(data):
        raise DataError(f"{where}: JPEG ends after {len(data)} bytes without its end mark; the file is truncated")


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


def inspect(data: bytes, where: str) -> ImageInfo:
    """Header and completeness of encoded bytes, without decoding them. Raises DataError: no picture, too many pixels, too
    thin, truncated."""
    with _open(data, where) as image:
        info = ImageInfo(image.format or "", image.width, image.height, image.mode)
    if too_thin(info.width, info.height):
        raise DataError(f"{where}: {info.width} x {info.height} pixels; {TOO_THIN}")
    if info.format == "PNG":
        check_png(data, where)
    elif info.format in KEPT:
        check_jpeg(data, where)
    return info


def open_rgb(data: bytes | Path, where: str) -> Image.Image:
    """Decode to an upright 8-bit RGB picture. Raises DataError when the picture cannot be decoded whole."""
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
    # As in _open: decoders raise many kinds of exception for damaged data.
    except (
        OSError,
        ValueError,
        SyntaxError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
        struct.error,
        zlib.error,
        MemoryError,
    ) as error:
        raise DataError(f"{where}: cannot be decoded: {error}") from None


def displayed_size(data: bytes | Path | BinaryIO, where: str) -> tuple[int, int]:
    """(width, height) as open_rgb would give it, from the header alone; a file is closed. Raises DataError."""
    try:
        if isinstance(data, Path):
            file: BinaryIO = open(data, "rb")  # noqa: SIM115  (closed below)
        else:
            file = io.BytesIO(data) if isinstance(data, bytes) else data
    except OSError as error:
        raise DataError(f"{where}: cannot be opened as a picture: {error}") from None
    with file:
        try:
            plain = _plain_png_size(file)
            file.seek(0)
        except OSError as error:
            raise DataError(f"{where}: cannot be opened as a picture: {error}") from None
        return plain or _pillow_size(file, where)


def _pillow_size(file: BinaryIO, where: str) -> tuple[int, int]:
    with _open(file, where) as image:
        # Of a TIFF Pillow gives the size as displayed, and turns the pixels itself.
        turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else image.size


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


def as_png(data: bytes | Path, where: str) -> bytes:
    """The picture as PNG, for formats whose bytes are not kept."""
    buffer = io.BytesIO()
    open_rgb(data, where).save(buffer, "PNG")
    return buffer.getvalue()
