"""Memory of one device at its peak, part by part, from counts and three constants. No torch.

    parts = memory(setup, constants)
    parts.total_gb, parts.floor_gb, fits(setup, constants)

`total` is what the process takes where there is room: all parts at once, as the allocator keeps them. `floor` is the
larger of two moments when it gives back what it can: the backward pass, with gradients leaving as soon as their bucket
is reduced, and the optimizer step, without activations. A job between the two runs, with the device full and some time
lost to the allocator, as the published V100 rows show.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from phi3v.planning.flops import Work
from phi3v.planning.geometry import (
    decoder_layer_linears,
    parameters,
    patches_per_tile,
    quantised_parameters,
    trainable_parameters,
)
from phi3v.planning.setup import Constants, Setup

GB = 1e9
# nf4: half a byte, and a float32 scale for each block of 64 weights (bitsandbytes, double quantisation off).
NF4_BYTES = 0.5 + 4 / 64
# ZeRO's shard while it rests: float32 weight, two moments, float32 gradient.
SHARD_BYTES = 16
# Adapters are float32 with float32 gradients and moments, whole on each device.
ADAPTER_BYTES = 16
# Reduction and gather buckets in 2 bytes, one of them doubled to overlap: their elements (phi3v.training.zero).
BUCKET_BYTES, BUCKET, CPU_BUCKET = 3 * 2, 200_000_000, 5_000_000
# What a CPU process holds once PyTorch, transformers and the Trainer are imported, bytes: 0.50 GB measured.
CPU_RUNTIME = 0.5e9
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
class Memory:
    """Bytes on one device by part."""

    weights: float
    gradients: float
    optimizer: float
    checkpoints: float
    """Layer inputs kept for recomputation (or everything, without it)."""
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
    """What a full device cannot do without; not a part of its own."""

    def parts(self) -> dict[str, float]:
        """Part to GB; they add up to total_gb."""
        return {field.name: getattr(self, field.name) / GB for field in fields(self) if field.name != "floor"}

    @property
    def total_gb(self) -> float:
        """Peak where there is room, GB."""
        return sum(self.parts().values())

    @property
    def floor_gb(self) -> float:
        """Peak when everything that can be given back is, GB."""
        return self.floor / GB


def _weights(setup: Setup) -> float:
    held = sum(parameters(setup.geometry).values())
    width = 4 if setup.dtype == "fp32" else 2
    if setup.float32_weights:
        width = 4
    if setup.method != "qlora":
        return held * width
    quantised = quantised_parameters(setup.geometry)
    return quantised * NF4_BYTES + (held - quantised) * width


def _activations(setup: Setup, work: Work) -> tuple[float, float, float]:
    """(kept for the backward pass, largest layer alive, largest layer's eager scores) of one micro-batch."""
    geometry, vision = setup.geometry, setup.geometry.vision
    width = 2 if setup.dtype == "fp32" else 1
    rows = work.tiles * (patches_per_tile(vision) + 1)
    trains_vision = setup.method in ("full", "lora", "qlora")
    trains_decoder = setup.method != "frozen_forward_only"
    decoder_layer = DECODER_LAYER_BYTES[0] * geometry.hidden_size + DECODER_LAYER_BYTES[1] * geometry.intermediate_size
    clip_layer = CLIP_LAYER_BYTES[0] * vision.hidden_size + CLIP_LAYER_BYTES[1] * vision.intermediate_size
    decoder_kept = 2 * geometry.hidden_size if setup.checkpointing else decoder_layer
    clip_kept = 2 * vision.hidden_size if setup.checkpointing else clip_layer
    kept = work.tokens * geometry.num_hidden_layers * decoder_kept * trains_decoder
    kept += rows * (vision.num_hidden_layers - 1) * clip_kept * trains_vision
    alive = max(work.tokens * decoder_layer, rows * clip_layer)
    scores = 0.0
    if not setup.flash:
        decoder_scores = geometry.num_attention_heads * work.tokens_squared * DECODER_SCORE_LIVE_BYTES
        clip_scores = (
            vision.num_attention_heads * work.tiles * (patches_per_tile(vision) + 1) ** 2 * CLIP_SCORE_LIVE_BYTES
        )
        scores = max(decoder_scores, clip_scores)
        if not setup.checkpointing:
            # Float32 and half probabilities of every layer stay.
            scores += geometry.num_attention_heads * work.tokens_squared * 6 * geometry.num_hidden_layers
    return kept * width, alive * width, scores * width


def memory(setup: Setup, constants: Constants) -> Memory:
    """Bytes of the setup on one device, for its longest example times the micro-batch."""
    geometry, work = setup.geometry, setup.longest.scaled(setup.micro_batch)
    trained = sum(trainable_parameters(geometry, setup.trains_by, setup.rank).values())
    with_gradient = parameters(geometry)["head"] if setup.method == "frozen_forward_only" else trained
    width = 4 if setup.dtype == "fp32" else 2
    kept, alive, scores = _activations(setup, work)
    largest = max(i * o for i, o in decoder_layer_linears(geometry).values())
    if setup.adapters:
        gradients, optimizer, resting = 0.0, float(ADAPTER_BYTES * trained), float(ADAPTER_BYTES * trained)
    else:
        gradients = float(width * with_gradient)
        optimizer = constants.optimizer_bytes * trained / setup.devices
        resting = SHARD_BYTES * trained / setup.devices
    piled = 0.0
    if setup.adapters and not setup.flash:
        piled = (
            constants.cached_scores * geometry.num_attention_heads * work.tokens_squared * geometry.num_hidden_layers
        )
    cpu = setup.hardware.kind == "cpu"
    buckets = 0.0 if setup.adapters or setup.devices == 1 else float(BUCKET_BYTES * (CPU_BUCKET if cpu else BUCKET))
    weights = _weights(setup)
    logits = work.labels * geometry.vocab_size * LOGIT_LIVE_BYTES
    expanded = largest * 6.0 if setup.method == "qlora" else 0.0
    runtime = CPU_RUNTIME if cpu else constants.runtime_gb * GB
    # One layer's gradients stay: they are reduced together.
    one_layer = gradients / (geometry.num_hidden_layers + 1)
    backward = weights + one_layer + resting + kept + alive + scores + logits + buckets + expanded + runtime
    stepping = weights + optimizer + buckets + runtime
    return Memory(
        weights=weights, gradients=gradients, optimizer=optimizer, checkpoints=kept, activations=alive,
        scores=scores + piled, logits=logits, buckets=buckets, quantisation=expanded, runtime=runtime,
        floor=max(backward, stepping),
    )  # fmt: skip


Fit = Literal["yes", "full", "no"]


def fits(setup: Setup, constants: Constants) -> Fit:
    """yes: the peak fits; full: only the floor does, the device runs full; no: not even that. A CPU always fits."""
    capacity = setup.hardware.memory_gb
    need = memory(setup, constants)
    if capacity is None or need.total_gb <= capacity:
        return "yes"
    return "full" if need.floor_gb <= capacity else "no"


def predicted_peak_gb(setup: Setup, constants: Constants) -> float:
    """What a memory reading shows at the peak: the total, or the device's capacity where the job fills it."""
    total = memory(setup, constants).total_gb
    return total if setup.hardware.memory_gb is None else min(total, setup.hardware.memory_gb)
