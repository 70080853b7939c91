"""Seconds of an optimizer step: matrix products, memory traffic and communication, each against its peak. No torch.

Every kernel is either bound by matrix products or by memory: FLOP from phi3v.planning.flops over peak x efficiency,
plus bytes counted below over bandwidth x efficiency, plus a fixed time a layer. Bytes are counted per element for
2-byte activations from the operators that transformers' Phi-3 and CLIP layers run one by one; float32 doubles them.
"""

from __future__ import annotations

from dataclasses import dataclass

from phi3v.planning.flops import TrainingFlops, training_flops
from phi3v.planning.geometry import (
    clip_layer_linears,
    decoder_layer_linears,
    parameters,
    patches_per_tile,
    quantised_parameters,
    trainable_parameters,
)
from phi3v.planning.setup import Constants, Setup
from phi3v.settings import SettingsError

# Bytes per element of an activation that must cross the memory, reads and writes, 2 each in half precision. What one
# operator hands to the next within a norm or a rotation stays in the cache: a token's tensors are 15 MB here.
# Two RMSNorms 4 each, two residual sums 6, rotary tables on queries and keys 4 each, a transpose 4.
DECODER_WIDTH_BYTES = 2 * 4 + 2 * 6 + 2 * 4 + 4
# Gate and product, per element of the feed-forward width.
DECODER_INNER_BYTES = 6
# Two LayerNorms 4, two residual sums 6, transposes 8; quick GELU 4.
CLIP_WIDTH_BYTES, CLIP_INNER_BYTES = 2 * 4 + 2 * 6 + 8, 4
# An adapter per (input, output) element: reads its input, adds to the output; backward it reads the gradient and the
# input, and adds to the input's gradient.
ADAPTER_BYTES, ADAPTER_BACKWARD_BYTES = (2, 4), (6, 2)
# A backward pass reads the gradient and what was saved and writes a gradient: twice the forward traffic.
BACKWARD_OVER_FORWARD = 2.0
# Eager attention per score. Decoder: product 2, scale 4, mask 4, softmax to float32 6, back 6, product 2; backward:
# gradient of weights 2, to values 2, to float32 6, softmax 10, scale 4, to queries and keys 4. CLIP scales the
# queries, has no mask and keeps the softmax in half precision.
DECODER_SCORE_BYTES, DECODER_SCORE_BACKWARD_BYTES = 24, 28
CLIP_SCORE_BYTES, CLIP_SCORE_BACKWARD_BYTES = 8, 14
# Without ZeRO the Trainer runs under autocast, whose softmax writes float32 that the next product reads back: CLIP's
# scores pay for it (the decoder's softmax is float32 either way).
CLIP_AUTOCAST_BYTES, CLIP_AUTOCAST_BACKWARD_BYTES = 8, 10
# Expanding an nf4 weight for one pass: half a byte and its scale read, float32 written and read, half precision
# written. That it goes by float32 is inferred: going straight to half precision would move 2.6.
DEQUANTISATION_BYTES = 10.6
# Logits: to float32, shifted copy, log-softmax, and their backward passes, per logit.
LOGIT_BYTES = 40
# AdamW over a shard, per parameter: gradient, weight and two moments in float32 read and written, temporaries of the
# multi-tensor implementation, and the half-precision copy.
OPTIMIZER_STEP_BYTES = 52
# Casting a float32 weight under autocast, once a pass: read 4, write 2.
CAST_BYTES = 6
# What ZeRO-2 does to every gradient in every micro-step, per parameter: write it 2, copy into a bucket 4, divide 4,
# all-reduce 4, add to the shard's share 4.
GRADIENT_BYTES = 18

# DeepSpeed all-reduces its buckets: a reduce-scatter and a gather.
REDUCE_OVER_GATHER = 2.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on one device by cause; they add up."""

    matmul: float
    attention: float
    """Products of both attentions, and the scores' memory traffic where attention is eager."""
    elementwise: float
    dequantisation: float
    communication: float
    """What the backward pass does not hide."""
    optimizer: float
    flops: TrainingFlops
    """Of all devices together, for MFU and HFU."""

    @property
    def seconds(self) -> float:
        """The step's length."""
        return (
            self.matmul + self.attention + self.elementwise + self.dequantisation + self.communication + self.optimizer
        )


def peak_tflops(setup: Setup) -> float:
    """Dense peak of the setup's dtype; raises SettingsError where the entry has none: a peak is never guessed."""
    peak = getattr(setup.hardware.peak_tflops, setup.dtype)
    if peak is None or setup.hardware.bandwidth_gb_s is None:
        field = f"peak_tflops.{setup.dtype}" if peak is None else "bandwidth_gb_s"
        raise _empty(setup, field, "expected the datasheet's figure (dense, one device)")
    return peak


