"""A site file against the cluster: written from it, accepted, and refused with the reason where it is wrong."""

from __future__ import annotations

import copy
import re
import signal
import subprocess
import sys
from typing import Any

import pytest
import yaml
from cluster_run import SITE, environment_of

GPU_POOL = [{"device": "a100-80gb", "per_node": 2, "nodes": 2, "stand_in": True}]


@pytest.fixture
def look(runs):
    """look(*arguments) → (exit code, output) of scripts/cluster.py; the site file is put back afterwards."""

    yield runs.look
    runs.site(SITE)


def test_a_first_site_file_is_one_that_the_check_accepts(runs, look):
    config = runs.configure("first", ["phi35-docvqa-lora-bf16"], hardware=GPU_POOL)
    (runs.folder / "config/site.yaml").unlink()
    code, output = look("site")
    assert code == 0, output
    written = yaml.safe_load((runs.folder / "config/site.yaml").read_text())
    # The user's default, not the first by alphabet (research).
    assert written["account"] == "root"
    assert written["partitions"]["cpu"]["partition"] == "cpu"
    assert written["partitions"]["a100-80gb"] == {
        "partition": "gpu", "gpus_per_node": 8, "gpu_type": "a100", "cpus_per_gpu": 1, "max_runtime": 1440
    }  # fmt: skip
    # With a probe job on a machine of each partition.
    code, output = look("check", "--config", config)
    assert code == 0, output
    assert " 0 errors" in output
    assert "there is no apptainer" in output
    code, output = look("site")
    assert code == 1
    assert "exists and was not changed" in output


SHOW = """
include: "Snakefile"

localrules: show_here

rule show_here:
    output: "{run}.here"
    shell: "env >{output}; type -P torchrun >>{output}"

rule show_job:
    output: "{run}.job"
    shell: "env >{output}; type -P torchrun >>{output}"
"""


def test_snakemake_inside_a_job_keeps_the_network_and_moves_the_caches(runs, look):
    """As the page recommends where login nodes end long processes: what is for jobs is for those that it submits."""
    config = runs.configure("inside", ["phi35-docvqa-lora-bf16"])
    (runs.folder / "Show").write_text(SHOW)
    runs.site({**SITE, "offline": True, "cache": f"{runs.folder}/cache", "env": {"NCCL_SOCKET_IFNAME": "hsn"}})
    command = [
        "srun", "--mem=1000", "--chdir", str(runs.folder), sys.executable, "-m", "snakemake", "-s", "Show", "--profile", "slurm",
        "--slurm-init-seconds-before-status-checks", "2", "--configfile", config, "--until", "show_here", "show_job", "--",
        "seen.here", "seen.job",
    ]  # fmt: skip
    # The tests themselves are offline.
    environment = {name: value for name, value in environment_of(runs.folder).items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    here, job = ((runs.folder / f"seen.{name}").read_text().splitlines() for name in ("here", "job"))
    for seen in (here, job):
        assert f"HF_HOME={runs.folder}/cache/huggingface" in seen
    of_jobs = {"HF_HUB_OFFLINE=1", "NCCL_SOCKET_IFNAME=hsn", f"{runs.folder}/scripts/slurm/torchrun"}
    assert of_jobs & {*here} == set()
    assert of_jobs - {*job} == set()


# Fields of a partition, and what `scontrol show job` reports of a job there.
FIELDS: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"partition": ""}, {"Partition": "cpu"}),
    ({"constraint": "80gb&ib"}, {"Partition": "gpu", "Features": "80gb&ib"}),
    ({"account": "root", "qos": "normal"}, {"Account": "root", "QOS": "normal"}),
    ({"max_runtime": 7}, {"TimeLimit": "00:07:00"}),
    ({"memory": "cpu"}, {"MinMemoryCPU": "1G"}),
    ({"memory": "none"}, {"MinMemoryNode": "0"}),
    ({"gpu_flag": "gpus-per-node"}, {"TresPerNode": "gres:gpu:a100:2"}),
    ({"gpu_type": ""}, {"TresPerNode": "gres:gpu:2"}),
    ({"cpus_per_gpu": 3}, {"CPUs/Task": "6"}),
    ({"extra": ["--exclusive", "--licenses=scratch:2"]}, {"OverSubscribe": "NO", "Licenses": "scratch:2"}),
]
ASKS = """
include: "Snakefile"

from phi3v.cluster.site import Partition
from phi3v.planning.resources import Resources as Wanted

WANTED = Wanted(runtime=30, mem_mb=2048, cpus=2, nodes=2, gres="gpu:2", partition="")

def of(entry):
    found = SITE.resources(entry, entry.fit(WANTED), is_row=True)
    return {{name: lambda wildcards, value=value: value for name, value in found.items()}}

for number, fields in enumerate({fields!r}):
    entry = Partition(**{{**{usual!r}, **fields, "extra": ["--hold", *fields.get("extra", [])]}})

    rule:
        name: f"asks{{number}}"
        output: f"asks/{{number}}"
        threads: entry.fit(WANTED).cpus
        resources: **of(entry)
        shell: "true"

rule of_a_row:
    output: "asks/{{row}}"
    threads: threads_of("train")
    resources: **resources_of("train")
    shell: "true"
"""


