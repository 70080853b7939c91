"""What is read out of SLURM's answers, and what is said about them; the same against a real SLURM is in tests/slurm."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from phi3v.cluster import check
from phi3v.cluster.ask import minutes
from phi3v.cluster.check import Request, problems
from phi3v.cluster.facts import Facts, PartitionFacts, devices_of, gpus, look, site_text
from phi3v.cluster.limits import Accounting, Limit, amount
from phi3v.cluster.probe import GPU_PROBE, probe
from phi3v.cluster.site import Partition, Site
from phi3v.cluster.status import COMMENT, nodes_to_avoid, progress
from phi3v.planning.resources import Resources
from phi3v.settings import Hardware, SettingsError, load_run, read_entries, validate

GPU = PartitionFacts("gpu", True, False, 1440, nodes=4, cpus=64, memory_mb=500_000, gpus={"a100": 8})
CPU = PartitionFacts("cpu", True, True, None, nodes=10, cpus=32, memory_mb=100_000)
FACTS = Facts({"gpu": GPU, "cpu": CPU}, frozenset({"vision"}), None, min_job_age=300)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30), ("30:59", 30), ("4:00:00", 240), ("1-00:00:00", 1440), ("2-12", 3600), ("7-01:30", 10170),
        ("infinite", None), ("UNLIMITED", None),
    ],
)  # fmt: skip
def test_times_as_slurm_writes_them(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("gpu:a100:8(S:0-1)", {"a100": 8}),
        ("gpu:4", {"": 4}),
        ("gpu:a100:2,gpu:t4:1,lustre:1", {"a100": 2, "t4": 1}),
        ("craynetwork:4,gpu:h100:4(S:0,2)", {"h100": 4}),
        ("(null)", {}),
    ],
)
def test_gpus_of_a_gres_string(gres, expected):
    assert gpus(gres) == expected


ANSWERS = {
    "scontrol": """case "$*" in
*config*) printf 'AccountingStorageEnforce = associations,limits,qos\\nMinJobAge = 300 sec\\n' ;;
*partition*) echo PartitionName=gpu AllowAccounts=ALL Default=YES MaxTime=1-00:00:00 State=UP QoS=N/A GraceTime=0 ;;
esac""",
    "sinfo": "echo 'gpu|4|64|500000|gpu:a100:8|80gb,nvlink'",
    "sacctmgr": "",
}


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """clients(sacctmgr="echo x", …): SLURM's commands as shell text; those not given answer as ANSWERS."""

    def write(**texts: str) -> None:
        for name, text in {**ANSWERS, **texts}.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return write


@pytest.mark.parametrize("closed", ["", "echo 'sacctmgr: error: Access/permission denied' >&2; exit 1"])
def test_accounting_that_users_may_not_read_forbids_nothing(clients, closed):
    clients(sacctmgr=closed)
    facts = look()
    assert (facts.accounts, facts.qos, facts.accounting.default_account) == (None, None, "")
    assert problems(Site(account="vision", qos="long"), facts, [request()]) == []


def test_a_first_site_file_names_the_users_default_account(clients, root):
    clients(
        sacctmgr="""case "$*" in *account=*) ;; *DefaultAccount*) echo vision ;;
*assoc*) printf 'alpha||normal|||||||||\\nvision||normal,long|||||||||\\n' ;; esac"""
    )
    facts = look()
    assert (facts.accounts, facts.qos) == ({"alpha", "vision"}, {"normal", "long"})
    text = site_text(facts, read_entries(["config/hardware.yaml"], Hardware, root))
    assert "account: vision  # or alpha\n" in text


SACCTMGR = """case "$*" in
*qos*MaxTRESPerAccount*) printf 'normal||||||||||||\\nlong|DenyOnLimit|1-00:00:00||gres/gpu=4|node=8||||6|gres/gpu=16||gres/gpu=1\\n' ;;
*account=*) printf 'vision|||||mem=4T,gres/gpu=64|||||2-00:00:00|cpu=9000\\nvision|ada|||||||||\\n' ;;
*assoc*) printf 'alpha|||normal||||||||\\nvision||normal,long|long|12:00:00|cpu=256||||||5\\n' ;;
*DefaultAccount*) echo vision ;;
esac"""


