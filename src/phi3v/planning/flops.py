"""Work of a training job, and its floating point operations, counted from the layer sizes. No torch.

Two counts, and the ratios that speed measurements print from them:

    MFU = model FLOP    / (seconds x devices x dense peak)      model: what the method must compute
    HFU = hardware FLOP / (seconds x devices x dense peak)      hardware: what runs, recomputation included

Model FLOP count forward and backward passes with causal attention (half the square). Hardware FLOP add the repeated
forward passes of activation checkpointing, the masked half of the square if attention is eager, and the scores that a
flash kernel recomputes in its backward pass. Frozen weights have no weight gradient and, below the first trained layer,
no input gradient. Adapters count with their own products. A multiplication and an addition are two operations; only
matrix products count, as in PyTorch's FlopCounterMode (Chowdhery et al. 2022, PaLM, appendix B, for MFU and HFU).

    work = example_work(geometry, tokens=2443, tiles=13, labels=12) + …            # additive over examples
    flops = training_flops(geometry, work, "lora", rank=32)
    utilisation(flops.model, seconds=0.66, peak_tflops=312)                        # MFU
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal

from phi3v.planning.geometry import (
    Linears,
    clip_layer_linears,
    decoder_layer_linears,
    has_adapter,
    parameters,
    patches_per_tile,
    projector_linears,
    trainable_parameters,
)
from phi3v.settings import Geometry, Hardware
from phi3v.settings.rows import Optimizer

Method = Literal["full", "frozen", "frozen_forward_only", "lora", "qlora"]

FORMULA = (
    "MFU = model FLOP / (seconds x devices x dense peak), HFU = hardware FLOP / the same. Model FLOP: matrix products "
    "of the forward and backward pass, with causal attention and the adapters' own products, without gradients of "
    "frozen weights. Hardware FLOP add what checkpointing and the flash kernel compute again, and the masked half that "
    "eager attention computes"
)
"""Printed with every MFU and HFU."""


@dataclass(frozen=True)
class Work:
    """Amounts of a batch that determine its cost. They are additive over examples and micro-batches."""

    examples: float = 0
    tokens: float = 0
    """Decoder positions without padding."""
    tokens_squared: float = 0
    """Sum over examples of tokens^2: attention does not cross examples."""
    tiles: float = 0
    """Tiles that the vision tower processes."""
    projected: float = 0
    """Rows that the projector processes: merged patches and separators."""
    labels: float = 0
    """Positions that the head processes."""

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def scaled(self, factor: float) -> Work:
        """This work multiplied by `factor`."""
        return Work(*(getattr(self, field.name) * factor for field in fields(self)))


def example_work(geometry: Geometry, tokens: float, tiles: float, labels: float) -> Work:
    """Work of one example: its tokens (image tokens included), real tiles (global views included), label tokens.

    Training gets these from the batch: attention_mask.sum(-1), pixel_values.shape[0], (labels != -100).sum(-1).
    """
    merged = patches_per_tile(geometry.vision) // 4
    # The two separators are projected once per forward pass, regardless of how often they occur.
    projected = tiles * merged + (2 if tiles else 0)
    return Work(1, tokens, tokens**2, tiles, projected, labels)


@dataclass(frozen=True)
class Stack:
    """The identical layers of a tower that run, and the amount of data through one of them."""

    layers: int
    width: int
    inner: int
    """Width of the feed-forward layer."""
    heads: int
    linears: Linears
    sequences: float
    """Tiles, or examples."""
    rows: float
    """Positions of all sequences."""
    pairs: float
    """Pairs of positions of a sequence, summed over the sequences: one head's scores."""
    group: str
    """Of its weights (phi3v.model.modeling.GROUPS)."""


def stacks(geometry: Geometry, work: Work) -> tuple[Stack, Stack]:
    """The vision tower without its last layer, which never runs, and the decoder."""
    vision, positions = geometry.vision, patches_per_tile(geometry.vision) + 1
    widths = [(of.hidden_size, of.intermediate_size, of.num_attention_heads) for of in (vision, geometry)]
    tiles, layers, linears = work.tiles, vision.num_hidden_layers - 1, clip_layer_linears(vision)
    tower = Stack(layers, *widths[0], linears, tiles, tiles * positions, tiles * positions**2, "clip")
    layers, linears = geometry.num_hidden_layers, decoder_layer_linears(geometry)
    return tower, Stack(layers, *widths[1], linears, work.examples, work.tokens, work.tokens_squared, "decoder")


