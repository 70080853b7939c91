"""Pictures of every kind that people have, and of the kinds that must not get in."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
from data_examples import picture_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from phi3v.data.conversations import DataError
from phi3v.data.pictures import PictureOptions, StoredPicture, displayed_size, open_rgb, read_pictures, sample_frames


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(data: bytes | Path, where: str = "x", **options: object) -> StoredPicture:
    (stored,) = read_pictures(data, where, PictureOptions(**options))
    return stored


def kept(data: bytes, **options: object) -> bool:
    return read(data, **options).data == data


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises many pixels and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = zlib.compress(b"\0" * 1000)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


KINDS = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_stored_as_it_opens(kind: str) -> None:
    data = picture_bytes(1, kind)
    image = open_rgb(data, "x")
    assert image.mode == "RGB"
    assert image.size == (40, 30)
    stored = read(data)
    assert (stored.data == data) == (kind in ("JPEG", "PNG"))
    assert Image.open(io.BytesIO(stored.data)).format == ("JPEG" if stored.suffix == ".jpg" else "PNG")
    assert open_rgb(stored.data, "x").tobytes() == image.tobytes()


def test_modes_come_out_as_a_viewer_shows_them() -> None:
    cmyk = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert open_rgb(cmyk, "x").getpixel((4, 4))[0] > 200
    palette = encoded(Image.new("RGB", (8, 8), (10, 200, 30)).convert("P"), "PNG")
    assert open_rgb(palette, "x").getpixel((0, 0))[1] > 150
    one_bit = encoded(Image.new("1", (8, 8), 1), "PNG")
    assert open_rgb(one_bit, "x").getpixel((0, 0)) == (255, 255, 255)


def test_a_frame_that_was_encoded_here_is_not_decoded_again_but_keeps_to_the_limits() -> None:
    cut = picture_bytes(1, "JPEG", (400, 300))[:-2000]
    (stored,) = read_pictures(cut, "x", decoded=True)
    assert stored == StoredPicture(cut, ".jpg")
    with pytest.raises(DataError, match="damaged or truncated JPEG"):
        read_pictures(cut, "x")
    thin = encoded(Image.new("RGB", (2, 1000)), "JPEG")
    with pytest.raises(DataError, match="2 x 1000 pixels"):
        read_pictures(thin, "x", decoded=True)


def test_16_bit_grey_keeps_its_shades() -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16)[:, None].repeat(16, 1)
    grey = np.asarray(open_rgb(encoded(Image.fromarray(ramp), "PNG"), "x"))[:, 0, 0]
    assert grey.tolist() == (ramp[:, 0] // 256).tolist()


def test_transparency_stands_on_white() -> None:
    logo = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    logo.paste((0, 0, 0, 255), (0, 0, 4, 8))
    logo.putpixel((7, 7), (0, 0, 0, 128))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    palette.info["transparency"] = 1
    for picture in (logo, logo.convert("LA"), palette):
        seen = open_rgb(encoded(picture, "PNG"), "x")
        assert seen.getpixel((6, 2)) == (255, 255, 255)
    assert open_rgb(encoded(logo, "PNG"), "x").getpixel((2, 2)) == (0, 0, 0)
    assert open_rgb(encoded(logo, "PNG"), "x").getpixel((7, 7)) == (127, 127, 127)


def test_12_bits_in_a_16_bit_file_are_scaled_by_their_range_when_asked() -> None:
    xray = encoded(Image.fromarray(np.linspace(100, 4095, 64, dtype=np.uint16).reshape(8, 8)), "PNG")
    plain = read(xray)
    assert plain.data == xray
    assert "from 100 to 4095" in plain.warning and "pixel_range: real" in plain.warning
    assert open_rgb(plain.data, "x").getextrema()[0] == (0, 15)
    scaled = read(xray, pixel_range="real")
    assert scaled.warning == ""
    assert open_rgb(scaled.data, "x").getextrema()[0] == (0, 255)
    floats = encoded(Image.fromarray(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF")
    with pytest.raises(DataError, match=r"x: got pixels from -1 to 1; .* option pixel_range: real"):
        read(floats)
    assert open_rgb(read(floats, pixel_range="real").data, "x").getextrema()[0] == (0, 255)


def test_a_stream_whose_checksums_are_right_is_decoded_too() -> None:
    plain = encoded(Image.effect_noise((64, 64), 80), "PNG")
    start = plain.index(b"IDAT") - 4
    (length,) = struct.unpack_from(">I", plain, start)
    body = bytearray(plain[start + 8 : start + 8 + length])
    body[length // 2 : length // 2 + 40] = bytes(40)
    chunk = b"IDAT" + bytes(body)
    damaged = plain[: start + 4] + chunk + struct.pack(">I", zlib.crc32(chunk)) + plain[start + 12 + length :]
    with pytest.raises(DataError, match="row 1: damaged or truncated PNG"):
        read(damaged, "row 1")


def test_pages_of_a_tiff_and_of_a_pdf() -> None:
    sheets = [Image.new("RGB", (40, 60), colour) for colour in ("red", "green", "blue")]
    for kind in ("TIFF", "PDF"):
        data = encoded(sheets[0], kind, save_all=True, append_images=sheets[1:])
        colours = [open_rgb(page.data, "x").getpixel((10, 10)) for page in read_pictures(data, "x")]
        assert [max(range(3), key=colour.__getitem__) for colour in colours] == [0, 1, 2]
        (second,) = read_pictures(data, "x", page=2)
        assert open_rgb(second.data, "x").getpixel((10, 10)) == colours[1]
        with pytest.raises(DataError, match="x: got page 4; expected 1 to 3"):
            read_pictures(data, "x", page=4)
    with pytest.raises(DataError, match="page 2 of a PNG; expected a TIFF or PDF"):
        read_pictures(picture_bytes(1, "PNG"), "x", page=2)


def test_a_page_that_cannot_be_stored_keeps_no_other_thread_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (40, 60), "red"), "PDF")

    def fail(*arguments: object) -> None:
        raise MemoryError

    with ThreadPoolExecutor(2) as pool:
        with monkeypatch.context() as patch:
            patch.setattr("phi3v.data.pictures._stored", fail)
            failed = pool.submit(read_pictures, data, "x")
            assert isinstance(failed.exception(), MemoryError)  # its traceback keeps the frames of the reader
        try:
            for _ in range(2):
                assert len(pool.submit(read_pictures, data, "x").result(timeout=10)) == 1
        finally:
            del failed


def test_a_picture_over_the_limit_is_scaled_down_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi3v.data.pictures.MAX_PIXELS", 5000)
    for kind, suffix in (("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".png")):
        data = picture_bytes(1, kind, (120, 90))
        with pytest.raises(DataError, match=r"120 x 90 pixels; expected at most 5000 pixels in total; .*max_pixels"):
            read(data)
        stored = read(data, max_pixels=3000)
        assert stored.suffix == suffix
        assert open_rgb(stored.data, "x").size == (63, 47)


def test_a_long_text_is_no_reason_to_refuse_a_png() -> None:
    text = (b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 2_000_000))
    assert kept(png_with(Image.new("RGB", (8, 8)), [text], False))


def test_heic_opens_and_its_damage_and_a_missing_reader_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()
    (tmp_path / "x.heic").write_bytes(encoded(Image.new("RGB", (64, 48), "red"), "HEIF"))
    assert open_rgb(read(tmp_path / "x.heic").data, "x").size == (64, 48)
    (tmp_path / "cut.heic").write_bytes((tmp_path / "x.heic").read_bytes()[:28] + bytes(90))
    with pytest.raises(DataError, match=r"row 1: cut.heic: .*HEIF"):
        read(tmp_path / "cut.heic", "row 1")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(DataError, match=r"pip install -e '\.\[heif\]'"):
        read(tmp_path / "x.heic")
    with pytest.raises(DataError, match=r"pip install -e '\.\[pdf\]'"):
        read(b"%PDF-1.7")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a failed download"),
        (bytes(128) + b"DICM", "DICOM"),
        (b"PK\3\4" + bytes(40), "an archive"),
        (b"\x1aE\xdf\xa3" + bytes(40), "a video"),
    ],
)
def test_what_is_no_picture_is_called_by_its_name(data: bytes, expected: str) -> None:
    with pytest.raises(DataError, match=f"not a readable picture: .*{expected}"):
        read(data)


def clip(path: Path, frames: int = 16) -> Path:
    """A clip of 96 x 64 whose left half is white."""
    with av.open(str(path), "w", format={".m4v": "mp4", ".wmv": "asf"}.get(path.suffix)) as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        pixels = np.zeros((64, 96, 3), np.uint8)
        pixels[:, :48] = 255
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return path


def test_a_clip_is_known_by_its_content_and_follows_its_display_matrix(tmp_path: Path) -> None:
    for suffix in (".m4v", ".wmv", ".mkv"):
        assert open_rgb(sample_frames(clip(tmp_path / f"a{suffix}"))[0], "x").size == (96, 64)
    whole = clip(tmp_path / "a.mp4").read_bytes()
    one, upright = struct.pack(">i", 1 << 16), struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = bytes(4) + one + bytes(4) + struct.pack(">i", -(1 << 16)) + bytes(16) + struct.pack(">i", 1 << 30)
    track = whole.index(b"tkhd")
    place = whole.index(upright, track)
    (tmp_path / "turned.mp4").write_bytes(whole[:place] + turned + whole[place + 36 :])
    frame = open_rgb(sample_frames(tmp_path / "turned.mp4")[0], "x")
    assert frame.size == (64, 96)
    assert frame.getpixel((32, 10))[0] > 200 > 50 > frame.getpixel((32, 85))[0]  # left became the top
    (tmp_path / "cut.mp4").write_bytes(whole[: whole.index(b"moov")])
    with pytest.raises(DataError, match=r"cut.mp4: cannot be decoded: truncated, damaged, or not a video"):
        sample_frames(tmp_path / "cut.mp4")
    (tmp_path / "a.png").write_bytes(picture_bytes(1, "PNG"))
    with pytest.raises(DataError, match=r"a.png: not a video; expected AVI"):
        sample_frames(tmp_path / "a.png")


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_rgb(data, "x").getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees to see it upright
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))
    seen = open_rgb(encoded(image, "PNG", exif=exif), "x")
    assert seen.size == (20, 40)
    assert seen.getpixel((10, 5)) == (0, 0, 0)
    assert seen.getpixel((10, 35)) == (255, 255, 255)


def png_with(image: Image.Image, chunks: list[tuple[bytes, bytes]], behind: bool) -> bytes:
    """A PNG with further chunks before or behind its pixels."""
    plain = encoded(image, "PNG")
    place = plain.index(b"IEND") - 4 if behind else plain.index(b"IDAT") - 4
    made = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return plain[:place] + b"".join(made) + plain[place:]


def turning_chunks() -> dict[str, tuple[bytes, bytes]]:
    """What can say in a PNG that a picture lies on its side, in every way Pillow reads."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = exif.tobytes().removeprefix(b"Exif\0\0")
    profile = f"\nexif\n{len(data) + 6:8}\n{(b'Exif' + bytes(2) + data).hex()}\n".encode()
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    return {
        "exif": (b"eXIf", data),
        "profile": (b"tEXt", b"Raw profile type exif\0" + profile),
        "packed profile": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
        "xmp": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    }


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind", [*turning_chunks(), "other text", "nothing"])
def test_the_size_from_the_header_is_the_opened_pictures(kind: str, behind: bool, tmp_path: Path) -> None:
    chunks = {**turning_chunks(), "other text": (b"tEXt", b"Software\0a scanner"), "nothing": (b"tIME", bytes(7))}
    data = png_with(Image.new("RGB", (40, 20), "white"), [chunks[kind]], behind)
    (tmp_path / "a.png").write_bytes(data)
    opened = open_rgb(data, "x").size
    assert displayed_size(data, "x") == displayed_size(tmp_path / "a.png", "x") == opened
    if kind in ("exif", "packed profile", "other text", "nothing"):
        assert opened == ((20, 40) if kind in turning_chunks() else (40, 20))


