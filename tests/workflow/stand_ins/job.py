"""Stands for the scripts that need torch or data: writes what a rule declares, in a moment.

Training takes STEPS steps of 0.1 s; each leaves a checkpoint, from which the next start goes on. A file `fail-ROW` in the
working folder makes the row fail after its second step of an attempt; with `hold-ROW` it waits there for two minutes;
with `late-ROW` the manifest is written 3 s after the job's end. The finished weights list the steps of all attempts.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

STEPS = 10


def write(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def flag(name: str) -> str:
    return sys.argv[sys.argv.index(f"--{name}") + 1]


def download(output: Path) -> None:
    write(output / "sources.lock.json", {"sources": []})


def convert(output: Path) -> None:
    splits = {name: {"examples": 4, "images": 4, "turns": 4} for name in ("train", "val")}
    write(output / "dataset.json", {"splits": splits})


def validate(_: Path) -> None:
    write(Path(sys.argv[1]) / "statistics.json", {})


def finetune(output: Path) -> None:
    row, checkpoint = flag("row"), output / "checkpoints/steps.json"
    steps = json.loads(checkpoint.read_text()) if checkpoint.is_file() else []
    for done in range(1, STEPS + 1 - len(steps)):
        time.sleep(0.1)
        steps.append(done)
        write(checkpoint, steps)
        if done == 2 and Path(f"fail-{row}").exists():
            sys.exit(f"{row}: fails as it was told to")
        if done == 2 and Path(f"hold-{row}").exists():
            time.sleep(120)
    write(output / "final/weights.json", steps)
    if Path(f"late-{row}").exists():
        late = f"sleep 3; echo '{{}}' > {output}/manifest.json"
        subprocess.Popen(late, shell=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    else:
        write(output / "manifest.json", {"kind": "train"})
    shutil.rmtree(output / "checkpoints")


def evaluate(output: Path) -> None:
    passes = ["before"] if flag("output_dir").rpartition("/")[0].endswith("base") else ["after", "control"]
    for name in passes:
        write(output / name / "predictions.jsonl", {})
        write(output / name / "metrics.json", {})
    write(output / "manifest.json", {"kind": "evaluate"})


if __name__ == "__main__":
    output = Path(flag("output_dir")) if "--output_dir" in sys.argv else Path()
    globals()[Path(sys.argv[0]).stem](output)
