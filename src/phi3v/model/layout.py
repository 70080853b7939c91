"""Where pictures and answers stand in a batch, worked out on the CPU before the device has anything to do.

A model that looks these things up in tensors on a GPU waits for it at every look-up. Training's collator makes a
`BatchLayout` beside the batch instead, in the loader's process; other callers of the model leave that to the forward pass.

Shapes: B = batch rows, T = tokens of a row, I = image tokens of the batch, L = label positions of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from phi3v.model.attention import AttentionPlan, plan_attention
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.vision import gather_index

DEVICE_FIELDS = ("image_positions", "feature_rows", "label_positions", "label_ids", "label_weights", "position_ids")
"""Fields of a layout that the device reads; the rest stays on the CPU."""


@dataclass(frozen=True)
class BatchLayout:
    """Positions count through the flattened batch: row * T + column."""

    plan: AttentionPlan = field(default_factory=AttentionPlan)
    """Which keys a query sees."""
    image_sizes: torch.Tensor | None = None
    """[n_images, 2], height and width of each canvas in pixels, on the CPU."""
    image_positions: torch.Tensor | None = None
    """[I] positions of the image tokens; None for a batch without pictures."""
    feature_rows: torch.Tensor | None = None
    """[I] rows of the vision part's projected table, see `gather_index`."""
    label_positions: torch.Tensor | None = None
    """[L] positions whose next token is a label."""
    label_ids: torch.Tensor | None = None
    """[L] those labels."""
    label_weights: torch.Tensor | None = None
    """[L] float32 weight of each label's cross entropy; None: the mean over all labels."""
    position_ids: torch.Tensor | None = None
    """[B, T] of a packed batch."""


def lay_out(
    config: Phi3VConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    image_sizes: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    loss_weights: torch.Tensor | None = None,
) -> BatchLayout:
    """The layout of a whole training batch, from tensors on the CPU: see `Phi3VForCausalLM.forward` for their shapes.

    Raises ValueError if image positions and pictures, or labels and inputs, do not fit together, and for padding that
    is not on the right.
    """
    batch, tokens = input_ids.shape
    plan = plan_attention(attention_mask, position_ids, batch, tokens, past=0)
    if plan.mask is not None:
        raise ValueError("attention_mask: padding on the left or within a row; expected it on the right.")
    positions, rows = picture_rows(config, input_ids, image_sizes)
    where = ids = weights = None
    if labels is not None:
        packed = position_ids if attention_mask is None else None
        where, ids, weights = label_rows(input_ids, labels, loss_weights, packed)
    return BatchLayout(
        plan=plan,
        image_sizes=image_sizes,
        image_positions=positions,
        feature_rows=rows,
        label_positions=where,
        label_ids=ids,
        label_weights=weights,
        position_ids=position_ids,
    )


def picture_rows(
    config: Phi3VConfig, input_ids: torch.Tensor, image_sizes: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """image_positions and feature_rows [I] of input_ids [B, T], on the CPU; (None, None) without pictures."""
    positions = (input_ids == config.image_token_id).flatten().nonzero().flatten()
    if image_sizes is None:
        if len(positions):
            raise ValueError(
                f"input_ids: {len(positions)} image positions but no pixel_values; expected both or neither."
            )
        return None, None
    check_canvases(image_sizes, config.tile_size)
    rows = gather_index(image_sizes // config.tile_size, config.tile_grid)
    if len(positions) != len(rows):
        raise ValueError(
            f"input_ids: {len(positions)} image positions; expected {len(rows)} for image_sizes {image_sizes.tolist()}."
        )
    return positions, rows


def check_canvases(image_sizes: torch.Tensor, tile_size: int) -> None:
    """Raises ValueError if image_sizes is not [n_images, 2] in whole tiles."""
    wrong = image_sizes.dim() != 2 or image_sizes.shape[1] != 2
    if wrong or bool((image_sizes % tile_size).any()) or bool((image_sizes < tile_size).any()):
        raise ValueError(
            f"image_sizes: {image_sizes.tolist()}; expected [height, width] of each canvas "
            f"in whole tiles of {tile_size} pixels."
        )


def label_rows(
    input_ids: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor | None, packed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """label_positions, label_ids and label_weights [L], on the CPU.

    packed: position ids of a packed batch, whose examples must not learn their first token from the example before.
    """
    for name, values in (("labels", labels), ("loss_weights", loss_weights)):
        if values is not None and values.shape != input_ids.shape:
            raise ValueError(
                f"{name}: shape {list(values.shape)}; expected {list(input_ids.shape)} like "
                f"{'input_ids' if name == 'labels' else 'labels'}."
            )
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != -100
    if packed is not None:
        wanted[:, :-1] &= packed.expand_as(labels)[:, 1:] != 0
    positions = wanted.flatten().nonzero().flatten()
    weights = None if loss_weights is None else loss_weights.flatten()[positions + 1].float()
    return positions, labels.flatten()[positions + 1], weights
