"""A checkpoint for other programs, and what this package answers with it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden.helpers import official_files

from clients.checkpoint import build
from clients.reference import answer, cases


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory) -> Path:
    """The published tower and vocabulary with a small decoder, 1.3 GB."""
    return build(tmp_path_factory.mktemp("clients") / "model", official_files())


@pytest.fixture(scope="package")
def questions(tmp_path_factory) -> list[dict[str, Any]]:
    """Texts and pictures."""
    return cases(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="package")
def ours(checkpoint, questions) -> dict[str, dict[str, list[Any]]]:
    """This package's answers to all of them, at the checkpoint's number of crops."""
    return answer(checkpoint, questions)


def with_code(checkpoint: Path, folder: Path, code: Path) -> Path:
    """A folder of links to the checkpoint's files and to the publisher's Python files."""
    folder.mkdir()
    for file in (*checkpoint.iterdir(), *code.glob("*_phi3_v.py")):
        (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="package")
def code() -> Path:
    """The publisher's Python files, which are not part of this repository."""
    folder = Path(os.environ.get("PHI3V_PUBLISHER_CODE", "missing"))
    if not (folder / "processing_phi3_v.py").is_file():
        pytest.fail(
            "PHI3V_PUBLISHER_CODE: expected a folder with configuration_, modeling_ and processing_phi3_v.py of the base model"
        )
    return folder


@pytest.fixture(scope="package")
def served(checkpoint, code, tmp_path_factory) -> Path:
    """The checkpoint beside that code."""
    return with_code(checkpoint, tmp_path_factory.mktemp("served") / "model", code)


@pytest.fixture(scope="session")
def client() -> Callable[..., subprocess.CompletedProcess[str]]:
    """client(name, *command): runs a command with the Python of an environment that `make clients` made."""
    folder = Path(os.environ.get("PHI3V_CLIENTS", ".clients")).resolve()

    def run(name: str, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
        python = folder / name / "bin" / "python"
        if not python.is_file():
            pytest.fail(f"{python}: no such environment; expected `make clients` to have made it")
        values = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        values |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", **environment}
        done = subprocess.run([python, *map(str, command)], env=values, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return done

    return run