def _empty(setup: Setup, field: str, expected: str) -> SettingsError:
    return SettingsError(
        f"hardware `{setup.hardware.title}`: field `{field}`: empty; {expected}: copy the entry with the field to your "
        "own hardware file, under a name of its own (fields: config/README.md, Hardware); name both in `files.hardware` "
        "and `hardware` of your run, or with scripts/plan.py --hardware FILE --gpu NAME"
    )


def passes(setup: Setup) -> tuple[float, float, float]:
    """(forward runs of the tower, forward runs of the decoder, backward runs of the decoder) in a micro-step."""
    decoder_trains = setup.method != "frozen_forward_only"
    again = setup.recompute
    return 1 + again * trains_vision(setup), 1 + again * decoder_trains, float(decoder_trains)


def trains_vision(setup: Setup) -> bool:
    """Whether gradients reach the vision tower."""
    return setup.method in ("full", "lora", "qlora")


def layer_passes(setup: Setup) -> float:
    """Layers run through in a micro-step: forward, recomputed, and backward as two, both towers."""
    vision_runs, decoder_runs, decoder_back = passes(setup)
    vision_back = float(trains_vision(setup))
    tower = (setup.geometry.vision.num_hidden_layers - 1) * (vision_runs + BACKWARD_OVER_FORWARD * vision_back)
    return tower + setup.geometry.num_hidden_layers * (decoder_runs + BACKWARD_OVER_FORWARD * decoder_back)


def _elementwise_bytes(setup: Setup) -> float:
    """Bytes of one mean example outside matrix products and scores."""
    geometry, vision, work = setup.geometry, setup.geometry.vision, setup.work
    vision_runs, decoder_runs, decoder_back = passes(setup)
    vision_back = float(trains_vision(setup))
    decoder: float = DECODER_WIDTH_BYTES * geometry.hidden_size + DECODER_INNER_BYTES * geometry.intermediate_size
    tower: float = CLIP_WIDTH_BYTES * vision.hidden_size + CLIP_INNER_BYTES * vision.intermediate_size
    decoder *= decoder_runs + BACKWARD_OVER_FORWARD * decoder_back
    tower *= vision_runs + BACKWARD_OVER_FORWARD * vision_back
    if setup.adapters:
        decoder += _adapter_bytes(decoder_layer_linears(geometry), decoder_runs)
        tower += _adapter_bytes(clip_layer_linears(vision), vision_runs)
    rows = work.tiles * (patches_per_tile(vision) + 1)
    total = work.tokens * geometry.num_hidden_layers * decoder + rows * (vision.num_hidden_layers - 1) * tower
    total += work.labels * geometry.vocab_size * LOGIT_BYTES
    return total * (2 if setup.dtype == "fp32" else 1)


def _adapter_bytes(linears: dict[str, tuple[int, int]], runs: float) -> float:
    inputs, outputs = (runs * f + b for f, b in zip(ADAPTER_BYTES, ADAPTER_BACKWARD_BYTES, strict=True))
    return sum(inputs * i + outputs * o for i, o in linears.values())


def _score_bytes(setup: Setup) -> float:
    """Bytes that eager attention moves for one mean example; none with flash attention."""
    if setup.flash:
        return 0.0
    geometry, vision, work = setup.geometry, setup.geometry.vision, setup.work
    vision_runs, decoder_runs, decoder_back = passes(setup)
    vision_back = float(trains_vision(setup))
    decoder = geometry.num_attention_heads * geometry.num_hidden_layers * work.tokens_squared
    tower = (
        vision.num_attention_heads * (vision.num_hidden_layers - 1) * work.tiles * (patches_per_tile(vision) + 1) ** 2
    )
    total = decoder * (DECODER_SCORE_BYTES * decoder_runs + DECODER_SCORE_BACKWARD_BYTES * decoder_back)
    autocast = float(setup.adapters)
    total += tower * vision_runs * (CLIP_SCORE_BYTES + autocast * CLIP_AUTOCAST_BYTES)
    total += tower * vision_back * (CLIP_SCORE_BACKWARD_BYTES + autocast * CLIP_AUTOCAST_BACKWARD_BYTES)
    return total * (2 if setup.dtype == "fp32" else 1)


