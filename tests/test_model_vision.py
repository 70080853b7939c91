"""The merge of tiles to image features against an obvious slow version."""

import pytest
import torch
from golden.golden_common import make_image
from golden.helpers import tiny_model, tiny_processor

import phi3v.model.vision as vision_module
from phi3v.model.vision import gather_index


def slow_features(vision, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
    """Picture by picture, tile by tile, row by row."""
    size, grid = vision.config.tile_size, vision.config.tile_grid

    def merged(tile: torch.Tensor) -> torch.Tensor:
        """[3, S, S] to [g, g, 4C]: patches two by two, row, column, channel."""
        patches = vision.img_processor.vision_model(tile[None])[0].view(2 * grid, 2 * grid, -1)
        rows = [
            torch.stack([patches[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten() for c in range(grid)])
            for r in range(grid)
        ]
        return torch.stack(rows)

    sequence, start = [], 0
    for height, width in image_sizes.tolist():
        down, across = height // size, width // size
        tiles = [merged(tile) for tile in pixel_values[start : start + 1 + down * across]]
        start += len(tiles)
        for r in range(down):
            for line in range(grid):
                sequence += [token for c in range(across) for token in tiles[1 + r * across + c][line]]
                sequence.append(vision.sub_GN.flatten())
        sequence.append(vision.glb_GN.flatten())
        for line in range(grid):
            sequence += [*tiles[0][line], vision.sub_GN.flatten()]
    return vision.img_projection(torch.stack(sequence))


def batch():
    images = [make_image(60, 30, 1), make_image(28, 28, 2), make_image(30, 100, 3)]
    return tiny_processor().image_processor(images, num_crops=9)


def test_against_the_slow_version():
    vision = tiny_model().model.vision_embed_tokens
    out = batch()
    fast = vision(out["pixel_values"], out["image_sizes"])
    assert len(fast) == sum(out["num_img_tokens"])
    slow = slow_features(vision, out["pixel_values"], out["image_sizes"])
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)


def test_tiles_in_parts_give_the_same_features_without_gradients_alone(monkeypatch):
    vision = tiny_model().model.vision_embed_tokens
    tower, seen = vision.img_processor.vision_model, []
    tower.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    out = batch()
    inputs = out["pixel_values"], out["image_sizes"]
    whole = vision(*inputs)
    monkeypatch.setattr(
        vision_module, "CACHED_ACTIVATIONS", 2 * vision.config.vision.intermediate_size * (28 // 7) ** 2
    )
    torch.testing.assert_close(vision(*inputs), whole, atol=0, rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(vision(*inputs), whole, atol=1e-6, rtol=1e-5)
    tiles = len(out["pixel_values"])
    assert seen == [tiles, tiles, *[2] * (tiles // 2), *[1] * (tiles % 2)]


def test_only_real_tiles_and_no_unused_layer_run():
    vision = tiny_model().model.vision_embed_tokens
    tower, seen = vision.img_processor.vision_model, []
    for index, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda _, inputs, __, index=index: seen.append((index, len(inputs[0]))))
    out = batch()
    real = int((out["image_sizes"] // 28).prod(1).sum()) + 3
    vision(out["pixel_values"], out["image_sizes"])
    assert seen == [(index, real) for index in range(len(tower.encoder.layers) - 1)]


def test_published_padded_form_and_bytes_give_the_same_features():
    vision = tiny_model().model.vision_embed_tokens
    out = batch()
    expected = vision(out["pixel_values"], out["image_sizes"])
    counts = ((out["image_sizes"] // 28).prod(1) + 1).tolist()
    padded = torch.zeros(3, 10, 3, 28, 28)
    for row, tiles in enumerate(out["pixel_values"].split(counts)):
        padded[row, : len(tiles)] = tiles
    torch.testing.assert_close(vision(padded, out["image_sizes"]), expected, atol=0, rtol=0)
    images = [make_image(60, 30, 1), make_image(28, 28, 2), make_image(30, 100, 3)]
    small = tiny_processor().image_processor(images, num_crops=9, as_uint8=True)
    torch.testing.assert_close(vision(small["pixel_values"], small["image_sizes"]), expected, atol=0, rtol=0)


@pytest.mark.parametrize("grids", [[[1, 1]], [[2, 3], [1, 1], [4, 1]]])
def test_every_token_of_the_table_is_used(grids):
    grid = 3
    grids = torch.tensor(grids)
    index = gather_index(grids, grid)
    tokens = int((grids.prod(1) + 1).sum()) * grid * grid
    counts = torch.bincount(index, minlength=tokens + 2)
    assert counts[:tokens].tolist() == [1] * tokens
    assert counts[tokens] == int(((grids[:, 0] + 1) * grid).sum())  # one row separator a row of either grid
    assert counts[tokens + 1] == len(grids)


def test_frozen_vision_keeps_no_graph():
    vision = tiny_model().model.vision_embed_tokens.requires_grad_(False)
    out = batch()
    assert not vision(out["pixel_values"], out["image_sizes"]).requires_grad
    vision.img_projection.requires_grad_(True)
    assert vision(out["pixel_values"], out["image_sizes"]).requires_grad
