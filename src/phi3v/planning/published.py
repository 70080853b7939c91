"""The published code: what the recipe's scripts ran for a speed row, and a model of the memory that they took. No torch.

    setup = published_setup(row, geometry, hardware)
    published_memory(setup, MemoryConstants()).total_gb       # beside the row's published_memory_gb

The scripts cannot be run here. This model is fitted to the peaks of the published tables, which are readings of whole
devices (inferred: they are round numbers that reach a V100's full 32 GB, so they include the context and what the
allocator keeps cached). The memory of this project's own code is counted in phi3v.planning.memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from phi3v.planning.flops import Method, Work
from phi3v.planning.geometry import (
    decoder_layer_linears,
    num_image_tokens,
    parameters,
    patches_per_tile,
    quantised_parameters,
    tile_grid,
    trainable_parameters,
)
from phi3v.planning.memory import GB, NF4_BYTES
from phi3v.planning.setup import Setup
from phi3v.settings import Geometry, Hardware, SpeedRow

# RECIPE: mean length of DocVQA at num_crops 16; the scripts pad every picture to 17 tiles, and run the tower on all.
MEAN_TOKENS, PADDED_TILES = 2443.23, 17
# ZeRO's shard while it rests: float32 weight, two moments, float32 gradient.
SHARD_BYTES = 16
# Adapters are float32 with float32 gradients and moments, whole on each device.
ADAPTER_BYTES = 16
# Reduction and gather buckets in 2 bytes, one of them doubled to overlap: 2e8 elements, as DeepSpeed's examples.
BUCKET_BYTES, BUCKET = 3 * 2, 200_000_000
# Largest tensors alive while one decoder layer runs backward, per token: width x (layer input and two norms in both
# precisions 18, queries to output 14), feed-forward width x (gate, up, product 8 and their gradients 6).
DECODER_LAYER_BYTES = (32, 14)
# The same of the tower: width x 16, feed-forward width x 14.
CLIP_LAYER_BYTES = (16, 14)
# Eager scores alive in one layer's backward pass. Decoder: float32 and half probabilities 6, gradients 10; CLIP: 8.
DECODER_SCORE_LIVE_BYTES, CLIP_SCORE_LIVE_BYTES = 16, 8
# Logits: half precision 2, float32 4, its shifted copy 4, log-softmax 4, gradient 4.
LOGIT_LIVE_BYTES = 18


@dataclass(frozen=True)
class MemoryConstants:
    """Three numbers fitted to the memory peaks of the published A100 rows (scripts/plan.py --published)."""

    runtime_gb: float = field(default=3.02, metadata={"unit": "GB a device"})
    """CUDA context, communication buffers, workspaces and the allocator's slack: what is held beside the tensors."""
    optimizer_bytes: float = field(default=24.5, metadata={"unit": "bytes per trained parameter, divided by devices"})
    """ZeRO's shard at its peak, in the optimizer step: float32 weight, moments and gradient (16), and temporaries."""
    cached_scores: float = field(default=3.28, metadata={"unit": "bytes per attention score and decoder layer"})
    """Eager attention without ZeRO (adapters): score blocks that the allocator keeps while the device has room."""


@dataclass(frozen=True)
class PublishedMemory:
    """Bytes on one device by part, as the published code takes them if the device has room for all at once."""

    weights: float
    gradients: float
    optimizer: float
    layer_inputs: float
    """Kept for recomputation."""
    activations: float
    """Largest layer while it runs."""
    scores: float
    """Eager attention's scores: one layer's, and those that pile up without ZeRO."""
    logits: float
    buckets: float
    quantisation: float
    """The largest 4-bit weight while it is expanded."""
    runtime: float
    floor: float
    """The least the job runs in, if everything that can be freed is freed; not a part of its own."""

    def parts(self) -> dict[str, float]:
        """Part to GB; they add up to total_gb."""
        return {item.name: getattr(self, item.name) / GB for item in fields(self) if item.name != "floor"}

    @property
    def total_gb(self) -> float:
        """Peak if the device has room, GB."""
        return sum(self.parts().values())

    @property
    def floor_gb(self) -> float:
        """Peak if everything that can be freed is freed, GB."""
        return self.floor / GB


def published_work(geometry: Geometry) -> Work:
    """A mean example as the recipe's scripts run it: padded tiles, and the head at every position."""
    image_tokens = min(MEAN_TOKENS, float(num_image_tokens(4, 4, tile_grid(geometry.vision))))
    return Work(1, MEAN_TOKENS, MEAN_TOKENS**2, PADDED_TILES, image_tokens, MEAN_TOKENS)


