"""Peak memory per device during training, counted from the lifetimes of this project's tensors. No torch.

    need = memory(setup)
    need.allocated_gb, need.reserved_gb, need.context_gb, need.parts(), need.verdict(setup.hardware.memory_gb)

GPU tools report three numbers separately:

- allocated: live tensors at the peak (torch.cuda.max_memory_allocated). Counted here and compared with traced runs.
- reserved: memory of PyTorch's allocator, including cached free blocks (torch.cuda.max_memory_reserved).
- context: memory of the process outside the allocator: CUDA context, kernels, NCCL.

nvidia-smi shows reserved + context.

Memory can peak at several moments of a step. Each moment adds its own tensors to those that always stay on the device
(weights, optimizer states). The peak is the moment with the largest sum.

published_memory is a second model, for the memory of the published code. It is fitted to the peaks in the published
tables. We infer that these are readings of the whole device, with the context and the allocator's cache, because they
are round numbers up to the full 32 GB of a V100.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from phi3v.planning.flops import Setup, Stack, Work, stacks
from phi3v.planning.geometry import decoder_layer_linears, parameters, quantised_parameters

GB = 1e9
# nf4: half a byte, and a float32 scale for each block of 64 weights (bitsandbytes, double quantisation off).
NF4_BYTES = 0.5 + 4 / 64
# ZeRO's shard between steps, per trained parameter: float32 weight and AdamW's two moments (deepspeed
# runtime/zero/stage_1_and_2.py, single_partition_of_fp32_groups). Adapters have the same, unsharded.
STATE_BYTES = 12
# The moments by optimizer, without the float32 weight (phi3v.training.optimizers). 8 bits: two numbers and a float32
# scale for each block of 256 of them (bitsandbytes optim/optimizer.py, init_state). Tensors under 4,096 elements keep
# float32 states, but are only 0.03 % of the weights. Paged states are in managed memory, which pages to the host if
# needed.
MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256, "paged_adamw_8bit": 0.0, "adamw_offload": 0.0}
# On the host, per trained parameter. ZeRO 3's offload: float32 weight, moments, the gradient, and the buffer in which
# the gradients of micro-steps are summed (deepspeed runtime/zero/stage3.py, grad_partitions_flat_buffer).
HOST_BYTES = {"paged_adamw_8bit": MOMENT_BYTES["adamw_8bit"], "adamw_offload": 20.0}
# Elements of gathered weights that ZeRO 3 keeps (stage3_max_live_parameters, DeepSpeed's default).
LIVE_WEIGHTS = 1_000_000_000
# Gradients are summed in float32 (grad_accum_dtype of phi3v.training.optimizers). Adapter gradients are float32 too.
GRADIENT_BYTES = 4
# Adapters: a copy of the factors in the compute dtype (phi3v.model.lora), and with several devices the float32 buckets
# of DistributedDataParallel.
FACTOR_COPY_BYTES, DDP_BYTES = 2, 4
# Elements of DeepSpeed's reduction bucket. The backward pass needs two (phi3v.training.optimizers), and a flattened
# copy, except for bfloat16 within a machine. A device that owns the whole bucket also converts it to float32.
BUCKETS, BUCKET, CPU_BUCKET = 2, 100_000_000, 5_000_000

# Activations of a layer, in bytes per row in half precision, as (per width, per feed-forward width). SAVED: for the
# backward pass of one layer, its input (2 per width) included. WORKING: the additional tensors at the layer's peak, in
# the feed-forward block: gradients of the output and of both sides of the activation, minus the activation's output,
# which is already freed. Decoder: input, norm 4, queries to values 6, rotated queries and keys 4, attention 2, residual
# and norm 4; gate and up 4, product 2.
DECODER_SAVED, DECODER_WORKING = (20, 6), (2, 4)
# Tower: input, norm 4, queries to values 6, attention 2, residual and norm 4; before and after the activation 4.
TOWER_SAVED, TOWER_WORKING = (16, 4), (2, 2)
# Factor of plain operators over fused kernels, for GPUs before Ampere. Traced without recomputation, one example of
# full fine-tuning: 21.7 GB with plain operators, 16.4 GB with fused kernels.
PLAIN_ACTIVATIONS = 1.3
# Eager attention, bytes per score: probabilities in float32 and in half precision are saved. The softmax's backward
# pass also needs two float32 gradients beside the float32 probabilities, and ATTENTION_WORKING per width. With float16
# the second gradient is float16, because PyTorch's softmax on CUDA converts internally (ATen/native/SoftMax.cpp).
SCORES_SAVED, SCORES_WORKING, FLOAT16_SCORES_WORKING, ATTENTION_WORKING = 6, 12, 10, 10
# Logits: half precision 2, float32 4, log-softmax 4, gradients 6.
LOGIT_BYTES = 16

# Memory per process outside the allocator: about 0.5 GB of CUDA context and kernels, the rest NCCL's buffers and
# workspaces. An estimate, not measured on a GPU.
CONTEXT = 1.0e9
# Fragmentation of temporary tensors with expandable segments, as a share of them. An estimate, not measured on a GPU.
FRAGMENTATION = 0.15
# Memory of a CPU process after importing PyTorch, transformers and accelerate, in bytes. Measured: 0.50 GB.
CPU_RUNTIME = 0.5e9

Verdict = Literal["yes", "tight", "no"]
"""Whether a job fits on a device. yes: reserved and context fit. tight: only allocated and context fit, so PyTorch must
free cached memory, which is slower. no: not even these fit."""


@dataclass(frozen=True)
class Memory:
    """Memory of a job on one device, in bytes."""

    resting: dict[str, float]
    """Tensors that exist throughout training, by part."""
    moments: dict[str, dict[str, float]]
    """Additional tensors at each moment of a step that can be the peak, by part."""
    fragmentation: float
    """Additional share of the temporary tensors at the peak that the allocator reserves."""
    context: float
    host: float = 0.0
    """Host memory for this device: paged or offloaded states."""

    @property
    def peak_moment(self) -> str:
        """The moment with the most live tensors."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    def parts(self) -> dict[str, float]:
        """GB at the peak by part. The sum is allocated_gb."""
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
        """Memory that the allocator reserves at the peak, GB."""
        return self.allocated_gb + self.fragmentation * sum(self.moments[self.peak_moment].values()) / GB

    @property
    def context_gb(self) -> float:
        """Memory of the process outside the allocator, GB."""
        return self.context / GB

    @property
    def device_gb(self) -> float:
        """Memory that tools report for the device, GB: reserved and context."""
        return self.reserved_gb + self.context_gb

    @property
    def host_gb(self) -> float:
        """Host memory of the optimizer for this device, GB."""
        return self.host / GB

    @property
    def least_gb(self) -> float:
        """Least memory that the job can run with, GB: allocated and context."""
        return self.allocated_gb + self.context_gb

    def verdict(self, capacity_gb: float | None) -> Verdict:
        """Whether a device with `capacity_gb` has enough memory. None means a CPU, on which every job fits."""
        if capacity_gb is None or self.device_gb <= capacity_gb:
            return "yes"
        return "tight" if self.least_gb <= capacity_gb else "no"


