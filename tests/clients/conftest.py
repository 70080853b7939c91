"""A checkpoint for other programs, and what this package answers with it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from golden.helpers import official_files

from clients.checkpoint import build, with_code
from clients.reference import Answers, Case, answer, write_cases


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory) -> Path:
    """The published tower and vocabulary with a small decoder, 1.3 GB."""
    return build(tmp_path_factory.mktemp("clients") / "model", official_files())


@pytest.fixture(scope="package")
def cases(tmp_path_factory) -> dict[str, Case]:
    """Texts and pictures by name."""
    return write_cases(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="package")
def ours(checkpoint) -> Callable[[list[Case]], Answers]:
    """This package's answers at the checkpoint's number of crops; each is computed once."""
    known: Answers = {}

    def answers(some: list[Case]) -> Answers:
        if missing := [case for case in some if case["name"] not in known]:
            known.update(answer(checkpoint, missing))
        return {case["name"]: known[case["name"]] for case in some}

    return answers


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
def environment() -> Callable[[str], Path]:
    """The folder of an environment that `make clients` made, by its name."""

    def folder(name: str) -> Path:
        place = Path(os.environ.get("PHI3V_CLIENTS", ".clients")).resolve() / name
        if not (place / "complete").is_file():
            pytest.fail(f"{place}: not complete; expected `make clients` to have made this environment")
        return place

    return folder


@pytest.fixture(scope="session")
def client(environment) -> Callable[..., subprocess.CompletedProcess[str]]:
    """client(name, *command): runs a command with the Python of an environment."""

    def run(name: str, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
        values = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        values |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", **variables}
        python = environment(name) / "bin" / "python"
        done = subprocess.run([python, *map(str, command)], env=values, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return done

    return run
