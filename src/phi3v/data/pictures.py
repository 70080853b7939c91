"""One door for pictures and frames of clips: what may come in, how it is stored, and how every picture is opened.

`read_pictures` decodes a source picture whole before a data folder takes it, so training meets no picture that was
never decoded. JPEG and PNG keep their bytes; everything else is stored as PNG. `open_rgb` gives what a viewer shows:
upright after its EXIF orientation, the first frame of an animation, transparency on white, three channels of 8 bits.
The published processor drops transparency instead, which shows the colours under it (mostly black); vLLM puts RGBA
pictures on white and drops the transparency of all others.
"""

from __future__ import annotations

import contextlib
import functools
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

# Pillow refuses above twice its limit and warns before; MAX_PIXELS refuses here. Scaling down may decode four times it.
Image.MAX_IMAGE_PIXELS = 2 * MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# One text of megabytes (a workflow, a colour table) is no reason to refuse a PNG; all texts together stay limited.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

_BROKEN = (
    OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError,
    EOFError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""Pillow's readers answer damaged or hostile files with many kinds of exception; all of them mean the same here."""

_ORIENTATION = 0x0112
"""EXIF's tag; 5 to 8 turn the picture by a quarter."""

_REDUCED = 0x00FE
"""TIFF's tag; its first bit marks a smaller copy of another page."""

_PDF = re.compile(rb"\s*%PDF-")

_HEIF = "a HEIF (HEIC) whose header is damaged"

_SEEN = {
    rb"\Z": "the file is empty",
    rb"....ftyp(hei[cfmsx]|hev[cmsx]|mif1|msf1)": _HEIF,
    rb"\x89PNG": "a PNG whose header is damaged",
    rb"\xff\xd8\xff": "a JPEG whose header is damaged",
    rb"GIF8|BM|II\*\0|MM\0\*|RIFF....WEBP|....ftypavi[fs]|P[1-6]\s": "the header is damaged, or a variant is not read",
    rb"version https://git-lfs": "a Git LFS pointer; run `git lfs pull`",
    rb"\s*(<!doctype html|<html)": "an HTML page, as a failed download leaves",
    rb"\s*(<\?xml|<svg)": "XML or an SVG drawing",
    rb".{128}DICM": "DICOM; export its pixels as 16-bit PNG",
    rb"....ftyp|RIFF....AVI |\x1aE\xdf\xa3|\x30\x26\xb2\x75": "a video",
    rb"PK\x03\x04|\x1f\x8b|.{257}ustar": "an archive",
}
"""What a file that no reader takes starts with, and what to say of it."""

_VIDEO_OPTIONS = {"format_whitelist": "avi,mov,matroska,webm,asf,mpeg,mpegts,mpegvideo,m4v,flv,ogg,gif,ivf,mxf"}
"""FFmpeg's demuxers that may open a clip: no playlists, which name other files, and no pictures or texts."""

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

_PDFIUM = threading.RLock()
"""PDFium serves one thread at a time, which may come to close a document that was abandoned."""


@dataclass(frozen=True, slots=True)
class PictureOptions:
    """How the pictures of a source are read."""

    pixel_range: Literal["full", "real"] = "full"
    """What becomes 0 to 255 of deep grey pixels: 16 bits, or each picture's smallest to largest value."""
    max_pixels: int | None = None
    """A larger picture is scaled down to so many pixels; None: refused above MAX_PIXELS."""
    dpi: int = 150
    """Resolution of PDF pages, dots per inch."""
    max_ratio: float = 336
    """Longest side over shortest at most: a tile's pixels, because a thinner picture can vanish in one tile."""


_STORED = PictureOptions(max_ratio=math.inf)
"""For pictures of a data folder, which were checked before."""


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """A picture as a data folder keeps it; it was decoded whole."""

    data: bytes
    suffix: str
    warning: str = ""


def read_pictures(
    source: bytes | Path,
    where: str,
    options: PictureOptions = PictureOptions(),
    page: int | None = None,
    decoded: bool = False,
) -> list[StoredPicture]:
    """The pictures of an encoded file: every page of a TIFF or PDF, or page `page` (from 1); else one.

    decoded: the JPEG was encoded here, so that its header alone is looked at.

    Raises DataError that names the file, the format seen and the fault: no picture, damaged or cut, too many pixels.
    """
    if isinstance(source, Path):
        where = where if source.name in where else f"{where}: {source.name}"
        if (size := source.stat().st_size) > MAX_FILE_BYTES:
            raise DataError(f"{where}: {size} bytes; expected at most {MAX_FILE_BYTES}")
        source = source.read_bytes()
    if _PDF.match(source):
        return [_stored(image, ".png", options) for image in _pdf_pages(source, where, options, page)]
    with _open(source, where, options) as image, _damage(f"{where}: damaged or truncated {image.format}"):
        kind = image.format or ""
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            return [_stored(one, ".png", options) for one in _tiff_pages(image, where, options, page)]
        if page not in (None, 1):
            raise DataError(f"{where}: page {page} of a {kind}; expected a TIFF or PDF")
        if kind == "PNG":
            with _open(source, where, options) as chunks:
                chunks.verify()  # checksums, which loading passes over
        small, deep = _scaled_size(image.size, options), image.mode[0] in "IF"
        kept = kind in KEPT and small == image.size and not (deep and options.pixel_range == "real")
        if kept and not deep:
            if not decoded:
                # An eighth of the size reads every byte of a JPEG in less time, and finds the same damage: 12,000 files
                # with changed bytes got the same verdict both ways (docs/measurements.md).
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
            return [StoredPicture(source, KEPT[kind])]
        image.draft(None, small)
        stored = _stored(_rgb(image, where, options), KEPT.get(kind, ".png"), options)
        return [StoredPicture(source, KEPT[kind], stored.warning) if kept else stored]


@contextlib.contextmanager
def _damage(what: str) -> Iterator[None]:
    """Report whatever a reader raises as a DataError that starts with `what`."""
    try:
        yield
    except DataError:
        raise
    except _BROKEN as error:
        raise DataError(f"{what}: {error}") from None


def _open(source: bytes | Path, where: str, options: PictureOptions = _STORED) -> Image.Image:
    """The picture before it is decoded, of a size that the options allow."""
    image: Image.Image
    with _damage(f"{where}: cannot be opened as a picture"):
        try:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=READ)
        except UnidentifiedImageError:
            image = _open_other(source, where)
    _check_size(*image.size, where, options)
    return image