@dataclass(frozen=True)
class Tower:
    """Activations of a stack of layers that trains, in bytes per micro-batch."""

    kept: float
    """Live from the forward pass until the backward pass of the last layer."""
    layer: float
    """Additional during the backward pass of a layer."""


NOTHING = Tower(0.0, 0.0)


def _tower(setup: Setup, stack: Stack, saved: tuple[int, int], working: tuple[int, int]) -> Tower:
    """Activations of a stack that trains. saved, working: bytes per row as (per width, per feed-forward width), as
    above."""
    wider = setup.element_bytes / 2
    eager = 0.0 if setup.flash else wider * stack.heads * stack.pairs
    inputs = stack.rows * wider * 2 * stack.width
    plain = PLAIN_ACTIVATIONS if setup.hardware.kind != "cpu" and not setup.fused else 1.0
    held, passing = (
        plain * stack.rows * wider * (each[0] * stack.width + each[1] * stack.inner) for each in (saved, working)
    )
    held += SCORES_SAVED * eager
    per_score = FLOAT16_SCORES_WORKING if setup.dtype == "fp16" else SCORES_WORKING
    attention = stack.rows * wider * ATTENTION_WORKING * stack.width + per_score * eager
    recomputed = stack.layers * setup.recompute
    # Layers without recomputation free their saved tensors before the backward pass reaches the first one with it.
    layer = max(held - inputs + passing, attention) if setup.recompute == 1 else max(passing, attention - held)
    return Tower(recomputed * inputs + (stack.layers - recomputed) * held, layer)