def test_limits_of_association_and_quality_of_service(clients):
    clients(sacctmgr=SACCTMGR)
    accounting = look().accounting
    assert accounting.allowed_qos["vision"] == ["long", "normal"]
    # The time of the quality of service goes before that of the association.
    assert [str(limit) for limit in accounting.of("", "", "gpu", "")] == [
        "QOS long (MaxWall: 1440)", "QOS long (MaxTRESPerNode: gres/gpu=4)", "QOS long (GrpTRES: node=8)",
        "QOS long (MaxSubmitJobsPerUser: 6)", "QOS long (MaxTRESPerUser: gres/gpu=16)",
        "QOS long (MinTRESPerJob: gres/gpu=1)", "account vision (MaxTRESPerJob: cpu=256)",
        "account vision (GrpTRES: mem=4194304)", "account vision (GrpTRES: gres/gpu=64)",
        "account vision (GrpWall: 2880)", "account vision (GrpTRESMins: cpu=9000)",
    ]  # fmt: skip
    assert str(accounting.of("vision", "normal", "gpu", "")[0]) == "account vision (MaxWall: 720)"
    assert accounting.of("alpha", "normal", "gpu", "") == []
    # A partition's own quality of service goes before the job's.
    assert accounting.of("alpha", "normal", "gpu", "long")[0].where == "QOS long"


@pytest.mark.parametrize(("flags", "first"), [("OverPartQOS", "QOS long"), ("DenyOnLimit", "QOS part")])
def test_a_quality_of_service_goes_before_that_of_its_partition_if_its_flag_says_so(clients, flags, first):
    clients(
        sacctmgr=f"""case "$*" in
*qos*) printf 'part||60|||||||||||\nlong|{flags}|90|||||||||||\n' ;;
*assoc*user=*) printf 'vision||long,part|long||||||||\n' ;;
esac"""
    )
    assert look().accounting.of("vision", "long", "gpu", "part")[0].where == first


@pytest.mark.parametrize(("text", "expected"), [("2", 2), ("500G", 512_000), ("1.5T", 1_572_864), ("2048M", 2048)])
def test_amounts_as_accounting_prints_them(text, expected):
    assert amount(text) == expected


@pytest.mark.parametrize(
    ("limit", "level", "said"),
    [
        (("MaxTRESPerUser", "gres/gpu", 7), "error", "asks for gres/gpu=8, QOS q (MaxTRESPerUser: gres/gpu=7): such a job waits"),
        (("MaxTRESPerUser", "gres/gpu", 8), None, ""),
        (("MaxTRESPerNode", "cpu", 32), "error", "asks for cpu=64, QOS q (MaxTRESPerNode: cpu=32)"),
        (("GrpTRES", "mem", 100), "error", "asks for mem=400000, QOS q (GrpTRES: mem=100)"),
        (("GrpTRES", "billing", 1), None, ""),
        (("MinTRESPerJob", "gres/gpu", 16), "error", "QOS q (MinTRESPerJob: gres/gpu=16): a job needs at least that"),
        (("MaxWall", "", 60), "error", "asks for 600 min, QOS q (MaxWall: 60): such a job waits for ever; set "
         "`partitions.a100-80gb.max_runtime: 60`, or another account or qos, in config/site.yaml"),
        (("MaxWall", "", 600), None, ""),
        (("GrpWall", "", 599), "error", "asks for 600 min, QOS q (GrpWall: 599): such a job waits for ever"),
        (("GrpTRESMins", "gres/gpu", 4799), "error", "asks for gres/gpu=4800, QOS q (GrpTRESMins: gres/gpu=4799)"),
        (("GrpTRESMins", "gres/gpu", 4800), None, ""),
        (("MaxJobsPerUser", "", 0), "error", "asks for a job, QOS q (MaxJobsPerUser: 0): no job may run"),
        (("MaxSubmitJobs", "", 2), "note", "QOS q (MaxSubmitJobs): at most 2 of your jobs wait or run at a time"),
    ],
)  # fmt: skip
def test_what_accounting_would_never_start_is_refused(limit, level, said):
    facts = replace(FACTS, accounting=Accounting({("", ""): [Limit("QOS q", *limit)]}))
    found = problems(Site(), facts, [request()])
    assert [problem.level for problem in found] == ([level] if level else [])
    assert all(said in problem.text for problem in found)


