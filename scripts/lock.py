"""Write every environment's lock file from pyproject.toml's extras: one resolution, exact versions.

    python scripts/lock.py                            # make lock: keep the versions that still fit
    python scripts/lock.py --upgrade-package pillow   # one package to its newest
    python scripts/lock.py --check                    # write nothing; exit 1 where pyproject.toml and the locks differ

requirements.txt (what `make venv` installs) is resolved first; each environment of envs/ takes its versions from there. NAME.txt is for pip
(containers), NAME.yaml for conda. Reads the package index that uv is told to use (UV_DEFAULT_INDEX), never pip's configuration.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ("workflow", "train", "report", "dev")
# Environment: pyproject.toml's extras, with hashes, with what only a CUDA build of torch needs, and what it serves.
ENVIRONMENTS = {
    "workflow": (("workflow",), False, False, "What starts the workflow: Snakemake and its plugins."),
    "data": (("data",), False, False, "What the download and conversion rules import."),
    "train-cpu": (("train",), False, False, "Training, evaluation and speed without a GPU: torch's CPU build comes from pip's configuration."),
    "train-cuda": (("train",), True, True, "Training, evaluation and speed on NVIDIA GPUs."),
    "report": (("report",), False, False, "What the report and plan rules import."),
}  # fmt: skip
PYTHON = "3.11"
PLATFORM = "x86_64-manylinux_2_28"
# torch's build on the package index depends on these; its CPU build, of the same version, on none.
CUDA_ONLY = re.compile(r"(nvidia-.+|cuda-.+|triton)$")
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)")
COMMAND = "# Written by `make lock` from pyproject.toml; edit that file and run it again.\n"


def resolve(
    folder: Path, extras: tuple[str, ...], before: str, hashes: bool, excluded: str, options: list[str]
) -> list[str]:
    """The lines `name==version` (with their hashes, sorted by name) that the extras need. before: pins to keep where they fit."""
    output = folder / "resolved.txt"
    output.write_text(before)
    (folder / "excluded.txt").write_text(excluded)
    command = [
        sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config", "--no-header", "--no-annotate", "--python-version", PYTHON,
        "--python-platform", PLATFORM, "--excludes", str(folder / "excluded.txt"), "--output-file", str(output), *options,
        *(["--generate-hashes"] if hashes else []), *(part for extra in extras for part in ("--extra", extra)),
        str(ROOT / "pyproject.toml"),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    subprocess.run(command, check=True, env=environment, cwd=folder)
    return [line.strip() for line in output.read_text().replace(" \\\n", " ").splitlines() if PIN.match(line)]


def as_pip(lines: list[str]) -> str:
    """A requirements file, one hash a line."""
    return COMMAND + "".join(re.sub(r"\s+--hash", " \\\n    --hash", line) + "\n" for line in lines)


def as_conda(lines: list[str], purpose: str, gpu: bool) -> str:
    """A conda environment: Python and pip from conda-forge, all else by pip at the lock's versions.

    gpu: with a C compiler, which Triton and torch.compile call for kernels on GPUs.
    """
    pins = "".join(f"      - {' '.join(line.split())}\n" for line in lines)
    head = f"{COMMAND}# {purpose}\nchannels: [conda-forge, nodefaults]\n"
    compiler = "  - gcc\n" if gpu else ""
    return f"{head}dependencies:\n  - python={PYTHON}\n{compiler}  - pip\n  - pip:\n{pins}"


def lock(current: dict[str, str], options: list[str]) -> dict[str, str]:
    """Path under the repository to text, of every lock file. current: the files as they are, whose versions are kept."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        everything = resolve(folder, ("train",), current.get("envs/train-cuda.txt", ""), False, "", options)
        cuda = [line for line in everything if CUDA_ONLY.match(line.split("==")[0])]
        excluded = "".join(f"{line.split('==')[0]}\n" for line in cuda)
        pins = resolve(folder, REQUIREMENTS, current.get("requirements.txt", ""), False, excluded, options)
        files = {"requirements.txt": as_pip(pins)}
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join([*pins, *cuda]))
        for name, (extras, hashes, gpu, purpose) in ENVIRONMENTS.items():
            lines = resolve(folder, extras, "", hashes, "" if gpu else excluded, ["--constraints", str(constraints)])
            files[f"envs/{name}.txt"] = as_pip(lines)
            files[f"envs/{name}.yaml"] = as_conda(lines, purpose, gpu)
    return files


def main() -> int:
    """Parse the command line and write, or with --check compare, the lock files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file would change")
    parser.add_argument(
        "--upgrade-package", action="append", default=[], metavar="NAME", help="take its newest version"
    )
    arguments = parser.parse_args()
    names = ["requirements.txt", *(f"envs/{name}.{kind}" for name in ENVIRONMENTS for kind in ("txt", "yaml"))]
    current = {name: (ROOT / name).read_text() for name in names if (ROOT / name).is_file()}
    options = [f"--upgrade-package={name}" for name in arguments.upgrade_package]
    try:
        files = lock(current, options)
    except subprocess.CalledProcessError as error:
        print(f"uv could not resolve pyproject.toml (exit {error.returncode}); nothing was written", file=sys.stderr)
        return 1
    changed = [name for name, text in files.items() if current.get(name) != text]
    for name in changed:
        if not arguments.check:
            (ROOT / name).write_text(files[name])
        print(f"{name}: {'differs from pyproject.toml: run `make lock`' if arguments.check else 'written'}")
    return 1 if changed and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