@dataclass(frozen=True)
class Trained:
    """The weights that a method trains."""

    method: Method
    frozen: frozenset[str] = frozenset()
    """Groups that the method trains by default, but the row freezes (freeze_vision_model, freeze_decoder)."""
    targets: tuple[str, ...] = ()
    """Names of the layers with adapters (lora_targets); empty: all."""

    @property
    def adapters(self) -> bool:
        """LoRA or QLoRA: only adapters train."""
        return self.method in ("lora", "qlora")

    def weights(self, group: str) -> bool:
        """Whether the weights of a group train themselves."""
        vision = group in ("clip", "projector", "separators")
        return not self.adapters and group not in self.frozen and (self.method == "full" or not vision)

    def adapter(self, group: str, name: str) -> bool:
        """Whether a layer has an adapter."""
        return self.adapters and has_adapter(group, name, self.frozen, self.targets)

    def reaches(self, group: str, linears: Collection[str]) -> bool:
        """Whether anything of a group trains. linears: names of its layers."""
        return self.weights(group) or any(self.adapter(group, name) for name in linears)


@dataclass(frozen=True)
class Setup:
    """A training job on its devices, as input of the formulas."""

    geometry: Geometry
    hardware: Hardware
    method: Method
    dtype: str
    flash: bool
    work: Work
    """Work of a mean example."""
    longest: Work
    """Work of the example that determines the peak memory."""
    batch_size: int
    nodes: int = 1
    per_node: int = 1
    micro_batch: int = 1
    rank: int = 0
    as_published: bool = False
    """Count the recipe's scripts: all layers recomputed, logits at every position, and the tiles given in `work`."""
    recompute: float = 1.0
    """Share of the layers whose activations are recomputed in the backward pass: 1 all, 0 none, every n-th layer
    1/n."""
    optimizer: Optimizer = "adamw"
    zero_stage: int = 2
    """DeepSpeed ZeRO stage of full fine-tuning with adamw; 0: plain data parallel."""
    token_bound: int | None = None
    """Most tokens of a micro-batch of several examples (max_tokens_per_micro_batch); of a pack if `packed`."""
    packed: bool = False
    """Whether examples are joined up to the bound, whatever the micro-batch."""
    frozen: frozenset[str] = frozenset()
    """Groups that the method would train but the row does not (freeze_decoder)."""
    lora_targets: tuple[str, ...] = ()
    """Names of the layers with adapters; empty: all."""
    lengths: Literal["estimated", "counted"] = "estimated"
    """Whether `longest` is an example of the converted data, or follows from the dataset's entry."""

    @property
    def devices(self) -> int:
        """Processes, one per device."""
        return self.nodes * self.per_node

    @property
    def accumulation(self) -> float:
        """Micro-steps per optimizer step on each device."""
        return self.batch_size / (self.devices * self.micro_batch)

    @property
    def peak_work(self) -> Work:
        """The most of a micro-batch: its size times the longest example, which alone may exceed the bound."""
        fitting = max(1.0, self.token_bound / self.longest.tokens) if self.token_bound else float(self.micro_batch)
        return self.longest.scaled(fitting if self.packed else min(self.micro_batch, math.floor(fitting)))

    @property
    def adapters(self) -> bool:
        """LoRA or QLoRA: only adapters train, and plain data parallelism is used instead of ZeRO."""
        return self.choice.adapters

    @property
    def choice(self) -> Trained:
        """Which weights train."""
        return Trained(self.method, self.frozen, self.lora_targets)

    @property
    def replicated(self) -> bool:
        """Whether every device holds the complete optimizer states. ZeRO does not run with 8-bit states."""
        return self.adapters or "8bit" in self.optimizer or self.zero_stage == 0

    @property
    def trains_by(self) -> str:
        """Method whose parameters the optimizer holds."""
        return "frozen" if self.method == "frozen_forward_only" else self.method

    @property
    def trains_vision(self) -> bool:
        """Whether the vision tower gets gradients."""
        return self.choice.reaches("clip", clip_layer_linears(self.geometry.vision))

    @property
    def trains_decoder(self) -> bool:
        """Whether the decoder's layers get gradients."""
        return self.method != "frozen_forward_only"

    @property
    def trained(self) -> int:
        """Parameters that the optimizer updates, summed over all devices."""
        return sum(self.trainable().values())

    def trainable(self, frozen: Collection[str] = ()) -> dict[str, int]:
        """Trained parameters by group. frozen: further groups that do not train."""
        return trainable_parameters(
            self.geometry, self.trains_by, self.rank, self.frozen | set(frozen), self.lora_targets
        )

    @property
    def with_gradient(self) -> int:
        """Parameters that have a gradient."""
        return self.trained if self.trains_decoder else parameters(self.geometry)["head"]

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the compute type."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def fused(self) -> bool:
        """Whether this project's fused kernels run: on GPUs from Ampere on, the first with bfloat16
        (phi3v.model.fused)."""
        return not self.as_published and self.hardware.kind != "cpu" and self.hardware.bf16

    @property
    def float32_weights(self) -> bool:
        """Whether the weights are held in float32 under autocast.

        The recipe's scripts did so for fp16; that they did it for every adapter run without flash attention is inferred
        from its memory table: LoRA takes 18 GB more than QLoRA there, and 6 GB more with flash attention. DeepSpeed,
        which runs full fine-tuning, casts the weights to the compute type.
        """
        published = self.as_published and self.adapters and (self.dtype == "fp16" or not self.flash)
        return self.dtype == "fp32" or published


