"""Memory of one device while this project's code trains, counted from the lifetimes of its tensors. No torch.

    need = memory(setup)
    need.allocated_gb, need.reserved_gb, need.context_gb, need.parts(), fits(setup)

Three numbers that GPU tools report separately:

- allocated: live tensors at the peak (torch.cuda.max_memory_allocated). Counted here, and held to traced runs.
- reserved: what PyTorch's allocator holds, its cached free blocks included (torch.cuda.max_memory_reserved).
- context: what the process takes beside the allocator: CUDA context, kernels, NCCL. nvidia-smi shows reserved + context.

A step has several moments at which memory peaks. Each holds what rests on the device (weights, optimizer states) and
what lives at that moment; the largest decides. What the published code took is in phi3v.planning.published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phi3v.planning.flops import Work
from phi3v.planning.geometry import (
    decoder_layer_linears,
    parameters,
    patches_per_tile,
    quantised_parameters,
    trainable_parameters,
)
from phi3v.planning.setup import Setup

GB = 1e9
# nf4: half a byte, and a float32 scale for each block of 64 weights (bitsandbytes, double quantisation off).
NF4_BYTES = 0.5 + 4 / 64
# ZeRO's shard while it rests, per trained parameter: float32 weight and AdamW's two moments (deepspeed
# runtime/zero/stage_1_and_2.py, single_partition_of_fp32_groups).
STATE_BYTES = 12
# Gradient of a shard: accumulated in float32.
GRADIENT_BYTES = 4
# Adapters: float32 weight, gradient and two moments, whole on every device.
ADAPTER_BYTES = 16
# DistributedDataParallel keeps gradients in buckets, and gradients are views of them (gradient_as_bucket_view is off by
# default, so both exist): float32.
DDP_BYTES = 4
# DeepSpeed's reduction bucket, in elements (phi3v.training.zero): two of them with overlap_comm, and the reduced copy.
BUCKETS, BUCKET, CPU_BUCKET = 3, 100_000_000, 5_000_000
# Saved for the backward pass by a decoder layer that is not recomputed, bytes per token: width x (input, first norm 4,
# queries to values 6, rotated queries and keys 4, attention 2, residual and second norm 4), feed-forward width x
# (gate and up 4, product 2).
DECODER_SAVED = (20, 6)
# The same of the tower: width x (input, norm 4, queries to values 6, attention 2, residual and norm 4), feed-forward
# width x (before and after the activation 4).
CLIP_SAVED = (16, 4)
# Temporaries while the layer runs backward, on top of what it saved: gradients of gate, up and product 6; of the
# residual stream and of queries to values.
DECODER_WORKING = (12, 8)
CLIP_WORKING = (12, 8)
# Eager attention, bytes per score. Saved: float32 and half probabilities. Working: their gradients.
DECODER_SCORES_SAVED, DECODER_SCORES_WORKING = 6, 10
CLIP_SCORES_SAVED, CLIP_SCORES_WORKING = 4, 4
# Logits: half precision 2, float32 4, log-softmax 4, gradients 6.
LOGIT_BYTES = 16
# Per process beside the allocator: CUDA context and kernels about 0.5 GB, NCCL's buffers and workspaces the rest. An
# estimate: no GPU has measured it.
CONTEXT = 1.0e9
# What fragmentation adds to tensors that come and go, with expandable segments. An estimate, as above.
FRAGMENTATION = 0.15
# What a CPU process holds once PyTorch, transformers and the Trainer are imported, bytes: 0.50 GB measured.
CPU_RUNTIME = 0.5e9

Fit = Literal["yes", "tight", "no"]


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    resting: dict[str, float]
    """Held throughout training, by part."""
    moments: dict[str, dict[str, float]]
    """What lives on top at each moment of a step that can be the peak, by part."""
    fragmentation: float
    """Share of the peak's passing tensors that the allocator holds in addition."""
    context: float

    @property
    def peak_moment(self) -> str:
        """The moment at which most is alive."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    def parts(self) -> dict[str, float]:
        """Part to GB at the peak; they add up to allocated_gb."""
        parts = dict(self.resting)
        for name, size in self.moments[self.peak_moment].items():
            parts[name] = parts.get(name, 0.0) + size
        return {name: size / GB for name, size in parts.items()}

    @property
    def allocated_gb(self) -> float:
        """Live tensors at the peak, GB."""
        return sum(self.parts().values())

    @property
    def reserved_gb(self) -> float:
        """What the allocator holds at the peak, GB."""
        return self.allocated_gb + self.fragmentation * sum(self.moments[self.peak_moment].values()) / GB

    @property
    def context_gb(self) -> float:
        """What the process takes beside the allocator, GB."""
        return self.context / GB

    @property
    def device_gb(self) -> float:
        """What a reading of the device shows, GB: reserved and context."""
        return self.reserved_gb + self.context_gb

    @property
    def least_gb(self) -> float:
        """What the job cannot do without, GB: allocated and context."""
        return self.allocated_gb + self.context_gb


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch in one of the two towers."""

    kept: float
    """From the forward pass to the backward pass of the last layer."""
    layer: float
    """While the heaviest layer runs backward, on top of what is kept."""