def _open_other(source: bytes | Path, where: str) -> Image.Image:
    """A picture of pillow-heif's. Raises DataError with what anything else looks like."""

    def file() -> BinaryIO:
        return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")

    with file() as opened:
        start = opened.read(512)
    known = (text for pattern, text in _SEEN.items() if re.match(pattern, start, re.DOTALL | re.IGNORECASE))
    seen = next(known, "")
    if seen == _HEIF:
        try:
            import pillow_heif
        except ImportError:
            raise DataError(f"{where}: HEIF (HEIC); expected pillow-heif: pip install 'phi3v[heif]'") from None
        pillow_heif.register_heif_opener()
        with contextlib.suppress(UnidentifiedImageError):
            return Image.open(file(), formats=("HEIF",))
    elif not seen:
        with contextlib.suppress(*_BROKEN), file() as opened, Image.open(opened) as image:
            seen = f"{image.format} ({image.format_description})"
    raise DataError(
        f"{where}: not a picture that can be read{seen and f': {seen}'}; expected one of {', '.join(READ)}, HEIF, PDF"
    )


@functools.cache
def picture_suffixes() -> set[str]:
    """Suffixes, in lower case, of files that are pictures by their name."""
    return {".heic", ".heif", ".hif", ".pdf"} | {
        suffix for suffix, kind in Image.registered_extensions().items() if kind in READ
    }


def picture_problem(path: Path) -> str:
    """Why a file whose name does not say so is no picture, by its first bytes; "" if it is one."""
    try:
        with open(path, "rb") as file:
            if not _PDF.match(file.read(512)):
                _open(path, path.name, PictureOptions(max_pixels=1, max_ratio=math.inf)).close()
    except DataError as error:
        return str(error).removeprefix(f"{path.name}: ")
    return ""


def thin_problem(width: float, height: float, max_ratio: float = 336) -> str | None:
    """What is wrong with a size of which the model would see nothing, or None. max_ratio: tile in pixels."""
    if max(width, height) <= max_ratio * min(width, height):
        return None
    return f"{width:g} x {height:g} pixels; expected sides within 1 : {max_ratio:g} (a tile is {max_ratio:g} pixels)"


def _check_size(width: float, height: float, where: str, options: PictureOptions) -> None:
    limit = MAX_PIXELS if options.max_pixels is None else 4 * MAX_PIXELS
    if width * height > limit:
        hint = "; option max_pixels scales larger ones down" if options.max_pixels is None else ""
        raise DataError(f"{where}: {width} x {height} pixels; expected at most {limit} in all{hint}")
    if problem := thin_problem(width, height, options.max_ratio):
        raise DataError(f"{where}: {problem}")


def _scaled_size(size: tuple[int, int], options: PictureOptions) -> tuple[int, int]:
    """The size within option max_pixels."""
    factor = math.sqrt((options.max_pixels or math.inf) / (size[0] * size[1]))
    return size if factor >= 1 else (max(1, int(size[0] * factor)), max(1, int(size[1] * factor)))


def _stored(image: Image.Image, suffix: str, options: PictureOptions) -> StoredPicture:
    """An upright RGB picture, scaled down and encoded."""
    if image.size != (small := _scaled_size(image.size, options)):
        image = image.resize(small, Image.Resampling.LANCZOS, reducing_gap=3)
    buffer = io.BytesIO()
    # Of a photograph, PNG's level 6 takes six times the time and saves a seventh of the bytes.
    image.save(buffer, "JPEG" if suffix == ".jpg" else "PNG", quality=JPEG_QUALITY, compress_level=1)
    return StoredPicture(buffer.getvalue(), suffix, image.info.get("warning", ""))


