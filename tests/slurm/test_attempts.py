"""Which failed jobs are tried again, and where; a shell script stands in for the work, so the jobs are short."""

from __future__ import annotations

import re
import sys

import pytest
import yaml
from cluster_run import METHODS, ROW, ROWS, Runs, job_of, submissions

from phi3v.settings import load_run

LAUNCHER = """\
#!/bin/bash
set -eu; previous=
for word; do case $previous in --output_dir) output=$word ;; esac; previous=$word; done
mkdir -p "$output/final"
echo "attempt on $(hostname)"
{work}
echo '{{}}' >"$output/manifest.json"
"""
LOCK = f"""{sys.executable} - "$output" <<END
import sys
from pathlib import Path
from phi3v.training.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), lambda text: print(text, flush=True))
lock.acquire()
END"""
# Nine steps, each with its checkpoint; after the second it waits for the test.
STEPS = (
    LOCK.removesuffix("END")
    + """
import time
saved = Path(sys.argv[1], "checkpoints")
for step in range(1 + len(list(saved.glob("checkpoint-*"))), 10):
    while step == 3 and not Path("continue").exists():
        time.sleep(0.2)
    with Path(sys.argv[1], "steps").open("a") as steps:
        print(step, file=steps)
    (saved / f"checkpoint-{step}").mkdir(parents=True)
END"""
)


class Stubbed(Runs):
    """Runs whose datasets and models are there already, without contents, and whose launcher is a shell script."""

    def configure(self, name: str, rows: list[str], *arguments, **values) -> str:
        config = super().configure(name, rows, *arguments, **values)
        run = load_run(yaml.safe_load((self.folder / config).read_text()))
        for job in run.accuracy:
            for path in (
                f"{run.data_folder(job.row.dataset)}/dataset.json",
                f"{run.model_folder(job.row.model)}/sources.lock.json",
            ):
                (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / path).write_text('{"splits": {"train": {"examples": 192}, "val": {"examples": 24}}}')
        self.baseline = run.accuracy[0].baseline
        return config

    def work(self, text: str) -> None:
        """What each job does instead of its command; $output: its folder."""
        launcher = self.folder / "scripts/torchrun_nodes.sh"
        launcher.write_text(LAUNCHER.format(work=text))

    def log(self, name: str) -> str:
        return (self.folder / "results/short/logs" / name).read_text()


@pytest.fixture
def stubbed(cluster, root, tmp_path, monkeypatch) -> Stubbed:
    runs = Stubbed(root, tmp_path / "repository")
    monkeypatch.chdir(runs.folder)
    return runs