@pytest.mark.parametrize(
    ("constraint", "fits"),
    [("80gb", True), ("80gb&ib", True), ("40gb&ib", False), ("hdr", False), ("hdr|40gb", True), ("[hdr|ndr]", False),
     ("(80gb*2)&(40gb*2)", True)],
)  # fmt: skip
def test_a_constraint_names_features_of_one_kind_of_node(constraint, fits):
    gpu = replace(GPU, features=(frozenset({"80gb", "ib"}), frozenset({"40gb"})))
    site = Site(partitions={"a100-80gb": Partition(partition="gpu", constraint=constraint)})
    found = problems(site, replace(FACTS, partitions={"gpu": gpu}), [request()])
    reason = "no machine of partition gpu has it; features there: 40gb, 80gb, ib"
    refused = [] if fits else [f"field `partitions.a100-80gb.constraint`: got {constraint!r}: {reason}"]
    assert [problem.text for problem in found] == refused


def test_a_runtime_that_the_site_cuts_fits_a_shorter_limit():
    facts = replace(FACTS, accounting=Accounting({("", ""): [Limit("QOS q", "MaxWall", "", 60)]}))
    site = Site(partitions={"a100-80gb": Partition(partition="gpu", max_runtime=60)})
    assert problems(site, facts, [request()]) == []


def request(**changes) -> Request:
    values = {"what": "row `r` (train)", "device": "a100-80gb", "partition": "gpu", "nodes": 1, "gpus": 8, "cpus": 64}
    return Request(**{**values, "mem_mb": 400_000, "runtime": 600, **changes})


def test_what_is_asked_of_the_cpu_partition_covers_every_rule_without_a_rows_machines(root):
    run = load_run(root / "config/demo.yaml", root)
    common, base = [wanted for wanted in check.requests(run, Site()) if not wanted.what.startswith("row")]
    assert (common.cpus, base.cpus) == (4, run.demo.base.processes)
    for name, wanted in (("data", common), ("report", common), ("plan", common), ("demo", base)):
        text = (root / f"workflow/rules/{name}.smk").read_text()
        for field in ("mem_mb", "runtime"):
            asked = [int(value) for value in re.findall(rf"\bon_cpus\(.*\b{field}=(\d+)", text)]
            assert asked
            assert max(asked) <= getattr(wanted, field), (name, field)


def test_a_request_that_fits_has_no_problem():
    assert (
        problems(
            Site(account="vision"), FACTS, [request(), request(device="cpu", partition="", gpus=0, cpus=1, mem_mb=4000)]
        )
        == []
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": 16}, "asks for 16 GPUs per machine, partition gpu has 8"),
        ({"nodes": 5}, "asks for 5 machines, partition gpu has 4"),
        ({"mem_mb": 600_000}, "asks for 600000 MB of memory per machine, partition gpu has 500000"),
        ({"runtime": 3000}, "asks for 3000 min, partition gpu ends jobs after 1440 min; set `partitions.a100-80gb.max_runtime"),
        ({"partition": "gpux"}, "partition 'gpux': not on this cluster; expected one of gpu, cpu"),
    ],
)  # fmt: skip
def test_a_request_that_does_not_fit_says_why(changes, said):
    (found,) = problems(Site(), FACTS, [request(**changes)])
    assert found.level == "error"
    assert said in found.text


def test_many_rows_with_one_reason_are_one_line():
    (found,) = problems(Site(), FACTS, [request(what=f"row `r{n}` (train)", gpus=9) for n in range(50)])
    assert found.text == "row `r0` (train): asks for 9 GPUs per machine, partition gpu has 8 (and 49 more jobs)"


def test_preemption_by_cancelling_and_a_short_memory_are_worth_knowing():
    spot = PartitionFacts("spot", True, True, None, 1, 64, 500_000, {"a100": 8}, preempt_mode="CANCEL", grace_seconds=5)
    facts = Facts({"spot": spot}, None, None, min_job_age=2)
    levels = [(found.level, found.text.split(":")[0]) for found in problems(Site(), facts, [request(partition="spot")])]
    assert levels == [("warning", "partition spot"), ("warning", "MinJobAge is 2 s")]


