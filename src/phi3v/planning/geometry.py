"""Sizes that follow from a model's geometry: parameters by group, and tiles and tokens of a picture. No torch.

The formulas are those of the published Phi-3-vision files: CLIP with a class token and biases, a two-layer projector
over 2x2 merged patches, a decoder without biases, and a head of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from phi3v.settings import Geometry, Model, SettingsError, VisionGeometry, validate

# The published config.json has no vision_config. This tower is meant (openai/clip-vit-large-patch14-336).
CLIP_VIT_L_14_336 = VisionGeometry(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)


def geometry_from_config(config: Mapping[str, object], where: str = "config.json") -> Geometry:
    """The geometry from the values of a config.json or `model.config.to_dict()`. Raises SettingsError that names
    `where`."""
    vision = config.get("vision_config")
    tower = CLIP_VIT_L_14_336.model_dump()
    if isinstance(vision, Mapping):
        tower |= {name: vision[name] for name in tower if name in vision}
    fields = {name: config[name] for name in Geometry.model_fields if name in config and name != "vision"}
    fields.setdefault("num_key_value_heads", fields.get("num_attention_heads"))
    return validate(Geometry, {**fields, "vision": tower}, where)


def model_geometry(name: str, model: Model, root: Path = Path()) -> Geometry:
    """The geometry of a models entry: its own field, or config.json in the folder of its URL.

    root: folder that the URL is relative to. Raises SettingsError if neither exists. A geometry is never guessed.
    """
    if model.geometry:
        return model.geometry
    folder = model.url.removeprefix("file:").removeprefix("//")
    file = root / folder / "config.json"
    if "://" not in model.url and file.is_file():
        return geometry_from_config(json.loads(file.read_text(encoding="utf-8")), str(file))
    raise SettingsError(
        f"model `{name}`: field `geometry`: empty, and {model.url} is no folder with a config.json here; expected the "
        "layer sizes in the models file (docs/reference/configuration.md, Geometry)"
    )


# Name to (inputs, outputs) of the linear layers of a layer, in execution order.
Linears = dict[str, tuple[int, int]]


def decoder_layer_linears(geometry: Geometry) -> Linears:
    """The four linear layers of a decoder layer."""
    width, inner = geometry.hidden_size, geometry.intermediate_size
    head = width // geometry.num_attention_heads
    return {
        "qkv_proj": (width, (geometry.num_attention_heads + 2 * geometry.num_key_value_heads) * head),
        "o_proj": (geometry.num_attention_heads * head, width),
        "gate_up_proj": (width, 2 * inner),
        "down_proj": (inner, width),
    }


def clip_layer_linears(vision: VisionGeometry) -> Linears:
    """The six linear layers of a layer of the tower."""
    width, inner = vision.hidden_size, vision.intermediate_size
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (width, width))
    return attention | {"fc1": (width, inner), "fc2": (inner, width)}


def projector_linears(geometry: Geometry) -> list[tuple[int, int]]:
    """(inputs, outputs) of the two linear layers of the projector."""
    return [(4 * geometry.vision.hidden_size, geometry.hidden_size), (geometry.hidden_size, geometry.hidden_size)]


def clip_layer_parameters(vision: VisionGeometry) -> int:
    """Weights and biases of one layer of the tower."""
    linears = clip_layer_linears(vision).values()
    return sum(inputs * outputs + outputs for inputs, outputs in linears) + 4 * vision.hidden_size


def parameters(geometry: Geometry) -> dict[str, int]:
    """Parameters by group (phi3v.model.modeling.GROUPS), without adapters. Their sum is the size of the model."""
    vision, width = geometry.vision, geometry.hidden_size
    embeddings = vision.hidden_size * (1 + 3 * vision.patch_size**2 + 1 + patches_per_tile(vision))
    layer = sum(inputs * outputs for inputs, outputs in decoder_layer_linears(geometry).values()) + 2 * width
    return {
        "clip": embeddings + 4 * vision.hidden_size + vision.num_hidden_layers * clip_layer_parameters(vision),
        "projector": sum(inputs * outputs + outputs for inputs, outputs in projector_linears(geometry)),
        "separators": 2 * 4 * vision.hidden_size,
        "embedding": geometry.vocab_size * width,
        "decoder": geometry.num_hidden_layers * layer + width,
        "head": geometry.vocab_size * width,
    }


def has_adapter(group: str, name: str, frozen: Collection[str] = (), targets: Collection[str] = ()) -> bool:
    """Whether LoRA adds an adapter to the layer `name` of a group.

    frozen: groups without adapters. targets: names of layers with adapters (--lora_targets). Empty: all.
    """
    return group not in frozen and (not targets or name in targets)


def adapter_parameters(
    geometry: Geometry, rank: int, frozen: Collection[str] = (), targets: Collection[str] = ()
) -> int:
    """Number of LoRA parameters: rank x (inputs + outputs) of each linear layer.

    Counts the decoder, the head, the projector, and the tower's layers that run. frozen, targets: see has_adapter.
    """
    layers = [("decoder", geometry.num_hidden_layers, decoder_layer_linears(geometry))]
    layers += [("clip", geometry.vision.num_hidden_layers - 1, clip_layer_linears(geometry.vision))]
    layers += [("projector", 1, {"img_projection": shape}) for shape in projector_linears(geometry)]
    layers += [("head", 1, {"lm_head": (geometry.hidden_size, geometry.vocab_size)})]
    return rank * sum(
        count * sum(shape)
        for group, count, linears in layers
        for name, shape in linears.items()
        if has_adapter(group, name, frozen, targets)
    )


def trainable_parameters(
    geometry: Geometry,
    method: str,
    rank: int | None = None,
    frozen: Collection[str] = (),
    lora_targets: Collection[str] = (),
) -> dict[str, int]:
    """Parameters that the optimizer updates, by group (0 for a frozen group).

    method: full, frozen, lora or qlora. The tower's last layer and the norm after it never run, so they never train.
    frozen: additional frozen groups. lora_targets: names of layers with adapters. Empty: all.
    """
    held = parameters(geometry)
    vision = geometry.vision
    held["clip"] -= clip_layer_parameters(vision) + 2 * vision.hidden_size
    if method in ("lora", "qlora"):
        return dict.fromkeys(held, 0) | {"adapters": adapter_parameters(geometry, rank or 0, frozen, lora_targets)}
    frozen = {*frozen, *(("clip", "projector", "separators") if method == "frozen" else ())}
    return {group: 0 if group in frozen else count for group, count in held.items()} | {"adapters": 0}


def quantised_parameters(geometry: Geometry) -> int:
    """Weights that QLoRA stores in 4 bits: all linear layers except the head, including the tower's last layer."""
    decoder = sum(i * o for i, o in decoder_layer_linears(geometry).values()) * geometry.num_hidden_layers
    tower = sum(i * o for i, o in clip_layer_linears(geometry.vision).values()) * geometry.vision.num_hidden_layers
    return decoder + tower + sum(i * o for i, o in projector_linears(geometry))