def test_a_row_leaves_a_node_whose_disk_is_full(stubbed, cluster, until, tmp_path, monkeypatch):
    """A job starts without a free byte in TMPDIR, its log has the reason, and the next attempt goes elsewhere."""
    row, disk = ROW["lora"], tmp_path / "tmp"
    disk.mkdir()
    cluster.on("node1", "mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk))
    cluster.on("node1", "sh", "-c", f"head -c 4096 /dev/zero >{disk}/full")
    monkeypatch.setenv("TMPDIR", str(disk))
    stubbed.work(f"head -c 4096 /dev/zero >{disk}/probe.$$")
    cluster.out("scontrol", "update", "NodeName=node[2-4]", "State=DRAIN", "Reason=test")
    try:
        snakemake = stubbed.start(stubbed.configure("short", [row]), f"results/short/train/{row}/manifest.json")
        until("the first attempt", lambda: "node1" in cluster.out("squeue", "-h", "-t", "R", "-o", "%N"))
    finally:
        cluster.out("scontrol", "update", "NodeName=node[2-4]", "State=RESUME")
    assert snakemake.finish(300) == 0, snakemake.output[-6000:]
    assert submissions(snakemake.output, row) == 2
    assert "attempt on node1\n" in stubbed.log(f"train/{row}.1.log")
    assert "No space left on device" in stubbed.log(f"train/{row}.1.log")
    assert re.search(r"attempt on node[2-4]\n", stubbed.log(f"train/{row}.log"))
    cluster.on("node1", "umount", str(disk))


def test_each_fault_is_answered_in_its_own_way(stubbed, cluster, until):
    """In one run: scancel, SIGKILL, a requeue, a machine without power, and a row whose folder another job owns."""
    owned = f"{ROW['full']}-seed1"
    rows = [*ROWS, owned]
    folders = {row: stubbed.folder / "results/short/train" / row for row in rows}
    # A lock that is not released: the job goes on.
    hold = f"output={folders[owned]}; mkdir -p $output; export PYTHONPATH={stubbed.folder}/src; {LOCK}\nsleep 600"
    # Alone on its node, which therefore is not the one that loses power.
    options = ["--parsable", "--mem=100", "--nodelist=node4", "--exclusive", "--output=/dev/null"]
    holder = cluster.out("sbatch", *options, f"--wrap={hold}").strip()
    until("the lock", (folders[owned] / ".lock.json").exists)
    stubbed.work(STEPS)
    targets = [f"results/short/train/{row}/manifest.json" for row in rows]
    config = stubbed.configure("short", ROWS, overrides={ROW["full"]: {"seeds": [42, 1]}})
    # The refused row may be tried again once, and is refused twice.
    snakemake = stubbed.start(config, "--jobs", "6", "--retries", "1", *targets)
    until(
        "all of them are under way",
        lambda: (
            all((folders[row] / "checkpoints/checkpoint-2").exists() for row in ROWS)
            and "another job owns it" in snakemake.output
        ),
    )
    jobs = {method: job_of(cluster, ROW[method]) for method in METHODS}
    assert f"owned by job {holder}, pid" in stubbed.log(f"train/{owned}.log")
    cluster.out("scancel", jobs["full"][0])
    cluster.out("scancel", "--signal=KILL", "--full", jobs["frozen"][0])
    cluster.out("scontrol", "requeue", jobs["lora"][0])
    down = jobs["qlora"][1]
    cluster.lose(down)
    for method in ("qlora", "lora"):
        until(f"the first start of {method} has ended", lambda job=jobs[method][0]: cluster.restarts(job))
    (stubbed.folder / "continue").touch()
    until("the refused row waits", lambda: submissions(snakemake.output, owned) == 2)
    cluster.release()
    until("it is refused again", lambda: snakemake.output.count("another job owns it") == 2)
    cluster.out("scancel", "--signal=KILL", "--full", holder)
    until("the holder ends", lambda: cluster.jobs()[holder] not in ("RUNNING", "COMPLETING"))
    until("it waits again", lambda: submissions(snakemake.output, owned) == 3)
    cluster.release()
    code = snakemake.finish(300)
    cluster.start_node(down)
    assert code == 0, snakemake.output[-6000:]
    # A requeued job keeps its number.
    submitted = {method: submissions(snakemake.output, ROW[method]) for method in METHODS}
    assert submitted == {"full": 2, "frozen": 2, "lora": 1, "qlora": 1}
    for row in ROWS:
        # From the last checkpoint, not from the start.
        assert [*map(int, (folders[row] / "steps").read_text().split())] == [*range(1, 10)]
    assert "SLURM reports its job as" in stubbed.log(f"train/{owned}.log")


@pytest.mark.verify
def test_an_evaluation_goes_on_while_each_attempt_answers_more(stubbed, cluster):
    config = stubbed.configure("short", [ROW["lora"]])
    done = f"evaluate/base/{stubbed.baseline}"
    target = f"results/short/{done}/manifest.json"
    stubbed.work("""
mkdir -p "$output/before/partial"
echo '{}' >>"$output/before/partial/x.0.jsonl"
wc -l <"$output/before/partial/x.0.jsonl"
[ "$(wc -l <"$output/before/partial/x.0.jsonl")" -ge 4 ]
touch "$output/before/predictions.jsonl" "$output/before/metrics.json"
""")
    code, output = stubbed.run(config, target)
    assert code == 0, output[-6000:]
    assert [stubbed.log(f"{done}{number}.log").split()[-1] for number in (".1", ".2", ".3", "")] == list("1234")


@pytest.mark.verify
def test_an_evaluation_that_answers_nothing_more_ends(stubbed, cluster):
    config = stubbed.configure("short", [ROW["lora"]])
    stubbed.work("exit 1")
    code, output = stubbed.run(config, f"results/short/evaluate/base/{stubbed.baseline}/manifest.json")
    assert code != 0
    assert output.count("has been submitted with SLURM jobid") == 2
    assert "attempt 2 saved no more than the one before" in output
