"""What scripts do that every one of them should."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["plan", "provenance", "cluster"])
def test_a_reader_that_has_seen_enough_is_no_error(root, name):
    """As `scripts/plan.py | head`; the help text goes the way of the tables and needs no result and no cluster."""
    process = subprocess.Popen(
        [sys.executable, str(root / f"scripts/{name}.py"), "--help"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONPATH": str(root / "src"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate()[1] == b""


@pytest.mark.parametrize("name", ["reproduce", "sbom"])
def test_help_is_the_scripts_first_page_and_does_no_work(root, name):
    done = subprocess.run(
        [sys.executable, str(root / f"scripts/{name}.py"), "--help"], capture_output=True, text=True, timeout=60, check=False,
        env={"PYTHONPATH": str(root / "src"), "PATH": "", "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name}.py")
    assert f"python scripts/{name}.py" in done.stdout
