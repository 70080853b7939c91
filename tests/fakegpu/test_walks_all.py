"""Every method, dtype and attention as on one GPU and as rank 0 of 8 and of 32, on the GPUs that the tables name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fakegpu.conftest import finetune
from fakegpu.walk import Walk, Walked, walks

pytestmark = pytest.mark.verify
METHODS = {
    "zero-0": ["--zero_stage", "0"],
    "zero-2": [],
    "zero-3": ["--zero_stage", "3"],
    "frozen": ["--freeze_vision_model"],
    "lora": ["--use_lora"],
    "qlora": ["--use_qlora"],
    "dora": ["--use_lora", "--use_dora"],
}
WORLDS = (0, 8, 32)


@dataclass(frozen=True)
class Case:
    """A walk, and what observed.json must name."""

    method: str
    machine: str = "A100"
    world: int = 0
    dtype: str = "bf16"
    flash: bool = True
    packed: bool = False

    @property
    def name(self) -> str:
        """Of the walk."""
        parts = (self.method, self.machine, str(self.world), self.dtype, "flash" * self.flash, "packed" * self.packed)
        return "-".join(part for part in parts if part)

    @property
    def walk(self) -> Walk:
        """Two optimizer steps."""
        flags = [*METHODS[self.method], f"--{self.dtype}"]
        flags += ["--use_flash_attention"] if self.flash else []
        flags += ["--batching", "packed", "--tokens_per_pack", "400"] if self.packed else []
        return finetune(self.name, *flags, world=self.world, machine=self.machine)

    @property
    def kernel(self) -> str:
        """Of the decoder; before Ampere there is no flash kernel, and SDPA takes the memory-efficient one."""
        if not self.flash:
            return "eager"
        if self.machine != "A100":
            return "sdpa memory-efficient"
        return "sdpa flash (varlen)" if self.packed else "sdpa flash"


CASES = [Case(method, world=world, flash=flash) for method in METHODS for world in WORLDS for flash in (True, False)]
CASES += [Case(method, packed=True, flash=flash) for method in METHODS for flash in (True, False)]
CASES += [Case(method, dtype="fp16") for method in METHODS]
CASES += [
    Case(method, machine, dtype="fp16", flash=flash, world=world)
    for method in METHODS
    for machine in ("T4", "V100")
    for world, flash in ((0, False), (8, False), (8, True))
    if not (machine == "V100" and method == "qlora")  # bitsandbytes has no kernels for 7.0
]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Walked]:
    return walks(tmp_path_factory.mktemp("walks"), [case.walk for case in CASES])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_ends_as_on_a_gpu(walked: dict[str, Walked], case: Case) -> None:
    result = walked[case.name]
    assert result.exit_code == 0, result.output
    # ZeRO 3 keeps its two buckets of 100 million bfloat16 numbers in a global until the process ends.
    assert result.live_bytes < (4.1e8 if case.method == "zero-3" else 1e6)
    assert result.observed["attention_decoder"] == case.kernel
    assert result.observed["attention_vision"] == case.kernel.replace(" (varlen)", "")
    assert result.observed["activation_dtype"] == case.dtype
    assert result.observed["world_size"] == max(1, case.world)