def _towers(setup: Setup, work: Work) -> tuple[Tower, Tower, float]:
    """Activations of vision tower and decoder, and bytes between the two: embeddings, projector, image features."""
    vision, language = stacks(setup.geometry, work)
    tower, decoder, width = NOTHING, NOTHING, setup.element_bytes
    between = float(width * work.tokens * language.width)
    if setup.trains_decoder:
        decoder = _tower(setup, language, DECODER_SAVED, DECODER_WORKING)
    if setup.trains_vision:
        tower = _tower(setup, vision, TOWER_SAVED, TOWER_WORKING)
        # If the embeddings train, pixels and embedded patches.
        pixels = 3 * setup.geometry.vision.image_size**2 * work.tiles + vision.rows * vision.width
        between += width * (pixels if setup.method == "full" else 0)
    if setup.trains_vision or setup.choice.reaches("projector", ["img_projection"]):
        # The projector's input, its hidden layer before and after the activation, and its output.
        between += width * work.projected * (4 * vision.width + 3 * language.width)
    return tower, decoder, between


def _weights(setup: Setup) -> float:
    """Bytes of the weights without adapters."""
    held, width = sum(parameters(setup.geometry).values()), 4 if setup.float32_weights or _casts(setup) else 2
    if setup.optimizer == "adamw_offload" or (setup.zero_stage == 3 and not setup.replicated):
        return width * (held / setup.devices + min(held, LIVE_WEIGHTS))
    if setup.method != "qlora":
        return float(held * width)
    quantised = quantised_parameters(setup.geometry)
    return quantised * NF4_BYTES + (held - quantised) * width


def _casts(setup: Setup) -> bool:
    """Whether autocast converts float32 weights to the compute dtype: full fine-tuning without ZeRO."""
    return setup.replicated and not setup.adapters and setup.dtype != "fp32"


def _resting(setup: Setup) -> dict[str, float]:
    """Bytes on the device between optimizer steps."""
    resting = {"weights": _weights(setup)}
    if setup.adapters:
        resting["adapters"] = (4 + MOMENT_BYTES[setup.optimizer] + FACTOR_COPY_BYTES) * float(setup.trained)
    elif setup.replicated:
        resting["optimizer"] = MOMENT_BYTES[setup.optimizer] * setup.trained
    elif setup.optimizer == "adamw":
        resting["optimizer"] = STATE_BYTES * setup.trained / setup.devices
    if setup.replicated and setup.devices > 1:
        resting["buckets"] = DDP_BYTES * float(setup.trained)
    if setup.hardware.kind == "cpu":
        resting["runtime"] = CPU_RUNTIME
    return resting


def _buckets(setup: Setup) -> float:
    """Bytes of DeepSpeed's reduction buckets during the backward pass."""
    cpu, alone = setup.hardware.kind == "cpu", setup.devices == 1
    if setup.replicated or (cpu and alone):
        return 0.0
    in_place = setup.nodes == 1 and setup.dtype == "bf16" and not cpu
    copies = (BUCKETS if in_place else BUCKETS + 1) * setup.element_bytes + (GRADIENT_BYTES if alone else 0)
    return float((CPU_BUCKET if cpu else BUCKET) * copies)


