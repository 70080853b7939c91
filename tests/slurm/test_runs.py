"""Runs through `snakemake --profile slurm` on the test cluster, and what must not depend on the cluster."""

from __future__ import annotations

import pytest
from conftest import ROWS

SPEED = "phi3-a100-full-eager-8gpu"


@pytest.fixture(scope="module")
def through_slurm(runs):
    """A row a method and a speed row, on four nodes; returns Snakemake's output."""
    code, output = runs.run(runs.configure("cluster", ROWS, [SPEED]))
    assert code == 0, output[-8000:]
    return output


def test_a_row_of_each_method_runs_on_the_cluster(runs, through_slurm):
    assert set(runs.report("cluster")) == set(ROWS)
    assert (runs.folder / "results/cluster/speed" / SPEED / "manifest.json").is_file()


def test_local_and_cluster_give_the_same_bytes(runs, through_slurm):
    code, output = runs.run(runs.configure("local", ROWS), profile="profiles/demo")
    assert code == 0, output[-8000:]
    for row in ROWS:
        assert runs.result("cluster", row) == runs.result("local", row)
    assert runs.report("cluster") == runs.report("local")
