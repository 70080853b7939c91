"""What a cluster does to jobs: each run ends with a complete report and the bytes of a run that nothing happened to."""

from __future__ import annotations

import re
import signal

import pytest
from cluster_run import EPOCHS, METHODS, ROW, ROWS, SITE, assert_complete, epochs_of, job_of, submissions, workers

SPEED = "phi3-a100-full-eager-8gpu"


@pytest.mark.verify
def test_cancelled_killed_requeued_and_a_machine_down(runs, cluster, until, undisturbed):
    """A row of each method, each with a fault of its own, and a speed row, in one run."""
    snakemake = runs.start(runs.configure("faults", ROWS, [SPEED], epochs=EPOCHS, save_minutes=0.02), "--jobs", "6")
    faults = {
        "full": lambda job: cluster.out("scancel", job),
        # The first rank holds the lock of the row's folder, and takes it along.
        "frozen": lambda _: workers(f"faults/train/{ROW['frozen']}")[0].send_signal(signal.SIGKILL),
        "lora": lambda job: cluster.out("scontrol", "requeue", job),
        # Its node may have other rows' jobs, so it goes last; until then this row must not finish.
        "qlora": lambda _: [worker.suspend() for worker in workers(f"faults/train/{ROW['qlora']}")],
    }
    jobs, node = {}, {}

    def all_struck() -> bool:
        """Whether each row has met its fault, which comes soon after its training began."""
        assert snakemake.process.poll() is None, snakemake.output[-6000:]
        for method in faults.keys() - jobs.keys():
            if runs.steps("faults", ROW[method]) >= 2 and workers(f"faults/train/{ROW[method]}"):
                jobs[method], node[method] = job_of(cluster, ROW[method])
                faults[method](jobs[method])
        return len(jobs) == len(faults)

    until("every row trains and meets its fault", all_struck)
    first_log = runs.folder / f"results/faults/logs/train/{ROW['frozen']}.1.log"
    until("the killed row is tried again", first_log.exists)
    cluster.lose(node["qlora"])
    for method in ("qlora", "lora"):
        until(f"the first start of {method} has ended", lambda job=jobs[method]: cluster.restarts(job))
    # SLURM holds jobs that it put back for two minutes.
    cluster.release()
    code = snakemake.finish(600)
    cluster.start_node(node["qlora"])
    assert code == 0, snakemake.output[-8000:]
    assert_complete(runs, "faults", ROWS)
    assert (runs.folder / "results/faults/speed" / SPEED / "manifest.json").is_file()
    # The rank that went first is named.
    assert re.search(r"Root Cause \(first observed failure\):[\s\S]*?rank +: 0 [\s\S]*?SIGKILL", first_log.read_text())
    # Only what failed was submitted again; a requeued job keeps its number.
    submitted = {method: submissions(snakemake.output, ROW[method]) for method in METHODS}
    assert submitted == {"full": 2, "frozen": 2, "lora": 1, "qlora": 1}


@pytest.mark.verify
def test_a_job_that_is_out_of_time_goes_on_in_the_next(runs, undisturbed):
    """A partition of two minutes: SIGUSR1 before their end (SLURM sends it up to a minute early), save, leave, go on."""
    runs.site({**SITE, "leave_seconds": 20, "partitions": {"cpu": {"partition": "short", "max_runtime": 2}}})
    epochs = epochs_of(runs, 120)
    try:
        config = runs.configure("limited", [ROW["lora"]], epochs=epochs, save_minutes=0)
        code, output = runs.run(config, f"results/limited/train/{ROW['lora']}/manifest.json")
    finally:
        runs.site(SITE)
    assert code == 0, output[-8000:]
    assert "SIGUSR1: saved at step" in output
    assert runs.step_numbers("limited", ROW["lora"]) == list(range(1, 3 * epochs + 1))
    assert submissions(output, ROW["lora"]) > 1


@pytest.mark.verify
def test_snakemake_killed_and_started_again(runs, cluster, until, undisturbed):
    """Its job continues; a second Snakemake takes it over, and nothing is trained twice."""
    epochs = epochs_of(runs, 40)
    config = runs.configure("killed", [ROW["lora"]], epochs=epochs)
    snakemake = runs.start(config)
    until("training", lambda: runs.steps("killed", ROW["lora"]) >= 1)
    snakemake.kill()
    job, _ = job_of(cluster, ROW["lora"])
    code, shown = runs.look("status", "--config", config)
    assert re.search(rf"{ROW['lora']} +training +{job} +node\d +\d+/{3 * epochs} +\d", shown), shown
    assert runs.run(config, "--unlock")[0] == 0
    code, output = runs.run(config)
    assert code == 0, output[-8000:]
    assert f"rule_finetune_wildcards_{ROW['lora']}: job {job} still runs or waits and is taken over" in output
    assert re.findall(r"has been submitted with SLURM jobid (\d+) \(log: \S*/rule_finetune/", output) == [job]
    assert runs.step_numbers("killed", ROW["lora"]) == list(range(1, 3 * epochs + 1))
    assert set(runs.report("killed")) == {ROW["lora"]}


@pytest.mark.verify
def test_a_row_that_does_not_get_on_ends_and_the_same_command_continues(runs, undisturbed):
    """A training job that always fails at the same place ends after its second attempt; once repaired, it is trained."""
    failing, other = ROW["lora"], ROW["full"]
    config = runs.configure("stuck", [failing, other], epochs=EPOCHS)
    folder = runs.train("stuck", failing)
    folder.mkdir(parents=True)
    # A file where training wants a folder.
    (folder / "checkpoints").write_text("")
    code, output = runs.run(config)
    assert code != 0
    assert submissions(output, failing) == 2
    assert f"{failing}: attempt 2 saved no more than the one before, so it is not tried again" in output
    assert (runs.folder / "results/stuck/report-partial/index.html").is_file()
    assert (runs.folder / f"results/stuck/evaluate/{other}/manifest.json").is_file()
    (folder / "checkpoints").unlink()
    code, output = runs.run(config)
    assert code == 0, output[-8000:]
    assert (submissions(output, failing), submissions(output, other)) == (1, 0)
    assert_complete(runs, "stuck", [failing, other])
