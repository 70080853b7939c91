"""The one rule for tiles and image tokens: against the published procedure, golden sizes and the image processor."""

import math
import random
from pathlib import Path

import numpy as np
import pytest

from phi3v.planning.geometry import num_image_tokens, tile_layout

GOLDEN = Path(__file__).parent / "golden"


def published_canvas(width, height, num_crops):
    """(width, height) of the padded canvas and its image tokens, in the published processor's own steps."""
    transposed = width < height
    if transposed:
        width, height = height, width
    ratio = width / height
    scale = 1
    while scale * math.ceil(scale / ratio) <= num_crops:
        scale += 1
    scale -= 1
    width = scale * 336
    height = int(width / ratio)
    height = math.ceil(height / 336) * 336
    if transposed:
        width, height = height, width
    return width, height, (height // 336 * (width // 336) + 1) * 144 + 1 + (height // 336 + 1) * 12


def canvas(width, height, num_crops):
    layout = tile_layout(width, height, num_crops)
    tokens = num_image_tokens(layout.tiles_down, layout.tiles_across)
    return 336 * layout.tiles_across, 336 * layout.tiles_down, tokens


def test_200_000_random_sizes_and_crop_numbers():
    draw = random.Random(7)
    wrong = []
    for number in range(200_000):
        # Half of the sizes are uniform, as photographs and pages are; half reach from one pixel to very long strips.
        size = (
            [draw.randint(1, 6000) for _ in range(2)]
            if number % 2
            else [round(math.exp(draw.uniform(0, math.log(20_000)))) for _ in range(2)]
        )
        num_crops = draw.randint(1, 40)
        if canvas(*size, num_crops) != published_canvas(*size, num_crops):
            wrong.append((*size, num_crops))
    assert wrong == []


@pytest.mark.parametrize(
    ("width", "height", "num_crops", "down", "across"),
    [
        # The grid's limits allow 4 x 4 tiles; scaled and truncated, the short side needs 3.
        (2169, 2890, 16, 4, 3),
        (2890, 2169, 16, 3, 4),
        (400, 1, 1, 0, 1),
    ],
)
def test_rows_of_tiles_follow_from_the_scaled_pixels(width, height, num_crops, down, across):
    layout = tile_layout(width, height, num_crops)
    assert (layout.tiles_down, layout.tiles_across) == (down, across)


def test_golden_size_sweep():
    sweep = np.load(GOLDEN / "image_size_sweep.npz")
    sizes = [sweep[name].tolist() for name in ("width", "height", "num_crops")]
    found = [canvas(*size) for size in zip(*sizes, strict=True)]
    golden = zip(*(sweep[name].tolist() for name in ("hd_width", "hd_height", "num_img_tokens")), strict=True)
    assert found == list(golden)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((0, 5, 4), "image size: got 0x5; expected at least 1x1 pixels"),
        ((5, 5, 0), "num_crops: got 0; expected at least 1"),
    ],
)
def test_refusals(size, message):
    with pytest.raises(ValueError, match=message):
        tile_layout(*size)


@pytest.mark.parametrize(
    "shape", [(1700, 2200), (320, 240), (1000, 100), (640, 640), (3, 3), (900, 1300), (2169, 2890)]
)
@pytest.mark.parametrize("num_crops", [1, 4, 16])
def test_the_image_processor_cuts_these_tiles(shape, num_crops):
    pytest.importorskip("torch")
    from PIL import Image

    from phi3v.model.image_processing import Phi3VImageProcessor

    picture = Image.fromarray(np.zeros((shape[1], shape[0], 3), dtype=np.uint8))
    made = Phi3VImageProcessor(num_crops=num_crops)(picture, return_tensors="pt")
    _, _, down, across = tile_layout(*shape, num_crops)
    assert made["pixel_values"].reshape(-1, 3, 336, 336).shape[0] == down * across + 1
    assert [value // 336 for value in made["image_sizes"][0].tolist()] == [down, across]
    assert made["num_img_tokens"] == [num_image_tokens(down, across)]