def _page_numbers(pages: int, page: int | None, where: str) -> range:
    if page is not None and not 1 <= page <= pages:
        raise DataError(f"{where}: page {page}; expected 1 to {pages}")
    if page is None and pages > MAX_PAGES:
        raise DataError(f"{where}: {pages} pages; expected at most {MAX_PAGES}, or a column that names the page")
    return range(pages) if page is None else range(page - 1, page)


def _tiff_pages(
    image: TiffImagePlugin.TiffImageFile, where: str, options: PictureOptions, page: int | None
) -> Iterator[Image.Image]:
    places = []
    for place in range(image.n_frames):
        image.seek(place)
        if not place or not int(image.tag_v2.get(_REDUCED, 0)) & 1:
            places.append(place)
    for number in _page_numbers(len(places), page, where):
        image.seek(places[number])
        _check_size(*image.size, where, options)
        yield _rgb(image, where, options)


def _pdf_pages(data: bytes, where: str, options: PictureOptions, page: int | None) -> Iterator[Image.Image]:
    try:
        import pypdfium2
    except ImportError:
        raise DataError(f"{where}: a PDF; expected pypdfium2 to draw its pages: pip install 'phi3v[pdf]'") from None
    with _damage(f"{where}: a PDF that cannot be drawn"):
        with _PDFIUM:
            document = pypdfium2.PdfDocument(data)
        try:
            with _PDFIUM:
                pages = len(document)
            for number in _page_numbers(pages, page, where):
                with _PDFIUM:
                    width, height = document[number].get_size()  # in 1/72 inch
                    limits = PictureOptions(max_ratio=options.max_ratio)
                    _check_size(width, height, f"{where}: page {number + 1}", limits)
                    scale = min(options.dpi / 72, math.sqrt(MAX_PIXELS / (width * height)))
                    image = document[number].render(scale=scale).to_pil().convert("RGB")
                yield image  # without the lock: whoever encodes the page may fail and never come back
        finally:
            with _PDFIUM:
                document.close()


def _rgb(image: Image.Image, where: str, options: PictureOptions = _STORED) -> Image.Image:
    """The picture as a viewer shows it, in RGB."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        image = _grey(image, where, options)
    elif image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(clear)
    return image.convert("RGB")


def _grey(image: Image.Image, where: str, options: PictureOptions) -> Image.Image:
    """Pixels of 16 or 32 bits as 8; Pillow's own conversion clips at 255, which turns nearly every scan white."""
    pixels, warning = np.asarray(image), ""
    low, high = float(np.nanmin(pixels)), float(np.nanmax(pixels))
    if options.pixel_range == "real" and math.isfinite(high - low):
        scaled = np.nan_to_num((pixels - np.float32(low)) * np.float32(255 / ((high - low) or 1))).round()
    elif image.mode == "F" or low < 0 or high > 65535:
        raise DataError(
            f"{where}: pixels from {low:g} to {high:g}; expected 8 or 16 bits a channel, or option pixel_range: real"
        )
    else:
        scaled = pixels // 256
        if high - low < 2**15:
            warning = (
                f"pixels from {low:g} to {high:g} of 0 to 65535; option pixel_range: real scales by their own range"
            )
    scaled = scaled.astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        scaled[pixels == clear] = 255
    image = Image.fromarray(scaled)
    image.info["warning"] = warning
    return image


def open_rgb(data: bytes | Path, where: str) -> Image.Image:
    """Decode to an upright 8-bit RGB picture. Raises DataError if the picture cannot be decoded whole."""
    with _damage(f"{where}: cannot be decoded"), _open(data, where) as image:
        return _rgb(image, where)


def displayed_size(data: bytes | Path, where: str) -> tuple[int, int]:
    """(width, height) as open_rgb would give it, from the header alone. Raises DataError."""
    with _damage(f"{where}: cannot be opened as a picture"):
        with io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as file:
            if plain := _plain_png_size(file):
                return plain
        with _open(data, where) as image:
            # Of a TIFF Pillow gives the size as displayed, and turns the pixels itself.
            turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size


def _plain_png_size(file: BinaryIO) -> tuple[int, int] | None:
    """(width, height) of a whole PNG in which nothing can turn the picture; None: ask Pillow.

    Pillow decodes all of a PNG to learn its orientation, because it may stand behind the pixels: 60 ms for a page.
    """
    header = file.read(33)
    if len(header) < 33 or header[:8] != b"\x89PNG\r\n\x1a\n" or header[12:16] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", header, 16)
    if not 0 < width * height <= MAX_PIXELS:
        return None
    while len(start := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", start)
        if kind == b"IEND":
            return width, height
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = file.read(min(length, 8))
            kind = b"eXIf" if keyword.lower().startswith((b"exif", b"raw prof", b"xml", b"xmp")) else kind
            length -= len(keyword)
        if kind == b"eXIf":
            return None
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
    return _stored(image, ".jpg", _STORED).data


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
