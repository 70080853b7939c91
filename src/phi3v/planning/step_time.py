"""Predicts the seconds of an optimizer step from matrix products, memory traffic and communication. No torch.

    time = step_time(setup)
    time.seconds, time.elementwise, time.flops.model

Every kernel is bound either by matrix products or by memory. The time is the FLOP of phi3v.planning.flops divided by
peak x efficiency, plus the bytes divided by bandwidth x efficiency, plus a fixed time per layer.

Bytes are counted for two implementations. PLAIN runs transformers' and PEFT's operators one by one: the published code,
and this project on a CPU. FUSED runs a norm, a gate, an activation or a rotation as one kernel for each direction, and
adds an adapter's product inside a matrix product: this project on a GPU that Triton supports (phi3v.model.fused,
phi3v.model.lora). Its bytes are those that a traced run moves. Bytes are for 2-byte activations; float32 doubles them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

from phi3v.planning.flops import Setup, TrainingFlops, stacks, training_flops
from phi3v.planning.geometry import parameters, quantised_parameters
from phi3v.settings import SettingsError

# Casting a float32 weight under autocast, once per pass: read 4, write 2.
CAST_BYTES = 6
# Logits: to float32, shifted copy, log-softmax, and their backward passes, per logit.
LOGIT_BYTES = 40
# A backward pass reads the gradient and what was saved and writes a gradient: twice the forward traffic.
BACKWARD_OVER_FORWARD = 2.0


@dataclass(frozen=True)
class Constants:
    """Constants that convert FLOP and bytes to seconds: four fitted to the published tables, and one chosen.

    Source: the 12 plausible throughputs of config/speed.tsv, fitted on 2026-11-21 by benchmarks/calibrate.py. The
    largest error is 10.8 %, and 13.6 % for a row that is left out of the fit (docs/measurements.md). Efficiencies are
    shares of a datasheet's peak, the same for every device: what differs between devices is in config/hardware.yaml.
    """

    matmul_efficiency: float = field(default=0.613, metadata={"unit": "share of dense peak"})
    """Efficiency of matrix products relative to the dense peak, over all shapes of a batch-1 step."""
    bandwidth_efficiency: float = field(default=0.420, metadata={"unit": "share of peak bandwidth"})
    """Efficiency of kernels over large tensors relative to the memory bandwidth: eager scores (rows of odd length,
    without vector loads), 4-bit expansion, gradients, optimizer."""
    elementwise_efficiency: float = field(default=0.8, metadata={"unit": "share of peak bandwidth", "fitted": False})
    """The same for norms, activations and residuals. Not fitted, but a usual value for streaming kernels."""
    layer_seconds: float = field(default=0.0008, metadata={"unit": "s per layer pass"})
    """Constant time per layer and pass: kernel launches, tails of kernels, the host."""
    link_efficiency: float = field(default=0.247, metadata={"unit": "share of peak link bandwidth"})
    """Efficiency of a collective relative to the slowest link, within or between machines."""


CONSTANTS = Constants()


@dataclass(frozen=True)
class Bytes:
    """Bytes of one pass over a layer, per row, as (per element of the width, of the feed-forward width)."""

    forward: tuple[float, float]
    backward: tuple[float, float]
    recomputed: tuple[float, float]
    """Forward again: without what no saved tensor depends on."""
    weights: tuple[float, float] = (0, 0)
    """Gradients of norms' weights and of biases, if they train."""

    def per_row(self, widths: tuple[int, int], runs: Runs, weights: bool) -> float:
        """Bytes per row of a layer in a micro-step."""
        each = zip(widths, self.forward, self.recomputed, self.backward, self.weights, strict=True)
        return sum(
            width * (runs.forward * forward + runs.again * again + runs.backward * (backward + weights * own))
            for width, forward, again, backward, own in each
        )


@dataclass(frozen=True)
class Runs:
    """How often a tower's layers run in a micro-step."""

    forward: float
    again: float
    """Share of the layers whose forward pass is repeated in the backward pass."""
    backward: float


@dataclass(frozen=True)
class Implementation:
    """Memory traffic of the operators of one implementation of the model."""

    decoder: Bytes
    tower: Bytes
    adapter: tuple[tuple[float, float], tuple[float, float]]
    """Of an adapter's narrow matrix products, bytes per (input, output) element: forward, backward."""
    quantised_sum: float
    """Of an adapter over 4 bits, bytes per input element in the backward pass: the sum of its gradient and the
    base's."""
    decoder_scores: tuple[float, float]
    """Eager attention, bytes per score: forward, backward."""
    tower_scores: tuple[float, float]
    float16_scores: float
    """What float16 saves of them in each pass: PyTorch's softmax on CUDA converts it, but not bfloat16, by itself."""
    dequantisation: float
    """Expanding a 4-bit weight for one pass, bytes."""
    gradient: float
    """Of ZeRO 2, bytes per trained parameter in every micro-step."""
    optimizer: float
    """Of the optimizer step, bytes per parameter of the shard."""
    reduce_over_gather: float
    """Bytes that reducing the gradients sends, over those of gathering the weights."""
    operators: dict[str, float]
    """Factor of Constants.layer_seconds by method: traced operators of a micro-step over those of plain full
    fine-tuning. Empty: 1, as for the published code, whose rows fit one figure for all methods."""


