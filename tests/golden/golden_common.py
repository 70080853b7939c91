"""Helpers shared by the golden-data producer and by tests (own code, numpy + PIL only).

Nothing here comes from the official remote code.
"""

import re
import zlib

import numpy as np
from PIL import Image


# --------------------------------------------------------------------- weights
def make_weight(name, shape, salt="", scale_rules=()):
    """Deterministic float32 tensor for a state_dict entry, by its OFFICIAL name.

    salt, scale_rules: as given per model variant in state_dict_tiny.json / models.json
    ("salt", "rules"). rules is [[regex, factor], ...]: the tensor is multiplied by `factor` where
    re.search matches the name (only the "sharp" variants have any).
    """
    rng = np.random.default_rng(zlib.crc32((salt + name).encode()))
    w = rng.standard_normal(tuple(shape), dtype=np.float32) * np.float32(0.05)
    if name.endswith(".weight") and len(shape) == 1:  # LayerNorm / RMSNorm gains
        w = np.float32(1.0) + w
    for pattern, factor in scale_rules:
        if re.search(pattern, name):
            w = w * np.float32(factor)
    return np.ascontiguousarray(w, dtype=np.float32)


# ---------------------------------------------------------------------- images
def _tri(v, period):
    """Integer triangle wave, 0..255, of the given period."""
    v = v % (2 * period)
    return (np.abs(v - period) * 255) // period


def make_image(width, height, seed=0, mode="RGB"):
    """Deterministic image: integer arithmetic only, so the same on every platform.

    Smooth triangle-wave gradients, darkened by text-like rows of blocks.
    """
    x = np.arange(width, dtype=np.int64)[None, :]
    y = np.arange(height, dtype=np.int64)[:, None]
    r = _tri(x * 2 + y + 37 * seed, 173 + seed % 7)
    g = _tri(x + y * 3 + 11 * seed, 211)
    b = _tri(x * 3 - y * 2 + 5 * seed, 307) + 0 * (x + y)
    ink = (((x // 5) * 7 + (y // 18) * 13 + seed) % 11 < 5) & ((y + seed) % 18 < 9) & ((x + 3 * seed) % 5 < 4)
    rgb = np.stack([r + 0 * (x + y), g + 0 * (x + y), b], axis=-1)
    rgb = np.where(ink[..., None], rgb // 6, rgb).astype(np.uint8)
    if mode == "RGB":
        return Image.fromarray(rgb)
    if mode == "L":
        return Image.fromarray(np.ascontiguousarray(rgb[..., 0]))
    if mode == "1":
        return Image.fromarray(np.ascontiguousarray(rgb[..., 0])).point(lambda v: 255 if v > 127 else 0).convert("1")
    alpha = (_tri(x + y + seed, 97) + 0 * (x + y)).astype(np.uint8)
    if mode == "RGBA":
        return Image.fromarray(np.concatenate([rgb, alpha[..., None]], axis=-1))
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(np.ascontiguousarray(rgb[..., 0])), Image.fromarray(alpha)])
    if mode == "P":
        im = Image.fromarray(np.ascontiguousarray(rgb[..., 1])).copy()
        im = Image.frombytes("P", im.size, im.tobytes())
        pal = []
        for i in range(256):
            pal += [(i * 7 + seed) % 256, (255 - i), (i * 3) % 256]
        im.putpalette(pal)
        return im
    if mode == "CMYK":
        return Image.merge(
            "CMYK", [Image.fromarray(np.ascontiguousarray(rgb[..., k])) for k in (0, 1, 2)] + [Image.fromarray(alpha)]
        )
    raise ValueError(mode)


def image_from_spec(spec):
    return make_image(spec["width"], spec["height"], spec.get("seed", 0), spec.get("mode", "RGB"))


# ------------------------------------------------------------------- utilities
def sample_positions(numel, count, salt=0):
    """Fixed flat positions in a tensor of `numel` elements (C order)."""
    return [int((k * 2654435761 + 12345 + 977 * salt) % numel) for k in range(count)]


def rle_encode(seq):
    out = []
    for v in seq:
        v = int(v)
        if out and out[-1][0] == v:
            out[-1][1] += 1
        else:
            out.append([v, 1])
    return out


def rle_decode(pairs):
    return [v for v, n in pairs for _ in range(n)]


def text_ids(n, seed):
    """n deterministic ordinary token ids in [3, 31999]: no special tokens, no padding."""
    return [3 + (i * 7919 + i * i * 31 + seed * 104729) % 31990 for i in range(n)]


LOGIT_COLUMNS = list(range(0, 32064, 64))  # 501 vocabulary columns stored of each logits row
