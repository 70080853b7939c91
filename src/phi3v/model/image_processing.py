"""Cuts pictures into tiles exactly as the published processor does, but without its zero tiles.

Shapes: S = tile side in pixels, h x w = tiles down x across, n = 1 + h*w tiles of one picture (its global view, then
the local tiles row by row). phi3v.planning.geometry decides the layout. The source of all rules is the published
processor. Golden data in tests/golden record its behaviour.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin

from phi3v.planning.geometry import PictureTokens, TileLayout, tile_layout

# OpenAI CLIP's channel means and deviations, RGB, on a 0-1 scale.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


Channels: TypeAlias = Sequence[float] | torch.Tensor
"""One number each for R, G and B."""


def expand_uint8_tiles(
    tiles: torch.Tensor, image_sizes: torch.Tensor, mean: Channels = CLIP_MEAN, std: Channels = CLIP_STD
) -> torch.Tensor:
    """Computes global views and normalises local uint8 tiles, on the tensor's device.

    tiles: uint8 [sum of h*w over all pictures, 3, S, S] (what `Phi3VImageProcessor(..., as_uint8=True)` returns);
    image_sizes: [n_pictures, 2]. Returns float32 [sum of 1 + h*w, 3, S, S].
    """
    size = tiles.shape[-1]
    grids = (image_sizes // size).tolist()
    out = torch.empty(len(tiles) + len(grids), *tiles.shape[1:], dtype=torch.float32, device=tiles.device)
    source = target = 0
    for down, across in grids:
        count = down * across
        normalise_picture(tiles[source : source + count], down, across, mean, std, out[target : target + 1 + count])
        source, target = source + count, target + 1 + count
    return out


def normalise_picture(
    local: torch.Tensor, down: int, across: int, mean: Channels, std: Channels, out: torch.Tensor
) -> None:
    """Writes a picture's global view and local tiles, from uint8 [down*across, 3, S, S], to the float32 tensor `out`.

    The order / 255, - mean, / std gives the same bits as the original.
    """
    size, tiles = local.shape[-1], out[1:]
    means, stds = (torch.as_tensor(x, dtype=torch.float32, device=local.device).view(3, 1, 1) for x in (mean, std))
    # On a CPU, go tile by tile: four passes over one tile stay in the cache, but over sixteen tiles they do not.
    pairs = [(local, tiles)] if local.device.type != "cpu" else zip(local.unbind(0), tiles.unbind(0), strict=True)
    for source, target in pairs:
        target.copy_(source).div_(255).sub_(means).div_(stds)
    canvas = tiles.view(down, across, 3, size, size).permute(2, 0, 3, 1, 4).reshape(1, 3, down * size, across * size)
    # Bicubic, not antialiased, not clamped.
    out[:1] = nn.functional.interpolate(canvas, size=(size, size), mode="bicubic", align_corners=False)


class Phi3VImageProcessor(PictureTokens, ImageProcessingMixin):
    """Cuts each picture into at most `num_crops` local tiles of `tile_size` pixels.

    `num_crops` can be changed at any time. The saved form is the publisher's preprocessor_config.json.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values", "image_sizes"]

    def __init__(
        self,
        num_crops: int = 4,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        do_convert_rgb: bool = True,
        num_img_tokens: int = 144,
        tile_size: int = 336,
        **kwargs: object,
    ) -> None:
        ImageProcessingMixin.__init__(self)
        PictureTokens.__init__(self, num_crops, num_img_tokens, tile_size)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.do_convert_rgb = do_convert_rgb

    def layout(self, image: Image.Image, num_crops: int | None = None) -> TileLayout:
        """`tile_layout` of a picture.

        Raises ValueError if `image` is not a PIL image, or too thin to keep one pixel.
        """
        if not isinstance(image, Image.Image):
            raise ValueError(f"got {type(image).__name__}; expected a PIL image")
        num_crops = num_crops or self.num_crops
        width, height = image.size
        layout = tile_layout(width, height, num_crops, self.tile_size)
        if min(layout.width, layout.height) < 1:
            raise ValueError(
                f"image of {width}x{height} pixels: scaled to {layout.width}x{layout.height} with "
                f"num_crops={num_crops}; "
                "expected at least one pixel on each side. Crop the picture or increase num_crops"
            )
        return layout

    def canvas(self, image: Image.Image, num_crops: int | None = None) -> np.ndarray:
        """The resized picture with white padding, uint8 [H, W, 3]; H and W are whole tiles. Raises the errors of
        `layout`."""
        new_width, new_height, down, across = self.layout(image, num_crops)
        if image.mode != "RGB":
            image = image.convert("RGB")
        if image.width < image.height:
            # The original resizes portraits transposed, which filters their columns first. Two one-sided resizes give
            # the same bytes without transposing.
            image = image.resize((image.width, new_height), Image.Resampling.BILINEAR)
        image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
        full_width, full_height = across * self.tile_size, down * self.tile_size
        pixels = np.asarray(image)
        if (full_width, full_height) == (new_width, new_height):
            return pixels
        padded = np.full((full_height, full_width, 3), 255, dtype=np.uint8)
        top, left = (full_height - new_height) // 2, (full_width - new_width) // 2
        padded[top : top + new_height, left : left + new_width] = pixels
        return padded

    def local_tiles(self, canvas: np.ndarray) -> torch.Tensor:
        """The local tiles of a canvas, row by row: uint8 [h*w, 3, S, S]."""
        size = self.tile_size
        down, across = canvas.shape[0] // size, canvas.shape[1] // size
        pixels = torch.from_numpy(np.require(canvas, requirements=["C", "W"])).permute(2, 0, 1)
        return pixels.view(3, down, size, across, size).permute(1, 3, 0, 2, 4).reshape(down * across, 3, size, size)

    def tile_all(
        self,
        pictures: Sequence[Image.Image],
        names: Sequence[str],
        num_crops: int | None = None,
        as_uint8: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Concatenated tiles of all pictures and their image_sizes, as `preprocess` returns them.

        Uses PyTorch's number of threads (one in a data loader's worker), because resizing releases the GIL. Writes
        every picture directly to its place, because the tiles of a batch are hundreds of megabytes, and writing new
        memory twice costs more than the arithmetic. Raises ValueError that starts with the picture's entry in `names`.
        """
        grids = []
        for picture, name in zip(pictures, names, strict=True):
            try:
                grids.append(self.layout(picture, num_crops)[2:])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        ends = list(itertools.accumulate((down * across + (not as_uint8) for down, across in grids), initial=0))
        dtype = torch.uint8 if as_uint8 else torch.float32
        # Threads do not inherit the caller's inference mode, and could not write a tensor created in it.
        with torch.inference_mode(False):
            out = torch.empty(ends[-1], 3, self.tile_size, self.tile_size, dtype=dtype)

        def one(index: int) -> None:
            place, local = out[ends[index] : ends[index + 1]], self.local_tiles(self.canvas(pictures[index], num_crops))
            if as_uint8:
                place.copy_(local)
            else:
                normalise_picture(local, *grids[index], self.image_mean, self.image_std, place)

        workers = min(len(pictures), torch.get_num_threads())
        if workers < 2:
            for index in range(len(pictures)):
                one(index)
        else:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(one, range(len(pictures))))
        sizes = [[down * self.tile_size, across * self.tile_size] for down, across in grids]
        return out, torch.tensor(sizes, dtype=torch.int64).view(-1, 2)

    def preprocess(
        self,
        images: Image.Image | Sequence[Image.Image],
        num_crops: int | None = None,
        as_uint8: bool = False,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Concatenated tiles of all pictures.

        Returns pixel_values [sum of tiles, 3, S, S], image_sizes [n_pictures, 2] (height, width of the padded canvas)
        and num_img_tokens [n_pictures]. With `as_uint8`, the pixel values are the local tiles as uint8, and the model
        adds the global views and normalises on its device. Raises ValueError that names the picture's index.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors: got {return_tensors!r}; expected 'pt'")
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        if not pictures:
            raise ValueError("images: got an empty list; expected at least one picture, or no argument `images`")
        names = [f"image {index}" for index in range(len(pictures))]
        tiles, sizes = self.tile_all(pictures, names, num_crops, as_uint8)
        return BatchFeature(
            {
                "pixel_values": tiles,
                "image_sizes": sizes,
                "num_img_tokens": [self.tokens_of_size(height, width) for height, width in sizes.tolist()],
            }
        )

    __call__ = preprocess

    def to_dict(self) -> dict[str, object]:
        """The publisher's preprocessor_config.json. Contains the tile side only if it differs from the published
        one."""
        output: dict[str, object] = {
            "auto_map": {
                "AutoImageProcessor": "processing_phi3_v.Phi3VImageProcessor",
                "AutoProcessor": "processing_phi3_v.Phi3VProcessor",
            },
            "do_convert_rgb": self.do_convert_rgb,
            "image_mean": list(self.image_mean),
            "image_processor_type": "Phi3VImageProcessor",
            "image_std": list(self.image_std),
            "num_crops": self.num_crops,
            "num_img_tokens": self.num_img_tokens,
            "processor_class": "Phi3VProcessor",
        }
        if self.tile_size != 336:
            output["tile_size"] = self.tile_size
        return output

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Creates a processor from the saved keys. `kwargs` such as num_crops override them."""
        return_unused = kwargs.pop("return_unused_kwargs", False)
        known = ("num_crops", "image_mean", "image_std", "do_convert_rgb", "num_img_tokens", "tile_size")
        values = {key: image_processor_dict[key] for key in known if key in image_processor_dict}
        values.update({key: kwargs.pop(key) for key in known if key in kwargs})
        processor = cls(**values)
        return (processor, kwargs) if return_unused else processor
