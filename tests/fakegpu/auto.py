"""`--batch_size_per_gpu auto` at full size on GPUs of any memory, with the out-of-memory errors of a real search.

python -m tests.fakegpu.auto lora --memory 12 24 80
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from .measure import FullSizeJob, in_child, run_module, settings_of

CONSTANTS = 3 * 512
"""Bytes that the first pass makes and the model keeps: rotary frequencies, mean and deviation of pixels, a block each."""
BATCH = 64
"""Examples of an optimizer step: micro-batches are its divisors."""


@dataclass(frozen=True)
class Search:
    """A search on one GPU."""

    method: str
    memory_gib: float
    """Of the GPU."""
    attention: str = "flash"
    optimistic: bool = False
    """The planner's estimate is a hundredth, so that the search begins with a size that runs out of memory."""


@dataclass(frozen=True)
class Chosen:
    """What the search found."""

    size: int
    """Examples of a micro-batch."""
    interval: int
    """Every which layer is recomputed; 0: none."""
    probes: list[dict[str, float | None]]
    """micro_batch_size, recompute_every and peak_bytes (None where the GPU ran out of memory) of each real pass."""
    capacity: float
    """Bytes that the search may use."""
    live_before: int
    live_after: int
    """Allocated bytes after the search, without the adapters' copies in the compute type, which training keeps too."""


def search(job: Search, folder: Path) -> Chosen:
    """Build the job in this process, which must have loaded the guard; `folder` is fullsize.write_folders'."""
    from phi3v.model.lora import _Prepared
    from phi3v.training import micro_batch
    from phi3v.training.job import build

    from . import cuda, fullsize
    from .machine import on_machine

    output = folder / "out" / f"{job.method}-{job.memory_gib}-{job.attention}-{job.optimistic}"
    settings = settings_of(FullSizeJob(job.method, job.attention), folder).model_copy(
        update={"batch_size": BATCH, "micro_batch_size": "auto", "output_dir": str(output)}
    )
    live: list[int] = []
    choose = micro_batch.choose

    def watched(*args: Any, **more: Any) -> Any:
        live.append(gpu.memory.live)
        try:
            return choose(*args, **more)
        finally:
            for kept in gc.get_objects():
                if type(kept) is _Prepared:
                    vars(kept).clear()
                    kept.__init__()
            gc.collect()
            live.append(gpu.memory.live)

    machine = replace(cuda.A100, memory_gib=job.memory_gib, gpus=1)
    planned = micro_batch.Trial.estimate
    estimate = (lambda trial, way: planned(trial, way) / 100) if job.optimistic else planned
    with (
        on_machine(machine, limited=True) as gpu,
        fullsize.without_weights(),
        mock.patch.object(micro_batch, "choose", watched),
        mock.patch.object(micro_batch.Trial, "estimate", estimate),
    ):
        build(settings, output, trackers=False)
    found = json.loads((output / micro_batch.FILE).read_text(encoding="utf-8"))
    size, interval = found["micro_batch_size"], found["recompute_every"]
    return Chosen(size, interval, found["probes"], found["capacity_bytes"], *live)


def searched(jobs: list[Search]) -> list[Chosen]:
    """Search in a process of its own."""
    return [Chosen(**line) for line in run_module("fakegpu.auto", [asdict(job) for job in jobs])]


def main() -> None:
    """Search for the jobs of the command line and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD")
    parser.add_argument("--memory", nargs="+", type=float, default=[24.0], help="GiB of the GPU")
    parser.add_argument("--attention", choices=("flash", "eager"), default="flash")
    parser.add_argument("--json", help="a list of searches; results are printed as one JSON object a line")
    chosen = parser.parse_args()
    jobs = [Search(**job) for job in json.loads(chosen.json or "[]")]
    jobs += [Search(method, memory, chosen.attention) for method in chosen.methods for memory in chosen.memory]
    from . import preload

    preload.preload()
    from . import fullsize

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fullsize.write_folders(folder)
        for job in jobs:
            text = in_child(lambda job=job: asdict(search(job, folder)), folder / "answer.json")
            if not chosen.json:
                print(job, file=sys.stderr)
            print(text, flush=True)


if __name__ == "__main__":
    main()
