"""Measure a micro-step of full-size training on a fake GPU: host waits, copies, operators, bytes moved, peak memory.

    python -m tests.fakegpu.measure lora                                one GPU, bf16, flash attention, rank 32
    python -m tests.fakegpu.measure full lora --world 8 --attention eager
    python -m tests.fakegpu.measure full --world 8 --micro_batch 4 --set gradient_checkpointing=false
    python -m tests.fakegpu.measure lora --by operator --top 20         where the bytes and operators come from

The job is built by phi3v.training.job.build and its loop runs for two optimizer steps; the second is measured.
No GPU is needed. Another Python module calls `measured`, which starts this one in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .guard import child_environment

GB = 1e9
METHODS = ("full", "frozen", "lora", "qlora", "dora")
TRAINING = ("inputs", "forward", "backward")
"""Phases of a micro-step; an optimizer step adds `optimizer` and `step` (all the rest)."""


@dataclass(frozen=True)
class FullSizeJob:
    """What is measured."""

    method: str
    attention: str = "flash"
    dtype: str = "bf16"
    world: int = 1
    """Processes; 1 without torchrun's reduction of gradients."""
    micro_batch: int = 1
    accumulation: int = 2
    """Micro-steps of an optimizer step."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further finetune settings, by name."""
    layers: int = 0
    """Of the decoder, and of the vision tower; 0: all that the published model has."""

    @property
    def name(self) -> str:
        """As in budgets.yaml: "lora flash bf16 8 GPUs"."""
        more = "".join(f" {key}={value}" for key, value in sorted(self.settings.items()))
        rows = f" micro-batch {self.micro_batch}" if self.micro_batch != 1 else ""
        layers = f" {self.layers} layers" * bool(self.layers)
        return (
            f"{self.method} {self.attention} {self.dtype} {self.world} GPU{'s' * (self.world > 1)}{rows}{more}{layers}"
        )


@dataclass(frozen=True)
class Measured:
    """One micro-step (mean over an optimizer step's), and what the optimizer step adds."""

    job: str
    host_waits: float
    """Of a micro-step."""
    blocking_copies: float
    """Host-to-device copies of a micro-step for which the host waits."""
    copies: float
    """All host-to-device copies of a micro-step."""
    copied_mb: float
    forward_operators: float
    backward_operators: float
    products_gb: float
    """Bytes that matrix products read and write in a micro-step, forward and backward."""
    attention_gb: float
    elementwise_gb: float
    all_gb: float
    """The sum of the three."""
    reduction_waits: float
    """Host waits of a micro-step in DeepSpeed, which are in none of the figures above; likewise the next three."""
    reduction_operators: float
    reduction_gb: float
    communication_gb: float
    """Size of the tensors that collectives were given in a micro-step."""
    optimizer_waits: int
    """Host waits of an optimizer step outside its micro-steps."""
    optimizer_operators: int
    optimizer_gb: float
    peak_gb: float
    """Largest allocated memory of the optimizer step, 10^9 bytes, without CUDA's context and the allocator's reserve."""
    peak_phase: str
    resting_gb: float
    """Allocated between optimizer steps."""
    kernels: dict[str, int]
    """Attention kernels chosen by SDPA, calls of an optimizer step."""
    sources: dict[str, list[list[Any]]] = field(default_factory=dict)
    """For each quantity [amount, operator, source line], largest first."""


def settings_of(job: FullSizeJob, folder: Path) -> Any:
    """The job's FinetuneSettings on the folders of fullsize.write_folders."""
    from phi3v.settings import FinetuneSettings, validate

    adapters = {"lora_rank": 32, "lora_alpha_ratio": 0.5}
    methods: dict[str, dict[str, Any]] = {
        "full": {}, "frozen": {"freeze_vision_model": "vision"}, "lora": {"use_lora": True, **adapters},
        "qlora": {"use_qlora": True, **adapters}, "dora": {"use_lora": True, "use_dora": True, **adapters},
    }  # fmt: skip
    values = {
        "model_name_or_path": str(folder / "model"), "data_dir": str(folder / "data"),
        "output_dir": str(folder / "out"), "batch_size": job.accumulation * job.world * job.micro_batch,
        "batch_size_per_gpu": job.micro_batch, "max_steps": 2, "tqdm": False, job.dtype: True,
        "use_flash_attention": job.attention == "flash", **methods[job.method], **job.settings,
    }  # fmt: skip
    return validate(FinetuneSettings, values, "measure")