def test_a_site_file_names_the_devices_of_its_gpus(root):
    hardware = read_entries(["config/hardware.yaml"], Hardware, root)
    assert devices_of("a100", hardware) == [
        "a100-80gb", "a100-40gb", "a100-64gb", "a100-80gb-pcie", "a100-40gb-pcie"
    ]  # fmt: skip
    assert devices_of("a100_40gb", hardware) == ["a100-40gb", "a100-40gb-pcie"]
    assert devices_of("nvidia_h100", hardware) == ["h100", "h100-pcie", "h100-nvl"]
    assert [devices_of(name, hardware) for name in ("a10", "l4", "l40")] == [["a10"], ["l4"], ["l40"]]
    assert devices_of("k80", hardware) == []
    text = site_text(FACTS, hardware)
    assert "account: vision\n" in text
    assert "  cpu: {partition: cpu}\n" in text
    assert "  a100-80gb: {partition: gpu, gpus_per_node: 8, gpu_type: a100, cpus_per_gpu: 8, max_runtime: 1440}" in text


def test_progress_of_a_training_folder(tmp_path):
    assert progress(tmp_path) is None
    (tmp_path / "settings.json").write_text(json.dumps({"max_steps": -1, "epochs": 2.0}))
    lines = [{"step": n, "epoch": n / 50, "loss": 1.0, "seconds": 2.0} for n in range(1, 31)]
    # The line that is being written.
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 31, "ep')
    at = progress(tmp_path)
    assert (at.step, at.steps, at.seconds_left) == (30, 100, 140.0)


def test_status_lists_the_rows_that_the_workflow_runs(root, tmp_path):
    """On one H100 all accuracy rows; squeue tells which of them has a job of this folder."""
    squeue = tmp_path / "squeue"
    line = f"12|RUNNING|{root}|1:30|node3|rule_finetune_wildcards_phi35-nlvr2-lora-bf16"
    squeue.write_text(f"#!/bin/sh\necho '{line}'\necho '13|RUNNING|/elsewhere|1:00|node4|rule_finetune_wildcards_x'\n")
    squeue.chmod(0o755)
    values = yaml.safe_load((root / "config/config.yaml").read_text())
    values |= {"name": "nowhere", "hardware": [{"device": "h100", "per_node": 1}]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    done = subprocess.run(
        [sys.executable, "scripts/cluster.py", "status", "--config", str(tmp_path / "run.yaml")], cwd=root,
        capture_output=True, text=True, check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(root / "src")},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[-1] == "37 open, 1 training"
    assert len(lines) == 1 + 38 + 1
    (running,) = [line.split() for line in lines if " training " in line and " 12 " in line]
    assert running == ["phi35-nlvr2-lora-bf16", "training", "12", "node3", "1:30"]


def cluster_command(root, folder, *arguments):
    """(exit code, stdout, stderr) of scripts/cluster.py with the programs of `folder` alone on PATH."""
    done = subprocess.run(
        [sys.executable, "scripts/cluster.py", *arguments], cwd=root, capture_output=True, text=True, check=False,
        env={"PATH": str(folder), "PYTHONPATH": str(root / "src")},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("controller", ["no SLURM", "away"])
def test_without_an_answer_of_slurm_the_rest_is_said_all_the_same(root, tmp_path, controller):
    said = "squeue was not found; expected SLURM's commands on PATH"
    if controller == "away":
        said = "Unable to contact slurm controller"
        for name in ("squeue", "scontrol"):
            (tmp_path / name).write_text(f"#!/bin/sh\necho 'slurm_load_jobs error: {said}' >&2\nexit 1\n")
            (tmp_path / name).chmod(0o755)
    values = yaml.safe_load((root / "config/config.yaml").read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, "name": "nowhere"}))
    config = ["--config", str(tmp_path / "run.yaml")]
    code, rows, error = cluster_command(root, tmp_path, "status", *config)
    assert (code, rows.splitlines()[-1]) == (0, "68 open")
    assert said in error
    code, rows, error = cluster_command(root, tmp_path, "wait")
    assert (code, rows, error.count("\n")) == (1, "", 1)
    assert error.startswith("error: squeue")
    assert said in error
    code, found, _ = cluster_command(root, tmp_path, "check", *config)
    assert code == 1
    assert "error: the cluster could not be checked: scontrol" in found
    assert "kinds of jobs checked: 1 error, " in found


def test_a_machine_of_a_partition_without_a_name_is_of_the_default_one(tmp_path, monkeypatch):
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\nprintf 'n7 shared yes\\nn7 apptainer none\\n'\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    texts = {
        name: [problem.text for problem in probe(Site(), Partition(partition=name), tmp_path)] for name in ("", "gpu")
    }
    assert any(text.startswith("the default partition: on n7 there is no apptainer") for text in texts[""])
    assert any(text.startswith("partition gpu: on n7 there is no apptainer") for text in texts["gpu"])


