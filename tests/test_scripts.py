"""What every script that prints a table does."""

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
