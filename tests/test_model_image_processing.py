"""Tiles against golden data and against an obvious slow version."""

import hashlib
import math

import numpy as np
import pytest
import torch
from golden.golden_common import image_from_spec, make_image
from golden.helpers import load_arrays, load_json
from PIL import Image

from phi3v.model import Phi3VImageProcessor
from phi3v.model.image_processing import expand_uint8_tiles

CASES = {case["key"]: case for case in load_json("image_processor.json")["cases"]}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def check(pixel_values: torch.Tensor, size, tokens, case: dict, key: str) -> None:
    arrays = load_arrays("image_processor.npz")
    assert list(size) == case["image_size"]
    assert tokens == case["num_img_tokens"]
    assert len(pixel_values) == 1 + case["num_real_crops"]
    assert digest(pixel_values[1:]) == case["sha256_local_f32"]  # bit for bit
    flat = pixel_values[0].flatten()[torch.from_numpy(arrays[f"{key}/gidx"].astype(np.int64))]
    np.testing.assert_allclose(flat.numpy(), arrays[f"{key}/gval"], atol=1e-5, rtol=0)
    some = pixel_values.flatten()[torch.from_numpy(arrays[f"{key}/idx"].astype(np.int64))]
    np.testing.assert_allclose(some.numpy(), arrays[f"{key}/val"], atol=1e-5, rtol=0)
    assert pixel_values[0].double().mean().item() == pytest.approx(case["global_mean"], abs=1e-5)
    assert pixel_values[0].max().item() == pytest.approx(case["global_max"], abs=1e-5)


@pytest.mark.parametrize("key", CASES)
def test_golden_pictures(key):
    case = CASES[key]
    out = Phi3VImageProcessor().preprocess(image_from_spec(case["spec"]), num_crops=case["num_crops"])
    check(out["pixel_values"], out["image_sizes"][0].tolist(), out["num_img_tokens"][0], case, key)
    if case["full"]:
        full = load_arrays("image_processor.npz")[f"{key}/pixel_values_f16"].astype(np.float32)
        np.testing.assert_allclose(out["pixel_values"].numpy(), full[: len(out["pixel_values"])], atol=2e-3, rtol=0)
        assert not full[len(out["pixel_values"]) :].any()  # what was left out is the original's zero tiles


@pytest.mark.parametrize("case", load_json("image_processor.json")["multi"], ids=lambda case: case["key"])
def test_golden_calls_with_several_pictures(case):
    out = Phi3VImageProcessor(num_crops=case["num_crops"])([image_from_spec(spec) for spec in case["specs"]])
    start = 0
    for index, image in enumerate(case["images"]):
        count = 1 + image["num_real_crops"]
        tiles, size = out["pixel_values"][start : start + count], out["image_sizes"][index].tolist()
        check(tiles, size, out["num_img_tokens"][index], image, f"{case['key']}/{index}")
        start += count
    assert start == len(out["pixel_values"])


def slow_tiles(image: Image.Image, num_crops: int, size: int) -> np.ndarray:
    """The published procedure in its own order: transpose, resize, pad, transpose back, normalise, cut."""
    portrait = image.width < image.height
    if portrait:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    scale = max(s for s in range(1, num_crops + 1) if s == 1 or s * math.ceil(s / ratio) <= num_crops)
    new_height = int(scale * size / ratio)
    image = image.resize((scale * size, new_height), Image.Resampling.BILINEAR)
    full = math.ceil(new_height / size) * size
    canvas = Image.new("RGB", (scale * size, full), (255, 255, 255))
    canvas.paste(image, (0, (full - new_height) // 2))
    if portrait:
        canvas = canvas.transpose(Image.Transpose.TRANSPOSE)
    pixels = np.asarray(canvas).astype(np.float32) / np.float32(255)
    mean = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
    std = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
    pixels = ((pixels - mean) / std).transpose(2, 0, 1)
    tiles = [
        pixels[:, top : top + size, left : left + size]
        for top in range(0, pixels.shape[1], size)
        for left in range(0, pixels.shape[2], size)
    ]
    return np.stack(tiles)


@pytest.mark.parametrize(("width", "height", "num_crops", "size"), [(70, 31, 9, 28), (31, 70, 9, 28), (5, 5, 16, 28)])
def test_any_tile_size_against_the_slow_version(width, height, num_crops, size):
    image = make_image(width, height, 3)
    processor = Phi3VImageProcessor(num_crops=num_crops, tile_size=size, num_img_tokens=4)
    out = processor(image)
    np.testing.assert_array_equal(out["pixel_values"][1:].numpy(), slow_tiles(image, num_crops, size))
    assert out["num_img_tokens"] == [processor.tokens_of_picture(width, height)]


def test_bytes_give_the_same_tiles():
    processor = Phi3VImageProcessor(num_crops=6)
    images = [make_image(500, 300, 1), make_image(200, 640, 2)]
    plain, small = processor(images), processor(images, as_uint8=True)
    assert small["pixel_values"].dtype == torch.uint8
    expanded = expand_uint8_tiles(small["pixel_values"], small["image_sizes"])
    torch.testing.assert_close(expanded, plain["pixel_values"], atol=0, rtol=0)


def test_num_crops_may_change_at_any_time():
    processor = Phi3VImageProcessor(num_crops=16)
    processor.num_crops = 1
    assert processor(make_image(64, 64))["num_img_tokens"] == [313]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([make_image(9, 9), make_image(400, 1)], r"image 1: image of 400x1 pixels: scaled to 336x0 with num_crops=1"),
        ([np.zeros((9, 9, 3))], "image 0: got ndarray; expected a PIL image"),
        ([], "an empty list"),
    ],
)
def test_refusals(images, message):
    with pytest.raises(ValueError, match=message):
        Phi3VImageProcessor(num_crops=1)(images)


def test_saved_file_has_the_published_keys(tmp_path):
    Phi3VImageProcessor(num_crops=16).save_pretrained(tmp_path)
    again = Phi3VImageProcessor.from_pretrained(tmp_path)
    assert again.num_crops == 16
    assert Phi3VImageProcessor.from_pretrained(tmp_path, num_crops=2).num_crops == 2
    assert set(again.to_dict()) == {
        "auto_map", "do_convert_rgb", "image_mean", "image_processor_type", "image_std", "num_crops", "num_img_tokens",
        "processor_class",
    }  # fmt: skip
