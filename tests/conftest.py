"""With CI=true a skipped test is a failure: what a machine lacks is installed there, not passed over.

Hypothesis tries the same examples every time there, others every time elsewhere.
"""

import os
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("same", derandomize=True)
if os.environ.get("CI") == "true":
    settings.load_profile("same")
if version("torch").endswith("+cpu"):
    # Jobs refuse to take the CPU of a machine with GPUs; with this build the tests mean the CPU.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(autouse=True)
def same_environment():
    """What a job under test sets for its process (DS_ACCELERATOR, WORLD_SIZE, …) ends with the test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped with CI=true: {report.longrepr}"