def _towers(setup: Setup, work: Work) -> tuple[Activations, Activations]:
    """Activations of the vision tower and of the decoder."""
    geometry, vision = setup.geometry, setup.geometry.vision
    positions = patches_per_tile(vision) + 1
    eager = float(not setup.flash)
    tower_scores = eager * vision.num_attention_heads * work.tiles * positions**2
    decoder_scores = eager * geometry.num_attention_heads * work.tokens_squared
    tower = _activations(
        setup, work.tiles * positions, (vision.hidden_size, vision.intermediate_size), vision.num_hidden_layers - 1,
        (CLIP_SAVED, CLIP_WORKING), (CLIP_SCORES_SAVED * tower_scores, CLIP_SCORES_WORKING * tower_scores),
    )  # fmt: skip
    decoder = _activations(
        setup, work.tokens, (geometry.hidden_size, geometry.intermediate_size), geometry.num_hidden_layers,
        (DECODER_SAVED, DECODER_WORKING),
        (DECODER_SCORES_SAVED * decoder_scores, DECODER_SCORES_WORKING * decoder_scores),
    )  # fmt: skip
    trains_vision = setup.method in ("full", "lora", "qlora")
    if not trains_vision:
        tower = Activations(0.0, 0.0)
    if setup.method == "frozen_forward_only":
        decoder = Activations(0.0, 0.0)
    return tower, decoder


def _activations(
    setup: Setup, rows: float, widths: tuple[int, int], layers: int, each: tuple[tuple[int, int], tuple[int, int]],
    scores: tuple[float, float],
) -> Activations:  # fmt: skip
    """each: saved and working bytes per row, by width and feed-forward width. scores: the same of eager attention."""
    double = 2 if setup.dtype == "fp32" else 1
    saved, working = (
        rows * double * (outer * widths[0] + inner * widths[1]) + double * score
        for (outer, inner), score in zip(each, scores, strict=True)
    )
    inputs = rows * double * 2 * widths[0]
    recomputed = layers * setup.recompute
    return Activations(
        kept=recomputed * inputs + (layers - recomputed) * saved, layer=working + (saved if setup.recompute else 0.0)
    )


def _weights(setup: Setup) -> float:
    held = sum(parameters(setup.geometry).values())
    width = 4 if setup.dtype == "fp32" else 2
    if setup.method != "qlora":
        return float(held * width)
    quantised = quantised_parameters(setup.geometry)
    return quantised * NF4_BYTES + (held - quantised) * width


def memory(setup: Setup) -> Memory:
    """Bytes of the setup on one device, for its longest example times the micro-batch."""
    geometry, work = setup.geometry, setup.longest.scaled(setup.micro_batch)
    trained = sum(trainable_parameters(geometry, setup.trains_by, setup.rank).values())
    cpu = setup.hardware.kind == "cpu"
    tower, decoder = _towers(setup, work)
    resting, gradients, bucket = {"weights": _weights(setup)}, 0.0, 0.0
    width = 4 if setup.dtype == "fp32" else 2
    if setup.adapters:
        resting["optimizer"] = float(ADAPTER_BYTES - GRADIENT_BYTES) * trained
        gradients = (GRADIENT_BYTES + (DDP_BYTES if setup.devices > 1 else 0)) * trained
    else:
        resting["optimizer"] = STATE_BYTES * trained / setup.devices
        gradients = GRADIENT_BYTES * trained / setup.devices
        if setup.devices > 1:
            bucket = float(BUCKETS * width * min(CPU_BUCKET if cpu else BUCKET, trained))
    if cpu:
        resting["runtime"] = CPU_RUNTIME
    logits = work.labels * geometry.vocab_size * LOGIT_BYTES
    largest = max(i * o for i, o in decoder_layer_linears(geometry).values())
    expanded = 2.0 * largest if setup.method == "qlora" else 0.0
    both = tower.kept + decoder.kept
    held = {"gradients": gradients, "buckets": bucket}
    moments = {
        "head": {**held, "layer inputs": both, "logits": logits},
        "decoder backward": {**held, "layer inputs": both, "activations": decoder.layer, "4-bit expansion": expanded},
        "tower backward": {**held, "layer inputs": tower.kept, "activations": tower.layer, "4-bit expansion": expanded},
        "optimizer step": {**held, "gradients": gradients + (0 if setup.adapters else gradients)},
    }
    return Memory(resting, moments, 0.0 if cpu else FRAGMENTATION, 0.0 if cpu else CONTEXT)


def probe_bytes(setup: Setup) -> float:
    """Allocated bytes at the peak of a forward and backward pass alone, without optimizer, whole gradients staying."""
    need = memory(setup)
    trained = sum(trainable_parameters(setup.geometry, setup.trains_by, setup.rank).values())
    resting = sum(need.resting.values()) - need.resting["optimizer"]
    width = 4 if setup.dtype == "fp32" or setup.adapters else 2
    passing = {
        name: sum(size for part, size in parts.items() if part not in ("gradients", "buckets"))
        for name, parts in need.moments.items()
    }
    passing["tower backward"] += width * trained
    passing["optimizer step"] += width * trained
    return resting + max(passing.values()) + (4.0 * trained if setup.adapters else 0.0)


def fits(setup: Setup) -> Fit:
    """yes: reserved and context fit the device; tight: only if PyTorch frees cached memory, which is slower; no.

    A CPU always fits.
    """
    capacity, need = setup.hardware.memory_gb, memory(setup)
    if capacity is None or need.device_gb <= capacity:
        return "yes"
    return "tight" if need.least_gb <= capacity else "no"
