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
# runtime/zero/stage_1_and_2.py, single_partition_of_fp32_groups). Adapters: the same, whole on every device.
STATE_BYTES = 12
# Gradients are summed in float32 (grad_accum_dtype of phi3v.training.zero); those of adapters are float32 as well.
GRADIENT_BYTES = 4
# Adapters: a copy of the factors in the compute type (phi3v.model.lora), and with several devices the float32 buckets
# of DistributedDataParallel.
FACTOR_COPY_BYTES, DDP_BYTES = 2, 4
# DeepSpeed's reduction bucket, elements, two of which are held in the backward pass (phi3v.training.zero). A flattened
# copy is reduced, but for bfloat16 within a machine. A device that owns the whole bucket also widens it to float32.
BUCKETS, BUCKET, CPU_BUCKET = 2, 100_000_000, 5_000_000

# What layers hold, bytes per row in half precision, as (width, feed-forward width). SAVED: for the backward pass of one
# layer, its input (2 of the width) included. WORKING: on top, when the most is alive, in the feed-forward block:
# gradients of the output and of both sides of the activation, less the activation's output, which is freed by then.
# Decoder: input, norm 4, queries to values 6, rotated queries and keys 4, attention 2, residual and norm 4; gate and up
# 4, product 2.
DECODER_SAVED, DECODER_WORKING = (20, 6), (2, 4)
# Tower: input, norm 4, queries to values 6, attention 2, residual and norm 4; before and after the activation 4.
TOWER_SAVED, TOWER_WORKING = (16, 4), (2, 2)
# What plain operators hold over fused kernels, on GPUs before Ampere: traced without recomputation before there were
# fused kernels, 21.7 GB for one example of full fine-tuning; with them 16.4.
PLAIN_ACTIVATIONS = 1.3
# Eager attention, bytes per score: probabilities in float32 and in half precision are saved; in the softmax's backward
# pass two float32 gradients are alive beside the float32 probabilities, and ATTENTION_WORKING of the width. With float16
# the second of them is float16: PyTorch's softmax on CUDA converts it by itself (ATen/native/SoftMax.cpp).
SCORES_SAVED, SCORES_WORKING, FLOAT16_SCORES_WORKING, ATTENTION_WORKING = 6, 12, 10, 10
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
class Tower:
    """A stack of layers that trains: bytes of one micro-batch."""

    kept: float
    """From the forward pass to the backward pass of the last layer."""
    layer: float
    """While a layer runs backward, on top of what is kept."""


NOTHING = Tower(0.0, 0.0)


def _width(setup: Setup) -> int:
    """Bytes of an element of the compute type."""
    return 4 if setup.dtype == "fp32" else 2


def _tower(
    setup: Setup, rows: float, widths: tuple[int, int], layers: int, scores: float, saved: tuple[int, int],
    working: tuple[int, int],
) -> Tower:  # fmt: skip
    """saved, working: bytes per row as (width, feed-forward width). scores: elements of a layer's eager attention."""
    wider = _width(setup) / 2
    width, inner = widths
    eager = 0.0 if setup.flash else wider * scores
    inputs = rows * wider * 2 * width
    plain = PLAIN_ACTIVATIONS if setup.hardware.kind != "cpu" and not setup.fused else 1.0
    held = plain * rows * wider * (saved[0] * width + saved[1] * inner) + SCORES_SAVED * eager
    passing = plain * rows * wider * (working[0] * width + working[1] * inner)
    each = FLOAT16_SCORES_WORKING if setup.dtype == "fp16" else SCORES_WORKING
    attention = rows * wider * ATTENTION_WORKING * width + each * eager
    recomputed = layers * setup.recompute
    # Layers that are not recomputed free what they saved on the way to the first that is.
    layer = max(held - inputs + passing, attention) if setup.recompute == 1 else max(passing, attention - held)
    return Tower(recomputed * inputs + (layers - recomputed) * held, layer)


def _towers(setup: Setup, work: Work) -> tuple[Tower, Tower, float]:
    """Vision tower, decoder, and the bytes that are kept between the two: embeddings, projector, image features."""
    geometry, vision = setup.geometry, setup.geometry.vision
    positions, width = patches_per_tile(vision) + 1, _width(setup)
    tower, decoder, between = NOTHING, NOTHING, float(width * work.tokens * geometry.hidden_size)
    if setup.method != "frozen_forward_only":
        decoder = _tower(
            setup, work.tokens, (geometry.hidden_size, geometry.intermediate_size), geometry.num_hidden_layers,
            geometry.num_attention_heads * work.tokens_squared, DECODER_SAVED, DECODER_WORKING,
        )  # fmt: skip
    if setup.method in ("full", "lora", "qlora"):
        tower = _tower(
            setup, work.tiles * positions, (vision.hidden_size, vision.intermediate_size),
            vision.num_hidden_layers - 1, vision.num_attention_heads * work.tiles * positions**2, TOWER_SAVED,
            TOWER_WORKING,
        )  # fmt: skip
        # The projector's input, its hidden layer before and after the activation, and its output; if the embeddings
        # train, pixels and embedded patches as well.
        pixels = 3 * vision.image_size**2 + positions * vision.hidden_size if setup.method == "full" else 0
        between += width * (work.tiles * pixels + work.projected * (4 * vision.hidden_size + 3 * geometry.hidden_size))
    return tower, decoder, between