SRUN = """#!/bin/sh
# Runs the job here, on a machine of the partition that it was given.
echo "$@" | head -1 >> {folder}/asked
while [ "$1" != bash ]; do shift; done
exec "$@"
"""
PYTHON = """#!/bin/sh
[ "$1" = -c ] && case "$2" in *sys*) echo {version};; *torch*) printf '%s\\n' "{gpu}"; [ -n "{gpu}" ];; esac
"""


@pytest.mark.parametrize(
    ("gpu", "level", "text"),
    [
        ("yes", None, ""),
        ("no NVIDIA driver 570.86.15; CUDA 13.0, which needs driver 580", "error", "refused: NVIDIA driver 570.86.15"),
        ("cpu-build it is a CPU build", "warning", "driver 580 or newer: it is a CPU build"),
        ("", None, ""),  # no torch there: conda or Apptainer brings it
    ],
)
def test_the_probe_asks_for_a_gpu_and_what_training_would_say_of_it(tmp_path, monkeypatch, gpu, level, text):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name, content in (("srun", SRUN.format(folder=tmp_path)), ("python", PYTHON.format(version=version, gpu=gpu))):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    entry = Partition(partition="gpu", gpus_per_node=8, gpu_type="a100")
    found = [problem for problem in probe(Site(), entry, tmp_path) if "apptainer;" not in problem.text]
    assert [problem.level for problem in found] == ([level] if level else []), found
    assert all(text in problem.text for problem in found)
    probe(Site(), Partition(partition="cpu"), tmp_path)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert {"--gres=gpu:a100:1", "--mem=4000", "--nodes=1"} <= set(asked[0].split())
    assert not any("gres" in line for line in asked[1:] if "--partition=cpu" in line)


def test_the_probe_writes_to_the_folders_of_each_node(tmp_path, monkeypatch):
    """Two nodes, of which the second can write neither to TMPDIR nor to the home folder."""
    (tmp_path / "srun").write_text(
        """#!/bin/sh
while [ "$1" != bash ]; do shift; done
TMPDIR=$HERE HOME=$HERE "$@" | sed "s/^[^ ]*/n1/"
TMPDIR=/proc HOME=/proc "$@" | sed "s/^[^ ]*/n2/"
"""
    )
    (tmp_path / "python").write_text(
        PYTHON.format(version=f"{sys.version_info.major}.{sys.version_info.minor}", gpu="")
    )
    for name in ("srun", "python"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("HERE", str(tmp_path))

    def found(site: Site) -> list[str]:
        problems = probe(site, Partition(partition="gpu"), tmp_path, nodes=2)
        return [
            str(problem) for problem in problems if "apptainer" not in problem.text and " free; " not in problem.text
        ]

    where = "partition gpu: on n2 16 MB could not be written to"
    assert found(Site()) == [
        f"error: {where} {path} (full, over quota, or read-only)" for path in ("TMPDIR=/proc", "/proc")
    ]
    # The home folder may be read-only on nodes where the caches are elsewhere.
    assert [text for text in found(Site(cache=f"{tmp_path}/cache")) if "warning" in text] == [
        f"warning: {where} /proc (full, over quota, or read-only)"
    ]
    both = "partition gpu: on n1, n2"
    assert [text for text in found(Site(scratch="/proc/x", setup=["module use /nowhere"])) if "n1" in text] == [
        f"error: field `scratch`: got /proc/x: {both} 16 MB could not be written there",
        f"error: fields `setup` and `modules`: got module use /nowhere: {both} they end with an error",
    ]


def test_what_the_probe_runs_says_yes_or_why_training_is_refused(root):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root / "src")}
    pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, "-c", GPU_PROBE], capture_output=True, text=True, check=True, env=environment
    )
    assert re.match(r"yes$|no |cpu-build command line: field `expect_device`: got cuda", done.stdout)


def test_the_executors_comment_names_rule_and_row():
    found = COMMENT.match("rule_finetune_wildcards_phi35-docvqa-lora-bf16")
    assert (found["rule"], found["wildcards"]) == ("finetune", "phi35-docvqa-lora-bf16")
    found = COMMENT.match("rule_demo_base")
    assert (found["rule"], found["wildcards"]) == ("demo_base", None)


