#!/usr/bin/env python
"""Pack what a cluster without internet needs into one folder: source, wheels of each environment, images, data, weights.

    python scripts/bundle.py --output_dir phi3v-offline                            # make offline-bundle
    python scripts/bundle.py --output_dir phi3v-offline --environments workflow report train-cpu

Run it where the internet is, after `snakemake -c2 data` (downloads and conversions) and, for --sdm apptainer, `make containers`. The folder's
README says how to unpack; SHA256SUMS checks the journey.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from pathlib import Path

from phi3v.provenance.manifest import digest_file

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ("workflow", "data", "report", "train-cuda")
README = """phi3v without internet. On the cluster, in this folder:

    sha256sum --check SHA256SUMS
    mkdir phi3v && tar -xf source.tar -C phi3v && cd phi3v
    for name in results images; do test ! -f ../$name.tar || tar -xf ../$name.tar; done
    python3 -m venv .venv
    .venv/bin/pip install --no-index --find-links ../wheels{requirements}
    . .venv/bin/activate && export HF_HUB_OFFLINE=1 PIP_NO_INDEX=1 PIP_FIND_LINKS=$PWD/../wheels
    snakemake --profile slurm -n

Packed: {packed}.
The wheels are for Python {python} on this kind of machine ({platform}).
"""


def pack(archive: Path, paths: list[Path]) -> bool:
    """Tar of files and folders under the checkout, times kept (Snakemake goes by them); False where there is none."""
    there = [path for path in paths if path.exists()]
    if there:
        with tarfile.open(archive, "w") as tar:
            for path in there:
                tar.add(path, str(path.relative_to(ROOT)))
    return bool(there)


def complete(folder: Path, name: str) -> list[Path]:
    """Folders that hold the file which is written last."""
    return sorted(path.parent for path in folder.glob(f"*/{name}"))


def main() -> int:
    """Parse the command line and pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder to pack into")
    parser.add_argument(
        "--environments", nargs="+", default=list(ENVIRONMENTS), metavar="NAME", help="(default: %(default)s)"
    )
    given = parser.parse_args()
    folder = given.output_dir.resolve()
    if folder.exists():
        print(f"{folder}: is there already; expected a new folder", file=sys.stderr)
        return 2
    locks = [ROOT / f"envs/{name}.txt" for name in given.environments]
    missing = [str(lock) for lock in locks if not lock.is_file()]
    if missing:
        print(f"{', '.join(missing)}: no such lock; expected names of envs/NAME.txt", file=sys.stderr)
        return 2
    (folder / "wheels").mkdir(parents=True)
    subprocess.run(
        ["git", "-C", str(ROOT), "archive", "--format=tar", "-o", str(folder / "source.tar"), "HEAD"], check=True
    )
    for lock in locks:
        # `pip wheel` builds what comes as source alone, so that nothing is built on the cluster.
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--wheel-dir",
            str(folder / "wheels"),
            "-r",
            str(lock),
        ]
        subprocess.run(command, check=True)
    packed = [f"wheels of {', '.join(given.environments)}"]
    data, models = (
        complete(ROOT / "results/data", "dataset.json"),
        complete(ROOT / "results/models", "sources.lock.json"),
    )
    if pack(folder / "results.tar", data + models):
        packed += [path.relative_to(ROOT).as_posix() for path in data + models]
    images = sorted((ROOT / "containers").glob("*.sif*"))
    if pack(folder / "images.tar", images):
        packed += [path.name for path in images]
    requirements = "".join(f" -r envs/{name}.txt" for name in given.environments)
    text = README.format(
        requirements=requirements,
        packed=", ".join(packed),
        python=".".join(map(str, sys.version_info[:2])),
        platform=sys.platform,
    )
    (folder / "README").write_text(text)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{digest_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))
    size = sum(path.stat().st_size for path in files)
    print(f"{folder}: {len(files)} files, {size / 1e6:.0f} MB: {', '.join(packed)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
