"""Floating point operations of a training step, counted from the layer sizes. No torch.

Two counts, and the ratios that speed measurements print from them:

    MFU = model FLOP    / (seconds x devices x dense peak)      model: what the method must compute
    HFU = hardware FLOP / (seconds x devices x dense peak)      hardware: what runs, recomputation included

Model FLOP are those of forward and backward with causal attention (half the square); hardware FLOP add the forward
passes repeated under activation checkpointing, the upper half of the square where attention is eager, and the scores
that a flash kernel computes again in its backward pass. Frozen weights have no weight gradient and, below them, no
input gradient; adapters count as what they are. A multiplication and an addition are two operations; only matrix
products count, as in PyTorch's FlopCounterMode (Chowdhery et al. 2022, PaLM, appendix B, for MFU and HFU).

    work = example_work(geometry, tokens=2443, tiles=13, labels=12) + …            # additive over examples
    flops = training_flops(geometry, work, "lora", rank=32)
    utilisation(flops.model, seconds=0.66, peak_tflops=312)                        # MFU
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from phi3v.planning.geometry import (
    clip_layer_linears,
    decoder_layer_linears,
    patches_per_tile,
    projector_linears,
)
from phi3v.settings import Geometry

Method = Literal["full", "frozen", "frozen_forward_only", "lora", "qlora"]

FORMULA = (
    "MFU = model FLOP / (s x devices x dense peak), HFU = hardware FLOP / the same. Model FLOP: matrix products of the "
    "forward and backward pass, causal attention, no gradients of frozen weights, adapters as what they are; hardware "
    "FLOP: also what checkpointing and the flash kernel compute again, and the masked half that eager attention computes"
)
"""Printed beside every MFU and HFU."""


@dataclass(frozen=True)
class Work:
    """Amounts of a batch that decide its cost; they add up over examples and micro-batches."""

    examples: float = 0
    tokens: float = 0
    """Decoder positions without padding."""
    tokens_squared: float = 0
    """Sum over examples of tokens^2: attention does not cross examples."""
    tiles: float = 0
    """Tiles the vision tower runs on."""
    projected: float = 0
    """Rows through the projector: merged patches and separators."""
    labels: float = 0
    """Positions the head runs on."""

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def scaled(self, factor: float) -> Work:
        """This work `factor` times over."""
        return Work(*(getattr(self, field.name) * factor for field in fields(self)))


def example_work(geometry: Geometry, tokens: float, tiles: float, labels: float) -> Work:
    """Work of one example: its tokens (image tokens included), real tiles (global views included), label tokens.

    A trainer gets these from the batch: attention_mask.sum(-1), pixel_values.shape[0], (labels != -100).sum(-1).
    """
    merged = patches_per_tile(geometry.vision) // 4
    # The two separators are projected once a forward pass, whatever the number of places they stand in.
    projected = tiles * merged + (2 if tiles else 0)
    return Work(1, tokens, tokens**2, tiles, projected, labels)


@dataclass(frozen=True)
class Flops:
    """FLOP of forward, backward and repeated forward passes (recompute), for one choice of counting attention."""

    forward: float
    backward: float
    recompute: float = 0

    @property
    def total(self) -> float:
        """All that runs."""
        return self.forward + self.backward + self.recompute


@dataclass(frozen=True)
class TrainingFlops:
    """FLOP of a batch: `model` for MFU, `hardware` for HFU."""

    model: float
    hardware: float
    parts: dict[str, Flops]
    """Hardware FLOP of vision, projector, decoder, attention (both towers') and head."""


@dataclass(frozen=True)
class Linear:
    """One kind of matrix product: `count` layers of inputs x outputs over `rows` rows."""

    inputs: int
    outputs: int
    rows: float
    count: int = 1
    weight_gradient: bool = True
    input_gradient: bool = True
    rank: int = 0
    """Rank of the adapter beside it, 0 = none."""

    def flops(self, recompute: float = 0.0, stops_here: bool = False) -> Flops:
        """recompute: share of the layers that run again in the backward pass. stops_here: the last product of its layer,
        which non-reentrant checkpointing leaves out once everything that is saved has been recomputed. An adapter
        beside it runs before it."""
        base = 2.0 * self.rows * self.inputs * self.outputs
        down, up = 2.0 * self.rows * self.inputs * self.rank, 2.0 * self.rows * self.rank * self.outputs
        backward = base * (self.weight_gradient + self.input_gradient)
        # dB and the gradient of the inner activation, dA, and the input's gradient.
        backward += 2 * up + down + down * self.input_gradient if self.rank else 0
        again = down + up if stops_here else base + down + up
        return Flops(self.count * (base + down + up), self.count * backward, self.count * again * recompute)


def _sum(parts: Iterable[Flops]) -> Flops:
    listed = list(parts)
    return Flops(
        sum(part.forward for part in listed),
        sum(part.backward for part in listed),
        sum(part.recompute for part in listed),
    )


def _tower(
    linears: dict[str, tuple[int, int]], readers: int, rows: float, layers: int, rank: int, weights: bool,
    recompute: float, reentrant: bool, first_has_input_gradient: bool,
) -> Flops:  # fmt: skip
    """Linear layers of `layers` like layers; the first `readers` of each read the layer's own input."""
    parts = []
    for index, (inputs, outputs) in enumerate(linears.values()):
        stops_here = not reentrant and index == len(linears) - 1
        first_differs = index < readers and not first_has_input_gradient
        for count, needs in ((layers - first_differs, True), (int(first_differs), False)):
            parts.append(Linear(inputs, outputs, rows, count, weights, needs, rank).flops(recompute, stops_here))
    return _sum(parts)


def _attention(width: int, pairs: float, layers: int, flash: bool, recompute: float) -> Flops:
    """Scores and weighted values: two products of `pairs` x width a layer, four in the backward pass."""
    product = 2.0 * width * pairs * layers
    # A flash kernel computes the scores again in its backward pass (Dao 2023, FlashAttention-2, section 3.1.2).
    return Flops(2 * product, (5 if flash else 4) * product, 2 * product * recompute)


def _count(
    geometry: Geometry, work: Work, method: Method, rank: int, flash: bool, causal: bool,
    recompute: float, reentrant: bool, vision_adapters: bool,
) -> dict[str, Flops]:  # fmt: skip
    vision, adapters = geometry.vision, method in ("lora", "qlora")
    trains_vision = method == "full" or (adapters and vision_adapters)
    trains_decoder = method != "frozen_forward_only"
    weights = not adapters
    vision_rank = rank if adapters and vision_adapters else 0
    decoder_rank = rank if adapters else 0
    # bitsandbytes' product is a custom function, which saves its inputs after it has run.
    reentrant = reentrant or method == "qlora"
    layers = vision.num_hidden_layers - 1
    patches = patches_per_tile(vision)
    rows = work.tiles * (patches + 1)

    patch = Flops(2.0 * work.tiles * patches * 3 * vision.patch_size**2 * vision.hidden_size, 0.0)
    if method == "full":
        patch = Flops(patch.forward, patch.forward)
    tower = _tower(
        clip_layer_linears(vision),
        3,
        rows,
        layers,
        vision_rank,
        weights,
        recompute,
        reentrant,
        first_has_input_gradient=weights,
    )
    tower_attention = _attention(vision.hidden_size, work.tiles * (patches + 1) ** 2, layers, flash, recompute)
    projector = _sum(
        Linear(i, o, work.projected, 1, weights, trains_vision, vision_rank).flops()
        for i, o in projector_linears(geometry)
    )
    if not trains_vision:
        patch, tower, tower_attention, projector = (
            Flops(part.forward, 0.0) for part in (patch, tower, tower_attention, projector)
        )

    # Under frozen inputs a decoder whose norms train still needs every input gradient; one with adapters only does not,
    # unless PEFT makes the embeddings require gradients, which it does for checkpointing.
    decoder = _tower(
        decoder_layer_linears(geometry), 1, work.tokens, geometry.num_hidden_layers, decoder_rank, weights,
        recompute, reentrant, first_has_input_gradient=weights or trains_vision or recompute > 0,
    )  # fmt: skip
    pairs = (work.tokens_squared + work.tokens) / 2 if causal else work.tokens_squared
    attention = _attention(geometry.hidden_size, pairs, geometry.num_hidden_layers, flash, recompute)
    if not trains_decoder:
        decoder, attention = Flops(decoder.forward, 0.0), Flops(attention.forward, 0.0)
    head = Linear(geometry.hidden_size, geometry.vocab_size, work.labels, 1, weights, True, decoder_rank).flops()
    return {
        "vision": _sum([patch, tower]),
        "projector": projector,
        "decoder": decoder,
        "attention": _sum([tower_attention, attention]),
        "head": head,
    }


def training_flops(
    geometry: Geometry,
    work: Work,
    method: Method,
    rank: int | None = None,
    flash: bool = True,
    recompute: float = 1.0,
    reentrant: bool = False,
    vision_adapters: bool = True,
) -> TrainingFlops:
    """FLOP of training on `work` with a method of the tables.

    method: full, frozen (vision part frozen), lora, qlora (counts like lora: weights are expanded, then multiplied),
    or frozen_forward_only: what the published frozen rows very likely ran, where only the final norm and the head have
    gradients. rank: of the adapters. flash: causal kernels that skip the masked half. recompute: share of the layers
    whose activations are recomputed in the backward pass (activation checkpointing), 0-1. reentrant: recomputation
    repeats whole layers, as in the published code; this project's leaves out each layer's last product.
    vision_adapters: whether LoRA sits on the vision part too. Raises ValueError for adapters without a rank.
    """
    if method in ("lora", "qlora") and not rank:
        raise ValueError(f"rank: {rank!r}; method {method} expects an integer >= 1")
    r = rank or 0
    needed = _count(geometry, work, method, r, False, True, 0.0, False, vision_adapters)
    run = _count(geometry, work, method, r, flash, flash, recompute, reentrant, vision_adapters)
    return TrainingFlops(sum(part.total for part in needed.values()), sum(part.total for part in run.values()), run)


def forward_flops(geometry: Geometry, work: Work, causal: bool = True) -> dict[str, float]:
    """FLOP of a forward pass by part, for evaluation and for checking the recipe's figures."""
    parts = _count(geometry, work, "full", 0, False, causal, 0.0, False, False)
    return {name: part.forward for name, part in parts.items()}


def utilisation(flops: float, seconds: float, peak_tflops: float, devices: int = 1) -> float:
    """Share of the dense peak, 0-1: MFU of `model`, HFU of `hardware` FLOP (see FORMULA).

    flops: of all devices together in `seconds`; peak_tflops: Hardware.peak_tflops of the compute dtype, one device.
    Raises ValueError where seconds or peak are not positive: an unknown peak gives no utilisation, never a guess.
    """
    if not seconds > 0 or not peak_tflops > 0:
        raise ValueError(f"seconds {seconds!r}, peak_tflops {peak_tflops!r}: expected both > 0")
    return flops / (seconds * devices * peak_tflops * 1e12)
