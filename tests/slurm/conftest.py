"""The test cluster, a copy of the repository for small runs, and one that nothing happens to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, missing
from cluster_run import EPOCHS, ROWS, Runs


@contextmanager
def started(folder: Path, **options: Any) -> Iterator[Cluster]:
    """A cluster that SLURM's commands reach by SLURM_CONF meanwhile; the test is skipped where none can run."""
    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster(folder, **options)
    cluster.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(cluster.conf))
            yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="package")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A SLURM of four nodes, gone after this folder's last test."""
    with started(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
def bare_cluster(tmp_path) -> Iterator[Cluster]:
    """A second cluster, for one test: no accounting, and it forgets a job 30 s after its end."""
    with started(tmp_path / "bare", accounting=False, min_job_age=30) as made:
        yield made


@pytest.fixture(scope="package")
def runs(cluster, root, tmp_path_factory) -> Runs:
    """The repository's copy that all runs share."""
    return Runs(root, tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="package")
def until() -> Callable[..., None]:
    """until(what, condition, seconds=120): waits for it."""

    def wait(what: str, condition: Callable[[], bool], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
            time.sleep(0.1)

    return wait


@pytest.fixture(scope="package")
def undisturbed(runs):
    """The same rows without faults, on this machine."""
    code, output = runs.run(runs.configure("undisturbed", ROWS, epochs=EPOCHS), profile="profiles/demo")
    assert code == 0, output[-8000:]
