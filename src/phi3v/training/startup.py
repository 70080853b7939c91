"""What a training script does before its heavy imports. Imports no torch."""

from __future__ import annotations

import sys

from phi3v.settings import FinetuneSettings


def leave_out_unused(settings: FinetuneSettings) -> None:
    """Keep transformers, accelerate and PEFT from importing libraries that this job does not use.

    They import whatever is installed: `datasets` (0.8 s of start-up on a 2-core machine), bitsandbytes with PyTorch's
    inductor (1.8 s) and DeepSpeed (0.4 s), in each process. A None in sys.modules is Python's way to say "not there".
    For scripts only: it holds for the whole process.
    """
    unused = ["datasets"]
    if not settings.use_qlora and "8bit" not in settings.optimizer:
        unused.append("bitsandbytes")
    if settings.method in ("lora", "qlora") or settings.zero_stage == 0:
        unused.append("deepspeed")
    for name in unused:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
