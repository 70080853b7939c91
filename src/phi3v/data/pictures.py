"""Reads pictures and frames of clips: which formats are accepted, how pictures are stored, and how they are opened.

`read_pictures` decodes a source picture completely before it enters a data folder, so training never meets an
unreadable picture. JPEG and PNG keep their bytes. Everything else is stored as PNG. `open_rgb` returns what an image
viewer shows: upright according to EXIF, the first frame of an animation, transparent areas on white, three channels of
8 bits. The published processor drops the transparency instead, which reveals the colours under it (mostly black). vLLM
puts RGBA pictures on white, and drops the transparency of other modes.
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
"""Formats whose bytes are kept, and their suffix. (MPO is a JPEG with additional pictures at its end.)"""

READ = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Formats that Pillow may open: no vector formats, and none that run other programs. HEIF and PDF need extras."""

MAX_PIXELS = 89_478_485
"""Largest number of pixels without option max_pixels (Pillow's own limit)."""

MAX_FILE_BYTES = 256 * 2**20
"""Largest size of an encoded picture, checked before reading."""

MAX_PAGES = 100
"""Most pages of one TIFF or PDF. With 2,500 tokens per page, the model's context ends earlier."""

JPEG_QUALITY = 95
"""JPEG quality of clip frames: no visible difference, at a tenth of PNG's size."""

MAX_FRAMES = 1_000_000
"""Most frames of a clip: nine hours at 30 frames per second."""

# Pillow warns above its limit and rejects above twice its limit. MAX_PIXELS is checked here instead. Pictures that are
# scaled down can have up to four times as many pixels.
Image.MAX_IMAGE_PIXELS = 2 * MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Large text chunks (an embedded workflow, a colour table) are allowed in PNG. Their total size stays limited.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

