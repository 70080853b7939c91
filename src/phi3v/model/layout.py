"""Positions of pictures and answers in a batch, and the attention mask, computed on the CPU.

Reading these values from tensors on a GPU would synchronise with it each time. In training, the collator therefore
computes a `BatchLayout` with the batch, in the loader process. For other callers, the forward pass computes it.

Shapes: B = batch rows, T = tokens of a row, Q = query tokens, K = key tokens (cached ones included), I = image tokens
of the batch, L = label positions of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from phi3v.model.configuration import Phi3VConfig
from phi3v.model.vision import gather_index

DEVICE_FIELDS = ("image_positions", "feature_rows", "label_positions", "label_ids", "label_weights", "position_ids")
"""Fields of a layout that the device reads, in order. The others stay on the CPU."""


@dataclass(frozen=True)
class AttentionPlan:
    """The keys that each query attends to, computed once per forward pass for all layers.

    Without `lengths` and `mask`: plain causal attention over the last Q of K keys.
    """

    mask: torch.Tensor | None = None
    """[B, 1, Q, K] bool. True: the query attends to the key."""
    padding: torch.Tensor | None = None
    """[B, K], in addition to a mask, for the flash-attn package, which drops padded tokens itself."""
    lengths: list[int] | None = None
    """Token counts of a packed batch's examples in order. Their sum is B*Q, and attention is causal within each."""
    cu_seqlens: torch.Tensor | None = None
    """[examples + 1] int32, starts and ends of the packed examples, on the batch's device."""
    row_lengths: list[int] | torch.Tensor | None = None
    """Tokens of each row without padding, if there is a mask. A list if the mask is on the CPU."""

    @property
    def max_length(self) -> int:
        """Longest example of a packed batch."""
        return max(self.lengths) if self.lengths else 0


@dataclass(frozen=True)
class BatchLayout:
    """Positions count through the flattened batch: row * T + column."""

    plan: AttentionPlan = field(default_factory=AttentionPlan)
    """The keys that each query attends to."""
    image_sizes: torch.Tensor | None = None
    """[n_images, 2], height and width of each canvas in pixels, on the CPU."""
    image_positions: torch.Tensor | None = None
    """[I] positions of the image tokens. None for a batch without pictures."""
    feature_rows: torch.Tensor | None = None
    """[I] rows in the vision part's table of projected tokens, see `gather_index`."""
    label_positions: torch.Tensor | None = None
    """[L] positions whose next token is a label."""
    label_ids: torch.Tensor | None = None
    """[L] those labels."""
    label_weights: torch.Tensor | None = None
    """[L] float32 weight of each label's cross entropy. None: the mean over all labels."""
    position_ids: torch.Tensor | None = None
    """[B, T] of a packed batch."""

    def to(self, device: torch.device) -> BatchLayout:
        """A copy with the fields of `DEVICE_FIELDS` on a device."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return BatchLayout(self.plan, self.image_sizes, *(moved(getattr(self, name)) for name in DEVICE_FIELDS))


def lay_out(
    config: Phi3VConfig,
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    image_sizes: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    loss_weights: torch.Tensor | None = None,
    past: int = 0,
) -> BatchLayout:
    """The layout of a batch after `past` cached tokens, on the CPU. Synchronises if tensors are on a device.

    inputs: input_ids [B, T], or inputs_embeds [B, T, D] that already include the pictures. The others: see
    `Phi3VForCausalLM.forward`. Raises ValueError if image positions and pictures, or labels and inputs, do not match.
    """
    batch, tokens = inputs.shape[:2]
    plan = plan_attention(attention_mask, position_ids, batch, tokens, past)
    layout = BatchLayout(plan=plan, position_ids=position_ids)
    if inputs.dim() == 2:
        sizes = None if image_sizes is None else image_sizes.cpu()
        positions, rows = _picture_rows(config, inputs.cpu(), sizes)
        layout = replace(layout, image_sizes=sizes, image_positions=positions, feature_rows=rows)
    if labels is not None:
        packed = position_ids if attention_mask is None else None
        host = [None if x is None else x.cpu() for x in (loss_weights, packed)]
        positions, ids, weights = _label_rows(inputs.shape[:2], labels.cpu(), *host)
        layout = replace(layout, label_positions=positions, label_ids=ids, label_weights=weights)
    return layout


# Attention ----------------------------------------------------------------------------------------------------------


def packed_lengths(position_ids: torch.Tensor) -> list[int] | None:
    """Token counts of the examples in a packed batch of position ids [B, Q], or None if no row holds several.

    An example starts at each row's start, and wherever a position is not its left neighbour's plus one.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    first = starts.flatten().nonzero().flatten().tolist()
    if len(first) == len(position_ids):
        return None
    ends = [*first[1:], position_ids.numel()]
    return [end - start for start, end in zip(first, ends, strict=True)]


