"""With CI=true a skipped test is a failure: what a machine lacks is installed there, not passed over.

Hypothesis tries the same examples every time there, others every time elsewhere.
"""

import gc
import os
import shutil
import signal
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
# A shell ignores SIGINT in its background jobs, and so would every program that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
# The files that take longest start first, so that both workers of `make test` end together.
LONGEST = (
    "test_run", "test_training_checkpoints", "test_resume", "test_evaluation_run", "test_docs", "test_walks",
    "test_model_modeling", "test_dry_run", "test_model_runtime", "test_training_finetune", "test_refusals",
    "test_shared_data", "test_benchmark_speed", "test_training_processes", "test_containers", "test_budgets",
    "test_supply", "test_training_text_only", "test_deployment", "test_model_generation", "test_training_kills",
)  # fmt: skip


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium that logs its console and its requests."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--window-size=1440,1000", f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(autouse=True)
def same_environment():
    """What a job under test sets for its process (DS_ACCELERATOR, WORLD_SIZE, …) ends with the test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_sessionstart() -> None:
    gc.disable()  # importing all tests, and with them PyTorch, makes only objects that stay


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first. `make test` gives a worker whole files, for what the tests of a file share."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped with CI=true: {report.longrepr}"