def _flash_seconds(setup: Setup) -> float:
    """Seconds that a flash kernel spends on starting one sequence and head after the other, for one mean example."""
    if not setup.flash or setup.hardware.flash_head_seconds is None:
        return 0.0
    geometry, vision = setup.geometry, setup.geometry.vision
    vision_runs, decoder_runs, decoder_back = passes(setup)
    forward, backward = setup.hardware.flash_head_seconds
    decoder = geometry.num_attention_heads * geometry.num_hidden_layers * setup.work.examples
    tower = vision.num_attention_heads * (vision.num_hidden_layers - 1) * setup.work.tiles
    seconds = decoder * (forward * decoder_runs + backward * decoder_back)
    return seconds + tower * (forward * vision_runs + backward * trains_vision(setup))


def _collective_seconds(setup: Setup, size: float, constants: Constants) -> float:
    """Seconds to reduce-scatter or to gather `size` bytes over all devices: the slower of the links it crosses.

    A ring moves (n - 1) / n of the data over each device's links in a machine, (N - 1) / N over each machine's network.
    """
    per_node, nodes = setup.per_node, setup.nodes
    hardware = setup.hardware
    seconds = 0.0
    if per_node > 1:
        if hardware.link_gb_s is None:
            raise _empty(setup, "link_gb_s", f"{per_node} devices of a machine need it, GB/s in one direction")
        seconds = size * (per_node - 1) / per_node / (hardware.link_gb_s * 1e9)
    if nodes > 1:
        if hardware.network_gb_s is None:
            raise _empty(setup, "network_gb_s", f"{nodes} machines need it, GB/s in one direction")
        seconds = max(seconds, size * (nodes - 1) / nodes / (hardware.network_gb_s * 1e9))
    return seconds / constants.link_efficiency


def step_time(setup: Setup, constants: Constants) -> StepTime:
    """Seconds of one optimizer step; raises SettingsError where the hardware entry lacks a figure it needs."""
    geometry, micro, runs = setup.geometry, setup.micro_batch, passes(setup)
    peak = peak_tflops(setup) * 1e12 * constants.matmul_efficiency
    memory = float(setup.hardware.bandwidth_gb_s or 0) * 1e9
    bandwidth, streaming = memory * constants.bandwidth_efficiency, memory * constants.elementwise_efficiency
    flops = training_flops(
        geometry, setup.work, setup.method, setup.rank or None, setup.flash, setup.recompute, setup.as_published
    )
    width = 4 if setup.dtype == "fp32" else 2
    held = sum(parameters(geometry).values())
    quantised = quantised_parameters(geometry) if setup.method == "qlora" else 0
    trained = sum(trainable_parameters(geometry, setup.trains_by, setup.rank).values())
    reduced = parameters(geometry)["head"] if setup.method == "frozen_forward_only" else trained

    attention = flops.parts["attention"].total
    # Products of a few rows are bound by reading the weights: one read a pass.
    matmul = max(micro * (flops.hardware - attention) / peak, width * held * (2 + runs[1]) / bandwidth)
    attending = micro * (attention / peak + _score_bytes(setup) / bandwidth + _flash_seconds(setup))
    elementwise = micro * _elementwise_bytes(setup) / streaming + constants.layer_seconds * layer_passes(setup)
    if setup.float32_weights and setup.dtype != "fp32":
        elementwise += CAST_BYTES * (held - quantised) * runs[1] / streaming
    if not setup.adapters:
        elementwise += GRADIENT_BYTES * reduced * width / 2 / bandwidth
    dequantisation = DEQUANTISATION_BYTES * quantised * (runs[1] + 1) / bandwidth

    # ZeRO-2 reduces every micro-step's gradients beside the backward pass; plain data parallelism the last one's.
    busy = matmul + attending + elementwise + dequantisation
    backward = sum(part.backward + part.recompute for part in flops.parts.values()) / flops.hardware
    reduction = REDUCE_OVER_GATHER * _collective_seconds(setup, width * reduced, constants)
    reductions = 1.0 if setup.adapters else setup.accumulation
    communication = reductions * max(0.0, reduction - busy * backward)
    if not setup.adapters:
        communication += _collective_seconds(setup, width * trained, constants)
    shards = 1 if setup.adapters else setup.devices
    return StepTime(
        matmul=setup.accumulation * matmul,
        attention=setup.accumulation * attending,
        elementwise=setup.accumulation * elementwise,
        dequantisation=setup.accumulation * dequantisation,
        communication=communication,
        optimizer=OPTIMIZER_STEP_BYTES * trained / shards / bandwidth,
        flops=TrainingFlops(flops.model * setup.batch_size, flops.hardware * setup.batch_size, flops.parts),
    )


def images_per_second(setup: Setup, constants: Constants) -> float:
    """Examples a second over all devices, the recipe's img/s."""
    return setup.batch_size / step_time(setup, constants).seconds
