"""Converts pictures to image features: CLIP over the real tiles only, 2x2 merge, one projection, one gather.

Shapes: n = tiles of all pictures, S = tile side in pixels, p = tile side in patches, g = p / 2 = tile side in image
tokens, C = CLIP width, D = decoder width, I = image tokens of all pictures.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPVisionEmbeddings

from phi3v.model.configuration import Phi3VConfig
from phi3v.model.fused import QuickGELU
from phi3v.model.image_processing import CLIP_MEAN, CLIP_STD, expand_uint8_tiles

CACHED_ACTIVATIONS = 20_000_000
"""Values of a layer that a CPU's cache is expected to hold: those of eight tiles of the published tower."""


class VisionTower(nn.Module):
    """CLIP's vision transformer. The features are the inputs of its last layer, without the class token."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        vision = config.vision
        self.embeddings = CLIPVisionEmbeddings(vision)
        self.pre_layrnorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)  # the published spelling
        self.encoder = CLIPEncoder(vision)
        if vision.hidden_act == "quick_gelu":
            for layer in self.encoder.layers:
                layer.mlp.activation_fn = QuickGELU()
        self.post_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """Freezes the last layer and the norm after it. Every checkpoint contains them, but they never run."""
        for unused in (self.encoder.layers[-1], self.post_layernorm):
            unused.requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Maps [n, 3, S, S] to patch features [n, p*p, C]."""
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))  # [n, 1 + p*p, C]
        for layer in self.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        return hidden[:, 1:]