@lru_cache
def memory(setup: Setup) -> Memory:
    """Memory of the setup on one device, for a micro-batch of its longest examples."""
    geometry, work = setup.geometry, setup.peak_work
    tower, decoder, between = _towers(setup, work)
    gradients = GRADIENT_BYTES * setup.trained / (1 if setup.replicated else setup.devices)
    if setup.optimizer == "adamw_offload":
        gradients = 0.0
    elif setup.zero_stage == 1 and not setup.replicated:
        # Unsharded, and summed in the compute dtype (phi3v.training.parallel).
        gradients = float(setup.element_bytes * setup.trained)
    # Gradients of earlier micro-steps exist from the start. Without them, gradients accumulate during the backward
    # pass.
    earlier = gradients if setup.accumulation > 1 else 0.0
    head, largest = parameters(geometry)["head"], geometry.hidden_size * geometry.intermediate_size
    # Autocast converts the weight for the head, and widens its gradient.
    fresh = 0.0 if setup.adapters else float(setup.element_bytes + (6 if _casts(setup) else 0))
    # The weight after the feed-forward block's activation is expanded at the layer's peak.
    expanded = 2.0 * largest if setup.method == "qlora" else 0.0
    logits = {"logits": work.labels * geometry.vocab_size * LOGIT_BYTES, "weight gradient": fresh * head}
    both, passing = tower.kept + decoder.kept, {"buckets": _buckets(setup), "embeddings": between}
    backward = {**passing, "weight gradient": fresh * largest, "4-bit expansion": expanded}
    running = {**backward, "gradients": gradients, "layer inputs": tower.kept}
    moments = {
        "backward of the head": {**passing, "gradients": earlier, "layer inputs": both, **logits},
        "backward of the decoder": {
            **running,
            "gradients": earlier,
            "layer inputs": both,
            "activations": decoder.layer,
        },
        "end of the decoder's backward": {**running, "activations": decoder.layer},
        "backward of the tower": {**running, "activations": tower.layer},
        "optimizer step": {"gradients": gradients},
    }
    if _casts(setup):
        # Autocast keeps converted weights until the end of the forward pass, and longer for layers without
        # recomputation.
        cast = setup.element_bytes * float(sum(parameters(geometry).values()))
        for name in ("backward of the head", "backward of the decoder"):
            moments[name]["cast weights"] = (1 - setup.recompute) * cast
        moments["end of the forward"] = {
            **passing,
            "gradients": earlier,
            "layer inputs": both,
            "activations": decoder.layer,
            "cast weights": cast,
        }
    cpu = setup.hardware.kind == "cpu"
    shards = 1 if setup.replicated else setup.devices
    host = HOST_BYTES.get(setup.optimizer, 0.0) * setup.trained / shards
    return Memory(_resting(setup), moments, 0.0 if cpu else FRAGMENTATION, 0.0 if cpu else CONTEXT, host)


def probe_bytes(setup: Setup) -> float:
    """Allocated bytes at the peak of one forward and backward pass, without optimizer and with unsharded gradients."""
    need, trained = memory(setup), setup.trained
    each = GRADIENT_BYTES if setup.replicated else setup.element_bytes
    started = {"end of the forward", "backward of the head", "backward of the decoder"}
    passing = [
        sum(size for part, size in parts.items() if part not in ("gradients", "buckets"))
        + (0 if name in started else each * trained)
        for name, parts in need.moments.items()
    ]
    adapters = (4.0 + FACTOR_COPY_BYTES) * trained if setup.adapters else 0.0
    return _weights(setup) + need.resting.get("runtime", 0.0) + adapters + max(passing)


# Published code --------------------------------------------------------------------------------------------------------

