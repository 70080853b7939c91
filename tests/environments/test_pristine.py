"""A machine with nothing but Python, make and git: clone, a short demo, the tests. Nothing is there to compile with."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import rootfs

ROW = "phi35-digits-full-bf16"


@pytest.mark.verify
def test_clone_demo_and_tests_on_a_fresh_machine(root, tmp_path, capsys):
    assert not rootfs.is_possible(), rootfs.is_possible()
    figures = rootfs.Stopwatch(capsys)
    machine, home = tmp_path / "machine", tmp_path / "machine/home/phi3v"
    with figures("fresh Debian with python3, make and git", machine):
        rootfs.bootstrap(machine, packages="python3,python3-venv,make,git,ca-certificates")
    path = "/usr/bin:/bin:/usr/sbin:/sbin"
    for compiler in ("cc", "gcc", "g++", "clang", "nvcc"):
        assert rootfs.enter(machine, f"command -v {compiler}", path=path).returncode != 0
    # The clone is made on this side: the fresh machine does not see this folder.
    subprocess.run(["git", "clone", "-q", str(root), str(home)], check=True)

    def make(target, **options):
        done = rootfs.enter(machine, f"make {target}", working="/home/phi3v", path=path, **options)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    with figures("make venv", home / ".venv"):
        make("venv")
    with figures(f"make demo ARGS={ROW}", home / "results"):
        make(f"demo ARGS={ROW}")
    assert (home / f"results/demo/evaluate/{ROW}/manifest.json").is_file()
    with figures("make test"):
        said = make("test")
    with capsys.disabled():
        print("\n" + "\n".join(re.findall(r"^.*(?:passed|SKIPPED).*$", said, re.M)))
    assert re.search(r"\d+ passed", said)
    assert "failed" not in said
