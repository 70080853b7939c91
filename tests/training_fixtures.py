"""A tiny checkpoint and a data folder for the training tests: coloured squares and their names."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from PIL import Image

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
    from phi3v.model.tiny import build_tiny

    words = ["Which colour is the square ?", *COLOURS, *COLOURS, "square", "square", "Which colour is the square ?"]
    sizes = {"hidden_size": 32, "vision_hidden_size": 32, "layers": 2, "vision_layers": 2, "heads": 2, "vision_heads": 2}
    return build_tiny(folder, words, seed=3, num_crops=2, **(sizes | geometry))


def launch(arguments: list[str], processes: int = 1, script: str = "scripts/finetune.py") -> subprocess.Popen:
    """Start a script, with several processes under torchrun; stdout and stderr together on a pipe."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*command, script, *arguments], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
