"""A training job whose disk fills up, run by test_training_faults.py in a mount namespace of its own.

python tests/training_full_disk.py MODEL DATA MOUNT_POINT     prints one JSON object on its last line
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from training_fixtures import finish, launch, weights

from phi3v.training import checkpoints


def main() -> int:
    """Run until the disk is full, look at what is left, make room, run to the end."""
    model, data, folder = map(Path, sys.argv[1:])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=True)
    out = folder / "out"
    command = [
        "--model_name_or_path", str(model), "--data_dir", str(data), "--output_dir", str(out), "--batch_size", "8",
        "--max_steps", "400", "--save_steps", "50", "--zero_stage", "0", "--fp32", "--no-tqdm", "--learning_rate", "1e-3",
    ]  # fmt: skip
    job = launch(command)
    while not checkpoints.checkpoint_folders(out / "checkpoints") and job.poll() is None:
        time.sleep(0.02)
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        file.truncate(0)
        os.posix_fallocate(file.fileno(), 0, max(1, os.statvfs(folder).f_bavail * 4096 - 200_000))
    code, output = finish(job)
    left = checkpoints.checkpoint_folders(out / "checkpoints")
    sealed = json.loads((left[0] / checkpoints.SEAL).read_text()) if left else {"settings": {}}
    whole = [checkpoints.why_not(path, sealed["settings"], 1, False) for path in left]
    ballast.unlink()
    again, after = finish(launch(command))
    names = [path.name for path in left]
    exported = sorted(weights(out / "final"))
    print(json.dumps({
        "code": code, "output": output, "left": names, "wrong": whole, "again": again, "after": after, "final": exported
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