def measure(job: FullSizeJob, folder: Path, top: int = 40) -> Measured:
    """Measure in this process, which must have loaded the guard; `folder` is write_folders'."""
    from . import cuda, fullsize
    from .machine import on_machine

    machine = replace(cuda.V100 if job.dtype == "fp16" else cuda.A100, gpus=min(job.world, 8))
    torchrun = job.world if job.world > 1 or job.method in ("full", "frozen") else 0
    with on_machine(machine, torchrun) as gpu, fullsize.without_weights():
        from phi3v.training.job import build

        loop = build(settings_of(job, folder), folder / "out", trackers=False)
        return _second_step(job, loop, gpu, top)


def _second_step(job: FullSizeJob, loop: Any, gpu: Any, top: int) -> Measured:
    """Train, and account for what happens between the ends of the first and the second optimizer step."""
    results: list[Measured] = []

    def at_step_end(record: Any) -> None:
        if record.step == 1:
            gpu.ledger.clear()
            gpu.memory.reset_peak()
        else:
            results.append(account(job, gpu, top))

    loop.hooks.append(at_step_end)
    hooks = follow_phases(loop, gpu)
    try:
        loop.run()
    finally:
        for hook in hooks:
            hook.remove()
    return results[0]


def follow_phases(loop: Any, gpu: Any) -> list[Any]:
    """Set the ledger's phase: inputs, forward (the device sets backward), optimizer, step; returns hooks to remove."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    ledger, original = gpu.ledger, loop.micro_step

    def enter(phase: str) -> Any:
        def hook(*_: Any) -> None:
            ledger.phase = phase

        return hook

    def micro_step(*args: Any, **more: Any) -> Any:
        ledger.phase = "inputs"
        try:
            return original(*args, **more)
        finally:
            ledger.phase = "step"

    loop.micro_step = micro_step
    return [
        loop.module.register_forward_pre_hook(enter("forward")),
        register_optimizer_step_pre_hook(enter("optimizer")),
        register_optimizer_step_post_hook(enter("step")),
    ]


def account(job: FullSizeJob, gpu: Any, top: int) -> Measured:
    """The ledger of one optimizer step as a `Measured`."""
    from .ledger import KINDS, is_reduction, kind_of

    ledger, memory, micro = gpu.ledger, gpu.memory, job.accumulation
    kinds = {kind: Counter({op: n for op, n in ledger.traffic.items() if kind_of(op) == kind}) for kind in KINDS}
    moved = {kind: _total(kinds[kind], TRAINING) / micro / GB for kind in KINDS}
    waits, calls = ledger.waits, ledger.calls
    own_calls = Counter({op: n for op, n in calls.items() if not is_reduction(op)})
    own_waits = Counter({op: n for op, n in waits.items() if not is_reduction(op)})
    other = {op.phase for op in [*calls, *waits]} - set(TRAINING)
    return Measured(
        job=job.name,
        host_waits=_total(own_waits, TRAINING) / micro,
        blocking_copies=sum(n for copy, n in ledger.copies.items() if copy.blocking) / micro,
        copies=sum(ledger.copies.values()) / micro,
        copied_mb=sum(copy.size * n for copy, n in ledger.copies.items()) / micro / 1e6,
        forward_operators=_total(own_calls, ("inputs", "forward")) / micro,
        backward_operators=_total(own_calls, ("backward",)) / micro,
        products_gb=moved["products"], attention_gb=moved["attention"], elementwise_gb=moved["elementwise"],
        all_gb=moved["products"] + moved["attention"] + moved["elementwise"],
        reduction_waits=(_total(waits, TRAINING) - _total(own_waits, TRAINING)) / micro,
        reduction_operators=(_total(calls, TRAINING) - _total(own_calls, TRAINING)) / micro,
        reduction_gb=moved["reduction"], communication_gb=moved["communication"],
        optimizer_waits=_total(waits, other), optimizer_operators=_total(calls, other),
        optimizer_gb=_total(ledger.traffic, other) / GB,
        peak_gb=memory.peak / GB, peak_phase=memory.peak_phase, resting_gb=memory.live / GB,
        kernels=dict(ledger.kernels),
        sources={
            "host_waits": _largest(waits, top),
            "copies": [
                [n, f"{c.dtype} {list(c.shape)}: {c.why or 'asynchronous'}", f"[{c.phase}] {c.source}"]
                for c, n in ledger.copies.most_common()
            ],
            "operators": _largest(calls, top),
            **{f"{kind}_gb": _largest(kinds[kind], top, GB) for kind in KINDS},
            "peak_gb": _largest(memory.at_peak(), top, GB),
        },
    )  # fmt: skip


def _total(counter: Counter[Any], phases: Collection[str]) -> int:
    return sum(n for op, n in counter.items() if op.phase in phases)


def _largest(counter: Counter[Any], top: int, unit: float = 1) -> list[list[Any]]:
    """[amount, operator, source] by operator and line, largest first."""
    return [[n / unit, op.name, f"[{op.phase}] {op.source}"] for op, n in counter.most_common(top)]


def measured(jobs: list[FullSizeJob], top: int = 40) -> list[Measured]:
    """Measure in a process of its own, one job after the other. Raises RuntimeError with its output if it fails."""
    lines = run_module("fakegpu.measure", [asdict(job) for job in jobs], "--top", str(top))
    return [Measured(**line) for line in lines]


def run_module(module: str, jobs: list[dict[str, Any]], *arguments: str) -> list[dict[str, Any]]:
    """Run `python -m MODULE --json JOBS` with this tree's package, and read its JSON lines, one for each job."""
    command = [sys.executable, "-m", module, *arguments, "--json", json.dumps(jobs)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(lines) != len(jobs):
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return [json.loads(line) for line in lines]


def _show(result: Measured, by: str | None, top: int) -> None:
    print(f"== {result.job}")
    for name, value in asdict(result).items():
        if name not in ("job", "sources"):
            print(f"  {name:20s} {value:,.2f}" if isinstance(value, float) else f"  {name:20s} {value}")
    if by is None:
        return
    for quantity, rows in result.sources.items():
        print(f"  {quantity} by {by}:")
        if by == "operator" and quantity not in ("copies", "host_waits"):
            sums: Counter[str] = Counter()
            for amount, operator, source in rows:
                sums[f"{source.partition(']')[0]}] {operator}"] += amount
            rows = [[amount, operator, ""] for operator, amount in sums.most_common()]
        for amount, operator, source in rows[:top]:
            print(f"    {amount:10,.2f}  {operator}  {source}")


def in_child(work: Callable[[], dict[str, Any]], answer: Path) -> str:
    """Fork, and work in the child, for DeepSpeed, accelerate and DDP keep state for the life of a process.

    answer: a file for the result, which comes back as JSON. Raises SystemExit if the child fails.
    """
    answer.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr
        try:
            answer.write_text(json.dumps(work()), encoding="utf-8")
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.waitpid(child, 0)
    if not answer.is_file():
        raise SystemExit("the child failed, see above")
    return answer.read_text(encoding="utf-8")


def main() -> None:
    """Measure the jobs of the command line and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"any of {', '.join(METHODS)}")
    parser.add_argument("--attention", choices=("flash", "eager"), default="flash")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="fp16 runs on a V100")
    parser.add_argument("--world", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--micro_batch", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="finetune settings")
    parser.add_argument("--by", choices=("source", "operator"), help="print where the figures come from")
    parser.add_argument("--top", type=int, default=40, help="rows of each of these lists (default: 40)")
    parser.add_argument("--json", help="a list of jobs; results are printed as one JSON object a line")
    chosen = parser.parse_args()
    settings = {name: json.loads(value) for name, _, value in (item.partition("=") for item in chosen.set)}
    shape = (chosen.attention, chosen.dtype, chosen.world, chosen.micro_batch, chosen.accumulation, settings)
    jobs = [FullSizeJob(**job) for job in json.loads(chosen.json or "[]")]
    jobs += [FullSizeJob(method, *shape) for method in chosen.methods]

    from . import preload

    preload.preload()
    from . import fullsize

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for layers in {job.layers for job in jobs}:
            fullsize.write_folders(folder / str(layers), layers)
        top = max(chosen.top, 400) if chosen.by else chosen.top
        for job in jobs:
            text = in_child(lambda job=job: asdict(measure(job, folder / str(job.layers), top)), folder / "answer.json")
            if chosen.json:
                print(text, flush=True)
            else:
                _show(Measured(**json.loads(text)), chosen.by, chosen.top)


if __name__ == "__main__":
    main()
