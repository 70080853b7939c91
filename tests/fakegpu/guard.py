"""The guard library: built with g++ on first use, loaded before torch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
ROOT = SOURCE.parents[2]
_loaded = False


def child_environment() -> dict[str, str]:
    """Variables of a process that pretends: nothing of this one's rendezvous, device or DeepSpeed accelerator."""
    kept = ("PATH", "HOME", "TMPDIR", "LANG", "CC", "CXX", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES")
    return {
        **{name: os.environ[name] for name in kept if name in os.environ},
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("src", "tests")),
        "OMP_NUM_THREADS": "1",
    }


def torch_folder() -> Path:
    """Where torch is installed, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def missing() -> str | None:
    """Why no guard can be used here, or None."""
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "this build of PyTorch has a CUDA device guard of its own; the fake GPU needs a CPU build"
    if shutil.which("g++") is None and not library().is_file():
        return "g++ is missing; the fake GPU's device guard cannot be built (Debian: apt-get install g++)"
    return None


def library() -> Path:
    """Path of the built library; its name depends on the version of torch and on the source."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    version = importlib.metadata.version("torch")
    return cache / "phi3v-fakegpu" / f"guard-{version}-{digest}.so"


def build() -> Path:
    """Build the library unless it is there (about 15 s). Raises CalledProcessError with the compiler's message."""
    path = library()
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    torch = torch_folder()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", f"-I{torch}/include", str(SOURCE), "-o", str(built)]
        command += [f"-L{torch}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib"]
        subprocess.run(command, check=True)
        os.replace(built, path)
    return path


def load() -> None:
    """Load torch's libraries and then the guard. Raises RuntimeError if torch is imported already."""
    global _loaded
    if _loaded:
        return
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already; the guard must be loaded before it, in a new process")
    path = build()
    for name in ("libgomp*.so*", "libc10.so", "libtorch_cpu.so"):
        for file in sorted((torch_folder() / "lib").glob(name)):
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(path))
    _loaded = True


def is_loaded() -> bool:
    """Whether `load` has run in this process."""
    return _loaded
