"""A run through `snakemake --profile slurm` on the test cluster, beside the same one on this machine."""

from __future__ import annotations

from small_run import EPOCHS, ROWS, assert_complete

SPEED = "phi3-a100-full-eager-8gpu"


def test_a_row_of_each_method_runs_on_the_cluster_as_it_does_here(runs, undisturbed):
    """Weights, answers and every number of the report; a speed row besides."""
    code, output = runs.run(runs.configure("cluster", ROWS, [SPEED], epochs=EPOCHS))
    assert code == 0, output[-8000:]
    assert_complete(runs, "cluster", ROWS)
    assert runs.report("cluster") == runs.report("undisturbed")
    assert (runs.folder / "results/cluster/speed" / SPEED / "manifest.json").is_file()