def patches_per_tile(vision: VisionGeometry) -> int:
    """Patches of a tile, without the class token."""
    return (vision.image_size // vision.patch_size) ** 2


class TileLayout(NamedTuple):
    """Layout of a picture: its size in pixels after scaling, and the grid of tiles after padding."""

    width: int
    """0 if the picture is so thin that no pixel is left. The same applies to `height`."""
    height: int
    tiles_down: int
    tiles_across: int


def tile_layout(width: int, height: int, num_crops: int, tile_size: int = 336) -> TileLayout:
    """Layout of a picture of `width` x `height` pixels, by the published processor's rule.

    The picture is scaled up or down to the widest grid of at most `num_crops` tiles that matches its aspect ratio, then
    padded on its short side to whole tiles. Portrait pictures are laid out transposed. tile_size: side of a tile, in
    pixels. Raises ValueError for sizes or num_crops below 1.
    """
    if width < 1 or height < 1:
        raise ValueError(f"image size: got {width}x{height}; expected at least 1x1 pixels")
    if num_crops < 1:
        raise ValueError(f"num_crops: got {num_crops}; expected at least 1")
    ratio = max(width, height) / min(width, height)
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= num_crops:
        scale += 1
    long = scale * tile_size
    # Truncated float division, as in the published code. Integer arithmetic gives one row more for some sizes (golden
    # 1414x1818).
    short = int(long / ratio)
    tiles = math.ceil(short / tile_size)
    if width < height:
        return TileLayout(short, long, scale, tiles)
    return TileLayout(long, short, tiles, scale)


def num_image_tokens(tiles_down: int, tiles_across: int, tile_grid: int = 12) -> int:
    """Number of image tokens: local and global tiles, one separator per row of each grid, and one between the grids.

    tile_grid: side of a tile, in image tokens.
    """
    return (tiles_down * tiles_across + 1) * tile_grid**2 + 1 + (tiles_down + 1) * tile_grid


@dataclass(eq=False, repr=False)
class PictureTokens:
    """Tiles and tokens of pictures by an image processor's settings, which can change at any time.

    Raises ValueError unless `num_img_tokens` is a square number.
    """

    num_crops: int = 4
    num_img_tokens: int = 144
    tile_size: int = 336

    def __post_init__(self) -> None:
        if math.isqrt(self.num_img_tokens) ** 2 != self.num_img_tokens:
            raise ValueError(
                f"num_img_tokens: got {self.num_img_tokens}; expected a square number (tokens of one square tile)"
            )

    @property
    def tile_grid(self) -> int:
        """Side of a tile in image tokens."""
        return math.isqrt(self.num_img_tokens)

    def tokens_of_size(self, image_height: int, image_width: int) -> int:
        """Image tokens of a padded canvas with a size from `image_sizes`."""
        return num_image_tokens(image_height // self.tile_size, image_width // self.tile_size, self.tile_grid)

    def tokens_of_picture(self, width: int, height: int, num_crops: int | None = None) -> int:
        """Image tokens of a picture, computed from its size alone, for budgets and length-sorted batches."""
        layout = tile_layout(width, height, num_crops or self.num_crops, self.tile_size)
        return num_image_tokens(layout.tiles_down, layout.tiles_across, self.tile_grid)


def tile_grid(vision: VisionGeometry) -> int:
    """Side of a tile in image tokens. Patches are merged 2 x 2."""
    return vision.image_size // vision.patch_size // 2