# The comments below list bytes per element of the width; after a semicolon, of the feed-forward width.
# Plain decoder: two RMSNorms 4 each, two residual sums 6 each, rotary tables on queries and keys 4 each, a transpose 4;
# gate and product 6. Tensors between the operators of a norm or a rotation are assumed to stay in the cache.
# Plain tower: two LayerNorms 4 each, two residual sums 6 each, transposes 8; quick GELU 4.
_PLAIN_DECODER = (2 * 4 + 2 * 6 + 2 * 4 + 4, 6)
_PLAIN_TOWER = (2 * 4 + 2 * 6 + 8, 4)


def _twice(forward: tuple[float, float]) -> Bytes:
    width, inner = forward
    return Bytes(forward, (BACKWARD_OVER_FORWARD * width, BACKWARD_OVER_FORWARD * inner), forward)


PLAIN = Implementation(
    decoder=_twice(_PLAIN_DECODER), tower=_twice(_PLAIN_TOWER),
    # Reads its input, adds to the output; backward it reads the gradient and the input, and adds to the input's
    # gradient.
    adapter=((2, 4), (6, 2)), quantised_sum=0,
    # Decoder: product 2, scale 4, mask 4, softmax to float32 6, back 6, product 2; backward: gradient of weights 2, to
    # values 2, to float32 6, softmax 10, scale 4, to queries and keys 4. CLIP scales the queries, has no mask and keeps
    # the softmax in half precision.
    decoder_scores=(24, 28), tower_scores=(8, 14), float16_scores=0,
    # Reads half a byte and its scale, writes and reads float32, writes half precision. We infer that the published code
    # converts to float32 first: a direct conversion to half precision would move 2.6.
    dequantisation=10.6,
    # Write the gradient 2, copy it into a bucket 4, divide 4, all-reduce 4, add to the shard 4.
    gradient=18,
    # Gradient, weight and two moments in float32 read and written, temporaries of the multi-tensor AdamW, and the
    # half-precision copy.
    optimizer=52,
    # An all-reduce: a reduce-scatter and a gather.
    reduce_over_gather=2.0, operators={},
)  # fmt: skip
# Without ZeRO, plain operators run under autocast. Its softmax writes float32, so CLIP's scores move more bytes. The
# decoder's softmax is float32 in any case.
PLAIN_AUTOCAST = replace(PLAIN, tower_scores=(16, 24))

FUSED = Implementation(
    # Two norms 4 each, rotation 8, two residual sums 6 each; gate 6. Backward: norms 6 each, rotation 12, sums of
    # gradients 6 each; gate 10; norms' weights 4 each. Recomputation stops before the last residual sum.
    decoder=Bytes((28, 6), (36, 10), (22, 6), (8, 0)),
    # Two norms 4 each, residual sums 6 each; quick GELU 4. Backward: norms 6 each, four sums of gradients 6 each; GELU
    # 6; biases 10, and 2 of the feed-forward width.
    tower=Bytes((20, 4), (36, 6), (14, 4), (10, 2)),
    # Reads its input, adds to the output 4; backward the gradient twice, the input, and adds to the input's gradient.
    adapter=((2, 4), (6, 4)), quantised_sum=6,
    # bf16: product 2, scale 4, mask 4, to float32 6, softmax 8, back 6, product 2; backward: gradient of weights 2, to
    # values 2, to float32 6, softmax 12, back 6, mask 4, scale 4, to queries and keys 4. CLIP: the same without a mask.
    decoder_scores=(32, 40), tower_scores=(28, 36), float16_scores=8,
    # Reads half a byte and its scale, writes half precision, which the product reads.
    dequantisation=4.6,
    # Within a machine, a bucket is all-reduced in place: write 2, copy into the bucket 4, divide 4, add to the shard.
    gradient=13,
    # The fused AdamW 32; norm in float64, scaling, checks and the half-precision copy 40; traced.
    optimizer=72,
    reduce_over_gather=2.0,
    # 1,895 forward and 7,347 backward; LoRA 3,248 and 9,361; QLoRA 3,781 and 10,677; plain 2,908 and 11,252.
    operators={"full": 0.65, "frozen": 0.65, "lora": 0.89, "qlora": 1.02},
)  # fmt: skip
# Between machines, each part of a bucket is copied and reduced to the device that owns it, which moves half the bytes
# over the links (phi3v.training.optimizers). Traced.
FUSED_MACHINES = replace(FUSED, gradient=17, reduce_over_gather=1.0)


