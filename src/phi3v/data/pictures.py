"""One door for pictures and frames of clips: what may come in, how it is stored, and how every picture is opened.

`read_pictures` decodes a source picture whole before a data folder takes it, so training meets no picture that was
never decoded. JPEG and PNG keep their bytes; everything else is stored as PNG. `open_rgb` gives what a viewer shows:
upright after its EXIF orientation, the first frame of an animation, transparency on white, three channels of 8 bits.
The published processor drops transparency instead, which shows the colours under it (mostly black); vLLM puts RGBA
pictures on white and drops the transparency of all others.
"""

from __future__ import annotations

import io
import math
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, cast

import numpy as np
from PIL import (  # noqa: F401  (they register)
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    Jpeg2KImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from phi3v.data.conversations import DataError

if TYPE_CHECKING:
    import av

KEPT = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png"}
"""Formats whose bytes are kept, and their suffix (MPO is a JPEG with further pictures behind the first)."""

READ = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Formats that Pillow opens here: no vector formats, nothing that runs other programs. HEIF and PDF have extras."""

MAX_PIXELS = 89_478_485
"""A larger picture is refused, or scaled down by the option max_pixels (Pillow's own limit)."""

MAX_FILE_BYTES = 256 * 2**20
"""A larger encoded picture is refused before it is read."""

MAX_PAGES = 100
"""Pages of one TIFF or PDF; at 2,500 tokens a page the model's context ends earlier."""

JPEG_QUALITY = 95
"""Frames of clips are stored as JPEG of this quality: visibly the same, a tenth of PNG's bytes."""

MAX_FRAMES = 1_000_000
"""A longer clip is refused: nine hours at 30 frames a second."""

_VIDEO_OPTIONS = {"format_whitelist": "avi,mov,matroska,webm,asf,mpeg,mpegts,mpegvideo,m4v,flv,ogg,gif,ivf,mxf"}
"""FFmpeg's demuxers that may open a clip: no playlists, which name other files, and no pictures or texts."""

# Pillow refuses above twice its limit, and warns before; here MAX_PIXELS refuses. Scaling down may decode four times it.
Image.MAX_IMAGE_PIXELS = 2 * MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# A text of megabytes (a workflow, a colour table) is no reason to refuse a PNG; all texts together stay limited.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

_BROKEN = (
    OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError,
    EOFError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip
"""Pillow's readers answer damaged or hostile files with many kinds of exception; all of them mean the same here."""

_ORIENTATION = 0x0112
"""EXIF's tag; 5 to 8 turn the picture by a quarter."""

_REDUCED = 0x00FE
"""TIFF's tag; its first bit marks a smaller copy of another page."""

_PNG_START = b"\x89PNG\r\n\x1a\n"

_HEIF = "a HEIF (HEIC) whose header is damaged"
_SEEN = {
    rb"\Z": "the file is empty",
    rb"....ftyp(hei[cfmsx]|hev[cmsx]|mif1|msf1)": _HEIF,
    rb"%PDF-": "PDF",
    rb"\x89PNG": "a PNG whose header is damaged",
    rb"\xff\xd8\xff": "a JPEG whose header is damaged",
    rb"GIF8|BM|II\*\0|MM\0\*|RIFF....WEBP|....ftypavi[fs]|P[1-7]\s": "the header is damaged, or a variant is not read",
    rb"version https://git-lfs": "a Git LFS pointer; run `git lfs pull`",
    rb"\s*(<!doctype html|<html)": "an HTML page, as a failed download leaves",
    rb"\s*(<\?xml|<svg)": "XML or an SVG drawing",
    rb"%!PS|\xc5\xd0\xd3\xc6": "PostScript",
    rb"8BPS": "a Photoshop document",
    rb".{128}DICM": "DICOM; export its pixels as 16-bit PNG",
    rb"\0\0\x01\0": "an icon",
    rb"....ftyp|RIFF....AVI |\x1aE\xdf\xa3|\x30\x26\xb2\x75": "a video",
    rb"PK\x03\x04|\x1f\x8b|.{257}ustar": "an archive",
}
"""What a file that is no picture starts with, and what to say of it."""

_TURNS = {
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""Signs of a display matrix's a, b, c, d (x' = a x + c y, y' = b x + d y) to what turns a frame upright."""

_PDFIUM = threading.Lock()
"""PDFium serves one thread at a time."""


@dataclass(frozen=True, slots=True)
class PictureOptions:
    """How the pictures of a source are read."""

    pixel_range: Literal["full", "real"] = "full"
    """What becomes 0 to 255 of deep grey pixels: 16 bits, or each picture's smallest to largest value."""
    max_pixels: int | None = None
    """A larger picture is scaled down to so many pixels; None: refused above MAX_PIXELS."""
    dpi: int = 150
    """Resolution of PDF pages, dots per inch."""
    max_ratio: int = 336
    """Longest side over shortest at most: the model's tile in pixels, below which a thinner picture vanishes."""


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """A picture as a data folder keeps it; it was decoded whole."""

    data: bytes
    suffix: str
    original: bool
    """Whether `data` are the source's own bytes, so that its file may be linked."""
    warning: str = ""


def read_pictures(
    source: bytes | Path, where: str, options: PictureOptions = PictureOptions(), page: int | None = None
) -> list[StoredPicture]:
    """The pictures of an encoded file: every page of a TIFF or PDF, or page `page` (from 1); else one.

    Raises DataError that names the file, the format seen and the fault: no picture, damaged or cut, too many pixels.
    """
    if isinstance(source, Path):
        where = where if source.name in where else f"{where}: {source.name}"
        if (size := source.stat().st_size) > MAX_FILE_BYTES:
            raise DataError(f"{where}: {size} bytes; expected at most {MAX_FILE_BYTES}")
        source = source.read_bytes()
    if re.match(rb"\s*%PDF-", source):
        return [_stored(image, ".png", options) for image in _pdf_pages(source, where, options, page)]
    with _open(source, where, options) as image:
        kind = image.format or ""
        try:
            if kind == "TIFF":
                return [_stored(one, ".png", options, note) for one, note in _tiff_pages(image, where, options, page)]
            if page not in (None, 1):
                raise DataError(f"{where}: page {page} of a {kind}; expected a TIFF or PDF")
            _check_ratio(*image.size, where, options)
            if kind == "PNG":
                with _open(source, where) as chunks:
                    chunks.verify()  # checksums, which loading passes over
            scaled = options.max_pixels is not None and image.width * image.height > options.max_pixels
            deep = image.mode.startswith(("I", "F"))
            if kind in KEPT and not scaled and not (deep and options.pixel_range == "real"):
                # An eighth of the size reads every byte of a JPEG, in half the time.
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
                return [StoredPicture(source, KEPT[kind], True, _range_warning(image))]
            note = _range_warning(image) if options.pixel_range == "full" else ""
            if scaled:
                image.draft(None, _scaled_size(image.size, options))
            return [_stored(_rgb(image, where, options), KEPT.get(kind, ".png"), options, note)]
        except DataError:
            raise
        except _BROKEN as error:
            raise DataError(f"{where}: damaged or truncated {kind}: {error}") from None


def _stored(image: Image.Image, suffix: str, options: PictureOptions, note: str = "") -> StoredPicture:
    """An upright RGB picture, scaled down and encoded."""
    if options.max_pixels is not None and image.width * image.height > options.max_pixels:
        image = image.resize(_scaled_size(image.size, options), Image.Resampling.LANCZOS, reducing_gap=3)
    buffer = io.BytesIO()
    if suffix == ".jpg":
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        # Of a photograph, level 6 takes six times the time and saves a seventh of the bytes.
        image.save(buffer, "PNG", compress_level=1)
    return StoredPicture(buffer.getvalue(), suffix, False, note)


def _scaled_size(size: tuple[int, int], options: PictureOptions) -> tuple[int, int]:
    factor = math.sqrt((options.max_pixels or MAX_PIXELS) / (size[0] * size[1]))
    return max(1, int(size[0] * factor)), max(1, int(size[1] * factor))


def _page_numbers(pages: int, page: int | None, where: str) -> range:
    if page is not None and not 1 <= page <= pages:
        raise DataError(f"{where}: page {page}; expected 1 to {pages}")
    if page is None and pages > MAX_PAGES:
        raise DataError(f"{where}: {pages} pages; expected at most {MAX_PAGES}, or a column that names the page")
    return range(pages) if page is None else range(page - 1, page)


def _tiff_pages(
    image: Image.Image, where: str, options: PictureOptions, page: int | None
) -> Iterator[tuple[Image.Image, str]]:
    """(picture, warning) of each page; smaller copies of a page are no pages."""
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    places = []
    for place in range(image.n_frames):
        image.seek(place)
        if not place or not int(image.tag_v2.get(_REDUCED, 0)) & 1:
            places.append(place)
    for number in _page_numbers(len(places), page, where):
        image.seek(places[number])
        _check_pixels(image, where, options)
        _check_ratio(*image.size, where, options)
        note = _range_warning(image) if options.pixel_range == "full" else ""
        yield _rgb(image, where, options), note


def _pdf_pages(data: bytes, where: str, options: PictureOptions, page: int | None) -> list[Image.Image]:
    try:
        import pypdfium2
    except ImportError:
        raise DataError(f"{where}: a PDF; expected pypdfium2 to draw its pages: pip install 'phi3v[pdf]'") from None
    images = []
    try:
        with _PDFIUM, pypdfium2.PdfDocument(data) as document:
            for number in _page_numbers(len(document), page, where):
                sheet = document[number]
                width, height = sheet.get_size()  # in 1/72 inch
                _check_ratio(width, height, f"{where}: page {number + 1}", options)
                scale = min(options.dpi / 72, math.sqrt((options.max_pixels or MAX_PIXELS) / (width * height)))
                images.append(sheet.render(scale=scale).to_pil().convert("RGB"))
    except pypdfium2.PdfiumError as error:
        raise DataError(f"{where}: a PDF that cannot be drawn: {error}") from None
    return images


def _open(
    source: bytes | Path | BinaryIO, where: str, options: PictureOptions = PictureOptions(), heif: bool = False
) -> Image.Image:
    """The picture before it is decoded, within the limit of pixels."""
    try:
        image = Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=("HEIF",) if heif else READ
        )
    except UnidentifiedImageError:
        seen = _seen(source)
        if seen == _HEIF and not heif:
            _register_heif(where)
            return _open(source, where, options, heif=True)
        known = f": {seen}" if seen else ""
        raise DataError(f"{where}: not a picture{known}; expected one of {', '.join(READ)}, HEIF, PDF") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: {error}") from None
    except _BROKEN as error:
        raise DataError(f"{where}: cannot be opened as a picture: {error}") from None
    _check_pixels(image, where, options)
    return image


def _seen(source: bytes | Path | BinaryIO) -> str:
    """What the first bytes say; empty: nothing known."""
    if isinstance(source, bytes):
        start = source[:512]
    elif isinstance(source, Path):
        with open(source, "rb") as file:
            start = file.read(512)
    else:
        source.seek(0)
        start = source.read(512)
    matches = (text for pattern, text in _SEEN.items() if re.match(pattern, start, re.DOTALL | re.IGNORECASE))
    return next(matches, "")


def _register_heif(where: str) -> None:
    try:
        import pillow_heif
    except ImportError:
        raise DataError(f"{where}: HEIF (HEIC); expected pillow-heif to read it: pip install 'phi3v[heif]'") from None
    pillow_heif.register_heif_opener()


def _check_pixels(image: Image.Image, where: str, options: PictureOptions) -> None:
    limit = MAX_PIXELS if options.max_pixels is None else 4 * MAX_PIXELS
    if image.width * image.height > limit:
        hint = "; option max_pixels scales larger ones down" if options.max_pixels is None else ""
        raise DataError(f"{where}: {image.width} x {image.height} pixels; expected at most {limit} in all{hint}")


def thin_problem(width: float, height: float, max_ratio: int = 336) -> str | None:
    """What is wrong with a size of which the model would see nothing, or None. max_ratio: tile in pixels."""
    if max(width, height) <= max_ratio * min(width, height):
        return None
    return f"{width:g} x {height:g} pixels; expected sides within 1 : {max_ratio} (a tile is {max_ratio} pixels)"


def _check_ratio(width: float, height: float, where: str, options: PictureOptions) -> None:
    if problem := thin_problem(width, height, options.max_ratio):
        raise DataError(f"{where}: {problem}")


def _range_warning(image: Image.Image) -> str:
    """What scaling by the range of 16 bits loses of a deep grey picture; empty: nothing to speak of."""
    if not image.mode.startswith("I"):
        return ""
    low, high = image.getextrema()
    if not isinstance(low, int) or not isinstance(high, int) or high - low >= 2**15:
        return ""
    return f"16-bit pixels from {low} to {high}: scaled from 0 to 65535; option pixel_range: real scales by their own range"


def _rgb(image: Image.Image, where: str, options: PictureOptions = PictureOptions()) -> Image.Image:
    """The picture as a viewer shows it, in RGB."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _grey(image, where, options)
    elif image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(clear)
    return image.convert("RGB")


def _grey(image: Image.Image, where: str, options: PictureOptions) -> Image.Image:
    """Pixels of 16 or 32 bits as 8; Pillow's own conversion clips at 255, which turns nearly every scan white."""
    pixels = np.asarray(image)
    low, high = np.nanmin(pixels), np.nanmax(pixels)
    if options.pixel_range == "real" and np.isfinite(high - low):
        scaled = np.nan_to_num((pixels - np.float32(low)) * np.float32(255 / max(high - low, 1e-30))).round()
    elif image.mode == "F" or low < 0 or high > 65535:
        raise DataError(
            f"{where}: pixels from {low:g} to {high:g}; expected 8 or 16 bits a channel, or the option pixel_range: real"
        )
    else:
        scaled = pixels // 256
    scaled = scaled.astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        scaled[pixels == clear] = 255
    return Image.fromarray(scaled)


def open_rgb(data: bytes | Path, where: str) -> Image.Image:
    """Decode to an upright 8-bit RGB picture. Raises DataError if the picture cannot be decoded whole."""
    try:
        with _open(data, where) as image:
            return _rgb(image, where)
    except DataError:
        raise
    except _BROKEN as error:
        raise DataError(f"{where}: cannot be decoded: {error}") from None


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
    if not width or not height or width * height > MAX_PIXELS:
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
        with av.open(str(path), options=_VIDEO_OPTIONS) as container:
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
    except av.InvalidDataError:
        raise DataError(f"{path}: does not decode: cut short, damaged, or no video") from None
    except av.ArgumentError:
        raise DataError(f"{path}: not a video; expected AVI, MP4, MOV, Matroska, WebM, WMV, MPEG, FLV or Ogg") from None
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise DataError(f"{path}: does not decode: {error}") from None


def _upright_jpeg(frame: av.VideoFrame) -> bytes:
    image = frame.to_image()
    matrix = cast("bytes | None", frame.side_data.get("DISPLAYMATRIX"))  # a buffer that PyAV's types do not know
    if matrix:
        a, b, _, c, d, *_ = np.sign(np.frombuffer(matrix, np.int32)).tolist()
        if turn := _TURNS.get((a, b, c, d)):
            image = image.transpose(turn)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _decode(path: Path, keep: set[int]) -> tuple[int, dict[int, bytes]]:
    """(number of frames, JPEG bytes of those to keep)."""
    import av

    frames: dict[int, bytes] = {}
    total = 0
    with av.open(str(path), options=_VIDEO_OPTIONS) as container:
        # One thread per clip: the converter runs clips side by side.
        container.streams.video[0].thread_count = 1
        for frame in container.decode(video=0):
            if total in keep:
                frames[total] = _upright_jpeg(frame)
            total += 1
            if total > MAX_FRAMES:
                raise DataError(f"{path}: more than {MAX_FRAMES} frames")
    return total, frames