@dataclass(frozen=True)
class Flops:
    """FLOP of forward, backward and repeated forward passes (recompute), for one choice of counting attention."""

    forward: float = 0
    backward: float = 0
    recompute: float = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute)

    @property
    def total(self) -> float:
        """All executed FLOP."""
        return self.forward + self.backward + self.recompute


@dataclass(frozen=True)
class TrainingFlops:
    """FLOP of a batch: `model` for MFU, `hardware` for HFU."""

    model: float
    hardware: float
    parts: dict[str, Flops]
    """Hardware FLOP of vision, projector, decoder, attention (both towers') and head."""


@dataclass(frozen=True)
class _Counting:
    """Properties of a step that determine its FLOP: the arguments of training_flops."""

    trained: Trained
    rank: int
    flash: bool
    causal: bool
    """Whether the masked half of the decoder's scores is left out."""
    recompute: float
    reentrant: bool

    def linear(
        self,
        shape: tuple[int, int],
        rows: float,
        group: str,
        name: str,
        input_gradient: bool = True,
        recompute: float = 0.0,
        stops_here: bool = False,
    ) -> Flops:
        """A linear layer (inputs, outputs) over `rows` rows, and its adapter, which runs before the layer.

        recompute: share of the layers that run again in the backward pass. stops_here: the last product of its layer,
        which non-reentrant checkpointing leaves out once everything that is saved has been recomputed.
        """
        inputs, outputs = shape
        rank = self.rank if self.trained.adapter(group, name) else 0
        base, down, up = (2.0 * rows * size for size in (inputs * outputs, inputs * rank, rank * outputs))
        # dB and the gradient of the inner activation, dA, and the input's gradient.
        backward = base * (input_gradient + self.trained.weights(group)) + 2 * up + down + down * input_gradient
        return Flops(base + down + up, backward, (down + up + base * (not stops_here)) * recompute)

    def layers(self, stack: Stack, readers: int, first_has_input_gradient: bool) -> Flops:
        """Linear layers of a stack; the first `readers` of each layer read the layer's own input."""
        # bitsandbytes' product is a custom function, which saves its inputs after it has run.
        stops = not (self.reentrant or self.trained.method == "qlora")
        total = Flops()
        for index, (name, shape) in enumerate(stack.linears.items()):
            stops_here = stops and index == len(stack.linears) - 1
            for count, needed in ((stack.layers - 1, True), (1, first_has_input_gradient or index >= readers)):
                product = self.linear(shape, stack.rows, stack.group, name, needed, self.recompute, stops_here)
                total += Flops(count * product.forward, count * product.backward, count * product.recompute)
        return total

    def attention(self, stack: Stack, pairs: float) -> Flops:
        """Scores and weighted values: two products of `pairs` x width per layer, four in the backward pass."""
        product = 2.0 * stack.width * pairs * stack.layers
        # A flash kernel computes the scores again in its backward pass (Dao 2023, FlashAttention-2, section 3.1.2).
        return Flops(2 * product, (5 if self.flash else 4) * product, 2 * product * self.recompute)

    def parts(self, geometry: Geometry, work: Work) -> dict[str, Flops]:
        """FLOP by part, both attentions as one."""
        tower, decoder = stacks(geometry, work)
        vision, trained = geometry.vision, self.trained
        in_tower = trained.reaches("clip", tower.linears)
        in_vision = in_tower or trained.reaches("projector", ["img_projection"])
        patches = 2.0 * work.tiles * patches_per_tile(vision) * 3 * vision.patch_size**2 * tower.width
        embedded = Flops(patches, patches if trained.weights("clip") else 0)
        # The separators are rows of the projector's input.
        below = in_tower or trained.weights("separators")
        projector = [
            self.linear(shape, work.projected, "projector", "img_projection", below or (in_vision and index > 0))
            for index, shape in enumerate(projector_linears(geometry))
        ]
        # Under frozen inputs a decoder whose norms train still needs every input gradient; one with adapters only does
        # not, unless PEFT makes the embeddings require gradients, which it does for checkpointing.
        first = in_vision or (self.recompute > 0 if trained.adapters else trained.weights("decoder"))
        in_decoder = first or trained.reaches("decoder", decoder.linears)
        causal = (decoder.pairs + work.tokens) / 2 if self.causal else decoder.pairs
        needed = {
            "vision": (embedded + self.layers(tower, 3, trained.weights("clip")), in_tower),
            "projector": (sum(projector, Flops()), in_vision),
            "decoder": (self.layers(decoder, 1, first), in_decoder),
            "tower attention": (self.attention(tower, tower.pairs), in_tower),
            "decoder attention": (self.attention(decoder, causal), in_decoder),
        }
        if trained.method == "frozen_forward_only":
            needed |= {name: (part, False) for name, (part, _) in needed.items()}
        parts = {name: part if backward else Flops(part.forward) for name, (part, backward) in needed.items()}
        return {
            "vision": parts["vision"],
            "projector": parts["projector"],
            "attention": parts["tower attention"] + parts["decoder attention"],
            "decoder": parts["decoder"],
            "head": self.linear(
                (geometry.hidden_size, geometry.vocab_size), work.labels, "head", "lm_head", in_decoder
            ),
        }