@dataclass(frozen=True)
class Traffic:
    """Cost of a mean example in addition to its matrix products: bytes bound by bandwidth, passes and seconds."""

    elementwise: float
    """Bytes outside matrix products and scores."""
    adapters: float
    """Bytes of the adapters' narrow products, whose time memory traffic determines."""
    scores: float
    """Bytes of eager attention."""
    layer_passes: float
    """Layer passes of a micro-step, vision tower and decoder. A backward pass counts as two."""
    flash_seconds: float
    """Seconds in which a flash kernel starts one sequence and head after the other."""


def implementation(setup: Setup) -> Implementation:
    """Implementation that runs the setup's layers."""
    if setup.as_published or setup.hardware.kind == "cpu":
        return PLAIN_AUTOCAST if setup.adapters else PLAIN
    if not setup.fused:
        return PLAIN
    return FUSED if setup.nodes == 1 else FUSED_MACHINES


def runs(setup: Setup) -> tuple[Runs, Runs]:
    """Number of passes through the tower and the decoder in a micro-step."""
    tower, decoder = float(setup.trains_vision), float(setup.trains_decoder)
    return Runs(1, setup.recompute * tower, tower), Runs(1, setup.recompute * decoder, decoder)


def traffic_of(setup: Setup) -> Traffic:
    """The traffic of one mean example."""
    way = implementation(setup)
    saved = way.float16_scores if setup.dtype == "fp16" else 0.0
    starts = setup.hardware.flash_head_seconds or (0.0, 0.0)
    elementwise = adapters = scores = layer_passes = flash_seconds = 0.0
    kinds = ((way.tower, way.tower_scores), (way.decoder, way.decoder_scores))
    for stack, counted, (layer, per_score) in zip(stacks(setup.geometry, setup.work), runs(setup), kinds, strict=True):
        passes = counted.forward + counted.again
        row = layer.per_row((stack.width, stack.inner), counted, setup.choice.weights(stack.group))
        if setup.method == "qlora":
            row += way.quantised_sum * sum(inputs for inputs, _ in stack.linears.values())
        elementwise += stack.rows * stack.layers * row
        inputs, outputs = (passes * f + b for f, b in zip(*way.adapter, strict=True))
        adapters += (
            stack.rows
            * stack.layers
            * sum(
                inputs * i + outputs * o
                for name, (i, o) in stack.linears.items()
                if setup.choice.adapter(stack.group, name)
            )
        )
        each = (per_score[0] - saved) * passes + (per_score[1] - saved) * counted.backward
        scores += stack.heads * stack.layers * stack.pairs * each
        layer_passes += stack.layers * (passes + BACKWARD_OVER_FORWARD * counted.backward)
        starting = starts[0] * passes + starts[1] * counted.backward
        flash_seconds += stack.heads * stack.layers * stack.sequences * starting
    elementwise += setup.work.labels * setup.geometry.vocab_size * LOGIT_BYTES
    wider = 2 if setup.dtype == "fp32" else 1
    return Traffic(
        elementwise=wider * elementwise,
        adapters=wider * adapters,
        scores=wider * scores * (not setup.flash),
        layer_passes=layer_passes,
        flash_seconds=flash_seconds * setup.flash,
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on one device by cause; they add up."""

    matmul: float
    attention: float
    """Products of both attentions, and the scores' memory traffic if attention is eager."""
    elementwise: float
    dequantisation: float
    communication: float
    """Communication that the backward pass does not hide."""
    optimizer: float
    flops: TrainingFlops
    """FLOP of all devices, for MFU and HFU."""

    @property
    def seconds(self) -> float:
        """Duration of the step."""
        return (
            self.matmul + self.attention + self.elementwise + self.dequantisation + self.communication + self.optimizer
        )


def peak_tflops(setup: Setup) -> float:
    """Dense peak of the setup's dtype. Raises SettingsError if the entry has none. A peak is never guessed."""
    peak = getattr(setup.hardware.peak_tflops, setup.dtype)
    if peak is None or setup.hardware.bandwidth_gb_s is None:
        field = f"peak_tflops.{setup.dtype}" if peak is None else "bandwidth_gb_s"
        raise _empty(setup, field, "expected the datasheet's figure (dense, one device)")
    return peak


def _empty(setup: Setup, field: str, expected: str) -> SettingsError:
    return SettingsError(
        f"hardware `{setup.hardware.title}`: field `{field}`: empty; {expected}; copy the entry with the field to your "
        "own hardware file, under a new name (fields: docs/reference/configuration.md, Hardware); name both in "
        "`files.hardware` and `hardware` of your run, or with scripts/plan.py --hardware FILE --gpu NAME"
    )


def _collective_seconds(setup: Setup, size: float, constants: Constants) -> float:
    """Seconds to reduce-scatter or to gather `size` bytes over all devices, at the speed of the slowest link.

    A ring moves (n - 1) / n of the data over each device's links in a machine, (N - 1) / N over each machine's network.
    """
    links = (
        ("link_gb_s", setup.per_node, f"{setup.per_node} devices of a machine need it"),
        ("network_gb_s", setup.nodes, f"{setup.nodes} machines need it"),
    )
    seconds = 0.0
    for link, count, needed in links:
        if count > 1:
            speed = getattr(setup.hardware, link)
            if speed is None:
                raise _empty(setup, link, f"{needed}, GB/s in one direction")
            seconds = max(seconds, size * (count - 1) / count / (speed * 1e9))
    return seconds / constants.link_efficiency


@lru_cache
def step_time(setup: Setup, constants: Constants = CONSTANTS) -> StepTime:
    """Seconds of one optimizer step. Raises SettingsError if the hardware entry lacks a required figure."""
    geometry, micro = setup.geometry, setup.micro_batch
    way, traffic, (_, decoder_runs) = implementation(setup), traffic_of(setup), runs(setup)
    again = decoder_runs.forward + decoder_runs.again
    peak = peak_tflops(setup) * 1e12 * constants.matmul_efficiency
    memory = float(setup.hardware.bandwidth_gb_s or 0) * 1e9
    bandwidth, streaming = memory * constants.bandwidth_efficiency, memory * constants.elementwise_efficiency
    flops = training_flops(
        geometry,
        setup.work,
        setup.method,
        setup.rank or None,
        setup.flash,
        setup.recompute,
        setup.as_published,
        setup.frozen,
        setup.lora_targets,
    )
    width = setup.element_bytes
    held = sum(parameters(geometry).values())
    quantised = quantised_parameters(geometry) if setup.method == "qlora" else 0
    trained, reduced = setup.trained, setup.with_gradient

    attention = flops.parts["attention"].total
    # Products of a few rows are bound by reading the weights, once per pass.
    matmul = max(micro * (flops.hardware - attention) / peak, width * held * (2 + again) / bandwidth)
    attending = micro * (attention / peak + traffic.scores / bandwidth + traffic.flash_seconds)
    elementwise = micro * (traffic.elementwise + traffic.adapters) / streaming
    elementwise += constants.layer_seconds * way.operators.get(setup.method, 1.0) * traffic.layer_passes
    if setup.float32_weights and setup.dtype != "fp32":
        elementwise += CAST_BYTES * (held - quantised) * again / streaming
    if not setup.adapters:
        elementwise += way.gradient * reduced * width / 2 / bandwidth
    dequantisation = way.dequantisation * quantised * (again + decoder_runs.backward) / bandwidth

    # ZeRO 2 and 3 reduce the gradients of every micro-step during the backward pass; others only those of the last.
    busy = matmul + attending + elementwise + dequantisation
    backward = sum(part.backward + part.recompute for part in flops.parts.values()) / flops.hardware
    reduction = way.reduce_over_gather * _collective_seconds(setup, width * reduced, constants)
    reductions = 1.0 if setup.replicated or setup.zero_stage < 2 else setup.accumulation
    communication = reductions * max(0.0, reduction - busy * backward)
    if setup.zero_stage == 3 and not setup.replicated:
        # Weights are gathered for every forward, repeated and backward pass instead of after the step.
        communication += setup.accumulation * (1 + again) * _collective_seconds(setup, width * held, constants)
    elif not setup.replicated:
        communication += _collective_seconds(setup, width * trained, constants)
    shards = 1 if setup.replicated else setup.devices
    return StepTime(
        matmul=setup.accumulation * matmul,
        attention=setup.accumulation * attending,
        elementwise=setup.accumulation * elementwise,
        dequantisation=setup.accumulation * dequantisation,
        communication=communication,
        optimizer=way.optimizer * trained / shards / bandwidth,
        flops=TrainingFlops(flops.model * setup.batch_size, flops.hardware * setup.batch_size, flops.parts),
    )


def images_per_second(setup: Setup, constants: Constants = CONSTANTS) -> float:
    """Examples per second over all devices, the recipe's img/s."""
    return setup.batch_size / step_time(setup, constants).seconds