def test_each_field_of_a_partition_reaches_sbatch(runs, look, cluster, until):
    """Jobs are held, so that none has to run."""
    config = runs.configure("asks", ["phi35-docvqa-lora-bf16"], hardware=[{**GPU_POOL[0], "per_node": 1}])
    fields, usual = [changes for changes, _ in FIELDS], SITE["partitions"]["a100-80gb"]
    (runs.folder / "Asks").write_text(ASKS.format(fields=fields, usual=usual))
    runs.site(site(extra=["--hold", "--nice=7"]))
    targets = [f"asks/{name}" for name in [*range(len(FIELDS)), "phi35-docvqa-lora-bf16"]]
    snakemake = runs.start(config, "-s", "Asks", "--jobs", "20", *targets)
    names = [f"rule_asks{number}" for number in range(len(FIELDS))] + ["rule_of_a_row_wildcards_phi35-docvqa-lora-bf16"]
    jobs: dict[str, str] = {}

    def submitted() -> bool:
        assert snakemake.process.poll() is None, snakemake.output[-4000:]
        jobs.update(line.split()[::-1] for line in cluster.out("squeue", "-h", "-o", "%i %k").splitlines())
        return jobs.keys() >= {*names}

    try:
        until("the jobs are in the queue", submitted)
        shown = {name: cluster.out("scontrol", "-o", "show", "job", jobs[name]) for name in names}
    finally:
        snakemake.process.send_signal(signal.SIGINT)
        snakemake.finish(60)
    found = [dict(word.split("=", 1) for word in shown[name].split() if "=" in word) for name in names]
    assert [{key: job.get(key) for key in expected} for job, (_, expected) in zip(found, FIELDS, strict=False)] == [
        expected for _, expected in FIELDS
    ]
    # What the rules of a row ask for, in one.
    row = found[-1]
    assert (row["Partition"], row["Nice"], row["NumNodes"], row["TresPerNode"]) == (
        "gpu",
        "7",
        "2-2",
        "gres:gpu:a100:1",
    )
    # The executor would name the default partition for a job without one.
    lines: list[str] = []

    def recorded() -> bool:
        lines[:] = [cluster.out("sacct", "-nPX", "-j", jobs[name], "-o", "SubmitLine") for name in names]
        return all("sbatch" in line for line in lines)

    until("accounting has the jobs", recorded)
    assert [" -p " in line for line in lines] == [False] + [True] * (len(names) - 1)
    assert "--gpus-per-node=a100:2" in lines[6]


def site(**changes: Any) -> dict[str, Any]:
    """The right site file with fields of the GPU partition (or, with `_`, of the file) changed."""
    values = copy.deepcopy(SITE)
    for name, value in changes.items():
        (values if name.endswith("_") else values["partitions"]["a100-80gb"])[name.rstrip("_")] = value
    return values


# Fields of the site file, processes per machine, and what is reported.
WRONG: list[tuple[dict[str, Any], int, list[str]]] = [
    (
        site(
            account_="nobody", qos="fast", max_runtime=100000, gpus_per_node=1, gpu_type="h100", constraint="nvlink",
            cpus_per_gpu=16,
        ),
        2,
        [
            "field `account`: got 'nobody': you cannot use it on this cluster; expected one of research",
            "field `qos`: got 'fast': you cannot use it on this cluster; expected one of normal",
            "`partitions.a100-80gb.max_runtime`: got 100000: partition gpu ends jobs after 1440",
            "asks for 2 GPUs per machine, partition gpu has 1",
            "`partitions.a100-80gb.gpu_type`: got 'h100': expected a GPU type of partition gpu: a100",
            "got 'nvlink': no machine of partition gpu has it",
            "asks for 32 CPUs per machine, partition gpu has 8",
        ],
    ),
    (site(partition="gpux"), 2, ["partition 'gpux': not on this cluster; expected one of cpu, gpu,"]),
    (
        site(partition="short"),
        2,
        ["partition short ends jobs after 2 min; set `partitions.a100-80gb.max_runtime: 2`"],
    ),
    (
        site(gpus_per_node=0, max_runtime=3, leave_seconds_=600),
        16,
        ["asks for 16 GPUs per machine, partition gpu has 8", "field `leave_seconds`: got 600: partition gpu"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "per_node", "expected"), WRONG)
def test_what_does_not_fit_is_refused_by_the_check_and_by_the_dry_run(runs, look, values, per_node, expected):
    pool = [{**GPU_POOL[0], "per_node": per_node}]
    # Sixteen processes need a batch that divides by them.
    config = runs.configure(
        "wrong", [], ["phi3-a100-full-eager-8gpu"], hardware=pool, overrides={"*": {"micro_batch_size": 1}}
    )
    runs.site(values)
    code, output = look("check", "--no-probe", "--config", config)
    assert code == 1
    assert [text for text in expected if text not in output] == []
    code, output = runs.run(config, "-n")
    assert code != 0
    assert [text for text in expected if text not in output] == []
    assert "nothing was started" in output


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--set-resources", "finetune:slurm_extra=--nice=3"),
        ("--default-resources", "slurm_account='' slurm_extra=--nice=3"),
    ],
)
def test_an_extra_of_the_command_line_is_refused_with_the_field_to_use(runs, look, option, value):
    config = runs.configure("extra", [], ["phi3-a100-full-eager-8gpu"], hardware=GPU_POOL)
    code, output = runs.run(config, "-n", option, *value.split())
    assert code != 0
    assert "field `slurm_extra`: expected these flags as `extra` of the partition in config/site.yaml" in output
    assert "nothing was started" in output


