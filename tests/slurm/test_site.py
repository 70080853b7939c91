"""A site file against the cluster: written from it, accepted, and refused with the reason where it is wrong."""

from __future__ import annotations

import copy
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
    assert "exists and was left as it is" in output


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


def site(**changes: Any) -> dict[str, Any]:
    """The right site file with fields of the GPU partition (or, with `_`, of the file) changed."""
    values = copy.deepcopy(SITE)
    for name, value in changes.items():
        (values if name.endswith("_") else values["partitions"]["a100-80gb"])[name.rstrip("_")] = value
    return values


@pytest.mark.parametrize(
    ("values", "per_node", "said"),
    [
        (site(partition="gpux"), 2, "partition 'gpux': not on this cluster; expected one of cpu, gpu,"),
        (site(account_="nobody"), 2, "field `account`: got 'nobody': not yours on this cluster; expected one of research"),
        (site(qos="fast"), 2, "field `qos`: got 'fast': not yours on this cluster; expected one of normal"),
        (site(max_runtime=100000), 2, "`partitions.a100-80gb.max_runtime`: got 100000: partition gpu ends jobs after 1440"),
        (site(partition="short"), 2, "partition short ends jobs after 2 min; set `partitions.a100-80gb.max_runtime: 2`"),
        (site(gpus_per_node=0), 16, "asks for 16 GPUs of a machine, partition gpu has 8"),
        (site(gpus_per_node=1), 2, "asks for 2 GPUs of a machine, partition gpu has 1"),
        (site(gpu_type="h100"), 2, "`partitions.a100-80gb.gpu_type`: got 'h100': GPU types of partition gpu: a100"),
        (site(constraint="nvlink"), 2, "got 'nvlink': no machine of partition gpu has it"),
        (site(max_runtime=3, leave_seconds_=600), 2, "field `leave_seconds`: got 600: partition gpu"),
        (site(cpus_per_gpu=16), 2, "asks for 32 CPUs of a machine, partition gpu has 8"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_the_check_and_by_the_dry_run(runs, look, values, per_node, said):
    pool = [{**GPU_POOL[0], "per_node": per_node}]
    # Sixteen processes need a batch that divides by them.
    config = runs.configure(
        "wrong", [], ["phi3-a100-full-eager-8gpu"], hardware=pool, overrides={"*": {"micro_batch_size": 1}}
    )
    runs.site(values)
    code, output = look("check", "--no-probe", "--config", config)
    assert code == 1
    assert said in output
    code, output = runs.run(config, "-n")
    assert code != 0
    assert said in output
    assert "nothing was started" in output


def test_a_wrong_field_of_the_site_file_is_named(runs, look):
    runs.site({"partitions": {"cpu": {"partition": "cpu; rm"}}, "acount": "research"})
    code, output = look("check", "--no-probe")
    assert code == 2
    assert "config/site.yaml: field `acount`: got 'research': unknown field" in output
    assert "config/site.yaml: field `partitions.cpu.partition`: got 'cpu; rm'" in output
