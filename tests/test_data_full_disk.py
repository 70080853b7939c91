"""A disk that is really full midway: a clear error, nothing half-written, and the same command ends well once there is
room."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from full_disk import SCENARIOS
from namespaces import namespace

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("full_disk.py")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_disk_that_is_full(scenario: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [*namespace(), sys.executable, str(SCRIPT), scenario, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