def test_limits_of_accounting_are_read(runs, look, cluster):
    config = runs.configure("limits", [], ["phi3-a100-full-eager-8gpu"], hardware=GPU_POOL)
    where = ["user", "root", "where", "account=research", "set"]
    cluster.out("sacctmgr", "-i", "add", "qos", "tiny", "MaxTRESPerUser=cpu=1")
    cluster.out(
        "sacctmgr", "-i", "modify", *where, "MaxTRES=gres/gpu=1", "MaxWall=20", "MaxSubmitJobs=5", "qos=normal,tiny"
    )
    cluster.out(
        "sacctmgr", "-i", "modify", "account", "research", "set", "GrpTRES=cpu=1", "GrpTRESMins=cpu=3", "GrpWall=4"
    )
    try:
        runs.site(site(qos="tiny"))
        code, output = look("check", "--no-probe", "--config", config)
    finally:
        cluster.out(
            "sacctmgr", "-i", "modify", *where, "MaxTRES=gres/gpu=-1", "MaxWall=-1", "MaxSubmitJobs=-1", "qos=normal"
        )
        cluster.out(
            "sacctmgr",
            "-i",
            "modify",
            "account",
            "research",
            "set",
            "GrpTRES=cpu=-1",
            "GrpTRESMins=cpu=-1",
            "GrpWall=-1",
        )
    assert code == 1
    row = "error: row `phi3-a100-full-eager-8gpu` (speed): asks for"
    for said in (
        f"{row} gres/gpu=2, account research (MaxTRESPerJob: gres/gpu=1): such a job waits for ever",
        f"{row} cpu=2, QOS tiny (MaxTRESPerUser: cpu=1)",
        f"{row} cpu=2, account research (GrpTRES: cpu=1)",
        "account research (GrpTRESMins: cpu=3): such a job waits for ever",
        "account research (GrpWall: 4): such a job waits for ever",
        "account research (MaxWall: 20): such a job waits for ever; set `partitions.a100-80gb.max_runtime: 20`",
        "note: account research (MaxSubmitJobs): at most 5 of your jobs wait or run at a time",
    ):
        assert said in output, output
    runs.site(SITE)
    code, output = look("check", "--no-probe", "--config", config)
    assert (code, "waits for ever" in output) == (0, False), output


def test_a_wrong_field_of_the_site_file_is_named(runs, look):
    runs.site({"partitions": {"cpu": {"partition": "cpu; rm"}}, "acount": "research"})
    code, output = look("check", "--no-probe")
    assert code == 2
    assert "config/site.yaml: field `acount`: got 'research': unknown field" in output
    assert "config/site.yaml: field `partitions.cpu.partition`: got 'cpu; rm'" in output


def test_nodes_are_timed_together_as_a_row_would_start_there(runs, look):
    config = runs.configure("preflight", ["phi35-docvqa-lora-bf16"], hardware=GPU_POOL)
    runs.site(site(extra=["--nice=3"]) | {"env": {"NCCL_SOCKET_IFNAME": "hsn"}, "rendezvous": "lo"})
    code, output = look("check", "--config", config, "--nodes", "2", "--device", "a100-80gb")
    assert code == 0, output
    timed = re.search(r"all-reduce: 2 nodes x 2 processes, gloo on cpu: .* bus bandwidth ([\d.]+) GB/s", output)
    assert timed, output
    assert float(timed[1]) > 0
    assert re.search(r"all-reduce: node\d reaches 127.0.0.1 through lo \(127.0.0.1\)", output)
    assert re.search(r"partition gpu: on node\d, node\d there is no apptainer", output)
    # A name that no node resolves: the error of the processes is shown.
    runs.site(site() | {"rendezvous": "ib9"})
    code, output = look("check", "--config", config, "--nodes", "2", "--device", "a100-80gb")
    assert code == 1
    assert "all-reduce over 2 nodes failed: " in output
    assert "rendezvous: got ib9: no network interface of" in output