_BROKEN = (
    OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError,
    EOFError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""Exceptions of Pillow's readers for damaged or malicious files. All have the same meaning here."""

_ORIENTATION = 0x0112
"""EXIF tag of the orientation. Values 5 to 8 rotate the picture by 90 degrees."""

_REDUCED = 0x00FE
"""TIFF tag whose first bit marks a smaller copy of another page."""

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
"""Start of a file that no reader supports, and the description in the error message."""

_VIDEO_OPTIONS = {"format_whitelist": "avi,mov,matroska,webm,asf,mpeg,mpegts,mpegvideo,m4v,flv,ogg,gif,ivf,mxf"}
"""FFmpeg's demuxers for clips: no playlists, which name other files, and no pictures or texts."""

_TURNS = {
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""Signs of a display matrix's a, b, c, d (x' = a x + c y, y' = b x + d y) to the operation that turns a frame
upright."""

_PDFIUM = threading.RLock()
"""Lock for PDFium, which is not thread-safe. Reentrant, because garbage collection may close a document meanwhile."""


@dataclass(frozen=True, slots=True)
class PictureOptions:
    """Options for reading the pictures of a source."""

    pixel_range: Literal["full", "real"] = "full"
    """Range of 16-bit grey pixels that maps to 0 to 255: all 16 bits, or the picture's smallest to largest value."""
    max_pixels: int | None = None
    """Scale larger pictures down to this many pixels. None: reject those above MAX_PIXELS."""
    dpi: int = 150
    """Resolution of PDF pages in dots per inch."""
    max_ratio: float = 336
    """Largest ratio of the longest to the shortest side: a tile's pixels, because a thinner picture can vanish in a
    tile."""


_STORED = PictureOptions(max_ratio=math.inf)
"""Options for pictures of a data folder, which were already checked."""


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """A picture in a data folder, already decoded once."""

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
    """The pictures of an encoded file: all pages of a TIFF or PDF, or only page `page` (from 1). Other formats have
    one.

    decoded: this package encoded the JPEG, so only its header is read. Raises DataError that names the file, its format
    and the problem: not a picture, damaged or truncated, or too many pixels.
    """
    if isinstance(source, Path):
        where = where if source.name in where else f"{where}: {source.name}"
        if (size := source.stat().st_size) > MAX_FILE_BYTES:
            raise DataError(f"{where}: got {size} bytes; expected at most {MAX_FILE_BYTES}")
        source = source.read_bytes()
    if _PDF.match(source):
        return [_stored(image, ".png", options) for image in _pdf_pages(source, where, options, page)]
    with _open(source, where, options) as image, _damage(f"{where}: damaged or truncated {image.format}"):
        kind = image.format or ""
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            return [_stored(one, ".png", options) for one in _tiff_pages(image, where, options, page)]
        if page not in (None, 1):
            raise DataError(f"{where}: got page {page} of a {kind}; expected a TIFF or PDF, or no page")
        if kind == "PNG":
            with _open(source, where, options) as chunks:
                chunks.verify()  # checks the checksums, which loading ignores
        small, deep = _scaled_size(image.size, options), image.mode[0] in "IF"
        kept = kind in KEPT and small == image.size and not (deep and options.pixel_range == "real")
        if kept and not deep:
            if not decoded:
                # Decoding at an eighth of the size reads every byte of a JPEG in less time and finds the same damage:
                # 12,000 files with changed bytes gave the same result both ways (docs/measurements.md).
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
            return [StoredPicture(source, KEPT[kind])]
        image.draft(None, small)
        stored = _stored(_rgb(image, where, options), KEPT.get(kind, ".png"), options)
        return [StoredPicture(source, KEPT[kind], stored.warning) if kept else stored]


@contextlib.contextmanager
def _damage(what: str) -> Iterator[None]:
    """Converts any exception of a reader to a DataError that starts with `what`."""
    try:
        yield
    except DataError:
        raise
    except _BROKEN as error:
        raise DataError(f"{what}: {error}") from None


def _open(source: bytes | Path, where: str, options: PictureOptions = _STORED) -> Image.Image:
    """The picture before decoding, with its size checked against the options."""
    image: Image.Image
    with _damage(f"{where}: cannot be opened as a picture"):
        try:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=READ)
        except UnidentifiedImageError:
            image = _open_other(source, where)
    _check_size(*image.size, where, options)
    return image


def _open_other(source: bytes | Path, where: str) -> Image.Image:
    """A picture read by pillow-heif. Otherwise raises DataError that describes the file."""

    def file() -> BinaryIO:
        return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")

    with file() as opened:
        start = opened.read(512)
    descriptions = (text for pattern, text in _SEEN.items() if re.match(pattern, start, re.DOTALL | re.IGNORECASE))
    seen = next(descriptions, "")
    if seen == _HEIF:
        try:
            import pillow_heif
        except ImportError:
            raise DataError(f"{where}: HEIF (HEIC) requires pillow-heif; run: pip install -e '.[heif]'") from None
        pillow_heif.register_heif_opener()
        with contextlib.suppress(UnidentifiedImageError):
            return Image.open(file(), formats=("HEIF",))
    elif not seen:
        with contextlib.suppress(*_BROKEN), file() as opened, Image.open(opened) as image:
            seen = f"{image.format} ({image.format_description})"
    raise DataError(
        f"{where}: not a readable picture{seen and f': {seen}'}; expected one of {', '.join(READ)}, HEIF, PDF"
    )


@functools.cache
def picture_suffixes() -> set[str]:
    """Suffixes of picture files, in lower case."""
    return {".heic", ".heif", ".hif", ".pdf"} | {
        suffix for suffix, kind in Image.registered_extensions().items() if kind in READ
    }


def picture_problem(path: Path) -> str:
    """Why a file without a picture suffix is not a picture, from its first bytes. "" if it is one."""
    try:
        with open(path, "rb") as file:
            if not _PDF.match(file.read(512)):
                _open(path, path.name, PictureOptions(max_pixels=1, max_ratio=math.inf)).close()
    except DataError as error:
        return str(error).removeprefix(f"{path.name}: ")
    return ""


def thin_problem(width: float, height: float, max_ratio: float = 336) -> str | None:
    """The problem of a picture so thin that the model would see nothing, or None. max_ratio: tile side in pixels."""
    if max(width, height) <= max_ratio * min(width, height):
        return None
    return f"{width:g} x {height:g} pixels; expected sides within 1 : {max_ratio:g}, the side of a tile in pixels"


def _check_size(width: float, height: float, where: str, options: PictureOptions) -> None:
    limit = MAX_PIXELS if options.max_pixels is None else 4 * MAX_PIXELS
    if width * height > limit:
        hint = "; to scale larger ones down, set option max_pixels" if options.max_pixels is None else ""
        raise DataError(f"{where}: {width} x {height} pixels; expected at most {limit} pixels in total{hint}")
    if problem := thin_problem(width, height, options.max_ratio):
        raise DataError(f"{where}: {problem}")


def _scaled_size(size: tuple[int, int], options: PictureOptions) -> tuple[int, int]:
    """The size after scaling to option max_pixels."""
    factor = math.sqrt((options.max_pixels or math.inf) / (size[0] * size[1]))
    return size if factor >= 1 else (max(1, int(size[0] * factor)), max(1, int(size[1] * factor)))


def _stored(image: Image.Image, suffix: str, options: PictureOptions) -> StoredPicture:
    """Scales down and encodes an upright RGB picture."""
    if image.size != (small := _scaled_size(image.size, options)):
        image = image.resize(small, Image.Resampling.LANCZOS, reducing_gap=3)
    buffer = io.BytesIO()
    # For a photograph, PNG level 6 takes six times as long and saves a seventh of the bytes.
    image.save(buffer, "JPEG" if suffix == ".jpg" else "PNG", quality=JPEG_QUALITY, compress_level=1)
    return StoredPicture(buffer.getvalue(), suffix, image.info.get("warning", ""))


def _page_numbers(pages: int, page: int | None, where: str) -> range:
    if page is not None and not 1 <= page <= pages:
        raise DataError(f"{where}: got page {page}; expected 1 to {pages}")
    if page is None and pages > MAX_PAGES:
        raise DataError(f"{where}: got {pages} pages; expected at most {MAX_PAGES}, or a column `page`")
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
        raise DataError(f"{where}: a PDF requires pypdfium2; run: pip install -e '.[pdf]'") from None
    with _damage(f"{where}: a PDF that cannot be rendered"):
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
                yield image  # outside the lock, because the caller may fail and never resume this generator
        finally:
            with _PDFIUM:
                document.close()


def _rgb(image: Image.Image, where: str, options: PictureOptions = _STORED) -> Image.Image:
    """The picture in RGB, as an image viewer shows it."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)  # this and the test below avoid two copies
    if image.mode[0] in "IF":
        image = _grey(image, where, options)
    elif image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(clear)
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(image: Image.Image, where: str, options: PictureOptions) -> Image.Image:
    """Converts pixels of 16 or 32 bits to 8. Pillow's own conversion clips at 255, which makes most scans white."""
    pixels, warning = np.asarray(image), ""
    low, high = float(np.nanmin(pixels)), float(np.nanmax(pixels))
    if options.pixel_range == "real" and math.isfinite(high - low):
        scaled = np.nan_to_num((pixels - np.float32(low)) * np.float32(255 / ((high - low) or 1))).round()
    elif image.mode == "F" or low < 0 or high > 65535:
        raise DataError(
            f"{where}: got pixels from {low:g} to {high:g}; expected 8 or 16 bits per channel, or option pixel_range: "
            "real"
        )
    else:
        scaled = pixels // 256
        if high - low < 2**15:
            warning = (
                f"pixels from {low:g} to {high:g} of 0 to 65535; to scale by their own range, set option pixel_range: "
                "real"
            )
    scaled = scaled.astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        scaled[pixels == clear] = 255
    image = Image.fromarray(scaled)
    image.info["warning"] = warning
    return image


def open_rgb(data: bytes | Path, where: str) -> Image.Image:
    """Decodes to an upright 8-bit RGB picture. Raises DataError if the picture cannot be decoded completely."""
    with _damage(f"{where}: cannot be decoded"), _open(data, where) as image:
        return _rgb(image, where)


def displayed_size(data: bytes | Path, where: str) -> tuple[int, int]:
    """(width, height) of open_rgb's result, from the header alone. Raises DataError."""
    with _damage(f"{where}: cannot be opened as a picture"):
        with io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as file:
            if plain := _plain_png_size(file):
                return plain
        with _open(data, where) as image:
            # For TIFF, Pillow returns the displayed size and rotates the pixels itself.
            turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size


def _plain_png_size(file: BinaryIO) -> tuple[int, int] | None:
    """(width, height) of a complete PNG without orientation metadata. None: use Pillow.

    Pillow decodes a whole PNG to read its orientation, which may come after the pixels. This takes 60 ms per page.
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
    """The recipe's selection of frames: arange(0, n, n / 8), truncated."""
    return [int(index) for index in np.arange(0, total, total / wanted)[:wanted]]


def sample_frames(path: Path, wanted: int = 8) -> list[bytes]:
    """JPEG bytes of `wanted` frames, spread evenly over a clip from its first frame.

    Raises DataError if the clip does not decode or has too few frames. Counts decoded frames instead of trusting the
    header: a correct header takes one pass, a wrong one two.
    """
    import av

    try:
        with av.open(str(path), options=_VIDEO_OPTIONS) as container:
            if not container.streams.video:
                raise DataError(f"{path}: got no video stream; expected a video")
            total = container.streams.video[0].frames
        for _ in range(2):
            indices = frame_indices(total, wanted) if total >= wanted else []
            promised, (total, frames) = total, _decode(path, set(indices))
            if total < wanted:
                raise DataError(f"{path}: got {total} frames; expected at least {wanted}")
            if total == promised:
                return [frames[index] for index in indices]
        raise DataError(f"{path}: got {total} frames in a second pass; expected {promised}, as in the first")
    except DataError:
        raise
    except av.InvalidDataError:
        raise DataError(f"{path}: cannot be decoded: truncated, damaged, or not a video") from None
    except av.ArgumentError:
        raise DataError(f"{path}: not a video; expected AVI, MP4, MOV, Matroska, WebM, WMV, MPEG, FLV or Ogg") from None
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise DataError(f"{path}: cannot be decoded: {error}") from None


def _upright_jpeg(frame: av.VideoFrame) -> bytes:
    image = frame.to_image()
    matrix = cast("bytes | None", frame.side_data.get("DISPLAYMATRIX"))  # a buffer, which PyAV's types do not declare
    if matrix:
        a, b, _, c, d, *_ = np.sign(np.frombuffer(matrix, np.int32)).tolist()
        if turn := _TURNS.get((a, b, c, d)):
            image = image.transpose(turn)
    return _stored(image, ".jpg", _STORED).data


def _decode(path: Path, keep: set[int]) -> tuple[int, dict[int, bytes]]:
    """(number of frames, JPEG bytes of those in `keep`)."""
    import av

    frames: dict[int, bytes] = {}
    total = 0
    with av.open(str(path), options=_VIDEO_OPTIONS) as container:
        # One thread per clip, because the converter processes clips in parallel.
        container.streams.video[0].thread_count = 1
        for frame in container.decode(video=0):
            if total in keep:
                frames[total] = _upright_jpeg(frame)
            total += 1
            if total > MAX_FRAMES:
                raise DataError(f"{path}: got more than {MAX_FRAMES} frames; expected a shorter clip")
    return total, frames
