"""Longer proofs, run by `make verify-slurm`: each fault alone, the demo on four machines, 1,000 rows; figures are printed."""

from __future__ import annotations

import json
import re
import signal
import statistics
import time

import psutil
import pytest
from cluster_run import EPOCHS, METHODS, ROW, ROWS, SITE, Runs, assert_complete, epochs_of, job_of, submissions
from small_run import edit, read

pytestmark = pytest.mark.verify


def start_training(runs, until, name: str, method: str = "lora", epochs: float = EPOCHS, **values):
    """(Snakemake, row) with a few steps of the row's training done."""
    row = ROW[method]
    snakemake = runs.start(runs.configure(name, [row], epochs=epochs, **{"save_minutes": 0.02, **values}))
    until(
        "training", lambda: runs.steps(name, row) >= 3 or snakemake.process.poll() is not None, seconds=400
    )  # fmt: skip
    assert snakemake.process.poll() is None, snakemake.output[-6000:]
    return snakemake, row


def finish(snakemake) -> str:
    code = snakemake.finish()
    assert code == 0, snakemake.output[-8000:]
    return snakemake.output


def test_out_of_time_equals_one_long_job(runs, undisturbed):
    """Several jobs of two minutes each end with the weights of one that was never interrupted."""
    epochs, row = epochs_of(runs, 150), ROW["full"]
    target = "results/{}/train/" + row + "/manifest.json"
    code, output = runs.run(
        runs.configure("long", [row], epochs=epochs), target.format("long"), profile="profiles/demo"
    )
    assert code == 0, output[-4000:]
    runs.site({**SITE, "leave_seconds": 20, "partitions": {"cpu": {"partition": "short", "max_runtime": 2}}})
    try:
        code, output = runs.run(runs.configure("pieces", [row], epochs=epochs, save_minutes=0), target.format("pieces"))
    finally:
        runs.site(SITE)
    assert code == 0, output[-8000:]
    assert submissions(output, row) > 1
    print(f"\nout of time: {3 * epochs} steps over {submissions(output, row)} jobs of two minutes, the same weights")
    assert runs.result("pieces", row) == runs.result("long", row)


def test_a_machine_that_loses_power(runs, cluster, until, undisturbed):
    """No signal, no save: SLURM finds the machine gone, requeues the job, and it goes on from the last checkpoint."""
    snakemake, row = start_training(runs, until, "power")
    job, node = job_of(cluster, row)
    cluster.kill(node)
    until("SLURM notices", lambda: cluster.jobs()[job] == "PENDING", seconds=240)
    cluster.out("scontrol", "update", f"JobId={job}", "StartTime=now")
    output = finish(snakemake)
    cluster.start_node(node)
    cluster.out("scontrol", "update", f"NodeName={node}", "State=RESUME")
    assert submissions(output, row) == 1
    assert_complete(runs, "power", [row])


def test_preempted_by_a_higher_partition(runs, cluster, until, undisturbed):
    """A signal and a minute of grace: the job saves and leaves, and the next one goes on when the other is done."""
    runs.site({**SITE, "partitions": {"cpu": {"partition": "spot", "max_runtime": 240}}})
    other = ["-p", "urgent", "-A", "research", "--exclusive", "--mem=500000", "-o", "/dev/null", "--wrap", "sleep 20"]
    try:
        snakemake, row = start_training(runs, until, "preempted", save_minutes=0)
        cluster.out("sbatch", *other)
        output = finish(snakemake)
    finally:
        runs.site(SITE)
    assert re.search(r"SIG(TERM|USR1): saved at step", output)
    assert submissions(output, row) == 2
    assert_complete(runs, "preempted", [row])


@pytest.mark.parametrize("command", [["scancel"], ["scontrol", "requeue"]], ids=["scancel", "requeue"])
def test_ended_from_outside_saves_first(runs, cluster, until, undisturbed, command):
    """SIGTERM and half a minute: without any regular checkpoint, the next start goes on where this one was."""
    name = command[-1]
    snakemake, row = start_training(runs, until, name, "full", save_minutes=0)
    job, _ = job_of(cluster, row)
    cluster.out(*command, job)
    if name == "requeue":
        until("the job waits", lambda: cluster.jobs()[job] == "PENDING")
        cluster.out("scontrol", "update", f"JobId={job}", "StartTime=now")
    output = finish(snakemake)
    assert submissions(output, row) == (2 if name == "scancel" else 1)
    said = (runs.folder / f"results/{name}/logs/train/{row}.log").read_text()
    assert re.search(r"checkpoint-\d+: resuming from here", said)
    assert_complete(runs, name, [row])


def test_the_controller_restarts(runs, cluster, until, undisturbed):
    """Killed while a job trains, away for a minute: nothing is submitted twice, nothing is lost."""
    snakemake, row = start_training(runs, until, "controller", epochs=EPOCHS)
    cluster.kill("slurmctld")
    time.sleep(60)
    cluster.start_controller()
    output = finish(snakemake)
    assert submissions(output, row) == 1
    assert_complete(runs, "controller", [row])