def test_the_example_site_file_and_those_of_centres_are_valid(root):
    text = (root / "config/site.example.yaml").read_text()
    assert "cpu" in validate(Site, yaml.safe_load(text), "site.example.yaml").partitions
    centres = re.findall(r"(?:^#   .*\n)+", text, re.M)
    assert len(centres) == 5
    hardware = read_entries(["config/hardware.yaml"], Hardware, root)
    for centre in centres:
        values = yaml.safe_load(re.sub(r"^#   ", "", centre, flags=re.M))
        assert validate(Site, values, "site.example.yaml").partitions.keys() <= hardware.keys() | {"cpu"}


def prologue(site: Site, then: str, **environment: str) -> tuple[int, str]:
    """(exit code, output) of a job's shell that goes on with `then`; `module` knows cuda alone."""
    text = f"""set -euo pipefail
module() {{ case "$*" in "load cuda/12.4"|"use "*) echo module "$@" "$UNSET"; export SET_BY=module ;; *) false ;; esac; }}
{site.prologue("/repo/scripts")} {then}"""
    done = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, env={"PATH": "/bin:/usr/bin", **environment}, check=False
    )
    return done.returncode, done.stdout


def test_what_is_set_up_in_front_of_a_jobs_command():
    site = Site(setup=["module use '/my modules'"], modules=["cuda/12.4"], env={"SET_BY": "the site's file"})
    code, output = prologue(site, 'echo "$SET_BY $PATH"')
    assert code == 0
    assert output.splitlines() == [
        "module use /my modules ", "module load cuda/12.4 ", "the site's file /repo/scripts/slurm:/bin:/usr/bin"
    ]  # fmt: skip
    assert prologue(Site(modules=["cuda/13"]), "echo went on") == (1, "")
    # The command of a rule in a container: modules are the node's.
    assert prologue(Site(modules=["cuda/13"]), "echo went on", APPTAINER_CONTAINER="x.sif") == (0, "went on\n")


def test_caches_are_everywhere_and_the_rest_is_in_jobs(monkeypatch):
    for name in ("HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USER", "ada")
    site = Site(
        cache="/scratch/$USER/phi3v", scratch="${TMPDIR}/phi3v", offline=True, env={"NCCL_SOCKET_IFNAME": "hsn"}
    )
    login, job = site.environment(in_job=False), site.environment(in_job=True)
    assert login["HF_HOME"] == "/scratch/ada/phi3v/huggingface"
    assert login["APPTAINER_CACHEDIR"] == "/scratch/ada/phi3v/apptainer"
    # Logged in before the cache moved.
    assert login["HF_TOKEN_PATH"] == str(Path.home() / ".cache/huggingface/token")
    assert {name: job[name] for name in job.keys() - login.keys()} == {
        "PHI3V_SCRATCH": "/tmp/phi3v", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        "WANDB_MODE": "offline", "NCCL_SOCKET_IFNAME": "hsn",
    }  # fmt: skip
    # A job without USER in its environment.
    monkeypatch.delenv("USER")
    who = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    assert Site(scratch="/local/$USER").environment(in_job=True) == {"PHI3V_SCRATCH": f"/local/{who}"}
    with pytest.raises(SettingsError, match=r"field `cache`: got '/s/\$NOWHERE': expected variables .* NOWHERE is not"):
        Site(cache="/s/$NOWHERE").environment(in_job=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modules", ["cuda/12.4&reboot"]), ("modules", ["cuda|tee"]), ("modules", ["$(reboot)"]), ("modules", ["a b"]),
        ("modules", [""]), ("cache", "/scratch/$(reboot)"), ("cache", "/a;b"), ("scratch", "/a b"), ("scratch", '/a"b'),
    ],
)  # fmt: skip
def test_nothing_of_a_site_file_starts_a_command_of_its_own(field, value):
    with pytest.raises(SettingsError, match=f"field `{field}"):
        validate(Site, {field: value}, "site.yaml")
    validate(Site, {"modules": ["gcc/12.2.0+mpi"], "cache": "/scratch/${USER}/x", "scratch": "$TMPDIR"}, "site.yaml")


