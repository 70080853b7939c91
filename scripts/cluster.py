"""Check a SLURM cluster before jobs wait in its queue, and show the status of a run's jobs.

    python scripts/cluster.py site                            # write a first config/site.yaml from the cluster's answers
    python scripts/cluster.py check --config my.yaml          # check the run, with a probe job per partition
    python scripts/cluster.py check --nodes 2 --device a100-80gb   # also test the network of two such nodes
    python scripts/cluster.py status --config my.yaml         # rows, jobs, steps, time left (make slurm-status)
    python scripts/cluster.py wait                            # wait until no job of this folder runs or is queued

`check` exits with 1 if there is an error; warnings do not change the exit code. --no-probe skips the probe jobs.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from phi3v.cluster.ask import ClusterError
from phi3v.cluster.check import cluster_problems, login_problems, requests
from phi3v.cluster.facts import look, site_text
from phi3v.cluster.probe import all_reduce, probe
from phi3v.cluster.site import CPU, SITE_FILE, load_site
from phi3v.cluster.status import running_jobs, status_lines
from phi3v.planning.fits import runnable
from phi3v.settings import Hardware, load_run, number_of, read_entries, run_script


def site(path: str) -> int:
    """Write a first site file; an existing one stays."""
    text = site_text(look(), read_entries(["config/hardware.yaml"], Hardware, Path()))
    print(text, end="")
    if Path(path).exists():
        print(f"{path} exists and was not changed; to use the printed text, copy it there", file=sys.stderr)
        return 1
    Path(path).write_text(text, encoding="utf-8")
    print(f"{path}: written; review it, then run: python scripts/cluster.py check", file=sys.stderr)
    return 0


def check(config: str, probing: bool, nodes: int, device: str) -> int:
    """Print what is wrong and what is worth knowing; nodes: of the device, to look at and to time together."""
    run, here = runnable(load_run(config)), load_site()
    wanted = requests(run, here)
    found = login_problems(Path.cwd()) + cluster_problems(run, here, if_silent="error")
    lines: list[str] = []
    wrong = any(problem.level == "error" for problem in found)
    if nodes and not wrong:
        pools = [pool for pool in run.settings.hardware if pool.device == device]
        entry = here.of(device, pools[0].slurm_partition if pools else "")
        processes = pools[0].per_node if pools else entry.gpus_per_node or 1
        network = run.hardware[device].network_gb_s if device in run.hardware else None
        found += probe(here, entry, Path.cwd(), nodes)
        lines, more = all_reduce(here, entry, Path.cwd(), nodes, processes, network)
        found += more
    elif probing and not wrong:
        used = {CPU: here.of(CPU)} | {each.device: here.of(each.device, each.partition) for each in wanted}
        for entry in {entry.partition: entry for entry in used.values()}.values():
            found += probe(here, entry, Path.cwd())
    print("\n".join([*lines, *map(str, dict.fromkeys(found))]))
    errors, warnings = (sum(problem.level == level for problem in found) for level in ("error", "warning"))
    print(
        f"{number_of(len(wanted), 'kind')} of jobs checked: {number_of(errors, 'error')}, {number_of(warnings, 'warning')}"
    )
    return 1 if errors else 0


def status(config: str) -> int:
    """Print where each row stands; without SLURM, what the rows' files say."""
    run = runnable(load_run(config))
    try:
        jobs, silent = running_jobs(Path.cwd()), ""
    except ClusterError as error:
        jobs, silent = [], f"SLURM does not answer, so jobs that run or wait are not shown: {error}"
    print("\n".join(status_lines(run, Path(), jobs)), flush=True)
    if silent:
        print(silent, file=sys.stderr)
    return 0


def wait(seconds: float) -> int:
    """Return when no job of this folder is left; raises ClusterError."""
    said: list[str] = []
    while running := running_jobs(Path.cwd()):
        lines = [f"job {job.id}: {job.rule} {job.wildcards}, {job.state.lower()}" for job in running]
        if lines != said:
            print("\n".join(lines), flush=True)
            said = lines
        time.sleep(seconds)
    print("no job of this folder runs or waits")
    return 0


def main() -> int:
    """Parse and do one of the four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["site", "check", "status", "wait"], help="what to do, as in the examples above")
    parser.add_argument(
        "--config", default="config/config.yaml", help="configuration file of the run (default: config/config.yaml)"
    )
    parser.add_argument("--output", default=SITE_FILE, help=f"site: file to write (default: {SITE_FILE})")
    parser.add_argument("--no-probe", action="store_true", help="check: submit no probe jobs")
    parser.add_argument("--nodes", type=int, default=0, help="check: also time all-reduce over this many nodes")
    parser.add_argument(
        "--device", default="", help="check --nodes: device of these nodes, by its name in the site file"
    )
    parser.add_argument("--seconds", type=float, default=10, help="wait: seconds between two queries (default: 10)")
    given = parser.parse_args()
    if given.do == "site":
        return site(given.output)
    if given.do == "check":
        if bool(given.nodes) != bool(given.device):
            parser.error(f"got --nodes {given.nodes} --device {given.device!r}: expected both or neither")
        return check(given.config, not given.no_probe, given.nodes, given.device)
    return status(given.config) if given.do == "status" else wait(given.seconds)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` is no error
    run_script(main)