def test_scratch_and_a_full_one(runs, cluster, tmp_path, undisturbed):
    """Data is copied to the machine's own disk; where it does not fit, the row says so and reads the shared folder."""
    row, small = ROW["lora"], tmp_path / "small"
    small.mkdir()
    cluster.on("node[1-4]", "mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small))
    try:
        for name, scratch in (("scratch", tmp_path / "large"), ("full", small)):
            runs.site({**SITE, "scratch": str(scratch), "cache": f"{tmp_path}/cache/$USER", "offline": True})
            code, output = runs.run(runs.configure(name, [row], epochs=EPOCHS))
            assert code == 0, output[-8000:]
            assert_complete(runs, name, [row])
            said = (runs.folder / f"results/{name}/logs/train/{row}.log").read_text()
            assert ("disk full?" in said) == (name == "full")
        assert list((tmp_path / "large").glob("phi3v-0/docvqa-*/images"))
    finally:
        runs.site(SITE)


@pytest.fixture
def every_dataset(cluster, root, tmp_path) -> Runs:
    """A copy of its own, with some examples of every dataset of the demo and a tokenizer that knows their words."""
    runs = Runs(root, tmp_path / "repository")
    demo = runs.folder / "config/demo"
    few = {"docvqa_mini_train": 64, "hateful_memes": 88, "nlvr2": 88, "ucf101_train": 7, "ucf101_val": 2}
    texts = read(root / "config/demo/sources.yaml")["texts"]
    edit(demo / "sources.yaml", lambda values: values.update(sizes=values["sizes"] | few, texts=texts))

    def split(values):
        for name in ("hateful_memes", "nlvr2"):
            values[name]["splits"]["train"]["rows"], values[name]["splits"]["val"]["rows"] = "24:", "0:24"

    edit(demo / "datasets.yaml", split)
    return runs


def test_demo_on_four_machines_is_the_local_demo(every_dataset):
    """All rows of `make demo`, on few examples: every number of the accuracy table is the same, and every speed row is timed."""
    runs = every_dataset
    rows = read(runs.folder / "config/demo.yaml")["rows"]
    assert {row.split("-")[1] for row in rows["accuracy"]} == set(
        read(runs.folder / "config/demo/sources.yaml")["texts"]
    ) - {"mixture"}
    overrides = {"*-ucf101-*": {"num_crops": 1}, "*-flash-*": {"flash_attention": True}}
    config = runs.configure("demo4", rows["accuracy"], rows["speed"], overrides=overrides)
    started = time.monotonic()
    code, output = runs.run(config, seconds=2700)
    assert code == 0, output[-8000:]
    print(f"\n{sum(map(len, rows.values()))} rows of the demo through SLURM: {time.monotonic() - started:.0f} s")
    config = runs.configure("demo1", rows["accuracy"], overrides=overrides)
    code, output = runs.run(config, profile="profiles/demo", seconds=2700)
    assert code == 0, output[-8000:]
    assert set(runs.report("demo4")) == set(rows["accuracy"])
    assert runs.report("demo4") == runs.report("demo1")
    for row in rows["accuracy"]:
        assert runs.result("demo4", row) == runs.result("demo1", row)
    for row in rows["speed"]:
        timed = json.loads((runs.folder / f"results/demo4/speed/{row}/speed.json").read_text())
        assert timed["images_per_second"] > 0
        assert (runs.folder / f"results/demo4/speed/{row}/manifest.json").is_file()


def test_what_a_job_costs_besides_its_work(runs, cluster, undisturbed):
    """Seconds of a SLURM job around the command of its rule, which is the job's last step."""
    code, output = runs.run(runs.configure("overhead", [ROW[method] for method in METHODS]), "--jobs", "1")
    assert code == 0, output[-4000:]
    beyond = []
    for line in cluster.out("squeue", "-h", "--states=COMPLETED", "-o", "%i|%k").splitlines():
        job, comment = line.split("|")
        if f"jobid {job} " in output and comment.removeprefix("rule_finetune_wildcards_") in ROWS:
            steps = cluster.out("sacct", "-n", "-P", "-j", job, "-o", "JobID,ElapsedRaw").splitlines()
            seconds = {name.partition(".")[2]: int(elapsed) for name, elapsed in (step.split("|") for step in steps)}
            last = max((step for step in seconds if step.isdigit()), key=int)
            beyond.append(seconds[""] - seconds[last])
    assert len(beyond) == len(METHODS)
    print(f"\na job besides its command: {statistics.median(beyond):.1f} s (median of {len(beyond)})")


def test_a_thousand_rows(runs, cluster):
    """Dry run, submission and memory of a run of 1,000 training jobs; the machines take none of them."""
    seeds = list(range(250))
    config = runs.configure("thousand", ROWS, epochs=1, overrides={"phi35-docvqa-*": {"seeds": seeds}})
    code, output = runs.run(config, "data", profile="profiles/demo")
    assert code == 0, output[-4000:]
    started = time.monotonic()
    code, output = runs.run(config, "-n", "-q")
    planned = time.monotonic() - started
    assert code == 0, output[-4000:]
    cluster.out("scontrol", "update", "NodeName=node[1-4]", "State=DRAIN", "Reason=test")
    try:
        started = time.monotonic()
        snakemake = runs.start(config, "--jobs", "1000")
        watched, largest, first, waiting = psutil.Process(snakemake.process.pid), 0, 0.0, 0
        while waiting < 1000 and time.monotonic() - started < 300 and snakemake.process.poll() is None:
            waiting = snakemake.output.count("has been submitted with SLURM jobid")
            first = first or (time.monotonic() if waiting else 0.0)
            largest = max(largest, watched.memory_info().rss)
            time.sleep(0.2)
        took = time.monotonic() - first
        snakemake.process.send_signal(signal.SIGINT)
        snakemake.finish(120)
    finally:
        cluster.out("scontrol", "update", "NodeName=node[1-4]", "State=RESUME")
    print(
        f"\n1,000 training jobs: dry run {planned:.1f} s; {waiting} submitted in {took:.1f} s, {waiting / took:.0f} a second; "
        f"Snakemake {largest / 2**20:.0f} MiB"
    )
    assert waiting == 1000
    assert planned < 10
    assert not re.search(r"PENDING|RUNNING", " ".join(cluster.jobs().values()))