WANTED = Resources(runtime=600, mem_mb=80_001, cpus=16, nodes=2, gres="gpu:a100:4", partition="")
PLAIN = {
    "slurm_partition": None, "slurm_account": None, "qos": None, "constraint": None, "slurm_extra": "--signal=USR1@300",
    "runtime": 600, "mem_mb": 80_001, "mem_mb_per_cpu": None, "mpi": "", "nodes": 2, "tasks": 2, "tasks_per_gpu": 0,
    "gres": "gpu:a100:4",
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({}, {}),
        ({"partition": "gpu", "account": "x", "qos": "long"}, {"slurm_partition": "gpu", "slurm_account": "x", "qos": "long"}),
        ({"constraint": "a100&(hbm80|nvlink)"}, {"constraint": "a100&(hbm80|nvlink)"}),
        ({"memory": "cpu"}, {"mem_mb_per_cpu": 5001}),
        ({"memory": "none"}, {"mem_mb": 0}),
        ({"gpu_flag": "gpus-per-node"}, {"gres": "", "slurm_extra": "--gpus-per-node=a100:4 --signal=USR1@300"}),
        (
            {"extra": ["--exclusive", "--licenses=scratch:1,home", "--mail-user=a b@c"]},
            {"slurm_extra": "--exclusive --licenses=scratch:1,home '--mail-user=a b@c' --signal=USR1@300"},
        ),
    ],
)  # fmt: skip
def test_each_field_of_a_partition_is_a_resource_of_its_jobs(fields, changed):
    assert Site().resources(Partition(**fields), WANTED, is_row=True) == {**PLAIN, **changed}


def test_a_job_on_cpus_is_started_by_the_executor_and_gets_no_signal():
    cpu = replace(WANTED, gres="", nodes=1)
    found = Site(account="a").resources(Partition(partition="cpu", extra=["--hint=nomultithread"]), cpu, is_row=False)
    assert {name: value for name, value in found.items() if value is not None} == {
        "slurm_partition": "cpu", "slurm_account": "a", "slurm_extra": "--hint=nomultithread", "runtime": 600, "mem_mb": 80_001
    }  # fmt: skip


def test_what_a_job_asks_for_fits_the_partition():
    entry = Partition(max_runtime=120, gpu_type="h100", cpus_per_gpu=7)
    assert entry.fit(replace(WANTED, gres="gpu:4")) == replace(WANTED, runtime=120, gres="gpu:h100:4", cpus=28)
    assert entry.fit(replace(WANTED, gres="")) == replace(WANTED, runtime=120, gres="")


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--mem=5G", "expected no --mem here: the plan sets the memory, and `memory` how"),
        ("--part=gpu", "expected no --part here: set `partition`"),
        ("--signal=USR2@5", "set `leave_seconds`"),
        ("-p", "expected a long option"),
        ("exclusive", "expected a long option"),
        ("--comment=a", "Snakemake sets it"),
    ],
)
def test_an_option_of_sbatch_with_a_place_of_its_own_is_refused(flag, reason):
    with pytest.raises(SettingsError, match=r"field `partitions\.cpu\.extra\.0`") as caught:
        validate(Site, {"partitions": {"cpu": {"extra": [flag]}}}, "site.yaml")
    assert reason in str(caught.value)
    allowed = ["--mem-bind=local", "--exclusive", "--nodelist=node1", "--time-min=10", "--reservation=x"]
    validate(Site, {"partitions": {"cpu": {"extra": allowed}}}, "site.yaml")