def training_flops(
    geometry: Geometry,
    work: Work,
    method: Method,
    rank: int | None = None,
    flash: bool = True,
    recompute: float = 1.0,
    reentrant: bool = False,
    frozen: Collection[str] = (),
    targets: Collection[str] = (),
) -> TrainingFlops:
    """FLOP of training on `work` with a method of the tables.

    method: full, frozen (vision part frozen), lora, qlora (counts like lora: weights are expanded, then multiplied),
    or frozen_forward_only: what the published frozen rows very likely ran, where only the final norm and the head have
    gradients. rank: of the adapters. flash: causal kernels that skip the masked half. recompute: share of the layers
    whose activations are recomputed in the backward pass (activation checkpointing), 0-1. reentrant: recomputation
    repeats whole layers, as in the published code; this project's leaves out each layer's last product.
    frozen, targets: further frozen groups, and the layers with adapters (Trained). Raises ValueError for adapters
    without a rank.
    """
    if method in ("lora", "qlora") and not rank:
        raise ValueError(f"rank: {rank!r}; method {method} expects an integer >= 1")
    trained, r = Trained(method, frozenset(frozen), tuple(targets)), rank or 0
    needed = _Counting(trained, r, False, True, 0.0, False).parts(geometry, work)
    run = _Counting(trained, r, flash, flash, recompute, reentrant).parts(geometry, work)
    return TrainingFlops(sum(part.total for part in needed.values()), sum(part.total for part in run.values()), run)


def utilisation(flops: float, seconds: float, peak_tflops: float, devices: int = 1) -> float:
    """Share of the dense peak, 0-1: MFU of `model`, HFU of `hardware` FLOP (see FORMULA).

    flops: executed by all devices in `seconds`. peak_tflops: Hardware.peak_tflops of the compute dtype, one device.
    Raises ValueError if seconds or peak are not positive: an unknown peak gives no utilisation, never a guess.
    """
    if not seconds > 0 or not peak_tflops > 0:
        raise ValueError(f"seconds {seconds!r}, peak_tflops {peak_tflops!r}: expected both > 0")
    return flops / (seconds * devices * peak_tflops * 1e12)