def _weights(setup: Setup) -> float:
    held = sum(parameters(setup.geometry).values())
    if setup.method != "qlora":
        return float(held * _width(setup))
    quantised = quantised_parameters(setup.geometry)
    return quantised * NF4_BYTES + (held - quantised) * _width(setup)


def _trained(setup: Setup) -> int:
    return sum(trainable_parameters(setup.geometry, setup.trains_by, setup.rank).values())


def _resting(setup: Setup) -> dict[str, float]:
    """Bytes held between optimizer steps."""
    resting = {"weights": _weights(setup)}
    if setup.adapters:
        resting["adapters"] = (STATE_BYTES + FACTOR_COPY_BYTES) * float(_trained(setup))
        if setup.devices > 1:
            resting["buckets"] = DDP_BYTES * float(_trained(setup))
    else:
        resting["optimizer"] = STATE_BYTES * _trained(setup) / setup.devices
    if setup.hardware.kind == "cpu":
        resting["runtime"] = CPU_RUNTIME
    return resting


def _buckets(setup: Setup) -> float:
    """Bytes of DeepSpeed's reduction during the backward pass."""
    cpu, alone = setup.hardware.kind == "cpu", setup.devices == 1
    if setup.adapters or (cpu and alone):
        return 0.0
    in_place = setup.nodes == 1 and setup.dtype == "bf16" and not cpu
    copies = (BUCKETS if in_place else BUCKETS + 1) * _width(setup) + (GRADIENT_BYTES if alone else 0)
    return float((CPU_BUCKET if cpu else BUCKET) * copies)


def memory(setup: Setup) -> Memory:
    """Bytes of the setup on one device, for its longest example times the micro-batch."""
    geometry, work = setup.geometry, setup.longest.scaled(setup.micro_batch)
    tower, decoder, between = _towers(setup, work)
    gradients = GRADIENT_BYTES * _trained(setup) / (1 if setup.adapters else setup.devices)
    # Sums of earlier micro-steps are there from the start, those of the only one grow during its backward pass.
    earlier = gradients if setup.accumulation > 1 else 0.0
    head, largest = parameters(geometry)["head"], geometry.hidden_size * geometry.intermediate_size
    fresh = 0.0 if setup.adapters else float(_width(setup))
    # The weight after the feed-forward block's activation: expanded when the most is alive.
    expanded = 2.0 * largest if setup.method == "qlora" else 0.0
    logits = {"logits": work.labels * geometry.vocab_size * LOGIT_BYTES, "weight gradient": fresh * head}
    both, passing = tower.kept + decoder.kept, {"buckets": _buckets(setup), "embeddings": between}
    backward = {**passing, "weight gradient": fresh * largest, "4-bit expansion": expanded}
    moments = {
        "backward of the head": {**passing, "gradients": earlier, "layer inputs": both, **logits},
        "backward of the decoder": {
            **backward, "gradients": earlier, "layer inputs": both, "activations": decoder.layer,
        },
        "end of the decoder's backward": {
            **backward, "gradients": gradients, "layer inputs": tower.kept, "activations": decoder.layer,
        },
        "backward of the tower": {
            **backward, "gradients": gradients, "layer inputs": tower.kept, "activations": tower.layer,
        },
        "optimizer step": {"gradients": gradients},
    }  # fmt: skip
    cpu = setup.hardware.kind == "cpu"
    return Memory(_resting(setup), moments, 0.0 if cpu else FRAGMENTATION, 0.0 if cpu else CONTEXT)


def probe_bytes(setup: Setup) -> float:
    """Allocated bytes at the peak of a forward and backward pass alone, without optimizer and with whole gradients."""
    need, trained = memory(setup), _trained(setup)
    each = GRADIENT_BYTES if setup.adapters else _width(setup)
    started = {"backward of the head", "backward of the decoder"}
    passing = [
        sum(size for part, size in parts.items() if part not in ("gradients", "buckets"))
        + (0 if name in started else each * trained)
        for name, parts in need.moments.items()
    ]
    adapters = (4.0 + FACTOR_COPY_BYTES) * trained if setup.adapters else 0.0
    return _weights(setup) + need.resting.get("runtime", 0.0) + adapters + max(passing)


def fits(setup: Setup) -> Fit:
    """yes: reserved and context fit the device; tight: only if PyTorch frees cached memory, which is slower; no.

    A CPU always fits.
    """
    capacity, need = setup.hardware.memory_gb, memory(setup)
    if capacity is None or need.device_gb <= capacity:
        return "yes"
    return "tight" if need.least_gb <= capacity else "no"