def test_the_size_of_a_png_needs_no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (400, 300)), "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    assert displayed_size(data, "x") == (400, 300)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_every_kind(kind: str) -> None:
    assert displayed_size(picture_bytes(1, kind), "x") == (40, 30)
    if kind in ("JPEG", "WEBP", "TIFF", "AVIF"):
        exif = Image.Exif()
        exif[0x0112] = 8
        data = encoded(Image.new("RGB", (40, 20)), kind, exif=exif)
        assert displayed_size(data, "x") == open_rgb(data, "x").size


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "not a readable picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable picture"),
        (png_header(60_000, 60_000), "pixels"),
        (png_header(10_000, 10_000), "10000 x 10000 pixels; expected at most"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_picture_or_a_bomb_is_refused(data: bytes, expected: str) -> None:
    for action in (read, open_rgb):
        with pytest.raises(DataError, match=expected) as error:
            action(data, "row 7")
        assert str(error.value).startswith("row 7: ")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.99])
def test_truncation_is_seen(kind: str, part: float) -> None:
    data = picture_bytes(3, kind, (120, 90))
    data = data[: int(len(data) * part)]
    for action in (read, open_rgb):
        with pytest.raises(DataError):
            action(data, "x")


def test_the_end_mark_of_a_thumbnail_is_not_the_pictures() -> None:
    thumbnail = picture_bytes(2, "JPEG", (16, 12))
    whole = picture_bytes(1, "JPEG")
    inside = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 8) + b"Exif\0\0" + thumbnail
    photograph = whole[:2] + inside + whole[2:]
    assert read(photograph).data == photograph
    assert kept(photograph + b"some camera's padding")
    with pytest.raises(DataError, match="damaged or truncated JPEG"):
        read(photograph[: -len(whole) // 3])


@pytest.mark.parametrize("size", [(4000, 1), (1, 337), (673, 2)])
def test_what_is_too_thin_for_a_tile_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=f"{size[0]} x {size[1]} pixels; expected sides within 1 : 336"):
        read(picture_bytes(1, "PNG", size))
    assert kept(picture_bytes(1, "PNG", (336, 1)))
    assert kept(picture_bytes(1, "PNG", size), max_ratio=4000)


def test_a_flipped_byte_in_a_png_is_seen() -> None:
    data = bytearray(picture_bytes(3, "PNG"))
    data[len(data) // 2] ^= 0x40
    with pytest.raises(DataError, match=r"damaged or truncated.*checksum"):
        read(bytes(data))


def test_pixels_that_do_not_decode_are_refused() -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        open_rgb(png_header(3000, 3000), "x")


def test_a_one_pixel_thin_picture_opens() -> None:
    assert open_rgb(encoded(Image.new("RGB", (500, 1)), "PNG"), "x").size == (500, 1)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
)
def test_damaged_pictures_open_or_are_a_data_error(kind: str, damage: list[tuple[float, int]]) -> None:
    data = bytearray(picture_bytes(5, kind))
    for place, value in damage:
        data[int(place * (len(data) - 1))] = value
    for action in (read, open_rgb):
        # Any other exception fails the test.
        with contextlib.suppress(DataError):
            action(bytes(data), "x")


def test_a_file_that_is_not_there_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        open_rgb(tmp_path / "none.png", "x")
