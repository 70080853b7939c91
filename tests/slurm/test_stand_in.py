"""The test cluster is like a real one where it matters: names and process ids of a node mean nothing on another."""

from __future__ import annotations

import re
import sys
import time

import pytest


def test_each_node_has_a_name_and_process_ids_of_its_own(cluster):
    seen = cluster.on(
        "node[1-4]",
        sys.executable,
        "-c",
        "import os, platform; print(platform.node(), os.readlink('/proc/self/ns/pid'))",
    )
    names, spaces = zip(*(line.split() for line in seen.splitlines()), strict=True)
    assert sorted(names) == ["node1", "node2", "node3", "node4"]
    assert len(set(spaces)) == 4


@pytest.mark.verify
def test_a_node_that_loses_power_takes_its_jobs_with_it(cluster, tmp_path, until):
    beat = tmp_path / "beat"
    script = f"trap '' TERM; setsid sh -c 'while sleep 0.2; do date +%s.%N >{beat}; done' & wait"
    job = cluster.out("sbatch", "--parsable", "-w", "node2", "-o", "/dev/null", "--wrap", script).strip()
    until("the job runs", beat.exists)
    cluster.kill("node2")
    last = beat.stat().st_mtime_ns
    time.sleep(1)
    assert beat.stat().st_mtime_ns == last
    cluster.out("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    cluster.out("scancel", job)
    cluster.start_node("node2")
    until("the node is back", lambda: cluster.out("sinfo", "-h", "-n", "node2", "-p", "cpu", "-o", "%T") == "idle\n")


@pytest.mark.verify
def test_a_bare_cluster_forgets_jobs_and_keeps_no_accounts(bare_cluster):
    described = bare_cluster.out("scontrol", "show", "config")
    assert re.search(r"^MinJobAge +=\s+30 ", described, re.M)
    assert re.search(r"^AccountingStorageType +=\s+\(null\)|accounting_storage/none", described, re.M)
    assert bare_cluster.on("node3", "hostname") == "node3\n"
