"""A training job whose disk fills up, run by test_training_faults.py in a mount namespace of its own.

python tests/training_full_disk.py MODEL DATA MOUNT_POINT     prints one JSON object on its last line
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from training_fixtures import ROOT, weights

from phi3v.training import checkpoints
from phi3v.training.loop import Loop


def start(arguments: list[str]) -> tuple[int, str]:
    """Runs scripts/finetune.py in this process; returns its exit code and what it wrote to stderr."""
    sys.argv = ["finetune.py", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as output:
        try:
            runpy.run_path(str(ROOT / "scripts/finetune.py"), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0), output.getvalue()
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    raise AssertionError("the script did not exit")


def main() -> int:
    """Run until the disk is full, look at what is left, make room, run to the end."""
    model, data, folder = map(Path, sys.argv[1:])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=True)
    out, ballast = folder / "out", folder / "ballast"
    command = [
        "--model_name_or_path", str(model), "--data_dir", str(data), "--output_dir", str(out), "--batch_size", "8",
        "--max_steps", "5", "--save_steps", "2", "--zero_stage", "0", "--fp32", "--no-tqdm", "--learning_rate", "1e-3",
    ]  # fmt: skip
    save = Loop.save

    def fill_and_save(loop: Loop) -> None:
        if loop.state.step == 4:
            loop.writer.finish()  # the first checkpoint is complete
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, os.statvfs(folder).f_bavail * 4096 - 200_000))
        save(loop)

    Loop.save = fill_and_save
    code, output = start(command)
    Loop.save = save
    left = checkpoints.checkpoint_folders(out / "checkpoints")
    sealed = json.loads((left[0] / checkpoints.SEAL).read_text()) if left else {"settings": {}}
    whole = [checkpoints.why_not(path, sealed["settings"], 1, False) for path in left]
    ballast.unlink()
    again, after = start(command)
    names = [path.name for path in left]
    exported = sorted(weights(out / "final"))
    print(json.dumps({
        "code": code, "output": output, "left": names, "wrong": whole, "again": again, "after": after, "final": exported
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
