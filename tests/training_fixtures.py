"""A tiny checkpoint and a data folder for the training tests: coloured squares and their names."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from accelerate.state import AcceleratorState
from PIL import Image

from phi3v.settings import FinetuneSettings, validate
from phi3v.training.finetune import run

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40)}


def write_data(folder: Path, examples: int = 24, text_only_every: int = 0) -> Path:
    """A conversations folder with train.jsonl and val.jsonl; answers of different lengths."""
    (folder / "images").mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (30 + 20 * len(name), 40), colour).save(folder / "images" / f"{name}.png")
    names = list(COLOURS)
    for split, count in (("train", examples), ("val", 8)):
        lines = []
        for number in range(count):
            name = names[number % len(names)]
            pictures = [] if text_only_every and number % text_only_every == 0 else [f"{name}.png"]
            answer = f"{name} " * (1 + number % 3) + "square"
            turn = {"images": pictures, "user": "Which colour is the square ?", "assistant": answer}
            lines.append(json.dumps({"id": f"{split}-{number}", "source": "test", "conversations": [turn]}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_model(folder: Path, **geometry: int) -> Path:
    """A tiny random checkpoint whose tokenizer knows the words of `write_data`."""
    from phi3v.demo.tiny import build_tiny

    words = ["Which colour is the square ?", *COLOURS, *COLOURS, "square", "square", "Which colour is the square ?"]
    sizes = {
        "hidden_size": 32,
        "vision_hidden_size": 32,
        "layers": 2,
        "vision_layers": 2,
        "heads": 2,
        "vision_heads": 2,
    }
    return build_tiny(folder, words, seed=3, num_crops=2, **(sizes | geometry))


def write_base(folder: Path, **data: int) -> Path:
    """FOLDER/data and FOLDER/model, as `write_data` and `write_model` make them; returns FOLDER."""
    write_data(folder / "data", **data)
    write_model(folder / "model")
    return folder


def train_here(base: Path, out: Path, exit_code: int = 0, **values: Any) -> Path:
    """Train FOLDER/model on FOLDER/data in this process, without a progress bar; returns `out`."""
    folders = {"model_name_or_path": str(base / "model"), "data_dir": str(base / "data"), "output_dir": str(out)}
    try:
        assert run(validate(FinetuneSettings, {"tqdm": False} | folders | values, "test")) == exit_code
    finally:
        # It would keep precision and devices for the life of the process; a script has one job, a test has many.
        AcceleratorState._reset_state(reset_partial_state=True)
    return out


# What the workflow's launch line gives torchrun, see phi3v/settings/jobs.py.
PATIENT = ("--shutdown-timeout=900", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")


def launch(
    arguments: list[str],
    processes: int = 1,
    script: str = "scripts/finetune.py",
    more: dict[str, str] | None = None,
    torchrun: bool = False,
) -> subprocess.Popen:
    """Start a script; stdout and stderr together on a pipe.

    Several processes run under torchrun, one does with `torchrun`. more: further environment variables.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | (more or {})
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable]
    if processes > 1 or torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *PATIENT]
    return subprocess.Popen(
        [*command, script, *arguments], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    """(exit code, output) of a script that should end by itself; its whole group is killed when it does not."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return process.returncode, output


def kill(process: subprocess.Popen) -> str:
    """SIGKILL the script with all its processes; returns what it had said."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    for child in family:  # torchrun's workers lead sessions of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(family, timeout=10)
    output, _ = process.communicate()
    return output


def last_step(folder: Path) -> int:
    """Step of the last whole line of metrics.jsonl; 0 where there is none."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    except OSError:
        return 0


def await_step(process: subprocess.Popen, folder: Path, step: int, seconds: float = 300) -> None:
    """Wait until training has done `step` steps; fails when the process ends before."""
    deadline = time.monotonic() + seconds
    while last_step(folder) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"step {step} not reached in {seconds} s"
        time.sleep(0.02)


def weights(folder: Path) -> dict[str, bytes]:
    """Digest of each safetensors file of a final folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in sorted(folder.glob("*.safetensors"))}


def slow_disk(folder: Path, seconds: float) -> dict[str, str]:
    """Environment for `launch` in which every fsync takes `seconds` longer; `folder` is made for it."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"import os, time\nfsync = os.fsync\nos.fsync = lambda file: (time.sleep({seconds}), fsync(file))[1]\n"
    )
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT / 'src'}"}