AGENT = """case "$*" in *torch.distributed.run*) echo "$@" ;; *) exec {python} "$@" ;; esac"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "--node-rank=0 --master-addr=10.0.0.1"),
        ({"PHI3V_RENDEZVOUS": "{host}i.x"}, "--master-addr=n7i.x"),
        ({"PHI3V_RENDEZVOUS": "lo"}, "--master-addr=127.0.0.1"),
        ({"PHI3V_NUMA_BINDING": "node", "CUDA_VISIBLE_DEVICES": "0,1"}, "--numa-binding=node train.py"),
        ({"PHI3V_NUMA_BINDING": "node"}, " train.py"),
    ],
)
def test_the_launcher_takes_the_sites_address_and_affinity(root, clients, environment, expected):
    clients(
        srun='while [ "$1" != bash ]; do shift; done; SLURM_NODEID=0 SLURM_STEP_NODELIST=n7 exec "$@"',
        scontrol="case $2 in hostnames) echo n7 ;; node) echo 'NodeName=n7 NodeAddr=10.0.0.1 x' ;; esac",
        python=AGENT.format(python=sys.executable),
    )
    command = ["scripts/torchrun_nodes.sh", "2", "4", "train.py"]
    kept = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "5"}

    def launch(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=root, env={**kept, **more}, capture_output=True, text=True, check=False)

    assert expected in launch(**environment).stdout
    if "PHI3V_NUMA_BINDING" not in environment:
        assert "--numa-binding" not in launch(**environment).stdout
    refused = launch(PHI3V_RENDEZVOUS="ib7")
    assert refused.returncode == 2
    assert "rendezvous: got ib7: no network interface of" in refused.stderr


@pytest.mark.parametrize(
    ("node3", "node4", "avoided"),
    [
        ("idle|gpu:a100:8|a,b", "down*|gpu:a100:8|a,b", "node[1-2]"),
        ("idle*|gpu:a100:8|a,b", "mix|gpu:a100:8|a,b", "node[1-2]"),
        ("idle*|gpu:a100:8|a,b", "drain|gpu:a100:8|a,b", ""),
        ("alloc|gpu:v100:8|a,b", "idle|gpu:a100:8|a", ""),
    ],
)
def test_a_failed_node_is_avoided_if_others_of_its_kind_work(clients, tmp_path, node3, node4, avoided):
    """The newest job of the row ran on two nodes; of node3 to node5, two would have to take its place."""
    comment = "rule_finetune_wildcards_a_b"
    queue = [f"9|node7|gpu|1|{tmp_path}|{comment}", f"11|node[1-2]|gpu|2|{tmp_path}|{comment}",
             f"12|node3|gpu|1|/other|{comment}", f"13|node3|gpu|1|{tmp_path}|rule_evaluate_wildcards_a_b"]  # fmt: skip
    nodes = ["node1|drain|gpu:a100:8|a,b", "node2|idle|gpu:a100:8|a,b", f"node3|{node3}", f"node4|{node4}"]
    nodes.append("node5|comp|gpu:a100:8|a,b")
    sinfo = "".join(f"echo '{node}|64|1000'\n" for node in nodes)
    clients(squeue="".join(f"echo '{job}'\n" for job in queue), sinfo=sinfo, scontrol="echo node1; echo node2")
    assert nodes_to_avoid(tmp_path, "finetune", ["a/b"], "gpu") == avoided
    assert nodes_to_avoid(tmp_path, "finetune", ["other"], "gpu") == ""


@pytest.mark.parametrize(("host", "avoided"), [("node1", "node1"), ("node1.cluster", "node1"), ("gone", "")])
def test_the_node_of_a_job_that_slurm_has_forgotten_is_in_its_log(clients, tmp_path, host, avoided):
    log = tmp_path / ".snakemake/slurm_logs/rule_finetune/a_b/14.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"SNAKEMAKE\n  Platform: Linux\n  Host: {host}\n")
    older = f"9|node2|gpu|1|{tmp_path}|rule_finetune_wildcards_a_b"
    nodes = "".join(f"echo '{name}|idle|gpu:a100:8|a,b|64|1000'\n" for name in ("node1", "node2"))
    clients(squeue=f"echo '{older}'", sinfo=nodes, scontrol=f"echo {host.partition('.')[0]}")
    assert nodes_to_avoid(tmp_path, "finetune", ["a/b"], "gpu") == avoided


def test_jobs_on_one_machine_meet_at_ports_of_their_own(root, tmp_path):
    """Below the ports that Linux gives to outgoing connections, and never one that is taken."""
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\necho $port\n")
    srun.chmod(0o755)

    def port(job: int) -> int:
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": str(job)}
        launcher = [root / "scripts/torchrun_nodes.sh", "2", "4", "scripts/finetune.py"]
        return int(subprocess.run(launcher, env=environment, capture_output=True, text=True, check=True).stdout)

    first = port(4711)
    with socket.create_server(("", first)):
        ports = [first, port(4711), port(4712), port(2**26)]
    assert len(set(ports)) == 4
    assert all(1024 <= number < 32768 for number in ports)


def test_torchrun_in_a_job_is_the_launcher_with_the_same_options(root, tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/torchrun").symlink_to(root / "scripts/slurm/torchrun")
    launcher = tmp_path / "torchrun_nodes.sh"
    launcher.write_text('#!/bin/bash\necho "$@"\n')
    launcher.chmod(0o755)
    text = f"{Site().prologue(str(tmp_path))} torchrun --standalone --nproc_per_node=4 --shutdown-timeout=900 a.py --b 'c d'"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "1 4 --shutdown-timeout=900 a.py --b c d\n"