def published_setup(row: SpeedRow, geometry: Geometry, hardware: Hardware, correct_frozen: bool = False) -> Setup:
    """What the scripts ran for a speed row; frozen rows as the legacy, or with `correct_frozen` as they should be."""
    method: Method = row.method
    if row.method == "frozen" and not correct_frozen:
        method = "frozen_forward_only"
    work = published_work(geometry)
    return Setup(
        geometry, hardware, method, row.dtype, row.flash_attention, work, work, row.batch_size, row.nodes,
        row.gpus_per_node, row.known_micro_batch, row.lora_rank or 0, as_published=True,
    )  # fmt: skip


def _weights(setup: Setup) -> float:
    held = sum(parameters(setup.geometry).values())
    width = 4 if setup.float32_weights else 2
    if setup.method != "qlora":
        return held * width
    quantised = quantised_parameters(setup.geometry)
    return quantised * NF4_BYTES + (held - quantised) * width


def _activations(setup: Setup, work: Work) -> tuple[float, float, float]:
    """(layer inputs kept, largest layer alive, largest layer's eager scores) of one micro-batch, bytes."""
    geometry, vision = setup.geometry, setup.geometry.vision
    positions = patches_per_tile(vision) + 1
    rows = work.tiles * positions
    trains_vision = setup.method in ("full", "lora", "qlora")
    trains_decoder = setup.method != "frozen_forward_only"
    decoder_layer = DECODER_LAYER_BYTES[0] * geometry.hidden_size + DECODER_LAYER_BYTES[1] * geometry.intermediate_size
    clip_layer = CLIP_LAYER_BYTES[0] * vision.hidden_size + CLIP_LAYER_BYTES[1] * vision.intermediate_size
    kept = work.tokens * geometry.num_hidden_layers * 2 * geometry.hidden_size * trains_decoder
    kept += rows * (vision.num_hidden_layers - 1) * 2 * vision.hidden_size * trains_vision
    alive = max(work.tokens * decoder_layer, rows * clip_layer)
    scores = 0.0
    if not setup.flash:
        decoder_scores = geometry.num_attention_heads * work.tokens_squared * DECODER_SCORE_LIVE_BYTES
        clip_scores = vision.num_attention_heads * work.tiles * positions**2 * CLIP_SCORE_LIVE_BYTES
        scores = max(decoder_scores, clip_scores)
    return kept, alive, scores


def published_memory(setup: Setup, constants: MemoryConstants) -> PublishedMemory:
    """Bytes of the published code on one device, for its longest example times the micro-batch."""
    geometry, work = setup.geometry, setup.longest.scaled(setup.micro_batch)
    trained = sum(trainable_parameters(geometry, setup.trains_by, setup.rank).values())
    with_gradient = parameters(geometry)["head"] if setup.method == "frozen_forward_only" else trained
    kept, alive, scores = _activations(setup, work)
    if setup.adapters:
        gradients, optimizer, resting = 0.0, float(ADAPTER_BYTES * trained), float(ADAPTER_BYTES * trained)
    else:
        gradients = 2.0 * with_gradient
        optimizer = constants.optimizer_bytes * trained / setup.devices
        resting = SHARD_BYTES * trained / setup.devices
    piled = 0.0
    if setup.adapters and not setup.flash:
        piled = (
            constants.cached_scores * geometry.num_attention_heads * work.tokens_squared * geometry.num_hidden_layers
        )
    buckets = 0.0 if setup.adapters or setup.devices == 1 else float(BUCKET_BYTES * BUCKET)
    weights = _weights(setup)
    logits = work.labels * geometry.vocab_size * LOGIT_LIVE_BYTES
    largest = max(i * o for i, o in decoder_layer_linears(geometry).values())
    expanded = largest * 6.0 if setup.method == "qlora" else 0.0
    runtime = constants.runtime_gb * GB
    # One layer's gradients stay: they are reduced together.
    one_layer = gradients / (geometry.num_hidden_layers + 1)
    backward = weights + one_layer + resting + kept + alive + scores + logits + buckets + expanded + runtime
    stepping = weights + optimizer + buckets + runtime
    return PublishedMemory(
        weights=weights, gradients=gradients, optimizer=optimizer, layer_inputs=kept, activations=alive,
        scores=scores + piled, logits=logits, buckets=buckets, quantisation=expanded, runtime=runtime,
        floor=max(backward, stepping),
    )  # fmt: skip


def device_state(setup: Setup, constants: MemoryConstants) -> Literal["fits", "the card is full", "does not fit"]:
    """How the published code fits its device: with room, with the device full, or not at all."""
    need, capacity = published_memory(setup, constants), setup.hardware.memory_gb
    if capacity is None or need.total_gb <= capacity:
        return "fits"
    return "the card is full" if need.floor_gb <= capacity else "does not fit"


def device_reading_gb(setup: Setup, constants: MemoryConstants) -> float:
    """What a reading of the device shows at the published code's peak: the total, or the capacity if the job fills it."""
    total = published_memory(setup, constants).total_gb
    return total if setup.hardware.memory_gb is None else min(total, setup.hardware.memory_gb)