class ImageProcessorModule(nn.Module):
    """Module that gives the tower its published name."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.vision_model = VisionTower(config)


class ImageEmbedding(nn.Module):
    """The vision part: tower, separators and projector."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.config = config
        merged = 4 * config.vision.hidden_size
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, merged))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, merged))
        self.img_processor = ImageProcessorModule(config)
        self.img_projection = nn.Sequential(
            nn.Linear(merged, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )
        # None: a blank tile runs for text-only batches if a distributed job needs it. True and False force.
        self.run_without_images: bool | None = None
        self._scales: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Features [I, D] of all pictures in order. Without pictures, those of one blank tile, [g*g + 2, D].

        pixel_values: float [n, 3, S, S]; or uint8 local tiles; or the published padded form [n_images, k, 3, S, S].
        image_sizes: [n_images, 2], canvases in whole tiles, best on the CPU. rows: `gather_index` of their grids on the
        tiles' device, or None. Raises ValueError if tiles and image_sizes do not match.
        """
        if pixel_values is None or image_sizes is None:
            return self._blank()
        size = self.config.tile_size
        sizes = image_sizes.cpu()
        grids = sizes // size  # [n_images, 2]
        tiles = grids.prod(dim=1) + 1
        if pixel_values.dim() == 5:
            real = torch.arange(pixel_values.shape[1])[None, :] < tiles[:, None]
            pixel_values = pixel_values[real.to(pixel_values.device)]
        expected = int((tiles - 1).sum()) if pixel_values.dtype == torch.uint8 else int(tiles.sum())
        if list(pixel_values.shape) != [expected, 3, size, size]:
            raise ValueError(
                f"pixel_values: shape {list(pixel_values.shape)}; expected {[expected, 3, size, size]} for image_sizes "
                f"{sizes.tolist()}."
            )
        if pixel_values.dtype == torch.uint8:
            pixel_values = expand_uint8_tiles(pixel_values, sizes, *self._scale(pixel_values.device))
        if rows is None:
            rows = gather_index(grids, self.config.tile_grid).to(pixel_values.device)
        return self._project(pixel_values)[rows]

    def _scale(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP's channel means and standard deviations on a device, copied only once."""
        if device not in self._scales:
            mean, std = (torch.tensor(values, dtype=torch.float32) for values in (CLIP_MEAN, CLIP_STD))
            self._scales[device] = (mean.to(device), std.to(device))
        return self._scales[device]

    def _project(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Projected tokens of every tile, followed by the row separator and the picture separator: [n*g*g + 2, D]."""
        tower = self.img_processor.vision_model
        frozen = not any(parameter.requires_grad for parameter in tower.parameters())
        with torch.no_grad() if frozen else contextlib.nullcontext():
            pixels = pixel_values.to(tower.pre_layrnorm.weight.dtype)
            # Not in training: ZeRO 3 counts the calls of a module, and every process must make as many.
            if pixels.device.type == "cpu" and torch.is_inference_mode_enabled():
                patches = torch.cat([tower(part) for part in pixels.split(self._tiles_at_once())])
            else:
                patches = tower(pixels)  # [n, p*p, C]
        count, _, width = patches.shape
        grid = self.config.tile_grid
        merged = patches.view(count, grid, 2, grid, 2, width).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4 * width)
        separators = torch.cat((self.sub_GN.view(1, -1), self.glb_GN.view(1, -1)))
        # Separators occur many times. Projecting distinct rows and gathering them afterwards projects each one once.
        return self.img_projection(torch.cat((merged, separators.to(merged.dtype))))

    def _tiles_at_once(self) -> int:
        """Number of tiles that run together on a CPU, by CACHED_ACTIVATIONS."""
        vision = self.config.vision
        widest = (vision.image_size // vision.patch_size) ** 2 * vision.intermediate_size
        return max(1, CACHED_ACTIVATIONS // widest)

    def must_run_without_images(self, training: bool) -> bool:
        """Whether a batch without pictures must still use the vision weights. training: whether a backward pass
        follows.

        DDP expects a gradient of every weight in every step, also as one process, and its reductions go by the order in
        which gradients appear. ZeRO 3 gathers weights at each call of a module, frozen or not, in training and
        validation, and every process must take part. A process that skips the vision part would wait forever.
        """
        if self.run_without_images is not None:
            return self.run_without_images and training
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return False
        weights = list(self.parameters())
        in_shards = any(hasattr(weight, "ds_id") for weight in weights)
        return in_shards or (training and any(weight.requires_grad for weight in weights))

    def _blank(self) -> torch.Tensor:
        """Features of one blank tile, through `forward` alone: ZeRO 3 gathers and reduces by a module's own calls."""
        weight = self.sub_GN
        size = self.config.tile_size
        return self._project(torch.zeros(1, 3, size, size, dtype=weight.dtype, device=weight.device))


def gather_index(grids: torch.Tensor, grid: int) -> torch.Tensor:
    """Row of each image token in the table of `_project`, [I], for pictures of `grids` [n_images, 2] tiles.

    A picture is its local tiles stitched to rows of g*w tokens, each row closed by the row separator, then the picture
    separator, then the global tile likewise. Table rows: g*g a tile (global tile first), then the two separators.
    """
    down, across = grids[:, 0], grids[:, 1]
    tiles = down * across + 1
    first_tile = tiles.cumsum(0) - tiles
    row_separator = int(tiles.sum()) * grid * grid
    local = down * grid * (across * grid + 1)
    total = local + 1 + grid * (grid + 1)

    repeat = torch.repeat_interleave(torch.arange(len(grids)), total)  # [I]: the picture of each token
    token = torch.arange(int(total.sum())) - (total.cumsum(0) - total)[repeat]
    is_local, is_picture_separator = token < local[repeat], token == local[repeat]
    token = torch.where(is_local, token, token - local[repeat] - 1)
    columns = torch.where(is_local, across[repeat] * grid, grid)
    row, column = token // (columns + 1), token % (columns + 1)
    tile = first_tile[repeat] + is_local * (1 + (row // grid) * across[repeat] + column // grid)
    place = (tile * grid + row % grid) * grid + column % grid
    place = torch.where(column == columns, row_separator, place)
    return torch.where(is_picture_separator, row_separator + 1, place)