def plan_attention(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, batch: int, queries: int, past: int
) -> AttentionPlan:
    """The plan for B x `queries` tokens after `past` cached ones.

    attention_mask: [B, past + queries] (1 = token, 0 = padding), a ready [B, 1, Q, K] mask, or None. Packed batches
    are recognised by position ids that start again, without attention mask and cache.
    """
    if attention_mask is None:
        if past == 0 and position_ids is not None and queries > 1:
            lengths = packed_lengths(position_ids.expand(batch, queries))
            if lengths is not None:
                ends = torch.tensor([0, *lengths], device=position_ids.device).cumsum(0).to(torch.int32)
                return AttentionPlan(lengths=lengths, cu_seqlens=ends)
        return AttentionPlan()
    if attention_mask.dim() == 4:
        mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
        return AttentionPlan(mask=mask, row_lengths=mask[:, 0, -1].sum(-1))  # the last query's whole example
    seen, keys = attention_mask.bool(), past + queries
    if keys != seen.shape[1]:
        raise ValueError(f"attention_mask: {seen.shape[1]} columns; expected {keys} ({past} cached, {queries} new).")
    counts = seen.sum(1)
    # Padding on the right is never seen by a token under causal attention: no mask, and the fast kernels stay open.
    if bool(seen.all()) or (past == 0 and bool((seen[:, 1:] <= seen[:, :-1]).all())):
        return AttentionPlan(row_lengths=counts.tolist() if seen.device.type == "cpu" else counts)
    position = torch.arange(keys, device=seen.device)
    causal = position[None, :] <= position[past:, None]  # [Q, K]
    # A padding token attends to itself, because its softmax would otherwise have no entries.
    itself = position[None, :] == position[past:, None]
    mask = ((causal & seen[:, None, :]) | itself)[:, None]
    return AttentionPlan(mask=mask, padding=seen, row_lengths=counts)


# Pictures and labels ------------------------------------------------------------------------------------------------


def _picture_rows(
    config: Phi3VConfig, input_ids: torch.Tensor, image_sizes: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """image_positions and feature_rows [I] of input_ids [B, T], or (None, None) without pictures."""
    positions = (input_ids == config.image_token_id).flatten().nonzero().flatten()
    if image_sizes is None:
        if len(positions):
            raise ValueError(
                f"input_ids: {len(positions)} image positions but no pixel_values; expected both or neither."
            )
        return None, None
    size = config.tile_size
    wrong = image_sizes.dim() != 2 or image_sizes.shape[1] != 2
    if wrong or bool((image_sizes % size).any()) or bool((image_sizes < size).any()):
        raise ValueError(
            f"image_sizes: {image_sizes.tolist()}; expected [height, width] of each canvas "
            f"in whole tiles of {size} pixels."
        )
    rows = gather_index(image_sizes // size, config.tile_grid)
    if len(positions) != len(rows):
        raise ValueError(
            f"input_ids: {len(positions)} image positions; expected {len(rows)} for image_sizes {image_sizes.tolist()}."
        )
    return positions, rows


def _label_rows(
    shape: torch.Size, labels: torch.Tensor, loss_weights: torch.Tensor | None, packed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """label_positions, label_ids and label_weights [L] for inputs of `shape` [B, T].

    packed: position ids of a packed batch. The first token of an example is no label, because the example before must
    not predict it.
    """
    for name, values, like in (("labels", labels, "input_ids"), ("loss_weights", loss_weights, "labels")):
        if values is not None and values.shape != shape:
            raise ValueError(f"{name}: shape {list(values.shape)}; expected {list(shape)} like {like}.")
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != -100
    if packed is not None:
        wanted[:, :-1] &= packed.expand_as(labels)[:, 1:] != 0
    positions = wanted.flatten().nonzero().flatten()
    weights = None if loss_weights is None else loss_weights.flatten()[positions + 1].float()
    return positions, labels.flatten()[positions + 1], weights