# Adapters have float32 weights, gradients and moments, unsharded.
PUBLISHED_ADAPTER_BYTES = 16
# Reduction and gather buckets in 2 bytes, one of them doubled for overlap: 2e8 elements, as in DeepSpeed's examples.
PUBLISHED_BUCKET_BYTES = 3 * 2 * 200_000_000
# Largest live tensors in the backward pass of one decoder layer, per token: width x (layer input and two norms in both
# precisions 18, queries to output 14), feed-forward width x (gate, up, product 8 and their gradients 6).
DECODER_LAYER_BYTES = (32, 14)
# The same for the tower: width x 16, feed-forward width x 14.
CLIP_LAYER_BYTES = (16, 14)
# Live eager scores in one layer's backward pass. Decoder: float32 and half probabilities 6, gradients 10; CLIP: 8.
DECODER_SCORE_LIVE_BYTES, CLIP_SCORE_LIVE_BYTES = 16, 8
# Logits: half precision 2, float32 4, its shifted copy 4, log-softmax 4, gradient 4.
LOGIT_LIVE_BYTES = 18


@dataclass(frozen=True)
class MemoryConstants:
    """Constants of the published code's memory model.

    Source: the 10 A100 peaks of config/speed.tsv, fitted on 2026-11-21 by benchmarks/calibrate.py. The largest error is
    6.3 %, and 14.8 % for a row that is left out of the fit (docs/measurements.md).
    """

    runtime_gb: float = field(default=3.02, metadata={"unit": "GB a device"})
    """CUDA context, communication buffers, workspaces, and unused memory of the allocator."""
    optimizer_bytes: float = field(default=24.5, metadata={"unit": "bytes per trained parameter, divided by devices"})
    """ZeRO's shard at its peak, in the optimizer step: float32 weight, moments and gradient (16), and temporaries."""
    cached_scores: float = field(default=3.28, metadata={"unit": "bytes per attention score and decoder layer"})
    """Eager attention without ZeRO (adapters): score blocks that the allocator caches while there is free memory."""


def published_memory(setup: Setup, constants: MemoryConstants | None = None) -> dict[str, float]:
    """GB by part at the peak of the published code on one device that does not run out of memory.

    setup: the setup of the recipe's scripts (phi3v.planning.fits.published_setup).
    """
    constants = constants or MemoryConstants()
    geometry, work = setup.geometry, setup.longest.scaled(setup.micro_batch)
    tower, decoder = stacks(geometry, work)
    layer_inputs = decoder.rows * decoder.layers * 2 * decoder.width * setup.trains_decoder
    layer_inputs += tower.rows * tower.layers * 2 * tower.width * setup.trains_vision
    decoder_layer = decoder.rows * (DECODER_LAYER_BYTES[0] * decoder.width + DECODER_LAYER_BYTES[1] * decoder.inner)
    tower_layer = tower.rows * (CLIP_LAYER_BYTES[0] * tower.width + CLIP_LAYER_BYTES[1] * tower.inner)
    scores = cached_scores = 0.0
    if not setup.flash:
        scores = max(
            decoder.heads * decoder.pairs * DECODER_SCORE_LIVE_BYTES, tower.heads * tower.pairs * CLIP_SCORE_LIVE_BYTES
        )
        cached_scores = constants.cached_scores * decoder.heads * decoder.pairs * decoder.layers * setup.adapters
    zero = not setup.adapters
    largest = max(inputs * outputs for inputs, outputs in decoder_layer_linears(geometry).values())
    parts = {
        "weights": _weights(setup),
        "gradients": 2.0 * setup.with_gradient * zero,
        "optimizer": setup.trained * (constants.optimizer_bytes / setup.devices if zero else PUBLISHED_ADAPTER_BYTES),
        "layer inputs": layer_inputs,
        "activations": max(decoder_layer, tower_layer),
        "scores": scores,
        "cached scores": cached_scores,
        "logits": work.labels * geometry.vocab_size * LOGIT_LIVE_BYTES,
        "buckets": float(PUBLISHED_BUCKET_BYTES * (zero and setup.devices > 1)),
        # The largest 4-bit weight while it is expanded.
        "4-bit expansion": largest * 6.0 * (setup.method == "qlora"),
        "runtime": constants.runtime_gb * GB,
    }
    return {name: size / GB for name, size in parts.items()}
