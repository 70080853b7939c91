"""What is planned: a method on devices with a batch, and the constants that turn counts into seconds."""

from __future__ import annotations

from dataclasses import dataclass, field

from phi3v.planning.flops import Method, Work
from phi3v.settings import Geometry, Hardware


@dataclass(frozen=True)
class Constants:
    """What turns FLOP and bytes into seconds: four numbers fitted to the published tables, one chosen.

    `scripts/plan.py --published` prints the fit. Efficiencies are shares of a datasheet's peak, the same for every
    device: what differs between devices is in config/hardware.yaml.
    """

    matmul_efficiency: float = field(default=0.613, metadata={"unit": "share of dense peak"})
    """What matrix products reach of the dense tensor peak, over all shapes of a batch-1 step."""
    bandwidth_efficiency: float = field(default=0.420, metadata={"unit": "share of peak bandwidth"})
    """What kernels over large tensors reach of the memory bandwidth: eager scores (rows of odd length, which no vector
    load fits), 4-bit expansion, gradients, optimizer."""
    elementwise_efficiency: float = field(default=0.8, metadata={"unit": "share of peak bandwidth", "fitted": False})
    """The same for norms, activations and residuals. Not fitted: what streaming kernels usually reach."""
    layer_seconds: float = field(default=0.0008, metadata={"unit": "s a layer pass"})
    """Time of a layer's pass that grows with neither FLOP nor bytes: launches, tails of kernels, the host."""
    link_efficiency: float = field(default=0.247, metadata={"unit": "share of peak link bandwidth"})
    """What a collective reaches of the link that bounds it, within or between machines."""


@dataclass(frozen=True)
class Setup:
    """A training job on devices, as the formulas see it."""

    geometry: Geometry
    hardware: Hardware
    method: Method
    dtype: str
    flash: bool
    work: Work
    """Of one mean example."""
    longest: Work
    """Of the example that decides the peak."""
    batch_size: int
    nodes: int = 1
    per_node: int = 1
    micro_batch: int = 1
    rank: int = 0
    as_published: bool = False
    """Count what the recipe's scripts ran: whole layers recomputed, logits at every position (work says the tiles)."""
    recompute: float = 1.0
    """Share of the layers whose activations are recomputed in the backward pass: 1 all, 0 none, every n-th layer 1/n."""

    @property
    def devices(self) -> int:
        """Processes, one a device."""
        return self.nodes * self.per_node

    @property
    def accumulation(self) -> float:
        """Micro-steps of an optimizer step on each device."""
        return self.batch_size / (self.devices * self.micro_batch)

    @property
    def adapters(self) -> bool:
        """LoRA or QLoRA: only adapters train, and plain data parallelism is used instead of ZeRO."""
        return self.method in ("lora", "qlora")

    @property
    def trains_by(self) -> str:
        """The method whose parameters the optimizer holds."""
        return "frozen" if self.method == "frozen_forward_only" else self.method

    @property
    def fused(self) -> bool:
        """Whether this project's fused kernels run: on GPUs from Ampere on, the first with bfloat16 (phi3v.model.fused)."""
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
