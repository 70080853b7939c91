"""Seconds of an optimizer step: matrix products, memory traffic and communication, each against its peak. No torch.

Every kernel is either bound by matrix products or by memory: FLOP from phi3v.planning.flops over peak x efficiency,
plus bytes from phi3v.planning.traffic over bandwidth x efficiency, plus a fixed time a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from phi3v.planning.flops import TrainingFlops, training_flops
from phi3v.planning.geometry import parameters, quantised_parameters, trainable_parameters
from phi3v.planning.setup import Constants, Setup
from phi3v.planning.traffic import BACKWARD_OVER_FORWARD, implementation, runs, traffic_of
from phi3v.settings import SettingsError

# Casting a float32 weight under autocast, once a pass: read 4, write 2.
CAST_BYTES = 6


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


def layer_passes(setup: Setup) -> float:
    """Layers run through in a micro-step: forward, recomputed, and backward as two, both towers."""
    tower, decoder = (each.forward + each.again + BACKWARD_OVER_FORWARD * each.backward for each in runs(setup))
    return (setup.geometry.vision.num_hidden_layers - 1) * tower + setup.geometry.num_hidden_layers * decoder


def _flash_seconds(setup: Setup) -> float:
    """Seconds that a flash kernel spends on starting one sequence and head after the other, for one mean example."""
    if not setup.flash or setup.hardware.flash_head_seconds is None:
        return 0.0
    geometry, vision = setup.geometry, setup.geometry.vision
    tower_runs, decoder_runs = runs(setup)
    forward, backward = setup.hardware.flash_head_seconds
    decoder = geometry.num_attention_heads * geometry.num_hidden_layers * setup.work.examples
    tower = vision.num_attention_heads * (vision.num_hidden_layers - 1) * setup.work.tiles
    return sum(
        heads * (forward * (each.forward + each.again) + backward * each.backward)
        for heads, each in ((tower, tower_runs), (decoder, decoder_runs))
    )


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
    geometry, micro = setup.geometry, setup.micro_batch
    way, traffic, (_, decoder_runs) = implementation(setup), traffic_of(setup), runs(setup)
    again = decoder_runs.forward + decoder_runs.again
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
    matmul = max(micro * (flops.hardware - attention) / peak, width * held * (2 + again) / bandwidth)
    attending = micro * (attention / peak + traffic.scores / bandwidth + _flash_seconds(setup))
    elementwise = micro * (traffic.elementwise + traffic.adapters) / streaming
    elementwise += constants.layer_seconds * way.operators.get(setup.method, 1.0) * layer_passes(setup)
    if setup.float32_weights and setup.dtype != "fp32":
        elementwise += CAST_BYTES * (held - quantised) * again / streaming
    if not setup.adapters:
        elementwise += way.gradient * reduced * width / 2 / bandwidth
    dequantisation = way.dequantisation * quantised * (again + decoder_runs.backward) / bandwidth

    # ZeRO-2 reduces every micro-step's gradients beside the backward pass; plain data parallelism the last one's.
    busy = matmul + attending + elementwise + dequantisation
    backward = sum(part.backward + part.recompute for part in flops.parts.values()) / flops.hardware
    reduction = way.reduce_over_gather * _collective_seconds(setup, width * reduced, constants)
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
        optimizer=way.optimizer * trained / shards / bandwidth,
        flops=TrainingFlops(flops.model * setup.batch_size, flops.hardware * setup.batch_size, flops.parts),
    )


def images_per_second(setup: Setup, constants: Constants) -> float:
    """Examples a second over all devices, the recipe's img/s."""
    return setup.batch_size / step_time(setup, constants).seconds
