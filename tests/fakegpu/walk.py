"""Walk scripts of this project as on a machine with GPUs, with a tiny model and no GPU.

    walked = walks(tmp_path, [Walk("lora", "finetune", ["--use_lora", "--bf16"]), …])

A process of its own loads the guard and the libraries once and forks for each walk. The scripts run as they are; only
4-bit layers are built by hand (see `fullsize`).
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from .guard import ROOT, child_environment

TIMEOUT = 600


@dataclass(frozen=True)
class Walk:
    """A start of a script. `{base}` in an argument is the folder with model/ and data/."""

    name: str
    script: str
    """Of scripts/, without .py."""
    arguments: list[str]
    machine: str = "A100"
    """Of cuda.MACHINES."""
    gpus: int = 8
    world: int = 0
    """Processes that torchrun started, of which this is rank 0; 0: no torchrun."""
    local_rank: int = 0
    stop_at: int | None = None
    """Optimizer step at whose end SIGTERM arrives."""
    packages: str = ""
    """Folder that comes first where Python looks for packages."""


@dataclass(frozen=True)
class Walked:
    """How it ended."""

    exit_code: int
    output: str
    """Standard output and error."""
    observed: dict[str, Any] = field(default_factory=dict)
    """observed.json of a training job."""
    kernels: dict[str, int] = field(default_factory=dict)
    """Attention kernels that SDPA chose."""
    loads: list[str] = field(default_factory=list)
    """Devices that safetensors' load_file was asked for."""
    operators: int = 0
    peak_bytes: int = 0
    live_bytes: int = 0
    """Still allocated when the script has ended."""


def walks(folder: Path, jobs: Sequence[Walk]) -> dict[str, Walked]:
    """Run the walks one after the other in FOLDER, each from the name's own result file; name to result."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "walks.json").write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
    command = [sys.executable, "-m", "fakegpu.walk", str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}")
    return {
        job.name: Walked(
            output=(folder / f"{job.name}.txt").read_text(encoding="utf-8"),
            **json.loads((folder / f"{job.name}.json").read_text(encoding="utf-8")),
        )
        for job in jobs
    }


@contextmanager
def _loaded_on_the_device() -> Iterator[None]:
    """Models are moved when they are loaded: moving a parameter keeps its identity on a GPU, but not here."""
    from phi3v.model import adapters
    from phi3v.training import job

    from .fullsize import quantised

    load = job.load_model

    def load_model(settings: Any, device: Any) -> Any:
        model = load(settings, device)
        is_sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        return model if is_sharded else model.to(device)

    with (
        mock.patch.object(job, "load_model", load_model),
        mock.patch.object(adapters, "load_quantized", quantised),
        mock.patch.object(job, "load_quantized", quantised),
    ):
        yield


def _stop_at(step: int | None) -> None:
    """Let SIGTERM arrive at the end of an optimizer step."""
    from phi3v.training.loop import Loop

    original = Loop.update

    def update(self: Any) -> Any:
        if self.state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    if step is not None:
        Loop.update = update  # type: ignore[method-assign]


def _run(walk: Walk, folder: Path) -> dict[str, Any]:
    """Run the script in this process; the fields of `Walked`, output aside."""
    from dataclasses import replace

    from .cuda import MACHINES
    from .machine import on_machine

    script = str(ROOT / "scripts" / f"{walk.script}.py")
    arguments = [argument.replace("{base}", str(folder)) for argument in walk.arguments]
    machine = replace(MACHINES[walk.machine], gpus=walk.gpus)
    if walk.packages:
        sys.path.insert(0, walk.packages)
    _stop_at(walk.stop_at)
    code = 0
    with on_machine(machine, walk.world) as gpu, _loaded_on_the_device():
        if walk.world:
            os.environ["LOCAL_RANK"] = str(walk.local_rank)
        sys.argv = [script, *arguments]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
            if isinstance(end.code, str):
                print(end.code)
        except BaseException:
            traceback.print_exc()
            code = -1
        gc.collect()
    observed = Path(_value_of("--output_dir", arguments)) / "observed.json"
    return {
        "exit_code": code, "observed": json.loads(observed.read_text()) if observed.is_file() else {}, "kernels": dict(gpu.ledger.kernels), "loads": gpu.loads,
        "operators": sum(gpu.ledger.calls.values()), "peak_bytes": gpu.memory.peak, "live_bytes": gpu.memory.live,
    }  # fmt: skip


def _value_of(flag: str, arguments: Sequence[str]) -> str:
    return arguments[arguments.index(flag) + 1] if flag in arguments else ""


def _in_child(walk: Walk, folder: Path) -> None:
    """Fork: DeepSpeed, accelerate and signal handlers keep state for the life of a process."""
    answer = folder / f"{walk.name}.json"
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        if not answer.is_file():
            answer.write_text(json.dumps({"exit_code": -2}), encoding="utf-8")
        return
    log = os.open(folder / f"{walk.name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.alarm(TIMEOUT)
    try:
        answer.write_text(json.dumps(_run(walk, folder)), encoding="utf-8")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def main() -> None:
    """Run FOLDER/walks.json."""
    folder = Path(sys.argv[1])
    from . import preload

    preload.preload()
    from training_fixtures import write_base

    if not (folder / "model").is_dir():
        write_base(folder, examples=64, text_only_every=9)
    os.chdir(folder)
    for values in json.loads((folder / "walks.json").read_text(encoding="utf-8")):
        _in_child(Walk(**values), folder)


if __name__ == "__main__":
    main()
