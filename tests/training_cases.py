"""Several training jobs one after the other in one start of torchrun, which would cost each of them 10 s.

    torchrun --nproc_per_node=2 tests/training_cases.py CASES.json RESULTS

CASES.json: list of finetune settings; `stop_after` is no setting: the job is told to leave in that step. RESULTS: folder
for `rankN.json`, a list of [exit code, error class, message].
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from phi3v.settings import FinetuneSettings, validate
from phi3v.training import finetune
from phi3v.training.loop import Loop

UPDATE = Loop.update


def stop_in(step: int | None) -> None:
    """Let the signal come while `step` runs; None: never."""

    def update(self):
        self.stop.asked = self.stop.asked or self.state.step + 1 == step
        return UPDATE(self)

    Loop.update = update if step else UPDATE


def forget() -> None:
    """What accelerate, transformers and DeepSpeed keep for the life of a process, but the process group."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(name, None)


def main() -> int:
    """Run the cases."""
    results = []
    finetune.leave = lambda code: (dist.barrier(), code)[1]  # the group serves the next case
    for values in json.loads(Path(sys.argv[1]).read_text()):
        stop_in(values.pop("stop_after", None))
        try:
            results.append([finetune.run(validate(FinetuneSettings, values, "case")), "", ""])
        except Exception as error:
            results.append([1, type(error).__name__, str(error)])
        forget()
        (Path(sys.argv[2]) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
